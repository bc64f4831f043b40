r"""Maximum likelihood (Fisher 1922): :math:`\max_\theta \sum_n \log p_\theta(x_n)`.

For a program of known Z the loss is the negative log-likelihood itself, row by row,

.. math:: L(\theta) = -\frac{N}{B} \sum_{n=1}^{B} \log p_\theta(x_n),

the sum over a batch of B rows scaled to the N rows of the data set. Its expectation over batches is the full sum, its
minimum the point of least :math:`KL(q_{data} \,\|\, p_\theta)`. Nothing is random and nothing is bounded. For a program
whose Z depends on the weights the same sum is not a likelihood at all: it falls without end as Z grows, which is why
the kind must be `Exact`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_gen import handlers
from pyro_gen.base import Exact, Objective, ObjectiveModule

__all__ = ["MaximumLikelihood"]


class MaximumLikelihoodModule(ObjectiveModule):
    def check_structure(self, shape: handlers.Structure) -> None:
        shape.require_data_plate("MaximumLikelihood")
        if shape.model_latents:
            raise handlers.free_latents(shape.model_latents)

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        if isinstance(self.program, Exact) and type(self.program).log_prob is not Exact.log_prob:
            return -self.program.log_prob(*batch, **kwargs)  # the family's own, faster than a trace
        return -handlers.marginal_rows(self.model, *batch, **kwargs)


class MaximumLikelihood(Objective[Exact]):
    """Negative log-likelihood of a normalised program: Z = 1, so the likelihood is there to be maximised.

    Called with a program of kind `Exact`, or with any Pyro model without free latents (a guide is not used).

    Raises:
        ValueError: at the first call, if the model has a latent site or no plate over rows.
        TypeError: for a program whose density is not normalised.

    References:
        R. A. Fisher, "On the mathematical foundations of theoretical statistics", Phil. Trans. R. Soc. A 222, 1922.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.zeros(()))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> loss = MaximumLikelihood()(model)
        >>> loss(torch.zeros(2)), loss(torch.zeros(2), total=10)   # doctest: +NORMALIZE_WHITESPACE
        (tensor(1.8379, grad_fn=<SumBackward0>), tensor(9.1894, grad_fn=<SumBackward0>))
    """

    needs = (Exact,)
    loss_is = "log-likelihood"
    deterministic = True
    module_class = MaximumLikelihoodModule
