"""The benchmarks of a diffusion's training step and of optimal pairs: they run, and their tables are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import diffusion_training
import ot_coupling
from diffusion.torchcfm_worker import Worker


class Local:
    """Our worker in this process, its answers through JSON as by a pipe."""

    def __init__(self, library: str = "ours") -> None:
        self.commands = Worker(library)

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(json.dumps(getattr(self.commands, do)(**arguments)))
        return answer


@pytest.mark.parametrize("name", [name for name in diffusion_training.CASES if "compile" not in name])
def test_steps_run(name: str) -> None:
    with torch.random.fork_rng():
        assert diffusion_training.CASES[name]()(2) > 0


def test_ratios_are_of_one_round() -> None:
    lines = diffusion_training.table({"plain": [1.0, 4.0], "ours": [1.0, 2.0]}).splitlines()
    assert lines[2].endswith("| 1.00 (1.00 … 1.00) | — |")
    assert lines[3].endswith("| 0.75 (0.50 … 1.00) | reached |")
    assert diffusion_training.table({"plain": [1.0], "ours": [1.2]}).splitlines()[3].endswith("missed |")


def test_pairs_use_all_rows_and_cost_less_in_greater_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "pairs.npy", np.stack([ot_coupling.eight_gaussians(256, rng), rng.normal(size=(256, 2))]))
    local = Local()
    found = [
        local("prepare", test=str(block), rows=256, block=block, data=str(tmp_path / "pairs.npy"))
        for block in (2, 64, 256)
    ]
    assert all(answer["used"] == 1 for answer in found)
    assert found[0]["cost"] > found[1]["cost"] > found[2]["cost"]


def test_data_have_unit_variance() -> None:
    x = ot_coupling.eight_gaussians(100_000, np.random.default_rng(0))
    # fourth moment: (3/8 + 6 · .01/2 + 3e-4) / .51² = 1.56, so a variance of the square of .56
    assert np.all(np.abs(x.var(0) - 1) < 4 * np.sqrt(0.56 / 100_000))


def test_bias_table() -> None:
    lines = ot_coupling.bias(64, 2, (1, 16, 64)).splitlines()
    assert lines[2].startswith("| independent pairs |")
    assert lines[-1].endswith("| +0.0% |")
    # independent pairs of unit variance in two dimensions: E|u − ε|² = 4, sd of a mean of 128 below 4 / √128
    assert abs(float(lines[2].split("|")[2].split("±")[0]) - 4) < 4 * 4 / np.sqrt(128)
