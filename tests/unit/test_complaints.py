"""Each complaint on a program that deserves it and on its right form, and none on programs that are right."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pyro.poutine as poutine
import pytest
import torch
from contracts.cases import CASES, OBJECTIVES, Case, objectives_of
from pyro.infer import SVI, Trace_ELBO, autoguide, config_enumerate
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.util import get_rng_state
from torch import Tensor, nn

from pyro_gen import VAE, Bounded
from pyro_gen.base import Unnormalized
from pyro_gen.diagnostics.complaints import LOOKS, Complaint, check
from pyro_gen.diagnostics.complaints.runs import modules_of
from pyro_gen.handlers import energy
from pyro_gen.objectives import ELBO, IWAE, FiniteDifferenceScoreMatching, MaximumLikelihood, ScoreMatching

ROWS = 7


@pytest.fixture(autouse=True, params=[True, False], ids=["validated", "not validated"])
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng(), pyro.validation_enabled(request.param):
        torch.manual_seed(0)
        yield


def codes(*pair: Any, **options: Any) -> list[str]:
    return [complaint.code for complaint in check(*pair, **options)]


def normal(*event: int) -> Any:
    return dist.Normal(torch.zeros(event), 1.0).to_event(len(event))


def plate(x: Tensor, name: str = "data") -> Any:
    return pyro.plate(name, len(x))


# ----------------------------------------------------------------------------------------------------------- energies
class Energy(nn.Module):
    """A base and a factor, by either of the two ways to write one."""

    def __init__(self, act: type[nn.Module] = nn.SiLU, bias: bool = False, factor: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 6), act(), nn.Linear(6, 1, bias=bias))
        self.factor = factor

    def forward(self, x: Tensor) -> None:
        with plate(x):
            x = pyro.sample("x", normal(2), obs=x)
            if self.factor:
                pyro.factor("energy", -self.net(x).squeeze(-1))
            else:
                energy("energy", self.net, x)


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("objective", [ELBO, ELBO(2), IWAE(), MaximumLikelihood, Trace_ELBO(), Trace_ELBO, None])
def test_a_trained_factor_under_a_bound(factor: bool, objective: Any) -> None:
    (found,) = check(Energy(factor=factor), lambda x: None, torch.randn(ROWS, 2), objective=objective)
    assert (found.code, found.site) == ("unhandled-normalizer", "energy")
    assert found.objectives == ("ELBO", "IWAE", "MaximumLikelihood")
    text = str(found)
    assert "'energy'" in text
    assert "net.0.weight" in text
    assert "pg.ScoreMatching" in text
    assert "pg.ELBO" in text
    assert ("all is well" in text) == factor  # a factor may be a likelihood written by hand, an energy is none


def test_the_complaint_is_right_about_what_pyro_does() -> None:
    """The loss that is warned of falls far below any entropy of two standard normals, 2.84 nats a row."""
    model, x = Energy(), torch.randn(ROWS, 2)

    def named(x: Tensor) -> None:
        pyro.module("energy", model)
        model(x)

    svi = SVI(named, lambda x: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    assert [svi.step(x) for _ in range(200)][-1] / ROWS < -5


def test_a_factor_under_score_matching_is_in_order() -> None:
    x = torch.randn(ROWS, 2)
    assert codes(Energy(), None, x, objective=ScoreMatching()) == []
    assert codes(Unnormalized(Energy(), 2), x, objective=ScoreMatching) == []


def test_factors_whose_normalizer_stands_still() -> None:
    def penalty(x: Tensor) -> None:  # of parameters alone
        w = pyro.param("w", torch.ones(3))
        pyro.factor("ridge", -w.square().sum())
        with plate(x):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    def fixed(x: Tensor) -> None:  # of x alone
        with plate(x):
            pyro.sample("x", normal(3), obs=x)
            pyro.factor("quartic", -x.pow(4).sum(-1))

    def tilted(x: Tensor) -> None:  # of a latent of the row and x, without parameters
        with plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", normal(3), obs=x)
            pyro.factor("coupling", -(x.sum(-1) - z).square())

    frozen, x = Energy(), torch.randn(ROWS, 3)
    assert codes(penalty, None, x) == codes(fixed, None, x) == []
    assert codes(tilted, autoguide.AutoNormal(tilted), x) == []
    assert codes(frozen.requires_grad_(False), None, x[:, :2]) == []


def test_priors_of_latents_and_weights() -> None:
    net = nn.Linear(1, 1, bias=False)

    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> None:
            with plate(x):
                z = pyro.sample("z", normal(1))
                energy("prior", self.net, z)
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def weights(x: Tensor) -> None:  # doubly intractable
        w = pyro.sample("w", normal(1))
        with plate(x):
            pyro.sample("x", normal(1), obs=x)
            energy("energy", lambda x: (w * x**2).sum(-1), x)

    x = torch.randn(ROWS, 1)
    for model, what in ((Prior(), "latent z"), (weights, "latent w")):
        (found,) = check(model, autoguide.AutoNormal(model), x)
        assert found.code == "unhandled-normalizer"
        assert what in str(found)


def test_a_factor_of_whole_numbers() -> None:
    table = nn.Embedding(5, 1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, x: Tensor) -> None:
            with plate(x):
                energy("energy", self.table, x)

    (found,) = check(Model(), None, torch.arange(5))
    assert found.code == "unhandled-normalizer"
    assert "pg.PseudoLikelihood" in str(found)  # discrete data have no score


def test_kinks() -> None:
    x = torch.randn(ROWS, 2)
    for objective in (ScoreMatching(), ScoreMatching):
        assert codes(Energy(nn.ReLU), None, x, objective=objective) == ["kinked-energy"]
    assert "kinked-energy" in codes(Energy(nn.ReLU), None, x)
    assert "kinked-energy" not in codes(Energy(nn.ReLU), None, x, objective=ELBO())
    assert codes(Energy(nn.Softplus), None, x, objective=ScoreMatching()) == []
    assert codes(Energy(nn.ReLU), None, x, objective=ScoreMatching(check_smooth=False)) == []
    assert codes(Energy(nn.ReLU), None, x, objective=FiniteDifferenceScoreMatching()) == []


def test_the_bias_that_no_score_sees() -> None:
    x = torch.randn(ROWS, 2)
    (found,) = check(Energy(bias=True), None, x, objective=ScoreMatching())
    assert (found.code, found.site) == ("unidentified-parameter", "model.net.2.bias")
    assert codes(Energy(bias=True), None, x, objective=ELBO()) == ["unhandled-normalizer"]


# -------------------------------------------------------------------------------------------------- plates and shapes
def rows_of_loc(loc: Callable[[Tensor], Tensor], events: int = 0, name: str | None = "data", size: int | None = None):
    def model(x: Tensor) -> None:
        fn = dist.Normal(loc(x), 1.0).to_event(events)
        if name is None:
            pyro.sample("x", fn, obs=x)
        else:
            with pyro.plate(name, len(x) if size is None else size):
                pyro.sample("x", fn, obs=x)

    return model


SHAPES: dict[str, tuple[Any, Any, tuple[int, ...]]] = {  # wrong, right, shape of x
    "rows-by-rows": (
        rows_of_loc(lambda x: x.new_zeros(len(x), 1)),
        rows_of_loc(lambda x: x.new_zeros(len(x), 1), 1),
        (ROWS, 1),
    ),
    "missing-plate": (
        rows_of_loc(lambda x: x.new_zeros(3), 1, None),
        rows_of_loc(lambda x: x.new_zeros(3), 1),
        (ROWS, 3),
    ),
    "plate-mismatch": (rows_of_loc(lambda x: x.new_zeros(3)), rows_of_loc(lambda x: x.new_zeros(3), 1), (ROWS, 3)),
    "value-shape": (
        rows_of_loc(lambda x: x.new_zeros(len(x), 1), 1),
        rows_of_loc(lambda x: x.new_zeros(len(x))),
        (ROWS,),
    ),
}


@pytest.mark.parametrize("code", SHAPES)
def test_shapes(code: str) -> None:
    wrong, right, shape = SHAPES[code]
    assert codes(wrong, None, torch.randn(shape)) == [code]
    assert codes(right, None, torch.randn(shape)) == []


def test_a_plate_of_another_length() -> None:
    model = rows_of_loc(lambda x: x.new_zeros(len(x)), size=50)
    (found,) = check(model, None, torch.randn(ROWS))
    assert (found.code, found.site) == ("plate-mismatch", "x")
    assert isinstance(found.error, ValueError)


def regression(events: int) -> Callable[..., PyroModule[Any]]:
    class Regression(PyroModule):  # type: ignore[misc, no-any-unimported, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](3, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))
            self.scale = PyroSample(dist.HalfNormal(torch.ones(2)).to_event(events))

        def forward(self, x: Tensor, y: Tensor) -> None:
            scale, mean = self.scale.sum(), self.linear(x).squeeze(-1)
            with plate(x):
                pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return Regression


def test_prior_without_to_event() -> None:
    batch = torch.randn(ROWS, 3), torch.randn(ROWS)
    for events, found in ((1, []), (0, ["missing-to-event"])):
        model = regression(events)()
        kinds = codes(model, None, *batch)
        assert [c for c in kinds if c != "free-latent"] == found


def test_mini_batches() -> None:
    def hierarchy(size: int | None) -> Callable[[Tensor], None]:
        def model(x: Tensor) -> None:
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            with pyro.plate("data", size or len(x), subsample_size=len(x)):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

        return model

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("loc_q", torch.zeros(())), 1.0))

    x = torch.randn(ROWS)
    assert codes(hierarchy(None), guide, x, total=500) == ["plate-scale"]
    assert codes(hierarchy(500), guide, x, total=500) == codes(hierarchy(None), guide, x, total=ROWS) == []
    assert codes(hierarchy(400), guide, x, total=500) == ["plate-scale"]
    assert codes(rows_of_loc(lambda x: x.new_zeros(())), None, x, total=500) == []  # a factor on the loss, no more
    assert "plate-scale" in codes(rows_of_loc(lambda x: x.new_zeros(()), 0, None), None, x, total=500)
    with pytest.raises(ValueError, match="total must be"):
        check(guide, None, x, total=0)


def test_subsamples_that_the_guide_replaces() -> None:
    def local(given: bool) -> Callable[[Tensor], None]:
        def model(x: Tensor) -> None:
            index = torch.arange(4) if given else None
            with pyro.plate("data", len(x), subsample=index, subsample_size=None if given else 4) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

        return model

    x = torch.randn(50)
    for given in (True, False):
        model = local(given)
        assert codes(model, autoguide.AutoNormal(model), x) == ["subsample-overridden"] * given


# ------------------------------------------------------------------------------------------------------ model and guide
class Latent(nn.Module):
    """z under a prior in the plate, x around it."""

    def __init__(self, prior: Any = None) -> None:
        super().__init__()
        self.prior = normal(2) if prior is None else prior
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> None:
        with plate(x):
            z = pyro.sample("z", self.prior)
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) * self.weight, 1.0).to_event(1), obs=x)


class Guide(nn.Module):
    """q(z) of a given distribution, with what else a test wants."""

    def __init__(self, fn: Any = None, site: str = "z", name: str | None = "data", also: Any = None) -> None:
        super().__init__()
        self.fn, self.site, self.name, self.also = normal(2) if fn is None else fn, site, name, also

    def forward(self, x: Tensor) -> None:
        if self.also is not None:
            self.also(x)
        if self.name is None:
            pyro.sample(self.site, self.fn)
        else:
            with plate(x, self.name):
                pyro.sample(self.site, self.fn)


def observe(x: Tensor) -> None:
    with plate(x, "rows"):
        pyro.sample("seen", normal(2), obs=x)


def redraw(x: Tensor) -> None:
    with plate(x, "rows"):
        pyro.sample("x", normal(2))


GUIDES: dict[str, tuple[Any, list[str]]] = {
    "right": (Guide(), []),
    "auxiliary": (Guide(also=lambda x: pyro.sample("a", normal(2), infer={"is_auxiliary": True})), []),
    "none": (None, ["free-latent"]),
    "another name": (Guide(site="y"), ["free-latent", "foreign-guide-site"]),
    "observes": (Guide(also=observe), ["guide-observes"]),
    "draws x": (Guide(also=redraw), ["foreign-guide-site"]),
    "one draw for all": (Guide(name=None), ["plates-differ"]),
    "another plate": (Guide(name="batch"), ["plates-differ"]),
    "another event": (Guide(dist.Normal(torch.zeros(ROWS), 1.0)), ["raises", "events-differ"]),
    "another shape": (Guide(normal(1)), ["shapes-differ"]),
}


@pytest.mark.parametrize("case", GUIDES)
def test_guides(case: str) -> None:
    guide, found = GUIDES[case]
    assert codes(Latent(), guide, torch.randn(ROWS, 2)) == found


def test_a_latent_that_is_summed_out_needs_no_guide() -> None:
    def mixture(x: Tensor, infer: Any) -> None:
        with plate(x):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=infer)
            pyro.sample("x", dist.Normal(k * 2.0, 1.0), obs=x)

    x = torch.randn(ROWS)
    assert codes(mixture, None, x, {}) == ["free-latent"]
    assert codes(mixture, None, x, {"enumerate": "parallel"}) == []
    assert codes(mixture, None, x, {}, objective=ScoreMatching) == ["free-latent"]


def one(fn: Any) -> Any:
    return fn.expand([1]).to_event(1)


SUPPORTS = {
    "a normal for a beta": (dist.Beta(2.0, 2.0), dist.Normal(0.5, 0.01), True),  # whose draws happen to lie inside
    "a normal for a gamma": (dist.Gamma(2.0, 2.0), dist.Normal(0.0, 1.0), True),
    "a gamma for a gamma": (dist.Gamma(2.0, 2.0), dist.LogNormal(0.0, 1.0), False),
    "a beta for a uniform": (dist.Uniform(0.0, 1.0), dist.Beta(2.0, 2.0), False),
    "a wide uniform": (dist.Uniform(0.0, 1.0), dist.Uniform(0.0, 2.0), True),
    "inside": (dist.Normal(0.0, 1.0), dist.Uniform(0.0, 2.0), False),
    "a point outside": (dist.Gamma(2.0, 2.0), dist.Delta(torch.tensor(-1.0)), True),
    "a point inside": (dist.Gamma(2.0, 2.0), dist.Delta(torch.tensor(1.0)), False),
}


@pytest.mark.parametrize("case", SUPPORTS)
def test_supports(case: str) -> None:
    prior, guide, wrong = SUPPORTS[case]
    found = check(Latent(one(prior)), Guide(one(guide)), torch.randn(ROWS, 2))
    assert [c.code for c in found if c.code != "not-finite"] == ["support-mismatch"] * wrong
    assert all(c.site == "z" for c in found)


def test_simplex_and_the_reals() -> None:
    prior = dist.Dirichlet(torch.ones(2))
    assert "support-mismatch" in codes(Latent(prior), Guide(normal(2)), torch.randn(ROWS, 2))
    assert codes(Latent(prior), Guide(dist.Dirichlet(torch.ones(2) * 3)), torch.randn(ROWS, 2)) == []


def test_draws_that_are_not_reparameterized() -> None:
    prior, x = one(dist.Poisson(2.0)), torch.randn(ROWS, 2)
    assert codes(Latent(prior), Guide(prior), x) == ["rough-draws"]
    assert codes(Latent(prior), Guide(prior), x, objective=ScoreMatching) == []


# -------------------------------------------------------------------------------------------------- where the data are
def test_where_x_is() -> None:
    held, shift = torch.randn(ROWS, 2), nn.Parameter(torch.zeros(()))

    def nothing(x: Tensor) -> None:
        with plate(x):
            pyro.deterministic("x", x, event_dim=1)

    def observing(*values: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
        def model(x: Tensor) -> None:
            pyro.param("shift", shift)
            with plate(x):
                for i, value in enumerate(values):
                    v = value(x)
                    pyro.sample(f"x{i}", normal(v.shape[-1]), obs=v)

        return model

    x = torch.randn(ROWS, 2)
    assert codes(nothing, None, x) == ["nothing-observed"]
    assert codes(observing(lambda x: x), None, x) == []
    assert codes(observing(lambda x: x, lambda x: x), None, x) == ["observed-twice"]
    halves = observing(lambda x: x[:, :1], lambda x: x[:, 1:])
    assert codes(halves, None, x) == []
    assert codes(halves, None, x, objective=ScoreMatching) == ["observed-in-parts"]
    assert codes(observing(lambda x: held), None, x) == ["batch-unused"]
    assert codes(observing(lambda x: x.sinh()), None, x) == ["transformed-data"]
    assert codes(observing(lambda x: x.exp() * shift), None, x) == ["learnt-data"]
    for copied in (lambda x: x.t().contiguous().t(), lambda x: x.clone(), lambda x: x.flip(1)):
        assert codes(observing(copied), None, x) == []


def test_data_outside_the_support() -> None:
    def model(x: Tensor, mask: Any = True) -> None:
        with plate(x), poutine.mask(mask=torch.as_tensor(mask)):
            pyro.sample("x", dist.Exponential(1.0), obs=x)

    x = torch.tensor([1.0, -1.0, 2.0])
    (found,) = check(model, None, x)
    assert found.code == "outside-support"
    assert "(1,)" in str(found)
    assert codes(model, None, x, x > 0) == codes(model, None, x.abs()) == []


# ------------------------------------------------------------------------------------------------------------ training
class Methods(nn.Module):
    """Model and guide as two methods of one module."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.encode, self.decode, self.named = nn.Linear(2, 2), nn.Linear(2, 2), named

    def model(self, x: Tensor) -> None:
        if self.named:
            pyro.module("decode", self.decode)
        with plate(x):
            z = pyro.sample("z", normal(2))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        if self.named:
            pyro.module("encode", self.encode)
        with plate(x):
            pyro.sample("z", dist.Normal(self.encode(x), 1.0).to_event(1))


