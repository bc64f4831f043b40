"""The continuous flow: against the matrix exponential, autograd Jacobians, quadrature and its own estimates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gen.testing.losses import OneDevice
from pyro_gen.transforms import Compose, ContinuousFlow, Flip, Inverse
from pyro_gen.transforms.continuous import EXACT_UP_TO

D, C, ROWS = 3, 2, 4


def build(spread: float | None = 0.5, seed: int = 0, features: int = D, **options: Any) -> ContinuousFlow:
    torch.manual_seed(seed)
    flow = ContinuousFlow(features, options.pop("hidden", (8, 7)), options.pop("context_features", C), **options)
    if spread is not None:
        randomise(flow, spread)
    return flow.double()


@torch.no_grad()
def randomise(flow: torch.nn.Module, spread: float) -> None:
    for parameter in flow.parameters():
        parameter.normal_(0, spread)


def inputs(features: int = D) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(ROWS, features, dtype=torch.double), torch.randn(ROWS, C, dtype=torch.double)


def jacobian_gap(flow: ContinuousFlow | Inverse, x: Tensor, context: Tensor | None) -> float:
    """Largest |ladj − log|det J||, J by backward through the solver, row by row."""
    _, ladj = flow(x, context)
    found = []
    for i in range(len(x)):
        given = None if context is None else context[i]
        found.append(torch.autograd.functional.jacobian(lambda row, c=given: flow(row, c)[0], x[i]))
    return float((ladj - torch.linalg.slogdet(torch.stack(found)).logabsdet).detach().abs().max())


@pytest.mark.parametrize("solver", ["dopri5", "dopri8", "rk4"])
def test_log_determinants_are_those_of_autograd_both_ways_after_weight_changes(solver: Any) -> None:
    """To 1e-4 at the tolerance of 1e-6; 40 steps of the fourth order are as fine."""
    flow = build(None, solver=solver, steps=40)
    x, context = inputs()
    for spread in (0.01, 0.7):
        randomise(flow, spread)
        assert jacobian_gap(flow, x, context) < 1e-4
        assert jacobian_gap(Inverse(flow), x, context) < 1e-4


class HalfTheTrace(ContinuousFlow):
    """Leaves out one of the probes of the exact trace."""

    def _field(self, z: Tensor, context: Tensor | None) -> Any:
        field, weights = super()._field(z, context)

        def other(t: Tensor | float, state: Tensor) -> Tensor:
            rate = field(t, state)
            return torch.cat([rate[..., :-1], rate[..., -1:] * (1 - 1 / self.features)], -1)

        return other, weights


def test_a_wrong_trace_is_seen() -> None:
    torch.manual_seed(0)
    flow = HalfTheTrace(D, (8, 7), C).double()
    randomise(flow, 0.5)
    assert jacobian_gap(flow, *inputs()) > 1e-2


def test_a_linear_field_has_the_matrix_exponential_as_its_flow() -> None:
    r"""dz/dt = A z: y = exp(A) x, log|det| = tr A; to 1e-5 at rtol 1e-6, some steps of local error each."""
    torch.manual_seed(0)
    flow = ContinuousFlow(4, ()).double()
    a = 0.7 * torch.randn(4, 4, dtype=torch.double)
    with torch.no_grad():
        flow.layers[0].weight.copy_(a)
        flow.layers[0].bias.zero_()
        flow.conditions[0].weight.zero_()
    x = torch.randn(10, 4, dtype=torch.double)
    for direction, sign in ((flow, 1.0), (Inverse(flow), -1.0)):
        y, ladj = direction(x)
        assert torch.allclose(y, x @ torch.linalg.matrix_exp(sign * a).mT, atol=1e-5)
        assert torch.allclose(ladj, (sign * a.trace()).expand(10), atol=1e-5)
    # And with a drift b t: y = exp(A) (x + ∫ exp(−A s) b s ds); for A = 0 it is x + b / 2.
    with torch.no_grad():
        flow.layers[0].weight.zero_()
        flow.conditions[0].weight.copy_(torch.arange(4.0).unsqueeze(-1))
    y, ladj = flow(x)
    assert torch.allclose(y, x + torch.arange(4.0) / 2, atol=1e-6)
    assert torch.equal(ladj, torch.zeros(10, dtype=torch.double))


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_density_integrates_to_one_in_two_dimensions(spread: float) -> None:
    """By the trapezoid rule, which is exact to 1e-3 once the density is smooth on the scale of the grid."""
    flow = build(spread, seed=2, features=2, hidden=(8,), context_features=0, solver="dopri5")
    flow.rtol = flow.atol = 1e-5
    points = flow.inverse(torch.randn(2000, 2, dtype=torch.double))[0].detach()
    low, high = points.amin(0), points.amax(0)
    centre, half = (low + high) / 2, (high - low)  # twice the range of 2000 draws
    n = 161
    axes = [
        torch.linspace(float(c - h), float(c + h), n, dtype=torch.double) for c, h in zip(centre, half, strict=True)
    ]
    with torch.no_grad():
        y, ladj = flow(torch.cartesian_prod(*axes))
    density = (dist.Normal(0.0, 1.0).log_prob(y).sum(-1) + ladj).exp()
    area = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
    assert abs(float(density.sum()) * area - 1) < 1e-3
    wrong = dist.Normal(0.0, 1.0).log_prob(y).sum(-1) + ladj * 0.9
    assert abs(float(wrong.exp().sum()) * area - 1) > 1e-3


def test_inverse_undoes_forward_with_context_and_leading_dimensions() -> None:
    flow = build(0.7)
    x, context = torch.randn(2, 5, D, dtype=torch.double), torch.randn(5, C, dtype=torch.double)
    y, ladj = flow(x, context)
    back, back_ladj = flow.inverse(y, context)
    assert ladj.shape == (2, 5)
    assert torch.allclose(back, x, atol=1e-4)
    assert torch.allclose(back_ladj, -ladj, atol=1e-4)
    assert not torch.allclose(flow(x, context + 1)[0], y, atol=1e-2)
    assert torch.allclose(flow(x[0, 0], context[0])[0], y[0, 0], atol=1e-4)


def test_round_trip_in_single_precision() -> None:
    """Both ways within the tolerance of 1e-6 times what the field can stretch it, e^|ladj| and steps included."""
    flow = build(0.5).float()
    x, context = (t.float() for t in inputs())
    y, ladj = flow(x, context)
    back, back_ladj = flow.inverse(y, context)
    assert y.dtype == ladj.dtype == torch.float
    assert torch.allclose(back, x, atol=1e-4)
    assert torch.allclose(back_ladj, -ladj, atol=1e-4)
    fine = flow.double()(x.double(), context.double())
    assert torch.allclose(fine[0].float(), y, atol=1e-4)
    assert torch.allclose(fine[1].float(), ladj, atol=1e-4)


def test_rows_keep_the_tolerance_in_company() -> None:
    """A thousand easy rows beside a hard one: an error norm that averages over rows would let the hard one go."""
    flow = build(1.5, seed=3, hidden=(16, 16), context_features=0, features=2)
    fine = copy.deepcopy(flow)
    fine.rtol = fine.atol = 1e-11
    torch.manual_seed(0)
    easy, hard = torch.full((1000, 2), 30.0, dtype=torch.double), torch.randn(1, 2, dtype=torch.double)
    x = torch.cat([easy, hard])
    with torch.no_grad():
        want = torch.cat([t.reshape(1, -1) for t in fine(hard)], -1)
        found = torch.cat([t[-1:].reshape(1, -1) for t in flow(x)], -1)
        assert float((found - want).abs().max()) < 1e-4


# --------------------------------------------------------------------------------------------------- Hutchinson --
class Uniform(ContinuousFlow):
    """Noise that has neither mean 0 nor variance 1."""

    def draw(self, z: Tensor) -> Tensor:
        return torch.rand(self.probes, *z.shape, dtype=z.dtype)


def deviation(make: type[ContinuousFlow], noise: Any, probes: int) -> float:
    """Distance of the mean estimate at one point from the exact value, in standard errors; 20000 draws."""
    torch.manual_seed(0)
    flow = make(4, (8, 7), C, trace="hutchinson", noise=noise, probes=probes, rtol=1e-5, atol=1e-5).double()
    randomise(flow, 0.4)
    exact = ContinuousFlow(4, (8, 7), C, trace="exact", rtol=1e-8, atol=1e-8).double()
    exact.load_state_dict(flow.state_dict())
    x, context = inputs(4)
    with torch.no_grad():
        y, want = exact(x[:1], context[:1])
        values, found = flow(x[:1].expand(20000, 4), context[:1])
    assert torch.allclose(values, y.expand_as(values), atol=1e-3)
    assert float(found.std()) > 1e-3
    return float((found.mean() - want).abs() / (found.std() / math.sqrt(20000)))


@pytest.mark.parametrize(("noise", "probes"), [("rademacher", 1), ("rademacher", 3), ("normal", 1)])
def test_the_estimate_is_unbiased(noise: str, probes: int) -> None:
    assert deviation(ContinuousFlow, noise, probes) < 4


def test_noise_of_the_wrong_covariance_is_seen() -> None:
    assert deviation(Uniform, "rademacher", 1) > 40


def test_noise_is_drawn_once_a_solve_and_from_the_global_generator() -> None:
    flow = build(0.5, trace="hutchinson", context_features=0)
    x, _ = inputs()
    torch.manual_seed(5)
    first = flow(x)[1]
    second = flow(x)[1]
    torch.manual_seed(5)
    again = flow(x)[1]
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)
    drawn: list[Tensor] = []
    original = flow.draw
    flow.draw = lambda z: drawn.append(original(z)) or drawn[-1]  # type: ignore[method-assign, func-returns-value]
    flow(x)
    assert len(drawn) == 1
    assert set(drawn[0].unique().tolist()) == {-1.0, 1.0}


def test_it_says_when_it_is_random() -> None:
    assert not ContinuousFlow(EXACT_UP_TO).stochastic
    assert ContinuousFlow(EXACT_UP_TO + 1).stochastic
    assert not ContinuousFlow(EXACT_UP_TO + 1, trace="exact").stochastic
    random = ContinuousFlow(2, trace="hutchinson")
    assert random.stochastic
    assert Inverse(Compose([Flip(2), random])).stochastic
    assert not Compose([Flip(2), ContinuousFlow(2)]).stochastic


# ---------------------------------------------------------------------------------------------------- gradients --
def loss(flow: ContinuousFlow, x: Tensor, context: Tensor | None) -> Tensor:
    y, ladj = flow(x, context)
    back, back_ladj = flow.inverse(x, context)
    return y.square().sum() + 0.7 * ladj.sum() + back.square().sum() - 0.3 * back_ladj.sum()


def gradients(flow: ContinuousFlow, weights: dict[str, Tensor], x: Tensor, context: Tensor) -> dict[str, Tensor]:
    """By every weight and both inputs, the weights put in by functional_call and gone again when backward runs."""
    weights = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return loss(self.flow, x, context)

    value = functional_call(Loss(), {f"flow.{name}": weight for name, weight in weights.items()}, (x, context))
    found = torch.autograd.grad(value, [*weights.values(), x, context])
    return dict(zip([*weights, "x", "context"], found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [False, True])
def test_gradients_under_other_weights_against_differences(adjoint: bool) -> None:
    """Central differences: error h²/6 · f''' + 1e-9 / h of the solver, 1e-4 or less at h = 1e-4."""
    flow = build(0.5, adjoint=adjoint, rtol=1e-9, atol=1e-9)
    other = build(0.4, seed=9)
    weights = dict(other.named_parameters())
    x, context = inputs()
    found = gradients(flow, weights, x, context)
    reference = build(0.4, seed=9, rtol=1e-9, atol=1e-9)
    for name, gradient in found.items():
        assert float(gradient.abs().max()) > 0
        target = {"x": x, "context": context}.get(name)
        if target is None:
            target = dict(reference.named_parameters())[name].data
        for i in (0, target.numel() - 1):
            flat = target.view(-1)
            before, values = float(flat[i]), []
            for sign in (1, -1):
                flat[i] = before + sign * 1e-4
                with torch.no_grad():
                    values.append(float(loss(reference, x, context)))
            flat[i] = before
            difference = (values[0] - values[1]) / 2e-4
            assert abs(float(gradient.reshape(-1)[i]) - difference) < 1e-4 * (1 + abs(difference)), name


def test_adjoint_gradients_are_those_of_the_solver_also_of_the_estimate() -> None:
    x, context = inputs()
    for options in ({}, {"trace": "hutchinson"}):
        found = []
        for adjoint in (False, True):
            flow = build(0.5, adjoint=adjoint, rtol=1e-9, atol=1e-9, **options)
            torch.manual_seed(3)
            found.append(gradients(flow, dict(flow.named_parameters()), x, context))
        for name, gradient in found[0].items():
            assert torch.allclose(gradient, found[1][name], atol=1e-5), name
    frozen = build(0.5, adjoint=True).requires_grad_(False)
    given = x.clone().requires_grad_()
    assert torch.isfinite(torch.autograd.grad(loss(frozen, given, context), given)[0]).all()


def test_second_derivatives_through_the_solver() -> None:
    """The score's Jacobian is symmetric, as that of a gradient, and the difference of scores."""
    flow = build(0.5, context_features=0, rtol=1e-9, atol=1e-9)
    x, _ = inputs()

    def log_p(row: Tensor) -> Tensor:
        y, ladj = flow(row)
        return ladj - y.square().sum(-1) / 2

    hessian = torch.autograd.functional.hessian(log_p, x[0])
    assert torch.allclose(hessian, hessian.mT, atol=1e-6)
    step = torch.zeros(D, dtype=torch.double)
    step[1] = 1e-4
    scores = [torch.autograd.functional.jacobian(log_p, x[0] + sign * step) for sign in (1, -1)]
    assert torch.allclose(hessian[1], (scores[0] - scores[1]) / 2e-4, atol=1e-4)


def test_every_weight_has_a_gradient_at_the_start() -> None:
    flow = build(None)
    x, context = inputs()
    loss(flow, x, context).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    y, _ = flow(x, context)
    assert float((y - x).detach().abs().max()) < 0.5  # near the identity


# ------------------------------------------------------------------------------------------------ transformations --
def test_copies_and_other_weights() -> None:
    flow = build(0.5)
    x, context = inputs()
    y, _ = flow(x, context)
    copied = copy.deepcopy(flow)
    assert torch.equal(copied(x, context)[0], y)
    other = build(0.5, seed=7)
    assert not torch.allclose(other(x, context)[0], y, atol=1e-2)
    for direction in (lambda f: f, Inverse):
        weights = dict(direction(other).named_parameters())
        under = functional_call(direction(flow), weights, (x, context))
        for a, b in zip(under, direction(other)(x, context), strict=True):
            assert torch.equal(a, b)
    composed = Compose([flow, Flip(D)])
    assert torch.allclose(composed.inverse(composed(x, context)[0], context)[0], x, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_equal_steps_vectorise_and_trace(trace: Any) -> None:
    flow = build(0.3, solver="rk4", trace=trace, steps=4)
    x, context = inputs()
    for direction in (flow, Inverse(copy.deepcopy(flow))):
        torch.manual_seed(0)
        together = direction(x, context)
        torch.manual_seed(0)
        traced = make_fx(direction)(x, context)
        torch.manual_seed(0)
        for a, b in zip(traced(x, context), together, strict=True):
            assert torch.equal(a, b)
        single = vmap(direction, randomness="different")(x, context)
        assert torch.allclose(single[0], together[0], atol=1e-12)
        if trace == "exact":
            assert torch.allclose(single[1], together[1], atol=1e-12)
            jacobian = vmap(jacrev(lambda row, c, f=direction: f(row, c)[0]))(x, context)
            assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, together[1], atol=1e-3)
            weights = {name: torch.stack([w, w / 2]) for name, w in direction.named_parameters()}
            both = vmap(lambda w, f=direction: functional_call(f, w, (x, context)))(weights)
            assert torch.allclose(both[0][0], together[0], atol=1e-12)
            assert not torch.allclose(both[0][1], together[0], atol=1e-2)
    with OneDevice():
        meta = flow.to("meta")(x.to("meta"), context.to("meta"))
        assert all(value.device.type == "meta" for value in meta)
        (meta[0].sum() + meta[1].sum()).backward()


def test_fixed_steps_converge_at_the_fourth_order() -> None:
    x, context = inputs()
    fine = build(0.7, rtol=1e-12, atol=1e-12)(x, context)
    errors = []
    for steps in (8, 16, 32):
        found = build(0.7, solver="rk4", steps=steps)(x, context)
        errors.append(max(float((a - b).detach().abs().max()) for a, b in zip(found, fine, strict=True)))
    for coarse, halved in pairwise(errors):
        assert 8 < coarse / halved < 32  # 2⁴ in the limit


# ------------------------------------------------------------------------------------------------------ bad input --
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ContinuousFlow(2, trace="none"), ValueError, "trace must be one of 'auto'"),  # type: ignore[arg-type]
        (lambda: ContinuousFlow(2, noise="uniform"), ValueError, "noise must be"),  # type: ignore[arg-type]
        (lambda: ContinuousFlow(2, solver="euler"), ValueError, "solver must be one of 'dopri5'"),  # type: ignore[arg-type]
        (lambda: ContinuousFlow(2, (0,)), ValueError, "hidden must be"),
        (lambda: ContinuousFlow(2, rtol=0.0), ValueError, "rtol must be positive"),
        (lambda: ContinuousFlow(2, probes=0), ValueError, "probes must be"),
        (lambda: ContinuousFlow(2, steps=0), ValueError, "steps must be"),
        (lambda: ContinuousFlow(2, solver="rk4", adjoint=True), ValueError, "adjoint needs"),
        (lambda: ContinuousFlow(2)(torch.zeros(3)), ValueError, "takes vectors of 2"),
        (lambda: ContinuousFlow(2, (), 1)(torch.zeros(2)), ValueError, "pass a context"),
        (lambda: ContinuousFlow(2)(torch.full((3, 2), math.nan)), ArithmeticError, "not finite"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
