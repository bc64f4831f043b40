r"""A schedule that is learnt: γ(t) = −log SNR, a monotone function with trainable ends.

The continuous-time bound is an integral over the signal-to-noise ratio, :math:`\frac12 \int E|u - \hat u|^2\, dSNR`:
the way from one end to the other changes its variable and not its value. So the ends are learnt as any
parameter of the model, and the way between them only makes the estimate at random times less noisy. It is least noisy
where the integrand is constant, and each time is then worth as much as any other.

References:
    D. Kingma, T. Salimans, B. Poole, J. Ho, "Variational diffusion models", 2021, arXiv:2107.00630.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_gen.checks import check_count
from pyro_gen.distributions.noise_schedule import NoiseSchedule
from pyro_gen.transforms.numerical import increasing_root

__all__ = ["LearnedSchedule"]


class LearnedSchedule(NoiseSchedule):
    r"""λ = −γ(t) with γ a monotone network, :math:`\gamma(t) = \gamma_0 + (\gamma_1 - \gamma_0)\, h(t)`.

    .. math:: h(t) = \frac{g(t) - g(0)}{g(1) - g(0)}, \qquad g(t) = t + \sum_k w_k\, s(a_k (t - c_k))

    with the sigmoid s and positive w, a. h is exactly 0 and 1 at the ends and starts close to t.

    *What trains it.* The bound does, and nothing else: an unweighted loss is least where the noise is easiest to tell,
    and drives the schedule there. In continuous time the ends follow the gradient of the loss. The expectation of that
    does not depend on h, so h follows the gradient of the mean *square* of a row's loss, which is the variance plus
    what h does not move. :meth:`log_snr_parts` has λ twice for this, as a function of the ends and as one of h: with
    ℓ(λ, λ') the loss of a row at given noise, the loss to differentiate is :math:`\ell` at the first plus
    :math:`\ell^2` at the second, with the network's weights held there. In a chain of T steps the bound itself depends
    on h, and :meth:`log_snr` with its plain gradient is right for both.

    Args:
        gamma_0, gamma_1: γ at t = 0 and at t = 1 to start from; both are trained.
        units: number of sigmoids.

    Raises:
        ValueError: unless ``gamma_0 < gamma_1``, finite.

    References:
        D. Kingma, T. Salimans, B. Poole, J. Ho, "Variational diffusion models", 2021, arXiv:2107.00630, appendices H
        and I.

    Example:
        >>> import torch
        >>> from pyro_gen.distributions.noise import make_schedule
        >>> make_schedule("learned").log_snr(torch.tensor([0.0, 1.0])).detach()
        tensor([13.3000, -5.0000])
    """

    name = "learned"

    def __init__(self, gamma_0: float = -13.3, gamma_1: float = 5.0, units: int = 32) -> None:
        super().__init__()
        if not -math.inf < gamma_0 < gamma_1 < math.inf:
            raise ValueError(f"gamma_0 must be less than gamma_1, both finite: got {gamma_0!r} and {gamma_1!r}")
        count = check_count(units, "units")
        span = float(gamma_1) - float(gamma_0)
        self.gamma_0 = nn.Parameter(torch.tensor(float(gamma_0)))
        self.raw_span = nn.Parameter(torch.tensor(span + math.log(-math.expm1(-span))))  # softplus of it is the span
        self.raw_weights = nn.Parameter(torch.full((count,), math.log(math.expm1(1 / count))))
        self.raw_slopes = nn.Parameter(torch.full((count,), 10.0))
        self.centres = nn.Parameter((torch.arange(count) + 0.5) / count)

    @property
    def gamma_1(self) -> Tensor:
        """γ(1), which stays above γ(0)."""
        return self.gamma_0 + softplus(self.raw_span)

    def _pieces(self, held: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """w, a and c; as numbers where they are held."""
        pieces = softplus(self.raw_weights), softplus(self.raw_slopes), self.centres
        return cast(tuple[Tensor, Tensor, Tensor], tuple(p.detach() for p in pieces)) if held else pieces

    def _unit(self) -> Tensor:
        """0 and 1, as the parameters are."""
        return torch.arange(2, dtype=self.gamma_0.dtype, device=self.gamma_0.device)

    @staticmethod
    def _height(t: Tensor, pieces: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        weights, slopes, centres = pieces
        return t + ((slopes * (t.unsqueeze(-1) - centres)).sigmoid() * weights).sum(-1)

    def _interior(self, t: Tensor, held: bool = False) -> Tensor:
        pieces = self._pieces(held)
        low, high = self._height(self._unit(), pieces).unbind()
        return (self._height(t, pieces) - low) / (high - low)

    def interior(self, t: Tensor) -> Tensor:
        """h(t), which rises from 0 to 1."""
        return self._interior(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return -(self.gamma_0 + softplus(self.raw_span) * self.interior(t))

    def log_snr_parts(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """λ(t) twice: differentiable in γ_0 and γ_1 (and t) alone, and in the parameters of h (and t) alone.

        ``torch.func.jvp(schedule.log_snr_parts, (t,), (ones,))`` has both and their rates in t.
        """
        by_ends = self.gamma_0 + softplus(self.raw_span) * self._interior(t, held=True)
        by_interior = self.gamma_0.detach() + softplus(self.raw_span).detach() * self._interior(t)
        return -by_ends, -by_interior

    def log_snr_rate(self, t: Tensor) -> Tensor:
        weights, slopes, centres = pieces = self._pieces()
        values = (slopes * (t.unsqueeze(-1) - centres)).sigmoid()
        rate = 1 + (values * (1 - values) * weights * slopes).sum(-1)
        low, high = self._height(self._unit(), pieces).unbind()
        return -softplus(self.raw_span) * rate / (high - low)

    def time(self, log_snr: Tensor) -> Tensor:
        """The time at which λ is reached, by bisection: it has no derivatives."""
        return increasing_root(lambda t: -self.log_snr(t), -log_snr)

    @property
    def ends(self) -> tuple[float, float]:
        """All of [0, 1]: λ is finite at both ends."""
        return 0.0, 1.0