def test_parameters_that_no_trainer_finds() -> None:
    x, lost = torch.randn(ROWS, 2), Methods(named=False)
    (found,) = check(lost.model, lost.guide, x)
    assert found.code == "unseen-parameters"
    assert "two methods of one Methods" in str(found)
    named = Methods(named=True)
    assert codes(named.model, named.guide, x) == []
    net = nn.Linear(2, 2)

    def closure(x: Tensor) -> None:
        with plate(x):
            pyro.sample("x", dist.Normal(net(torch.ones(2)), 1.0).to_event(1), obs=x)

    (found,) = check(closure, None, x)
    assert found.code == "unseen-parameters"
    assert found.site in ("weight", "bias")


def test_modules_are_found_behind_functions() -> None:
    net, other = nn.Linear(1, 1), nn.Linear(1, 1)

    def inner(x: Tensor) -> Any:
        return inner if x is None else net(x)  # a closure that holds itself

    class Called:
        def __init__(self) -> None:
            self.net = other

        def __call__(self, x: Tensor) -> None: ...

    wrapped = poutine.block(partial(inner, other))
    assert {id(m) for m in modules_of(wrapped)} == {id(net), id(other)}
    assert modules_of(Called()) == modules_of(Called().net) == [other]
    assert modules_of(Methods(named=True).model)[0].named
    assert modules_of(len) == []


