"""The generative adversarial network as a program: draws, units, encoders, contexts, what it refuses, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen.base import Implicit
from pyro_gen.objectives.adversarial import Adversarial
from pyro_gen.programs.gan import GAN

SMALL: dict[str, Any] = {"latent_dim": 2, "hidden": (6,)}


def test_draws_are_the_network_of_the_prior() -> None:
    gan = GAN(3, **SMALL)
    x = torch.zeros(5, 3)
    trace = poutine.trace(poutine.uncondition(gan.model)).get_trace(x)
    z, drawn = trace.nodes["z"]["value"], trace.nodes["x"]["value"]
    assert torch.equal(drawn, gan.generate(z))
    assert z.shape == (5, 2)
    assert gan.generate(torch.zeros(4, 7, 2)).shape == (4, 7, 3)


def test_data_that_are_given_have_density_only_where_the_network_puts_them() -> None:
    gan = GAN(3, **SMALL)
    trace = poutine.trace(poutine.condition(gan.model, {"z": torch.zeros(5, 2)})).get_trace(torch.ones(5, 3))
    trace.nodes["x"]["log_prob"] = trace.nodes["x"]["fn"].log_prob(trace.nodes["x"]["value"])
    assert bool((trace.nodes["x"]["log_prob"] == -torch.inf).all())


def test_networks_work_in_units_of_the_data_whatever_these_are() -> None:
    """Data in other units, x' = a + b x, feature by feature: the same logits, and draws that move with them."""
    torch.manual_seed(0)
    x, move, stretch = torch.randn(50, 3).double(), torch.tensor([1e3, 0.0, -5.0]).double(), torch.tensor([1e-3, 1, 50])
    one = GAN(3, spectral_norm=True, encoder="mlp", **SMALL).double().eval()
    other = GAN(3, spectral_norm=True, encoder="mlp", **SMALL).double().eval()
    other.load_state_dict(one.state_dict())
    one.initialise(x)
    other.initialise(move + stretch * x)
    assert torch.allclose(other.sample(9, seed=1), move + stretch * one.sample(9, seed=1))
    z = torch.randn(50, 2).double()
    assert torch.allclose(one.guide.judge(x, z), other.guide.judge(move + stretch * x, z), atol=1e-9)
    assert torch.allclose(one.encode(x).mean, other.encode(move + stretch * x).mean, atol=1e-9)
    losses = []
    for gan, data in ((one, x), (other, move + stretch * x)):  # penalties too: gradients in the critic's units
        torch.manual_seed(3)
        losses.append(torch.stack(Adversarial(r1=1.0, r2=0.5, gradient_penalty=2.0)(gan).losses(data)))
    assert torch.allclose(losses[0], losses[1])
    assert not torch.allclose(one.guide.judge(x, z), one.guide.judge(move + stretch * x, z), atol=1e-3)


def test_units_are_placed_once_and_a_constant_feature_keeps_its_own() -> None:
    gan = GAN(2, **SMALL)
    x = torch.stack([torch.full((20,), 7.0), torch.linspace(0, 1, 20)], 1)
    gan.initialise(x)
    assert gan.model.units.scale[0] == 1
    assert gan.model.units.location[0] == 7
    gan.initialise(x + 1)
    assert gan.model.units.location[0] == 7


def test_spectral_norm_bounds_every_layer() -> None:
    gan = GAN(3, spectral_norm=True, latent_dim=2, hidden=(20, 20))
    with torch.no_grad():
        for layer in gan.guide.network.modules():
            if isinstance(layer, nn.Linear):
                layer.parametrizations.weight.original.mul_(30)  # type: ignore[union-attr, operator]
    x = torch.randn(64, 3)
    for _ in range(200):  # power iteration
        gan.guide.judge(x)
    layers = [layer for layer in gan.guide.network.modules() if isinstance(layer, nn.Linear)]
    largest = [float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in layers]
    assert len(largest) == 3
    assert max(largest) < 1.01
    y = x + 1e-2 * torch.randn(64, 3)
    steepest = ((gan.guide.judge(x) - gan.guide.judge(y)).abs() / (x - y).norm(dim=1)).max()
    assert float(steepest.detach()) <= 1.01  # products of norms and slopes of at most 1


def test_a_given_encoder_is_a_point_mass_or_a_normal() -> None:
    x = torch.randn(4, 3)
    point = GAN(3, latent_dim=2, encoder=nn.Linear(3, 2)).encode(x)
    normal = GAN(3, latent_dim=2, encoder=nn.Linear(3, 4)).encode(x)
    assert torch.equal(point.mean, point.sample())
    assert not torch.equal(normal.mean, normal.sample())
    with pytest.raises(ValueError, match=r"encoder must give z, of shape \(4, 2\)"):
        GAN(3, latent_dim=2, encoder=nn.Linear(3, 3)).encode(x)
    with pytest.raises(ValueError, match="no encoder"):
        GAN(3, **SMALL).encode(x)


