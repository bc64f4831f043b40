r"""Score matching along random directions: the trace of :math:`\nabla s` without its d diagonal entries.

For any random v with :math:`E[v v^\top] = I` the loss of :mod:`pyro_gen.objectives.score_matching` is

.. math:: J(\theta) = E\big[\tfrac12 |s|^2 + \mathrm{tr} \nabla s\big]
          = E_x E_v\big[\tfrac12 (v^\top s)^2 + v^\top \nabla s\, v\big] ,

and the first term may also be taken as it is, without v. Two ways to :math:`v^\top \nabla s\, v`: by one more reverse
pass (`SlicedScoreMatching`), or by differences along v (`FiniteDifferenceScoreMatching`): with L = log f

.. math:: \frac{L(x + \epsilon v) + L(x - \epsilon v) - 2 L(x)}{\epsilon^2} = v^\top \nabla s\, v + O(\epsilon^2), \quad
          \frac{L(x + \epsilon v) - L(x - \epsilon v)}{2 \epsilon} = v^\top s + O(\epsilon^2) .

Differences see kinks too: their mean over the data is the derivative of E as a distribution. A constant in E cancels
in them up to rounding only: its gradient is a sum of terms :math:`\pm \epsilon^{-2}`, in whatever order the network
takes it, and an optimizer that normalises gradients follows what is left; so give an energy no output bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_gen.base import Objective, Unnormalized
from pyro_gen.checks import check_count, describe
from pyro_gen.objectives.data_sites import DataSite, Repeated
from pyro_gen.objectives.latent_scores import repeat
from pyro_gen.objectives.score_matching import ScoreModule, check_smooth_flag, row_sum

__all__ = ["FiniteDifferenceScoreMatching", "SlicedScoreMatching"]

Noise = Literal["rademacher", "sphere", "normal"]
LARGEST_NOISE = 0.1  # share of a second difference that rounding may make up


class SlicedScoreMatchingModule(ScoreModule):
    objective: SlicedScoreMatching

    def score_rows(self, *batch: Any, **kwargs: Any) -> Tensor:
        x, objective = batch[0], self.objective
        v = [directions(x, objective.noise) for _ in range(objective.projections)]
        _, score, products = hessian_products(self.density(batch, kwargs), x, v)
        trace = _mean([row_sum(product * one) for product, one in zip(products, v, strict=True)])
        if objective.variance_reduction:
            square = row_sum(score.square())
        else:
            square = _mean([row_sum(score * one).square() for one in v])
        return trace + 0.5 * square


class FiniteDifferenceScoreMatchingModule(ScoreModule):
    objective: FiniteDifferenceScoreMatching

    def examine(self, site: DataSite, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_step(batch[0], self.objective.eps)
        super().examine(site, batch, kwargs)

    def score_rows(self, *batch: Any, **kwargs: Any) -> Tensor:
        shape = self.structure
        assert shape is not None
        x, eps, count = batch[0], self.objective.eps, self.objective.projections
        lengths = (eps, 2 * eps) if self.objective.richardson else (eps,)
        v = [directions(x, "rademacher") for _ in range(count)]
        points = [x, *(x + sign * length * one for length in lengths for sign in (1, -1) for one in v)]
        with Repeated(shape.data_plate, len(points)):
            rest = [repeat(part, len(points), len(x)) for part in batch[1:]]
            values = self.log_density_rows(torch.cat(points), *rest, **kwargs).reshape(len(points), len(x))
        middle, ends = values[0], values[1:].reshape(len(lengths), 2, count, len(x))
        first = [(up - down) / (2 * length) for (up, down), length in zip(ends, lengths, strict=True)]
        second = [
            ((up - middle) + (down - middle)) / length**2 for (up, down), length in zip(ends, lengths, strict=True)
        ]
        if self.objective.richardson:  # errors of order eps² are four times as large at twice the step
            first, second = ([(4 * near - far) / 3] for near, far in (first, second))
        result: Tensor = (second[0] + 0.5 * first[0].square()).mean(0)
        return result


def _mean(values: list[Tensor]) -> Tensor:
    """The mean over directions; of one of them itself."""
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)


# --------------------------------------------------------------------------------------------------------- derivatives
def directions(x: Tensor, noise: Noise) -> Tensor:
    """Random directions of x's shape, one a row, with E[vvᵀ] = I."""
    if noise == "rademacher":
        return 2 * torch.bernoulli(torch.full_like(x, 0.5)) - 1
    v = torch.normal(torch.zeros_like(x), torch.ones_like(x))
    if noise == "normal":
        return v
    flat = v.reshape(len(x), -1)
    length: Tensor = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    scaled: Tensor = math.sqrt(flat.shape[1]) * flat / length
    return scaled.reshape(x.shape)


