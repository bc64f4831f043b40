"""The benchmark of far modes: what it trains and measures, on one seed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import far_modes

from pyro_gen.programs.ebm import EBM


def test_data_have_the_weight_that_is_asked_for() -> None:
    x = far_modes.data(0)
    share = float((x < 0).double().mean())
    assert abs(share - far_modes.WEIGHT) < 4 * (far_modes.WEIGHT * (1 - far_modes.WEIGHT) / far_modes.ROWS) ** 0.5


def test_the_weight_of_a_known_density() -> None:
    def energy(x: torch.Tensor) -> torch.Tensor:
        y = x.squeeze(-1)
        parts = [-0.5 * (y + 4) ** 2 + torch.tensor(0.3).log(), -0.5 * (y - 4) ** 2 + torch.tensor(0.7).log()]
        return -torch.logsumexp(torch.stack(parts), 0)

    program = EBM(1, energy, base=None)
    # Φ(−4) = 3e-5 of each mode lies on the other side, and float32 rounds the sum to a few 1e-5
    assert far_modes.left_of(0.0, program) == pytest.approx(0.3, abs=2e-4)


def test_a_known_form_says_why() -> None:
    """The likelihood hears the weight, the score of clean data does not; with much noise rows NCE is the likelihood."""
    curvature, error = far_modes.known_form()
    share = far_modes.WEIGHT * (1 - far_modes.WEIGHT)
    assert curvature == pytest.approx(share, rel=1e-3)  # modes that far apart are labels
    assert error == pytest.approx((share / far_modes.ROWS) ** 0.5, rel=1e-3)
    matching = far_modes.known_form({0.0: 1.0})
    assert matching[0] < 2e-3 * curvature
    assert matching[1] > 50 * error  # more than the weight itself
    assert far_modes.known_form({0.001: 1.0})[1] == pytest.approx(matching[1], rel=1e-3)  # a limit of denoising
    assert far_modes.known_form(noise_ratio=1e6)[1] == pytest.approx(error, rel=1e-3)


@pytest.mark.slow
def test_annealed_denoising_finds_the_weight() -> None:
    name = next(n for n in far_modes.OBJECTIVES if "one energy" in n)
    assert abs(far_modes.weight(far_modes.OBJECTIVES[name](), 0, 1500) - far_modes.WEIGHT) <= 0.03