def test_parameters_without_a_gradient() -> None:
    model, x = Latent(), torch.randn(ROWS, 2)
    model.idle = nn.Parameter(torch.zeros(3))
    (found,) = check(model, Guide(), x)
    assert (found.code, found.site) == ("unreached-parameters", "model.idle")
    model.idle.requires_grad_(False)
    assert codes(model, Guide(), x) == []


def test_what_is_not_finite_names_its_site() -> None:
    def model(x: Tensor, scale: Any = 1.0, root: bool = False) -> None:
        w = pyro.param("w", torch.zeros(()))
        loc = w.square().sqrt() if root else w
        with plate(x):
            pyro.sample("fine", dist.Normal(w, 1.0), obs=x)
            pyro.sample("bad", dist.Normal(loc, torch.as_tensor(scale)), obs=x[:, None].squeeze(-1).exp())

    def wide(x: Tensor, scale: float) -> None:
        w = pyro.param("w", torch.zeros(()))
        with plate(x):
            pyro.sample("x", dist.Normal(w, scale * (w + 1)), obs=x)

    def rooted(x: Tensor, power: float) -> None:
        w = pyro.param("w", torch.zeros(()))
        with plate(x):
            pyro.sample("x", dist.Normal(w.square().pow(power), 1.0), obs=x)

    x = torch.randn(ROWS)
    (found,) = check(wide, None, x, float("nan"))
    assert (found.code, found.site) == ("not-finite", "x")
    assert "scale" in str(found)
    (found,) = check(rooted, None, x, 0.5)  # d√w² at 0 is 0/0
    assert (found.code, found.site) == ("gradient-not-finite", "x")
    assert codes(wide, None, x, 1.0) == codes(rooted, None, x, 1.0) == []
    x[2] = float("nan")
    (found,) = check(wide, None, x, 1.0)
    assert (found.code, found.site) == ("not-finite", "x")
    assert "(2,)" in str(found)


