"""Denoising score matching of programs with noise levels: least values, weights and draws, in closed form."""

from __future__ import annotations

import copy
import math
from typing import Any, get_args

import pyro
import pytest
import torch
from noised import VARIANCES, Gaussian, data, draws, floor, off
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen.distributions.parameterisations import Prediction
from pyro_gen.objectives.denoising import DenoisingScoreMatching, DenoisingScoreMatchingModule
from pyro_gen.objectives.flow_matching import FlowMatching
from pyro_gen.objectives.noise_regression import NoiseRegressionModule, Weighting
from pyro_gen.programs.diffusion import Diffusion


def weight(name: str, schedule: Any, t: Tensor, span: float) -> Tensor:
    """w(t) from the literature, each on its own prediction."""
    rate = torch.func.vmap(torch.func.grad(schedule.log_snr))(t)
    snr, sigma = schedule.log_snr(t).exp(), schedule.sigma(t)
    named = {
        "epsilon": torch.ones_like(t),
        "x0": 1 / snr,
        "v": (snr + 1) / snr,
        "edm": (snr + 1) / snr,  # (σ² + s²) / (σ s)² at s = 1 and α = 1, on x
        "truncated_snr": snr.clamp(min=1) / snr,
        "min_snr": snr.clamp(max=5) / snr,
        "velocity": (sigma * rate / 2).square(),
        "elbo": -rate * span,
        "sigmoid": -rate * span * torch.sigmoid(2 - snr.log()),
    }
    return named[name]


