"""The traced and compiled step: equal to the eager one, through all that is known to go wrong without a word."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts.cases import (
    CASES,
    OBJECTIVES,
    Decoder,
    Encoder,
    LinearGaussian,
    global_latents,
    guide_with_params,
    model_with_params,
)
from games import Game
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen import testing
from pyro_gen.base import ObjectiveModule
from pyro_gen.compiled import CannotCompile, CompiledStep, eager_step, why_not
from pyro_gen.fitting import run as fitting_run
from pyro_gen.objectives.elbo import ELBOModule

ROWS = 8
LOCAL = {"module_local_params": True}


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, 3)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` traces but does not compile, which takes seconds and changes nothing here."""
    monkeypatch.setattr(fitting_run, "CompiledStep", functools.partial(CompiledStep, inductor=False))


class Encode(Encoder):
    """An encoder with whatever in front of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers, self.net)  # type: ignore[assignment]


def bind(model: Any = None, guide: Any = None, objective: Any = None, x: Tensor | None = None) -> ObjectiveModule:
    pair = pg.Bounded(model or Decoder(), guide or Encoder(), 3)
    module: ObjectiveModule = (objective or pg.ELBO())(pair)
    module.prepare(torch.zeros(ROWS, 3) if x is None else x)
    return module


def trace(module: ObjectiveModule) -> CompiledStep:
    return CompiledStep(module, inductor=False)


Evaluated = tuple[Tensor, dict[str, Tensor | None]]


def evaluate(step: Callable[..., Tensor], module: ObjectiveModule, *batch: Tensor, seed: int = 1) -> Evaluated:
    torch.manual_seed(seed)
    found = step(batch, None, ROWS)
    return found.clone(), {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def assert_same(step: CompiledStep, *batch: Tensor, seed: int = 1) -> Evaluated:
    """The step gives what an eager evaluation gives at the same seed, buffers put back in between."""
    module = step.module
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    found = evaluate(step, module, *batch, seed=seed)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    wanted = evaluate(functools.partial(eager_step, module), module, *batch, seed=seed)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    return found


# ------------------------------------------------------------------------------------------------------------- the call
def test_losses_gradients_and_norm(x: Tensor) -> None:
    module = bind()
    step = trace(module)
    value, grads = assert_same(step, x)
    norm = sum(g.square().sum() for g in grads.values() if g is not None)
    torch.testing.assert_close(value[-1], norm)
    assert evaluate(step, module, x, seed=2)[0][0] != value[0]  # noise is drawn anew
    assert step.seconds > 0
    assert not value.requires_grad


def test_players_have_a_loss_each(x: Tensor) -> None:
    module = bind(objective=Game())
    value, _ = assert_same(trace(module), x)
    assert value.shape == (3,)
    testing.check_gradients(module, x)
    testing.check_traced(module, x)


def test_building_touches_neither_generators_nor_buffers(x: Tensor) -> None:
    module = bind(guide=Encode(nn.BatchNorm1d(3), nn.Dropout(0.3)))
    before = {n: b.clone() for n, b in module.named_buffers()}
    assert all(torch.equal(b, torch.zeros_like(b)) for n, b in before.items() if "tracked" in n)  # nor has prepare()
    torch.manual_seed(5)
    step = trace(module)
    step._build((x,), None, ROWS)
    assert all(torch.equal(before[n], b) for n, b in module.named_buffers())
    torch.manual_seed(5)
    start = torch.get_rng_state()
    step._build((x,), None, ROWS)
    assert torch.equal(start, torch.get_rng_state())


def test_validation_is_as_it_was(x: Tensor) -> None:
    for enabled in (True, False):
        with pyro.validation_enabled(enabled):
            assert_same(trace(bind()), x)
            assert torch.distributions.Distribution._validate_args == enabled


# ---------------------------------------------------------------------------------------------- what is baked, and seen
def test_batch_statistics_are_those_of_the_steps_taken(x: Tensor) -> None:
    ends = []
    for compiled in (True, False):
        torch.manual_seed(0)
        module = bind(guide=Encode(nn.BatchNorm1d(3)))
        step = trace(module) if compiled else functools.partial(eager_step, module)
        torch.manual_seed(1)
        for shift in range(4):
            step((x + shift,), None, ROWS)
        ends.append({n: b.clone() for n, b in module.named_buffers()})
    assert ends[0]["guide.net.0.num_batches_tracked"] == 4
    torch.testing.assert_close(ends[0], ends[1])


def test_a_new_shape_or_total_is_a_new_graph(x: Tensor) -> None:
    module = bind()
    step = trace(module)
    for batch in (x, x[:5], x, x[:1], x[:5]):
        assert_same(step, batch)
    assert step.graphs == 3
    torch.manual_seed(1)
    doubled = step((x,), 2 * ROWS, ROWS)
    torch.testing.assert_close(doubled[0], 2 * evaluate(step, module, x)[0][0])
    torch.manual_seed(1)
    per_row = step((x,), 2 * ROWS, 2 * ROWS)
    torch.testing.assert_close(per_row[0] * 2, doubled[0])
    assert step.graphs == 5
    module.double()
    module.structure = None
    assert_same(step, x.double())


def test_changes_in_place_are_seen(x: Tensor) -> None:
    module = bind(guide=Encode(nn.BatchNorm1d(3)))
    step = trace(module)
    first, _ = assert_same(step, x)
    for tensor in (module.model.log_scale, module.model.fixed, module.model.loc, module.guide.net[0].running_mean):
        with torch.no_grad():
            tensor.add_(0.5)
        again, _ = assert_same(step, x)
        assert (again[0] == first[0]) == (tensor is module.guide.net[0].running_mean)  # which training does not read
        first = again
    module.load_state_dict({n: t * 0.9 for n, t in module.state_dict().items()})
    assert assert_same(step, x)[0][0] != first[0]
    assert step.graphs == 1


def test_tensors_put_in_the_place_of_others_are_seen(x: Tensor) -> None:
    module = bind()
    step = trace(module)
    first, _ = assert_same(step, x)
    for change in (
        lambda: setattr(module.model, "log_scale", nn.Parameter(module.model.log_scale.detach() + 0.5)),
        lambda: setattr(module.model, "loc", module.model.loc + 0.5),
        lambda: setattr(module.model.net, "2", nn.Linear(6, 3)),
    ):
        change()
        again, _ = assert_same(step, x)
        assert again[0] != first[0]
        first = again


def test_dropout_and_statistics_follow_the_mode(x: Tensor) -> None:
    module = bind(guide=Encode(nn.BatchNorm1d(3), nn.Dropout(0.5)))
    step = trace(module)
    training, _ = assert_same(step, x)
    module.guide.net.eval()  # of one part alone
    evaluating, _ = assert_same(step, x)
    assert training[0] != evaluating[0]
    module.guide.net.train()
    torch.testing.assert_close(assert_same(step, x)[0][0], training[0])


# ---------------------------------------------------------------------------------------------------- frozen and unused
def test_frozen_parameters_have_no_gradient(x: Tensor) -> None:
    module = bind()
    step = trace(module)
    everything = {n for n, g in assert_same(step, x)[1].items() if g is not None}
    assert everything == {n for n, _ in module.named_parameters()} - {"model.fixed"}
    guide = {n for n in everything if n.startswith("guide.")}
    for frozen in (True, False, True):  # turn by turn: no gradient of the last turn is to stay
        module.guide.requires_grad_(not frozen)
        for evaluated in (evaluate(step, module, x), assert_same(step, x)):
            there = {n for n, g in evaluated[1].items() if g is not None}
            assert there == (everything - guide if frozen else everything)
    assert step.graphs == 2


def test_a_parameter_that_a_loss_does_not_reach_stays_where_it_is(x: Tensor) -> None:
    module = bind()
    module.model.spare = nn.Parameter(torch.ones(2))
    step = trace(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)  # would decay a gradient of zero
    assert assert_same(step, x)[1]["model.spare"] is None
    step((x,), None, ROWS)
    optimizer.step()
    assert torch.equal(module.model.spare.detach(), torch.ones(2))


class Tied(Decoder):
    """Its decoder is the encoder turned round."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)  # type: ignore[assignment]
        self.turned = encoder.net.weight

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z) + z @ self.turned[:2], 1.0).to_event(1), obs=x)


