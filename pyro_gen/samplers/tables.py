r"""Grids of times, and what a step from one level to a lower one does: a few numbers, worked out once.

At level t the network's output F splits y into datum and noise, :math:`\hat u = a y + b F` and
:math:`\hat\varepsilon = c y + d F`. A step to level s makes of them, whatever the schedule,

.. math:: y_s = \alpha_s \hat u + \kappa\, \hat\varepsilon + \nu z, \qquad
          \nu = \eta\, \sigma_s \sqrt{1 - q}, \quad \kappa = \sigma_s \sqrt{1 - \eta^2 (1 - q)}, \quad
          q = \frac{\alpha_t^2 \sigma_s^2}{\alpha_s^2 \sigma_t^2} = e^{\lambda_t - \lambda_s}

(DDIM): were :math:`\hat u` the datum, :math:`y_s` would have the density of level s for every η. With η = 1 it is the
exact posterior of :math:`y_s` given :math:`y_t` and :math:`\hat u`, whose variance :math:`\nu^2` is the "small" one of
a reverse chain; a chain may have another variance about the same mean. With η = 0 it is Euler's step of the
probability-flow ODE, which in :math:`w = y / \alpha` and :math:`\rho = \sigma / \alpha` is
:math:`dw / d\rho = \hat\varepsilon`; Heun's rule replaces :math:`\hat\varepsilon` by the mean of its values at both
ends. In half log-SNR, :math:`h = (\lambda_s - \lambda_t) / 2`, the same ODE has the exact solution :math:`y_s =
(\sigma_s / \sigma_t) y_t + \alpha_s (1 - e^{-h}) \hat u` for a constant :math:`\hat u`; DPM-Solver++(2M) puts
:math:`(1 + k) \hat u - k \hat u_{old}` in its place, the line through the last two at the step's middle,
:math:`k = h / 2 h_{old}`.

All of it is linear in (y, F, z, û_old), so a step is three or four numbers. The clean datum has α = 1 and σ = 0, where
every rule gives :math:`\hat u`; and so it does from α = 0 in the rules of second order, where ρ and h are infinite.

References:
    J. Song, C. Meng, S. Ermon, "Denoising diffusion implicit models", 2021, arXiv:2010.02502, eq. 12; T. Karras et al.,
    2022, arXiv:2206.00364, algorithm 2; C. Lu et al., "DPM-Solver++", 2022, arXiv:2211.01095, algorithm 2.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_gen.base import Noised
from pyro_gen.checks import describe

__all__ = [
    "Heun",
    "Levels",
    "Linear",
    "Spacing",
    "chain_of",
    "check_times",
    "heun",
    "levels_of",
    "linear",
    "multistep",
    "span_of",
    "times_of",
]

Spacing = Literal["index", "time", "log_snr", "karras"]
Array = NDArray[np.float64]
RHO = 7.0  # of Karras et al.'s spacing


# -------------------------------------------------------------------------------------------------------------- grids
def chain_of(program: Noised) -> Tensor | None:
    """The levels of a program in discrete time, ``(T,)`` from t_1 upwards in float64; None in continuous time.

    A program in discrete time has them as its attribute ``grid``, ``(T + 1,)`` with the datum's 0 first.
    """
    grid: Tensor | None = getattr(program, "grid", None)
    return None if grid is None or not len(grid) else grid.detach().double().cpu()[1:]


def times_of(program: Noised, steps: int, spacing: Spacing | None) -> Tensor:
    """Decreasing times from the program's greatest to its least, ``(steps,)`` in float64.

    Raises:
        ValueError: for more steps than a program in discrete time has, or ``"index"`` in continuous time.
    """
    chain = chain_of(program)
    spacing = ("time" if chain is None else "index") if spacing is None else spacing
    if chain is None:
        if spacing == "index":
            raise ValueError(
                f"spacing='index' counts the levels of a program in discrete time, and {describe(program)} is in "
                f"continuous time: use one of {', '.join(map(repr, get_args(Spacing)[1:]))}"
            )
        return _spaced(program, steps, spacing)
    if steps > len(chain):
        raise ValueError(
            f"steps must be at most the {len(chain)} levels that {describe(program)} was trained at, got {steps}"
        )
    if spacing == "index":
        return chain[_spread(len(chain) - 1, 0, steps).add(0.5).long()]
    return chain[_nearest(program, chain, steps, spacing)]


def _nearest(program: Noised, chain: Tensor, steps: int, spacing: Spacing) -> list[int]:
    """Which levels of a chain lie nearest to an even spacing: decreasing, the last and the first among them."""
    log_ratio = -program.schedule.log_snr(chain.to(program.location.device)).cpu() / 2
    kept = int(torch.isfinite(log_ratio[-1]) | (len(chain) == 1))  # no datum is left at the last: space the others
    key = {"time": chain, "log_snr": log_ratio, "karras": (log_ratio / RHO).exp()}[spacing][: len(chain) - 1 + kept]
    wanted = _spread(float(key[-1]), float(key[0]), steps - 1 + kept)
    nearest = [len(chain) - 1] * (1 - kept) + (wanted.unsqueeze(1) - key).abs().argmin(1).tolist()
    found: list[int] = []
    for i, index in enumerate(nearest):  # none twice, and enough left for those to come
        below = min(index, found[-1] - 1) if found else index
        found.append(max(below, steps - 1 - i) if 0 < i < steps - 1 else 0 if i else below)
    return found


def check_times(program: Noised, times: Tensor) -> Tensor:
    """Refuse times at which the network has not been trained.

    Raises:
        ValueError: naming the range.
    """
    first, last = program.times
    slack = 1e-6  # of times that went through float32
    if not bool(((times >= first * (1 - slack)) & (times <= last * (1 + slack))).all()):
        raise ValueError(
            f"grid must lie within the times of {describe(program)}, from {first:g} to {last:g}; got "
            f"{float(times.min()):g} to {float(times.max()):g}"
        )
    return times


def _spread(start: float, end: float, steps: int) -> Tensor:
    """Evenly from start to end, both of them in; of one alone the start."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _spaced(program: Noised, steps: int, spacing: Spacing) -> Tensor:
    first, last = program.times
    if spacing == "time" or steps == 1:
        return _spread(last, first, steps)
    device = program.location.device
    ends = torch.tensor([last, first], dtype=torch.float64, device=device)
    greatest, least = program.schedule.log_snr(ends).neg().div(2).exp().tolist()  # σ/α
    if not math.isfinite(greatest):
        raise ValueError(
            f"spacing={spacing!r} needs some of the datum at every level, and at t={last:g} there is none: use "
            "spacing='time', or grid="
        )
    if spacing == "log_snr":
        logs = _spread(greatest, least, 2).log()
        log_ratio = _spread(float(logs[0]), float(logs[1]), steps)
    else:
        log_ratio = RHO * _spread(greatest ** (1 / RHO), least ** (1 / RHO), steps).log()
    times = program.schedule.time(-2 * log_ratio.to(device)).cpu()
    times[0], times[-1] = last, first  # not beyond them by rounding
    return times


