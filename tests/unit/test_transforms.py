"""Bijections: both log-determinants against autograd, round trips, extreme inputs, density, tracing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jacobians import jacobian_gap, jacobians, worst
from torch import Tensor
from torch.func import functional_call, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from pyro_gen.testing.losses import OneDevice
from pyro_gen.transforms import (
    ActNorm,
    Affine,
    Bijection,
    CircularSpline,
    Compose,
    Coupling,
    Elementwise,
    Flip,
    Inverse,
    LUMixing,
    MaskedAutoregressive,
    Permute,
    Rotation,
    Shift,
    Spline,
)
from pyro_gen.transforms.spline import _Box

D, C, ROWS = 4, 2, 5

CASES: dict[str, Callable[[], Bijection]] = {
    "NICE": lambda: Coupling(Shift(), D, (7,), C),
    "RealNVP": lambda: Coupling(Affine(), D, (7, 6), C, swap=True),
    "NSF coupling": lambda: Coupling(Spline(5), D, (7, 6), C),
    "NSF coupling, odd": lambda: Coupling(Spline(5), D - 1, (7,), C, swap=True),
    "circular coupling": lambda: Coupling(CircularSpline(5), D, (7,), C),
    "MAF": lambda: MaskedAutoregressive(Affine(), D, (7, 6), C),
    "IAF": lambda: MaskedAutoregressive(Affine(), D, (7, 6), C, direction="sampling"),
    "MAF, no context": lambda: MaskedAutoregressive(Affine(), D, (9,)),
    "MAF, linear": lambda: MaskedAutoregressive(Affine(), D, (), C),
    "MAF, one feature": lambda: MaskedAutoregressive(Affine(), 1, (5,), C),
    "NSF": lambda: MaskedAutoregressive(Spline(5), D, (7, 6), C),
    "NSF, sampling, 3 hidden": lambda: MaskedAutoregressive(Spline(5), D, (3, 7, 6), direction="sampling"),
    "circular": lambda: MaskedAutoregressive(CircularSpline(5), D, (7, 6), C),
    "elementwise affine": lambda: Elementwise(Affine(), D),
    "elementwise spline": lambda: Elementwise(Spline(), D),
    "ActNorm": lambda: ActNorm(D),
    "LU": lambda: LUMixing(D, Permute([2, 0, 3, 1])),
    "rotation": lambda: Rotation(D),
    "permutation": lambda: Permute.random(D, seed=3),
    "flip": lambda: Flip(D),
    "composition": lambda: Compose(
        [
            ActNorm(D),
            Coupling(Spline(4), D, (6,), C),
            LUMixing(D),
            Flip(D),
            Inverse(MaskedAutoregressive(Affine(), D, (6,), C)),
        ]
    ),
}
SPREADS = [0.01, 0.1, 0.5, 1.0, 2.0]


def build(name: str, spread: float | None = None, seed: int = 0, dtype: torch.dtype = torch.double) -> Bijection:
    torch.manual_seed(seed)
    bijection = CASES[name]().to(dtype)
    if spread is not None:
        randomise(bijection, spread)
    return bijection


@torch.no_grad()
def randomise(bijection: Bijection, spread: float) -> None:
    for parameter in bijection.parameters():
        parameter.normal_(0, spread)  # in place: what a transform remembered would now be stale


def inputs(bijection: Bijection, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, bijection.features, dtype=dtype)
    if isinstance(getattr(bijection, "transformer", None), CircularSpline):
        x = torch.atan2(x.sin(), x.cos())  # angles come back from a round trip in (-π, π)
    return x, torch.randn(ROWS, C, dtype=dtype)


def pick(bijection: Bijection, context: Tensor) -> Tensor | None:
    return context if bijection.context_features else None


@pytest.mark.parametrize("name", CASES)
def test_log_determinants_are_those_of_autograd_both_ways_after_every_weight_change(name: str) -> None:
    bijection = build(name)
    x, context = inputs(bijection)
    given = pick(bijection, context)
    for spread in SPREADS:  # one object, one tensor throughout: an answer remembered from before would be wrong
        randomise(bijection, spread)
        assert jacobian_gap(bijection, x, given) < 1, f"forward, spread {spread}"
        assert jacobian_gap(Inverse(bijection), x, given) < 1, f"inverse, spread {spread}"


class Remembering(Coupling):
    """A transform that looks its answer up by the identity of the tensor."""

    last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.last is None or self.last[0] is not x:
            self.last = x, super().forward(x, context)
        return self.last[1]


def test_an_answer_remembered_across_a_weight_change_is_seen() -> None:
    torch.manual_seed(0)
    bijection = Remembering(Affine(), D, (7,)).double()
    x, _ = inputs(bijection)
    assert jacobian_gap(bijection, x, None) < 1
    bijection(x)
    randomise(bijection, 0.1)
    assert jacobian_gap(bijection, x, None) > 1e6


class OneTermTooMany(Spline):
    """A spline whose log-derivative is off by a per cent of a parameter."""

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = super().forward(x, params)
        return y, ladj + 0.01 * (x.abs() < self.bound) * params[..., 0].abs()


class PublishedSylvester(Bijection):
    """The log-determinant Pyro 1.9.2 gives its Sylvester flow: right only while the weights are tiny."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.r = torch.nn.Parameter(torch.randn(features, features))
        self.s = torch.nn.Parameter(torch.randn(features, features))
        self.v = torch.nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q = torch.eye(self.features, dtype=x.dtype) - 2 * torch.outer(self.v, self.v) / (self.v @ self.v)
        r, s = self.r.triu(), self.s.triu()
        h = torch.tanh(x @ s @ q.mT)
        ladj = (1 + (1 - h * h) * r.diagonal() * s.diagonal()).abs().log().sum(-1)
        return x + h @ q @ r, ladj