def test_contexts_reach_generator_and_critic() -> None:
    gan = GAN((1, 2), context_shape=(2, 2), encoder="mlp", **SMALL)
    x, one, two = torch.randn(4, 1, 2), torch.zeros(4, 2, 2), torch.ones(4, 2, 2)
    gan.initialise(x, torch.randn(4, 2, 2))
    assert not torch.equal(gan.sample(4, one, seed=0), gan.sample(4, two, seed=0))
    assert not torch.equal(gan.encode(x, one).mean, gan.encode(x, two).mean)
    z = torch.zeros(4, 2)
    assert not torch.equal(gan.guide.judge(x, z, one), gan.guide.judge(x, z, two))
    with pytest.raises(ValueError, match="context is missing"):
        gan.sample(4)


class TwoLogits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.sum(-1), -x.sum(-1)], -1)


def test_bad_arguments_are_named() -> None:
    for options, error, words in (
        ({"latent_dim": 0}, ValueError, "latent_dim must be an int of at least 1"),
        ({"generator": "mlp"}, TypeError, "generator must be a torch module"),
        ({"critic": TwoLogits}, TypeError, "critic must be a torch module"),
        ({"encoder": "cnn"}, ValueError, "encoder must be"),
        ({"prior": "mixture"}, ValueError, "prior must be"),
        ({"hidden": 5}, ValueError, "hidden must be"),
        ({"prior": "uniform", "encoder": "mlp"}, ValueError, "gives z anywhere"),
        ({"spectral_norm": 1}, ValueError, "spectral_norm must be"),
        ({"critic": nn.Linear(2, 1), "spectral_norm": True}, ValueError, "in your own wrap the layers"),
    ):
        with pytest.raises(error, match=words):
            GAN(2, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"critic must give one logit a row.*got shape \(4, 2\).*two classes"):
        Adversarial()(GAN(2, critic=TwoLogits()))(torch.randn(4, 2))
    with pytest.raises(ValueError, match="generator must give 2 numbers a row"):
        GAN(2, latent_dim=3, generator=nn.Linear(3, 5)).sample(3)
    with pytest.raises(ValueError, match=r"z must be a tensor of shape \(\.\.\., 2\)"):
        GAN(2, **SMALL).generate(torch.zeros(3, 5))


def test_what_needs_a_density_is_refused() -> None:
    gan, x = GAN(2, **SMALL), torch.randn(4, 2)
    for name in ("log_prob", "log_density", "lower_bound", "score", "distribution", "target"):
        assert not hasattr(gan, name)
        with pytest.raises(TypeError, match=f"has no {name}.*two-sample"):
            getattr(gan, name)
    with pytest.raises(TypeError, match="can only be sampled"):
        pg.log_evidence(gan, x, method=pg.ImportanceSampling(10))
    with pytest.raises(TypeError, match="GAN"):
        pg.log_normalizer(gan, method=pg.AnnealedImportanceSampling())  # type: ignore[arg-type]
    for objective in (pg.ELBO(), pg.ScoreMatching(), pg.MaximumLikelihood()):
        with pytest.raises(TypeError, match="is Implicit"):
            objective(gan)  # type: ignore[arg-type, call-overload]
    with pytest.raises(ValueError, match="left free"):
        pg.ScoreMatching()(gan.model, gan.guide)(x)
    with pytest.raises(AttributeError, match="no attribute 'something'"):
        gan.something  # noqa: B018
    assert isinstance(gan, Implicit)


def test_a_fit_is_saved_and_read_back(tmp_path: Path) -> None:
    x = torch.randn(64, 2) * 3 + 1
    objective = Adversarial("hinge", r1=0.5, critic_steps=2)
    gan = GAN(2, encoder="mlp", spectral_norm=True, prior="student_t", **SMALL)
    result = pg.fit(objective(gan), x, steps=4, seed=0, progress=False)
    result.save(tmp_path)
    again = GAN(**{n: tuple(v) if isinstance(v, list) else v for n, v in (gan.config or {}).items()})
    read = pg.load(tmp_path, into=Adversarial(**objective.settings())(again))
    assert torch.equal(again.sample(5, seed=0), gan.sample(5, seed=0))
    assert repr(read.module.objective) == repr(objective)
    assert [f"loss.{i}" in result.history for i in range(3)] == [True, True, False]


def test_a_loaded_gan_comes_from_the_table_of_classes(tmp_path: Path) -> None:
    if not hasattr(pg, "GAN"):
        pytest.skip("pg.GAN is not exported yet")
    gan = GAN(2, **SMALL)
    pg.fit(Adversarial()(gan), torch.randn(32, 2), steps=2, seed=0, progress=False).save(tmp_path)
    assert torch.equal(pg.load(tmp_path).program.sample(4, seed=1), gan.sample(4, seed=1))  # type: ignore[attr-defined]