def test_a_mask_that_hides_a_nan_from_the_value_and_not_from_the_gradient() -> None:
    def model(x: Tensor, seen: Tensor) -> None:
        w = pyro.param("w", torch.zeros(()))
        with plate(x), poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    x, seen = torch.tensor([1.0, float("nan")]), torch.tensor([True, False])
    assert codes(model, None, x, seen) == ["gradient-not-finite"]
    assert codes(model, None, x.nan_to_num(), seen) == []


def test_what_is_raised_is_kept() -> None:
    def model(x: Tensor) -> None:
        raise RuntimeError("no such thing")

    def scoreless(x: Tensor) -> None:
        flow = dist.TransformedDistribution(normal(2), [T.Planar(2)])
        with plate(x):
            pyro.sample("x", flow, obs=x)

    (found,) = check(model, None, torch.randn(ROWS, 2))
    assert found.code == "raises"
    assert isinstance(found.error, RuntimeError)
    assert "no such thing: run it" in str(found)  # without the table of shapes that Pyro appends
    assert found.site is None
    found = check(scoreless, None, torch.randn(ROWS, 2))[0]
    assert (found.code, found.site) == ("raises", "x")


def test_what_the_objective_refuses() -> None:
    program, x = VAE(2, latent_dim=1, hidden=(4,)), torch.randn(ROWS, 2)
    (found,) = check(program, x, objective=MaximumLikelihood())
    assert found.code == "refused"
    assert "Exact" in str(found)
    assert codes(program, x, objective=ELBO()) == []


