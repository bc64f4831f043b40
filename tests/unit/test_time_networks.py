"""Networks of a noisy datum and its level: shapes, smoothness, torch.func, devices, and what their gates buy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gen import datasets
from pyro_gen.distributions.noise import make_schedule
from pyro_gen.nn.time import LevelFeatures, LevelGate, TimeMLP
from pyro_gen.nn.unet import ConvTime
from pyro_gen.testing.losses import OneDevice

CONTEXT = 3
Case = tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]  # network, shape of y, shape of the result
CASES: dict[str, Case] = {
    "vector": (lambda: TimeMLP(2, 2, (16, 12), context_features=CONTEXT, waves=2), (2,), (2,)),
    "vector, no waves": (lambda: TimeMLP(6, 6, (16,), context_features=CONTEXT, linear=(1, 0)), (6,), (6,)),
    "vector, two answers": (lambda: TimeMLP(2, 4, (16,), context_features=CONTEXT, waves=1), (2,), (4,)),
    "vector, ungated": (lambda: TimeMLP(3, 1, (16,), context_features=CONTEXT, gated=False), (3,), (1,)),
    "image": (lambda: ConvTime((1, 8, 8), context_features=CONTEXT), (1, 8, 8), (1, 8, 8)),
    "odd image": (
        lambda: ConvTime((3, 5, 7), 2, (12, 20), context_features=CONTEXT, linear=(0, 1)),
        (3, 5, 7),
        (6, 5, 7),
    ),
    "tiny image": (lambda: ConvTime((2, 2, 2), 1, (8, 8), context_features=CONTEXT), (2, 2, 2), (2, 2, 2)),
    "flat image": (
        lambda: ConvTime((1, 2, 9), 1, (8, 16), context_features=CONTEXT, gated=False),
        (1, 2, 9),
        (1, 2, 9),
    ),
}
ROWS = 4


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor], tuple[int, ...]]:
    build, shape, result = CASES[request.param]
    torch.manual_seed(0)
    net = build().double()
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64)
    level = torch.tensor([-6.0, -1.0, 0.5, 4.0], dtype=torch.float64)
    return net, (y, level, torch.randn(ROWS, CONTEXT, generator=generator, dtype=torch.float64)), result


Given = tuple[nn.Module, tuple[Tensor, Tensor, Tensor], tuple[int, ...]]


def test_shapes_and_leading_dimensions(case: Given) -> None:
    net, batch, result = case
    out = net(*batch)
    assert out.shape == (ROWS, *result)
    assert out.dtype == torch.float64
    folded = net(*(part.reshape(2, 2, *part.shape[1:]) for part in batch))
    torch.testing.assert_close(folded.reshape(out.shape), out, rtol=1e-12, atol=1e-12)
    assert net.float()(*(part.float() for part in batch)).dtype == torch.float32


def test_rows_do_not_mix(case: Given) -> None:
    net, batch, _ = case
    alone = torch.cat([net(*(part[i : i + 1] for part in batch)) for i in range(ROWS)])
    torch.testing.assert_close(alone, net(*batch), rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_parameter(case: Given) -> None:
    net, batch, _ = case
    net(*batch).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


def test_level_and_context_change_the_answer(case: Given) -> None:
    net, (y, level, context), _ = case
    out = net(y, level, context)
    for other in (net(y, level + 0.1, context), net(y, level, context + 0.1)):
        assert ((other - out).flatten(1).abs().max(1).values > 1e-6).all()


def test_func_transforms_agree(case: Given) -> None:
    """vmap over rows, jvp, jacrev; the directional derivative is the Jacobian's and that of finite differences."""
    net, (y, level, context), _ = case
    out = net(y, level, context)
    torch.testing.assert_close(torch.func.vmap(net)(y, level, context), out, rtol=1e-10, atol=1e-12)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    value, slope = torch.func.jvp(lambda at: net(at, level, context), (y,), (towards,))
    torch.testing.assert_close(value, out, rtol=1e-12, atol=1e-12)
    jacobian = torch.func.vmap(torch.func.jacrev(net))(y, level, context).reshape(ROWS, out[0].numel(), y[0].numel())
    by_rows = (jacobian @ towards.flatten(1).unsqueeze(-1)).reshape(out.shape)
    torch.testing.assert_close(slope, by_rows, rtol=1e-9, atol=1e-10)
    h = 1e-5  # central differences: an error of h² beside rounding of 1e-16 / h
    finite = (net(y + h * towards, level, context) - net(y - h * towards, level, context)) / (2 * h)
    assert (finite - slope).abs().max() < 1e-6 * (1 + slope.abs().max())


def test_second_derivatives(case: Given) -> None:
    """In y and in the level: a score model is trained through derivatives of it."""
    net, (y, level, context), _ = case
    y, level = y[:2].requires_grad_(), level[1:3].requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda a, b: net(a, b, context[:2]).flatten()[::5].sin().sum(), (y, level), fast_mode=True
    )


def test_traces(case: Given) -> None:
    net, batch, _ = case
    weights = dict(net.named_parameters())

    def loss(weights: dict[str, Tensor], *batch: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(net, weights, batch)
        return result.square().sum()

    step = torch.func.grad_and_value(loss)
    traced = make_fx(step)(weights, *batch)
    other = tuple(part + 0.1 for part in batch)
    got, want = traced(weights, *other), step(weights, *other)
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=0.0)
    for name in weights:
        torch.testing.assert_close(got[0][name], want[0][name], rtol=1e-9, atol=1e-10)


def test_one_device(case: Given) -> None:
    net, batch, result = case
    net = net.to("meta")
    with OneDevice():
        assert net(*(part.to("meta") for part in batch)).shape == (ROWS, *result)


