"""Denoising score matching: its options, its state, the ways to train by it, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_gen as pg
from pyro_gen.compiled import CompiledStep
from pyro_gen.objectives.denoising import DenoisingScoreMatching
from pyro_gen.objectives.sigma_choice import choose_sigma
from pyro_gen.programs.ebm import EBM


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def normal(x: Tensor) -> None:
    precision = pyro.param("precision", lambda: x.new_ones(()))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("x", dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1).mask(False), obs=x)
        pyro.factor("energy", -0.5 * precision * x.square().sum(-1))


def test_a_ladder_is_geometric() -> None:
    levels = DenoisingScoreMatching(sigmas=(0.1, 10.0), levels=3).levels
    assert levels == pytest.approx([0.1, 1.0, 10.0])
    assert DenoisingScoreMatching(sigmas=(1.0, 0.5)).levels == [1.0, 0.5]


def test_float64_gives_float64() -> None:
    module: Any = DenoisingScoreMatching(sigmas=(0.1, 1.0), relative=True)(normal)
    loss = module(torch.randn(6, 2, dtype=torch.float64))
    assert loss.dtype == torch.float64
    assert float(module.levels[0]) == 0.1  # from the number itself, not from its float32


def test_relative_levels_are_of_the_first_batch() -> None:
    x = torch.randn(50, 2) * torch.tensor([1.0, 10.0])
    module: Any = DenoisingScoreMatching(0.3, relative=True)(normal)
    module(x)
    torch.testing.assert_close(module.spread, x.std(0, unbiased=False))
    module(100 * x)
    torch.testing.assert_close(module.spread, x.std(0, unbiased=False))


def test_steps_of_svi_and_traced() -> None:
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1))
    svi = pyro.infer.SVI(
        normal, lambda x: None, pyro.optim.Adam({"lr": 0.02}), loss=DenoisingScoreMatching(0.5, antithetic=True)
    )
    for _ in range(200):
        svi.step(x)
    # 1 / (v + σ²); its standard error at 2000 rows and fresh noise at each step is about √(2/2000) of it
    expected = 1 / (float(x.square().mean()) + 0.25)
    assert abs(float(pyro.param("precision").detach()) / expected - 1) < 4 * math.sqrt(2 / 2000)
    module = DenoisingScoreMatching(sigmas=(0.1, 1.0), levels=4)(EBM(1, hidden=(4,)))
    module.prepare(x[:8])
    step = CompiledStep(module, inductor=False)
    torch.manual_seed(3)
    found = step((x[:8],), 100, 100)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(found, (module(x[:8], total=100) / 100).detach())


@pytest.mark.parametrize("condition", [None, True])
def test_the_level_is_the_last_entry_of_the_context(condition: bool | None) -> None:
    seen: list[Tensor] = []

    def energy(x: Tensor, context: Tensor) -> Tensor:
        seen.append(context.detach())
        return (x.square() * context.exp()).sum(-1)

    program = EBM(2, energy, context_shape=1)
    objective = DenoisingScoreMatching(sigmas=(0.1, 1.0), condition=condition)
    objective(program)(torch.randn(8, 2))
    assert sorted(seen[-1].exp().flatten().tolist()) == pytest.approx([0.1] * 4 + [1.0] * 4)
    if condition:
        pair = EBM(2, lambda x, c: seen.append(c.detach()) or x.square().sum(-1), context_shape=2)
        context = torch.full((8, 1), 7.0)
        objective(pair)(torch.randn(8, 2), context)
        assert seen[-1].shape == (8, 2)
        assert bool((seen[-1][:, 0] == 7).all())
        objective(pair)(torch.randn(8, 2), torch.cat([context, context], 1))
        assert bool((seen[-1][:, 0] == 7).all())
        assert not bool((seen[-1][:, 1] == 7).any())


def test_a_fit_takes_x_alone_where_the_level_is_the_context(tmp_path: Path) -> None:
    x = torch.randn(300, 2)
    program = EBM(2, context_shape=1, hidden=(4,))
    objective = DenoisingScoreMatching(sigmas=(0.1, 1.0), levels=3)
    result = pg.fit(objective(program), x, steps=3, batch_size=32, validation=0.1, seed=0, progress=False)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=32)
    pg.fit(objective(EBM(2, context_shape=1, hidden=(4,))), loader, steps=2, seed=0, progress=False)
    result.save(tmp_path / "run")
    again = pg.load(tmp_path / "run").program
    level = torch.full((5, 1), math.log(0.1))
    torch.testing.assert_close(again.log_density(x[:5], level), program.log_density(x[:5], level))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="context is missing"):
        pg.fit(DenoisingScoreMatching(0.1)(program), x, steps=1, progress=False)
    with pytest.raises(ValueError, match="finite"):
        pg.fit(objective(program), x / 0, steps=1, progress=False)
    with pytest.raises((TypeError, ValueError), match="shape"):
        pg.fit(objective(program), x[:, :1], steps=1, progress=False)


def test_a_fit_measures_relative_levels_on_all_rows(tmp_path: Path) -> None:
    x = torch.randn(300, 2) * torch.tensor([1.0, 10.0])
    one: Any = DenoisingScoreMatching(0.3, relative=True)(EBM(2, hidden=(4,)))
    pg.fit(one, x, steps=3, batch_size=16, validation=False, seed=0, progress=False).save(tmp_path / "run")
    torch.testing.assert_close(one.spread, x.std(0, unbiased=False))
    other: Any = pg.load(tmp_path / "run").module
    for module in (one, other):
        torch.manual_seed(1)
        module.found = module(5 * x)
    torch.testing.assert_close(one.found, other.found)


def test_context_of_the_data_stays_theirs() -> None:
    program = EBM(2, lambda x, c: (x.square() * c).sum(-1), context_shape=1)
    loss = DenoisingScoreMatching(sigmas=(0.1, 1.0))(program)(torch.randn(8, 2), torch.ones(8, 1))
    assert bool(torch.isfinite(loss))


def test_sigma_is_chosen_on_clean_rows() -> None:
    x = torch.randn(600, 1, generator=torch.Generator().manual_seed(2))

    def train(sigma: float) -> pg.Exact:  # what denoising at σ gives with data without end
        return pg.Exact(lambda x: spread_out(x, math.sqrt(1 + sigma**2)), 1)

    found = choose_sigma(train, x, (2.0, 0.1, 0.7), pg.MaximumLikelihood())
    assert found.sigma == 0.1
    assert found.differences[1] == 0 == found.standard_errors[1]
    assert found.differences[0] > 4 * found.standard_errors[0] > 0
    with pytest.raises(TypeError, match="another least value"):
        choose_sigma(train, x, (0.1,), DenoisingScoreMatching(0.1))
    with pytest.raises(ValueError, match="must not be random"):
        choose_sigma(train, x, (0.1,), pg.ELBO())
    for sigmas in ((), (0.0,)):
        with pytest.raises(ValueError, match="sigmas"):
            choose_sigma(train, x, sigmas, pg.MaximumLikelihood())


def spread_out(x: Tensor, scale: float) -> None:
    with pyro.plate("data", x.shape[0]):
        pyro.sample("x", dist.Normal(x.new_zeros(1), scale).to_event(1), obs=x)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sigma": 0.1, "sigmas": (0.1, 1.0)}, "give sigma="),
    *(({"sigma": value}, "sigma must be positive") for value in (0.0, -1.0, math.inf, math.nan, True, "a")),
    ({"sigmas": (0.1, 0.0)}, "sigmas must be positive"),
    ({"sigmas": ()}, "sequence of numbers"),
    ({"sigmas": (0.1, 0.5, 1.0), "levels": 3}, "two different numbers"),
    ({"sigma": 0.1, "levels": 3}, "two different numbers"),
    ({"sigmas": (0.1, 1.0), "levels": 1}, "at least 2"),
    ({"sigmas": (0.1, 1.0), "mixture": (1.0,)}, "one share for each"),
    ({"sigmas": (0.1, 1.0), "mixture": (1.0, -1.0)}, "mixture must be positive"),
    ({"sigmas": (0.1, 1.0), "mixture": (1.0, 1.0), "condition": True}, "each has its own"),
    ({"sigma": 0.1, "condition": "yes"}, "condition must be"),
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DenoisingScoreMatching(**options)


def at(site: Any) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", site, obs=x)

    return model


HALF = torch.full((2,), 0.5)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (at(dist.Bernoulli(HALF).to_event(1)), "is discrete"),
        (at(dist.Exponential(HALF).to_event(1)), "out of the support"),
        (at(dist.Uniform(0 * HALF, 2.0 + HALF).to_event(1)), "out of the support"),
    ],
)
def test_refused(model: Callable[[Tensor], None], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DenoisingScoreMatching(0.1)(model)(torch.ones(4, 2))


def test_refused_programs() -> None:
    with pytest.raises(ValueError, match="needs a context_shape"):
        DenoisingScoreMatching(0.1, condition=True)(EBM(2))(torch.randn(4, 2))
    with pytest.raises(TypeError, match="needs a program of kind Unnormalized"):
        DenoisingScoreMatching(0.1)(pg.VAE(2, latent_dim=1, hidden=(3,)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one row"):
        DenoisingScoreMatching(0.1, relative=True)(normal)(torch.ones(1, 2))