# ------------------------------------------------------------------------------------------------------------- devices
class Placed(nn.Module):
    """A table that follows its module, or one that stays on the CPU."""

    def __init__(self, held: bool, use: str = "product") -> None:
        super().__init__()
        self.use, table = use, torch.eye(2)
        self.register_buffer("table", table) if held else object.__setattr__(self, "table", table)

    def forward(self, x: Tensor) -> None:
        loc = {"product": lambda: x @ self.table, "index": lambda: self.table[x.long().clamp(0, 1)[:, 0]]}[self.use]()
        with plate(x):
            pyro.sample("x", dist.Normal(loc.detach(), x.new_ones(2)).to_event(1), obs=x)


@pytest.mark.parametrize("use", ["product", "index"])
def test_tables_that_stay_on_the_cpu(use: str) -> None:
    x = torch.randn(ROWS, 2)
    (found,) = check(Placed(False, use), None, x, device="cuda")
    assert found.code == "left-behind"
    assert "test_complaints.py" in str(found)
    assert "buffer" in str(found)
    assert codes(Placed(True, use), None, x, device="cuda") == []
    assert codes(Placed(False, use), None, x) == []  # all on the CPU: nothing is wrong


def test_literals_in_priors() -> None:
    model = regression(1)()
    batch = torch.randn(ROWS, 3), torch.randn(ROWS)
    found = check(model, autoguide.AutoNormal(model), *batch, device="cuda")
    assert [c.code for c in found] == ["left-behind"]
    assert found[0].site in ("scale", "linear.weight")


