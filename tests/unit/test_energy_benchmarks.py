"""The benchmark of energies: that its statistics are right, and that both sides are asked for the same thing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import energy_speed
from energies import build_ours, comparisons, contract
from energies.worker import Worker


class Peer:
    """Answers as a worker would, without a process; notes what it was asked."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, []  # type: ignore[var-annotated]

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.asked.append((do, arguments))
        return {"cpu": self.seconds}


class Local:
    """Our worker in this process, its answers through JSON as by a pipe."""

    def __init__(self) -> None:
        self.commands = Worker("ours")

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(json.dumps(getattr(self.commands, do)(**arguments)))
        return answer


@pytest.fixture(scope="module")
def local() -> Local:
    return Local()


# ------------------------------------------------------------------------------------------------------------ losses --
@pytest.mark.parametrize("case", contract.TRAINING)
def test_our_loss_is_the_mean_over_rows(case: contract.Case) -> None:
    """Twice the rows, the same mean; a sum would double."""
    net, x = contract.energy("quadratic", 2), torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    values = []
    for rows in (x, torch.cat([x, x])):
        evaluate = build_ours.loss(case, net, rows, {})
        torch.manual_seed(0)
        values.append(float(torch.stack([evaluate().detach() for _ in range(50)]).mean()))
    # denoising has the widest rows: ½|σs + n|² has sd about 1 over 400 rows and 50 draws of noise
    assert values[0] == pytest.approx(values[1], abs=4 * math.sqrt(2 / (400 * 50)))


def test_exact_loss_is_that_of_the_quadratic(local: Local, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(64, 3))
    np.save(tmp_path / "x.npy", x)
    local("build", name="q", kind="quadratic", features=3, dtype="float64", precision=1.5)
    data, gradient = str(tmp_path / "x.npy"), tmp_path / "g.npy"
    value = local("evaluate", name="q", case="exact", data=data, output=str(gradient))["value"]
    assert value == pytest.approx(comparisons.exact_quadratic(x, 1.5), rel=1e-12)
    assert np.load(gradient)[0] == pytest.approx(1.5 * (x**2).sum(1).mean() - 3, rel=1e-12)
    assert value != pytest.approx(comparisons.exact_quadratic(x, 1.5) / 3, rel=0.1)  # the Laplacian over d, as "approx"


def test_langevin_has_the_step_of_torchebm(local: Local, tmp_path: Path) -> None:
    """x' = x − η∇E + √(2η) n, with the noise that torch gives after the seed."""
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "x.npy", x.numpy())
    local("build", name="q", kind="quadratic", features=2, dtype="float64", precision=2.0)
    local(
        "draw", name="q", case="langevin", start=str(tmp_path / "x.npy"), output=str(tmp_path / "y.npy"), seed=5,
        step_size=0.02, steps=3,
    )  # fmt: skip
    torch.manual_seed(5)
    for _ in range(3):
        x = x - 0.02 * 2.0 * x + math.sqrt(0.04) * torch.randn_like(x)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), x.numpy(), rtol=1e-12)


def test_closed_energies() -> None:
    normal = contract.energy("correlated", 2)
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 1.6], [1.6, 4.0]]))
    difference = normal(x).squeeze(-1) + expected.log_prob(x)
    torch.testing.assert_close(difference, difference[:1].expand(7), rtol=0, atol=1e-5)
    ticks = torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1].unsqueeze(1)
    weight = torch.exp(-contract.energy("semicircle", 1)(ticks)).squeeze(1)
    assert float((weight * ticks[:, 0] ** 2).sum() / weight.sum()) == pytest.approx(0.25, abs=1e-6)
    assert bool(contract.energy("semicircle", 1)(torch.tensor([[1.5]])).isnan())


def test_refusal_is_an_answer(local: Local, tmp_path: Path) -> None:
    ((_, _, _, ours),) = comparisons.not_finite({"ours": local, "torchebm": local}, tmp_path)
    assert ours.startswith("refused: “log f of x is not finite")


# ------------------------------------------------------------------------------------------------------------ tables --
def test_all_cases_are_set_up_and_take_turns(local: Local) -> None:
    workers = {"ours": local, "torchebm": Peer(1.0)}
    cases = (*(c for c in energy_speed.CASES if "compiled" not in c[0]),)
    found = energy_speed.measure(workers, rounds=1, each=0.0, cases=cases, features=(2,))
    assert [t.label for t in found] == [label for _, label, _ in cases]
    asked = [arguments["test"] for do, arguments in workers["torchebm"].asked if do == "prepare"]  # type: ignore[attr-defined]
    assert asked == [case for case, _, _ in cases]
    assert all(len(t.seconds[n]) == 1 for t in found for n in workers)


def test_ratios_are_of_one_round() -> None:
    times = energy_speed.Times("x", 2, {"ours": [1.0, 4.0, 2.0], "torchebm": [2.0, 4.0, 1.0]})
    assert times.ratios == [2.0, 1.0, 0.5]
    line = energy_speed.timing_table([times]).splitlines()[-1]
    assert "1.00 (0.50 … 2.00)" in line
    assert line.endswith("| — | reached |")


def test_compiled_rows_share_the_eager_times_of_torchebm() -> None:
    workers = {"ours": Peer(1.0), "torchebm": Peer(3.0)}
    cases = (("exact", "a", {}), ("exact, compiled", "b", {}))
    eager, compiled = energy_speed.measure(workers, rounds=2, each=1.0, cases=cases, features=(2,))
    assert compiled.seconds["torchebm"] is eager.seconds["torchebm"]
    assert compiled.ratios == [3.0, 3.0]
    assert compiled.compiling == 1.0
    assert all(a["test"] == "exact" for do, a in workers["torchebm"].asked if do != "build")


@pytest.mark.parametrize(("ratio", "says"), [(1.0, "reached"), (0.99, "missed: torchebm is faster")])
def test_verdict(ratio: float, says: str) -> None:
    assert energy_speed.verdict(ratio) == says


def test_moments() -> None:
    found = comparisons.moment(np.array([1.0, 2.0, 3.0]))
    assert found == comparisons.Moment(2.0, pytest.approx(1 / math.sqrt(3)))
    assert found.off(3.0) == pytest.approx(math.sqrt(3))
    assert comparisons.relative(np.array([1.0, -4.0]), np.array([1.0, -4.4])) == pytest.approx(0.1)


def test_units_of_the_denoising_loss() -> None:
    """torchebm's ½|s + n/σ|², written out here, times σ² is ours at the same noise."""
    net, x = contract.energy("mlp", 2, seed=3).double(), torch.randn(50, 2, dtype=torch.float64)
    evaluate = build_ours.loss("denoising", net, x, {})
    torch.manual_seed(7)
    ours = float(evaluate().detach())
    torch.manual_seed(7)
    noise = contract.SIGMA * torch.randn_like(x)

    def score(at: Tensor) -> Tensor:
        return torch.func.grad(lambda y: -net(y).sum())(at)

    theirs = float((0.5 * (score(x + noise) + noise / contract.SIGMA**2).square().sum(1)).mean().detach())
    assert ours == pytest.approx(contract.UNITS["denoising"] * theirs, rel=1e-12)
    assert ours != pytest.approx(theirs, rel=0.5)
