"""Sylvester flow: its determinant and not the published one, the mass of its density, invertibility at any weights."""

from __future__ import annotations

import pytest
import torch
from jacobians import jacobian_gap, jacobians
from torch import Tensor
from unit.test_numerical_inverse import SPREADS, lattice, mass, randomise

from pyro_gen.transforms.bijections import Inverse
from pyro_gen.transforms.numerical import triangular_root
from pyro_gen.transforms.sylvester import Sylvester


class Published(Sylvester):
    """As in Pyro 1.9.2: y = x + Rᵀ Qᵀ tanh(Q R~ᵀ x + b), whose determinant is not the product of 1 + h' r_ii r~_ii."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, (left, right) = self.basis(), self.factors()
        h = torch.tanh(x @ right @ q.mT + self.bias)
        factors = 1 + (1 - h.square()) * left.diagonal() * right.diagonal()
        return x + h @ q @ left, factors.log().sum(-1)


def build(kind: type[Sylvester], spread: float, features: int = 4, seed: int = 0) -> Sylvester:
    torch.manual_seed(seed)
    f = kind(features).double()
    randomise(f, spread)
    return f


@pytest.mark.parametrize("spread", SPREADS)
def test_determinant_is_right_and_the_published_one_is_rejected_even_near_the_identity(spread: float) -> None:
    x = torch.randn(50, 4, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    assert jacobian_gap(build(Sylvester, spread), x, None) < 1
    assert jacobian_gap(build(Published, spread), x, None) > 1e6


@pytest.mark.parametrize("spread", SPREADS[:-1])
def test_density_has_mass_one(spread: float) -> None:
    for seed in range(5):
        f = build(Sylvester, spread, 2, seed)
        frame = f.basis().detach().flip(-1)  # Qᵀ f(Q u) is upper triangular; with its coordinates swapped, lower
        assert mass(f, frame, *lattice(f, frame)) == pytest.approx(1, abs=1e-3), f"seed {seed}"


def test_density_of_the_published_determinant_has_not() -> None:
    """On a plain square: where its own map folds there is no preimage to take nodes from."""
    square = torch.linspace(-15, 15, 601, dtype=torch.double)
    nodes = square, square.expand(601, 601)
    eye = torch.eye(2, dtype=torch.double)
    for seed in range(3):
        assert mass(build(Sylvester, 0.5, 2, seed), eye, *nodes) == pytest.approx(1, abs=1e-5)
        assert abs(mass(build(Published, 0.5, 2, seed), eye, *nodes) - 1) > 2e-3


@pytest.mark.parametrize("reflections", [1, 3, 6])
def test_columns_are_orthonormal(reflections: int) -> None:
    torch.manual_seed(0)
    f = Sylvester(6, 3, reflections=reflections).double()
    for spread in (None, *SPREADS):
        if spread is not None:
            randomise(f, spread)
        q = f.basis()
        assert q.shape == (6, 3)
        assert torch.allclose(q.mT @ q, torch.eye(3, dtype=torch.double), atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_map_increases_and_inverts_at_extreme_weights(dtype: torch.dtype) -> None:
    """Slopes of e^±20 at 0: a product r_ii r~_ii within 2e-9 of −1, which rounds to −1 in single precision, and 5e8.

    With Q = −I the coordinates are on their own. f at the returned x is within the rounding of x times the slope.
    """
    p = torch.tensor([-20.0, 0.0, 20.0], dtype=dtype)
    f = Sylvester(3).to(dtype)
    with torch.no_grad():
        for parameter in f.parameters():
            parameter.zero_()
        f.vectors.copy_(torch.eye(3))
        f.log_slope.copy_(p)
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200, 3, dtype=dtype), torch.zeros(1, 3, dtype=dtype)])
    y, ladj = f(x)
    assert torch.isfinite(ladj).all()
    assert float(ladj[-1].detach()) == pytest.approx(0, abs=1e-5)  # the three slopes at 0 multiply to 1
    back, back_ladj = f.inverse(y)
    assert torch.isfinite(back_ladj).all()
    allowed = 100 * torch.finfo(dtype).eps * (1 + p.exp()) * (1 + back.abs())
    assert ((f(back)[0] - y).abs() < allowed).all()


def test_orthogonal_complement_stays_and_the_determinant_is_that_of_the_small_matrix() -> None:
    torch.manual_seed(2)
    f = Sylvester(5, 2).double()
    randomise(f, 0.7)
    x = torch.randn(6, 5, dtype=torch.double)
    y, ladj = f(x)
    q = f.basis()
    away = torch.eye(5, dtype=torch.double) - q @ q.mT
    assert torch.allclose(y @ away, x @ away, atol=1e-14)
    small = q.mT @ jacobians(f, x, None) @ q
    assert torch.allclose(torch.linalg.det(small).log(), ladj, atol=1e-12)
    assert (small.tril(-1).abs() < 1e-13).all()


def test_inverse_by_scalar_roots_is_that_of_the_generic_triangular_solver() -> None:
    f = build(Sylvester, 1.0, 4)
    y = torch.randn(7, 4, dtype=torch.double)
    frame = f.basis().detach().flip(-1)
    found = triangular_root(lambda u: f(u @ frame.mT)[0] @ frame, y @ frame) @ frame.mT
    assert torch.allclose(found, f.inverse(y)[0], atol=1e-12)


def test_context_moves_the_density_and_has_a_gradient() -> None:
    torch.manual_seed(0)
    f = Sylvester(3, context_features=2).double()
    y, context = torch.randn(4, 3, dtype=torch.double), torch.randn(4, 2, dtype=torch.double, requires_grad=True)
    x, ladj = Inverse(f)(y, context)
    gradient = torch.autograd.grad(x.square().sum() + ladj.sum(), context)[0]
    assert (gradient.abs() > 0).all()


def test_rank_above_the_number_of_features_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at most features=3"):
        Sylvester(3, 4)
