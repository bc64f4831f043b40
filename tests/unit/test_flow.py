"""The flow as a program: its options, its data's units and support, and what it says of wrong input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_gen as pg
from pyro_gen.transforms import CircularSpline, Coupling, LUMixing, Spline, Standardise
from pyro_gen.transforms.stacks import TRANSFORMS

SMALL: dict[str, Any] = {"layers": 2, "hidden": (8,)}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def stirred(flow: pg.Flow, spread: float = 0.3) -> pg.Flow:
    flow = flow.double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return flow


# -------------------------------------------------------------------------------------------- Z = 1, in user's units --
def unit_square(points: int) -> tuple[Tensor, float]:
    """Midpoints of the cells of [0, 1]², and the area of a cell."""
    t = (torch.arange(points, dtype=torch.double) + 0.5) / points
    return torch.cartesian_prod(t, t), points**-2.0


def of_box(low: float, high: float) -> Callable[[int], tuple[Tensor, Tensor]]:
    def cells(points: int) -> tuple[Tensor, Tensor]:
        u, area = unit_square(points)
        return low + (high - low) * u, torch.full((len(u),), area * (high - low) ** 2, dtype=torch.double)

    return cells


def of_plane(reach: float, positive: bool) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The (positive quarter) plane as the image of a box: x = sinh(y), or e^y, with its volume element."""

    def cells(points: int) -> tuple[Tensor, Tensor]:
        u, area = unit_square(points)
        y = reach * (2 * u - 1)
        x, slope = (y.exp(), y.exp()) if positive else (y.sinh(), y.cosh())
        return x, area * (2 * reach) ** 2 * slope.prod(-1)

    return cells


def of_simplex(points: int) -> tuple[Tensor, Tensor]:
    """The triangle as the image of the square, x₁ = u, x₂ = (1 − u) v, with its volume element 1 − u."""
    t, area = unit_square(points)
    t = t.square() * (3 - 2 * t)  # nodes close to the corners, where the density has its logarithmic ends
    slope = torch.cartesian_prod(*[6 * s * (1 - s) for s in [(torch.arange(points) + 0.5).double() / points] * 2])
    u, v = t.unbind(-1)
    return torch.stack([u, (1 - u) * v, (1 - u) * (1 - v)], -1), area * slope.prod(-1) * (1 - u)


