"""Reverse diffusion against closed forms: exact denoisers of normals and mixtures, whose reverse maps are known."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_gen.base import Coefficients, Divergence, Noised, Output
from pyro_gen.distributions.noise import NoiseSchedule, make_schedule
from pyro_gen.distributions.parameterisations import Prediction, coefficients_of
from pyro_gen.programs.diffusion import Diffusion
from pyro_gen.samplers import reverse, tables
from pyro_gen.samplers.reverse import Method, ReverseDiffusion

SCHEDULES = ("linear", "cosine", "sigmoid", "karras", "exploding", "rectified")
DETERMINISTIC: tuple[Method, ...] = ("ddim", "heun", "dpm++2m")


class Mixture(nn.Module):
    """Normals of one diagonal covariance: means ``(K, d)``, variances ``(d,)``."""

    means: Tensor
    variance: Tensor

    def __init__(self, means: list[list[float]], variance: list[float]) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))
        self.register_buffer("variance", torch.tensor(variance, dtype=torch.float64))

    def denoise(self, y: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[u | y] for y = α u + σ ε."""
        total = alpha**2 * self.variance + sigma**2
        away = y.unsqueeze(1) - alpha.unsqueeze(1) * self.means  # (rows, K, d)
        share = (-0.5 * away.square() / total.unsqueeze(1)).sum(-1).softmax(1).unsqueeze(-1)
        return (share * (self.means + (alpha * self.variance / total).unsqueeze(1) * away)).sum(1)


class Exact(Noised):
    """A program whose network is the exact denoiser of a mixture, in whichever prediction; x = m + s u."""

    def __init__(
        self,
        data: Mixture,
        schedule: str = "cosine",
        prediction: Prediction = "x0",
        timesteps: int | None = None,
        units: tuple[float, float] = (0.0, 1.0),
        context_shape: int | None = None,
    ) -> None:
        levels: NoiseSchedule = make_schedule(schedule)  # type: ignore[arg-type]
        super().__init__(data, None, data.means.shape[1], context_shape, schedule=levels)
        self.prediction, self.units, self.asked = prediction, units, []  # type: ignore[var-annotated]
        self.register_buffer("grid", None if timesteps is None else levels.grid(timesteps))

    @property
    def location(self) -> Tensor:
        return self.template().new_tensor(self.units[0])

    @property
    def scale(self) -> Tensor:
        return self.template().new_tensor(self.units[1])

    @property
    def times(self) -> tuple[float, float]:
        return self.schedule.ends if self.grid is None else (float(self.grid[1]), float(self.grid[-1]))

    def coefficients(self, t: Tensor) -> Coefficients:
        return coefficients_of(self.prediction, self.schedule, t)

    def output(self, context: Tensor | None = None, guidance: float | None = None) -> Output:
        self.asked.append((context, guidance))

        def network(y: Tensor, t: Tensor) -> Tensor:
            c = self.coefficients(t)
            y = y / c.scale.unsqueeze(-1)
            alpha, sigma = (part(t).unsqueeze(-1) for part in (self.schedule.alpha, self.schedule.sigma))
            a, b = (part.unsqueeze(-1) for part in c.data)
            return (self.model.denoise(y, alpha, sigma) - a * y) / b  # type: ignore[operator]

        return network


NORMAL = Mixture([[0.4, -0.3]], [1.5, 0.3])
THREE = Mixture([[-1.5], [0.2], [1.0]], [0.05])
PLANE = Mixture([[-1.0, 0.0], [1.0, 0.5], [0.0, 1.0]], [0.05, 0.1])


def ratios(program: Noised, values: Tensor) -> Tensor:
    """Times at which σ/α has given values."""
    return program.schedule.time(-2 * values.log())


def logspace(high: float, low: float, steps: int) -> Tensor:
    return torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp()


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def levels(program: Noised, times: Tensor) -> tuple[Tensor, Tensor]:
    return program.schedule.alpha(times), program.schedule.sigma(times)