@pytest.mark.parametrize("wrong", [lambda: Elementwise(OneTermTooMany(), D), lambda: PublishedSylvester(D)])
def test_wrong_log_determinants_are_seen(wrong: Callable[[], Bijection]) -> None:
    torch.manual_seed(0)
    bijection = wrong().double()
    randomise(bijection, 0.1)
    x, _ = inputs(bijection)
    assert jacobian_gap(bijection, x, None) > 1e6


@pytest.mark.parametrize("name", CASES)
def test_inverse_undoes_forward(name: str) -> None:
    """|x' − x| ≤ ‖J⁻¹‖ · (rounding of y and of what y is the sum of), with 10⁴ ε for the latter."""
    for seed, spread in enumerate(SPREADS):
        bijection = build(name, spread, seed)
        x, context = inputs(bijection)
        given = pick(bijection, context)
        y, ladj = bijection(x, given)
        back, back_ladj = bijection.inverse(y, given)
        stretch = torch.linalg.matrix_norm(jacobians(Inverse(bijection), y, given), 2).clamp(min=1)
        allowed = 1e4 * torch.finfo(x.dtype).eps * stretch * (1 + y.abs().amax(-1) + x.abs().amax(-1))
        assert worst(back, x, allowed.unsqueeze(-1)) < 1, f"spread {spread}"
        if spread <= 0.5:
            assert torch.allclose(back, x, atol=1e-9, rtol=1e-9)
            assert torch.allclose(back_ladj, -ladj, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_vmap_over_rows_and_over_weights(name: str) -> None:
    bijection = build(name, 0.5)
    x, context = inputs(bijection)
    given = pick(bijection, context)
    axes = 0, None if given is None else 0
    for direction in (bijection, Inverse(bijection)):
        together = direction(x, given)
        for one, many in zip(vmap(direction, axes)(x, given), together, strict=True):
            assert torch.allclose(one, many, atol=1e-12, rtol=1e-10)
        weights = {k: torch.stack([p, 0.5 * p]) for k, p in direction.named_parameters()}
        if weights:

            def under(drawn: dict[str, Tensor], flow: Bijection = direction) -> Any:
                return functional_call(flow, drawn, (x, given))

            y, ladj = vmap(under)(weights)
            for i in range(2):
                expected = under({k: w[i] for k, w in weights.items()})
                assert torch.allclose(y[i], expected[0], atol=1e-12, rtol=1e-10)
                assert torch.allclose(ladj[i], expected[1], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_copies_and_traces_give_what_eager_gives(name: str) -> None:
    bijection = build(name, 0.5)
    x, context = inputs(bijection)
    given = pick(bijection, context)
    expected = bijection(x, given), bijection.inverse(x, given)
    copied = copy.deepcopy(bijection)
    for direction, pair in zip((bijection, Inverse(copied)), expected, strict=True):
        traced = make_fx(direction)(x, given)
        for a, b in zip(traced(x, given), pair, strict=True):
            assert torch.equal(a, b)
        other = torch.randn_like(x) * 4
        for a, b in zip(traced(other, given), direction(other, given), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["NSF", "RealNVP", "LU"])
def test_dynamo_takes_it_whole(name: str) -> None:
    bijection = build(name, 0.5)
    x, context = inputs(bijection)
    given = pick(bijection, context)
    for direction in (bijection, Inverse(bijection)):
        compiled = torch.compile(direction, backend="eager", fullgraph=True, dynamic=False)
        for a, b in zip(compiled(x, given), direction(x, given), strict=True):
            assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_everything_stays_on_the_device_of_weights_and_data(name: str) -> None:
    bijection = build(name).to("meta")
    x, context = (t.to("meta") for t in inputs(bijection))
    with OneDevice():
        values = *bijection(x, context), *bijection.inverse(x, context)
        for value in values:
            assert value.device.type == "meta"
            assert value.dtype == torch.double
        if any(value.requires_grad for value in values):
            torch.stack([value.sum() for value in values]).sum().backward()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_extreme_inputs_have_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    for spread in (None, 0.1):
        bijection = build(name, spread, dtype=dtype)
        for size in (1e-12, 4.0, 1e3, 1e6, 1e12):
            x, context = inputs(bijection, dtype)
            x = (x.sign() * size).requires_grad_()
            for direction in (bijection, Inverse(bijection)):
                y, ladj = direction(x, pick(bijection, context))
                scale = 1.0 / max(size, 1.0)  # the gradient of the mean square, say, of data in other units
                parts = [x, *direction.parameters()]
                gradients = torch.autograd.grad(
                    (y * scale).sum() + ladj.sum(), parts, allow_unused=True, materialize_grads=True
                )
                for value in (y, ladj, *gradients):
                    assert torch.isfinite(value).all(), f"{name}, {size}, spread {spread}"


def test_a_where_without_the_clamp_has_nan_gradients() -> None:
    """What the extreme inputs are there to find: the same spline, its tails put in afterwards only."""

    class Late(Spline):
        def _clamp(self, v: Tensor) -> tuple[Tensor, Tensor]:
            return v, v.abs() <= self.bound

    params = torch.linspace(-1, 1, 23)
    for spline, right in ((Late(), False), (Spline(), True)):
        x = torch.tensor([1e30, -1e30], requires_grad=True)
        y, ladj = spline.forward(x, params)
        gradient = torch.autograd.grad(y.sum() + ladj.sum(), x)[0]
        assert bool(gradient.isnan().all()) is not right
        assert torch.equal(gradient, torch.ones(2)) is right


@pytest.mark.parametrize("seed", range(4))
def test_spline_round_trip_in_single_precision(seed: int) -> None:
    """As layers start within 1e-5; at any spread the loss is rounding of y and of the knots over the slope, no more."""
    torch.manual_seed(seed)
    spline = Spline(8, bound=3.0)
    x = torch.randn(20000, 16)
    start = MaskedAutoregressive(spline, 16).net(x).detach()
    for spread, params in ((0.0, start), *((s, s * torch.randn(16, spline.params)) for s in (1.0, 4.0, 10.0))):
        y, ladj = spline.forward(x, params)
        back, back_ladj = spline.inverse(y, params)
        if spread == 0:
            assert (back - x).abs().max() <= 1e-5
        slope = ladj.exp().clamp(max=1.0)
        allowed = 16 * torch.finfo(torch.float).eps * spline.bound / slope
        assert worst(back, x, allowed) < 1
        assert torch.isfinite(back_ladj).all()


class Textbook(Spline):
    """The same curve inverted by the quadratic formula as published, in which terms of two signs cancel."""

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        clamped, inside = self._clamp(y)
        box = _Box(clamped, params, self.bins, self.bound, circular=False, on_y=True)
        t, bend = clamped - box.bottom, box.slope + box.next_slope - 2 * box.mean
        a = box.height * (box.mean - box.slope) + t * bend
        b = box.height * box.slope - t * bend
        c = -box.mean * t
        z = 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())
        return torch.where(inside, box.left + z * box.width, y), torch.zeros_like(y)


def test_cancellation_in_the_inverse_is_seen_and_the_two_formulas_agree() -> None:
    torch.manual_seed(0)
    x, params = torch.randn(20000, 16), 4 * torch.randn(16, 23)
    spline = Textbook(8, bound=3.0)
    y, ladj = spline.forward(x, params)
    allowed = 16 * torch.finfo(torch.float).eps * spline.bound / ladj.exp().clamp(max=1.0)
    assert worst(spline.inverse(y, params)[0], x, allowed) > 1
    y, params = y.double(), params.double()
    assert torch.allclose(spline.inverse(y, params)[0], Spline(8, bound=3.0).inverse(y, params)[0], atol=1e-8)


def test_spline_is_smooth_at_its_knots_and_is_the_identity_at_zero() -> None:
    torch.manual_seed(0)
    for spline, end in ((Spline(6, 2.5), 2.5), (CircularSpline(6), math.pi)):
        x = torch.linspace(-end + 1e-3, end - 1e-3, 101, dtype=torch.double)
        y, ladj = spline.forward(x, torch.zeros(spline.params, dtype=torch.double))
        assert torch.allclose(y, x, atol=1e-12)
        assert torch.allclose(ladj, torch.zeros_like(x), atol=1e-12)
        params = torch.randn(spline.params, dtype=torch.double)
        ends = torch.tensor([-end, end], dtype=torch.double)
        inner = ends * (1 - 1e-9)
        outer = -inner if isinstance(spline, CircularSpline) else ends * (1 + 1e-9)
        assert torch.allclose(spline.forward(inner, params)[1], spline.forward(outer, params)[1], atol=1e-6)


def test_circular_spline_keeps_the_circle_and_turns_it() -> None:
    torch.manual_seed(0)
    spline = CircularSpline(5)
    params = torch.randn(spline.params, dtype=torch.double)
    x = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.double)
    y, ladj = spline.forward(x, params)
    assert y.abs().max() <= math.pi
    assert abs(float(torch.trapezoid(ladj.exp(), x)) - 2 * math.pi) < 1e-4  # the image covers the circle once
    assert torch.allclose(y.cos(), spline.forward(x + 2 * math.pi, params)[0].cos(), atol=1e-9)
    params[-1] += 0.3
    turned, _ = spline.forward(x, params)
    assert torch.allclose((turned - y).sin(), torch.full_like(x, math.sin(0.3)), atol=1e-9)


