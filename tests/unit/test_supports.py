"""Ends of a flow: bounded, half-bounded, mixed and simplex supports, and the noise that makes whole numbers continuous.

Densities below are those of a standard normal (or logistic) vector pulled back, so all of them are known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.func import jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gen.datasets import dequantize
from pyro_gen.testing.losses import OneDevice
from pyro_gen.transforms import (
    Affine,
    Bijection,
    Compose,
    Coupling,
    Flip,
    Interval,
    Inverse,
    Standardise,
    StickBreaking,
)

INF = math.inf
ROWS = 6


def mixed() -> Interval:
    low = torch.tensor([0.0, -INF, 2.0, -INF, -1.0, -INF], dtype=torch.double)
    high = torch.tensor([17.0, INF, INF, -3.0, 1.0, INF], dtype=torch.double)
    return Interval(low, high)


ENDS: dict[str, Callable[[], Interval]] = {
    "pixels": lambda: Interval(0.0, 17.0, features=3),
    "unit": lambda: Interval(features=3),
    "own ends": lambda: Interval(torch.tensor([-1.0, 0.0, 1e3]), torch.tensor([1.0, 1e-3, 2e3])),
    "positive": lambda: Interval(0.0, INF, features=3),
    "above": lambda: Interval(torch.tensor([-5.0, 3.0]), INF),
    "below": lambda: Interval(-INF, 3.0, features=2),
    "free": lambda: Interval(-INF, INF, features=2),
    "mixed": mixed,
}
CASES: dict[str, Callable[[], Bijection]] = {
    **ENDS,
    "simplex": lambda: StickBreaking(4),
    "simplex, two parts": lambda: StickBreaking(2),
    "simplex, flow": lambda: Compose([StickBreaking(5), Standardise(4), Coupling(Affine(), 4, (6,)), Flip(4)]),
}


def build(name: str) -> Bijection:
    torch.manual_seed(0)
    return CASES[name]().double()


def free(bijection: Bijection) -> Callable[[Tensor], Tensor]:
    """The entries that may vary freely: all, or the first D − 1 of a point of the simplex."""
    return lambda x: x[..., : bijection.out_features]


def full(bijection: Bijection, x: Tensor) -> Tensor:
    if bijection.out_features == bijection.features:
        return x
    return torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1)


def gap(bijection: Bijection, x: Tensor) -> float:
    """Error of both log-determinants against autograd, in units of 100 D² ε (cond(J) + |ladj|): see test_transforms."""
    worst = 0.0
    with torch.no_grad():
        y, ladj = bijection(x)
        back_ladj = bijection.inverse(y)[1]

    def forward(row: Tensor) -> Tensor:
        result: Tensor = bijection(full(bijection, row))[0]
        return result

    def backward(row: Tensor) -> Tensor:
        return free(bijection)(bijection.inverse(row)[0])

    for function, at, found in ((forward, free(bijection)(x), ladj), (backward, y, back_ladj)):
        jacobian = vmap(jacrev(function))(at).detach()
        allowed = 100 * at.shape[-1] ** 2 * torch.finfo(x.dtype).eps * (torch.linalg.cond(jacobian) + ladj.abs())
        ratio = (found - torch.linalg.slogdet(jacobian).logabsdet).abs() / allowed
        worst = max(worst, float(torch.nan_to_num(ratio, nan=INF).max()))
    return worst


def inside(bijection: Bijection, rows: int = ROWS, spread: float = 2.0) -> Tensor:
    return bijection.inverse(spread * torch.randn(rows, bijection.out_features, dtype=torch.double))[0].detach()


@pytest.mark.parametrize("name", CASES)
def test_log_determinants_are_those_of_autograd(name: str) -> None:
    bijection = build(name)
    for spread in (0.1, 1.0, 4.0):
        x = inside(bijection, spread=spread)
        assert bool(bijection.domain.check(x).all())
        assert gap(bijection, x) < 1


class ForgetsTheWidth(Interval):
    """The log-Jacobian of the logit on the unit interval, whatever the ends: densities in other units."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = super().forward(x)
        return y, ladj + (self.high - self.low).log().sum()


