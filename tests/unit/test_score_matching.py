"""Score matching as users meet it: promises of a loss, SVI, conditional programs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen.base import Objective
from pyro_gen.handlers import energy
from pyro_gen.objectives import FiniteDifferenceScoreMatching, ScoreMatching, SlicedScoreMatching
from pyro_gen.testing import losses

EACH: dict[str, Objective[Any]] = {
    "exact": ScoreMatching(),
    "reverse": ScoreMatching("reverse"),
    "sliced": SlicedScoreMatching(2),
    "sliced, plain": SlicedScoreMatching(variance_reduction=False, noise="sphere"),
    "differences": FiniteDifferenceScoreMatching(0.2),
    "Richardson": FiniteDifferenceScoreMatching(0.2, richardson=True, projections=2),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Energy(nn.Module):
    """A program as users write it: a base, a network as a factor; its output bias reaches no loss."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.SiLU, features: int = 2, given: int = 0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features + given, 8), activation(), nn.Linear(8, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1), obs=x)
            both = x if context is None else torch.cat([x, context], -1)
            pyro.factor("energy", -self.net(both).squeeze(-1))


def program(**options: Any) -> pg.Unnormalized:
    return pg.Unnormalized(Energy(**options), 2)


BIAS = "model.net.2.bias"


@pytest.mark.parametrize("name", EACH)
def test_promises_of_a_loss(name: str) -> None:
    module, x = EACH[name](program()), torch.randn(8, 2)
    losses.check_declared(module, x)
    losses.check_batches(module, x)
    losses.check_total(module, x)
    losses.check_pointwise(module, x)
    losses.check_one_device(module, x)
    if name in ("differences", "Richardson"):  # where the bias cancels to rounding, not to zero
        module.model.net[2].bias = None
        losses.check_gradients(EACH[name](module.model), x)
    else:
        losses.check_gradients(module, x, unreached=[BIAS])


@pytest.mark.parametrize("name", EACH)
def test_traced_steps_and_trainers_agree(name: str) -> None:
    x = torch.randn(8, 2)
    losses.check_traced(EACH[name](program()), x)
    losses.check_trainers(EACH[name], program(), x)


@pytest.mark.parametrize("name", EACH)
def test_the_constant_of_an_energy_has_a_gradient_and_it_is_zero(name: str) -> None:
    """Of differences up to rounding: at most n u Σ|c|, for a sum of n terms c = ∂loss/∂log f."""
    for dtype in (torch.float32, torch.float64):
        model, x = Energy().to(dtype), torch.randn(8, 2, dtype=dtype)
        module = EACH[name](model)
        module(x).backward()
        found = model.net[2].bias.grad
        assert found is not None  # None would leave a distributed step waiting
        if name in ("differences", "Richardson"):
            copies, coefficient = (3, 4) if name == "differences" else (9, 4 * (4 + 1 / 4) / 3)  # of eps⁻², a row
            slope = (
                3 * float(module.pointwise(x).detach().abs().max() + coefficient / 0.2**2) ** 0.5 / 0.2
            )  # of ½(vᵀs)²
            total = len(x) * (coefficient / 0.2**2 + slope)
            assert float(found.abs()) <= copies * len(x) * torch.finfo(dtype).eps * total
        else:
            assert float(found.abs()) == 0


@pytest.mark.parametrize("name", EACH)
def test_a_plain_program_in_svi_learns_a_precision(name: str) -> None:
    """The minimum of the loss is the inverse covariance of the sample; differences of a quadratic are exact."""
    torch.manual_seed(0)
    x = torch.randn(2000, 2, dtype=torch.float64) @ torch.tensor([[0.8, 0.5], [0.0, 0.6]], dtype=torch.float64)
    x = x - x.mean(0)

    def model(x: Tensor) -> None:
        root = pyro.param("root", torch.eye(2, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.factor("energy", -(x @ root).square().sum(-1) / 2)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), loss=EACH[name])
    late = []
    for step in range(400):
        svi.step(x)
        if step >= 300:
            late.append(pyro.param("root").detach().clone())
    root = torch.stack(late).mean(0)
    found = root @ root.T
    covariance = x.T @ x / len(x)
    torch.testing.assert_close(found, covariance.inverse(), rtol=0.05, atol=0.05)