def naive_inverse(layer: MaskedAutoregressive, y: Tensor, context: Tensor | None, passes: int | None = None) -> Tensor:
    """D passes of the whole network, each of which gets one more feature right."""
    x = torch.zeros_like(y)
    for _ in range(passes or layer.features):
        params = layer.net(layer.transformer.embed(x).flatten(-2), context)
        x, _ = layer.transformer.inverse(y, params)
    return x


AUTOREGRESSIVE = [name for name in CASES if "MAF" in name or name in ("NSF", "circular")]


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float, 1e-5), (torch.double, 1e-12)])
def test_incremental_inverse_is_the_naive_one_with_its_gradients(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    layer = build(name, 0.3, dtype=dtype)
    assert isinstance(layer, MaskedAutoregressive)
    y, context = inputs(layer, dtype)
    given = pick(layer, context)
    direction = torch.randn_like(y)
    results = []
    for inverse in (lambda v: layer.inverse(v, given)[0], lambda v: naive_inverse(layer, v, given)):
        v = y.clone().requires_grad_()
        x = inverse(v)
        parts = [v, *layer.parameters()]
        results.append([x, *torch.autograd.grad((x * direction).sum(), parts, materialize_grads=True)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=tolerance, rtol=20 * tolerance)


def test_a_feature_not_solved_for_is_seen() -> None:
    layer = build("MAF", 1.0)
    assert isinstance(layer, MaskedAutoregressive)
    y, context = inputs(layer)
    too_few = naive_inverse(layer, y, context, passes=D - 1)
    assert not torch.allclose(layer.inverse(y, context)[0], too_few, atol=1e-5)


@pytest.mark.parametrize("context_features", [0, 3])
def test_incremental_inverse_computes_every_unit_once(context_features: int) -> None:
    """Its products are those inside the masks, so fewer than one dense pass has; the naive inverse needs D passes."""
    layer = MaskedAutoregressive(Spline(8), 16, (128, 128), context_features)
    y, context = torch.randn(10, 16), torch.randn(10, 3) if context_features else None

    def count(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return int(counter.get_total_flops())

    inside = sum(int(sub.mask.sum()) for sub in layer.net.layers) + 128 * context_features
    assert count(lambda: layer.inverse(y, context)) == 2 * 10 * inside
    once = count(lambda: layer(y, context))
    assert 2 * 10 * inside < once
    assert count(lambda: naive_inverse(layer, y, context)) == 16 * once


FLOWS_2D: dict[str, Callable[[], Bijection]] = {
    "affine coupling": lambda: Coupling(Affine(), 2, (8,)),
    "spline coupling": lambda: Coupling(Spline(5, 3.0), 2, (8,)),
    "affine autoregressive": lambda: MaskedAutoregressive(Affine(), 2, (8,)),
    "spline autoregressive": lambda: MaskedAutoregressive(Spline(5, 3.0), 2, (8,)),
}


def gauss_legendre(images: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights, three a cell; the cells end at the given points and at as many evenly spaced ones."""
    even = torch.linspace(0, 1, images.shape[-1], dtype=images.dtype)
    ends = torch.cat([images, images[..., :1] + (images[..., -1:] - images[..., :1]) * even], -1).sort(-1).values
    half = (ends[..., 1:] - ends[..., :-1]).unsqueeze(-1) / 2
    middle = (ends[..., 1:] + ends[..., :-1]).unsqueeze(-1) / 2
    places = torch.tensor([-math.sqrt(0.6), 0, math.sqrt(0.6)], dtype=images.dtype)
    shares = torch.tensor([5 / 9, 8 / 9, 5 / 9], dtype=images.dtype)
    return (middle + half * places).flatten(-2), (half * shares).flatten(-2)


@torch.no_grad()
def integral(flow: Bijection, cells: tuple[int, int]) -> float:
    """∫ N(f(x); 0, I) exp(ladj(x)) dx by quadrature over a grid that covers |f(x)| ≤ 8 on both axes.

    The flows are triangular, so on a line of constant x₀ the ends of the cells are images of an even grid, small in x
    and in f(x). Only their places enter, no log-determinant but the one under test.
    """
    first, second = (torch.linspace(-8, 8, n, dtype=torch.double) for n in cells)
    x0, weights0 = gauss_legendre(flow.inverse(torch.stack([first, torch.zeros_like(first)], -1))[0][:, 0])
    total = torch.zeros((), dtype=torch.double)
    for line, weight in zip(x0.split(100), weights0.split(100), strict=True):
        z0 = flow(torch.stack([line, torch.zeros_like(line)], -1))[0][:, 0]
        images = flow.inverse(torch.cartesian_prod(z0, second))[0][:, 1].reshape(len(line), -1)
        x1, weights1 = gauss_legendre(images)
        y, ladj = flow(torch.stack([line.unsqueeze(1).expand_as(x1), x1], -1))
        density = (ladj - 0.5 * y.square().sum(-1)).exp() / (2 * math.pi)
        total += ((density * weights1).sum(-1) * weight).sum()
    return float(total)


@pytest.mark.parametrize("name", FLOWS_2D)
@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_density_integrates_to_one(name: str, spread: float) -> None:
    torch.manual_seed(2)
    flow = FLOWS_2D[name]().double()
    randomise(flow, spread)
    fine = 160 if spread == 1 else 80
    cells = {"affine": (30, 30), "spline": (20, 300) if "coupling" in name else (fine, fine)}[name.split()[0]]
    assert abs(integral(flow, cells) - 1) <= 1e-3


def test_a_density_that_does_not_integrate_to_one_is_seen() -> None:
    torch.manual_seed(2)
    flow = Coupling(OneTermTooMany(), 2, (16,)).double()
    randomise(flow, 0.5)
    assert abs(integral(flow, (20, 300)) - 1) > 2e-3


def test_context_matters_to_every_feature() -> None:
    torch.manual_seed(0)
    layer = MaskedAutoregressive(Affine(), 3, (32,), 2).double()
    x, context = torch.randn(3, dtype=torch.double), torch.randn(2, dtype=torch.double)
    slopes = jacrev(lambda c: layer(x, c)[0])(context)
    assert bool((slopes != 0).all())
    curvature = jacrev(jacrev(lambda c: layer(x, c)[0]))(context)
    assert bool((curvature[0] != 0).any())  # the first feature too has more than a linear dependence


def test_shapes_broadcast() -> None:
    layer = build("NSF", dtype=torch.float)
    for shape, context, batch in (((D,), (C,), ()), ((3, D), (C,), (3,)), ((D,), (3, C), (3,)), ((0, D), (C,), (0,))):
        for direction in (layer, Inverse(layer)):
            y, ladj = direction(torch.randn(shape), torch.randn(context))
            assert y.shape == (*batch, D)
            assert ladj.shape == batch


def test_actnorm_starts_from_data_once_and_inside_a_composition() -> None:
    torch.manual_seed(0)
    flow = Compose([LUMixing(3), ActNorm(3), Flip(3)])
    randomise(flow, 0.5)
    x = 5 + 3 * torch.randn(7, 100, 3)
    flow.initialise(x)
    y, _ = flow(x)
    rows = y.reshape(-1, 3)
    assert torch.allclose(rows.mean(0), torch.zeros(3), atol=1e-4)
    assert torch.allclose(rows.std(0, correction=0), torch.ones(3), atol=1e-4)
    before = copy.deepcopy(flow.state_dict())
    assert torch.allclose(flow(x[0, :1])[0], y[0, :1])  # one row as in the batch: no statistics of its own
    assert all(torch.equal(before[k], v) for k, v in flow.state_dict().items())
    norm = ActNorm(2)
    norm.initialise(torch.tensor([[1.0, 2.0], [1.0, 4.0]]))  # a constant feature
    assert torch.isfinite(norm(torch.ones(1, 2))[0]).all()


def test_inverse_keeps_the_parameters_and_swaps_the_constraints() -> None:
    layer = build("circular")
    assert sum(p.numel() for p in Inverse(layer).parameters()) == sum(p.numel() for p in layer.parameters())
    assert bool(layer.domain.check(torch.zeros(D)))
    assert not bool(Inverse(layer).domain.check(torch.full((D,), 4.0)))


def test_rotation_is_orthogonal_with_determinant_one() -> None:
    rotation = build("rotation", 1.0)
    assert isinstance(rotation, Rotation)
    q = rotation.matrix()
    assert torch.allclose(q @ q.mT, torch.eye(D, dtype=torch.double), atol=1e-12)
    assert abs(float(torch.linalg.det(q.detach())) - 1) < 1e-12


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build("NSF")(torch.randn(3, D + 1).double(), torch.randn(C).double()), r"vectors of 4 features.*3, 5"),
        (lambda: build("NSF")(torch.randn(3, D).double()), "pass a context of shape"),
        (lambda: build("NSF")(torch.randn(3, D), torch.randn(3, C + 1)), "context must have shape"),
        (lambda: build("NSF")(torch.randn(3, D), torch.randn(2, C)), "do not broadcast"),
        (lambda: Coupling(Affine(), 1), "at least 2"),
        (lambda: MaskedAutoregressive(Affine(), 2, direction="fast"), "direction must be"),
        (lambda: Permute([0, 2]), "each of 0"),
        (lambda: Permute([]), "each of 0"),
        (lambda: Compose([]), "parts is empty"),
        (lambda: Compose([Flip(2), Flip(3)]), "one number of features"),
        (lambda: Compose([Coupling(Shift(), 2, (), 1), Coupling(Shift(), 2, (), 2)]), "take the same"),
        (lambda: Spline(1), "bins must be from 2"),
        (lambda: CircularSpline(501), "bins must be from 2"),
        (lambda: Spline(bound=0.0), "bound must be positive"),
        (lambda: Affine(0.0), "bound must be between"),
        (lambda: Rotation(3, 3), "must be even"),
        (lambda: LUMixing(3, Flip(2)), "must be of 3 features"),
        (lambda: ActNorm(2).initialise(torch.ones(1, 2)), "at least two rows"),
        (lambda: Flip(0), "features must be an int"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="elementwise map"):
        Coupling(Spline, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parts must be bijections"):
        Compose([torch.nn.Identity()])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="before you invert it"):
        Inverse(ActNorm(2)).initialise(torch.randn(4, 2))
    with pytest.raises(TypeError, match="must be a Bijection"):
        Inverse(Spline())  # type: ignore[arg-type]