# -------------------------------------------------------------------------------------------------------- the kernels
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_steps_are_the_posterior_of_the_forward_chain(schedule: str) -> None:
    """y_s | y_t, u: b = σ_t² − k² σ_s², mean (α_s b u + k σ_s² y_t) / σ_t², variance σ_s² b / σ_t²."""
    program = Exact(NORMAL, schedule)
    times = ratios(program, logspace(30.0, 0.05, 12))
    found = tables.linear(tables.levels_of(program, times), 1.0)
    alpha, sigma = levels(program, times)
    kept = alpha[:-1] / alpha[1:]
    b = sigma[:-1] ** 2 - kept**2 * sigma[1:] ** 2
    datum, noisy = alpha[1:] * b / sigma[:-1] ** 2, kept * sigma[1:] ** 2 / sigma[:-1] ** 2
    # a difference of two squares: a relative rounding of σ_t² / b
    close = {"rtol": 1e-12 * float((sigma[:-1] ** 2 / b).max()), "atol": 0.0}
    np.testing.assert_allclose(found.output[:-1], datum, **close)  # F is the datum here
    np.testing.assert_allclose(found.state[:-1], noisy, **close)
    assert found.noise is not None
    np.testing.assert_allclose(found.noise**2, sigma[1:] ** 2 * b / sigma[:-1] ** 2, **close)
    assert (found.state[-1], found.output[-1]) == (0.0, 1.0)
    half = tables.linear(tables.levels_of(program, times), 0.9).output
    assert not np.allclose(half[:-1], datum, rtol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_1_is_ancestral(schedule: str) -> None:
    program = Exact(NORMAL, schedule, "edm")
    one, other = ReverseDiffusion("ancestral", 20), ReverseDiffusion("ddim", 20, eta=1.0)
    x = one.sample(program, 5, seed=3)
    torch.testing.assert_close(other.sample(program, 5, seed=3), x, rtol=0, atol=0)
    assert not torch.allclose(ReverseDiffusion("ddim", 20, eta=0.99).sample(program, 5, seed=3), x, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_without_noise_is_euler(schedule: str) -> None:
    """w = y/α, ρ = σ/α: w_s = w_t + (ρ_s − ρ_t) ε̂; rounding is that of w at the greatest ρ."""
    program = Exact(PLANE, schedule, "edm", units=(0.5, 2.0))
    times = ratios(program, logspace(30.0, 0.05, 12))
    start = 0.5 + 2 * noise(7, 2)
    path = ReverseDiffusion("ddim", grid=times).sample(program, 7, start=start, trajectory=True)
    alpha, sigma = levels(program, times)
    alpha, sigma = torch.cat([alpha, alpha.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)])
    w, at = (start - 0.5) / 2 / alpha[0], sigma / alpha
    for i in range(len(times)):
        u = PLANE.denoise(alpha[i] * w, alpha[i].expand(7, 1), sigma[i].expand(7, 1))
        w = w + (at[i + 1] - at[i]) * (w - u) / at[i]
        torch.testing.assert_close((path[i + 1] - 0.5) / 2, alpha[i + 1] * w, rtol=1e-10, atol=1e-12)


def test_multistep_begins_and_ends_as_ddim() -> None:
    """Of two levels all is first order; with a third the extrapolation shows."""
    program = Exact(PLANE)
    for grid, same in (([0.9, 0.4], True), ([0.9], True), ([0.9, 0.6, 0.3], False)):
        x = ReverseDiffusion("dpm++2m", grid=grid).sample(program, 6, seed=0)
        y = ReverseDiffusion("ddim", grid=grid).sample(program, 6, seed=0)
        assert torch.allclose(x, y, rtol=0, atol=1e-13) is same
    first = [ReverseDiffusion(m, grid=grid).sample(program, 6, seed=0, trajectory=True)[1] for m in ("dpm++2m", "ddim")]
    torch.testing.assert_close(*first, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_schedules_and_predictions_are_interchangeable(method: Method) -> None:
    """The ODE in (y/α, σ/α) is one for all: equal levels and starts give equal draws.

    Rounding: ε-prediction divides by α, and û is then off by 1e-16 σ/α ≤ 1e-14; 20 steps, each a contraction or nearly.
    """
    found = []
    for schedule in SCHEDULES:
        for prediction in get_args(Prediction):
            if prediction == "v" and not make_schedule(schedule).variance_preserving:  # type: ignore[arg-type]
                continue
            program = Exact(PLANE, schedule, prediction)
            times = ratios(program, logspace(50.0, 0.01, 20))
            start = noise(8, 2) * 50 * program.schedule.alpha(times[0])
            found.append(ReverseDiffusion(method, grid=times).sample(program, 8, start=start))
    assert len(found) == 6 * 6 - 3
    for x in found[1:]:
        torch.testing.assert_close(x, found[0], rtol=0, atol=1e-9)
    assert float(found[0].std(0).min()) > 0.1


# ------------------------------------------------------------------------------------------------------ known maps
@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize("schedule", ["cosine", "karras", "rectified"])
def test_map_of_normal_data(schedule: str, method: Method) -> None:
    """x_0 = S^½ S_T^{-½} (x_T − m_T) + m with S_T = α² S + σ²; at last û, the mean of the datum given y_1.

    The error falls as N^-p. That of N and 2N steps, e and e', leaves e' (e/e')/(2^p) ≈ e': the limit is within 2 e'.
    """
    program = Exact(NORMAL, schedule, "edm")
    start, ends = noise(5, 2), (40.0, 0.01)
    s, m = NORMAL.variance, NORMAL.means[0]
    draws = []
    for steps in (100, 200):
        times = ratios(program, logspace(*ends, steps))
        (alpha, sigma), (a1, s1) = levels(program, times[0]), levels(program, times[-1])
        draws.append(ReverseDiffusion(method, grid=times).sample(program, 5, start=start))
    at_end = a1 * m + ((a1**2 * s + s1**2) / (alpha**2 * s + sigma**2)).sqrt() * (start - alpha * m)
    exact = PLANE.__class__.denoise(NORMAL, at_end, a1.expand(5, 1), s1.expand(5, 1))
    coarse, fine = (float((x - exact).abs().max()) for x in draws)
    order = 1 if method == "ddim" else 2
    limit = draws[1] + (draws[1] - draws[0]) / (2**order - 1)  # Richardson
    assert float((limit - exact).abs().max()) < fine / 4
    assert fine < coarse / (2**order - 0.5)
    assert fine < (0.1 if order == 1 else 0.005)


def order_of(step: Callable[[Tensor], Tensor], program: Noised, grid: Callable[[int], Tensor]) -> float:
    """The slope of log error on log N of a map from y_N to y_1, on data in one dimension.

    There the ODE moves quantiles: F_1(y_1) = F_N(y_N), so that an error in y is one of F over the density.
    """
    counts = (64, 128, 256, 512)
    errors = []
    for count in counts:
        times = ratios(program, grid(count))
        (a, s), (a1, s1) = levels(program, times[0]), levels(program, times[-1])
        start = a * torch.linspace(-1.5, 1.5, 9, dtype=torch.float64).unsqueeze(1) + s * torch.linspace(
            -1, 1, 9, dtype=torch.float64
        ).unsqueeze(1)
        before, after = (normals(THREE, a, s), normals(THREE, a1, s1))
        y = step(times)(start)  # type: ignore[operator]
        off = (after.cdf(y).mean(1) - before.cdf(start).mean(1)) / after.log_prob(y).exp().mean(1)
        errors.append(float(off.square().mean().sqrt()))
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


def normals(data: Mixture, alpha: Tensor, sigma: Tensor) -> torch.distributions.Normal:
    scale = (alpha**2 * data.variance + sigma**2).sqrt()
    return torch.distributions.Normal(alpha * data.means[:, 0], scale)


def before_the_datum(method: Method, program: Noised) -> Any:
    return lambda times: (
        lambda start: ReverseDiffusion(method, grid=times).sample(program, len(start), start=start, trajectory=True)[-2]
    )


def uneven(count: int) -> Tensor:
    """Steps of log σ/α that are one, two, one, two, … parts long."""
    parts = torch.ones(count - 1, dtype=torch.float64)
    parts[1::2] = 2
    way = torch.cat([parts.new_zeros(1), parts.cumsum(0)]) / parts.sum()
    return (math.log(5.0) + (math.log(0.1) - math.log(5.0)) * way).exp()


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("heun", 2), ("dpm++2m", 2)])
@pytest.mark.parametrize("schedule", ["cosine", "exploding", "rectified"])
def test_orders(schedule: str, method: Method, order: int) -> None:
    """On an uneven grid too. The next term of the error is of relative size c/N: at N ≥ 64 it moves the slope by less
    than .25 unless c > 20 (the slope between N and 2N is p + log2((1 + c/N)/(1 + c/2N)))."""
    program = Exact(THREE, schedule, "edm")
    for grid in (lambda n: logspace(5.0, 0.1, n), uneven):
        assert order_of(before_the_datum(method, program), program, grid) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_another_extrapolation_loses_the_order(factor: float) -> None:
    """The coefficient of 2M is h / 2 h_old: none, or twice as much, is of first order."""
    program = Exact(THREE, "cosine", "x0")

    def wrong(times: Tensor) -> Callable[[Tensor], Tensor]:
        found = tables.levels_of(program, times)
        right = tables.multistep(found)
        past = [factor * p for p in right.past]  # output = gain (1 + k) and past = −gain k
        output = [o + p - q for o, p, q in zip(right.output, right.past, past, strict=True)]
        table = right._replace(past=past, output=output)
        return lambda start: list(reverse._linear(table, program.output(), start))[-2]

    assert order_of(wrong, program, lambda n: logspace(5.0, 0.1, n)) < 1.4
    assert order_of(wrong, program, uneven) < 1.4


