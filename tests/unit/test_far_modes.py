"""The benchmark of far modes: what it trains and measures, on one seed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import far_modes


def test_data_have_the_weight_that_is_asked_for() -> None:
    x = far_modes.data(0)
    share = float((x < 0).double().mean())
    assert abs(share - far_modes.WEIGHT) < 4 * (far_modes.WEIGHT * (1 - far_modes.WEIGHT) / far_modes.ROWS) ** 0.5


def test_the_weight_of_a_known_density() -> None:
    def energy(x: torch.Tensor) -> torch.Tensor:
        y = x.squeeze(-1)
        parts = [-0.5 * (y + 4) ** 2 + torch.tensor(0.3).log(), -0.5 * (y - 4) ** 2 + torch.tensor(0.7).log()]
        return -torch.logsumexp(torch.stack(parts), 0)

    program = far_modes.EBM(1, energy, base=None)
    # Φ(−4) = 3e-5 of each mode lies on the other side, and float32 rounds the sum to a few 1e-5
    assert far_modes.left_of(0.0, program) == pytest.approx(0.3, abs=2e-4)


@pytest.mark.slow
def test_annealed_denoising_finds_the_weight() -> None:
    name = next(n for n in far_modes.OBJECTIVES if "one energy" in n)
    assert abs(far_modes.weight(far_modes.OBJECTIVES[name](), 0, 1500) - far_modes.WEIGHT) <= 0.03
