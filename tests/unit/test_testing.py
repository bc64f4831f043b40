"""The checks themselves: each refuses a program or a loss that breaks its promise, and names what is broken."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from contracts.cases import Decoder, Encoder, Hierarchy, LinearGaussian, guide_with_params, model_with_params
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen import handlers, testing
from pyro_gen.objectives.elbo import ELBOModule
from pyro_gen.testing import ContractError


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3)


def exact() -> pg.Exact:
    return pg.Exact(LinearGaussian(), 3)


def pair(model: nn.Module | None = None, guide: nn.Module | None = None) -> pg.Bounded:
    return pg.Bounded(model or Decoder(), guide or Encoder(), 3)


# ------------------------------------------------------------------------------------------- broken programs
class Summed(pg.Exact):
    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().log_prob(x).sum()


class Infinite(pg.Exact):
    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().log_prob(x) + torch.inf


class SingleOnly(pg.Exact):
    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().log_prob(x).float()


class Short(pg.Exact):
    def sample(self, n: int, context: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        return super().sample(n, seed=seed)[:, :1]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Summed, "log_prob has shape ()"),
        (Infinite, "log_prob is not finite"),
        (SingleOnly, "log_prob of torch.float64 data is torch.float32"),
        (Short, "sample has shape (6, 1)"),
    ],
)
def test_shapes(kind: type[pg.Exact], said: str, x: Tensor) -> None:
    testing.check_shapes(exact(), x)
    with pytest.raises(ContractError, match=said.replace("(", r"\(").replace(")", r"\)")):
        testing.check_shapes(kind(LinearGaussian(), 3), x)


class Nearly(pg.Exact):
    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().log_prob(x) * 1.0001


class Looser(pg.Bounded):
    """A bound of its own that is biased by a tenth of a nat, well within the noise of one draw."""

    bias = 0.1

    def lower_bound(self, x: Tensor, context: Tensor | None = None, particles: int = 1) -> Tensor:
        return super().lower_bound(x, context, particles) + self.bias * (torch.arange(len(x)) == 2)


class Honest(Looser):
    bias = 0.0


def narrow() -> pg.Bounded:
    """A pair near its optimum, whose log weights vary little."""
    linear = nn.Linear(3, 4)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    guide = Encoder()
    guide.net = linear
    model = Decoder()
    nn.init.normal_(model.net[2].weight, std=0.05)
    return pair(model, guide)


def test_density(x: Tensor) -> None:
    testing.check_density(exact(), x)
    with pytest.raises(ContractError, match=r"log_prob is off the density of the trace by 0\.0001"):
        testing.check_density(Nearly(LinearGaussian(), 3), x)
    fine = narrow()
    testing.check_density(Honest(fine.model, fine.guide, 3), x)
    with pytest.raises(ContractError, match="lower_bound of row 2"):
        testing.check_density(Looser(fine.model, fine.guide, 3), x)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.factor("f", -(x * x.detach() / self.scale).sum(-1) / 2)


class WrongScore(pg.Unnormalized):
    def log_density(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().log_density(x) + x.sin().sum(1) * 1e-4


def test_score(x: Tensor) -> None:
    testing.check_score(exact(), x)
    with pytest.raises(ContractError, match="finite differences"):
        testing.check_score(pg.Unnormalized(Detached(), 3), x)
    with pytest.raises(ContractError, match="autograd"):
        testing.check_score(WrongScore(LinearGaussian(), 3), x)


class Forgetful(nn.Module):
    """Computes with a tensor that state_dict does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))
        self.table = torch.randn(3)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc + self.table, torch.ones_like(self.loc)).to_event(1), obs=x)


class Family(pg.Exact):
    def __init__(self) -> None:
        super().__init__(Forgetful(), 3)
        self.config = {}


