"""Noise-contrastive estimation: its noises, its log Z, the ways to train by it, and what it refuses."""

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
from torch.nn.functional import softplus

import pyro_gen as pg
from pyro_gen.compiled import CompiledStep
from pyro_gen.objectives.noise_contrastive import NoiseContrastive
from pyro_gen.programs.ebm import EBM


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def standard(features: int = 2) -> Any:
    return dist.Normal(torch.zeros(features), 2.0).to_event(1)


def normal(x: Tensor) -> None:
    precision = pyro.param("precision", lambda: x.new_ones(()))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("x", dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1).mask(False), obs=x)
        pyro.factor("energy", -0.5 * precision * x.square().sum(-1))


@pytest.mark.parametrize("ratio", [1, 3])
def test_rows_are_the_formula(ratio: int) -> None:
    x = torch.randn(5, 2)
    module: Any = NoiseContrastive(standard(), ratio)(normal)
    module.prepare(x)
    torch.manual_seed(4)
    rows = module.pointwise(x)
    torch.manual_seed(4)
    y = standard().sample((ratio * 5,))

    def odds(u: Tensor) -> Tensor:
        return -0.5 * u.square().sum(-1) - module.log_z - standard().log_prob(u) - math.log(ratio)

    torch.testing.assert_close(rows, softplus(-odds(x)) + softplus(odds(y)).reshape(ratio, 5).sum(0))


def test_log_z_starts_near_and_is_kept() -> None:
    x = torch.randn(400, 2)
    module: Any = NoiseContrastive(standard())(normal)
    module.prepare(x)
    # importance sampling by 1000 draws of N(0, 4): the weights have coefficient of variation below 2
    assert abs(float(module.log_z.detach()) - math.log(2 * math.pi)) < 4 * 2 / math.sqrt(1000)
    again: Any = NoiseContrastive(standard())(normal)
    again.load_state_dict({**module.state_dict(), "log_z": torch.tensor(7.0)})
    again.prepare(x)
    assert float(again.log_z.detach()) == 7.0


def test_evidence_without_data_has_no_error() -> None:
    module: Any = NoiseContrastive(standard())(normal)
    module.prepare(torch.randn(50, 2))
    evidence = module.log_normalizer()
    assert (evidence.kind, evidence.standard_error, evidence.label) == ("estimate", None, "log Z")


def test_a_network_states_no_error() -> None:
    module: Any = NoiseContrastive()(EBM(2, hidden=(32, 32)))
    assert module.log_normalizer(torch.randn(50, 2)).standard_error is None


