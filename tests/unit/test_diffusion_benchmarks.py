"""The benchmark of sampling diffusions: that all are asked for the same thing, and that its ratios are of one round."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import diffusion_sampling
from diffusion import build_ours, contract
from diffusion.worker import Worker


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


def test_all_cases_are_set_up_and_take_turns(local: Local) -> None:
    workers = {"ours": local, "diffusers": Peer(1.0), "azula": Peer(2.0)}
    cases = [diffusion_sampling.Case(c.method, c.label, 3, c.aim) for c in diffusion_sampling.CASES[1:4]]
    found = diffusion_sampling.measure(workers, rounds=2, each=0.0, cases=cases, training=1)
    assert [t.case for t in found] == cases
    assert all(len(times.seconds[name]) == len(times.network) == 2 for times in found for name in workers)
    asked = [arguments["test"] for do, arguments in workers["azula"].asked if do == "prepare"]  # type: ignore[attr-defined]
    assert asked == ["ddpm, 3", "ddim, 3", "dpm++2m, 3"]
    for case in cases:
        answer = local("spread", name="net", test=case.test)
        assert answer["rows"] == diffusion_sampling.ROWS
    table = diffusion_sampling.timing_table(found)
    assert len(table.splitlines()) == len(diffusion_sampling.overhead_table(found).splitlines()) == 2 + len(cases)


def test_ratios_and_overheads_are_of_one_round() -> None:
    case = diffusion_sampling.Case("ddim", "DDIM", 10, 2.0)
    seconds = {"ours": [1.0, 4.0, 2.0], "diffusers": [2.0, 8.0, 6.0], "azula": [3.0, 4.0, 2.0]}
    times = diffusion_sampling.Times(case, seconds, [0.8, 2.0, 1.6])
    assert times.ratios("diffusers") == [2.0, 2.0, 3.0]
    assert times.overheads == pytest.approx([0.25, 1.0, 0.25])
    assert diffusion_sampling.timing_table([times]).endswith("| 2: missed |")  # azula's median ratio is 1
    assert diffusion_sampling.overhead_table([times]).endswith("| 0.25 (0.25 … 1.00) | 0.35: reached |")
    seconds["azula"] = seconds["diffusers"]
    assert diffusion_sampling.timing_table([times]).endswith("| 2: reached |")


def test_our_levels_are_those_of_the_contract(tmp_path: Path) -> None:
    """DDIM from given noise, written out with the signal of the contract, in float64."""
    start = np.random.default_rng(0).standard_normal((5, 2))
    np.save(tmp_path / "x.npy", start)
    steps = contract.visited(6)
    assert (steps[0], steps[-1], len(steps)) == (contract.TRAINED - 1, 0, 6)
    Worker("ours").ends("ddim", steps, str(tmp_path / "x.npy"), str(tmp_path / "y.npy"))
    y, signal = torch.from_numpy(start), contract.signal()
    for k, after in zip(steps, [*steps[1:], None], strict=True):
        a, b = signal[k], signal.new_ones(()) if after is None else signal[after]
        noise = torch.tanh(y)
        y = b.sqrt() * (y - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
    # grids are kept in the default dtype until the program is made double: a level is off by its rounding
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), y.numpy(), rtol=1e-4, atol=1e-4)


def test_draws_are_of_the_size_of_data() -> None:
    """What is timed are numbers that a network meets: no overflow, nothing denormal."""
    net = contract.network()
    for case in ("ddpm", "ddim", "dpm++2m"):
        x = build_ours.draws(case, net, 20, 200)()
        assert x.shape == (200, 2)
        assert 0.3 < float(x.std()) < 3


def test_a_whole_run_is_asked_for_to_write(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["diffusion_sampling.py", "--write", "--smoke"])
    with pytest.raises(SystemExit):
        diffusion_sampling.main()
    assert "leave out --smoke" in capsys.readouterr().err