class Elsewhere(nn.Module):
    """Its parameter is a copy of what it computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))
        self.used = [torch.zeros(3)]

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = self.used[0] + 0 * self.loc
            pyro.sample("x", dist.Normal(loc, torch.ones_like(loc)).to_event(1), obs=x)


def test_state(x: Tensor) -> None:
    testing.check_state(exact(), x)
    with pytest.raises(ContractError, match="built from its config does not give the same log_prob"):
        testing.check_state(Family(), x)
    with pytest.raises(ContractError, match="computes with something else"):
        testing.check_state(pg.Exact(Elsewhere(), 3), x)


class Sharing(LinearGaussian):
    def __deepcopy__(self, memo: Any) -> Sharing:
        other = Sharing()
        other.weight, other.loc, other.log_scale = self.weight, self.loc, self.log_scale
        return other


class Renewed(LinearGaussian):
    def __deepcopy__(self, memo: Any) -> Renewed:
        return Renewed()


def test_deepcopy(x: Tensor) -> None:
    testing.check_deepcopy(exact(), x)
    with pytest.raises(ContractError, match="shares the tensor"):
        testing.check_deepcopy(pg.Exact(Sharing(), 3), x)
    with pytest.raises(ContractError, match="does not give the same log_prob"):
        testing.check_deepcopy(pg.Exact(Renewed(), 3), x)


class OwnDice(pg.Exact):
    def sample(self, n: int, context: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        return torch.as_tensor(np.random.default_rng().normal(size=(n, 3)), dtype=torch.float32)


class Reseeding(pg.Exact):
    def sample(self, n: int, context: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return super().sample(n)


class Fixed(pg.Exact):
    def sample(self, n: int, context: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        return super().sample(n, seed=0)


@pytest.mark.parametrize(
    ("kind", "said"), [(OwnDice, "draws from elsewhere"), (Reseeding, "global generator"), (Fixed, "the same draws")]
)
def test_seeds(kind: type[pg.Exact], said: str) -> None:
    testing.check_seeds(exact())
    with pytest.raises(ContractError, match=said):
        testing.check_seeds(kind(LinearGaussian(), 3))


def test_predictive(x: Tensor) -> None:
    testing.check_predictive(pair(), x)
    with pytest.raises(ContractError, match="no new data"):
        testing.check_predictive(pg.Exact(Detached(), 3), x)  # type: ignore[arg-type]


def test_render(x: Tensor) -> None:
    testing.check_render(pair(), x)

    def silent(x: Tensor) -> None:
        return None

    with pytest.raises(ContractError, match="no site"):
        testing.check_render(pg.Implicit(silent, event_shape=3), x)


# --------------------------------------------------------------------------------------------- broken losses
class Unused(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(2))


class Stopped(Encoder):
    def forward(self, x: Tensor) -> None:
        with torch.no_grad():
            loc, log_scale = self.net(x).chunk(2, -1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Thawing(Decoder):
    def forward(self, x: Tensor) -> None:
        self.fixed.requires_grad_(True)
        super().forward(x)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (lambda: pair(Unused()), "does not reach 'model.spare'"),
        (lambda: pair(guide=Stopped()), "does not reach 'guide.net.weight'"),
        (lambda: pair(Thawing()), "the frozen parameter 'model.fixed' is trainable"),
    ],
)
def test_gradients(program: Any, said: str, x: Tensor) -> None:
    testing.check_gradients(pg.ELBO()(pair()), x)
    with pytest.raises(ContractError, match=said):
        testing.check_gradients(pg.ELBO()(program()), x)


def test_gradient_that_a_loss_cannot_have_is_named(x: Tensor) -> None:
    testing.check_gradients(pg.ELBO()(pair(Unused())), x, unreached=["model.spare"])
    with pytest.raises(ContractError, match=r"reaches 'model.log_scale'"):
        testing.check_gradients(pg.ELBO()(pair()), x, unreached=["model.log_scale"])


class DeafModule(ELBOModule):
    """Takes total= and does nothing with it."""

    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        return super().forward(*batch, **kwargs)


class TwiceModule(ELBOModule):
    """Scales the whole loss, latents of all rows included."""

    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        return super().forward(*batch, **kwargs) * (1 if total is None else total / len(batch[0]))


class SquareModule(ELBOModule):
    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        return super().forward(*batch, **kwargs) * (1 if total is None else (total / len(batch[0])) ** 2)


class MeanModule(ELBOModule):
    """Its rows add up to something else than it says."""

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        return super().pointwise(*batch, **kwargs) * 1.5


class PeekingModule(ELBOModule):
    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        loss = super().forward(*batch, total=total, **kwargs)
        return loss if loss.item() < 1e9 else loss * 0


class CountingModule(ELBOModule):
    """Changes from call to call by a Python number, which a graph keeps as it was."""

    calls = 0

    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().forward(*batch, total=total, **kwargs) * (1 + 1e-3 * self.calls)


def broken(module: type[ELBOModule], **facts: Any) -> Any:
    """An ELBO of another make."""
    return type("Broken", (pg.ELBO,), {"module_class": module, **facts})()


def test_batches(x: Tensor) -> None:
    testing.check_batches(pg.ELBO()(pair()), x)
    with pytest.raises(ContractError, match="mini-batches give"):
        testing.check_batches(broken(DeafModule)(pair()), x)


def global_pair() -> pg.Bounded:
    model = Hierarchy()
    return pg.Bounded(model, AutoNormal(model), 3)


def no_plate(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("x", dist.Normal(loc.expand(x.shape), 1.0).to_event(2), obs=x)


def test_total(x: Tensor) -> None:
    testing.check_total(pg.ELBO()(pair()), x)
    testing.check_total(pg.ELBO()(global_pair()), x)
    testing.check_total(pg.ELBO()(no_plate), x)
    for module, program, said in (
        (DeafModule, pair(), "no double loss"),
        (SquareModule, pair(), "not linear"),
        (TwiceModule, global_pair(), "is scaled too"),
        (DeafModule, no_plate, "without a word"),
    ):
        with pytest.raises(ContractError, match=said):
            testing.check_total(broken(module)(program), x)


def test_pointwise(x: Tensor) -> None:
    testing.check_pointwise(pg.ELBO()(pair()), x)
    with pytest.raises(ContractError, match="adds up to"):
        testing.check_pointwise(broken(MeanModule)(pair()), x)


def test_declared(x: Tensor) -> None:
    testing.check_declared(pg.ELBO()(pair()), x)
    with pytest.raises(ContractError, match="declared deterministic"):
        testing.check_declared(broken(ELBOModule, deterministic=True)(pair()), x)
    with pytest.raises(ContractError, match="loss_is"):
        testing.check_declared(broken(ELBOModule, loss_is="a bound")(pair()), x)
    shy = broken(ELBOModule, settings=lambda self: {} if self.num_particles == 1 else {"num_particles": 1})
    shy.num_particles = 2
    with pytest.raises(ContractError, match="settings"):
        testing.check_declared(shy(pair()), x)


class Constant(Decoder):
    """Writes a tensor into the program."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = torch.ones(5, 3)  # a schedule that is no buffer

    def forward(self, x: Tensor) -> None:
        scale = self.log_scale.exp()
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1))
            loc = self.net(z) + self.fixed
            if self.how == "tensor":
                loc = loc + torch.zeros(3)
            elif self.how == "matrix":
                loc = loc @ torch.eye(3)
            elif self.how == "table":
                loc = loc * self.table[x[:, 0].long() % 5]
            with poutine.mask(mask=torch.ones(len(x)).bool() if self.how == "mask" else x.new_ones(len(x)).bool()):
                pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


