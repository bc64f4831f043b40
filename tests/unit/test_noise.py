"""Noise schedules and parameterisations: published levels, exact inverses, both ends, what each prediction means."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gen.distributions.learned_noise import LearnedSchedule
from pyro_gen.distributions.noise import (
    SCHEDULES,
    CosineSchedule,
    KarrasSchedule,
    LinearSchedule,
    NoiseSchedule,
    ScheduleName,
    TableSchedule,
    make_schedule,
)
from pyro_gen.distributions.parameterisations import (
    Prediction,
    check_prediction,
    coefficients_of,
    linear_answer,
    target_of,
)

EPS = torch.finfo(torch.float64).eps


def build(name: str) -> NoiseSchedule:
    """A schedule in double precision; the learned one moved away from its start, so that nothing holds by symmetry."""
    if name == "table":
        return TableSchedule(torch.linspace(1e-3, 0.3, 40, dtype=torch.float64))
    schedule = make_schedule(name).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return schedule


NAMES = [*get_args(ScheduleName), "table"]
FROM_DATUM = [name for name in NAMES if name != "learned"]


def times(count: int = 400, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inside of (0, 1), close to the ends too."""
    inner = torch.linspace(0, 1, count, dtype=torch.float64)[1:-1]
    close = torch.logspace(-6, -3, 20, dtype=torch.float64)
    return torch.cat([close, inner, 1 - close.flip(0)]).to(dtype)


# ---------------------------------------------------------------------------------------------------------- schedules
def test_every_name_has_a_schedule() -> None:
    assert set(SCHEDULES) == set(get_args(ScheduleName))
    assert all(schedule.name == name for name, schedule in SCHEDULES.items())


@pytest.mark.parametrize("name", NAMES)
def test_alpha_sigma_and_log_snr_agree(name: str) -> None:
    schedule, t = build(name), times()
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    # λ is at most some 40 in size, and its own rounding is relative
    torch.testing.assert_close(2 * (alpha / sigma).log(), log_snr, rtol=64 * EPS, atol=64 * EPS)
    assert (log_snr.diff() < 0).all()
    norm = alpha.square() + sigma.square()
    assert schedule.variance_preserving == bool((norm - 1).abs().max() < 1e-12)
    if name in ("karras", "exploding"):
        assert (alpha == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_time_inverts_log_snr(name: str) -> None:
    schedule, t = build(name), times()
    log_snr = schedule.log_snr(t)
    # what rounding of λ moves t by, beside that of t itself (bisection: to the spacing at 1)
    rounding = 64 * EPS * (log_snr.abs() / schedule.log_snr_rate(t).abs() + 1)
    with torch.no_grad():
        assert ((schedule.time(log_snr) - t).abs() <= rounding).all()


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_derivatives(name: str) -> None:
    schedule, t = build(name), times()
    for function, rate in (
        (schedule.log_snr, schedule.log_snr_rate(t)),
        (schedule.alpha, schedule.derivatives(t)[0]),
        (schedule.sigma, schedule.derivatives(t)[1]),
    ):
        at = t.clone().requires_grad_()
        value = function(at).sum()
        exact = torch.autograd.grad(value, at)[0] if value.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(rate, exact, rtol=1e-9, atol=1e-12)


class _Plain(NoiseSchedule):
    """A user's own: nothing but log_snr."""

    name = "plain"

    def __init__(self) -> None:
        super().__init__()
        self.speed = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def log_snr(self, t: Tensor) -> Tensor:
        return 5 - self.speed * (2 * t).sinh()


def test_the_default_rate_differentiates_traces_and_nests() -> None:
    schedule, t = _Plain(), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    expected = -schedule.speed * 2 * (2 * t).cosh()
    with torch.no_grad():
        rate = schedule.log_snr_rate(t)
    assert not rate.requires_grad  # no graph is kept where none is wanted
    torch.testing.assert_close(rate, expected.detach(), rtol=4 * EPS, atol=0.0)

    rate = schedule.log_snr_rate(t)
    (slope,) = torch.autograd.grad(rate.sum(), schedule.speed)
    torch.testing.assert_close(slope, (-2 * (2 * t).cosh()).sum(), rtol=8 * EPS, atol=0.0)

    def total(speed: Tensor, at: Tensor) -> Tensor:
        rate: Tensor = torch.func.functional_call(_Rate(schedule), {"schedule.speed": speed}, (at,))
        return rate.sum()

    gradients = torch.func.grad(total, argnums=(0, 1))
    in_speed, in_time = gradients(schedule.speed.detach(), t)
    torch.testing.assert_close(in_speed, slope, rtol=8 * EPS, atol=0.0)
    torch.testing.assert_close(in_time, (-3 * 4 * (2 * t).sinh()), rtol=8 * EPS, atol=0.0)
    traced = make_fx(gradients)(schedule.speed.detach(), t)
    torch.testing.assert_close(traced(schedule.speed.detach() * 2, t)[1], 2 * in_time, rtol=8 * EPS, atol=0.0)


class _Rate(torch.nn.Module):
    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, t: Tensor) -> Tensor:
        return self.schedule.log_snr_rate(t)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_keeps_relative_accuracy_to_both_ends(name: str) -> None:
    schedule, t = build(name), times(dtype=torch.float32)
    single = copy.deepcopy(schedule).float()
    schedule = copy.deepcopy(single).double()  # the same parameters
    exact = t.double()
    info = torch.finfo(
        torch.float32
    )  # below its tiny, where t^7 of Karras comes at t = 1e-6, numbers have fewer digits
    # e^(λ/2) of a λ of size 30 loses log2(30) bits; the largest condition number of these functions of t is ρ = 7
    for got, want in (
        (single.sigma(t), schedule.sigma(exact)),
        (single.alpha(t), schedule.alpha(exact)),
        (single.log_snr_rate(t), schedule.log_snr_rate(exact)),
        *zip(single.derivatives(t), schedule.derivatives(exact), strict=True),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=64 * info.eps, atol=info.tiny)
    with torch.no_grad():
        back = single.log_snr(single.time(single.log_snr(t)))
    lost = (
        32 * torch.finfo(torch.float32).eps * (1 + schedule.log_snr(exact).abs() + schedule.log_snr_rate(exact).abs())
    )
    assert ((back - single.log_snr(t)).abs() <= lost).all()