def test_conditional_density_is_differentiated_in_x_only() -> None:
    model = Energy(features=2, given=1).double()
    x, context = torch.randn(16, 2, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)

    def one(x: Tensor, c: Tensor) -> Tensor:
        return -model.net(torch.cat([x, c])).squeeze() - x.square().sum() / 8

    score = torch.vmap(torch.func.grad(one))(x, context)
    hessian = torch.vmap(torch.func.hessian(one))(x, context)
    trace = hessian.diagonal(dim1=1, dim2=2).sum(1)
    expected = (0.5 * score.square().sum(1) + trace).detach()
    ebm = pg.Unnormalized(model, 2, context_shape=1)
    for method in ("forward", "reverse", "vmap"):
        found = ScoreMatching(method)(ebm).pointwise(x, context).detach()  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for objective in (SlicedScoreMatching(4000), FiniteDifferenceScoreMatching(0.01, projections=4000)):
        found = objective(ebm).pointwise(x, context).detach()
        spread = 4 * hessian.detach().square().sum((1, 2)).sqrt() * 2**0.5 / 4000**0.5
        spread = spread + 4 * score.detach().square().sum(1) / 4000**0.5 + 1e-3
        assert bool(((found - expected).abs() <= spread).all())


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("by_energy", [False, True])
def test_a_subsampling_plate_is_scaled_once(name: str, by_energy: bool) -> None:
    """Differences run the program on copies of its rows: their plate has to look like one of the rows themselves."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows of the table", 20, subsample=torch.arange(len(x))):
            if by_energy:
                energy("energy", lambda x: (x**2).sum(-1), x)
            else:
                pyro.factor("energy", -(x**2).sum(-1))

    x = torch.randn(4, 2)
    module = EACH[name](model)
    expected = (2 * x.square().sum(-1) - 4).sum()  # s = −2x; of a sphere the diagonal Hessian is exact, v² = 1
    for total, factor in ((None, 5.0), (20, 5.0), (40, 10.0)):
        torch.manual_seed(1)
        loss = module(x, total=total)
        torch.manual_seed(1)
        torch.testing.assert_close(loss, factor * module.pointwise(x).sum())
    if name in ("exact", "reverse", "sliced"):
        torch.testing.assert_close(loss, 10 * expected)


def test_differences_on_a_plate_of_another_length() -> None:
    """As many copies as rows of the table: a plate that is full by accident is scaled by what was given."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", 12, subsample=torch.arange(len(x))):
            pyro.factor("energy", -(x**2).sum(-1))

    for rows in (4, 6, 12):  # with 3 copies: 12 of 12, 18 and 36 of 12
        x = torch.randn(rows, 2)
        module = FiniteDifferenceScoreMatching(0.2)(model)
        torch.manual_seed(1)
        loss = module(x)
        torch.manual_seed(1)
        torch.testing.assert_close(loss, 12 / rows * module.pointwise(x).sum())


def test_numbers_without_an_event_dimension() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(()), 2.0), obs=x)

    x = torch.randn(5)
    expected = x**2 / 32 - 0.25
    for objective in (ScoreMatching(), ScoreMatching("reverse"), SlicedScoreMatching()):
        torch.testing.assert_close(objective(model).pointwise(x).detach(), expected)
    found = FiniteDifferenceScoreMatching(0.2)(model).pointwise(x).detach()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_fit_names_the_rows_of_a_divergence() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.factor("energy", -self.rate * torch.exp(x.square().sum(-1)))

    x = torch.randn(32, 2).clamp(-2, 2)
    module = ScoreMatching()(pg.Unnormalized(Steep(), 2))
    module.prepare(x)
    x[5] = 12.0  # exp(288) overflows
    with pytest.raises(pg.Divergence) as raised:
        pg.fit(module, x, steps=2, batch_size=32, validation=False, progress=False, compile=False)
    assert len(raised.value.rows) == 1


# ------------------------------------------------------------------------------------------------------------ refusals
def factor(function: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.factor("energy", function(x))

    return model


def observed(fn: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", fn(x), obs=x)
            pyro.factor("energy", -(x**2).sum(-1))

    return model


def twice(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=x)
        pyro.sample("b", dist.Laplace(x.new_zeros(2), 1.0).to_event(1), obs=x)


def in_parts(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0), obs=x[:, 0])
        pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0), obs=x[:, 1])


def with_latent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def without_plate(x: Tensor) -> None:
    pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(2), obs=x)


def through_energy(function: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            energy("energy", function, x)

    return model


NORMALISED = nn.BatchNorm1d(2)
REAL = torch.linspace(-1, 1, 8).reshape(4, 2)
BAD: dict[str, tuple[Any, Tensor, type[Exception], str]] = {
    "column": (factor(lambda x: -x.square().sum(-1, keepdim=True)), REAL, ValueError, "rows|dim"),
    "scalar": (factor(lambda x: -x.square().sum()), REAL, ValueError, "depends on row"),
    "fewer rows": (factor(lambda x: -x[:2].square().sum(-1)), REAL, ValueError, "shape|size|dim"),
    "complex": (factor(lambda x: -x.square().sum(-1) * 1j), REAL, TypeError, "real"),
    "no dependence": (factor(lambda x: x.new_zeros(len(x))), REAL, ValueError, "does not depend on x"),
    "batch statistics": (
        factor(lambda x: -NORMALISED(x).square().sum(-1)),
        REAL,
        ValueError,
        "batch statistics",
    ),
    "scalar energy": (through_energy(lambda x: x.square().sum()), REAL, ValueError, "one value a row"),
    "complex energy": (through_energy(lambda x: x.sum(-1) * 1j), REAL, TypeError, "real"),
    "energy of fewer rows": (through_energy(lambda x: x[1:].sum(-1)), REAL, ValueError, "one value a row"),
    "two data sites": (twice, REAL, ValueError, "'a', 'b'"),
    "x in parts": (in_parts, REAL, ValueError, "in parts"),
    "free latent": (with_latent, REAL, ValueError, "'z'.*particles"),
    "no plate": (without_plate, REAL, ValueError, "plate"),
    "positive data": (
        observed(lambda x: dist.Exponential(x.new_ones(2)).to_event(1)),
        REAL.abs() + 0.1,
        ValueError,
        "edge",
    ),
    "outside the support": (
        observed(lambda x: dist.Exponential(x.new_ones(2)).to_event(1).mask(False)),
        REAL,
        ValueError,
        "row 0",
    ),
    "discrete site": (
        observed(lambda x: dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1)),
        REAL.gt(0).float(),
        ValueError,
        "PseudoLikelihood",
    ),
    "integers": (factor(lambda x: -x.float().square().sum(-1)), REAL.long(), TypeError, "PseudoLikelihood"),
}


