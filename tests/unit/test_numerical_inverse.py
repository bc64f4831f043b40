"""The bracketed inverse and its implicit derivatives, and all transforms that are inverted so, through one suite."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jacobians import jacobian_gap, jacobians, worst
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gen.testing.losses import OneDevice
from pyro_gen.transforms.bijections import Bijection, Inverse
from pyro_gen.transforms.block_autoregressive import BlockAutoregressive
from pyro_gen.transforms.numerical import (
    Triangular,
    implicit,
    increasing_root,
    triangular_jacobian,
    triangular_root,
)
from pyro_gen.transforms.sylvester import Sylvester

D, C, ROWS = 4, 2, 5


class Sinh(Triangular):
    """y_i = sinh(x_i)/w_i + a sin(x_{i-1}) + V c, whose inverse has a closed form; all through the generic code."""

    def __init__(self, features: int = D, context_features: int = C) -> None:
        super().__init__(features, context_features)
        self.log_scale = nn.Parameter(torch.randn(features))
        self.mix = nn.Parameter(torch.randn(()))
        self.shift = nn.Parameter(torch.randn(features, max(context_features, 1)))

    def _outside(self, before: Tensor, context: Tensor | None) -> Tensor:
        shift = self.mix * before.sin()
        return shift if context is None else shift + context @ self.shift.mT

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, context = self.broadcast(x, context)
        before = torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], -1)
        y = x.sinh() * self.log_scale.exp() + self._outside(before, context)
        return y, (x.cosh().log() + self.log_scale).sum(-1)

    def closed_form(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = torch.zeros_like(y)
        for _ in range(self.features):  # each round gets one more coordinate right
            before = torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], -1)
            x = torch.asinh((y - self._outside(before, context)) * (-self.log_scale).exp())
        return x, -(x.cosh().log() + self.log_scale).sum(-1)


CASES: dict[str, Callable[[], Bijection]] = {
    "generic": Sinh,
    "generic, no context": lambda: Sinh(D, 0),
    "Sylvester": lambda: Sylvester(D, D, C),
    "Sylvester, rank 2": lambda: Sylvester(D, 2, reflections=3),
    "Sylvester, rank 1": lambda: Sylvester(D, 1, C),
    "BNAF": lambda: BlockAutoregressive(D, (5, 6), C),
    "BNAF, one layer": lambda: BlockAutoregressive(D, (7,)),
    "BNAF, one feature": lambda: BlockAutoregressive(1, (3, 4, 5), C),
}
SPREADS = [0.01, 0.1, 0.5, 1.0, 2.0]


def build(name: str, spread: float | None = None, seed: int = 0, dtype: torch.dtype = torch.double) -> Bijection:
    torch.manual_seed(seed)
    bijection = CASES[name]().to(dtype)
    if spread is not None:
        randomise(bijection, spread)
    return bijection


@torch.no_grad()
def randomise(bijection: nn.Module, spread: float) -> None:
    for parameter in bijection.parameters():
        parameter.normal_(0, spread)


def inputs(bijection: Bijection, dtype: torch.dtype = torch.double, rows: int = ROWS) -> tuple[Tensor, Tensor | None]:
    x, context = torch.randn(rows, bijection.features, dtype=dtype), torch.randn(rows, C, dtype=dtype)
    return x, context if bijection.context_features else None


def round_trip_gap(bijection: Bijection, x: Tensor, context: Tensor | None) -> float:
    """Error of x → y → x, in units of its rounding: c ε ‖J⁻¹‖ (1 + |y| + |x|), c = 100 for the sums behind y."""
    y, _ = bijection(x, context)
    back, _ = bijection.inverse(y, context)
    stretch = torch.linalg.matrix_norm(torch.linalg.inv(jacobians(bijection, x, context).double()), 2).clamp(min=1)
    allowed = 100 * torch.finfo(x.dtype).eps * stretch * (1 + y.abs().amax(-1) + x.abs().amax(-1))
    return worst(back, x, allowed.unsqueeze(-1))


def lattice(bijection: Bijection, frame: Tensor, count: int = 161) -> tuple[Tensor, Tensor]:
    """Nodes that cover what a pulled-back standard normal in 2-D has mass on: the preimage of a lattice on [−8, 8]².

    In the coordinates u = frameᵀ x the map is lower triangular, so u_0 is a function of the lattice's first coordinate
    alone and the preimage is a product grid with nodes of u_1 that depend on u_0; what is outside has mass 2.5e-15.
    Returns ``(count,)`` and ``(count, count)``.
    """
    v = torch.linspace(-8, 8, count, dtype=torch.double)
    corners = torch.stack(torch.meshgrid(v, v, indexing="ij"), -1)
    with torch.no_grad():
        u = bijection.inverse(corners @ frame.mT)[0] @ frame
    assert torch.allclose(u[:, :, 0], u[:, :1, 0].expand(count, count), rtol=1e-9, atol=1e-9)
    return u[:, 0, 0], u[..., 1]


def mass(bijection: Bijection, frame: Tensor, first: Tensor, second: Tensor) -> float:
    """∫ N(f(x); 0, I) |det ∂f/∂x| dx over a grid, by the trapezoidal rule and its extrapolation from every other node.

    Only differences of nodes and ``forward`` enter; errors of the rule are of fourth order in the spacing.
    """
    u = torch.stack([first.unsqueeze(-1).expand_as(second), second], -1)
    with torch.no_grad():
        y, ladj = bijection(u @ frame.mT)
    p = (ladj - y.square().sum(-1) / 2 - math.log(2 * math.pi)).exp()

    def rule(stride: int) -> float:
        inner = torch.trapezoid(p[::stride, ::stride], second[::stride, ::stride], dim=-1)
        return float(torch.trapezoid(inner, first[::stride]))

    return (4 * rule(1) - rule(2)) / 3


# ------------------------------------------------------------------------------------------------ the bracketed root


INCREASING: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "flat": lambda x: 1e-5 * x + 3,
    "steep": lambda x: 1e5 * x - 7,
    "cubic": lambda x: x + x**3,
    "step": lambda x: x + 1e3 * torch.tanh(1e6 * (x - 0.7)),
    "plateau": lambda x: 1e-6 * x + (x - 2).clamp(min=0),
    "power": lambda x: x.sign() * ((1 + x.abs()) ** 0.75 - 1),
}


def bracket_gap(function: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    """Where the target is not between the function's values 2 ε max(1, |x|) to the left and to the right of x.

    The function itself is known to its own rounding only, for which 8 ε |target| + 8 ε are added.
    """
    epsilon = torch.finfo(x.dtype).eps
    reach, noise = 2 * epsilon * x.abs().clamp(min=1), 8 * epsilon * (1 + target.abs())
    return ~((function(x - reach) - noise <= target) & (target <= function(x + reach) + noise))


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize("name", INCREASING)
def test_roots_are_right_to_the_last_bit_or_two(name: str, dtype: torch.dtype) -> None:
    function = INCREASING[name]
    sizes = torch.logspace(-12, 12, 97, dtype=dtype)
    target = torch.cat([-sizes.flip(0), sizes.new_zeros(1), sizes, torch.randn(100, dtype=dtype)])
    root = increasing_root(function, target)
    assert torch.isfinite(root).all()
    assert not bracket_gap(function, root, target).any()
    reach = 8 * torch.finfo(dtype).eps * root.abs().clamp(min=1)
    if name in ("identity", "steep", "cubic"):  # a root a few spacings off is seen, where the slope is not small
        assert bracket_gap(function, root + 10 * reach, target).any()


def test_newton_without_a_bracket_fails_where_bisection_does_not() -> None:
    function = INCREASING["step"]
    target = torch.tensor([0.3, 900.0, -1200.0], dtype=torch.double)
    x = torch.zeros_like(target)
    for _ in range(100):
        value, slope = torch.func.jvp(function, (x,), (torch.ones_like(x),))
        x = x - (value - target) / slope
    assert bracket_gap(function, x, target).any()
    assert not bracket_gap(function, increasing_root(function, target), target).any()


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float, 32), (torch.double, 64)])
def test_the_number_of_steps_depends_on_the_precision_alone(dtype: torch.dtype, expected: int) -> None:
    calls = 0

    def function(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x + x**3

    for size in (0.0, 1.0, 1e10):
        calls = 0
        increasing_root(function, torch.full((3,), size, dtype=dtype))
        assert calls == expected
    for features in (1, 3):
        calls = 0
        triangular_root(function, torch.ones(2, features, dtype=dtype))
        assert calls == features * expected


def test_a_root_that_does_not_exist_is_not_made_up() -> None:
    target = torch.tensor([-2.0, 0.0, 2.0, math.nan, math.inf], dtype=torch.double)
    root = increasing_root(torch.tanh, target)
    assert root.tolist()[:3] == pytest.approx([-math.inf, 0.0, math.inf], abs=1e-15)
    assert root[3].isnan()
    assert root[4] == math.inf


# -------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("first", [jacrev, jacfwd])
@pytest.mark.parametrize("second", [jacrev, jacfwd])
def test_derivatives_are_exact_up_to_the_order_asked_and_not_above(first: Any, second: Any) -> None:
    """arsinh and its three derivatives in closed form; the next one is the deliberately wrong case."""
    y = torch.tensor([0.3, -1.7, 4.0], dtype=torch.double)
    u = 1 + y * y
    exact = [u**-0.5, -y * u**-1.5, (2 * y * y - 1) * u**-2.5]
    for order in (1, 2, 3):

        def inverse(v: Tensor, order: int = order) -> Tensor:
            return implicit(torch.sinh, increasing_root(torch.sinh, v), v, order=order).sum()

        assert torch.allclose(increasing_root(torch.sinh, y), torch.asinh(y), atol=1e-15, rtol=1e-15)
        derivative = inverse
        for k, operation in enumerate((first, second, first), 1):
            derivative = operation(derivative)
            found = derivative(y)
            while found.dim() > 1:  # the function acts entry by entry
                found = found.diagonal(dim1=0, dim2=1).contiguous()
            right = torch.allclose(found, exact[k - 1], atol=1e-13, rtol=1e-12)
            assert right is (k <= order), f"derivative {k} with order {order}"


def test_value_is_the_root_and_a_gradient_under_no_grad_is_right_too() -> None:
    y = torch.randn(6, 3, dtype=torch.double)
    root = increasing_root(torch.sinh, y)
    assert torch.equal(implicit(torch.sinh, root, y), root)
    with torch.no_grad():
        _, slope = torch.func.jvp(lambda v: implicit(torch.sinh, increasing_root(torch.sinh, v), v), (y,), (y,))
        gradient = torch.func.grad(lambda v: implicit(torch.sinh, increasing_root(torch.sinh, v), v).sum())(y)
    assert torch.allclose(slope, y / root.cosh(), rtol=1e-13)
    assert torch.allclose(gradient, 1 / root.cosh(), rtol=1e-13)
    with pytest.raises(ValueError, match="order"):
        implicit(torch.sinh, root, y, order=0)


def test_generic_inverse_is_the_closed_form_with_its_derivatives() -> None:
    f = build("generic", 0.7)
    assert isinstance(f, Sinh)
    y, context = inputs(f)
    parts = [y.requires_grad_(), context.requires_grad_(), *f.parameters()] if context is not None else []
    found, expected = f.inverse(y, context), f.closed_form(y, context)
    weights = [torch.randn_like(value) for value in found]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    gradients = [
        torch.autograd.grad(sum((v * w).sum() for v, w in zip(pair, weights, strict=True)), parts)
        for pair in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-11, rtol=1e-11)


class Forgetful(BlockAutoregressive):
    """The log-determinant at the solution held fixed: the right value, and a gradient without the part through x."""

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _ = super().inverse(y, context)
        return x, -self(x.detach(), context)[1]


class Detached(Sylvester):
    """The root as a constant."""

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = super().inverse(y, context)[0].detach()
        return x, -self(x, context)[1]


def against_finite_differences(bijection: Bijection, y: Tensor, context: Tensor | None, *, twice: bool = False) -> bool:
    """First (and second) derivatives by y, context and weights; gradcheck's tolerances are those of differences."""
    inverse = Inverse(bijection)
    names = [name for name, _ in inverse.named_parameters()]
    leaves = [t.detach().clone().requires_grad_() for t in (y, *inverse.parameters())]
    if context is not None:
        leaves.append(context.detach().clone().requires_grad_())

    def function(y: Tensor, *rest: Tensor) -> Any:
        given = None if context is None else rest[-1]
        return functional_call(inverse, dict(zip(names, rest, strict=False)), (y, given))

    check = torch.autograd.gradgradcheck if twice else torch.autograd.gradcheck
    return bool(check(function, leaves, raise_exception=False, atol=1e-6, rtol=1e-4))