class AllParts(StickBreaking):
    """Counts the volume of the simplex in the tangent plane, √D times that of the first D − 1 parts."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = super().forward(x)
        return y, ladj - 0.5 * math.log(self.features)


@pytest.mark.parametrize("wrong", [lambda: ForgetsTheWidth(0.0, 17.0, 3), lambda: AllParts(4)])
def test_wrong_log_determinants_are_seen(wrong: Callable[[], Bijection]) -> None:
    torch.manual_seed(0)
    bijection = wrong().double()
    assert gap(bijection, inside(bijection)) > 1e6


@pytest.mark.parametrize("name", CASES)
def test_inverse_undoes_forward(name: str) -> None:
    """In y within rounding of x over the slope: |y' − y| ≤ ε c (1 + |x|) ‖dy/dx‖ with c = 10⁴."""
    bijection = build(name)
    for spread in (0.1, 1.0, 4.0):
        y = spread * torch.randn(ROWS, bijection.out_features, dtype=torch.double)
        x, back_ladj = bijection.inverse(y)
        again, ladj = bijection(x)
        jacobian = vmap(jacrev(lambda row: free(bijection)(bijection.inverse(row)[0])))(y)
        stretch = torch.linalg.matrix_norm(jacobian.inverse(), 2)
        allowed = 1e4 * torch.finfo(x.dtype).eps * (1 + (1 + x.abs().amax(-1)) * stretch)
        assert bool(((again - y).abs().amax(-1) < allowed).all())
        assert bool(((ladj + back_ladj).abs() < allowed).all())


@pytest.mark.parametrize("name", CASES)
def test_vmap_copies_traces_and_meta(name: str) -> None:
    bijection = build(name)
    x = inside(bijection)
    y, ladj = bijection(x)
    copied = copy.deepcopy(bijection)
    for direction, at, pair in ((bijection, x, (y, ladj)), (Inverse(copied), y.detach(), copied.inverse(y))):
        traced = make_fx(direction)(at)
        for a, b, c in zip(vmap(direction)(at), traced(at), pair, strict=True):
            assert torch.allclose(a, c, atol=1e-12, rtol=1e-10)
            assert torch.equal(b, c)
    x, y = x.to("meta"), y.to("meta")
    bijection = bijection.to("meta")
    with OneDevice():
        for value in (*bijection(x), *bijection.inverse(y)):
            assert value.device.type == "meta"
            assert value.dtype == torch.double


def test_leading_dimensions_and_state() -> None:
    ends = mixed()
    x = inside(ends, 12).reshape(2, 2, 3, 6)
    y, ladj = ends(x)
    assert y.shape == x.shape
    assert ladj.shape == (2, 2, 3)
    other = mixed()
    other.load_state_dict(ends.state_dict())
    assert torch.equal(other(x)[0], y)
    assert ends.float()(x.float())[0].dtype == torch.float


# ------------------------------------------------------------------------------------------------ near the ends --
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_values_near_the_ends_against_fifty_digits(dtype: torch.dtype) -> None:
    """Relative to 1 + |value|: some roundings of the logarithms, whose arguments are good to a few ε."""
    mpmath.mp.dps = 50
    tiny, allowed = torch.finfo(dtype).tiny, 16 * torch.finfo(dtype).eps
    distances = torch.tensor([tiny, 1e-30, 1e-12, 1e-6, 0.3, 0.5, 0.9, 0.999], dtype=dtype)
    near_one = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    for end, points in {
        "interval": [*distances.tolist(), near_one.item()],
        "above": [*distances.tolist(), 1.0, 30.0, 1e6, 1e12],
        "below": [-p for p in [*distances.tolist(), 1.0, 30.0, 1e6, 1e12]],
    }.items():
        low, high = {"interval": (0.0, 1.0), "above": (0.0, INF), "below": (-INF, 0.0)}[end]
        x = torch.tensor(points, dtype=dtype).unsqueeze(-1)
        y, ladj = Interval(low, high, 1).to(dtype)(x)
        for given, value, slope in zip(x.flatten().tolist(), y.flatten().tolist(), ladj.tolist(), strict=True):
            p = mpmath.mpf(given)
            if end == "interval":
                want, want_slope = mpmath.log(p) - mpmath.log(1 - p), -mpmath.log(p) - mpmath.log(1 - p)
            else:
                gap_ = mpmath.log(-mpmath.expm1(-abs(p)))
                want, want_slope = mpmath.sign(p) * (abs(p) + gap_), -gap_
            assert abs(value - want) <= allowed * (1 + abs(want)), f"{end} at {given}"
            assert abs(slope - want_slope) <= allowed * (1 + abs(want_slope)), f"{end} at {given}"