@pytest.mark.parametrize("how", ["tensor", "matrix", "table", "mask"])
def test_one_device(how: str, x: Tensor) -> None:
    testing.check_one_device(pg.ELBO()(pair(Constant("nothing"))), x)
    with pytest.raises(ContractError, match="a CPU tensor of shape"):
        testing.check_one_device(pg.ELBO()(pair(Constant(how))), x)


def test_traced(x: Tensor) -> None:
    testing.check_traced(pg.ELBO()(pair()), x)
    with pytest.raises(ContractError, match="does not trace"):
        testing.check_traced(broken(PeekingModule)(pair()), x)
    with pytest.raises(ContractError, match=r"traced and eager steps: loss|at one seed"):
        testing.check_traced(broken(CountingModule)(pair()), x)


def test_trainers(x: Tensor) -> None:
    testing.check_trainers(pg.ELBO(), pair(), x)

    def silent(self: Any, model: Any, guide: Any, *batch: Any) -> float:
        value = self._module(model, guide)(*batch)
        value.backward()
        return float(value.detach())  # and announces no parameter: SVI moves nothing

    with pytest.raises(ContractError, match="SVI and a plain torch loop"):
        testing.check_trainers(broken(ELBOModule, loss_and_grads=silent), pair(), x)
    with pytest.raises(ContractError, match="fit and a plain torch loop"):
        testing.check_trainers(broken(CountingAfterFirst), pair(), x)


class CountingAfterFirst(ELBOModule):
    """Draws once more in `fit`, which alone gives it total=."""

    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        import inspect

        if any(frame.function == "go" for frame in inspect.stack()):
            torch.randn(1)
        return super().forward(*batch, total=total, **kwargs)