# ------------------------------------------------------------------------------------------------------------- levels
class Levels(NamedTuple):
    """What is known of some times, ``(steps,)`` each, in float64; NumPy's, whose small sums take least time."""

    alpha: Array
    sigma: Array
    log_snr: Array
    scale: Array  # of the network's input
    level: Array  # what the network is told
    a: Array
    b: Array
    c: Array
    d: Array

    @property
    def ratio(self) -> Array:
        """ρ = σ/α."""
        with _infinite():
            return self.sigma / self.alpha


def levels_of(program: Noised, times: Tensor) -> Levels:
    """The numbers of a program's schedule and network at these times.

    Raises:
        ValueError: where the network's output does not say what the datum or the noise is.
    """
    t = times.to(program.location.device)
    if t.is_meta:  # no numbers there: any will do to see shapes and devices through
        ones = np.ones(len(times))
        return Levels(ones, np.linspace(2, 1, len(times)), *[ones] * 7)
    schedule, parts = program.schedule, program.coefficients(t)
    numbers = (schedule.alpha(t), schedule.sigma(t), parts.scale, program.levels(t), *parts.data, *parts.noise)
    table: Array = torch.stack([part.to(t) for part in numbers]).detach().cpu().numpy()
    unsaid = ~np.isfinite(table[4:]).all(0)
    if unsaid.any():
        i = int(unsaid.argmax())
        raise ValueError(
            f"at t={float(times[i]):g} the network's output does not say what is datum and what is noise "
            f"(α = {table[0, i]:g}, σ = {table[1, i]:g}): leave this time out of the grid, or predict 'edm' or "
            "'velocity'"
        )
    alpha, sigma, *rest = table
    with _infinite():
        log_snr = 2 * (np.log(alpha) - np.log(sigma))
    return Levels(alpha, sigma, log_snr, *rest)


