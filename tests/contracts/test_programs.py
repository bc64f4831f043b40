"""Every program of `cases.py` through the promises of a program."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pyro
import pytest
from contracts.cases import CASES, Case

from pyro_gen import handlers, testing
from pyro_gen.base import Nothing, Samples, Unnormalized

pytestmark = pytest.mark.filterwarnings("ignore:.*feature by feature")  # said of the flow built for sampling


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=[False, True], ids=["global", "local"])
def local(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both of Pyro's parameter modes: parameters in the global store, or in their modules."""
    with pyro.settings.context(module_local_params=request.param):
        yield request.param


def test_shapes_in_both_precisions(case: Case) -> None:
    program, batch = case.build()
    testing.check_shapes(program, *batch)


def test_fast_path_is_the_density_of_the_trace(case: Case) -> None:
    program, batch = case.build()
    testing.check_density(program, *batch)


def test_state_comes_back(case: Case, local: bool) -> None:
    program, batch = case.build()
    testing.check_state(program, *batch)


def test_deepcopy_is_its_own(case: Case, local: bool) -> None:
    program, batch = case.build()
    testing.check_deepcopy(program, *batch)


def test_same_seed_same_draws(case: Case) -> None:
    program, batch = case.build()
    if not isinstance(program, Samples):
        pytest.skip("this kind has no sample()")
    testing.check_seeds(program, *batch[1:])


@pytest.mark.parametrize("parallel", [False, True], ids=["one by one", "at once"])
def test_predictive(case: Case, parallel: bool) -> None:
    program, batch = case.build()
    if not isinstance(program, Samples):
        pytest.skip("this kind has no sample()")
    if parallel and handlers.structure(copy.deepcopy(program.model), None, *batch)[0].global_sites:
        pytest.skip("Pyro's Predictive(parallel=True) takes the event of a latent outside of plates for a plate")
    testing.check_predictive(program, *batch, parallel=parallel)


def test_render_model(case: Case) -> None:
    pytest.importorskip("graphviz")
    program, batch = case.build()
    testing.check_render(program, *batch)
    graph = pyro.render_model(program.model, model_args=batch, render_params=True, render_distributions=True)
    assert "data" in graph.source
    if not isinstance(program.guide, Nothing):
        pyro.render_model(program.guide, model_args=batch, render_params=True)


CONTINUOUS = [case for case in CASES if isinstance(case.build()[0], Unnormalized) and not case.scoreless]


@pytest.mark.parametrize("case", CONTINUOUS, ids=lambda case: case.name)
def test_score_is_the_gradient_of_the_density(case: Case) -> None:
    program, batch = case.build()
    assert isinstance(program, Unnormalized)
    testing.check_score(program, *batch)


def test_there_are_scores_to_check() -> None:
    assert CONTINUOUS