# ----------------------------------------------------------------------------------------------- check_program
def test_all_checks_that_apply_run(x: Tensor) -> None:
    ran = testing.check_program(exact(), x, objectives=[pg.MaximumLikelihood()])
    assert ran == (
        *("shapes", "density", "score", "state", "deepcopy", "seeds", "predictive", "render"),
        *(f"MaximumLikelihood: {n}" for n in ("declared", "gradients", "pointwise", "batches", "total", "trainers")),
        *("MaximumLikelihood: one device", "MaximumLikelihood: traced"),
    )
    functions = pg.Bounded(model_with_params, guide_with_params, 3)
    ran = testing.check_program(functions, x, objectives=[pg.ELBO()])
    assert "ELBO: trainers" in ran
    assert "ELBO: traced" not in ran
    assert "score" not in ran


def mixture(x: Tensor) -> None:
    locs = pyro.param("locs", torch.linspace(-1, 1, 2))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(x.new_ones(()) / 2), infer={"enumerate": "parallel"})
        loc = locs[k.long()].unsqueeze(-1)
        pyro.sample("x", dist.Normal(loc, x.new_ones(3)).to_event(1), obs=x)


def whole(x: Tensor) -> None:
    scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    pyro.sample("x", dist.Normal(w, scale).expand(x.shape).to_event(2), obs=x)


def whole_guide(x: Tensor) -> None:
    pyro.sample("w", dist.Normal(pyro.param("at", torch.zeros(())), 0.5))


def own_batches(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(3))
    with pyro.plate("data", len(x), subsample_size=3) as index:
        pyro.sample("x", dist.Normal(loc, x.new_ones(())).to_event(1), obs=x[index])


def test_losses_of_unusual_programs(x: Tensor) -> None:
    every = {"declared", "gradients", "pointwise", "batches", "total", "trainers"}
    for program, left_out in (
        (pg.Bounded(mixture, None, 3), {"pointwise"}),
        (pg.Bounded(whole, whole_guide, 3), {"pointwise", "batches"}),
        (global_pair(), {"pointwise"}),
    ):
        ran = {
            name.removeprefix("ELBO: ")
            for name in testing.check_program(program, x, objectives=[pg.ELBO()])
            if name.startswith("ELBO: ")
        }
        assert ran >= every - left_out
        assert not ran & left_out
    for loss in (pg.ELBO()(own_batches), pg.IWAE(2)(own_batches)):
        testing.check_total(loss, x)
        testing.check_batches(loss, x)


def test_objectives_default_to_all_of_the_kind(x: Tensor) -> None:
    ran = testing.check_program(exact(), x)
    assert {name.split(":")[0] for name in ran if ":" in name} == {"ELBO", "IWAE", "MaximumLikelihood"}


def test_the_message_names_program_check_and_cause(x: Tensor) -> None:
    with pytest.raises(ContractError, match=r"Nearly, density: log_prob is off"):
        testing.check_program(Nearly(LinearGaussian(), 3), x)

    def failing(x: Tensor) -> None:
        raise KeyError("no such thing")

    with pytest.raises(ContractError, match="Exact, shapes: stopped by KeyError: 'no such thing'") as caught:
        testing.check_program(pg.Exact(failing, 3), x)
    assert isinstance(caught.value.__cause__, KeyError)
    assert isinstance(caught.value, AssertionError)
    with pytest.raises(TypeError, match=r"pg.Bounded\(model, guide, event_shape\)"):
        testing.check_program(Decoder(), x)  # type: ignore[arg-type]


def test_checks_leave_nothing_behind(x: Tensor) -> None:
    pyro.clear_param_store()
    pyro.param("mine", torch.ones(1))
    program = pg.Bounded(PyroModule[nn.Sequential](Decoder()), Encoder(), 3)
    program.eval()
    before, noise = copy.deepcopy(program.state_dict()), torch.get_rng_state()
    testing.check_program(program, x, objectives=[pg.ELBO()])
    assert torch.equal(noise, torch.get_rng_state())
    assert list(pyro.get_param_store()) == ["mine"]
    assert all(torch.equal(before[n], t) for n, t in program.state_dict().items())
    assert not any(m.training for m in program.modules())
    assert all(p.grad is None for p in program.parameters())
    pyro.clear_param_store()


def test_autoguides_keep_their_model(x: Tensor) -> None:
    program = global_pair()
    with pytest.raises(TypeError):  # Pyro's guides, copied before their first call
        copy.deepcopy(program.guide)(x)
    program = global_pair()
    testing.check_total(pg.ELBO()(program), x)
    assert handlers.structure(program.model, program.guide, x)[0].guide_latents == ("loc", "scale")