@pytest.mark.parametrize("objective", [ScoreMatching(), SlicedScoreMatching(), FiniteDifferenceScoreMatching(0.2)])
@pytest.mark.parametrize("name", BAD)
def test_bad_programs_and_data(name: str, objective: Objective[Any]) -> None:
    model, x, error, said = BAD[name]
    module = objective(model)
    for _ in range(2):  # what is refused once is refused again
        with pytest.raises(error, match=said):
            module(x)


def test_a_column_without_validation_is_refused_too() -> None:
    model = factor(lambda x: -x.square().sum(-1, keepdim=True))
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="depends on row"):
        ScoreMatching()(model)(REAL)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh])
def test_piecewise_linear_energies(activation: Callable[[], nn.Module]) -> None:
    x, named = torch.randn(8, 2), "relu|hardtanh"
    for objective in (ScoreMatching(), ScoreMatching("reverse"), SlicedScoreMatching()):
        with pytest.raises(ValueError, match=named):
            objective(Energy(activation))(x)
    ScoreMatching(check_smooth=False)(Energy(activation))(x)
    SlicedScoreMatching(check_smooth=False)(Energy(activation))(x)
    FiniteDifferenceScoreMatching(0.2)(Energy(activation))(x)  # sees the kinks


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ScoreMatching("jacrev"), "method"),  # type: ignore[arg-type]
        (lambda: ScoreMatching(weight=2.0), "weight"),  # type: ignore[arg-type]
        (lambda: ScoreMatching(particles=1), "particles"),
        (lambda: ScoreMatching(particles=0), "particles"),
        (lambda: ScoreMatching(check_smooth=1), "check_smooth"),  # type: ignore[arg-type]
        (lambda: SlicedScoreMatching(0), "projections"),
        (lambda: SlicedScoreMatching(2.0), "projections"),  # type: ignore[arg-type]
        (lambda: SlicedScoreMatching(noise="uniform"), "noise"),  # type: ignore[arg-type]
        (lambda: FiniteDifferenceScoreMatching(0.0), "eps"),
        (lambda: FiniteDifferenceScoreMatching(-0.1), "eps"),
        (lambda: FiniteDifferenceScoreMatching(float("nan")), "eps"),
        (lambda: FiniteDifferenceScoreMatching(projections=0), "projections"),
    ],
)
def test_bad_options(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_a_step_below_the_noise_of_floats_or_above_the_data() -> None:
    """At ε = 10⁻³ of the scale a second difference in float32 is half noise; in float64 it is fine."""
    model = factor(lambda x: -x.square().sum(-1))
    x = torch.randn(64, 2)
    with pytest.raises(ValueError, match="rounding noise"):
        FiniteDifferenceScoreMatching(1e-3)(model)(x)
    FiniteDifferenceScoreMatching(1e-3)(model)(x.double())
    with pytest.raises(ValueError, match="rounding noise"):
        FiniteDifferenceScoreMatching(0.01)(model)(1e5 + x)
    with pytest.raises(ValueError, match="below the scale"):
        FiniteDifferenceScoreMatching(0.1)(model)(1e-3 * x)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (lambda x: x.sum(-1), "shape of x"),
        (lambda x: x - 1, "not negative"),
        (lambda x: x * x.sum(-1, keepdim=True), "by itself"),
    ],
)
def test_bad_weights(weight: Callable[[Tensor], Tensor], said: str) -> None:
    model = observed(lambda x: dist.Exponential(x.new_ones(2)).to_event(1))
    with pytest.raises(ValueError, match=said):
        ScoreMatching(weight=weight)(model)(torch.rand(4, 2) + 0.1)


def test_supports_without_a_known_weight() -> None:
    model = observed(lambda x: dist.Dirichlet(x.new_ones(2)))
    with pytest.raises(ValueError, match="half-lines and intervals"):
        ScoreMatching(weight="auto")(model)(torch.rand(4, 2).softmax(-1))


@pytest.mark.parametrize("name", EACH)
def test_kinds_that_have_no_score(name: str) -> None:
    with pytest.raises(TypeError, match="Unnormalized"):
        EACH[name](pg.VAE(3, latent_dim=2, hidden=(4,)))  # type: ignore[arg-type]