# ------------------------------------------------------------------------------------------------------- noisy steps
class Chain(Exact):
    """With the optimal variances of normal data, v + c_0² Var(u | y_t), or those times a factor."""

    factor = 1.0

    def reverse_variance(self, t: Tensor, s: Tensor) -> Tensor:
        (alpha, sigma), (a, sd) = ((p.unsqueeze(-1) for p in levels(self, at)) for at in (t, s))
        b = sigma**2 - (alpha / a) ** 2 * sd**2
        unknown = NORMAL.variance * sigma**2 / (alpha**2 * NORMAL.variance + sigma**2)
        return self.factor * (sd**2 * b / sigma**2 + (a * b / sigma**2) ** 2 * unknown)


def moments_off(x: Tensor, mean: Tensor, variance: Tensor) -> float:
    """Largest distance of mean, variances and covariance from those of a normal with diagonal covariance, in s.e."""
    n, z = len(x), (x - mean) / variance.sqrt()
    found = [*(z.mean(0) * n**0.5), *((z.square().mean(0) - 1) * (n / 2) ** 0.5), z.prod(1).mean() * n**0.5]
    return float(torch.stack(found).abs().max())


@pytest.mark.parametrize("schedule", ["linear", "karras", "rectified"])
def test_optimal_variances_are_exact_for_normal_data(schedule: str) -> None:
    """Five steps from exact draws: mean and covariance are those of û(y_1), the variance less what is unknown of u.

    The posterior variance, which any other program gets, is too small by far.
    """
    program, n = Chain(NORMAL, schedule, "edm"), 40_000
    times = ratios(program, logspace(20.0, 0.2, 5))
    alpha, sigma = levels(program, times[0])
    s, m = NORMAL.variance, NORMAL.means[0]
    start = alpha * m + (alpha**2 * s + sigma**2).sqrt() * noise(n, 2, 1)
    a1, s1 = levels(program, times[-1])
    known = a1**2 * s**2 / (a1**2 * s + s1**2)
    sampler = ReverseDiffusion(grid=times)
    assert moments_off(sampler.sample(program, n, start=start, seed=2), m, known) < 4
    program.factor = 1.1
    assert moments_off(sampler.sample(program, n, start=start, seed=2), m, known) > 6
    assert moments_off(sampler.sample(Exact(NORMAL, schedule, "edm"), n, start=start, seed=2), m, known) > 20