def hessian_products(f: Callable[[Tensor], Tensor], x: Tensor, v: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Value and gradient of f, and its Hessian times each direction, by reverse mode twice.

    Plain ``torch.autograd`` where it can be, at two thirds of the time of ``torch.func``; that under its transforms.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            value = f(y)
            (gradient,) = torch.autograd.grad(value.sum(), y, create_graph=True)
            products = [_pulled(gradient, y, one, recorded) for one in v]
        if recorded:
            return value, gradient, products
        return value.detach(), gradient.detach(), products

    def total(y: Tensor) -> tuple[Tensor, Tensor]:
        value = f(y)
        return value.sum(), value

    gradient, pull, value = torch.func.vjp(torch.func.grad(total, has_aux=True), x, has_aux=True)  # type: ignore[misc]
    return value, gradient, [pull(one)[0] for one in v]


def _pulled(gradient: Tensor, y: Tensor, v: Tensor, recorded: bool) -> Tensor:
    if not gradient.requires_grad:  # of an energy that is linear in x, and has no weights
        return torch.zeros_like(y)
    (product,) = torch.autograd.grad(
        gradient, y, v, create_graph=recorded, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return product


def check_step(x: Tensor, eps: float) -> None:
    """Raise a ``ValueError`` where rounding, or the spread of the data, makes differences over ``eps`` meaningless.

    With u the rounding unit, a second difference of E has error 4u|E|/ε², of E/scale² when E varies by its own size
    over the scale of x; and x + εv is off by u|x|.
    """
    if x.is_meta or not is_validation_enabled():
        return
    unit = torch.finfo(x.dtype).eps
    scale = float(x.std(0, unbiased=False).square().mean().sqrt())
    largest = float(x.abs().max())
    least = max(math.sqrt(4 * unit / LARGEST_NOISE) * scale, unit * largest / LARGEST_NOISE)
    if eps < least:
        raise ValueError(
            f"eps must be at least {least:.2g} for {x.dtype} data of scale {scale:.2g} (largest {largest:.2g}), got "
            f"{eps}: below it differences of the energy are rounding noise. Use a larger eps, or float64"
        )
    if scale and eps > scale:
        raise ValueError(
            f"eps must be below the scale of the data, {scale:.2g}, got {eps}: differences over it are no derivatives"
        )


# ---------------------------------------------------------------------------------------------------------- objectives
class SlicedScoreMatching(Objective[Unnormalized]):
    r"""Sliced score matching: :math:`E_v[v^\top \nabla s\, v] + \tfrac12 |s|^2`, one more reverse pass a projection.

    The same minimum as `ScoreMatching` at a price that does not grow with the number of features; no Z. Unbiased, as
    E[vvᵀ] = I for every noise (directions on the sphere have length √d).

    Args:
        projections: random directions M a row and call.
        variance_reduction: take |s|² as it is; False has :math:`(v^\top s)^2`, which costs the same and adds noise.
        noise: of the directions: ``"rademacher"`` (least variance, exact for a diagonal Hessian), ``"sphere"`` or
            ``"normal"``.
        check_smooth: refuse energies with piecewise-linear activations, whose second derivative is 0.

    Raises:
        ValueError, TypeError: as `ScoreMatching`; for ``projections`` below 1.

    References:
        Y. Song, S. Garg, J. Shi, S. Ermon, "Sliced score matching", UAI 2019, arXiv:1905.07088.
        M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
    """

    needs = (Unnormalized,)
    loss_is = "generalized"
    takes = "continuous"
    validates = True
    module_class = SlicedScoreMatchingModule

    def __init__(
        self,
        projections: int = 1,
        *,
        variance_reduction: bool = True,
        noise: Noise = "rademacher",
        check_smooth: bool = True,
    ) -> None:
        super().__init__()
        self.projections = check_count(projections, "projections")
        if noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(map(repr, get_args(Noise)))}, got {describe(noise)}")
        self.variance_reduction, self.noise = bool(variance_reduction), noise
        self.check_smooth = check_smooth_flag(check_smooth)

    def settings(self) -> dict[str, Any]:
        return {
            "projections": self.projections,
            "variance_reduction": self.variance_reduction,
            "noise": self.noise,
            "check_smooth": self.check_smooth,
        }


class FiniteDifferenceScoreMatching(Objective[Unnormalized]):
    r"""Sliced score matching by differences of the energy: one forward pass on 3 copies of the batch, no Z.

    .. math:: \frac{L_+ + L_- - 2 L_0}{\epsilon^2} + \frac12 \Big(\frac{L_+ - L_-}{2 \epsilon}\Big)^2, \qquad
              L_\pm = \log f(x \pm \epsilon v), \quad v \in \{-1, 1\}^d .

    The minimum is off by a term of order ε², in the units of x; ``richardson`` removes it. The gradient of a constant
    in the energy is zero up to rounding of terms of size ε⁻²: leave out the bias of its last layer.

    Args:
        eps: the step in each number of x, in the units of x. At least .01 of the scale of the data in float32; below
            about .002 of it differences are rounding noise, and refused.
        richardson: extrapolate from steps ε and 2ε to order ε⁴: 5 copies of the batch.
        projections: random directions M a row and call.

    Raises:
        ValueError, TypeError: as `ScoreMatching`; for a step that is not positive, below the noise of the data's dtype,
            or above their scale.

    References:
        T. Pang et al., "Efficient learning of generative models via finite-difference score matching", NeurIPS 2020,
        arXiv:2007.03317.
    """

    needs = (Unnormalized,)
    loss_is = "generalized"
    takes = "continuous"
    validates = True
    module_class = FiniteDifferenceScoreMatchingModule

    def __init__(self, eps: float = 0.1, *, richardson: bool = False, projections: int = 1) -> None:
        super().__init__()
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
            raise ValueError(f"eps must be a positive number, in the units of x, got {describe(eps)}")
        self.eps, self.richardson = float(eps), bool(richardson)
        self.projections = check_count(projections, "projections")

    def settings(self) -> dict[str, Any]:
        return {"eps": self.eps, "richardson": self.richardson, "projections": self.projections}
