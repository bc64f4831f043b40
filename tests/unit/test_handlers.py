"""What is asked of a Pyro program: each answer against one worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

from pyro_gen import handlers
from pyro_gen.handlers import log_density, log_prior, log_weight, score, structure
from pyro_gen.scopes import DataScale

N01 = -0.5 * math.log(2 * math.pi)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def normal(x: Tensor, loc: Any = 0.0, scale: Any = 1.0) -> Tensor:
    return dist.Normal(torch.as_tensor(loc), torch.as_tensor(scale)).log_prob(x)


def kinds() -> Callable[..., None]:
    def program(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * w)
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
            pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.factor("energy", -z * z)
            with poutine.mask(mask=False):
                pyro.factor("masked", z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    return program


def test_site_kinds() -> None:
    trace = poutine.trace(kinds()).get_trace(torch.zeros(4))
    found = {n: handlers.site_kind(s) for n, s in trace.nodes.items() if s["type"] == "sample"}
    assert found == {
        "w": "latent",
        "twice": "deterministic",
        "data": "subsample",
        "z": "latent",
        "u": "auxiliary",
        "energy": "factor",
        "masked": "factor",
        "x": "observed",
    }
    assert "data" not in handlers.sample_sites(trace)


# ----------------------------------------------------------------------------------------------------------- structure
def model(x: Tensor, name: str = "data") -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate(name, len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor, name: str = "data") -> None:
    pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate(name, len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def local_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


@pytest.mark.parametrize("name", ["data", "rows"])
def test_structure_of_a_pair(name: str) -> None:
    shape, tensors = structure(lambda x: model(x, name), lambda x: guide(x, name), torch.zeros(5))
    assert (shape.rows, shape.data_plate, shape.data_dim, shape.data_size, shape.plate_nesting) == (5, name, -1, 5, 1)
    assert shape.model_latents == shape.guide_latents == ("loc", "z")
    assert shape.global_sites == ("loc",)
    assert not shape.enumerated
    assert shape.reparameterized
    assert tensors == []


def test_structure_of_nested_and_subsampled_plates() -> None:
    def program(x: Tensor) -> None:
        with pyro.plate("columns", 3, dim=-2), pyro.plate("data", 10, subsample_size=4, dim=-1) as index:
            k = pyro.sample("k", dist.Poisson(torch.ones(()) * 2.0))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x[index].T)

    shape, _ = structure(program, None, torch.zeros(10, 3))
    assert (shape.data_plate, shape.data_dim, shape.data_size, shape.plate_nesting) == ("data", -1, 10, 2)
    assert shape.global_sites == ()

    def rough(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Poisson(torch.ones(()) * 2.0))

    def enumerated(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.ones(()) / 2), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    assert not structure(rough, rough, torch.zeros(4))[0].reparameterized
    assert structure(enumerated, None, torch.zeros(4))[0].enumerated == ("k",)


def test_structure_without_a_plate_over_rows() -> None:
    def program(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1), obs=x)

    shape, _ = structure(program, None, torch.zeros(4))
    assert shape.data_plate is None
    with pytest.raises(ValueError, match=r'purpose needs one value a row.*over its 4 rows.*pyro.plate\("data"'):
        shape.require_data_plate("purpose")

    def columns(x: Tensor) -> None:  # two plates of one length: which is over rows is not to be guessed
        with pyro.plate("a", 4, dim=-2), pyro.plate("b", 4, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    assert structure(columns, None, torch.zeros(4, 4))[0].data_plate is None


def test_structure_finds_parameters_of_the_store() -> None:
    def program(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    _, tensors = structure(program, None, torch.zeros(3))
    store = dict(pyro.get_param_store().named_parameters())
    assert [id(t) for t in tensors] == [id(store["loc"]), id(store["scale"])]


def test_structure_names_the_site_that_does_not_fit_its_plates() -> None:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(4, 2), 1.0), obs=x)  # .to_event(1) forgotten

    with pytest.raises(ValueError, match=r"plate\('data'\) at site x"):
        structure(program, None, torch.zeros(4, 2))


def test_rows_are_counted_by_the_first_tensor() -> None:
    assert handlers.count_rows((torch.zeros(3, 2), torch.zeros(5))) == 3
    with pytest.raises(ValueError, match="first entry"):
        handlers.count_rows((3, "x"))


def test_only_what_is_summed_out_may_be_missing_from_the_guide() -> None:
    def both(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.ones(()) / 2), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    shape, _ = structure(both, local_guide, torch.zeros(3))
    handlers.check_pair(shape, summed_out=True)
    with pytest.raises(ValueError, match="latent site 'k' of the model is not in the guide"):
        handlers.check_pair(shape)
    shape, _ = structure(both, None, torch.zeros(3))
    with pytest.raises(ValueError, match="latent site 'z' of the model is not in the guide"):
        handlers.check_pair(shape, summed_out=True)


def test_pairs_that_do_not_match_are_named() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="latent site 'z' of the model is not in the guide"):
        log_weight(local_model, lambda x: None, x)
    with pytest.raises(ValueError, match=r"guide site 'loc' is not a latent site of the model \(which has 'z'\)"):
        log_weight(local_model, guide, x)
    with pytest.raises(ValueError, match="log_weight needs one value a row, and site 'loc' stands outside"):
        log_weight(model, guide, x)


# ----------------------------------------------------------------------------------------------------------- densities
def observed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.factor("energy", -(x**4))
        with pyro.plate("two", 2, dim=-2):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x.expand(2, -1))


def test_log_density_is_the_sum_over_the_sites_of_a_row() -> None:
    x = torch.randn(4)
    torch.testing.assert_close(log_density(observed, x), -(x**4) + 2 * normal(x))


def test_log_density_applies_masks_and_no_scales() -> None:
    x, seen = torch.randn(4), torch.tensor([True, False, True, True])

    def program(x: Tensor) -> None:
        with pyro.plate("data", 12, subsample_size=4, subsample=torch.arange(4)), poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    expected = normal(x) * seen
    torch.testing.assert_close(log_density(program, x), expected)
    torch.testing.assert_close(log_density(poutine.scale(program, 7.0), x), expected)
    trace = poutine.trace(poutine.scale(program, 7.0)).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum(), 21 * expected.sum())  # what a plain trace would have given


def test_prior_and_density_make_up_the_trace() -> None:
    x = torch.randn(5)
    at = poutine.condition(model, {"loc": torch.tensor(0.3), "z": torch.randn(5)})
    torch.testing.assert_close(log_prior(at, x), normal(torch.tensor(0.3)))
    whole = poutine.trace(at).get_trace(x).log_prob_sum()
    torch.testing.assert_close(log_density(at, x).sum() + log_prior(at, x), whole)
    assert log_prior(observed, x) == 0


def test_free_latents_and_missing_plates_are_refused() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'loc', 'z' is left free.*pg\.Bounded"):
        log_density(model, x)
    with pytest.raises(ValueError, match="'loc' is left free"):
        log_prior(model, x)
    log_prior(poutine.condition(model, {"loc": torch.tensor(0.0)}), x)  # z is a row's own
    with pytest.raises(ValueError, match="no plate over its 3 rows"):
        log_density(lambda x: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x), x)


def test_asking_leaves_no_site_behind() -> None:
    x = torch.zeros(3)
    with poutine.trace() as trace:
        log_density(observed, x)
        log_weight(local_model, local_guide, x)
        log_prior(observed, x)
        score(observed, x)
    assert not [n for n, s in trace.trace.nodes.items() if s["type"] == "sample"]


def test_log_weight_by_hand() -> None:
    x = torch.randn(4)
    known, _ = structure(local_model, local_guide, x)
    for particles, shape in ((None, (4,)), (3, (3, 4))):
        torch.manual_seed(1)
        found = log_weight(local_model, local_guide, x, particles=particles, shape=known)
        torch.manual_seed(1)
        z = dist.Normal(x / 2, 0.8).expand(shape).sample()
        torch.testing.assert_close(found, normal(z) + normal(x, z) - normal(z, x / 2, 0.8))


def test_log_weight_at_the_posterior_is_the_evidence() -> None:
    x = torch.randn(6, dtype=torch.float64)

    def exact(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    found = log_weight(local_model, exact, x, particles=7)
    torch.testing.assert_close(found, normal(x, 0.0, math.sqrt(2)).expand(7, -1))


# --------------------------------------------------------------------------------------------------------------- score
def quartic(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.factor("f", -(x**4).sum(-1) + 1000.0)


@pytest.mark.parametrize("name", ["observed", "conditioned"])
def test_score_of_a_normal(name: str) -> None:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(()), 2.0).expand([3]).to_event(1), obs=x)

    def free(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(()), 2.0).expand([3]).to_event(1))

    x = torch.randn(4, 3)
    at = program if name == "observed" else lambda x: poutine.condition(free, {"x": x})(x)
    torch.testing.assert_close(score(at, x), -x / 4)


def test_score_does_not_see_the_constant_and_can_be_differentiated_again() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(score(quartic, x), -4 * x**3)
    y = x.clone().requires_grad_()
    (second,) = torch.autograd.grad(score(quartic, y).sum(), y)
    torch.testing.assert_close(second, -12 * x**2)
    with torch.no_grad():
        assert not score(quartic, y).requires_grad
    assert y.grad is None


def test_score_reaches_parameters() -> None:
    scale = torch.tensor(2.0, requires_grad=True)

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    x = torch.tensor([3.0])
    found = score(program, x)
    torch.testing.assert_close(found, -x / scale.detach() ** 2)
    found.sum().backward()
    torch.testing.assert_close(scale.grad, 2 * x[0] / scale.detach() ** 3)


# ------------------------------------------------------------------------------------------------------------- scaling
def scaled_trace(
    program: Callable[..., Any], x: Tensor, total: int | None, apply: bool = True
) -> tuple[Any, DataScale]:
    with poutine.trace() as found, DataScale("data", total, apply) as seen:
        program(x)
    return found.trace, seen


def conditioned(x: Tensor) -> None:
    poutine.condition(model, {"loc": torch.tensor(0.0), "z": x})(x)


def subsampled(x: Tensor) -> None:
    with pyro.plate("data", 20, subsample_size=5):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def test_total_scales_the_sites_of_rows_only() -> None:
    trace, seen = scaled_trace(conditioned, torch.zeros(5), 20)
    assert {n: trace.nodes[n]["scale"] for n in ("loc", "z", "x")} == {"loc": 1.0, "z": 4.0, "x": 4.0}
    assert seen.factor(5) == 4.0


def test_a_plate_that_subsamples_is_not_scaled_twice() -> None:
    trace, seen = scaled_trace(subsampled, torch.zeros(5), 20)
    assert trace.nodes["x"]["scale"] == 4.0
    assert seen.factor(5) == 4.0
    trace, seen = scaled_trace(subsampled, torch.zeros(5), 60)  # its 20 rows are a batch of 60
    assert trace.nodes["x"]["scale"] == seen.factor(5) == 12.0
    trace, seen = scaled_trace(poutine.scale(subsampled, 3.0), torch.zeros(5), None)
    assert trace.nodes["x"]["scale"] == seen.factor(5) == 12.0


def test_scales_that_are_only_noted() -> None:
    trace, seen = scaled_trace(conditioned, torch.zeros(5), 20, apply=False)
    assert trace.nodes["x"]["scale"] == 1.0
    assert seen.factor(5) == 4.0
    assert DataScale("data", 20).factor(5) == 4.0  # a fast path, which ran no site
    assert DataScale("data").factor(5) == 1.0


def test_sites_of_a_row_under_different_scales_are_refused() -> None:
    def annealed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Normal(0.0, 1.0), obs=x)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    _, seen = scaled_trace(annealed, torch.zeros(3), None, apply=False)
    with pytest.raises(ValueError, match=r"\['x', 'z'\] of a row carry different scales, 0\.5 and 1\.0"):
        seen.factor(3)
    with DataScale("data") as seen:  # a site of the guide under another scale than that of the model
        poutine.scale(local_guide, 2.0)(torch.zeros(3))
        poutine.condition(local_model, {"z": torch.zeros(3)})(torch.zeros(3))
    with pytest.raises(ValueError, match=r"carry different scales, 2\.0 and 1\.0"):
        seen.factor(3)