def test_variances_of_the_network_lie_between_two_ends() -> None:
    """w = −1 is the posterior variance, w = 1 that of standard normal data, v + c_0² σ²/(α² + σ²)."""

    class Learned(Exact):
        where = -1.0

        def output_and_variance(self, context: Tensor | None, guidance: float | None) -> Any:
            net = self.output(context, guidance)
            return lambda y, level: (net(y, level), torch.full_like(y, self.where))

    class Large(Exact):
        def reverse_variance(self, t: Tensor, s: Tensor) -> Tensor:
            (alpha, sigma), (a, sd) = levels(self, t), levels(self, s)
            b = sigma**2 - (alpha / a) ** 2 * sd**2
            return sd**2 * b / sigma**2 + (a * b / sigma**2) ** 2 * sigma**2 / (alpha**2 + sigma**2)

    for where, other in ((-1.0, Exact), (1.0, Large)):
        Learned.where = where
        x, y = (
            ReverseDiffusion(steps=10).sample(kind(NORMAL, "rectified", "edm"), 6, seed=0) for kind in (Learned, other)
        )
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(x, ReverseDiffusion(steps=10).sample(Exact(NORMAL, "rectified", "edm"), 6, seed=0))


@pytest.mark.parametrize("timesteps", [None, 200])
def test_churn_keeps_the_distribution(timesteps: int | None) -> None:
    """Added noise is taken out again: mean and covariance within 4 s.e. (the steps' own error is below one, measured
    without churn); with noise of 1.1 standard deviations they are not."""
    program, n = Exact(NORMAL, "cosine", "edm", timesteps), 20_000
    if program.grid is None:
        times = ratios(program, logspace(20.0, 0.02, 90))
    else:
        own = (-program.schedule.log_snr(program.grid) / 2).exp()
        times = program.grid[(own > 0.01) & (own < 20)].flip(0)[::2]
    alpha, sigma = levels(program, times[0])
    s, m = NORMAL.variance, NORMAL.means[0]
    start = alpha * m + (alpha**2 * s + sigma**2).sqrt() * noise(n, 2, 1)
    calm = ReverseDiffusion("heun", grid=times).sample(program, n, start=start)
    gain = calm.var(0) / start.var(0) * (alpha**2 * s + sigma**2)  # the map is linear: this is its variance
    assert float((gain / s - 1).abs().max()) < (2 / n) ** 0.5

    def churned(s_noise: float) -> Tensor:
        sampler = ReverseDiffusion("heun", grid=times, s_churn=20.0, s_min=0.05, s_max=10.0, s_noise=s_noise)
        return sampler.sample(program, n, start=start, seed=3)

    right = churned(1.0)
    assert float((right - calm).std()) > 0.1
    assert moments_off(right, m, s) < 5  # 4, and the steps' own error
    assert moments_off(churned(1.1), m, s) > 8