DENSITIES: dict[str, tuple[dict[str, Any], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "real": ({}, of_plane(8, False)),
    "coupling": ({"transform": "spline_coupling"}, of_plane(8, False)),
    "Student t": ({"base": "student_t"}, of_plane(14, False)),
    "mixture": ({"base": "mixture", "components": 3}, of_plane(8, False)),
    "affine": ({"transform": "affine_autoregressive"}, of_plane(10, False)),
    "Sylvester": ({"transform": "sylvester"}, of_plane(8, False)),
    "BNAF": ({"transform": "block_autoregressive"}, of_plane(10, False)),
    "rotation": ({"mixing": "rotation"}, of_plane(8, False)),
    "permutation": ({"mixing": "permutation"}, of_plane(8, False)),
    "positive": ({"support": "positive"}, of_plane(12, True)),
    "pixels": ({"support": (0.0, 17.0)}, of_box(0, 17)),
    "box": ({"support": (-2.0, 3.0), "base": "uniform"}, of_box(-2, 3)),
    "torus": ({"transform": "circular_coupling"}, of_box(-math.pi, math.pi)),
    "simplex": ({"support": "simplex"}, of_simplex),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_density_integrates_to_one_over_its_support(name: str) -> None:
    options, cells = DENSITIES[name]
    flow = stirred(pg.Flow(3 if name == "simplex" else 2, **{**SMALL, **options}))
    x, volume = cells({"coupling": 1000, "mixture": 2000}.get(name, 500))  # rougher ones
    with torch.no_grad():
        log_prob = torch.cat([flow.log_prob(rows) for rows in x.split(2**17)])
    total = float((log_prob.exp() * volume).sum())
    other = float((log_prob + math.log(1.01)).exp() @ volume)
    assert total == pytest.approx(1.0, abs=1e-3)
    assert other != pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", [n for n in DENSITIES if n != "mixture"])
def test_draws_lie_in_the_support_and_follow_the_density(name: str) -> None:
    """The mass that the density has below a cell's edge is the share of draws there."""
    options, cells = DENSITIES[name]
    flow = stirred(pg.Flow(3 if name == "simplex" else 2, **{**SMALL, **options}))
    draws = flow.sample(20_000, seed=1)
    flow.check(draws)
    x, volume = cells(500)
    with torch.no_grad():
        weight = flow.log_prob(x).exp() * volume
    for column in range(1 if name == "simplex" else 2):
        nodes = x[:, column].unique()
        above = int(torch.searchsorted(nodes, draws[:, column].median()))
        edge = (nodes[above - 1] + nodes[above]) / 2
        share, mass = float((draws[:, column] <= edge).double().mean()), float(weight[x[:, column] <= edge].sum())
        assert abs(share - mass) < 4 * math.sqrt(0.25 / len(draws)) + 1e-3
        shifted = float((draws[:, column] + 0.1 * draws[:, column].std() <= edge).double().mean())
        assert abs(shifted - mass) > 4 * math.sqrt(0.25 / len(draws)) + 1e-3


def test_units_do_not_matter_and_are_carried() -> None:
    """A flow of x in centimetres is that in metres, up to D log 100: standardised inside, in nats of the data given."""
    x = torch.randn(200, 2).double() * torch.tensor([3.0, 0.1]) + 5
    metres, centimetres = (pg.Flow(2, **SMALL).double() for _ in range(2))
    centimetres.load_state_dict(metres.state_dict())
    metres.initialise(x)
    centimetres.initialise(100 * x)
    assert torch.allclose(centimetres.log_prob(100 * x), metres.log_prob(x) - 2 * math.log(100), atol=1e-9)
    assert torch.allclose(centimetres.sample(5, seed=0), 100 * metres.sample(5, seed=0))


def test_fit_starts_from_the_data_once() -> None:
    x = 50 + 10 * torch.randn(100, 2)
    flow = pg.Flow(2, **SMALL)
    pg.fit(pg.MaximumLikelihood()(flow), x, steps=1, lr=1e-12, seed=0, progress=False)
    unit = next(part for part in flow.model.modules() if isinstance(part, Standardise))
    assert torch.allclose(unit.loc, x.mean(0))
    pg.fit(pg.MaximumLikelihood()(flow), x + 1000, steps=1, lr=1e-12, seed=0, progress=False)
    flow.initialise(x + 1000)
    assert torch.allclose(unit.loc, x.mean(0))


def test_the_context_is_standardised_too() -> None:
    context = torch.randn(200, 2) * torch.tensor([1e4, 1e-4]) + 1e3
    flow = pg.Flow(1, context_shape=2, **SMALL)
    flow.initialise(torch.randn(200, 1), context)
    assert flow.model.context is not None
    y, _ = flow.model.context(context)
    assert torch.allclose(y.std(0, correction=0), torch.ones(2), atol=1e-3)


@pytest.mark.slow
def test_a_conditional_flow_learns_the_conditional() -> None:
    """x | c ~ N(2 c, (0.5 + c²)²): mean log-density on new rows within .02 nat of the truth's."""
    c = torch.rand(4000, 1) * 2 - 1
    x = 2 * c + (0.5 + c**2) * torch.randn(4000, 1)
    flow = pg.Flow(1, "affine_autoregressive", layers=1, hidden=(32, 32), context_shape=1)
    pg.fit(pg.MaximumLikelihood()(flow), (x[:3000], c[:3000]), steps=1500, batch_size=256, lr=3e-3, schedule="cosine",
           seed=0, progress=False)  # fmt: skip
    truth = dist.Normal(2 * c[3000:], 0.5 + c[3000:] ** 2).log_prob(x[3000:]).squeeze(-1)
    gap = truth - flow.log_prob(x[3000:], c[3000:]).detach()
    assert float(gap.mean()) < 0.02
    assert float((truth - flow.log_prob(x[3000:], -c[3000:]).detach()).mean()) > 0.5


# ---------------------------------------------------------------------------------------------------- with the grain --
def test_training_against_the_grain_is_said() -> None:
    flow, x = pg.Flow(3, direction="sampling", **SMALL), torch.randn(4, 3)
    with pytest.warns(UserWarning, match="direction='density'"):
        flow.log_prob(x)
    with pytest.warns(UserWarning, match="direction='density'"):
        pg.MaximumLikelihood()(flow)(x)
    with torch.no_grad():
        flow.log_prob(x)  # to look at a density is no training
    pg.Flow(3, "spline_coupling", direction="sampling", **SMALL).log_prob(x)  # both directions cost the same

    def guide(x: Tensor) -> None:
        import pyro

        with pyro.plate("data", len(x)):
            pyro.sample("z", slow.distribution())

    def model(x: Tensor) -> None:
        import pyro

        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    slow = pg.Flow(3, **SMALL)
    with pytest.warns(UserWarning, match="direction='sampling'"):
        pg.ELBO()(model, guide)(x)
    slow = pg.Flow(3, direction="sampling", **SMALL)
    pg.ELBO()(model, guide)(x)


# ------------------------------------------------------------------------------------------------------ what it says --
CIRCLE = Coupling(CircularSpline(), 2, (4,))
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "transform": (lambda: pg.Flow(2, "nsf"), "transform must be a Bijection or one of spline_autoregressive, "),
    "no dimension": (lambda: pg.Flow(()), "at least one dimension"),
    "event shape": (lambda: pg.Flow(0), "event_shape must be a positive int"),
    "hidden": (lambda: pg.Flow(2, hidden=128), "hidden must be a sequence"),
    "layers": (lambda: pg.Flow(2, layers=0), "layers must be an int of at least 1"),
    "direction": (lambda: pg.Flow(2, direction="fast"), "direction must be 'density' or 'sampling'"),
    "mixing": (lambda: pg.Flow(2, mixing="shuffle"), "mixing must be one of lu, rotation, permutation, flip"),
    "activation": (lambda: pg.Flow(2, activation="swish"), "activation must be one of silu, relu, tanh, gelu"),
    "coupling of one": (lambda: pg.Flow(1, "spline_coupling"), "features must be at least 2"),
    "base": (lambda: pg.Flow(2, base="cauchy"), "base must be 'normal', 'student_t', 'mixture'"),
    "base shape": (lambda: pg.Flow(2, base=dist.Normal(0.0, 1.0)), "base must have event shape (2,)"),
    "base batch": (lambda: pg.Flow(2, base=dist.Normal(torch.zeros(2), 1.0)), ".to_event(1)"),
    "support": (lambda: pg.Flow(2, support="integers"), "support must be one of real, positive, unit, simplex"),
    "support pair": (lambda: pg.Flow(2, support=(0, 1, 2)), "a pair (low, high)"),
    "support order": (lambda: pg.Flow(2, support=(1.0, 0.0)), "low"),
    "support length": (lambda: pg.Flow(3, support=([0.0, 0.0], [1.0, 1.0])), "low must be a number or of shape (3,)"),
    "simplex of images": (lambda: pg.Flow((2, 2), support="simplex"), "events of one dimension"),
    "torus": (lambda: pg.Flow(2, "circular_coupling", support="unit"), "a support of its own"),
    "mixing of a linear flow": (lambda: pg.Flow(2, "linear", mixing="lu"), "mixing='lu' belongs to"),
    "activation of BNAF": (lambda: pg.Flow(2, "block_autoregressive", activation="relu"), "activation='relu' belongs"),
    "direction of a bijection": (lambda: pg.Flow(2, LUMixing(2), direction="sampling"), "direction= belongs to"),
    "torus base": (lambda: pg.Flow(2, "circular_coupling", base="student_t"), "mass beyond the angles"),
    "angles standardised": (lambda: pg.Flow(2, CIRCLE), "pass standardise=False"),
    "torus mixing": (lambda: pg.Flow(2, "circular_coupling", mixing="lu"), "would leave the torus"),
    "box of affine": (lambda: pg.Flow(2, "affine_coupling", base="uniform", support=(0, 1)), "stay in a box"),
    "box without ends": (lambda: pg.Flow(2, base="uniform"), "support=(low, high) with finite numbers"),
    "box mixing": (lambda: pg.Flow(2, base="uniform", support=(0, 1), mixing="lu"), "would leave the box"),
    "linear context": (lambda: pg.Flow(2, "linear", context_shape=2), "takes no context"),
    "rows": (lambda: pg.Flow(3).log_prob(torch.randn(4, 2)), "x must have shape (rows, 3), got (4, 2)"),
    "one row": (lambda: pg.Flow(3).log_prob(torch.randn(3)), "x.unsqueeze(0)"),
    "not finite": (lambda: pg.Flow(1).log_prob(torch.tensor([[1.0], [math.nan]])), "not finite in 1 of 2 rows"),
    "outside": (
        lambda: pg.Flow(1, support="unit").log_prob(torch.tensor([[0.5], [2.0]])),
        "outside the support of this flow",
    ),
    "no context": (lambda: pg.Flow(2, context_shape=3).log_prob(torch.randn(4, 2)), "context is missing"),
    "context not asked": (lambda: pg.Flow(2).log_prob(torch.randn(4, 2), torch.randn(4, 3)), "context was given"),
    "context shape": (
        lambda: pg.Flow(2, context_shape=3).log_prob(torch.randn(4, 2), torch.randn(4, 2)),
        "context must have shape (rows, 3)",
    ),
    "context of distribution": (lambda: pg.Flow(2, context_shape=3).distribution(), "context is missing"),
    "context rows of distribution": (
        lambda: pg.Flow(2, context_shape=3).distribution(torch.randn(4, 2)),
        "context must have shape (*batch_shape, 3), got (4, 2)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_wrong_types_are_named() -> None:
    with pytest.raises(ValueError, match="transform must be a Bijection or one of"):
        pg.Flow(2, Spline())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="floating point"):
        pg.Flow(2).log_prob(torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(TypeError, match=r"float64.*float32"):
        pg.Flow(2).log_prob(torch.ones(3, 2).double())


# -------------------------------------------------------------------------------------------------- saved and loaded --
@pytest.mark.parametrize(
    "options",
    [
        {}, {"support": ([0.0, -1.0], [1.0, math.inf])}, {"context_shape": 2}, {"base": "student_t"},
        {"transform": "circular_autoregressive"}, {"mixing": "permutation", "support": "positive"},
        {"activation": "relu", "transform": "spline_coupling"},
    ],
)  # fmt: skip
def test_a_fit_is_saved_and_loaded(tmp_path: Path, options: dict[str, Any]) -> None:
    x = torch.rand(40, 2)
    data: Any = (x, torch.randn(40, 2)) if "context_shape" in options else x
    flow = pg.Flow(2, **{**SMALL, **options})
    result = pg.fit(pg.MaximumLikelihood()(flow), data, steps=3, seed=0, progress=False)
    result.save(tmp_path / "run")
    loaded: Any = pg.load(tmp_path / "run").program
    batch = data if isinstance(data, tuple) else (data,)
    assert torch.equal(loaded.log_prob(*batch), flow.log_prob(*batch))


def test_evidence_is_exact_and_an_estimate_is_called_one() -> None:
    x = torch.randn(20, 2)
    evidence = pg.log_evidence(pg.Flow(2, **SMALL), x, method=pg.ImportanceSampling(7))
    assert (evidence.kind, evidence.standard_error) == ("exact", None)
    assert str(evidence.mean()).startswith("= ")
    torch.manual_seed(0)
    wide = stirred(pg.Flow(20, "continuous", hidden=(8,)), 0.5).float()
    assert wide.stochastic
    estimate = pg.log_evidence(wide, torch.randn(5, 20), method=pg.ImportanceSampling(7))
    assert estimate.kind == "estimate"
    assert estimate.standard_error is not None
    assert bool((estimate.standard_error > 0).all())


def test_every_name_makes_a_flow_that_trains() -> None:
    x = torch.rand(64, 2) * 2 - 1
    for name in TRANSFORMS:
        flow = pg.Flow(2, name, layers=1, hidden=(8,))  # type: ignore[arg-type]
        result = pg.fit(pg.MaximumLikelihood()(flow), x, steps=5, lr=0.01, seed=0, progress=False)
        losses = result.history["loss"]
        assert losses[-1] < losses[0], name


@pytest.mark.parametrize("transform", ["spline_coupling", "affine_autoregressive"])
def test_the_activation_is_that_of_every_network(transform: str) -> None:
    """The same weights under another activation give another density."""
    names = {}
    for activation in ("silu", "relu", "tanh", "gelu"):
        torch.manual_seed(0)
        flow = pg.Flow(2, transform, activation=activation, **SMALL)  # type: ignore[arg-type]
        names[activation] = flow.log_prob(torch.randn(3, 2, generator=torch.Generator().manual_seed(0))).tolist()
    assert len({tuple(values) for values in names.values()}) == 4


def test_lu_mixing_turns_the_order_between_autoregressive_layers() -> None:
    mixers = [m for m in pg.Flow(3, layers=3, hidden=(6,)).model.modules() if isinstance(m, LUMixing)]
    assert [m.permutation is not None for m in mixers] == [False, True, True]


@pytest.mark.slow
def test_digits_have_an_exact_density_above_minus_ninety() -> None:
    """Nats per datum of x + U[0, 1) on held-out rows, weights chosen on validation rows; a full Gaussian has −131."""
    train, validation, test = (
        pg.datasets.dequantize(rows.repeat(copies, 1), seed=copies)
        for rows, copies in zip(pg.datasets.digits(levels=17), (20, 4, 1), strict=True)
    )
    flow = pg.Flow(64, layers=2, hidden=(256,), support=(0.0, 17.0), mixing="flip")
    pg.fit(
        pg.MaximumLikelihood()(flow), train, steps=700, batch_size=32, lr=4e-3, schedule="cosine", average=0.99,
        validation=validation, seed=0, compile=False, progress=False,
    )  # fmt: skip
    evidence = pg.log_evidence(flow, test).mean()
    assert evidence.kind == "exact"
    assert float(evidence.value) > -90