def test_a_logit_by_one_minus_u_is_seen() -> None:
    """What the fifty digits are there to find: 1 − u of a rounded u, for pixels next to the upper end."""
    end = torch.tensor(17.0)
    x = torch.nextafter(torch.nextafter(end, -end), -end).reshape(1, 1)
    u = x / 17
    careless = float(-(u * (1 - u)).log() - math.log(17))
    exact = -math.log(float(x.double() * (17 - x.double()) / 17))
    assert abs(careless - exact) > 1e-2
    assert abs(float(Interval(0.0, 17.0, 1)(x)[1]) - exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize("name", CASES)
def test_both_directions_at_extremes_have_finite_gradients_and_stay_on_the_support(
    name: str, dtype: torch.dtype
) -> None:
    bijection = build(name).to(dtype)
    for size in (1e-12, 1.0, 30.0, 1e3, 1e12):
        for signs in (1.0, -1.0):
            y = torch.full((2, bijection.out_features), signs * size, dtype=dtype)
            y[1, ::2] *= -1
            y.requires_grad_()
            x, ladj = bijection.inverse(y)
            gradient = torch.autograd.grad(x.sum() + ladj.sum() / max(size, 1.0), y)[0]
            assert bool(bijection.domain.check(x.detach()).all())
            for value in (x, ladj, gradient):
                assert bool(torch.isfinite(value).all())
            x = x.detach().requires_grad_()
            y, ladj = bijection(x)
            base = dist.Normal(torch.zeros((), dtype=dtype), 1.0).log_prob(y / max(size, 1.0)).sum(-1)
            gradient = torch.autograd.grad((base + ladj).sum(), x)[0]
            for value in (y, ladj, gradient):
                assert bool(torch.isfinite(value).all())


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_at_an_end_the_limit_and_beyond_it_density_zero(dtype: torch.dtype) -> None:
    ends = Interval(0.0, 17.0, 1).to(dtype)
    at = torch.tensor([[0.0], [17.0]], dtype=dtype, requires_grad=True)
    y, ladj = ends(at)
    logistic = torch.nn.functional.logsigmoid(y).sum(-1) + torch.nn.functional.logsigmoid(-y).sum(-1)
    assert torch.allclose(logistic + ladj, torch.full((2,), -math.log(17.0), dtype=dtype), atol=1e-4)  # uniform
    normal = dist.Normal(torch.zeros((), dtype=dtype), 1.0).log_prob(y).sum(-1)
    assert bool((normal + ladj < -3000).all())
    assert bool(torch.isfinite(torch.autograd.grad((normal + ladj).sum(), at)[0]).all())

    for bijection, outside in (
        (ends, [[-0.5], [17.5], [-INF], [INF]]),
        (Interval(1.0, INF, 1), [[0.5], [-1e12], [-INF]]),
        (Interval(-INF, 1.0, 1), [[1.5], [1e12], [INF]]),
        (StickBreaking(3), [[-0.1, 0.6, 0.5], [0.6, 0.5, -0.1]]),
    ):
        x = torch.tensor(outside, dtype=dtype, requires_grad=True)
        y, ladj = bijection.to(dtype)(x)
        assert bool(torch.isfinite(y).all())
        assert bool((ladj == -INF).all())
        gradient = torch.autograd.grad((torch.exp(ladj) - y.square().sum(-1)).sum(), x)[0]
        assert bool(torch.isfinite(gradient).all())
    assert bool(torch.isnan(ends(torch.tensor([[math.nan]], dtype=dtype))[1]).all())  # not a number stays that


def test_round_trip_in_single_precision() -> None:
    """The rounding of x near an end a is ε|a|, that of y about 4 ε |y|; both in terms of x."""
    torch.manual_seed(0)
    for ends in (Interval(0.0, 17.0, 8), Interval(0.0, INF, 8), Interval(-INF, -3.0, 8), Interval(-INF, INF, 8)):
        y = 3 * torch.randn(5000, 8)
        x, ladj = ends.inverse(y)
        slope = torch.autograd.functional.vjp(lambda v, e=ends: e.inverse(v)[0], y, torch.ones_like(y))[1]
        allowed = torch.finfo(torch.float).eps * (4 * x.abs() + 8 * (1 + y.abs()) * slope)
        assert bool(((ends.inverse(ends(x)[0])[0] - x).abs() <= allowed).all())
        assert bool(torch.isfinite(ladj).all())
    stick = StickBreaking(64)
    x, _ = stick.inverse(3 * torch.randn(2000, 63))
    assert bool(constraints.simplex.check(x).all())
    again, _ = stick.inverse(stick(x)[0])
    # log x_i is a sum of up to 64 terms of size up to some 20: 64 roundings each way of at most 20 ε each.
    assert float(((again - x).abs() / x).max()) < 2 * 64 * 20 * torch.finfo(torch.float).eps


# ------------------------------------------------------------------------------------------------------ densities --
class PulledBack(dist.TorchDistribution):
    """A standard normal vector on the support of a bijection."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, bijection: Bijection) -> None:
        self.bijection = bijection
        super().__init__(torch.Size(), torch.Size([bijection.features]), validate_args=True)

    @property
    def support(self) -> Any:
        return self.bijection.domain

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.bijection.inverse(torch.randn(*sample_shape, self.bijection.out_features, dtype=torch.double))[0]

    def log_prob(self, value: Tensor) -> Tensor:
        self._validate_sample(value)
        y, ladj = self.bijection(value)
        return dist.Normal(0.0, 1.0).log_prob(y).sum(-1) + ladj


def test_pixel_density_in_the_units_of_the_pixels_integrates_to_one_in_two_dimensions() -> None:
    torch.manual_seed(1)
    flow = Compose([Interval(0.0, 17.0, 2), Coupling(Affine(), 2, (8,)), Flip(2), Coupling(Affine(), 2, (8,))]).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_(0, 0.3)
    s = torch.linspace(-25, 25, 501, dtype=torch.double)  # nodes 17 σ(s), closer together towards the ends
    nodes, weights = 17 * s.sigmoid(), 17 * s.sigmoid() * (-s).sigmoid() * 0.1
    grid = torch.cartesian_prod(nodes, nodes)
    area = torch.outer(weights, weights).flatten()

    def total(flow: Bijection) -> float:
        return float((area * PulledBack(flow).log_prob(grid).exp()).sum().detach())

    assert abs(total(flow) - 1) < 1e-3
    flow.parts[0] = ForgetsTheWidth(0.0, 17.0, 2).double()
    assert abs(total(flow) - 17**2) < 1  # nats of the unit square, not of the pixels


def test_simplex_density_integrates_to_one_and_dirichlet_comes_back() -> None:
    """On a triangle: ∫∫ p(x₁, x₂) by Gauss-Legendre in x₁ and in x₂ / (1 − x₁)."""
    stick = StickBreaking(3).double()
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(300))
    nodes, weights = (nodes + 1) / 2, weights / 2
    first, share = nodes[:, None].expand(300, 300), nodes[None].expand(300, 300)
    second = (1 - first) * share
    x = torch.stack([first, second, (1 - first) * (1 - share)], -1)
    area = weights[:, None] * weights * (1 - first)
    assert abs(float((area * PulledBack(stick).log_prob(x).exp()).sum()) - 1) < 1e-3
    assert abs(float((area * PulledBack(AllParts(3)).log_prob(x).exp()).sum()) - 1) > 0.1

    # Dirichlet(1, …, 1) is what independent logits of Beta(1, D − i) fractions give; its density is (D − 1)!.
    for concentration in (torch.ones(5), torch.tensor([0.5, 2.0, 1.0, 4.0, 3.0])):
        a = concentration.double()
        target = dist.Dirichlet(a)
        points = target.sample((50,))
        y, ladj = StickBreaking(5)(points)
        logits = y - torch.arange(4, 0, -1.0, dtype=torch.double).log()
        rest = a.flip(0).cumsum(0).flip(0)[1:]
        beta = dist.Beta(a[:-1], rest)
        z = logits.sigmoid()
        base = (beta.log_prob(z) + z.log() + (1 - z).log()).sum(-1)
        assert torch.allclose(base + ladj, target.log_prob(points), atol=1e-8)


def test_stick_breaking_is_that_of_torch() -> None:
    torch.manual_seed(0)
    theirs = torch.distributions.StickBreakingTransform()
    y = torch.randn(20, 6, dtype=torch.double)
    x, ladj = StickBreaking(7).inverse(y)
    assert torch.allclose(x, theirs(y), atol=1e-13)
    assert torch.allclose(ladj, theirs.log_abs_det_jacobian(y, x), atol=1e-11)
    back, back_ladj = StickBreaking(7)(x)
    assert torch.allclose(back, theirs.inv(x), atol=1e-10)
    assert torch.allclose(back_ladj, -ladj, atol=1e-11)
    small = torch.tensor([1 - 3e-20, 1e-20, 2e-20], dtype=torch.double)  # 1 − Σ x_j has no digit of these
    ours = StickBreaking(3)(small)[0]
    assert torch.allclose(ours, torch.tensor([2 / 3e-20, 0.5], dtype=torch.double).log(), rtol=1e-12)
    assert (theirs.inv(small) - ours).abs().max() > 1


@pytest.mark.parametrize("name", CASES)
def test_the_support_has_a_bijection_of_torch_for_samplers(name: str) -> None:
    """Density in the sampler's coordinates u, log p(x(u)) + log|dx/du|, from both log-determinants and by autograd."""
    bijection = build(name)
    target = PulledBack(bijection)
    assert target.support.event_dim == 1
    to_support = biject_to(target.support)
    u = torch.randn(4, bijection.out_features, dtype=torch.double)
    x = to_support(u)
    assert x.shape == (4, bijection.features)
    assert bool(target.support.check(x).all())
    assert torch.allclose(to_support.inv(x), u, atol=1e-8)
    composed = vmap(jacrev(lambda v: bijection(to_support(v))[0]))(u)
    ladj = to_support.log_abs_det_jacobian(u, x) + bijection(x)[1]
    assert torch.allclose(ladj, torch.linalg.slogdet(composed).logabsdet, atol=1e-8)


@pytest.mark.slow
def test_nuts_samples_on_mixed_ends() -> None:
    """Pulled to R⁶ the draws are standard normal: means and mean squares within 5 standard errors at n/10 draws."""
    pyro.set_rng_seed(0)
    ends = mixed()
    mcmc = MCMC(
        NUTS(lambda: pyro.sample("x", PulledBack(ends))), num_samples=300, warmup_steps=150, disable_progbar=True
    )
    mcmc.run()
    x = mcmc.get_samples()["x"]
    assert bool(ends.domain.check(x).all())
    y = ends(x)[0]
    for value, mean, sd in ((y, 0.0, 1.0), (y.square(), 1.0, math.sqrt(2.0))):
        assert float((value.mean(0) - mean).abs().max()) < 5 * sd / math.sqrt(30)


# ------------------------------------------------------------------------------------------------- dequantisation --
def test_dequantised_log_density_bounds_the_log_probability_of_whole_numbers() -> None:
    r"""x + u in cells of volume 1: E log p(x + u) ≤ log ∫ p(x + u) du = log P(x), both known by quadrature.

    p is a normal on (0, 17) by the logit: P(x) = Φ(y(x + 1)) − Φ(y(x)).
    """
    torch.manual_seed(0)
    ends = Interval(0.0, 17.0, 1).double()
    base = dist.Normal(torch.tensor(0.4, dtype=torch.double), 1.5)
    x = torch.arange(17, dtype=torch.double)

    def log_p(y: Tensor) -> Tensor:
        z, ladj = ends(y.unsqueeze(-1))
        return base.log_prob(z).sum(-1) + ladj

    edges = ends(torch.arange(18, dtype=torch.double).unsqueeze(-1))[0].squeeze(-1)
    log_mass = base.cdf(edges).diff().log()
    assert abs(float(log_mass.exp().sum()) - 1) < 1e-12
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(400))
    inside_cell = log_p(x.unsqueeze(-1) + (nodes + 1) / 2)
    assert torch.allclose((weights / 2 * inside_cell.exp()).sum(-1).log(), log_mass, atol=1e-6)
    bound = (weights / 2 * inside_cell).sum(-1)
    assert bool((bound < log_mass).all())

    draws = 4000
    noisy = torch.stack([dequantize(x, seed=i) for i in range(draws)])
    assert torch.equal(noisy.floor(), x.expand(draws, 17))
    found = log_p(noisy)
    error = found.std(0) / math.sqrt(draws)
    assert bool(((found.mean(0) - bound).abs() < 4.5 * error).all())  # 17 comparisons
    # Scaled to [0, 1) without its log-Jacobian the "bound" lies above the truth, by log 17 a pixel.
    assert bool((found.mean(0) + math.log(17.0) > log_mass).all())


