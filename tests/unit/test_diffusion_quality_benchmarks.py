"""The quality benchmarks of diffusions: densities by an ODE of another library's field, budgets, tables, floors."""

from __future__ import annotations

import math
import sys
import time
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import diffusion_2d
import diffusion_digits

import pyro_gen as pg


def weights_of(sizes: tuple[int, ...] = (3, 64, 64, 64, 2)) -> dict[str, np.ndarray]:
    """Weights of torchcfm's MLP, as its worker saves them."""
    rng = np.random.default_rng(0)
    found = {}
    for place, (a, b) in zip((0, 2, 4, 6), pairwise(sizes), strict=True):
        found[f"net.{place}.weight"] = (rng.normal(size=(b, a)) / math.sqrt(a)).astype("float32")
        found[f"net.{place}.bias"] = rng.normal(size=b).astype("float32") * 0.1
    return found


class OfNormal(diffusion_2d.Carried):
    """The exact field of independent pairs (1 − t) z + t x with x ~ N(0, s² I)."""

    def __init__(self, s: float) -> None:
        self.s = s

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        return x * (t * self.s**2 - (1 - t)) / ((1 - t) ** 2 + (t * self.s) ** 2)


def test_the_density_by_the_field_of_a_normal_is_that_normal() -> None:
    x = 0.3 * torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.distributions.Normal(torch.zeros(2, dtype=torch.float64), 0.3).log_prob(x).sum(1)
    found = OfNormal(0.3).log_prob(x, 1e-8)
    assert torch.allclose(found, exact, atol=1e-5)
    assert not torch.allclose(OfNormal(0.4).log_prob(x, 1e-8), exact, atol=0.1)  # another field, another density
    z, _ = OfNormal(0.3).along(x, 1.0, 0.0, 1e-8)
    assert torch.allclose(z, x / 0.3, atol=1e-5)


def test_the_trace_of_a_network_is_the_log_determinant_of_its_map() -> None:
    ode = diffusion_2d.Carried(weights_of())
    ode.net = torch.nn.Sequential(*(torch.nn.SiLU() if isinstance(m, torch.nn.SELU) else m for m in ode.net))  # smooth
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end, ladj = ode.along(x, 1.0, 0.0, 1e-9)
    back, _ = ode.along(end, 0.0, 1.0, 1e-9)
    assert torch.allclose(back, x, atol=1e-6)
    step, columns = 1e-4, []  # central differences: an error of step² and of 1e-9 / step
    for j in range(2):
        move = step * torch.eye(2, dtype=torch.float64)[j]
        ends = [ode.along(x + sign * move, 1.0, 0.0, 1e-9)[0] for sign in (1, -1)]
        columns.append((ends[0] - ends[1]) / (2 * step))
    jacobians = torch.stack(columns, 2)
    assert torch.allclose(torch.linalg.slogdet(jacobians)[1], ladj, atol=1e-4)
    assert not torch.allclose(torch.linalg.slogdet(jacobians)[1], -ladj, atol=1e-2)


def test_a_fit_ends_with_its_budget_and_the_rate_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock)))  # a second a look
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    rates: list[float] = []
    steps = diffusion_2d.fit_for(
        pg.DenoisingScoreMatching()(pg.Diffusion(2, timesteps=None, hidden=(8,))), x, 0.0, 40.0, 0, 1e-2,
        batch_size=64, average=0.9, optimizer=lambda p, lr: Kept(p, lr, rates),
    )  # fmt: skip
    assert len(rates) == steps
    assert 10 <= steps <= 21  # each step looks twice; whoever else looks takes a second too
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.9e-2
    assert rates[-1] < 0.1e-2