def _infinite() -> np.errstate:
    """Where no datum is left σ/α is infinite, and that is what it is to be."""
    return np.errstate(divide="ignore", invalid="ignore")


def _next(levels: Levels) -> tuple[Array, Array, Array]:
    """α, σ and λ of where each step goes: the next level, and in the end the datum."""
    parts = ((levels.alpha, 1.0), (levels.sigma, 0.0), (levels.log_snr, math.inf))
    alpha, sigma, log_snr = (np.append(part[1:], end) for part, end in parts)
    return alpha, sigma, log_snr


# ------------------------------------------------------------------------------------------------------------- tables
class Linear(NamedTuple):
    """Steps with one evaluation: ``y' = state y + output F + past û_old + noise z``, ``û = a y + b F``.

    Lists of as many numbers as steps; the standard deviations ``noise`` are a tensor, ``(steps - 1,)`` or ``(steps - 1,
    *event_shape)``, or None: no noise is added to the datum.
    """

    scale: list[float]
    level: Tensor
    state: list[float]
    output: list[float]
    past: list[float]
    datum: list[tuple[float, float]]
    noise: Tensor | None


def linear(levels: Levels, eta: float, variance: Tensor | None = None) -> Linear:
    """DDIM's steps, η = 1 among them with the chain's own variances where they are given, ``(steps - 1, ...)``."""
    alpha, sigma, log_snr = _next(levels)
    gap = levels.log_snr - log_snr
    kappa = sigma * np.sqrt((1 - eta**2) + eta**2 * np.exp(gap))
    state, output = alpha * levels.a + kappa * levels.c, alpha * levels.b + kappa * levels.d
    noise = None
    if eta and len(gap) > 1:
        own = torch.from_numpy(eta * (sigma * np.sqrt(-np.expm1(gap)))[:-1])
        noise = own if variance is None else variance.sqrt()
    return _linear(levels, state, output, np.zeros_like(state), noise)


def span_of(levels: Levels) -> Array:
    """How far above the posterior variance, in logs, that of standard normal data lies: ``(steps - 1,)``."""
    alpha, sigma, log_snr = (part[:-1] for part in _next(levels))
    now = levels.sigma[:-1] ** 2
    error = now / (levels.alpha[:-1] ** 2 + now)
    span: Array = np.log1p(-np.expm1(levels.log_snr[:-1] - log_snr) * error * (alpha / sigma) ** 2)
    return span


