"""Block neural autoregressive flow: mass 1 where the published one loses some, log-slopes that do not overflow."""

from __future__ import annotations

import math

import pytest
import torch
from jacobians import jacobian_gap
from torch import Tensor
from unit.test_numerical_inverse import SPREADS, lattice, mass, randomise

from pyro_gen.transforms.block_autoregressive import BlockAutoregressive, _BlockLinear
from pyro_gen.transforms.numerical import Triangular, increasing_root

EYE = torch.eye(2, dtype=torch.double)


class Bounded(BlockAutoregressive):
    """The published head: the tanh network itself, whose range is a box."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_slope = self.network(x, context)
        return y, log_slope.sum(-1)

    def value(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.network(x, context)[0]


def build(spread: float, seed: int = 0, kind: type[BlockAutoregressive] = BlockAutoregressive) -> BlockAutoregressive:
    torch.manual_seed(seed)
    f = kind(2, (5, 4)).double()
    randomise(f, spread)
    return f


@pytest.mark.parametrize("spread", SPREADS[:-1])
def test_density_has_mass_one(spread: float) -> None:
    for seed in range(3):
        f = build(spread, seed)
        assert mass(f, EYE, *lattice(f, EYE)) == pytest.approx(1, abs=1e-3), f"seed {seed}"


def test_density_under_the_published_head_has_not() -> None:
    """Its log-determinant is right, and yet its mass is at most what the base has on the box that holds its range.

    The grid is a square, as what lies outside the box has no preimage to take nodes from; the gated map passes on it.
    """
    side = torch.linspace(-25, 25, 401, dtype=torch.double)
    nodes = side, side.expand(401, 401)
    for seed in range(3):
        f, bounded = build(0.3, seed), build(0.3, seed, Bounded)
        assert jacobian_gap(bounded, torch.randn(20, 2, dtype=torch.double), None) < 1
        assert mass(f, EYE, *nodes) == pytest.approx(1, abs=1e-3)
        last = bounded.layers[-1]
        assert isinstance(last, _BlockLinear)
        reach = (last.weights()[0].abs().sum(-1) + last.bias.abs()).detach()
        assert mass(bounded, EYE, *nodes) < float(torch.erf(reach / math.sqrt(2)).prod()) + 1e-3
        assert mass(bounded, EYE, *nodes) < 0.99


def test_a_root_outside_the_published_range_is_not_made_up() -> None:
    y = torch.tensor([[100.0, 0.0], [-100.0, 0.0]], dtype=torch.double)
    bounded = build(0.3, 0, Bounded)
    assert Triangular.root(bounded, y)[:, 0].tolist() == [math.inf, -math.inf]
    assert not torch.isfinite(Triangular.inverse(bounded, y)[1]).any()
    assert torch.isfinite(build(0.3).inverse(y)[1]).all()


@pytest.mark.parametrize("hidden", [(1,), (8,), (3, 5, 4)])
def test_blockwise_root_is_the_generic_one(hidden: tuple[int, ...]) -> None:
    for dtype, tolerance in ((torch.double, 1e-12), (torch.float, 1e-4)):
        torch.manual_seed(0)
        f = BlockAutoregressive(4, hidden, 3).to(dtype)
        for spread in (None, 0.5, 1.0):
            if spread is not None:
                randomise(f, spread)
            y, context = 3 * torch.randn(6, 4, dtype=dtype), torch.randn(6, 3, dtype=dtype)
            assert torch.allclose(f.root(y, context), Triangular.root(f, y, context), atol=tolerance, rtol=tolerance)


def test_slopes_are_bounded_below_by_the_gate() -> None:
    for spread in SPREADS:
        f = build(spread)
        for size in (0.1, 1.0, 10.0, 1e3):
            x = size * torch.randn(200, 2, dtype=torch.double)
            _, ladj = f(x)
            assert (ladj >= torch.nn.functional.logsigmoid(-f.gate).sum() - 1e-12).all()


def test_log_slope_of_the_network_is_right_where_the_slope_underflows() -> None:
    """At u = ±1e4 the slope is e^(−2e4): in closed form for one unit, log tanh'(u) → log 4 − 2|u|."""
    for dtype in (torch.float, torch.double):
        f = BlockAutoregressive(1, (1,)).to(dtype)
        with torch.no_grad():
            for parameter in f.parameters():
                parameter.zero_()
        for size in (1e4, -1e4, 1e12):
            _, log_slope = f.network(torch.full((1,), size, dtype=dtype))
            assert float(log_slope.detach()) == pytest.approx(math.log(4) - 2 * abs(size), rel=1e-6)
        _, log_slope = f.network(torch.zeros(1, dtype=dtype))
        assert float(log_slope.detach()) == pytest.approx(0, abs=1e-7)


def test_one_unit_in_closed_form_both_ways() -> None:
    """All weights 0: every row has norm 1, so y = x/2 + tanh(x)/2 with slope (1 + tanh'(x))/2."""
    f = BlockAutoregressive(1, (1,)).double()
    with torch.no_grad():
        for parameter in f.parameters():
            parameter.zero_()
    x = torch.linspace(-6, 6, 49, dtype=torch.double).unsqueeze(-1)
    y, ladj = f(x)
    assert torch.allclose(y, (x + x.tanh()) / 2, atol=1e-15)
    assert torch.allclose(ladj, ((1 + 1 / x.cosh().square()) / 2).log().squeeze(-1), atol=1e-14)
    assert torch.allclose(f.inverse(y)[0], x, atol=1e-13)
    assert torch.allclose(increasing_root(lambda v: (v + v.tanh()) / 2, y), x, atol=1e-13)


def test_context_enters_without_monotonicity() -> None:
    """y falls and rises along a context, which a positive weight could not do."""
    torch.manual_seed(0)
    f = BlockAutoregressive(2, (16,), 1).double()
    with torch.no_grad():
        along = f(torch.zeros(101, 2, dtype=torch.double), torch.linspace(-4, 4, 101, dtype=torch.double).unsqueeze(-1))
        change = along[0].diff(dim=0)
    assert (change > 1e-3).any()
    assert (change < -1e-3).any()


def test_no_hidden_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden is empty"):
        BlockAutoregressive(3, ())
    with pytest.raises(ValueError, match="hidden must be an int of at least 1"):
        BlockAutoregressive(3, (4, 0))