def test_the_textbook_formulas_lose_it() -> None:
    """What the accuracy test above rejects: cosines and sigmoids subtracted as they are written."""
    t = torch.tensor([1e-6, 1e-5])
    angle, start = math.pi / 2 * (t + 0.008) / 1.008, torch.tensor(math.pi / 2 * 0.008 / 1.008)
    naive = (1 - (angle.cos() / start.cos()).square()).clamp(min=0).sqrt()
    exact = CosineSchedule().sigma(t.double())
    assert ((naive - exact) / exact).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FROM_DATUM)
def test_time_zero_is_the_datum(name: str, dtype: torch.dtype) -> None:
    schedule, zero = build(name).to(dtype), torch.zeros(1, dtype=dtype)
    assert schedule.alpha(zero) == 1
    assert schedule.sigma(zero) == 0
    assert schedule.log_snr(zero) == math.inf
    assert schedule.log_snr_rate(zero) == -math.inf
    alpha, sigma = schedule.derivatives(zero)
    assert torch.isfinite(alpha)
    assert torch.isfinite(sigma) if name in ("karras", "rectified") else sigma == math.inf
    assert schedule.time(schedule.log_snr(zero)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_time_one(name: str, dtype: torch.dtype) -> None:
    schedule, one = build(name).to(dtype), torch.ones(1, dtype=dtype)
    values = schedule.alpha(one), schedule.sigma(one)
    if name in ("cosine", "sigmoid", "rectified"):
        assert values == (0, 1)
        assert schedule.log_snr(one) == -math.inf
    else:
        assert values[0] > 0
        assert torch.isfinite(schedule.log_snr(one))
    alpha, sigma = schedule.derivatives(one)
    assert torch.isfinite(sigma)
    assert alpha == -math.inf if name == "sigmoid" else torch.isfinite(alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_all_is_finite_between_the_ends(name: str, dtype: torch.dtype) -> None:
    schedule = build(name).to(dtype)
    first, last = schedule.ends
    assert 0 <= first < last <= 1
    t = torch.linspace(first, last, 200, dtype=torch.float64).to(dtype)
    parts = (
        schedule.alpha(t),
        schedule.sigma(t),
        schedule.log_snr(t),
        schedule.log_snr_rate(t),
        *schedule.derivatives(t),
    )
    assert all(part.dtype == dtype and torch.isfinite(part).all() for part in parts)
    ratios = (schedule.sigma(t) / schedule.alpha(t))[[0, -1]]
    if name == "learned":
        assert (first, last) == (0.0, 1.0)
    else:
        torch.testing.assert_close(float(ratios[0]), schedule.ratios[0], rtol=1e-3, atol=0.0)
        assert last == 1 or math.isclose(float(ratios[1]), schedule.ratios[1], rel_tol=1e-2)


# -------------------------------------------------------------------------------------------------------------- grids
BETAS: dict[str, Callable[[int], Tensor]] = {
    "linear": lambda T: torch.tensor(
        [min(0.999, (1e-4 + (0.02 - 1e-4) * i / max(T - 1, 1)) * 1000 / T) for i in range(T)], dtype=torch.float64
    ),
    "cosine": lambda T: torch.tensor(
        [min(0.999, 1 - _cosine((i + 1) / T) / _cosine(i / T)) for i in range(T)], dtype=torch.float64
    ),
}


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


@pytest.mark.parametrize("steps", [1, 2, 20, 100, 1000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_grids_have_the_published_levels(name: str, steps: int) -> None:
    schedule, betas = make_schedule(name), BETAS[name](steps)  # type: ignore[arg-type]
    grid = schedule.grid(steps)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float64
    assert grid[0] == 0
    assert (grid.diff() > 0).all()
    signal, noise = schedule.alpha(grid[1:]).square(), schedule.sigma(grid[1:]).square()
    want = (1 - betas).cumprod(0)
    # beside 1e-12: a time near 1 is only known to 1.1e-16, which counts relative to 1 − t where the signal ends
    slack = 1e-12 + 2 * EPS * (schedule.log_snr_rate(grid[1:]) * noise).abs()
    assert (((signal - want) / want).abs() <= slack).all()
    # 1 − ᾱ is a difference in the table, so it has no more digits than ᾱ; where it is small it counts
    torch.testing.assert_close(noise, 1 - want, rtol=1e-12, atol=16 * EPS)


def test_another_offset_is_rejected_by_the_levels() -> None:
    wrong = CosineSchedule()
    wrong.offset = 0.0081
    want = (1 - BETAS["cosine"](100)).cumprod(0)
    assert ((wrong.alpha(wrong.grid(100)[1:]).square() - want) / want).abs().max() > 1e-6


def test_linear_continuous_time_is_the_limit_of_the_chain() -> None:
    schedule = LinearSchedule()
    grid = schedule.grid(20000)[1:]
    uniform = torch.arange(1, 20001, dtype=torch.float64) / 20000
    assert (grid - uniform).abs().max() < 2e-3  # Σ log(1 − β) against −∫ β: an error of order 1/T


@pytest.mark.parametrize("steps", [2, 18, 100])
def test_karras_grid(steps: int) -> None:
    schedule = KarrasSchedule()
    least, greatest, rho = schedule.least, schedule.greatest, 7
    published = [  # eq. 5, from σ_max down, and then 0
        (greatest ** (1 / rho) + i / (steps - 1) * (least ** (1 / rho) - greatest ** (1 / rho))) ** rho
        for i in range(steps)
    ] + [0.0]
    levels = schedule.sigma(schedule.grid(steps))
    torch.testing.assert_close(levels.flip(0), torch.tensor(published, dtype=torch.float64), rtol=1e-13, atol=0.0)
    # their σ of 80 and .002, in the units of data of standard deviation .5
    assert (greatest * 0.5, least * 0.5) == (80.0, 0.002)


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_a_chain_of_one_step(name: str) -> None:
    schedule = build(name)
    grid = schedule.grid(1)
    assert grid.shape == (2,)
    assert grid[0] == 0
    assert torch.isfinite(schedule.sigma(grid)).all()
    assert schedule.sigma(grid[1:]) > 0


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, None])
@pytest.mark.parametrize("name", NAMES)
def test_bad_numbers_of_steps(name: str, steps: Any) -> None:
    with pytest.raises(ValueError, match="timesteps must be an int of at least 1, got"):
        build(name).grid(steps)


@pytest.mark.parametrize("schedule", ["cosin", None, 3, CosineSchedule])
def test_bad_names(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"schedule must be one of 'linear', 'cosine'.* or a NoiseSchedule; got"):
        make_schedule(schedule)


def test_a_schedule_of_its_own_is_taken_as_it_is() -> None:
    own = _Plain()
    assert make_schedule(own) is own
    assert make_schedule("learned") is not make_schedule("learned")


# -------------------------------------------------------------------------------------------------------------- table
def test_a_table_has_its_own_levels() -> None:
    generator = torch.Generator().manual_seed(1)
    betas = torch.rand(30, generator=generator, dtype=torch.float64) * 0.5 + 1e-4
    schedule = TableSchedule(betas)
    grid, want = schedule.grid(30), (1 - betas).cumprod(0)
    torch.testing.assert_close(schedule.alpha(grid)[1:].square(), want, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(schedule.sigma(grid)[1:].square(), 1 - want, rtol=1e-12, atol=0.0)
    assert schedule.steps == 30
    between = schedule.alpha((grid[1:] + grid[:-1]) / 2)
    assert ((between < schedule.alpha(grid[:-1])) & (between > schedule.alpha(grid[1:]))).all()
    # the table of a published schedule and that schedule have the same levels
    linear = LinearSchedule()
    same = TableSchedule(linear.betas(50).tolist())
    torch.testing.assert_close(
        same.log_snr(same.grid(50)[1:]), linear.log_snr(linear.grid(50)[1:]), rtol=1e-11, atol=1e-11
    )


def test_a_table_is_saved_and_moved_with_its_program() -> None:
    schedule, other = TableSchedule([0.1, 0.2]), TableSchedule([0.3, 0.4])
    other.load_state_dict(schedule.state_dict())
    assert torch.equal(other.log_snr(torch.tensor([0.3])), schedule.log_snr(torch.tensor([0.3])))
    assert copy.deepcopy(schedule).to("meta").log_snr(torch.zeros(3, device="meta")).shape == (3,)
    assert schedule.log_snr(torch.tensor([0.3])).dtype == torch.float32


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], "at least one number"),
        ([[0.1, 0.2]], r"got shape \(1, 2\)"),
        ([0.1, 1.0], r"1 of 2 do not, first betas\[1\] = 1"),
        ([0.0, 0.1], r"first betas\[0\] = 0"),
        ([0.1, -0.1], r"first betas\[1\] = -0.1"),
        ([0.1, math.nan], r"first betas\[1\] = nan"),
    ],
)
def test_bad_tables(betas: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableSchedule(betas)


def test_a_table_makes_one_chain_only() -> None:
    with pytest.raises(ValueError, match="TableSchedule of 3 betas makes a chain of timesteps=3, got 1000"):
        TableSchedule([0.1, 0.2, 0.3]).grid(1000)


# ------------------------------------------------------------------------------------------------------------ learned
def learned() -> LearnedSchedule:
    schedule = build("learned")
    assert isinstance(schedule, LearnedSchedule)
    return schedule


def test_learned_ends_are_exact_and_the_way_is_monotone() -> None:
    start = LearnedSchedule().double()
    assert (start.log_snr(torch.tensor([0.0, 1.0])) - torch.tensor([13.3, -5.0])).abs().max() < 1e-5
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert (start.interior(t) - t).abs().max() < 0.1  # it starts close to a straight line
    moved = learned()
    h = moved.interior(t)
    assert h[0] == 0
    assert h[-1] == 1
    assert (h.diff() > 0).all()
    torch.testing.assert_close(moved.log_snr(t)[-1], -moved.gamma_1)
    with torch.no_grad():
        moved.raw_span.fill_(-3.0)  # whatever its parameters are, λ falls
    assert (moved.log_snr(t).diff() < 0).all()


@pytest.mark.parametrize("bad", [{"gamma_0": 5.0, "gamma_1": 5.0}, {"gamma_1": math.inf}, {"gamma_0": math.nan}])
def test_bad_learned_ends(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="gamma_0 must be less than gamma_1, both finite"):
        LearnedSchedule(**bad)


def test_learned_parts_share_the_gradient() -> None:
    schedule, t = learned(), torch.linspace(0, 1, 7, dtype=torch.float64)
    names = [name for name, _ in schedule.named_parameters()]
    parameters = list(schedule.parameters())

    def gradient(value: Tensor) -> dict[str, Tensor]:
        got = torch.autograd.grad((value * t.cos()).sum(), parameters, allow_unused=True)
        return {name: g for name, g in zip(names, got, strict=True) if g is not None}

    by_ends, by_interior = schedule.log_snr_parts(t)
    assert torch.equal(by_ends, by_interior)
    assert torch.equal(by_ends, schedule.log_snr(t))
    ends, interior, whole = gradient(by_ends), gradient(by_interior), gradient(schedule.log_snr(t))
    assert set(ends) == {"gamma_0", "raw_span"}
    assert set(interior) == {"raw_weights", "raw_slopes", "centres"}
    for name, value in (ends | interior).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=1e-12)
    values, rates = torch.func.jvp(schedule.log_snr_parts, (t,), (torch.ones_like(t),))
    assert torch.equal(values[0], by_ends)
    for rate in rates:
        torch.testing.assert_close(rate, schedule.log_snr_rate(t), rtol=1e-10, atol=0.0)