def test_churn_asks_for_trained_levels_only() -> None:
    """In discrete time noise is added up to a level of the grid, and nowhere above the last."""
    for timesteps in (40, None):
        program = Exact(NORMAL, "cosine", "edm", timesteps)
        times = ReverseDiffusion("heun", 20).times(program)
        ratio = (program.schedule.sigma(times) / program.schedule.alpha(times)).numpy()
        up = tables._churned(program, times, ratio, 8.0, (0.0, math.inf))
        assert bool((up >= times).all())
        assert int((up > times).sum()) >= 5
        assert float(up.max()) == float(times[0])
        if program.grid is not None:
            assert np.isin(up.numpy(), program.grid.numpy()).all()
        assert torch.equal(tables._churned(program, times, ratio, 8.0, (1e6, math.inf)), times)


# -------------------------------------------------------------------------------------------------------------- grids
def test_all_steps_of_a_chain_are_its_levels() -> None:
    program = Exact(NORMAL, "linear", timesteps=1000)
    assert program.grid is not None
    assert torch.equal(ReverseDiffusion().times(program), program.grid[1:].flip(0))
    for steps in (1, 2, 3, 9, 27, 50, 333, 999):  # counts at which strides of other libraries have failed
        times = ReverseDiffusion("ddim", steps).times(program)
        assert len(times) == steps
        assert bool((times.diff() < 0).all())
        assert float(times[0]) == float(program.grid[-1])
        assert steps == 1 or float(times[-1]) == float(program.grid[1])
        assert np.isin(times.numpy(), program.grid.numpy()).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["time", "log_snr", "karras"])
def test_spacing(schedule: str, spacing: tables.Spacing) -> None:
    program = Exact(NORMAL, schedule)
    times = ReverseDiffusion("ddim", 12, spacing=spacing).times(program)
    assert (float(times[-1]), float(times[0])) == program.schedule.ends
    even = {
        "time": lambda t: t,
        "log_snr": program.schedule.log_snr,
        "karras": lambda t: (-program.schedule.log_snr(t) / 14).exp(),
    }[spacing]
    gaps = even(times).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(11), rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "rectified", "karras"])