def test_dequantisation_loses_nothing_for_a_piecewise_constant_density() -> None:
    torch.manual_seed(0)
    log_mass = torch.randn(17, dtype=torch.double).log_softmax(0)
    x = torch.randint(0, 17, (200, 3))
    y = dequantize(x.double(), seed=0)
    density = log_mass[y.floor().long()].sum(-1)  # constant on cells of volume 1
    assert torch.equal(density, log_mass[x].sum(-1))


# ------------------------------------------------------------------------------------------------------- bad input --
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Interval(0.0, 17.0), ValueError, "features must be given"),
        (lambda: Interval(torch.zeros(3), 1.0, 2), ValueError, "low must be a number or of shape"),
        (lambda: Interval(0.0, torch.ones(2, 2), 2), ValueError, "high must be a number or of shape"),
        (lambda: Interval(1.0, 1.0, 2), ValueError, "low must be below high"),
        (lambda: Interval(0.0, math.nan, 2), ValueError, "low must be below high"),
        (lambda: Interval(INF, INF, 2), ValueError, "low must be below high"),
        (lambda: Interval(-3e38, 3e38, 1), ValueError, "use infinite ends"),
        (lambda: Interval("0", 1.0, 2), TypeError, "low must be a number or a tensor"),
        (lambda: StickBreaking(1), ValueError, "at least 2"),
        (lambda: StickBreaking(0), ValueError, "features must be"),
        (lambda: Interval(0.0, 1.0, 2)(torch.zeros(3, 4)), ValueError, "takes vectors of 2"),
        (lambda: StickBreaking(3).inverse(torch.zeros(3)), ValueError, "takes vectors of 2"),
        (lambda: Compose([StickBreaking(3), Flip(3)]), ValueError, "StickBreaking gives 2, and Flip after it takes 3"),
        (lambda: Compose([StickBreaking(3), Flip(2)]).inverse(torch.zeros(3)), ValueError, "takes vectors of 2"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_sizes_go_through_compositions_and_inverses() -> None:
    flow = Compose([Flip(4), StickBreaking(4), Flip(3)])
    assert (flow.features, flow.out_features) == (4, 3)
    assert (Inverse(flow).features, Inverse(flow).out_features) == (3, 4)
    there = Compose([Inverse(flow), flow])
    y = torch.randn(5, 3)
    again, ladj = there(y)
    assert torch.allclose(again, y, atol=1e-4)
    assert torch.allclose(ladj, torch.zeros(5), atol=1e-4)
    assert Compose([StickBreaking(4), Flip(3)]).domain is constraints.simplex