# ------------------------------------------------------------------------------------------------------ least values --
@pytest.mark.parametrize("name", get_args(Weighting))
@pytest.mark.parametrize("schedule", ["cosine", "rectified"])
def test_least_value_of_every_weighting(name: Any, schedule: Any) -> None:
    """½ ∫ w(t) Σ l SNR / (l SNR + 1) dt, by a midpoint rule of a million points."""
    program = Gaussian(schedule)
    first, last = program.times
    t = first + (last - first) * (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6
    snr = program.schedule.log_snr(t).exp()
    w = weight(name, program.schedule, t, last - first)
    expected = float((w * floor(snr)).mean() / 2)
    found = draws(program, DenoisingScoreMatching(weighting=name), 400)
    assert off(found, expected) < 4.5  # 18 of them: 4 standard errors each would fail one run in 900
    if name == "epsilon":
        assert off(found, 2 * expected) > 20  # without the ½
        assert off(draws(Gaussian(schedule, wrong=0.2), DenoisingScoreMatching(), 400), expected) > 20


def test_bound_weight_has_the_closed_integral() -> None:
    """½ Σ log (1 + l SNR_max) / (1 + l SNR_min), whatever lies between the ends."""
    for schedule in ("cosine", "linear", "rectified"):
        program = Gaussian(schedule)
        most, least = (program.schedule.log_snr(torch.tensor(t, dtype=torch.float64)).exp() for t in program.times)
        gain = torch.tensor(VARIANCES, dtype=torch.float64)
        expected = float(torch.log((1 + gain * most) / (1 + gain * least)).sum() / 2)
        assert off(draws(program, DenoisingScoreMatching(weighting="elbo"), 400), expected) < 4


@pytest.mark.parametrize("time", ["uniform", "lognormal", "logit_normal"])
def test_discrete_levels_have_their_own_sum(time: Any) -> None:
    """T5: the mean over the T levels drawn of Σ A l / (A l + 1 − A)."""
    program = Gaussian("linear", timesteps=20)
    t = program.grid[1:]
    shares = torch.full((20,), 1 / 20, dtype=torch.float64)
    if time != "uniform":
        edges = torch.cat([t[:1], (t[1:] + t[:-1]) / 2, t[-1:]])
        ratio = -program.schedule.log_snr(edges) / 2
        at = torch.logit(edges.clamp(max=1)) if time == "logit_normal" else (ratio - (-1.2 + math.log(2))) / 1.2
        below = torch.distributions.Normal(0.0, 1.0).cdf(at)
        shares = below.diff() / (below[-1] - below[0])
    expected = float((shares * floor(program.schedule.log_snr(t).exp())).sum() / 2)
    found = draws(program, DenoisingScoreMatching(time=time), 400)
    assert off(found, expected) < 4.5
    uniform = float(floor(program.schedule.log_snr(t).exp()).mean() / 2)
    assert time == "uniform" or off(found, uniform) > 20


@pytest.mark.parametrize("timesteps", [None, 30])
def test_loss_is_one_number_for_every_prediction(timesteps: int | None) -> None:
    x = data(200)
    values = {}
    for prediction in get_args(Prediction):
        module = DenoisingScoreMatching(weighting="min_snr")(Gaussian("cosine", prediction, timesteps))
        module.prepare(x)
        torch.manual_seed(3)
        values[prediction] = module.pointwise(x)
    for found in values.values():
        # at the ends û or ε̂ is a difference of numbers 1e3 times larger, in the exact denoiser of this test
        torch.testing.assert_close(found, values["epsilon"], rtol=1e-8, atol=1e-9)


def test_table_and_formula_agree() -> None:
    """Looked up in discrete time, computed where the schedule has something that may change."""
    x = data(300)
    program = Gaussian("linear", "v", 50)
    module = DenoisingScoreMatching(weighting="v")(program)
    module.prepare(x)
    torch.manual_seed(0)
    looked_up = module.pointwise(x)
    module.table = torch.empty(0)
    torch.manual_seed(0)
    torch.testing.assert_close(module.pointwise(x), looked_up, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- draws --
def test_low_discrepancy_is_unbiased_and_spares_variance() -> None:
    """Each row's level is uniform; over a batch all levels come in equal shares."""
    module = DenoisingScoreMatching()(Gaussian("cosine", timesteps=16))
    x = data(64)
    module.prepare(x)
    torch.manual_seed(0)
    levels = torch.stack([module._draw(64, x).level for _ in range(2000)])  # type: ignore[operator]
    grid = module.program.grid[1:]  # type: ignore[union-attr]
    hits = levels[:, 5].unsqueeze(1) == grid  # one row, over many batches
    chi2 = float(((hits.sum(0) - 125) ** 2 / 125).sum())
    assert chi2 < 15 + 4 * math.sqrt(30)
    shares = (levels.unsqueeze(-1) == grid).sum(1)  # one batch: 4 of each level
    assert bool((shares == 4).all())
    spread = levels.mean(1).var()
    assert float(spread) < 0.1 * float(grid.var()) / 64  # of independent draws the variance of a mean of 64


def test_minimum_of_a_linear_network_is_the_ridge_solution() -> None:
    """At one level, F = Wy: the least squares of ε on y, W = E[ε yᵀ] E[y yᵀ]⁻¹ = σ (α² S + σ²)⁻¹ over the data."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))

        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            return y @ self.weight.T

    torch.manual_seed(0)
    x = torch.randn(400, 2, dtype=torch.float64) @ torch.tensor([[1.0, 0.7], [0.0, 0.5]], dtype=torch.float64)
    program = Diffusion(2, Linear(), timesteps=1, schedule="karras", standardise=False).double()
    t = program.training_times(torch.zeros(1, dtype=torch.float64))
    sigma = float(program.schedule.sigma(t))
    with torch.no_grad():  # σ = 160 there: data that are as wide
        x = 100 * x
    second = x.T @ x / len(x)
    exact = sigma * torch.linalg.inv(second + sigma**2 * torch.eye(2, dtype=torch.float64))
    module = DenoisingScoreMatching()(program)
    module.prepare(x)
    net = program.model.net
    gradients = []
    for trial in (exact, 0.9 * exact):
        with torch.no_grad():
            net.weight.copy_(trial)  # type: ignore[operator, union-attr]
        rows = [torch.autograd.grad(module(x), net.weight)[0] for _ in range(400)]  # type: ignore[arg-type]
        all_of = torch.stack(rows)
        gradients.append((all_of.mean(0) / (all_of.std(0) / math.sqrt(len(rows)))).abs().max())
    assert float(gradients[0]) < 4
    assert float(gradients[1]) > 20


@pytest.mark.slow
def test_short_run_comes_within_two_percent_of_the_floor() -> None:
    """T5, judged by the exact excess E|ε̂ − E[ε|y]|² on fresh rows, so by no noise of the loss itself."""
    torch.manual_seed(0)
    exact = Gaussian("cosine", timesteps=100)
    x = (data(20_000) / torch.tensor(VARIANCES).sqrt()).float()  # standard normal: what the program standardises to
    program = Diffusion(3, timesteps=100, hidden=(64, 64), prediction="v")
    pg.fit(DenoisingScoreMatching()(program), x, steps=3000, batch_size=256, lr=2e-3, schedule="cosine", seed=0,
           progress=False, compile=False)  # fmt: skip
    t = exact.grid[1:].float().repeat(400)
    alpha, sigma = (f(t).unsqueeze(1) for f in (program.schedule.alpha, program.schedule.sigma))
    y = torch.randn(len(t), 3)  # α² + σ² = 1 and l = 1, so E[ε|y] = σ y
    with torch.no_grad():
        found = program.split(y, t)[1]
    least = float((3 * alpha.square()).mean())  # Σ A l / (A l + 1 − A) at l = 1
    excess = float((found - sigma * y).square().sum(1).mean())
    assert excess < 0.02 * least


# ----------------------------------------------------------------------------------------------------- scale and fit --
def test_scale_of_the_total() -> None:
    x = data(20)
    module = DenoisingScoreMatching()(Gaussian())
    module.prepare(x)

    def loss(module: Any, **options: Any) -> Tensor:
        torch.manual_seed(0)
        return module(x, **options).detach()  # type: ignore[no-any-return]

    torch.testing.assert_close(loss(module, total=200), 10 * loss(module))
    part = DenoisingScoreMatching()(Gaussian(full=200))
    part.prepare(x)
    torch.testing.assert_close(loss(part), 10 * loss(module))  # the plate says 200
    torch.testing.assert_close(loss(part, total=400), 20 * loss(module))
    with pytest.raises(ValueError, match="total"):
        module(x, total=0)


def test_fit_takes_averages_and_holds_no_rows_out() -> None:
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
    results = []
    for average in (None, 0.999, False):
        torch.manual_seed(0)
        program = Diffusion(2, hidden=(16,), timesteps=50)
        results.append(pg.fit(DenoisingScoreMatching()(program), x, steps=30, average=average, seed=0, progress=False))
    assert all(result.history.validation == [] for result in results)
    by_default, same, last = (torch.cat([p.flatten() for p in r.program.parameters()]) for r in results)  # type: ignore[union-attr]
    assert torch.equal(by_default, same)
    assert not torch.equal(by_default, last)
    assert DenoisingScoreMatching.validates  # of energies it still does


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "timesteps"), [("cosine", 50), ("sigmoid", None)])
def test_compiled_run_is_the_eager_run(schedule: Any, timesteps: int | None) -> None:
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        program = Diffusion(2, hidden=(16,), schedule=schedule, timesteps=timesteps)
        objective = DenoisingScoreMatching(weighting="elbo")
        result = pg.fit(objective(program), x, steps=20, compile=compiled, seed=0, progress=False)
        assert result.config["compiled"] is compiled
        weights.append(torch.cat([p.detach().flatten() for p in program.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=2e-6)  # Adam's steps of 1e-3, 20 of them, at rounding 1e-6


def test_copies_states_and_dtypes() -> None:
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    module = DenoisingScoreMatching()(Diffusion(2, hidden=(16,), timesteps=20))
    module.prepare(x)

    def rows(module: Any, x: Tensor = x) -> Tensor:
        torch.manual_seed(5)
        return module.pointwise(x).detach()  # type: ignore[no-any-return]

    twin = copy.deepcopy(module)
    assert twin.program is not module.program
    assert torch.equal(rows(twin), rows(module))
    other = DenoisingScoreMatching()(Diffusion(2, hidden=(16,), timesteps=20))
    other.load_state_dict(module.state_dict())
    other.prepare(x)
    assert torch.equal(rows(other), rows(module))
    assert not any("table" in name for name in module.state_dict())
    module.double()
    assert rows(module, x.double()).dtype == torch.float64
    assert module.table.dtype == torch.float64


def test_on_the_meta_device() -> None:
    with pyro.validation_enabled(False):
        module = DenoisingScoreMatching()(Diffusion(2, hidden=(16,), timesteps=20)).to("meta")
        loss = module(torch.empty(8, 2, device="meta"))
        loss.backward()
    assert loss.device.type == "meta"
    assert all(p.grad is not None for p in module.parameters())


def test_contexts_are_dropped_in_training_only() -> None:
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def forward(self, y: Tensor, t: Tensor, context: Tensor) -> Tensor:
            seen.append(context.detach())
            return y + 0 * context.sum()

    program = Diffusion(2, Watch(), context_shape=1, unconditional=0.25, timesteps=10)
    x, context = torch.randn(4000, 2), torch.ones(4000, 1)
    module = DenoisingScoreMatching()(program)
    module.prepare(x, context)
    module(x, context)
    share = float((seen[-1] != 1).float().mean())
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    module.eval()
    module(x, context)
    assert bool((seen[-1] == 1).all())
    with pytest.raises(ValueError, match="context is missing"):
        module.pointwise(x)


# ------------------------------------------------------------------------------------------------------------ errors --
def test_options_of_the_other_kind_are_refused() -> None:
    program, energy = Diffusion(2, hidden=(8,)), pg.EBM(2)
    for options in ({"sigma": 0.1}, {"sigmas": (0.1, 1.0), "levels": 3}, {"antithetic": True}, {"relative": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.*weighting="):
            DenoisingScoreMatching(**options)(program)  # type: ignore[arg-type]
    for options in ({"weighting": "v"}, {"time": "lognormal"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.*sigma="):
            DenoisingScoreMatching(**options)(energy)  # type: ignore[arg-type]
    assert type(DenoisingScoreMatching()(energy)) is DenoisingScoreMatchingModule
    assert type(DenoisingScoreMatching()(program)) is NoiseRegressionModule
    assert type(DenoisingScoreMatching()(program.model, program.guide)) is NoiseRegressionModule  # as `SVI` has it
    assert type(DenoisingScoreMatching()(energy.model)) is DenoisingScoreMatchingModule


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weighting": "snr"}, "weighting must be one of 'epsilon', 'x0'"),
        ({"time": "normal"}, "time must be one of 'uniform'"),
        ({"weighting": "min_snr", "gamma": 0.0}, "gamma must be positive"),
        ({"weighting": "elbo", "time": "lognormal"}, "leave time= out"),
        ({"gamma": 5.0}, "gamma= belongs to weighting='min_snr'"),
        ({"weighting": "sigmoid", "bias": math.nan}, "bias must be a finite number"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DenoisingScoreMatching(**options)


def test_infinite_weights_are_named() -> None:
    x = torch.randn(10, 2)
    with pytest.raises(ValueError, match="weighting='velocity' is infinite at 1 of the 50 levels, the first at t = 1"):
        FlowMatching()(Diffusion(2, schedule="sigmoid", prediction="edm", timesteps=50)).prepare(x)
    with pytest.raises(ValueError, match="weighting='elbo' is an integral over levels, and timesteps=1"):
        DenoisingScoreMatching(weighting="elbo")(Diffusion(2, timesteps=1)).prepare(x)


def test_settings_go_round() -> None:
    made = DenoisingScoreMatching(weighting="min_snr", gamma=3.0, time="lognormal")
    again = DenoisingScoreMatching.from_settings(made.settings())
    assert repr(again) == repr(made) == "DenoisingScoreMatching(weighting='min_snr', time='lognormal', gamma=3.0)"
    plain = DenoisingScoreMatching.from_settings(DenoisingScoreMatching().settings())
    assert type(plain(Diffusion(2, hidden=(8,)))) is NoiseRegressionModule
