r"""Pseudo-likelihood (Besag 1975) and ratio matching (Hyvärinen 2007): discrete data, one site at a time.

The distribution of one site given all others has a sum over the values of that site for its Z, which can be done:

.. math:: p_\theta(x_i \mid x_{-i}) = \frac{f_\theta(x)}{\sum_v f_\theta(x_{i \to v})} ,

with :math:`x_{i \to v}` the datum whose i-th entry is v. Z has cancelled. The loss is

.. math:: L(\theta) = -\sum_x \sum_i \log p_\theta(x_i \mid x_{-i}) .

Each conditional is a log-likelihood in its own right, whose expected gradient is 0 at the truth, so the estimate is
consistent; it is the maximum likelihood estimate where the sites are independent, and loses efficiency as dependence
grows. Sums over sites are not a log-likelihood of x: standard errors come from the sandwich.

Ratio matching has :math:`\sum_i (1 - p_\theta(x_i \mid x_{-i}))^2` instead, for binary data. Its conditionals enter by
a bounded loss, so that a datum the model takes for impossible moves little.

For D sites of K values a row costs (K − 1) D evaluations of log f beside its own; they are made in a few large batches.
Some of the sites, drawn anew for each row at each call, give an unbiased estimate at less cost.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_gen import handlers
from pyro_gen.base import Objective, ObjectiveModule, Unnormalized
from pyro_gen.checks import check_count
from pyro_gen.objectives.observed_supports import entry_support, observing_site, support_of

__all__ = ["PseudoLikelihood", "RatioMatching"]


class PseudoLikelihoodModule(ObjectiveModule):
    """The loss; ``values`` are those that an entry of x may take."""

    objective: PseudoLikelihood
    values: tuple[int, ...] = ()

    def check_structure(self, shape: handlers.Structure) -> None:
        shape.require_data_plate(type(self.objective).__name__)
        free = [name for name in shape.model_latents if name not in shape.enumerated]
        if free:
            raise handlers.free_latents(free)

    def prepare(self, *batch: Any, **kwargs: Any) -> handlers.Structure:
        shape = super().prepare(*batch, **kwargs)
        name, x = type(self.objective).__name__, batch[0]
        site = observing_site(self.model, *batch, **kwargs)
        if site is None:
            raise ValueError(
                f"{name} reads from the data site which values x may take, and no site observes x: add one, "
                "pyro.sample('x', dist.Bernoulli(0.5).expand([D]).to_event(1).mask(False), obs=x)"
            )
        support = support_of(site and site["fn"], x.dim() - 1)
        entry = entry_support(support)
        if not support.is_discrete:
            raise ValueError(
                f"{name} needs discrete x, and the data site is continuous ({support}): use pg.ScoreMatching"
            )
        if entry is constraints.boolean:
            self.values = (0, 1)
        elif hasattr(entry, "lower_bound") and hasattr(entry, "upper_bound"):
            low, high = (torch.as_tensor(end) for end in (entry.lower_bound, entry.upper_bound))
            if not bool((low == low.flatten()[0]).all() and (high == high.flatten()[0]).all()):
                raise ValueError(f"{name} needs the same values for every entry of x, and the support is {support}")
            self.values = tuple(range(int(low.flatten()[0]), int(high.flatten()[0]) + 1))
        else:
            raise ValueError(
                f"{name} sums over the values of one entry, which must be finitely many (boolean or integer_interval); "
                f"the support of the data site is {support}: use pg.NoiseContrastive with discrete noise"
            )
        if self.objective.binary and len(self.values) != 2:
            raise ValueError(
                f"{name} is for binary x, and the data site has {len(self.values)} values: use pg.PseudoLikelihood"
            )
        features = x.shape[1:].numel()
        if self.objective.sites is not None and self.objective.sites > features:
            raise ValueError(
                f"sites={self.objective.sites} is more than the {features} entries of a row: give fewer, or None"
            )
        return shape

    def log_conditionals(self, *batch: Any, **kwargs: Any) -> Tensor:
        r"""log p(x_i | x_{-i}) of each entry: ``(rows, sites)``, all entries or those drawn for this call."""
        shape = self.structure or self.prepare(*batch, **kwargs)
        x, rows = batch[0], len(batch[0])
        flat, features, count = x.flatten(1), x.shape[1:].numel(), len(self.values)
        sites = torch.arange(features, device=x.device).expand(rows, features)
        if self.objective.sites is not None and self.objective.sites < features:
            keys = torch.zeros(rows, features, device=x.device)
            sites = torch.normal(keys, torch.ones_like(keys)).argsort(1)[:, : self.objective.sites]
        here = self.log_density_rows(*batch, **kwargs)
        # the k-th of the other values is k places on, cyclically, so that none is asked for twice
        steps = torch.arange(1, count, device=x.device)
        at_once = max(1, self.objective.chunk_rows // (rows * (count - 1))) if shape.data_size == shape.rows else None
        found = []
        with poutine.block():  # the scale of a row is that of its data; these are other rows
            for part in sites.split(at_once or 1, dim=1):
                old = flat.gather(1, part)  # (rows, part)
                new = (old.unsqueeze(0) - self.values[0] + steps.reshape(-1, 1, 1)) % count + self.values[0]
                moved = flat.expand(count - 1, part.shape[1], *flat.shape)  # (values, part, rows, features)
                index = part.T.reshape(1, part.shape[1], rows, 1).expand(count - 1, -1, -1, -1)
                moved = moved.scatter(3, index, new.transpose(1, 2).unsqueeze(3).to(flat.dtype))
                moved = moved.reshape(-1, *x.shape[1:])
                found.append(self._elsewhere(moved, batch, kwargs, at_once is None).reshape(count - 1, -1, rows))
        gaps = torch.cat(found, 1).permute(2, 1, 0) - here.reshape(-1, 1, 1)  # (rows, sites, values)
        return -torch.logsumexp(torch.cat([torch.zeros_like(gaps[..., :1]), gaps], -1), -1)

    def _elsewhere(self, x: Tensor, batch: tuple[Any, ...], kwargs: dict[str, Any], by_batch: bool) -> Tensor:
        """log f at other data, of a multiple of the batch's rows; what else is in the batch goes along with each."""
        rows = len(batch[0])
        times = 1 if by_batch else len(x) // rows

        def along(part: Any) -> Any:
            if isinstance(part, Tensor) and part.dim() and len(part) == rows and times > 1:
                return part.repeat(times, *[1] * (part.dim() - 1))
            return part

        rest, named = [along(part) for part in batch[1:]], {name: along(part) for name, part in kwargs.items()}
        return torch.cat([self.log_density_rows(part, *rest, **named) for part in x.split(times * rows)])

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        """The loss of each row, a sum over its entries: ``(rows,)``."""
        log_conditionals = self.log_conditionals(*batch, **kwargs)
        whole: float = batch[0].shape[1:].numel() / log_conditionals.shape[1]
        return whole * self.loss_of(log_conditionals).sum(1)

    def loss_of(self, log_conditional: Tensor) -> Tensor:
        """What a conditional costs."""
        return -log_conditional