def test_tied_parameters(x: Tensor) -> None:
    guide = Encoder()
    module = bind(Tied(guide), guide)
    _, grads = assert_same(trace(module), x)
    assert "guide.net.weight" not in grads  # one tensor, one name
    untied = bind(Tied(Encoder()), guide)
    assert len(list(untied.parameters())) == len(list(module.parameters())) + 1


# ------------------------------------------------------------------------------------- lazy, and in Pyro's global store
def test_lazy_parameters_are_trained(x: Tensor) -> None:
    with pyro.settings.context(**LOCAL):
        module = pg.ELBO()(global_latents())
        module.prepare(x)
        step = trace(module)
        _, grads = assert_same(step, x)
        assert len(grads) == 4
        assert all(g is not None and g.any() for g in grads.values())
        before = [p.detach().clone() for p in module.parameters()]
        optimizer = torch.optim.SGD(module.trainable(), lr=0.01)
        for _ in range(20):
            step((x,), None, ROWS)
            optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


class Scaled(PyroModule):  # type: ignore[misc, no-any-unimported, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroParam(torch.ones(3), constraint=dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(3), self.scale).to_event(1), obs=x)


def functions() -> ObjectiveModule:
    return pg.ELBO()(pg.Bounded(model_with_params, guide_with_params, 3))