def multistep(levels: Levels) -> Linear:
    """The steps of DPM-Solver++(2M): the first and the last are of first order."""
    alpha, sigma, log_snr = _next(levels)
    h = (log_snr - levels.log_snr) / 2
    k = np.zeros_like(h)
    with _infinite():
        k[1:] = np.where(np.isfinite(h[1:]), h[1:] / (2 * h[:-1]), 0.0)
    gain = -alpha * np.expm1(-h)
    state, output = sigma / levels.sigma + gain * (1 + k) * levels.a, gain * (1 + k) * levels.b
    return _linear(levels, state, output, -gain * k, None)


def _linear(levels: Levels, state: Array, output: Array, past: Array, noise: Tensor | None) -> Linear:
    datum = list(zip(levels.a.tolist(), levels.b.tolist(), strict=True))
    told = torch.from_numpy(levels.level)
    return Linear(_scales(levels.scale), told, state.tolist(), output.tolist(), past.tolist(), datum, noise)


class Heun(NamedTuple):
    r"""Steps with two evaluations, after some noise was added again.

    :math:`\hat y = keep\, y + kick\, z`, ``y' = state ŷ + output F`` and, where there is a second evaluation F',
    ``y'' = near y' + far ŷ + first F + second F'``. Levels are those of F and F' in turn, ``(steps, 2)``.
    """

    keep: list[float]
    kick: list[float]
    scale: list[float]
    level: Tensor
    state: list[float]
    output: list[float]
    twice: list[bool]
    scale_next: list[float]
    near: list[float]
    far: list[float]
    first: list[float]
    second: list[float]


def heun(program: Noised, times: Tensor, now: Levels, churn: float, within: tuple[float, float], spread: float) -> Heun:
    """Heun's steps in ρ; churn raises the level at first, as Karras et al. do, to the program's greatest at most."""
    up = _churned(program, times, now.ratio, churn, within)
    risen = now if up is times else levels_of(program, up)
    alpha, sigma, _ = _next(now)
    twice = (sigma > 0) & (risen.alpha > 0)
    scale, level, c, d = (np.append(p[1:], p[-1]) for p in (now.scale, now.level, now.c, now.d))
    with _infinite():
        keep = np.where(now.alpha > 0, risen.alpha / now.alpha, 1.0)
        added = np.where(now.alpha > 0, risen.ratio**2 - now.ratio**2, 0.0).clip(min=0.0)
        gain = np.where(twice, alpha * (sigma / alpha - risen.ratio) / 2, 0.0)
    columns = (1 + gain * c, -gain * risen.c, -gain * risen.d, gain * d)
    return Heun(
        keep.tolist(),
        (spread * risen.alpha * np.sqrt(added)).tolist(),
        _scales(risen.scale),
        torch.from_numpy(np.stack([risen.level, level], 1)),
        (alpha * risen.a + sigma * risen.c).tolist(),
        (alpha * risen.b + sigma * risen.d).tolist(),
        twice.tolist(),
        _scales(scale),
        *(column.tolist() for column in columns),
    )


def _churned(program: Noised, times: Tensor, ratio: Array, churn: float, within: tuple[float, float]) -> Tensor:
    """The times to which noise is added before each step; in discrete time trained ones, as far up as the level."""
    rise = min(churn / len(times), 2**0.5 - 1)
    risen = torch.from_numpy((ratio >= within[0]) & (ratio <= within[1]) & np.isfinite(ratio))
    if not rise or not bool(risen.any()):
        return times
    log_ratio = torch.from_numpy(np.log(ratio * (1 + rise))).to(program.location.device)
    up = program.schedule.time(-2 * log_ratio).cpu()
    up = torch.maximum(torch.where(risen, up, times), times).clamp(max=max(program.times[1], float(times[0])))
    chain = chain_of(program)
    if chain is None:
        return up
    below = chain[(torch.searchsorted(chain, up, right=True) - 1).clamp(min=0)]
    return torch.maximum(below, times)


def _scales(scales: Array) -> list[float]:
    """The factors of the network's input, exactly 1 where they are but for rounding."""
    return [1.0 if abs(scale - 1) < 1e-13 else scale for scale in scales.tolist()]
