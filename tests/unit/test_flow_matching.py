"""Flow matching: its least value, its equality with denoising, and the pairs of data and noise."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from noised import VARIANCES, Gaussian, data, draws, off
from scipy.optimize import linear_sum_assignment

import pyro_gen as pg
from pyro_gen.objectives.couplings import optimal_pairs, transport_cost
from pyro_gen.objectives.denoising import DenoisingScoreMatching
from pyro_gen.objectives.flow_matching import FlowMatching
from pyro_gen.programs.diffusion import Diffusion


def pair(rows: int, features: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, rows, features, dtype=torch.float64, generator=generator)
    return both[0] * 0.5 + 1, both[1]


# -------------------------------------------------------------------------------------------------------------- loss --
def test_least_value_on_the_straight_path() -> None:
    """Var(ε − u | y) = l / ((1 − t)² l + t²), with the integral √l π / 2 over [0, 1]."""
    program = Gaussian("rectified", "velocity")
    first, last = program.times
    t = first + (last - first) * (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6
    expected = sum(float((v / ((1 - t) ** 2 * v + t**2)).mean()) for v in VARIANCES) / 2
    # without the cut at both ends ∫ l / ((1 − t)² l + t²) dt = √l π / 2
    assert expected == pytest.approx(sum(math.sqrt(v) for v in VARIANCES) * math.pi / 4, abs=2e-3 * 3)
    found = draws(program, FlowMatching(), 400)
    assert off(found, expected) < 4
    assert off(found, 2 * expected) > 20
    assert off(draws(Gaussian("rectified", "velocity", wrong=0.2), FlowMatching(), 400), expected) > 10


@pytest.mark.parametrize("schedule", ["cosine", "rectified", "karras"])
def test_it_is_denoising_under_a_weight(schedule: Any) -> None:
    """½|v̂ − v|² written out by α′ and σ′, for a denoiser that is wrong; so one minimum."""
    program, x = Gaussian(schedule, "edm", wrong=0.3), data(300)
    module, same = FlowMatching()(program), DenoisingScoreMatching(weighting="velocity")(program)
    values = []
    for one in (module, same):
        one.prepare(x)
        torch.manual_seed(2)
        values.append(one.pointwise(x))
    assert torch.equal(*values)
    torch.manual_seed(2)
    noise = torch.normal(0.0, 1.0, x.shape, dtype=x.dtype)
    start = torch.rand((), dtype=x.dtype)
    t = program.training_times((start + torch.arange(300, dtype=x.dtype) / 300) % 1)
    alpha, sigma = (f(t).unsqueeze(1) for f in (program.schedule.alpha, program.schedule.sigma))
    d_alpha, d_sigma = (part.unsqueeze(1) for part in program.schedule.derivatives(t))
    velocity = program.velocity(alpha * x + sigma * noise, t)
    expected = (velocity - d_alpha * x - d_sigma * noise).square().sum(1) / 2
    torch.testing.assert_close(values[0], expected, rtol=1e-8, atol=1e-8)
    backwards = (velocity - d_alpha * x + d_sigma * noise).square().sum(1) / 2  # ε with the other sign
    assert not torch.allclose(values[0], backwards, rtol=1e-2)


def test_optimal_pairs_lower_the_loss_and_keep_the_flow() -> None:
    """N(0, l) per feature: the full plan pairs u = √l ε, whose velocity (1 − √l) ε has no variance left."""

    class Straight(torch.nn.Module):
        def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            t, root = t.unsqueeze(1), 2.0
            return (1 - root) * y / ((1 - t) * root + t)

    program = Diffusion(1, Straight(), "rectified", timesteps=None, prediction="velocity", standardise=False).double()
    generator = torch.Generator().manual_seed(0)
    generator.manual_seed(7)  # not the noise of the loss
    x = 2 * torch.randn(512, 1, dtype=torch.float64, generator=generator)
    losses = {}
    for block in (2, 32, 512):
        module = FlowMatching("optimal", block=block)(program)
        module.prepare(x)
        torch.manual_seed(0)
        losses[block] = float(module(x).detach()) / len(x)
    # two sorted samples of 512: mean square differences of the order of (1 + 4) log log 512 / 512 = .02
    assert losses[512] < 0.05 < losses[32] < losses[2]


# ------------------------------------------------------------------------------------------------------------- pairs --
@pytest.mark.parametrize(("rows", "block"), [(64, 64), (200, 64), (256, 16), (3, 64)])
def test_pairs_are_a_permutation_within_blocks(rows: int, block: int) -> None:
    index = optimal_pairs(*pair(rows), block)
    assert torch.equal(index.sort().values, torch.arange(rows))
    assert torch.equal(index // block, torch.arange(rows) // block)


def test_pairs_have_the_least_cost() -> None:
    u, e = pair(6)
    least = min(float(transport_cost(u, e[list(p)])) for p in permutations(range(6)))
    assert float(transport_cost(u, e[optimal_pairs(u, e)])) == pytest.approx(least, rel=1e-12)
    assert float(transport_cost(u, e)) > 1.01 * least
    u, e = pair(200)
    squares = torch.cdist(u, e).square()
    rows, columns = linear_sum_assignment(squares.numpy())
    assert float(transport_cost(u, e[optimal_pairs(u, e, 200)])) == pytest.approx(
        float(squares[rows, columns].mean()), rel=1e-10
    )
    assert transport_cost(u, e[optimal_pairs(u, e, 200)]) < transport_cost(u, e[optimal_pairs(u, e, 20)])


def test_pairs_on_a_line_are_in_order() -> None:
    u, e = pair(50, 1)
    e = e[optimal_pairs(u, e, 50)]
    assert torch.equal(u.squeeze(1).argsort(), e.squeeze(1).argsort())
    assert not torch.equal(u.squeeze(1).argsort(), (-e).squeeze(1).argsort())


def test_pairs_of_images_are_those_of_vectors() -> None:
    u, e = pair(40, 12)
    assert torch.equal(optimal_pairs(u.reshape(40, 3, 2, 2), e.reshape(40, 3, 2, 2)), optimal_pairs(u, e))
    with pytest.raises(ValueError, match="one shape"):
        optimal_pairs(u, e[:3])


def test_pairs_are_one_operation_of_a_graph() -> None:
    u, e = pair(30)
    torch.library.opcheck(torch.ops.pyro_gen.optimal_pairs.default, (u, e, 8))


# --------------------------------------------------------------------------------------------------------------- fit --
@pytest.mark.slow
def test_compiled_run_with_optimal_pairs_is_the_eager_run() -> None:
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        program = Diffusion(2, hidden=(16,), schedule="rectified", prediction="velocity", timesteps=None)
        result = pg.fit(FlowMatching("optimal")(program), x, steps=20, compile=compiled, seed=0, progress=False)
        assert result.config["compiled"] is compiled
        weights.append(torch.cat([p.detach().flatten() for p in program.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------------------------ errors --
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coupling": "greedy"}, "coupling must be one of 'independent', 'optimal'"),
        ({"coupling": "optimal", "block": 1}, "block must be a number of rows, 2 at least"),
        ({"weighting": "l2"}, "weighting must be one of"),
        ({"time": "beta"}, "time must be one of"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FlowMatching(**options)


def test_optimal_pairs_with_a_context_are_refused() -> None:
    program = Diffusion(2, hidden=(8,), context_shape=1)
    with pytest.raises(ValueError, match="coupling='optimal' pairs data and noise by x alone"):
        FlowMatching("optimal")(program)
    FlowMatching()(program)
    with pytest.raises(TypeError, match="not a bare pair"):
        FlowMatching()(lambda x: None, lambda x: None)
    assert FlowMatching()(program.model, program.guide).program is program  # as `SVI` has it
    with pytest.raises(TypeError, match="needs a program of kind Noised"):
        FlowMatching()(pg.EBM(2))


def test_settings_go_round() -> None:
    made = FlowMatching("optimal", block=128, time="logit_normal")
    again = FlowMatching.from_settings(made.settings())
    assert repr(again) == repr(made) == "FlowMatching(coupling='optimal', block=128, time='logit_normal')"