class Kept(torch.optim.Adam):
    """Adam that notes its learning rate at each step."""

    def __init__(self, parameters: Any, lr: float, rates: list[float]) -> None:
        super().__init__(parameters, lr=lr)
        self.rates = rates

    def step(self, closure: Any = None) -> Any:
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def test_the_gap_of_the_truth_is_nothing_and_of_a_shift_is_not() -> None:
    toy = diffusion_2d.TARGETS["moons"]()

    def score(shift: float) -> diffusion_2d.Score:
        return (
            lambda rows: (toy.log_prob(rows - shift).double(), 0.0),
            lambda n, seed: toy.sample(n, seed=seed) + shift,
        )

    found = diffusion_2d.scored("moons", 0, score(0.0), test=400, matched=128)
    assert found["gap"] == found["gap_error"] == 0
    floor = diffusion_2d.floors("moons", matched=128, pairs=4)
    assert min(floor) / 2 < found["w2"] < 2 * max(floor)
    moved = diffusion_2d.scored("moons", 0, score(0.5), test=400, matched=128)
    assert moved["gap"] > 0.5
    assert moved["w2"] > found["w2"]


def record(method: str, target: str, gap: float) -> dict[str, Any]:
    return {"key": [method, target, 0, 12.0], "gap": gap, "gap_error": 0.003, "numerical": 1e-4, "w2": 0.7,
            "steps": 100, "seconds": 11.9}  # fmt: skip


@pytest.mark.parametrize(
    ("gaps", "words"),
    [((0.02, 0.02), ("reached",) * 3), ((0.04, 0.07), ("missed", "missed", "missed")),
     ((0.03, 0.05), ("reached", "reached", "missed"))],
)  # fmt: skip
def test_what_was_asked_is_judged_by_median_and_worst(gaps: tuple[float, ...], words: tuple[str, ...]) -> None:
    text = diffusion_2d.table([record("diffusion", "moons", gap) for gap in gaps], {"moons": [0.6, 0.7]})
    judged = [part.split(": ")[-1].rstrip(".") for part in text.splitlines()[-1].split(", ")[1:]]
    assert tuple(judged) == words
    assert "*true rows against true rows*" in text


def test_halves_share_no_row() -> None:
    for a, b in diffusion_digits.halves(torch.arange(597.0).unsqueeze(1), 3):
        assert len(a) == len(b) == 298
        assert not set(a.flatten().tolist()) & set(b.flatten().tolist())


def test_distances_tell_another_sample_from_the_same() -> None:
    rows = diffusion_digits.Rows()
    floor = diffusion_digits.distances(None, rows, smoke=True)
    noise = 17 * torch.rand(298, 64, generator=torch.Generator().manual_seed(0))
    far = diffusion_digits.distances(noise, rows, smoke=True)
    assert far[0] > 0.95
    assert abs(floor[0] - 0.5) < 4 * 0.5 / math.sqrt(596)
    assert far[1] > 3 * floor[1]


def test_tables_pair_rows_and_judge_every_seed() -> None:
    def fit(rows: list[float], error: float = 0.0) -> dict[str, Any]:
        return {"rows": rows, "error": error, "seconds": 60.0, "samples": [0.6, 0.2], "ancestral": [0.6, 0.3]}

    ours, flow, vae = diffusion_digits.MODELS
    found = {ours: [fit([-100.0, -90.0], 0.01)], flow: [fit([-90.0, -80.0])], vae: [fit([-110.0, -96.0])],
             diffusion_digits.EDGES: [fit([-5.0, -7.0], 0.02)]}  # fmt: skip
    lines = diffusion_digits.density_table(found).splitlines()
    assert lines[3].endswith("| -10.00 ± 0.00 |")
    assert lines[4].endswith("| ≤ +8.00 ± 2.00 |")
    assert lines[4].split("|")[2].startswith(" ≥ -103.00")
    assert diffusion_digits.sample_table(found, [0.5, 0.1]).count("0.600 (0.600 … 0.600)") == 4
    assert diffusion_digits.verdict(found[ours]).count("missed") == 0
    assert diffusion_digits.verdict([fit([-100.0]), fit([-116.0], 0.1)]).count("missed") == 2