VARIANCES = torch.tensor([0.01, 0.2, 3.0], dtype=torch.float64)  # of Gaussian data


def row_losses(log_snr: Tensor, rate: Tensor) -> Tensor:
    """Of the bound, :math:`-½ λ' e^λ E|u − û|²` at each time with the exact denoiser: Var(u | y) = l / (1 + l SNR)."""
    snr = log_snr.exp().unsqueeze(-1)
    return -rate / 2 * (snr * VARIANCES / (1 + snr * VARIANCES)).sum(-1)


def test_the_way_between_the_ends_changes_the_variance_of_the_bound_only() -> None:
    """½ Σ log((1 + l SNR_max) / (1 + l SNR_min)) for every h; and by the square of the loss, h makes it less noisy."""
    schedule = LearnedSchedule().double()
    nodes = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    optimiser = torch.optim.Adam([schedule.raw_weights, schedule.raw_slopes, schedule.centres], lr=0.05)
    moments: list[tuple[float, float]] = []
    for step in range(60):
        t = nodes if step % 59 == 0 else (torch.arange(64, dtype=torch.float64) + 0.5) / 64
        (_, by_interior), (_, rate) = torch.func.jvp(schedule.log_snr_parts, (t,), (torch.ones_like(t),))
        losses = row_losses(by_interior, rate)
        if len(t) == len(nodes):
            moments.append((float(losses.detach().mean()), float(losses.detach().var())))
        optimiser.zero_grad()
        losses.square().mean().backward()
        optimiser.step()
    most, least = (schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)).exp()).detach().unbind()
    exact = float(((1 + VARIANCES * most) / (1 + VARIANCES * least)).log().sum() / 2)
    for mean, _ in moments:  # the midpoint rule, of an error of h² / 24 · f': less than 1e-5 here
        assert abs(mean - exact) < 1e-4
    assert moments[1][1] < 0.25 * moments[0][1]


