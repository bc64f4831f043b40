"""Adversarial losses: who moves, what is held, penalties, steps of the critic, averages, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen import handlers, testing
from pyro_gen.base import Bounded, Implicit
from pyro_gen.objectives import penalties
from pyro_gen.objectives.adversarial import Adversarial
from pyro_gen.objectives.adversarial_bayes import AdversarialELBO
from pyro_gen.objectives.divergences import GAMES, game
from pyro_gen.programs.gan import GAN

SMALL: dict[str, Any] = {"latent_dim": 2, "hidden": (6,)}
AUXILIARY: Any = {"is_auxiliary": True}


class Shift(nn.Module):
    """A generator as a user writes it, without a data site: what it returns are its draws."""

    def __init__(self, features: int = 2) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1))
        return self.loc + z


class Observed(Shift):
    """The same, observing x, with an explicit density."""

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            return pyro.sample("x", dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1), obs=x)


class Linear(nn.Module):
    def __init__(self, features: int = 2, outputs: int = 1) -> None:
        super().__init__()
        self.net = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("model", [Shift, Observed])
def test_any_generator_and_critic_are_played(model: type[Shift]) -> None:
    """The least difference of means that a linear critic sees: the generator goes to the mean of the data."""
    torch.manual_seed(0)
    x = torch.randn(4000, 2) + torch.tensor([1.0, -2.0])
    module = Adversarial(r1=1.0)(model(), Linear())
    pg.fit(module, x, steps=1500, batch_size=500, lr=2e-2, seed=0, progress=False, schedule="cosine")
    assert torch.allclose(module.model.loc, x.mean(0), atol=4 * math.sqrt(2 / 4000) + 0.05)


def test_svi_trains_both() -> None:
    torch.manual_seed(0)
    model, critic, x = Shift(), Linear(), torch.randn(64, 2) + 3
    svi = SVI(model, critic, Adam({"lr": 0.05}), loss=Adversarial())
    for _ in range(30):
        svi.step(x)
    assert bool((model.loc > 0.3).all())
    assert bool((critic.net.weight != 0).all())


def test_each_loss_equals_its_own_backward() -> None:
    """One backward of the sum gives each player the gradient of its own loss, to the last bit."""
    x = torch.randn(8, 3)
    module = Adversarial("relativistic", r1=0.3, gradient_penalty=1.0)(GAN(3, encoder="mlp", **SMALL))
    torch.manual_seed(1)
    module(x).backward()
    together = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    for number in (0, 1):
        module.zero_grad()
        torch.manual_seed(1)
        module.losses(x)[number].backward()
        own = {id(p) for p in module.players[number].parameters()}
        for name, parameter in module.named_parameters():
            if id(parameter) in own:
                assert parameter.grad is not None
                assert torch.equal(parameter.grad, together[name])
            else:
                assert parameter.grad is None or not bool(parameter.grad.any())


@pytest.mark.parametrize("loss", GAMES)
def test_every_loss_keeps_the_promises(loss: Any) -> None:
    module = Adversarial(loss, r1=0.1)(GAN(2, encoder="mlp", **SMALL))
    x = torch.randn(8, 2)
    testing.check_declared(module, x)
    testing.check_gradients(module, x)
    testing.check_traced(module, x)


@pytest.mark.parametrize(
    ("name", "expected"), [("r1", lambda w, k: k / 2 * w.square().sum()), ("r2", lambda w, k: k / 2 * w.square().sum()),
                           ("gradient_penalty", lambda w, k: k / 2 * (w.norm() - 1).square())]
)  # fmt: skip
def test_penalties_of_a_linear_critic(name: str, expected: Any) -> None:
    """The gradient of a linear logit is its weight everywhere, so each penalty is a number known by hand."""
    model, critic, x = Shift().double(), Linear().double(), torch.randn(10, 2).double()
    values = []
    for options in ({}, {name: 3.0}):
        torch.manual_seed(0)
        values.append(Adversarial(**options)(model, critic).losses(x)[1])  # type: ignore[arg-type]
    assert torch.allclose(values[1] - values[0], 10 * expected(critic.net.weight, 3.0))


def test_points_between_are_uniform() -> None:
    torch.manual_seed(0)
    share = penalties.shares(torch.zeros(20000, dtype=torch.float64)).sort().values
    ideal = torch.arange(1, 20001).double() / 20000
    assert float((share - ideal).abs().max()) < 1.63 / math.sqrt(20000)  # Kolmogorov-Smirnov at 1 %
    assert torch.equal(
        penalties.between(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.0, 0.5]))[1], torch.full((3,), 0.5)
    )


def test_batch_normalisation_under_a_penalty_is_refused() -> None:
    critic = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.LeakyReLU(), nn.Linear(4, 1))
    x = torch.randn(8, 2)
    assert torch.isfinite(Adversarial()(GAN(2, critic=critic))(x))
    for name in ("r1", "r2", "gradient_penalty"):
        with pytest.raises(ValueError, match=r"batch normalisation.*LayerNorm"):
            Adversarial(**{name: 1.0})(GAN(2, critic=critic))(x)  # type: ignore[arg-type]


def test_the_generator_moves_at_every_kth_step() -> None:
    gan, places = GAN(2, **SMALL), []
    module = Adversarial(critic_steps=3)(gan)

    def look(step: int, values: Any) -> None:
        places.append([torch.cat([p.detach().flatten().clone() for p in part.parameters()]) for part in module.players])

    pg.fit(module, torch.randn(64, 2), steps=7, seed=0, progress=False, callback=look, average=False, schedule="cosine")
    moved = [[not torch.equal(a, b) for a, b in zip(one, two, strict=True)] for one, two in pairwise(places)]
    assert [m[0] for m in moved] == [False, False, True, False, False, True]  # steps 1 to 6; it moved at step 0 too
    assert all(m[1] for m in moved)


def test_two_time_scales_are_two_optimizers() -> None:
    module = Adversarial()(GAN(2, **SMALL))
    before = [torch.cat([p.detach().flatten().clone() for p in part.parameters()]) for part in module.players]

    def slow(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr / 10)

    pg.fit(module, torch.randn(64, 2), steps=1, lr=1e-2, optimizer=[slow, torch.optim.Adam], seed=0, progress=False)
    after = [torch.cat([p.detach().flatten() for p in part.parameters()]) for part in module.players]
    largest = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]
    assert largest[0] == pytest.approx(1e-3, rel=1e-2)  # the first step of Adam is its learning rate
    assert largest[1] == pytest.approx(1e-2, rel=1e-2)


def test_the_average_is_of_the_generator_alone() -> None:
    """The result is the generator's average and the critic as it last was."""
    x, weights = torch.randn(64, 2), []
    for average in (0.5, False):
        torch.manual_seed(0)
        module = Adversarial()(GAN(2, **SMALL))
        seen: list[Tensor] = []
        pg.fit(
            module, x, steps=4, lr=1e-2, seed=0, progress=False, average=average,
            callback=lambda step, values, m=module, s=seen: s.append(next(m.players[0].parameters()).detach().clone()),
        )  # fmt: skip
        weights.append((next(module.players[0].parameters()), next(module.players[1].parameters()), seen))
    (mean, critic, seen), (last, same, _) = weights
    assert torch.equal(critic, same)
    share = torch.tensor([0.5**k for k in (3, 2, 1, 0)])
    assert torch.allclose(mean, torch.einsum("k,kij->ij", share / share.sum(), torch.stack(seen)))
    assert not torch.equal(mean, last)
    assert Adversarial()(GAN(2)).average == 0.995