def test_a_program_as_noise_is_copied_and_frozen() -> None:
    flow = pg.Flow(2, "linear")
    module: Any = NoiseContrastive(flow)(EBM(2, hidden=(4,)))
    x = torch.randn(50, 2)
    module(x).backward()
    assert all(p.grad is None for p in flow.parameters())
    assert not any("noise" in n for n, p in module.named_parameters() if p.requires_grad)
    before = module._noise_log_prob(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(module._noise_log_prob(x), before)


@pytest.mark.parametrize("noise", ["normal", "diagonal", None, "given", "program"])
def test_state_loads_before_the_first_call(noise: Any) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        held = {"given": standard(), "program": pg.Flow(2, "linear")}.get(noise, noise)
        return NoiseContrastive(held)(EBM(2, hidden=(4,)))

    x = torch.randn(60, 2)
    one, other = make(), make()
    pg.fit(one, x, steps=3, seed=0, progress=False)
    other.load_state_dict(one.state_dict())
    for module in (one, other):
        torch.manual_seed(1)
        module.found = module(2 * x)
    torch.testing.assert_close(one.found, other.found)


def test_a_fit_fits_the_noise_to_all_rows(tmp_path: Path) -> None:
    x = torch.randn(400, 2) * torch.tensor([1.0, 5.0])
    module: Any = NoiseContrastive("diagonal")(EBM(2, hidden=(4,)))
    whole = pg.fit(module, x, steps=4, batch_size=16, validation=False, seed=0, progress=False)
    torch.testing.assert_close(module.noise.factor, x.std(0, unbiased=False))
    whole.save(tmp_path / "run")
    again: Any = pg.load(tmp_path / "run").module
    torch.testing.assert_close(again.noise.factor, module.noise.factor)
    torch.testing.assert_close(again.log_z, module.log_z)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    x = torch.randn(64, 2)

    def run(path: Path, stop: int | None) -> Any:
        torch.manual_seed(0)
        module = NoiseContrastive()(EBM(2, hidden=(4,)))
        options: Any = {"steps": 6, "batch_size": 16, "seed": 0, "progress": False, "checkpoint": path}
        pg.fit(module, x, checkpoint_every=1, callback=lambda step, values: step == stop, **options)
        return module

    whole = run(tmp_path / "a", None)
    run(tmp_path / "b", 3)
    resumed = run(tmp_path / "b", None)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


def test_noise_beyond_the_support_counts_as_noise() -> None:
    """Half of the noise falls where f = 0: it is told from data at no cost, and log Z stays right."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", dist.Exponential(x.new_ones(1)).to_event(1).mask(False), obs=x)
            pyro.factor("energy", -2 * x.squeeze(-1))

    x = dist.Exponential(2.0).sample((4000, 1))
    module: Any = NoiseContrastive(dist.Normal(torch.zeros(1), 1.0).to_event(1))(model)
    module.prepare(x)
    optimizer = torch.optim.Adam([module.log_z], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        module(x).backward()
        optimizer.step()
    assert abs(float(module.log_z.detach()) + math.log(2)) < 4 * math.sqrt(4 / len(x))


def test_discrete_data_with_discrete_noise() -> None:
    x = torch.bernoulli(torch.full((4000, 3), 0.3))
    program = EBM(3, lambda x: -(x.sum(-1) * math.log(0.3 / 0.7)), base=None, support="binary")
    module: Any = NoiseContrastive(dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))(program)
    pg.fit(module, x, steps=400, batch_size=1000, lr=0.02, seed=0, progress=False)
    assert abs(float(module.log_z.detach()) + 3 * math.log(0.7)) < 4 * math.sqrt(4 / 1000)


def test_steps_of_svi_and_traced() -> None:
    x = torch.randn(2000, 2) / 1.5
    loss = NoiseContrastive(ratio=4)
    svi = pyro.infer.SVI(normal, lambda x: None, pyro.optim.Adam({"lr": 0.02}), loss=loss)
    for _ in range(300):
        svi.step(x)
    expected = 2 / float(x.square().sum(1).mean())
    assert abs(float(pyro.param("precision").detach()) / expected - 1) < 4 * math.sqrt(2 / 2000)
    module = NoiseContrastive()(EBM(2, hidden=(4,)))
    module.prepare(x[:8])
    step = CompiledStep(module, inductor=False)
    torch.manual_seed(3)
    found = step((x[:8],), 100, 100)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(found, (module(x[:8], total=100) / 100).detach())


class Silent(dist.TorchDistribution):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """Draws, and knows no density."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randn(*sample_shape, 2)


def test_bad_options() -> None:
    for ratio in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="ratio must be"):
            NoiseContrastive(ratio=ratio)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has no log_prob"):
        NoiseContrastive(Silent(torch.Size(), torch.Size((2,)), validate_args=False))
    with pytest.raises(TypeError, match="noise must be"):
        NoiseContrastive("uniform")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs log_prob"):
        NoiseContrastive(pg.VAE(2, latent_dim=1, hidden=(3,)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with a context"):
        NoiseContrastive(pg.Flow(2, layers=1, hidden=(4,), context_shape=1))


def at(site: Any) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", site, obs=x)

    return model


ONES, X = torch.ones(2), torch.rand(9, 2, generator=torch.Generator().manual_seed(0)) + 0.1
BAD: list[tuple[Any, Any, Tensor, str]] = [
    (standard(3), normal, X, "event shape"),
    (dist.Normal(ONES, 1.0), normal, X, "batch shape"),
    (dist.Exponential(ONES).to_event(1), normal, X, "smaller than"),
    (dist.Uniform(-9 * ONES, 9 * ONES).to_event(1), normal, X, "smaller than"),
    (dist.Bernoulli(ONES / 2).to_event(1), normal, X, "smaller than"),
    (standard(), at(dist.Bernoulli(ONES / 2).to_event(1)), X.round(), "smaller than"),
    ("normal", at(dist.Bernoulli(ONES / 2).to_event(1)), X.round(), "is continuous"),
    ("normal", normal, torch.ones(9, 2), "no spread"),
    ("normal", normal, X[:2], "no spread"),
]


@pytest.mark.parametrize(("noise", "model", "x", "said"), BAD)
def test_refused(noise: Any, model: Any, x: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NoiseContrastive(noise)(model)(x)


def test_data_that_noise_never_gives_are_no_number() -> None:
    half = at(dist.Exponential(ONES).to_event(1))
    never = dist.Categorical(logits=torch.tensor([0.0, 0.0, -math.inf]))
    module = NoiseContrastive(never)(at(dist.Categorical(torch.ones(3))))
    x = torch.tensor([0, 1, 0, 1, 2, 0, 1, 0, 1]).float()
    with pytest.raises(ValueError, match="no mass at 1 of 9 rows"):
        module(x)
    module(x[:4])  # a later batch is not looked at beforehand: its loss is no number, which stops a fit
    assert bool(torch.isnan(module.pointwise(x)[4]))
    assert bool(torch.isfinite(NoiseContrastive("diagonal")(half)(X)))


def test_a_context_is_refused() -> None:
    with pytest.raises(ValueError, match="a Z for each context"):
        NoiseContrastive()(EBM(2, context_shape=1))(X, X[:, :1])
    with pytest.raises(ValueError, match="a Z for each context"):
        NoiseContrastive()(lambda x, c: normal(x))(X, X[:, :1])
    with pytest.raises(ValueError, match="no base distribution"):
        NoiseContrastive(None)(EBM(2, base=None))(X)