def test_what_cannot_be_looked_at_is_said() -> None:
    def model(x: Tensor) -> None:
        if float(x.sum()) < float("inf"):
            with plate(x):
                pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    assert codes(model, None, torch.randn(ROWS), device="cuda") == ["devices-not-checked"]


def test_a_beta_has_no_draws_on_meta_and_is_looked_at_all_the_same() -> None:
    model, guide = Latent(one(dist.Beta(2.0, 2.0))), Guide(one(dist.Beta(2.0, 2.0)))
    assert codes(model, guide, torch.randn(ROWS, 2), device="cuda") == ["left-behind"]  # its priors are no buffers


# ---------------------------------------------------------------------------------------------- programs that are right
@pytest.mark.filterwarnings("ignore:.*feature by feature")  # said of the flow built for sampling
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_programs_of_the_contracts(case: Case) -> None:
    for local in (False, True):
        with pyro.settings.context(module_local_params=local):
            program, batch = case.build()
            device = None if case.store == "always" else "cuda"  # what `pyro.param` makes, it makes on the CPU
            assert check(program, *batch, device=device) == []
            for name in objectives_of(case)[:2]:
                assert check(program, *batch, objective=OBJECTIVES[name]) == []


@config_enumerate
def gaussian_mixture(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(3)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[k], scale), obs=x)