class PseudoLikelihood(Objective[Unnormalized]):
    r"""Negative log pseudo-likelihood :math:`-\sum_i \log p(x_i \mid x_{-i})` of discrete data: Z cancels site by site.

    Args:
        sites: entries of each row to take, drawn anew at each call, for an unbiased estimate; None for all of them.
        chunk_rows: rows of one evaluation of log f; bounds the memory.

    Raises:
        ValueError: for counts below 1; at the first call for continuous x, infinitely many values, more sites than a
            row has, a free latent site, no plate over rows.
        TypeError: for a program whose log f is not known.

    References:
        J. Besag, "Statistical analysis of non-lattice data", The Statistician 24, 1975.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def ising(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1).mask(False), obs=x)
        ...         pyro.factor("pair", 2 * x[:, 0] * x[:, 1])      # p(x_i = 1 | x_j = 1) = 1 / (1 + e^−2)
        >>> PseudoLikelihood()(ising)(torch.ones(1, 2))
        tensor(0.2539)
    """

    needs = (Unnormalized,)
    loss_is = "generalized"
    takes = "discrete"
    module_class: ClassVar[type[ObjectiveModule]] = PseudoLikelihoodModule
    binary: ClassVar[bool] = False

    def __init__(self, sites: int | None = None, *, chunk_rows: int = 65536) -> None:
        super().__init__()
        self.sites = None if sites is None else check_count(sites, "sites")
        self.chunk_rows = check_count(chunk_rows, "chunk_rows")
        self.deterministic = sites is None

    def settings(self) -> dict[str, Any]:
        return {"sites": self.sites, "chunk_rows": self.chunk_rows}


class RatioMatchingModule(PseudoLikelihoodModule):
    def loss_of(self, log_conditional: Tensor) -> Tensor:
        return torch.expm1(log_conditional).square()


class RatioMatching(PseudoLikelihood):
    r"""Ratio matching :math:`\sum_i (1 - p(x_i \mid x_{-i}))^2` of binary data: as pseudo-likelihood, but bounded.

    Args:
        sites, chunk_rows: as for `PseudoLikelihood`.

    Raises:
        ValueError, TypeError: as for `PseudoLikelihood`, and for x of more than two values.

    References:
        A. Hyvärinen, "Some extensions of score matching", Computational Statistics & Data Analysis 51, 2007, eq. 17.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def ising(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1).mask(False), obs=x)
        ...         pyro.factor("pair", 2 * x[:, 0] * x[:, 1])
        >>> RatioMatching()(ising)(torch.ones(1, 2))      # 2 (1 − .8808)²
        tensor(0.0284)
    """

    module_class = RatioMatchingModule
    binary = True