def with_pyro_param() -> ObjectiveModule:
    return pg.MaximumLikelihood()(pg.Exact(Scaled(), 3))


def autoguided() -> ObjectiveModule:
    return pg.ELBO()(global_latents())


REFUSED = {
    functions: "pyro.param statements outside of modules",
    with_pyro_param: "PyroParam 'model.scale' reads from the global store",
    autoguided: "PyroParam 'guide.locs.loc' reads from the global store",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda f: f.__name__)
def test_what_reads_from_the_store_is_refused(make: Callable[[], ObjectiveModule], x: Tensor) -> None:
    module = make()
    module.prepare(x)
    with pytest.raises(CannotCompile, match=REFUSED[make]):
        CompiledStep(module)
    with pytest.raises(CannotCompile, match=f"compile=True, but this loss does not compile: .*{REFUSED[make]}"):
        pg.fit(make(), x, steps=3, compile=True, progress=False)


@pytest.mark.parametrize("make", REFUSED, ids=lambda f: f.__name__)
def test_auto_falls_back_with_one_line(
    make: Callable[[], ObjectiveModule], x: Tensor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting_run, "COMPILE_FROM", 1)
    module = make()
    with caplog.at_level(logging.INFO, logger="pyro_gen"):
        result = pg.fit(module, x, steps=5, seed=0, progress=False)
    (record,) = caplog.records
    assert REFUSED[make] in record.getMessage()
    assert "\n" not in record.getMessage()
    assert record.levelno == logging.WARNING
    assert result.config["compiled"] is False
    with pyro.get_param_store().scope():
        eager = pg.fit(make(), x, steps=5, seed=0, compile=False, progress=False)
    assert result.history["loss"] == eager.history["loss"]


def test_a_pyro_param_is_compiled_in_local_mode(x: Tensor) -> None:
    with pyro.settings.context(**LOCAL):
        module = with_pyro_param()
        module.prepare(x)
        assert why_not(module) is None
        _, grads = assert_same(trace(module), x)
        assert grads["model.scale_unconstrained"] is not None
        assert grads["model.scale_unconstrained"].all()


def test_enumeration_is_refused(x: Tensor) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(x.new_ones(()) / 2), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k.unsqueeze(-1), 1.0).expand_by([]).to_event(1), obs=x[:, :1])

    module = pg.ELBO()(model, lambda x: None)
    module.prepare(x)
    with pytest.raises(CannotCompile, match="enumerated"):
        CompiledStep(module)


# --------------------------------------------------------------------------------------------------- what must not pass
class PeekingModule(ELBOModule):
    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        loss = super().forward(*batch, total=total, **kwargs)
        return loss if loss.item() < 1e9 else 2 * loss


class DriftingModule(ELBOModule):
    """Its gradient depends on how often it was called, its value does not."""

    calls = 0

    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        loss = super().forward(*batch, total=total, **kwargs)
        self.calls += 1
        return loss + 0.01 * self.calls * (loss - loss.detach())


class Peeking(pg.ELBO):
    module_class = PeekingModule


class Drifting(pg.ELBO):
    module_class = DriftingModule