# --------------------------------------------------------------------------------------------------- parameterisations
ROWS = [(name, prediction) for name in NAMES for prediction in get_args(Prediction)]
VALID = [(n, p) for n, p in ROWS if not (p == "v" and n in ("karras", "exploding", "rectified"))]


def noised(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """Times within the ends, data and noise."""
    generator = torch.Generator().manual_seed(2)
    first, last = schedule.ends
    t = torch.linspace(max(first, 1e-3), min(last, 0.999), 50, dtype=torch.float64)
    u, eps = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64).unbind()
    return t, u, eps


def recovered(
    schedule: NoiseSchedule, prediction: Prediction, t: Tensor, y: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    c = coefficients_of(prediction, schedule, t)
    (a, b), (d, e) = ((p.unsqueeze(-1), q.unsqueeze(-1)) for p, q in (c.data, c.noise))
    return a * y + b * out, d * y + e * out


@pytest.mark.parametrize(("name", "prediction"), VALID)
def test_every_prediction_gives_datum_and_noise_back(name: str, prediction: Prediction) -> None:
    schedule = build(name)
    t, u, eps = noised(schedule)
    alpha, sigma = schedule.alpha(t).unsqueeze(-1), schedule.sigma(t).unsqueeze(-1)
    y = alpha * u + sigma * eps
    with torch.no_grad():
        out = target_of(prediction, schedule, t, u, eps)
        data, noise = recovered(schedule, prediction, t, y, out)
    # rounding of y and F, of size α|u| + σ|ε|, is divided by α for û and by σ for ε̂, where the other is taken out
    size = 64 * EPS * (alpha * u.abs() + sigma * eps.abs() + 1e-3)
    assert ((data - u).abs() <= size / alpha.clamp(max=1) + size).all()
    assert ((noise - eps).abs() <= size / sigma.clamp(max=1) + size).all()
    if prediction == "edm":  # at any level it is as good as v: it divides by neither
        assert ((data - u).abs() * alpha.clamp(min=1e-3) <= size).all()


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_targets_are_what_their_names_say(prediction: Prediction) -> None:
    schedule = build("cosine")
    t, u, eps = noised(schedule)
    t = t.requires_grad_()
    alpha, sigma = schedule.alpha(t).unsqueeze(-1), schedule.sigma(t).unsqueeze(-1)
    y = alpha * u + sigma * eps
    want = {
        "epsilon": eps,
        "x0": u,
        "v": alpha * eps - sigma * u,
        "score": -(y - alpha * u) / sigma.square(),  # ∇ log N(y; α u, σ²)
        "velocity": torch.stack([torch.autograd.grad(y[:, i].sum(), t, retain_graph=True)[0] for i in range(3)], -1),
        "edm": sigma * u - alpha * eps,
    }
    got = target_of(prediction, schedule, t, u, eps)
    torch.testing.assert_close(got, want[prediction], rtol=1e-9, atol=1e-9)


def test_a_wrong_sign_of_v_is_rejected() -> None:
    schedule = build("cosine")
    t, u, eps = noised(schedule)
    alpha, sigma = schedule.alpha(t).unsqueeze(-1), schedule.sigma(t).unsqueeze(-1)
    data, noise = recovered(schedule, "v", t, alpha * u + sigma * eps, sigma * u - alpha * eps)
    assert (data - u).abs().max() > 0.1
    assert (noise - eps).abs().max() > 0.1


def test_edm_has_the_published_coefficients() -> None:
    schedule = KarrasSchedule()
    t = schedule.grid(18)[1:]
    sigma = schedule.sigma(t)
    c = coefficients_of("edm", schedule, t)
    skip, out, into = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt(), 1 / (sigma**2 + 1).sqrt()  # σ_data = 1
    for got, want in ((c.data[0], skip), (c.data[1], out), (c.scale, into)):
        torch.testing.assert_close(got, want, rtol=8 * EPS, atol=0.0)
    # Var F = 1 at every level, for data of variance 1
    u, eps = torch.randn(2, 18, 20000, generator=torch.Generator().manual_seed(3), dtype=torch.float64).unbind()
    variance = target_of("edm", schedule, t, u, eps).var(1)
    assert ((variance - 1).abs() < 4 * math.sqrt(2 / 20000)).all()


def test_v_is_edm_of_the_other_sign_where_variance_is_preserved() -> None:
    schedule = build("sigmoid")
    t, u, eps = noised(schedule)
    torch.testing.assert_close(
        target_of("v", schedule, t, u, eps), -target_of("edm", schedule, t, u, eps), rtol=1e-13, atol=1e-13
    )


def test_what_the_network_sees() -> None:
    schedule = build("karras")
    t = schedule.grid(20)[1:]
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert torch.equal(coefficients_of("epsilon", schedule, t, scaled=False).scale, torch.ones_like(t))
    torch.testing.assert_close(
        coefficients_of("epsilon", schedule, t).scale, (alpha.square() + sigma.square()) ** -0.5, rtol=4 * EPS, atol=0.0
    )


@pytest.mark.parametrize("name", ["karras", "exploding", "rectified"])
def test_v_needs_a_preserved_variance(name: str) -> None:
    schedule = build(name)
    t, u, eps = noised(schedule)
    for call in (
        lambda: check_prediction("v", schedule),
        lambda: coefficients_of("v", schedule, t),
        lambda: target_of("v", schedule, t, u, eps),
    ):
        with pytest.raises(ValueError, match=r"prediction='v' is defined where α² \+ σ² = 1.* use prediction='edm'"):
            call()


@pytest.mark.parametrize("prediction", ["eps", None, 3])
def test_bad_predictions(prediction: Any) -> None:
    with pytest.raises(ValueError, match=r"prediction must be one of 'epsilon', 'x0', 'v'.*, got"):
        check_prediction(prediction, CosineSchedule())


@pytest.mark.parametrize("name", NAMES)
def test_linear_answers_are_those_of_normal_data(name: str) -> None:
    """û = α y / r² and ε̂ = σ y / r² for standard normal data; F of them, beside its form in the scaled y."""
    schedule = build(name)
    t, y, _ = noised(schedule)
    with torch.no_grad():
        alpha, sigma = schedule.alpha(t).unsqueeze(-1), schedule.sigma(t).unsqueeze(-1)
        norm = (alpha.square() + sigma.square()).sqrt()
        for prediction in get_args(Prediction):
            if prediction == "v" and not schedule.variance_preserving:
                continue
            found = linear_answer(prediction, schedule)
            if found is None:
                assert prediction == "score" or (prediction == "velocity" and name != "rectified")
                continue
            exact = target_of(prediction, schedule, t, alpha * y / norm.square(), sigma * y / norm.square())
            form = (found[0] * sigma + found[1] * alpha) / norm * (y / norm)
            torch.testing.assert_close(form, exact, rtol=1e-12, atol=1e-12)