SMALL: dict[str, Callable[[], Bijection]] = {
    "generic": lambda: Sinh(2, C),
    "Sylvester": lambda: Sylvester(3, 2, C),
    "BNAF": lambda: BlockAutoregressive(2, (2, 2), C),
}


def build_small(name: str) -> Bijection:
    torch.manual_seed(1)
    bijection = SMALL[name]().double()
    randomise(bijection, 0.5)
    return bijection


@pytest.mark.parametrize("name", SMALL)
def test_implicit_gradients_are_those_of_finite_differences(name: str) -> None:
    bijection = build_small(name)
    y, context = inputs(bijection, rows=1)
    assert against_finite_differences(bijection, y, context)


@pytest.mark.parametrize("name", SMALL)
def test_second_derivatives_are_those_of_finite_differences(name: str) -> None:
    bijection = build_small(name)
    y, context = inputs(bijection, rows=1)
    assert against_finite_differences(bijection, y, context, twice=True)


@pytest.mark.parametrize("wrong", [lambda: Forgetful(2, (3,), C), lambda: Detached(2, 2, C)])
def test_partial_derivatives_are_seen(wrong: Callable[[], Bijection]) -> None:
    torch.manual_seed(1)
    bijection = wrong().double()
    randomise(bijection, 0.5)
    y, context = inputs(bijection, rows=2)
    assert not against_finite_differences(bijection, y, context)


