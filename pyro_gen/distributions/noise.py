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
`TableSchedule`  a table of :math:`\beta_i`, and nothing else                 the user's own             1
================ ============================================================ ========================== ==========

In discrete time a chain visits the levels of a ``grid``: the times :math:`0 = t_0 < t_1 < \dots < t_T` of T steps, at
which the schedule has the published :math:`\bar\alpha_i` (for ``"linear"`` and ``"cosine"``, whose papers give β_i), or
:math:`i / T`. At :math:`t_0 = 0` a chain has the datum itself: α = 1 and σ = 0.

**The ends.** At t = 0 exactly, α = 1, σ = 0, λ = ∞, λ' = −∞ and, but for ``"karras"`` and ``"rectified"``, σ' = ∞: what
divides by σ needs t > 0. ``"learned"`` alone starts at a finite λ, so its σ(0) is small but not 0. At t = 1 exactly the
``"cosine"``, ``"sigmoid"`` and ``"rectified"`` schedules are pure noise, α = 0, σ = 1, λ = −∞ (and α' = −∞ for the
sigmoid); the others keep a rest of the datum. `NoiseSchedule.ends` are times between which all is finite. Every formula
here keeps its relative accuracy towards both ends, in single precision too: differences of nearly equal numbers are
written as products, so that :math:`\sigma(t)` at t = 1e-6 is good to rounding.
"""

from __future__ import annotations

import math
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_gen.checks import check_count, describe
from pyro_gen.distributions.learned_noise import LearnedSchedule
from pyro_gen.distributions.noise_schedule import NoiseSchedule, TableSchedule

__all__ = [
    "CosineSchedule",
    "ExplodingSchedule",
    "KarrasSchedule",
    "LearnedSchedule",
    "LinearSchedule",
    "NoiseSchedule",
    "RectifiedSchedule",
    "ScheduleName",
    "SigmoidSchedule",
    "TableSchedule",
    "make_schedule",
]

ScheduleName = Literal["linear", "cosine", "sigmoid", "learned", "karras", "exploding", "rectified"]


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

    In T steps β runs from 1e-4 to .02 times 1000 / T, .999 at most. Steps of finite size take out more signal than
    continuous time does, so the last of them end a little after t = 1 (1.003 for T = 1000, 1.03 for T = 100).

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

    def alpha(self, t: Tensor) -> Tensor:
        return (self._integral(t) / -2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def log_snr_rate(self, t: Tensor) -> Tensor:
        return (self.first + (self.last - self.first) * t) / torch.expm1(-self._integral(t))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self.alpha(t), self.first + (self.last - self.first) * t
        return -beta * alpha / 2, beta * alpha.square() / (2 * self.sigma(t))

    def time(self, log_snr: Tensor) -> Tensor:
        integral = -logsigmoid(log_snr)
        return 2 * integral / (self.first + (self.first**2 + 2 * (self.last - self.first) * integral).sqrt())

    def betas(self, steps: int) -> Tensor:
        return (torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * 1000 / steps).clamp(max=0.999)


class CosineSchedule(_Discretised):
    r"""A quarter of a cosine, :math:`\alpha = \cos a_t / \cos a_0` with :math:`a_t = \frac\pi2 \frac{t + s}{1 + s}`.

    With :math:`a_t = a_0 + kt` the noise is :math:`\sigma^2 \cos^2 a_0 = \sin(kt) \sin(kt + 2 a_0)`, and the signal
    :math:`\cos a_t = \sin(k (1 - t))`: no digits are lost at either end. In T steps β is .999 at most.

    References:
        A. Nichol, P. Dhariwal, "Improved denoising diffusion probabilistic models", 2021, arXiv:2102.09672, eq. 17,
        s = .008.
    """

    name = "cosine"
    offset = 0.008

    @property
    def _speed(self) -> float:
        return math.pi / 2 / (1 + self.offset)

    def log_snr(self, t: Tensor) -> Tensor:
        turned, start = self._speed * t, self._speed * self.offset
        noise = turned.sin() * (turned + 2 * start).sin()
        return 2 * (self._speed * (1 - t)).sin().log() - noise.log()

    def alpha(self, t: Tensor) -> Tensor:
        return (self._speed * (1 - t)).sin() / math.cos(self._speed * self.offset)

    def sigma(self, t: Tensor) -> Tensor:
        turned, start = self._speed * t, self._speed * self.offset
        return (turned.sin() * (turned + 2 * start).sin()).sqrt() / math.cos(start)

    def log_snr_rate(self, t: Tensor) -> Tensor:
        turned, start = self._speed * t, self._speed * self.offset
        slope = 2 / (self._speed * (1 - t)).tan() + 1 / turned.tan() + 1 / (turned + 2 * start).tan()
        return -self._speed * slope

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        d_alpha = -self._speed * (self._speed * (1 - t)).cos() / math.cos(self._speed * self.offset)
        return d_alpha, -self.alpha(t) * d_alpha / self.sigma(t)

    def time(self, log_snr: Tensor) -> Tensor:
        signal, noise, start = log_snr.sigmoid(), (-log_snr).sigmoid(), self._speed * self.offset
        cos, sin = signal.sqrt() * math.cos(start), (noise + signal * math.sin(start) ** 2).sqrt()  # of a_t
        sin_turned = noise * math.cos(start) ** 2 / (sin * math.cos(start) + cos * math.sin(start))
        return torch.atan2(sin_turned, cos * math.cos(start) + sin * math.sin(start)) / self._speed

    def betas(self, steps: int) -> Tensor:
        signal = self.alpha(torch.arange(steps + 1, dtype=torch.float64) / steps).square()
        return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


class SigmoidSchedule(NoiseSchedule):
    r"""α² falls like a sigmoid from 3 to −3, moved and scaled to go from 1 to 0.

    With h = 3 and the sigmoid s, :math:`\alpha^2 = \frac{s(h - 2ht) - s(-h)}{s(h) - s(-h)}`, whose differences are
    products: :math:`\alpha^2 : \sigma^2 = \sinh(h(1 - t)) : \sinh(ht)`.

    References:
        A. Jabri, D. Fleet, T. Chen, "Scalable adaptive computation for iterative generation", 2023, arXiv:2212.11972,
        with start −3, end 3 and τ = 1.
    """

    name = "sigmoid"
    reach = 3.0

    def _shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (self.reach * (1 - t)).sinh(), (self.reach * t).sinh()

    def log_snr(self, t: Tensor) -> Tensor:
        signal, noise = self._shares(t)
        return signal.log() - noise.log()

    def alpha(self, t: Tensor) -> Tensor:
        signal, noise = self._shares(t)
        return (signal / (signal + noise)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        signal, noise = self._shares(t)
        return (noise / (signal + noise)).sqrt()

    def log_snr_rate(self, t: Tensor) -> Tensor:
        signal, noise = self._shares(t)
        return -self.reach * math.sinh(self.reach) / (signal * noise)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal, noise = self._shares(t)
        half_slope = self.reach * math.sinh(self.reach) / (2 * (signal + noise).square())  # −(α²)' / 2
        return -half_slope / self.alpha(t), half_slope / self.sigma(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.atanh(math.sinh(self.reach) / (log_snr.exp() + math.cosh(self.reach))) / self.reach


class _SignalKept(NoiseSchedule):
    """α = 1: the noise is added, and the variance grows."""

    variance_preserving = False

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * self.sigma(t).log()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), -self.sigma(t) * self.log_snr_rate(t) / 2


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

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.greatest) + self.rho * t.log())

    def log_snr_rate(self, t: Tensor) -> Tensor:
        return -2 * self.rho / t

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

    def log_snr_rate(self, t: Tensor) -> Tensor:
        return 2 * self._log_ratio / torch.expm1(-2 * t * self._log_ratio)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        grown = (2 * t * self._log_ratio).exp()
        return torch.zeros_like(t), self.least**2 * self._log_ratio * grown / self.sigma(t)

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
        LearnedSchedule,
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