def topics(words: Tensor) -> None:
    with pyro.plate("topics", 4):
        weights = pyro.sample("weights", dist.Gamma(0.25, 1.0))
        terms = pyro.sample("terms", dist.Dirichlet(torch.ones(16) / 16))
    with pyro.plate("documents", words.shape[1]):
        mix = pyro.sample("mix", dist.Dirichlet(weights))
        with pyro.plate("words", len(words)):
            topic = pyro.sample("topic", dist.Categorical(mix), infer={"enumerate": "parallel"})
            pyro.sample("term", dist.Categorical(terms[topic]), obs=words)


def schools(x: Tensor) -> None:
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with plate(x):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def flow(x: Tensor, transform: Any = T.spline_coupling(2, count_bins=4)) -> None:  # noqa: B008  one for all calls
    pyro.module("transform", transform)
    with plate(x):
        pyro.sample("x", dist.TransformedDistribution(normal(2), [transform]), obs=x)


GUIDED = [
    autoguide.AutoDelta,
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
    autoguide.AutoIAFNormal,
]


@pytest.mark.parametrize("make", GUIDED, ids=lambda make: make.__name__)
def test_models_as_pyro_has_them(make: Any) -> None:
    x = torch.randn(12)
    for model, latents, batch in (
        (gaussian_mixture, ["weights", "scale", "loc"], (x,)),
        (topics, ["weights", "terms", "mix"], (torch.randint(16, (9, 5)),)),
        (schools, ["mu", "tau", "theta"], (x,)),
        (regression(1)(), None, (torch.randn(12, 3), x)),
    ):
        shown = model if latents is None else poutine.block(model, expose=latents)
        assert check(model, make(shown), *batch) == []


def test_flows_and_autoencoders_as_pyro_has_them() -> None:
    assert check(flow, None, torch.randn(ROWS, 2)) == []
    vae = Methods(named=True)
    assert check(vae.model, vae.guide, torch.randn(ROWS, 2), objective=Trace_ELBO()) == []