def test_no_context() -> None:
    assert TimeMLP(2, 2, (8,))(torch.zeros(3, 2), torch.zeros(3)).shape == (3, 2)
    assert ConvTime((1, 4, 4), 1, (8, 8))(torch.zeros(3, 1, 4, 4), torch.zeros(3)).shape == (3, 1, 4, 4)


def test_levels_far_out_stay_finite() -> None:
    level = torch.tensor([-30.0, -15.0, 15.0, 30.0])
    assert torch.isfinite(TimeMLP(2, 2, (8,), waves=3, linear=(1, -1))(torch.randn(4, 2), level)).all()
    features = LevelFeatures()(torch.linspace(-15, 15, 61))
    assert (features[:, 0].diff() > 0).all()  # the slowest tells all levels apart


def test_the_gate_has_the_ends_of_normal_data() -> None:
    """For standard normal data F is a multiple of y at every level: what is left to the network is 0."""
    schedule = make_schedule("cosine")
    t = torch.linspace(0.01, 0.99, 30, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t).unsqueeze(-1), schedule.sigma(t).unsqueeze(-1)
    level = -schedule.log_snr(t) / 2
    y = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nothing = torch.zeros_like(y)
    for linear, exact in (((1.0, 0.0), sigma * y), ((0.0, 1.0), alpha * y), ((1.0, -1.0), (sigma - alpha) * y)):
        torch.testing.assert_close(LevelGate(linear)(nothing, y, level), exact, rtol=1e-12, atol=1e-14)
    shut = LevelGate()(torch.ones_like(y), y, torch.full((30,), -7.0, dtype=torch.float64))
    assert (shut < 0.05).all()
    second = torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(LevelGate((1.0, 0.0))(second, y, level)[:, 2:], second[:, 2:])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TimeMLP(4, 2), "gated=True needs an output for each of 4 features, got outputs=2"),
        (lambda: TimeMLP(2, 2, ()), "hidden must have one size at least"),
        (lambda: TimeMLP(2, 2, (8, 0)), "hidden must be an int of at least 1, got 0"),
        (lambda: TimeMLP(2, 2, frequencies=0), "frequencies must be an int of at least 1, got 0"),
        (lambda: ConvTime((8, 8)), "event_shape must be"),
        (lambda: ConvTime((1, 1, 8)), "2 pixels high and wide at least, got"),
        (lambda: ConvTime((1, 8, 8), channels=(8, 8, 8)), "channels must be two counts"),  # type: ignore[arg-type]
        (lambda: ConvTime((1, 8, 8), channels=(8, 0)), "channels must be an int of at least 1"),
        (lambda: ConvTime((1, 8, 8), 0), "outputs_per_channel must be an int of at least 1"),
    ],
)
def test_bad_input(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# --------------------------------------------------------------------------------------------- a fit against the truth
def exact_noise(y: Tensor, alpha: Tensor, sigma: Tensor, means: Tensor, scale: float) -> Tensor:
    """E[ε | y] for a mixture of equal Gaussians: each component's is σ (y − α m) / (α² s² + σ²)."""
    variance = (alpha * scale).square() + sigma.square()
    apart = y.unsqueeze(1) - alpha.unsqueeze(1) * means
    shares = torch.softmax(-apart.square().sum(-1) / (2 * variance), -1)
    return (shares.unsqueeze(-1) * apart).sum(1) * sigma / variance


def path_divergence(net: nn.Module, steps: int) -> float:
    """½ ∫ E|ε̂ − E[ε | y]|² dλ in nats, after so many steps on eight Gaussians: what the denoiser adds to the bound."""
    toy, schedule = datasets.eight_gaussians(), make_schedule("cosine")
    x = toy.sample(20000, seed=1)
    unit = float(x.std())
    x, means, scale = x / unit, toy.means.float() / unit, math.sqrt(0.1) / unit
    first, last = schedule.ends
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)

    def noised(u: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = schedule.alpha(t).unsqueeze(-1), schedule.sigma(t).unsqueeze(-1)
        return alpha, sigma, alpha * u + sigma * eps

    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        u = x[torch.randint(len(x), (256,), generator=generator)]
        eps = torch.randn(u.shape, generator=generator)
        t = first + (last - first) * (torch.arange(256) + torch.rand((), generator=generator)) / 256
        *_, y = noised(u, t, eps)
        loss = (net(y, -schedule.log_snr(t) / 2) - eps).square().sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        u = toy.sample(20000, seed=2) / unit
        t = first + (last - first) * (torch.arange(20000) + 0.5) / 20000
        alpha, sigma, y = noised(u, t, torch.randn(u.shape, generator=generator))
        gap = net(y, -schedule.log_snr(t) / 2) - exact_noise(y, alpha, sigma, means, scale)
        return float((gap.square().sum(-1) * -schedule.log_snr_rate(t)).mean() / 2 * (last - first))


@pytest.mark.slow
def test_the_gate_and_the_waves_pay() -> None:
    """At equal steps what is known of the ends leaves less than half of the divergence, and the waves less again."""
    found = {}
    for name, options in (
        ("default", {"waves": 3, "linear": (1.0, 0.0)}),
        ("ungated", {"waves": 3, "gated": False}),
        ("no waves", {"waves": 0, "linear": (1.0, 0.0)}),
    ):
        torch.manual_seed(0)
        found[name] = path_divergence(TimeMLP(2, 2, (32, 32), **options), 400)
    assert found["default"] < 0.5 * found["ungated"], found
    assert found["default"] < found["no waves"], found
