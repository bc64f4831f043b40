r"""Noise schedules: how a datum turns into noise, :math:`x_t = \alpha(t)\, x_0 + \sigma(t)\, \varepsilon`.

Time runs from 0, the datum, to 1, the noise, whatever the schedule. Only the log signal-to-noise ratio
:math:`\lambda(t) = \log \alpha^2 / \sigma^2`, which falls from ∞, says how far the noise has come: two schedules visit
the same densities, up to the factor :math:`\sqrt{\alpha^2 + \sigma^2}` on x, at other times. So a schedule is the pair
(α, σ), their derivatives in t, and the inverse, the time at which λ is reached:

================ ============================================================ ========================== ==========
name             α, σ                                                         source                     α² + σ²
================ ============================================================ ========================== ==========
``"linear"``     :math:`\alpha^2 = \exp(-\int_0^t \beta)`, β from .1 to 20    Ho et al. 2020             1
``"cosine"``     :math:`\alpha = \cos(a_t) / \cos(a_0)`                       Nichol & Dhariwal 2021     1
``"sigmoid"``    :math:`\alpha^2` a sigmoid from 3 to −3, normalised          Jabri et al. 2023          1
``"learned"``    :math:`\lambda = -\gamma(t)`, a monotone network             Kingma et al. 2021         1
``"karras"``     :math:`\alpha = 1, \sigma = \sigma_{max} t^7`                Karras et al. 2022         not 1
``"exploding"``  :math:`\alpha = 1, \sigma` nearly geometric                  Song et al. 2021           not 1
``"rectified"``  :math:`\alpha = 1 - t, \sigma = t`                           Lipman et al. 2023         not 1
================ ============================================================ ========================== ==========

In discrete time a chain visits the levels of a ``grid``: the times :math:`0 = t_0 < t_1 < \dots < t_T` of T steps, at
which the schedule has the published :math:`\bar\alpha_i` (for ``"linear"`` and ``"cosine"``, whose papers give β_i), or
:math:`i / T`. At :math:`t_0 = 0` a chain has the datum itself: α = 1 and σ = 0.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from pyro_gen.checks import check_count, describe

__all__ = [
    "CosineSchedule",
    "ExplodingSchedule",
    "KarrasSchedule",
    "LinearSchedule",
    "NoiseSchedule",
    "RectifiedSchedule",
    "ScheduleName",
    "SigmoidSchedule",
    "make_schedule",
]

ScheduleName = Literal["linear", "cosine", "sigmoid", "learned", "karras", "exploding", "rectified"]


class NoiseSchedule(nn.Module):
    r"""A schedule: α(t), σ(t), λ(t) and their relations; times are tensors of any shape, in [0, 1].

    A subclass gives :meth:`log_snr` and :meth:`time`, and :meth:`alpha`, :meth:`sigma`, :meth:`derivatives` where it
    does not preserve the variance.

    Attributes:
        name: its name in ``Diffusion(schedule=...)``.
        variance_preserving: whether α² + σ² = 1.
        ratios: the least and the greatest σ/α of continuous time: `ends` are their times.
    """

    name: str
    variance_preserving: bool = True
    ratios: tuple[float, float] = (1e-3, 1e3)

    def log_snr(self, t: Tensor) -> Tensor:
        """λ(t) = log α²/σ², of the shape of t."""
        raise NotImplementedError

    def time(self, log_snr: Tensor) -> Tensor:
        """The time at which λ is reached, the inverse of :meth:`log_snr`."""
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        """α(t), the factor of the datum."""
        return (logsigmoid(self.log_snr(t)) / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """σ(t), the standard deviation of the noise."""
        return (logsigmoid(-self.log_snr(t)) / 2).exp()

    def log_snr_rate(self, t: Tensor) -> Tensor:
        """λ'(t), which is negative."""
        with torch.enable_grad():
            at = t.detach().requires_grad_()
            (rate,) = torch.autograd.grad(self.log_snr(at).sum(), at, create_graph=torch.is_grad_enabled())
        return rate

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""α'(t) and σ'(t): :math:`\alpha' = \tfrac12 \alpha \sigma^2 \lambda'`, :math:`\sigma' = -\tfrac12 \sigma
        \alpha^2 \lambda'` where α² + σ² = 1."""
        alpha, sigma, rate = self.alpha(t), self.sigma(t), self.log_snr_rate(t)
        return alpha * sigma.square() * rate / 2, -sigma * alpha.square() * rate / 2

    @property
    def ends(self) -> tuple[float, float]:
        """The times between which continuous time runs: where σ/α has its `ratios`, 1 at most."""
        least, greatest = (-2 * torch.tensor(self.ratios, dtype=torch.float64).log()).unbind()
        with torch.no_grad():
            return float(self.time(least)), min(1.0, float(self.time(greatest)))

    def grid(self, steps: int) -> Tensor:
        """Times of a chain of T steps, ``(steps + 1,)`` in float64, from 0 upwards."""
        return torch.arange(check_count(steps, "timesteps") + 1, dtype=torch.float64) / steps

    def extra_repr(self) -> str:
        return f"{self.name!r}"


class _Discretised(NoiseSchedule):
    r"""A schedule whose paper has :math:`\beta_i = 1 - \bar\alpha_i / \bar\alpha_{i-1}`: its grid has those levels."""

    def betas(self, steps: int) -> Tensor:
        """β_1, …, β_T, ``(steps,)`` in float64."""
        raise NotImplementedError

    def grid(self, steps: int) -> Tensor:
        log_signal = torch.log1p(-self.betas(check_count(steps, "timesteps"))).cumsum(0)  # log ᾱ_i
        log_snr = log_signal - torch.log(-torch.expm1(log_signal))
        return torch.cat([log_snr.new_zeros(1), self.time(log_snr)])


class LinearSchedule(_Discretised):
    r"""β rises linearly, :math:`\alpha^2 = \exp(-\beta_0 t - (\beta_1 - \beta_0) t^2 / 2)`.

    In T steps β runs from 1e-4 to .02 times 1000 / T, .999 at most.

    References:
        J. Ho, A. Jain, P. Abbeel, "Denoising diffusion probabilistic models", 2020, arXiv:2006.11239, section 4;
        Y. Song et al., "Score-based generative modeling through stochastic differential equations", 2021,
        arXiv:2011.13456, appendix C.
    """

    name = "linear"
    first, last = 0.1, 20.0

    def _integral(self, t: Tensor) -> Tensor:
        return self.first * t + (self.last - self.first) * t.square() / 2

    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(torch.expm1(self._integral(t)))

    def log_snr_rate(self, t: Tensor) -> Tensor:
        return (self.first + (self.last - self.first) * t) / torch.expm1(-self._integral(t))

    def time(self, log_snr: Tensor) -> Tensor:
        integral = softplus(-log_snr)
        return 2 * integral / (self.first + (self.first**2 + 2 * (self.last - self.first) * integral).sqrt())

    def betas(self, steps: int) -> Tensor:
        return (torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * 1000 / steps).clamp(max=0.999)


class CosineSchedule(_Discretised):
    r"""A quarter of a cosine, :math:`\alpha = \cos a_t / \cos a_0` with :math:`a_t = \frac\pi2 \frac{t + s}{1 + s}`.

    In T steps β is .999 at most.

    References:
        A. Nichol, P. Dhariwal, "Improved denoising diffusion probabilistic models", 2021, arXiv:2102.09672, eq. 17,
        s = .008.
    """

    name = "cosine"
    offset = 0.008

    def _angle(self, t: Tensor | float) -> Any:
        return math.pi / 2 * (t + self.offset) / (1 + self.offset)

    def log_snr(self, t: Tensor) -> Tensor:
        angle, start = self._angle(t), self._angle(0.0)  # cos² a_0 − cos² a = sin(a − a_0) sin(a + a_0)
        return 2 * angle.cos().log() - torch.log((angle - start).sin() * (angle + start).sin())

    def log_snr_rate(self, t: Tensor) -> Tensor:
        angle, start = self._angle(t), self._angle(0.0)
        slope = angle.tan() * 2 + 1 / (angle - start).tan() + 1 / (angle + start).tan()
        return -slope * math.pi / 2 / (1 + self.offset)

    def time(self, log_snr: Tensor) -> Tensor:
        signal, noise = log_snr.sigmoid(), (-log_snr).sigmoid()
        start = self._angle(0.0)
        angle = torch.atan2((noise + signal * math.sin(start) ** 2).sqrt(), signal.sqrt() * math.cos(start))
        return angle * 2 / math.pi * (1 + self.offset) - self.offset

    def betas(self, steps: int) -> Tensor:
        angles = self._angle(torch.arange(steps + 1, dtype=torch.float64) / steps)
        signal = angles.cos().square()
        return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


class SigmoidSchedule(NoiseSchedule):
    r"""α² falls like a sigmoid from 3 to −3, moved and scaled to go from 1 to 0.

    References:
        A. Jabri, D. Fleet, T. Chen, "Scalable adaptive computation for iterative generation", 2023, arXiv:2212.11972,
        with start −3, end 3 and τ = 1.
    """

    name = "sigmoid"
    start, end = -3.0, 3.0

    def log_snr(self, t: Tensor) -> Tensor:
        at = self.start + t * (self.end - self.start)
        top, bottom = (torch.as_tensor(-v, dtype=t.dtype, device=t.device).sigmoid() for v in (self.start, self.end))
        return torch.log((-at).sigmoid() - bottom) - torch.log(top - (-at).sigmoid())

    def time(self, log_snr: Tensor) -> Tensor:
        top, bottom = (
            torch.as_tensor(-v, dtype=log_snr.dtype, device=log_snr.device).sigmoid() for v in (self.start, self.end)
        )
        at = -torch.logit(bottom + log_snr.sigmoid() * (top - bottom))
        return (at - self.start) / (self.end - self.start)


class _SignalKept(NoiseSchedule):
    """α = 1: the noise is added, and the variance grows."""

    variance_preserving = False

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * self.sigma(t).log()

    def log_snr_rate(self, t: Tensor) -> Tensor:
        return -2 * self.derivatives(t)[1] / self.sigma(t)


class KarrasSchedule(_SignalKept):
    r"""Noise is added, :math:`\sigma(t) = \sigma_{max}\, t^\rho` with ρ = 7, in standard deviations of the data.

    A grid of N steps has Karras et al.'s levels, from σ_max down to σ_min in equal steps of :math:`\sigma^{1/\rho}`,
    and then 0.

    References:
        T. Karras et al., "Elucidating the design space of diffusion-based generative models", 2022, arXiv:2206.00364,
        eq. 5. Their σ from .002 to 80 belong to data of standard deviation .5.
    """

    name = "karras"
    rho, least, greatest = 7.0, 0.004, 160.0
    ratios = (least, greatest)

    def sigma(self, t: Tensor) -> Tensor:
        return self.greatest * t**self.rho

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), self.greatest * self.rho * t ** (self.rho - 1)

    def time(self, log_snr: Tensor) -> Tensor:
        return ((-log_snr / 2 - math.log(self.greatest)) / self.rho).exp()

    def grid(self, steps: int) -> Tensor:
        first = (self.least / self.greatest) ** (1 / self.rho)
        levels = torch.linspace(first, 1.0, check_count(steps, "timesteps"), dtype=torch.float64)
        if steps == 1:
            levels = levels.new_ones(1)
        return torch.cat([levels.new_zeros(1), levels])


class ExplodingSchedule(_SignalKept):
    r"""Noise is added, :math:`\sigma^2(t) = \sigma_{min}^2 ((\sigma_{max}/\sigma_{min})^{2t} - 1)`, geometric but at 0.

    References:
        Y. Song et al., 2021, arXiv:2011.13456, appendix C (the VE SDE, started from the datum itself); σ in standard
        deviations of the data.
    """

    name = "exploding"
    least, greatest = 0.01, 100.0
    ratios = (1e-3, greatest)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.greatest / self.least)

    def sigma(self, t: Tensor) -> Tensor:
        return self.least * torch.expm1(2 * t * self._log_ratio).sqrt()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        grown = (2 * t * self._log_ratio).exp()
        return torch.zeros_like(t), self.least * self._log_ratio * grown / torch.expm1(2 * t * self._log_ratio).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.log1p((-log_snr).exp() / self.least**2) / (2 * self._log_ratio)


class RectifiedSchedule(NoiseSchedule):
    r"""A straight line from datum to noise, :math:`x_t = (1 - t)\, x_0 + t\, \varepsilon` (conditional optimal
    transport); its velocity is :math:`\varepsilon - x_0`.

    References:
        Y. Lipman et al., "Flow matching for generative modeling", 2023, arXiv:2210.02747, eq. 22 (with time reversed);
        X. Liu, C. Gong, Q. Liu, "Flow straight and fast", 2023, arXiv:2209.03003.
    """

    name = "rectified"
    variance_preserving = False

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - t.log())

    def log_snr_rate(self, t: Tensor) -> Tensor:
        return -2 / (t * (1 - t))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).sigmoid()


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    schedule.name: schedule
    for schedule in (
        LinearSchedule,
        CosineSchedule,
        SigmoidSchedule,
        KarrasSchedule,
        ExplodingSchedule,
        RectifiedSchedule,
    )
}


def make_schedule(schedule: ScheduleName | NoiseSchedule) -> NoiseSchedule:
    """The schedule of a name, or the one given.

    Raises:
        ValueError: for a name that is none.
    """
    if isinstance(schedule, NoiseSchedule):
        return schedule
    if schedule not in SCHEDULES:
        names = ", ".join(map(repr, get_args(ScheduleName)))
        raise ValueError(f"schedule must be one of {names}, or a NoiseSchedule; got {describe(schedule)}")
    return SCHEDULES[cast(str, schedule)]()