def test_ratios_are_told_or_refused() -> None:
    x, gan = torch.randn(5, 2), GAN(2, **SMALL)
    logit = gan.log_ratio(x)
    assert torch.equal(Adversarial("kl")(gan).log_ratio(x), logit)
    told = Adversarial("least_squares")(gan).log_ratio(x)
    assert torch.allclose(told, torch.logit(logit.clamp(0, 1)))
    for loss in ("hinge", "wasserstein"):
        with pytest.raises(TypeError, match="estimates no density ratio"):
            Adversarial(loss)(gan).log_ratio(x)  # type: ignore[arg-type]


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            z = pyro.sample("w", dist.Normal(x, 1.0).to_event(1))
        return (x * z).sum(-1)


class Unnamed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
        return (x * z).sum(-1)


class Short(Shift):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1]


class PyroCritic(PyroModule):  # type: ignore[misc, no-any-unimported, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.weight = PyroParam(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def with_param(x: Tensor) -> Tensor:
    with pyro.plate("data", len(x)):
        return pyro.param("loc", torch.zeros(2)) + pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_what_cannot_be_played_is_refused() -> None:
    x = torch.randn(6, 2)
    for model, guide, words in (
        (Shift(), Linear(2, 2), r"one logit a row.*got shape \(6, 2\).*two classes"),
        (Shift(), Foreign(), "'w', which the model .* does not"),
        (Shift(), Unnamed(), "`encoder`"),
        (Short(), Linear(), r"draws of x, of shape \(6, 2\)"),
        (Shift(), PyroCritic(), "global store"),
    ):
        with pytest.raises(ValueError, match=words), pyro.get_param_store().scope():
            Adversarial()(model, guide)(x)
    with pytest.raises(ValueError, match=r"one logit a row.*got None"):
        Adversarial()(Implicit(Shift(), None, 2))(x)
    with pytest.raises(ValueError, match="belong to no player"), pyro.get_param_store().scope():
        Adversarial()(Implicit(with_param, Linear(), 2))(x)
    with pytest.raises(TypeError, match="has to be a module"):
        Adversarial()(with_param, Linear())
    with pytest.raises(TypeError, match="VAE is Bounded"):
        Adversarial()(pg.VAE(2))  # type: ignore[arg-type, call-overload]
    with pytest.raises(ValueError, match="loss must be one of"):
        Adversarial("bigan")  # type: ignore[arg-type]
    for options in ({"r1": -1.0}, {"r2": math.nan}, {"gradient_penalty": True}, {"critic_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Adversarial(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patience"):
        pg.fit(Adversarial()(GAN(2)), x, steps=2, patience=1, validation=0.5)
    with pytest.raises(ValueError, match="loss must be one of"):
        game("f-gan")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- the bound of an implicit guide --
class Latent(nn.Module):
    """Latents of each row: one positive, one real, with an observed row of both."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.LogNormal(x.new_zeros(()), 0.5))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * rate.unsqueeze(-1) + self.bias, 1.0).to_event(1), obs=x)


class Implied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(x.new_zeros(2), 1.0).to_event(1), infer=AUXILIARY)
            out = self.net(torch.cat([x.expand(*noise.shape[:-1], 2), noise], -1))
            pyro.sample("rate", dist.Delta(out[..., 0].exp()))
            pyro.sample("z", dist.Delta(out[..., 1:], event_dim=1))


@pytest.mark.parametrize("contrast", ["normal", "prior"])
@pytest.mark.parametrize("particles", [1, 3])
def test_the_adversarial_bound_keeps_the_promises(contrast: Any, particles: int) -> None:
    objective = AdversarialELBO(contrast, num_particles=particles, hidden=(5,))
    torch.manual_seed(0)
    program, x = Bounded(Latent(), Implied(), 2), torch.randn(8, 2)
    module = objective(program)
    testing.check_declared(module, x)
    testing.check_gradients(module, x)
    testing.check_pointwise(module, x)
    testing.check_batches(module, x)
    testing.check_total(module, x)
    testing.check_traced(module, x)
    testing.check_one_device(module, x)


class Normal(nn.Module):
    """A guide whose density is known, behind the same door."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(x[:, 0] / 4, 0.4))
            pyro.sample("z", dist.Normal(x / 3, 0.8).to_event(1))


class Known(nn.Module):
    """log q(u | x) − log r of `Normal`, in place of a critic that would have to learn it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def contrast(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows.new_full((len(rows), 3), 0.3), rows.new_full((len(rows), 3), 0.1)

    def forward(self, u: Tensor, rows: Tensor) -> Tensor:
        loc = torch.cat([rows[:, :1] / 4, rows / 3], 1)
        q = dist.Normal(loc, rows.new_tensor([0.4, 0.8, 0.8])).log_prob(0.3 + u * math.exp(0.1)).sum(-1)
        return q - dist.Normal(0.3, math.exp(0.1)).log_prob(0.3 + u * math.exp(0.1)).sum(-1)


def test_with_the_true_ratio_it_is_the_bound() -> None:
    """Draw by draw the loss is −log w of the same draws, with a positive latent seen through its Jacobian."""
    torch.manual_seed(0)
    model, guide, x = Latent().double(), Normal(), torch.randn(6, 2).double()
    module = AdversarialELBO()(model, guide)
    module.prepare(x)
    module.critic = Known(2)  # type: ignore[assignment]
    torch.manual_seed(1)
    found = module.rows(x)[0]
    torch.manual_seed(1)
    expected = -handlers.log_weight(model, guide, x, shape=module.structure)
    assert torch.allclose(found, expected)
    torch.manual_seed(1)
    assert float(module.losses(x, total=60)[0].detach()) == pytest.approx(10 * float(expected.detach().sum()))


class Counts(nn.Module):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(x.new_ones(())))
            pyro.sample("x", dist.Normal(k.unsqueeze(-1), 1.0).expand([*k.shape, 2]).to_event(1), obs=x)


class CountsGuide(nn.Module):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Poisson(x.exp().sum(-1)))


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1), obs=x)


class MixedGuide(nn.Module):
    def forward(self, x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))


def test_what_has_no_adversarial_bound_is_refused() -> None:
    x = torch.randn(6, 2)
    for model, guide, words in (
        (Counts(), CountsGuide(), "without rsample"),
        (Mixed(), MixedGuide(), "'loc' belongs to all rows"),
        (Observed(), nn.Identity(), "needs latents"),
        (Latent(), nn.Identity(), "not in the guide"),
    ):
        with pytest.raises(ValueError, match=words):
            AdversarialELBO()(model, guide)(x)
    with pytest.raises(TypeError, match="GAN is Implicit"):
        AdversarialELBO()(GAN(2))  # type: ignore[arg-type, call-overload]
    for options in ({"contrast": "flow"}, {"num_particles": 0}, {"hidden": 3}, {"critic_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            AdversarialELBO(**options)  # type: ignore[arg-type]


def test_a_saved_critic_comes_back() -> None:
    x = torch.randn(6, 2)
    torch.manual_seed(0)
    one, two = (AdversarialELBO(hidden=(5,))(Latent(), Implied()) for _ in range(2))
    one.prepare(x)
    two.load_state_dict(one.state_dict())
    torch.manual_seed(1)
    expected = one(x)
    torch.manual_seed(1)
    assert torch.equal(two(x), expected)