@pytest.mark.parametrize("spacing", ["time", "log_snr", "karras"])
def test_spacing_in_discrete_time_takes_trained_levels(schedule: str, spacing: tables.Spacing) -> None:
    """As many as asked for, none twice; of the rectified chain, which ends without any datum, too."""
    program = Exact(NORMAL, schedule, timesteps=100)
    assert program.grid is not None
    for steps in (1, 2, 3, 18, 90, 100):
        times = ReverseDiffusion("heun", steps, spacing=spacing).times(program)
        assert len(times) == steps
        assert bool((times.diff() < 0).all())
        assert np.isin(times.numpy(), program.grid.numpy()).all()
        assert float(times[0]) == float(program.grid[-1])
        assert steps == 1 or float(times[-1]) == float(program.grid[1])
    fine = Exact(NORMAL, schedule, timesteps=10_000)
    assert fine.grid is not None
    top = float(fine.grid[-1 - (schedule == "rectified")])
    even = tables._spaced(fine, 12, spacing) if schedule != "rectified" else None
    times = ReverseDiffusion("heun", 12 + (schedule == "rectified"), spacing=spacing).times(fine)
    if even is not None:
        torch.testing.assert_close(times, even, rtol=0.02, atol=2e-4)
    else:
        assert float(times[1]) == top


def test_defaults() -> None:
    whole, short = Exact(NORMAL, "linear", timesteps=300), Exact(NORMAL, "linear", timesteps=10)
    for method, steps in (("ancestral", 300), ("ddim", 50), ("heun", 18), ("dpm++2m", 20)):
        assert len(ReverseDiffusion(method).times(whole)) == steps
        assert len(ReverseDiffusion(method).times(short)) == 10
    assert len(ReverseDiffusion().times(Exact(NORMAL))) == 1000


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("prediction", ["x0", "edm", "velocity"])
def test_a_last_level_without_any_datum(method: Method, prediction: Prediction) -> None:
    """α = 0 at t = 1: σ/α and the log-SNR are infinite, the draws are not."""
    program = Exact(PLANE, "rectified", prediction, timesteps=64)
    x = ReverseDiffusion(method, 64).sample(program, 2000, seed=0)
    exact_sd = (PLANE.variance + PLANE.means.var(0, unbiased=False)).sqrt()
    torch.testing.assert_close(x.std(0), exact_sd, rtol=0.1, atol=0)
    broken = Exact(PLANE, "rectified", "epsilon", timesteps=64)
    with pytest.raises(ValueError, match=r"at t=1 the network's output does not say"):
        ReverseDiffusion(method, 64).sample(broken, 5)


# ------------------------------------------------------------------------------------------------------------- draws
def test_the_start_has_the_variance_of_noised_standard_data() -> None:
    for schedule in ("linear", "karras", "rectified"):
        program = Exact(NORMAL, schedule, units=(3.0, 2.0))
        first = ReverseDiffusion("ddim", 2).sample(program, 20_000, seed=0, trajectory=True)[0]
        alpha, sigma = levels(program, torch.tensor(program.times[1], dtype=torch.float64))
        expected = 4 * (alpha**2 + sigma**2)
        assert moments_off(first, torch.tensor(3.0), expected.expand(2)) < 4


@pytest.mark.parametrize("method", get_args(Method))
def test_trajectory(method: Method) -> None:
    program = Exact(PLANE, timesteps=50, units=(1.0, 3.0))
    sampler = ReverseDiffusion(method, 10)
    path = sampler.sample(program, 4, seed=0, trajectory=True)
    assert path.shape == (11, 4, 2)
    assert torch.equal(path[-1], sampler.sample(program, 4, seed=0))
    if method in ("ddim", "heun"):  # of one step's memory: it can be taken up anywhere
        rest = ReverseDiffusion(method, grid=sampler.times(program)[6:])
        torch.testing.assert_close(rest.sample(program, 4, start=path[6]), path[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_rows_do_not_meet(method: Method) -> None:
    program, start = Exact(PLANE), noise(5, 2)
    sampler = ReverseDiffusion(method, 15)
    alone = torch.cat([sampler.sample(program, 1, start=row) for row in start.split(1)])
    torch.testing.assert_close(sampler.sample(program, 5, start=start), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"method": "ddim", "eta": 0.5}, {"method": "heun", "s_churn": 5.0}])