@pytest.mark.parametrize("name", ["Sylvester", "Sylvester, rank 2", "BNAF", "BNAF, one layer"])
def test_implicit_gradients_are_those_of_an_unrolled_iteration(name: str) -> None:
    """x ← x − (f(x) − y)/s, 500 steps kept by autograd; it contracts as the slopes are between 0 and 2 s."""
    bijection = build(name, 0.4)
    y, context = inputs(bijection, rows=3)
    step = 1 / float(torch.linalg.matrix_norm(jacobians(bijection, y, context), 2).max().detach().clamp(min=1))
    parts = [y.requires_grad_(), *bijection.parameters()]
    x = torch.zeros_like(y)
    for _ in range(500):
        x = x - step * (bijection(x, context)[0] - y)
    expected = x, -bijection(x, context)[1]
    found = bijection.inverse(y, context)
    weights = [torch.randn_like(value) for value in found]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-11)
    gradients = [
        torch.autograd.grad(sum((v * w).sum() for v, w in zip(pair, weights, strict=True)), parts)
        for pair in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-9, rtol=1e-9)


# ----------------------------------------------------------------------------- what every transform inverted so must do


@pytest.mark.parametrize("name", CASES)
def test_log_determinants_are_those_of_autograd_both_ways_after_every_weight_change(name: str) -> None:
    bijection = build(name)
    x, context = inputs(bijection)
    for spread in SPREADS:  # one object, one tensor throughout: an answer remembered from before would be wrong
        randomise(bijection, spread)
        assert jacobian_gap(bijection, x, context) < 1, f"forward, spread {spread}"
        assert jacobian_gap(Inverse(bijection), x, context) < 1, f"inverse, spread {spread}"


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize("name", CASES)
def test_inverse_undoes_forward_in_both_precisions(name: str, dtype: torch.dtype) -> None:
    for seed, spread in enumerate(SPREADS):
        bijection = build(name, spread, seed, dtype)
        x, context = inputs(bijection, dtype, rows=50)
        assert round_trip_gap(bijection, x, context) < 1, f"spread {spread}"
        y, ladj = bijection(x, context)
        back, back_ladj = bijection.inverse(y, context)
        assert back.dtype == back_ladj.dtype == dtype
        if spread <= 0.5:
            assert torch.allclose(back_ladj, -ladj, atol=1e4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", CASES)
def test_the_jacobian_is_triangular_where_the_code_says_so(name: str) -> None:
    bijection = build(name, 1.0)
    x, context = inputs(bijection)
    if isinstance(bijection, Triangular):
        found = triangular_jacobian(lambda v: bijection(v, context)[0], x)
        assert torch.allclose(found, jacobians(bijection, x, context), atol=1e-13)
        assert torch.equal(found.triu(1), torch.zeros_like(found))
        assert (found.diagonal(dim1=-2, dim2=-1) > 0).all()
        assert torch.allclose(bijection.value(x, context), bijection(x, context)[0], atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_vmap_over_rows_and_over_weights_and_leading_dimensions(name: str) -> None:
    bijection = build(name, 0.5)
    x, context = inputs(bijection)
    axes = 0, None if context is None else 0
    for direction in (bijection, Inverse(bijection)):
        together = direction(x, context)
        for one, many in zip(vmap(direction, axes)(x, context), together, strict=True):
            assert torch.allclose(one, many, atol=1e-12, rtol=1e-10)
        spread = direction(x.expand(2, 1, *x.shape), context)
        for one, many in zip(spread, together, strict=True):
            assert torch.allclose(one[1, 0], many, atol=1e-12, rtol=1e-10)
        weights = {k: torch.stack([p, 0.5 * p]) for k, p in direction.named_parameters()}

        def under(drawn: dict[str, Tensor], flow: Bijection = direction) -> Any:
            return functional_call(flow, drawn, (x, context))

        def total(drawn: dict[str, Tensor], flow: Bijection = direction) -> Tensor:
            y, ladj = functional_call(flow, drawn, (x, context))
            return (y.square().sum() + ladj.sum()) / 2

        y, ladj = vmap(under)(weights)
        slopes = vmap(torch.func.grad(total))(weights)
        for i in range(2):
            drawn = {k: w[i] for k, w in weights.items()}
            expected = under(drawn)
            assert torch.allclose(y[i], expected[0], atol=1e-12, rtol=1e-10)
            assert torch.allclose(ladj[i], expected[1], atol=1e-12, rtol=1e-10)
            for key, slope in torch.func.grad(total)(drawn).items():
                assert torch.allclose(slopes[key][i], slope, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("generic", "BNAF")), "Sylvester"])