# --------------------------------------------------------------------------------------------------- leaves no trace
class Running(nn.Module):
    """Running statistics, and numbers drawn in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Dropout(0.5))
        self.calls: list[float] = []

    def forward(self, x: Tensor) -> None:
        self.calls.append(random.random() + np.random.rand())  # noqa: NPY002  the generators that are shared
        scale = torch.ones(2)
        if not pyro.settings.get("module_local_params"):  # where an autoguide's model may not have one
            scale = pyro.param("scale", lambda: torch.rand(2) + 1)
        with plate(x):
            z = pyro.sample("z", normal(2))
            pyro.sample("x", dist.Normal(self.net(z), scale).to_event(1), obs=x)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_everything_is_as_it_was(local: bool, used: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        model, x = Running(), torch.randn(ROWS, 2)
        guide = autoguide.AutoNormal(model)
        if used:
            Trace_ELBO()(model, guide)(x).backward()
        else:
            pyro.param("mine", torch.ones(2))
        mode, state = model.net.training, copy.deepcopy(model.state_dict())
        attributes, calls = set(guide.__dict__), len(model.calls)
        lazy = [n for n, _ in guide.named_parameters()]
        store = dict(pyro.get_param_store()._params)
        gradients = [p.grad for p in model.parameters()]
        generators = get_rng_state()
        check(model, guide, x, objective=ELBO(), device="cuda")
        now = get_rng_state()
        assert torch.equal(now["torch"], generators["torch"])
        assert now["random"] == generators["random"]
        assert np.array_equal(now["numpy"][1], generators["numpy"][1])
        assert model.net.training == mode
        assert len(model.calls) == calls
        assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
        assert set(guide.__dict__) == attributes
        assert [n for n, _ in guide.named_parameters()] == lazy
        now = dict(pyro.get_param_store()._params)
        assert now.keys() == store.keys()
        assert all(now[n] is t for n, t in store.items())
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert all(not p.is_meta for p in model.parameters())
        assert not x.requires_grad
        first = check(model, guide, x)  # and again the same
        assert first == check(model, guide, x)
        assert Trace_ELBO()(model, guide)(x).isfinite()


def test_a_lazy_guide_starts_afterwards_as_if_never_run() -> None:
    def init(checked: bool) -> Tensor:
        with pyro.get_param_store().scope(), torch.random.fork_rng():
            torch.manual_seed(3)
            guide = autoguide.AutoNormal(schools, init_loc_fn=autoguide.initialization.init_to_sample)
            if checked:
                check(schools, guide, torch.ones(ROWS))
            guide(torch.ones(ROWS))
            return guide.median(torch.ones(ROWS))["theta"].detach()

    assert torch.equal(init(False), init(True))


# ------------------------------------------------------------------------------------------------------------ arguments
def test_arguments() -> None:
    x = torch.randn(ROWS, 2)
    with pytest.raises(TypeError, match=r"check\(model, None, x\)"):
        check(Latent(), x)
    with pytest.raises(TypeError, match="guide must be callable"):
        check(Latent(), 3, x)
    with pytest.raises(TypeError, match="objective must be"):
        check(Latent(), Guide(), x, objective="elbo")
    with pytest.raises(TypeError, match="a program, or a model and a guide"):
        check(Latent, Guide(), x)
    with pytest.raises(TypeError, match="meta device"):
        check(Latent(), Guide(), x.to("meta"))
    with pytest.raises(TypeError, match="x must be a tensor"):
        check(Bounded(Latent(), Guide(), 2), None)


def test_complaints_read_as_sentences() -> None:
    found = check(Energy(), None, torch.randn(ROWS, 2))[0]
    assert isinstance(found, Complaint)
    assert hash(found) == hash(copy.copy(found))
    assert str(found).count("\n") == 0
    assert len(str(found)) < 600
    assert "matters for pg.ELBO" in str(found)
    assert len({look.__name__ for look in LOOKS}) == len(LOOKS)
    assert all(look.__doc__ for look in LOOKS)


def test_parameters_of_pyro_modules_are_named() -> None:
    class Model(PyroModule):  # type: ignore[misc, no-any-unimported, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.scale = PyroParam(torch.ones(2))

        def forward(self, x: Tensor) -> None:
            with plate(x):
                pyro.sample("x", normal(2), obs=x)
                energy("energy", lambda x: (self.scale * x**2).sum(-1), x)

    for local in (False, True):
        with pyro.settings.context(module_local_params=local):
            (found,) = check(Model(), None, torch.randn(ROWS, 2))
            assert "model.scale" in str(found)