def test_seed(options: dict[str, Any]) -> None:
    program, sampler = Exact(PLANE, "linear"), ReverseDiffusion(steps=10, **options)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    x = sampler.sample(program, 6, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(sampler.sample(program, 6, seed=1), x)
    assert not torch.allclose(sampler.sample(program, 6, seed=2), x)
    free = sampler.sample(program, 6)
    assert not torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(11)
    assert torch.equal(sampler.sample(program, 6), free)


def test_blocks_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in many blocks has the moments that it has in one, and levels are the same."""
    program = Exact(NORMAL, "linear", "edm")
    whole = ReverseDiffusion(steps=30).sample(program, 4000, seed=0)
    still = ReverseDiffusion("ddim", 30).sample(program, 7, seed=0)
    monkeypatch.setattr(reverse, "BLOCK", 100)
    parts = ReverseDiffusion(steps=30).sample(program, 4000, seed=0)
    torch.testing.assert_close(parts.std(0), whole.std(0), rtol=4 / 4000**0.5, atol=0)
    assert torch.equal(ReverseDiffusion("ddim", 30).sample(program, 7, seed=0), still)


def test_networks_run_in_evaluation_mode_without_gradients() -> None:
    class Net(Exact):
        def output(self, context: Tensor | None = None, guidance: float | None = None) -> Output:
            exact = super().output(context, guidance)

            def net(y: Tensor, t: Tensor) -> Tensor:
                assert not self.training
                assert not torch.is_grad_enabled()
                return exact(y, t)

            return net

    program = Net(PLANE).train()
    x = ReverseDiffusion("heun", 4).sample(program, 3)
    assert program.training
    assert PLANE.training
    assert not x.requires_grad
    assert not x.is_inference()


def test_a_network_may_return_what_it_was_given() -> None:
    """Nothing is written into the network's input or output."""
    program = Noised(PLANE, None, 2, schedule=make_schedule("cosine"), denoiser=lambda y, t: y)
    copies = Noised(PLANE, None, 2, schedule=make_schedule("cosine"), denoiser=lambda y, t: y.clone())
    for method in get_args(Method):
        sampler = ReverseDiffusion(method, 6)
        assert torch.equal(sampler.sample(program, 4, seed=0), sampler.sample(copies, 4, seed=0))


def test_context_and_guidance_reach_the_network() -> None:
    program, context = Exact(PLANE, context_shape=3), noise(4, 3)
    ReverseDiffusion("ddim", 3).sample(program, 4, context, guidance=1.5)
    (given,) = program.asked
    assert given[0] is context
    assert given[1] == 1.5
    for wrong in (None, context[:3], context[:, :2]):
        with pytest.raises(ValueError, match="context"):
            ReverseDiffusion("ddim", 3).sample(program, 4, wrong)
    with pytest.raises(ValueError, match="context was given"):
        ReverseDiffusion("ddim", 3).sample(Exact(PLANE), 4, context)


def test_bar(capsys: pytest.CaptureFixture[str]) -> None:
    ReverseDiffusion("ddim", 3).sample(Exact(PLANE), 2, progress=True)
    assert "100%" in capsys.readouterr().err
    ReverseDiffusion("ddim", 3).sample(Exact(PLANE), 2)
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "euler"}, "method must be one of 'ancestral', 'ddim', 'heun', 'dpm\\+\\+2m', got 'euler'"),
        ({"steps": 0}, "steps must be an int of at least 1, got 0"),
        ({"steps": 2.0}, "steps must be an int"),
        ({"spacing": "even"}, "spacing must be one of"),
        ({"grid": [0.1, 0.5]}, r"grid must decrease.*got 0.1, 0.5: .*flip"),
        ({"grid": [0.5, 0.5]}, "grid must decrease"),
        ({"grid": [0.5, float("nan")]}, "grid must decrease"),
        ({"grid": [float("inf"), 0.5]}, "grid must decrease"),
        ({"grid": [0.5, 0.0]}, "grid must end above 0, got 0.*leave it out"),
        ({"grid": []}, "at least one time"),
        ({"grid": "cosine"}, "grid must be a tensor or a sequence"),
        ({"grid": [0.5], "steps": 3}, "grid= alone"),
        ({"method": "heun", "eta": 0.5}, "eta belongs to method='ddim'"),
        ({"eta": 1.0}, "eta belongs to method='ddim', and method='ancestral' has eta 1"),
        ({"method": "ddim", "eta": 1.5}, r"eta must be a number in \[0, 1\].*got 1.5"),
        ({"method": "ddim", "eta": float("nan")}, "eta must be"),
        ({"method": "ddim", "eta": True}, "eta must be"),
        ({"method": "ddim", "s_churn": 1.0}, "s_churn belongs to method='heun'"),
        ({"method": "heun", "s_churn": -1.0}, "s_churn must be a number of at least 0, got -1.0"),
        ({"method": "heun", "s_churn": float("inf")}, "must be finite"),
    ],
)
def test_bad_settings(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ReverseDiffusion(**options)


def test_settings_that_do_not_fit_the_program() -> None:
    program, chain = Exact(NORMAL), Exact(NORMAL, timesteps=10)
    for sampler, given, says in (
        (ReverseDiffusion("ddim", 11), chain, "steps must be at most the 10 levels.*got 11"),
        (ReverseDiffusion("ddim", 11, spacing="index"), program, "continuous time: use one of 'time'"),
        (ReverseDiffusion("ddim", grid=[1.5, 0.5]), program, "grid must lie within the times of Exact, from"),
        (ReverseDiffusion("ddim", grid=[0.5, 1e-9]), program, "grid must lie within"),
        (ReverseDiffusion("ddim", grid=[0.5, 0.01]), chain, "grid must lie within"),
    ):
        with pytest.raises(ValueError, match=says):
            sampler.sample(given, 2)
    with pytest.raises(TypeError, match=r"score at every noise level .* got Mixture"):
        ReverseDiffusion().sample(NORMAL, 2)  # type: ignore[arg-type]
    for n in (0, 2.0, True):
        with pytest.raises(ValueError, match="n must be"):
            ReverseDiffusion("ddim", 2).sample(program, n)  # type: ignore[arg-type]
    for start in (noise(3, 2), noise(2, 2).float(), noise(2, 3)):
        with pytest.raises(ValueError, match="start must"):
            ReverseDiffusion("ddim", 2).sample(program, 2, start=start)
    plain = Noised(PLANE, None, 2, schedule=make_schedule("cosine"), denoiser=lambda y, t: y)
    with pytest.raises(ValueError, match="guidance= needs a program"):
        ReverseDiffusion("ddim", 2).sample(plain, 2, guidance=1.0)


def test_bad_networks() -> None:
    def program(denoiser: Any) -> Noised:
        return Noised(PLANE, None, 2, schedule=make_schedule("cosine"), denoiser=denoiser)

    with pytest.raises(ValueError, match=r"gives a tensor of shape \(3, 1\) for rows of shape \(3, 2\)"):
        ReverseDiffusion("heun", 2).sample(program(lambda y, t: y[:, :1]), 3)
    with pytest.raises(Divergence, match="1 of 3 rows end at numbers that are not finite, first row 1"):
        ReverseDiffusion("ddim", 2).sample(
            program(lambda y, t: torch.where(torch.arange(3).unsqueeze(1) == 1, math.nan, y)), 3
        )

    class Narrow(Exact):
        def reverse_variance(self, t: Tensor, s: Tensor) -> Tensor:
            return t.new_ones(len(t), 5)

    with pytest.raises(ValueError, match=r"reverse_variance of Narrow gives shape \(3, 5\): it must be \(3,\) or"):
        ReverseDiffusion(steps=4).sample(Narrow(NORMAL), 3)


def test_the_numbers_of_a_chain_are_kept_only_while_they_hold():
    program = Diffusion(2, timesteps=20, hidden=(8,), standardise=False, prediction="v").double()
    method = ReverseDiffusion()

    def fresh() -> torch.Tensor:
        return method.sample(copy.deepcopy(program), 50, seed=0)  # a copy has tensors of its own: nothing is kept

    first = method.sample(program, 50, seed=0)
    assert torch.equal(method.sample(program, 50, seed=0), first)
    with torch.no_grad():
        program.model.ratio.mul_(9)  # as a fit measures it
    second = method.sample(program, 50, seed=0)
    assert not torch.allclose(second, first, atol=1e-3)
    assert torch.equal(second, fresh())
    shorter = ReverseDiffusion(steps=5).sample(program, 50, seed=0)
    assert torch.equal(shorter, ReverseDiffusion(steps=5).sample(copy.deepcopy(program), 50, seed=0))
    with torch.no_grad():
        program.model.ratio = program.model.ratio.clone() / 9
    assert torch.equal(method.sample(program, 50, seed=0), first)
    assert method.sample(program.float(), 50, seed=0).dtype == torch.float32