def test_copies_and_traces_give_what_eager_gives(name: str) -> None:
    bijection = build_small(name)
    x, context = inputs(bijection)
    expected = bijection(x, context), bijection.inverse(x, context)
    copied = copy.deepcopy(bijection)
    for direction, pair in zip((bijection, Inverse(copied)), expected, strict=True):
        traced = make_fx(direction)(x, context)
        for a, b in zip(traced(x, context), pair, strict=True):
            assert torch.equal(a, b)
        other = torch.randn_like(x) * 4
        for a, b in zip(traced(other, context), direction(other, context), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Sylvester", "BNAF"])
def test_dynamo_takes_it_whole(name: str) -> None:
    bijection = build_small(name)
    x, context = inputs(bijection)
    for direction in (bijection, Inverse(bijection)):
        compiled = torch.compile(direction, backend="eager", fullgraph=True, dynamic=False)
        for a, b in zip(compiled(x, context), direction(x, context), strict=True):
            assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_everything_stays_on_the_device_of_weights_and_data(name: str) -> None:
    bijection = build(name).to("meta")
    x, context = (None if t is None else t.to("meta") for t in inputs(bijection))
    assert x is not None
    with OneDevice():
        values = *bijection(x, context), *bijection.inverse(x, context)
        for value in values:
            assert value.device.type == "meta"
            assert value.dtype == torch.double
        torch.stack([value.sum() for value in values]).sum().backward()


@pytest.mark.parametrize("name", [name for name in CASES if "generic" not in name])  # sinh(1e3) is not a number
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_extreme_inputs_have_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    for spread in (None, 0.1, 1.0):
        bijection = build(name, spread, dtype=dtype)
        for size in (1e-12, 1e3, 1e6, 1e12):
            x, context = inputs(bijection, dtype)
            x = (x.sign() * size).requires_grad_()
            for direction in (bijection, Inverse(bijection)):
                y, ladj = direction(x, context)
                parts = [x, *direction.parameters()]
                loss = (y / max(size, 1.0)).sum() + ladj.sum()  # the mean square, say, of data in other units
                gradients = torch.autograd.grad(loss, parts, allow_unused=True, materialize_grads=True)
                for value in (y, ladj, *gradients):
                    assert torch.isfinite(value).all(), f"{name}, {size}, spread {spread}"
            assert round_trip_gap(bijection, x.detach(), context) < 1


@pytest.mark.parametrize("name", CASES)
def test_inputs_that_do_not_fit_are_named(name: str) -> None:
    bijection = build(name)
    x, context = inputs(bijection)
    for direction in (bijection, Inverse(bijection)):
        with pytest.raises(ValueError, match=f"takes vectors of {bijection.features} features"):
            direction(torch.randn(3, 9), context)
        if bijection.context_features:
            with pytest.raises(ValueError, match="pass a context"):
                direction(x)