def test_a_loss_that_looks_at_its_value_does_not_compile(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    module = bind(objective=Peeking())
    with pytest.raises(CannotCompile, match=r"_local_scalar_dense|item"):
        trace(module)((x,), None, ROWS)
    with pytest.raises(CannotCompile, match="compile=True, but this loss does not compile"):
        pg.fit(bind(objective=Peeking()), x, steps=3, compile=True, progress=False)
    monkeypatch.setattr(fitting_run, "COMPILE_FROM", 1)
    result = pg.fit(bind(objective=Peeking()), x, steps=3, progress=False)
    assert result.config["compiled"] is False


def test_a_graph_that_disagrees_is_not_used(x: Tensor) -> None:
    with pytest.raises(CannotCompile, match=r"gradient of '.*' is .* off the eager one at one seed"):
        trace(bind(objective=Drifting()))((x,), None, ROWS)


def test_data_outside_of_the_support_is_named_by_the_first_step(x: Tensor, traced_only: None) -> None:
    vae = pg.VAE(3, likelihood="bernoulli", hidden=(6,))
    with pytest.raises(ValueError, match="outside the support"):
        pg.fit(pg.ELBO()(vae), x, steps=3, compile=True, progress=False)


def test_everything_frozen(x: Tensor) -> None:
    module = bind()
    module.requires_grad_(False)
    with pytest.raises((ValueError, RuntimeError), match=r"reaches no parameter|does not require grad"):
        trace(module)((x,), None, ROWS)


# ------------------------------------------------------------------------------------------------------------------ fit
@pytest.mark.parametrize("batch_size", [None, 3])
def test_fit_takes_the_same_steps(batch_size: int | None, traced_only: None, x: Tensor) -> None:
    runs = []
    for compile in (True, False):
        torch.manual_seed(0)
        module = bind(guide=Encode(nn.BatchNorm1d(3), nn.Dropout(0.2)))
        runs.append(pg.fit(module, x, steps=30, batch_size=batch_size, seed=4, compile=compile, progress=False))
    one, two = runs
    assert one.config["compiled"] is True
    assert one.compile_seconds > 0
    assert one.history["loss"] == pytest.approx(two.history["loss"], rel=1e-5)
    for (name, a), b in zip(one.module.state_dict().items(), two.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert one.module.guide.net[0].num_batches_tracked == 30


def test_auto_compiles_long_runs_only(traced_only: None, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting_run, "COMPILE_FROM", 4)
    assert [pg.fit(bind(), x, steps=n, progress=False).config["compiled"] for n in (3, 4)] == [False, True]


# ----------------------------------------------------------------------------------------------------- through inductor
def by_name(name: str) -> ObjectiveModule:
    objective, case = name.split(" on ")
    return OBJECTIVES[objective](next(c for c in CASES if c.name == case).build()[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")  # torch 2.13's own
@pytest.mark.parametrize("name", ["dreg on vae", "likelihood on exact"])
def test_inductor_takes_the_same_steps(name: str) -> None:
    batch = next(c for c in CASES if c.name == name.split(" on ")[1]).build()[1]
    testing.check_traced(by_name(name), *batch, steps=30, inductor=True)


@pytest.mark.slow
def test_inductor_with_batch_statistics_dropout_and_two_players(x: Tensor) -> None:
    testing.check_traced(bind(guide=Encode(nn.BatchNorm1d(3), nn.Dropout(0.2)), objective=Game()), x, inductor=True)


@pytest.mark.slow
def test_fit_compiles(x: Tensor) -> None:
    runs = []
    for compile in (True, False):
        torch.manual_seed(0)
        runs.append(pg.fit(bind(), x, steps=30, batch_size=4, seed=4, compile=compile, progress=False))
    assert runs[0].config["compiled"] is True
    assert runs[0].history["loss"] == pytest.approx(runs[1].history["loss"], rel=1e-5)


def test_exact_programs_are_the_likelihood_under_every_objective(x: Tensor) -> None:
    program = pg.Exact(LinearGaussian(), 3)
    wanted = -program.log_prob(x).sum()
    for objective in (pg.MaximumLikelihood(), pg.ELBO(), pg.ELBO(3), pg.IWAE(4), pg.ELBO(analytic_kl=True)):
        module = objective(program)
        module.prepare(x)
        torch.testing.assert_close(assert_same(trace(module), x)[0][0] * ROWS, wanted.detach())
