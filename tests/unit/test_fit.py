"""The training loop against closed forms: a Gaussian mean under SGD is a geometric sequence, known at every step."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_gen as pg
from pyro_gen.fitting.batches import Batches

SGD = torch.optim.SGD


class Mean(nn.Module):
    """x ~ N(loc, I): the loss per datum has gradient loc − mean(x), whatever the number of rows."""

    def __init__(self, start: float = 0.0, features: int = 2) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.full((features,), start))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)


def rows(n: int = 40, features: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed))


def fit(module: Any, data: Any, **options: Any) -> pg.FitResult:
    return pg.fit(module, data, **{"progress": False, "seed": 0, "compile": False, **options})


def mean_fit(data: Tensor, start: float = 0.0, **options: Any) -> tuple[Mean, pg.FitResult]:
    model = Mean(start, data.shape[1])
    return model, fit(pg.MaximumLikelihood()(model), data, **{"optimizer": SGD, "lr": 0.1, **options})


def small_vae(seed: int = 0, **options: Any) -> pg.VAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pg.VAE(3, **{"hidden": (5,), **options})


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def pair() -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """A user's own pair, with parameters in Pyro's store."""

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(x.shape), scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        slope, spread = pyro.param("slope", torch.zeros(())), pyro.param("spread", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x.mean(-1), spread.exp()))

    return model, guide


# ------------------------------------------------------------------------------------------------------- seeds --
def test_the_seed_decides_the_weights_of_a_program() -> None:
    found = []
    for seed in (1, 1, 2):
        vae = small_vae()
        fit(pg.ELBO()(vae), rows(60, 3), steps=8, batch_size=20, seed=seed)
        found.append(state(vae))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_the_seed_decides_the_weights_of_a_pair() -> None:
    found = []
    for seed in (1, 1, 2):
        pyro.clear_param_store()
        fit(pg.ELBO()(*pair()), rows(60, 3), steps=8, batch_size=20, seed=seed, lr=0.05)
        found.append({name: value.detach().clone() for name, value in pyro.get_param_store().items()})
    pyro.clear_param_store()
    assert set(found[0]) == {"scale", "slope", "spread"}
    assert same(found[0], found[1])
    assert not same(found[0], found[2])
    assert float(found[0]["slope"]) != 0


@pytest.mark.parametrize("data", ["tensor", "loader"])
def test_global_generators_are_left_alone(data: str) -> None:
    vae, x = small_vae(), rows(60, 3)
    source = x if data == "tensor" else DataLoader(TensorDataset(x), batch_size=20, shuffle=True)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    held = x[:10] if data == "loader" else 0.2
    fit(pg.IWAE(3)(vae), source, steps=5, validation=held, validate_every=2, average=0.9)
    fit(pg.IWAE(3)(vae), source, steps=2, seed=None)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
    assert not pyro.get_param_store().keys()


# ------------------------------------------------------------------------------------------------------- scale --
def test_sgd_on_a_gaussian_mean_is_the_geometric_sequence() -> None:
    x = rows()
    model, result = mean_fit(x, start=3.0, steps=25, lr=0.2)
    expected = x.mean(0) + 0.8**25 * (3.0 - x.mean(0))
    assert torch.allclose(model.loc, expected, rtol=1e-6, atol=1e-6)
    first = 0.5 * (x - 3.0).square().sum(1).mean() + math.log(2 * math.pi)
    assert result.history["loss"][0] == pytest.approx(float(first), rel=1e-6)  # nats per datum, not in total


def test_learning_rate_and_clipping_mean_the_same_for_every_number_of_rows() -> None:
    x = rows(512)
    for options in ({}, {"optimizer": None, "lr": 0.01}, {"clip_norm": 0.3}):
        few, short = mean_fit(x, 3.0, steps=20, batch_size=512, **options)
        many, long = mean_fit(x.repeat(100, 1), 3.0, steps=20, batch_size=51200, **options)
        # float32 sums of 51200 terms: relative rounding below 1e-5
        assert torch.allclose(few.loc, many.loc, rtol=1e-5, atol=1e-5)
        assert short.history["loss"] == pytest.approx(long.history["loss"], rel=1e-5)
        assert short.history["grad_norm"] == pytest.approx(long.history["grad_norm"], rel=1e-4)


def test_batches_estimate_the_full_loss() -> None:
    x = rows(60)
    _, full = mean_fit(x, 1.0, steps=1, lr=1e-12)
    _, parts = mean_fit(x, 1.0, epochs=1, batch_size=15, lr=1e-12)  # weights stand still
    assert len(parts.history) == 4
    assert len(set(parts.history["loss"])) == 4
    assert sum(parts.history["loss"]) / 4 == pytest.approx(full.history["loss"][0], rel=1e-6)


def test_batches_need_a_plate_over_rows() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(2), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    module = pg.ELBO()(model, guide)
    with pytest.raises(ValueError, match=r'no plate over its 10 rows.*pyro.plate\("data"'):
        fit(module, rows(40), steps=1, batch_size=10)
    fit(module, rows(40), steps=1)  # all rows at once are fine
    pyro.clear_param_store()


def test_an_epoch_sees_every_row_once() -> None:
    x = torch.arange(50.0).unsqueeze(1)
    batches = Batches((x,), 8, 3, "cpu")
    stream = iter(batches)
    epochs = [torch.cat([next(stream)[0] for _ in range(batches.per_epoch)]).flatten() for _ in range(3)]
    for seen in epochs:
        assert len(seen) == 48  # the short last batch is dropped
        assert len(set(seen.tolist())) == 48
    assert not torch.equal(epochs[0], epochs[1])
    again = iter(Batches((x,), 8, 3, "cpu"))
    assert torch.equal(torch.cat([next(again)[0] for _ in range(6)]).flatten(), epochs[0])


# -------------------------------------------------------------------------------------------- what comes in --
def test_arrays_datasets_and_loaders_are_data() -> None:
    x = rows(40)
    expected, _ = mean_fit(x, 2.0, steps=6)
    sources = [x.numpy(), x.double().numpy(), (x,), [x], TensorDataset(x), DataLoader(TensorDataset(x), batch_size=40)]
    for source in sources:
        model = Mean(2.0)
        fit(pg.MaximumLikelihood()(pg.Exact(model, 2)), source, steps=6, optimizer=SGD, lr=0.1)
        assert torch.allclose(model.loc, expected.loc, rtol=1e-6), type(source)


def test_a_dataset_is_the_tensor_it_holds() -> None:
    found = []
    for source in (rows(60, 3), TensorDataset(rows(60, 3)), rows(60, 3).numpy()):
        vae = small_vae()
        fit(pg.ELBO()(vae), source, steps=5, batch_size=16)
        found.append(state(vae))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_a_loader_is_read_in_its_order() -> None:
    x = rows(40)
    model = Mean(2.0)
    result = fit(
        pg.MaximumLikelihood()(model), DataLoader(TensorDataset(x), batch_size=10), epochs=2, optimizer=SGD, lr=0.1
    )
    loc = torch.full((2,), 2.0)
    for batch in (*x.split(10), *x.split(10)):
        loc = loc - 0.1 * (loc - batch.mean(0))
    assert len(result.history) == 8
    assert torch.allclose(model.loc, loc, rtol=1e-6)


def test_a_context_goes_with_its_rows() -> None:
    vae = small_vae(context_shape=2)
    x, context = rows(60, 3), rows(60, 2, seed=1)
    result = fit(pg.ELBO()(vae), (x, context), steps=4, batch_size=20, validation=(x[:9], context[:9]))
    assert len(result.history) == 4
    for part, beside in itertools.islice(Batches((x, 2 * x), 20, 0, "cpu"), 5):
        assert torch.equal(2 * part, beside)


# --------------------------------------------------------------------------------------------- validation --
def walk(steps: int = 60, **options: Any) -> tuple[Mean, pg.FitResult, list[Tensor]]:
    """From 2 to the mean 0 of the data, past the mean 1 of the validation rows; the iterates after each step."""
    model, iterates = Mean(2.0), []
    x = rows(40)
    x = x - x.mean(0)
    result = fit(
        pg.MaximumLikelihood()(model), x, steps=steps, optimizer=SGD, lr=0.1, validation=x[:20] - x[:20].mean(0) + 1,
        callback=lambda step, values: iterates.append(model.loc.detach().clone()) is not None, **options,
    )  # fmt: skip
    return model, result, iterates


def test_the_weights_of_the_best_validation_are_the_result() -> None:
    model, result, iterates = walk(validate_every=1)
    best = min(range(60), key=lambda i: float((iterates[i] - 1).square().sum()))  # the loss grows with that distance
    assert result.best_step == best + 1
    assert 2 * 0.9**7 > 0.9 > 2 * 0.9**8  # it comes nearest to 1 at step 7, 2 · 0.9⁷ = 0.957
    assert result.best_step == 7
    assert torch.equal(model.loc, iterates[best])
    assert result.validation[best][1] == min(value for _, value in result.validation)
    assert [step for step, _ in result.validation] == list(range(1, 61))
    expected = 0.5 * ((rows(40) - rows(40).mean(0))[:20]).var(0, correction=0).sum() + math.log(2 * math.pi)
    distance = 0.5 * float((iterates[best] - 1).square().sum())
    assert result.validation[best][1] == pytest.approx(float(expected) + distance, rel=1e-5)


def test_a_validation_loss_that_is_no_number_is_never_the_best() -> None:
    class Late(Mean):
        """Has no density in evaluation mode before its mean has come below 1."""

        def forward(self, x: Tensor) -> None:
            x = x if self.training else x + torch.where(self.loc.max() > 1, torch.nan, 0.0)
            super().forward(x)

    model = Late(2.0)
    x = rows(40) - rows(40).mean(0)
    result = fit(pg.MaximumLikelihood()(model), x, steps=20, optimizer=SGD, lr=0.1, validation=x, validate_every=1)
    assert [math.isnan(value) for _, value in result.validation] == [True] * 6 + [False] * 14  # 2 · 0.9⁷ = 0.957
    assert result.best_step == 20
    assert float(model.loc.detach().max()) == pytest.approx(2 * 0.9**20, rel=1e-4)


@pytest.mark.parametrize(("every", "patience"), [(1, 4), (3, 2)])
def test_patience_stops_so_many_evaluations_after_the_best(every: int, patience: int) -> None:
    model, result, iterates = walk(validate_every=every, patience=patience)
    best = {1: 7, 3: 6}[every]  # 2 · 0.9⁶ = 1.063 and 2 · 0.9⁹ = 0.775
    assert result.best_step == best
    assert result.stopped_at == best + patience * every == len(result.history)
    assert torch.equal(model.loc, iterates[best - 1])


def test_without_patience_the_run_goes_through() -> None:
    _, result, _ = walk(validate_every=1)
    assert result.stopped_at is None
    assert len(result.history) == 60


def test_a_fraction_holds_rows_out() -> None:
    x = rows(50)
    _, result = mean_fit(x, steps=4, validation=0.2, validate_every=1)
    assert result.config["rows"] == 40
    assert result.config["validation_rows"] == 10
    again = mean_fit(x, steps=4, validation=0.2, validate_every=1)[1]
    assert result.validation == again.validation
    assert mean_fit(x, steps=4, validation=0.2, validate_every=1, seed=1)[1].validation != result.validation


def test_validation_does_not_change_the_run() -> None:
    found = []
    for options in ({}, {"validation": rows(9, 3, seed=4), "validate_every": 1}):
        vae = small_vae()
        result = fit(pg.ELBO()(vae), rows(60, 3), steps=7, batch_size=20, **options)
        found.append(result.history["loss"])
    assert found[0] == found[1]


# -------------------------------------------------------------------------------- averages of the iterates --
def test_exponential_average_is_the_corrected_moving_average() -> None:
    x = rows()
    model, _ = mean_fit(x, 3.0, steps=30, lr=0.2, average=0.9)
    weights = [0.1 * 0.9 ** (30 - i) / (1 - 0.9**30) for i in range(1, 31)]  # sum to one: the start is divided out
    iterates = [x.mean(0) + 0.8**i * (3.0 - x.mean(0)) for i in range(1, 31)]
    expected = sum(w * t for w, t in zip(weights, iterates, strict=True))
    assert sum(weights) == pytest.approx(1)
    assert torch.allclose(model.loc, expected, rtol=1e-5, atol=1e-6)


def test_tail_average_is_the_mean_of_the_second_half() -> None:
    x = rows()
    model, _ = mean_fit(x, 3.0, steps=31, lr=0.2, average="tail")
    geometric = sum(0.8**i for i in range(16, 32)) / 16
    expected = x.mean(0) + geometric * (3.0 - x.mean(0))
    assert torch.allclose(model.loc, expected, rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_validated() -> None:
    x = rows()
    _, result = mean_fit(x, 3.0, steps=20, lr=0.2, average="tail", validation=x, validate_every=10)
    for steps, loss in result.validation:
        model, _ = mean_fit(x, 3.0, steps=steps, lr=0.2)
        if steps == 20:
            geometric = sum(0.8**i for i in range(11, 21)) / 10
            model.loc.data = x.mean(0) + geometric * (3.0 - x.mean(0))
        expected = 0.5 * (x - model.loc.detach()).square().sum(1).mean() + math.log(2 * math.pi)
        assert loss == pytest.approx(float(expected), rel=1e-5)
    assert len(result.validation) == 2


def test_averaging_takes_the_noise_out() -> None:
    """Mini-batch SGD at rate a scatters about the mean x̄ with variance a s² / (B (2 − a)); 4000 averaged, far less."""
    x = rows(200, 1)
    model, _ = mean_fit(x, steps=4000, batch_size=1, lr=0.5, average="tail")
    # the mean over 2000 steps of noise with autocorrelation 0.5: sd s sqrt(1 / 2000); one iterate: s sqrt(1 / 3)
    error = float((model.loc.detach() - x.mean(0)).abs())
    assert error < 4 * float(x.std()) / math.sqrt(2000)


# ----------------------------------------------------------------------- optimizer, schedule, clipping, callback --
def test_clipping_scales_the_gradient_down() -> None:
    x = rows()
    x = x - x.mean(0)
    model, result = mean_fit(x, 30.0, steps=1, lr=1.0, clip_norm=0.25)
    norm = 30 * math.sqrt(2)
    assert result.history["grad_norm"][0] == pytest.approx(norm, rel=1e-6)  # as it was before
    assert torch.allclose(model.loc, torch.full((2,), 30 - 0.25 / math.sqrt(2)))
    loose, _ = mean_fit(x, 0.01, steps=1, lr=1.0, clip_norm=0.25)
    assert torch.allclose(loose.loc, torch.zeros(2), atol=1e-7)  # a smaller gradient is left alone


def test_cosine_runs_from_lr_to_zero() -> None:
    x = rows()
    model, result = mean_fit(x, 3.0, steps=20, lr=0.2, schedule="cosine")
    rates = [0.1 * (1 + math.cos(math.pi * i / 20)) for i in range(20)]
    assert result.history["lr"] == pytest.approx(rates)
    left = math.prod(1 - rate for rate in rates)
    assert torch.allclose(model.loc, x.mean(0) + left * (3.0 - x.mean(0)), rtol=1e-5, atol=1e-6)


def test_a_schedule_of_ones_own() -> None:
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.1)
    _, result = mean_fit(rows(), steps=7, lr=0.5, schedule=schedule)
    assert result.history["lr"] == pytest.approx([0.5] * 3 + [0.05] * 3 + [0.005])


def test_an_optimizer_of_ones_own() -> None:
    x = rows()
    model, result = mean_fit(x, 3.0, steps=12, lr=0.1, optimizer=functools.partial(SGD, momentum=0.5))
    loc, speed = torch.full((2,), 3.0), torch.zeros(2)
    for _ in range(12):
        speed = 0.5 * speed + (loc - x.mean(0))
        loc = loc - 0.1 * speed
    assert torch.allclose(model.loc, loc, rtol=1e-5)
    assert result.config["optimizer"] == "partial"


def test_adam_is_the_default() -> None:
    x = rows()
    model, _ = mean_fit(x, 3.0, steps=15, lr=0.05, optimizer=None)
    loc = nn.Parameter(torch.full((2,), 3.0))
    adam = torch.optim.Adam([loc], lr=0.05)
    for _ in range(15):
        adam.zero_grad()
        (0.5 * (x - loc).square().sum(1).mean()).backward()
        adam.step()
    assert torch.allclose(model.loc, loc, rtol=1e-5)


def test_callback_sees_every_step_and_stops_the_run() -> None:
    seen = []

    def callback(step: int, values: dict[str, float]) -> bool:
        seen.append((step, values))
        return step == 7

    _, result = mean_fit(rows(), steps=20, validation=rows(9), validate_every=3, callback=callback)
    assert [step for step, _ in seen] == list(range(1, 8))
    assert [values["loss"] for _, values in seen] == result.history["loss"]
    assert [values["grad_norm"] for _, values in seen] == result.history["grad_norm"]
    assert [step for step, values in seen if "validation" in values] == [3, 6]
    assert result.stopped_at == 7
    assert mean_fit(rows(), steps=3, callback=lambda step, values: 1)[1].stopped_at is None  # only True stops


def test_history_has_a_number_for_each_step() -> None:
    _, result = mean_fit(rows(), steps=9, batch_size=10)
    assert set(result.history.columns) == {"loss", "grad_norm", "lr", "seconds"}
    assert all(len(column) == 9 for column in result.history.columns.values())
    assert len(result.history) == result.steps == 9
    assert result.history["seconds"] == sorted(result.history["seconds"])
    assert "validation" not in result.history


def test_progress_is_shown_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    mean_fit(rows(), steps=20, progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "20/20" in shown.err
    assert "nats per datum" in shown.err
    for progress in (False, None):  # not a terminal here
        mean_fit(rows(), steps=20, progress=progress)
        assert capfd.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------- housekeeping --
def test_modes_gradients_and_frozen_parameters_are_left_as_they_were() -> None:
    vae = small_vae()
    vae.model.eval()
    for parameter in vae.guide.parameters():
        parameter.requires_grad_(False)
    before = state(vae)
    fit(pg.ELBO()(vae), rows(30, 3), steps=3)
    assert not vae.model.training
    assert vae.guide.training
    assert all(parameter.grad is None for parameter in vae.parameters())
    changed = {name for name, tensor in state(vae).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("model.") for name in changed)
    for parameter in vae.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train: every parameter is frozen"):
        fit(pg.ELBO()(vae), rows(30, 3), steps=1)


# -------------------------------------------------------------------------------------------------- divergence --
class Root(nn.Module):
    """A mean, and a root that is not a number in rows whose first value is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.slope * x[:, :1].sqrt() + 0 * self.unused, 1.0).to_event(1), obs=x[:, 1:])


def root_data() -> Tensor:
    x = rows(40).abs()
    x[17, 0] = -1.0
    return x


def test_divergence_names_the_row_before_anything_has_moved() -> None:
    model = Root()
    with pytest.raises(pg.Divergence) as caught:
        fit(pg.MaximumLikelihood()(model), root_data(), steps=5)
    error = caught.value
    assert (error.step, error.rows) == (0, [17])
    assert "model.slope" in error.parameters
    for part in ("loss is not finite at step 0", "'model.slope'", "at rows [17] of the data", "after 0 steps", "lr="):
        assert part in str(error)
    assert "\n" not in str(error)
    assert float(model.slope.detach()) == 1
    assert len(error.result.history) == 0


def test_divergence_in_a_batch_keeps_the_last_good_state() -> None:
    model, iterates = Root(), [torch.ones(())]
    with pytest.raises(pg.Divergence) as caught:
        fit(
            pg.MaximumLikelihood()(model), root_data(), steps=200, batch_size=1, seed=8, lr=0.01,
            callback=lambda step, values: iterates.append(model.slope.detach().clone()) is not None,
        )  # fmt: skip
    error = caught.value
    assert error.rows == [17]
    assert error.step == len(iterates) - 1 == len(error.result.history)
    assert error.step > 10
    good = int(re.findall(r"state after (\d+) steps", str(error))[0])
    assert 0 <= error.step - good <= 10
    assert torch.equal(model.slope, iterates[good])
    assert not torch.equal(iterates[good], iterates[0])
    assert error.result.module.model is model
    assert error.result.stopped_at == error.step
    assert model.slope.grad is None


@pytest.mark.parametrize("batch_size", [None, 5])
def test_rows_are_counted_in_the_data_given(batch_size: int | None) -> None:
    x = root_data()
    with pytest.raises(pg.Divergence) as caught:
        fit(pg.MaximumLikelihood()(Root()), x, steps=99, lr=0.01, batch_size=batch_size, validation=0.2, seed=3)
    assert caught.value.rows == [17]


def test_rows_of_a_loader_are_counted_in_the_batch() -> None:
    x = root_data()
    with pytest.raises(pg.Divergence, match=r"at rows \[7\] of the batch") as caught:
        fit(pg.MaximumLikelihood()(Root()), DataLoader(TensorDataset(x), batch_size=10), steps=9)
    assert caught.value.step == 1


@pytest.mark.parametrize("optimizer", [None, SGD])
def test_a_learning_rate_that_blows_up(optimizer: Any) -> None:
    vae, x = small_vae(), rows(40, 3)
    with pytest.raises(pg.Divergence, match="not finite at step") as caught:
        fit(pg.ELBO()(vae), x, steps=50, lr=1e20, optimizer=optimizer, validation=0.25, validate_every=1, average=0.9)
    assert caught.value.step >= 1
    assert caught.value.rows
    assert caught.value.parameters
    assert all(bool(torch.isfinite(tensor).all()) for tensor in vae.state_dict().values())
    assert bool(torch.isfinite(vae.lower_bound(x)).all())


def test_weights_beyond_repair_reach_no_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": SGD, "checkpoint": tmp_path / "checkpoint.pt", "checkpoint_every": 1}
    for start, steps in ((30.0, 9), (3.0, 2)):  # the first step of 30 · 3e37 overflows; one of 3 · 3e37 does not
        with pytest.raises(pg.Divergence):
            mean_fit(rows(), start, steps=steps, lr=3e37, **options)
        assert (tmp_path / "checkpoint.pt").exists() == (start == 3.0)
    tensors = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["tensors"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def test_a_gradient_that_is_not_finite() -> None:
    class Kink(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc.square().sqrt(), 1.0).to_event(1), obs=x)

    with pytest.raises(
        pg.Divergence, match=r"the gradient is not finite at step 0, in the gradient of 'model.loc'"
    ) as e:
        fit(pg.MaximumLikelihood()(Kink()), rows(), steps=3)
    assert e.value.rows == []  # every row's loss is a number
    assert e.value.parameters == ["model.loc"]


def test_a_wrong_program_is_no_divergence() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.param("rate", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=rate).to_event(1), obs=x)

    with pytest.raises(ValueError, match="within the support"):  # finite all the same without validation
        fit(pg.MaximumLikelihood()(model), rows(), steps=2)
    pyro.clear_param_store()


@pytest.mark.slow
def test_divergence_of_a_compiled_step() -> None:
    for steps, batch_size in ((3, None), (200, 1)):
        model = Root()
        with pytest.raises(pg.Divergence) as caught:
            fit(
                pg.MaximumLikelihood()(model),
                root_data(),
                steps=steps,
                batch_size=batch_size,
                seed=8,
                compile=True,
                lr=0.01,
            )
        assert caught.value.rows == [17]
        assert "model.slope" in caught.value.parameters
        assert bool(torch.isfinite(model.slope))


# -------------------------------------------------------------------------------------------------- checkpoints --
EVERYTHING: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "average": 0.9, "validation": 0.2, "validate_every": 3, "schedule": "cosine", "clip_norm": 1.0, "patience": 30,
    },
    "tail": {"average": "tail", "optimizer": functools.partial(SGD, momentum=0.9), "lr": 1e-3},
}  # fmt: skip


def run(
    path: Path | None, stop: Callable[[int], Any] = lambda step: None, **options: Any
) -> tuple[pg.VAE, pg.FitResult]:
    vae = small_vae()
    module = pg.IWAE(2)(vae)
    options = {"steps": 40, "batch_size": 14, "checkpoint": path, "checkpoint_every": 6, "lr": 0.01, **options}
    result = fit(module, rows(75, 3), callback=lambda step, values: stop(step), **options)
    return vae, result


def interrupt(step: int) -> Callable[[int], None]:
    def stop(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("step", [3, 12, 23])  # before the first checkpoint; at one; amid an epoch of 5 or 4 batches
def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path, name: str, step: int) -> None:
    options = EVERYTHING[name]
    whole, expected = run(None, **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "checkpoint.pt", interrupt(step), **options)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == step
    resumed, result = run(tmp_path / "checkpoint.pt", **options)
    assert same(state(whole), state(resumed))
    for column in ("loss", "grad_norm", "lr"):
        assert result.history[column] == expected.history[column]
    assert result.validation == expected.validation
    assert (result.best_step, result.stopped_at) == (expected.best_step, expected.stopped_at)


def test_an_interrupt_within_a_step_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    class Interrupted(SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            Interrupted.count += 1
            if Interrupted.count == 15:
                raise KeyboardInterrupt  # weights moved, nothing else did

    Interrupted.count, Interrupted.__qualname__ = 0, "SGD"
    whole, _ = run(None, optimizer=SGD)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "checkpoint.pt", optimizer=Interrupted)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 12
    resumed, _ = run(tmp_path / "checkpoint.pt", optimizer=SGD)
    assert same(state(whole), state(resumed))


def test_ctrl_c_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    class Signalled(SGD):
        def step(self, closure: Any = None) -> Any:
            Signalled.count += 1
            if Signalled.count == 15:
                signal.raise_signal(signal.SIGINT)
            super().step(closure)

    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        Signalled.count, Signalled.__qualname__ = 0, "SGD"
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "checkpoint.pt", optimizer=Signalled)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 15
    resumed, _ = run(tmp_path / "checkpoint.pt", optimizer=SGD)
    assert same(state(resumed), state(run(None, optimizer=SGD)[0]))


def test_a_complete_or_stopped_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    for name, options in (("a", {}), ("b", {"validation": 0.2, "validate_every": 1, "patience": 1, "lr": 0.5})):
        path = tmp_path / name
        first, result = run(path, **options)
        assert (result.stopped_at is None) == (name == "a")
        again, repeated = run(path, lambda step: pytest.fail("a step was run"), **options)
        assert same(state(first), state(again))
        assert repeated.stopped_at == result.stopped_at
        assert repeated.best_step == result.best_step
        assert repeated.history.columns == result.history.columns


def test_a_callback_that_stops_leaves_a_run_to_go_on_with(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    _, result = run(path, lambda step: step == 12)
    assert result.stopped_at == 12
    resumed, result = run(path)
    assert result.stopped_at is None
    assert len(result.history) == 40
    assert same(state(resumed), state(run(None)[0]))


def test_a_loader_goes_on_with_a_new_epoch(tmp_path: Path) -> None:
    model = Mean(2.0)
    loader = DataLoader(TensorDataset(rows(40)), batch_size=10)
    options: dict[str, Any] = {"steps": 10, "optimizer": SGD, "checkpoint": tmp_path / "checkpoint.pt"}
    with pytest.raises(KeyboardInterrupt):
        fit(pg.MaximumLikelihood()(model), loader, callback=lambda step, values: interrupt(6)(step), **options)
    result = fit(pg.MaximumLikelihood()(Mean(2.0)), loader, **options)
    assert len(result.history) == 10


# ---------------------------------------------------------------------------------------------- save and load --
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"likelihood": "bernoulli", "guide": "full_rank"},
        {"likelihood": "categorical", "levels": 3, "prior": "mixture", "components": 3},
        {"likelihood": "discretized_logistic", "levels": 3, "context_shape": 2},
        {"scale": 0.5},
        {"scale": "shared", "latent_dim": 4, "hidden": (6, 7)},
        {"scale": "predicted", "encoder": "mlp", "decoder": "mlp"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_program_of_numbers_and_strings_comes_back(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    vae = small_vae(**options).to(dtype)
    x = rows(30, 3).to(dtype)
    x = x if options.get("likelihood", "normal") == "normal" else (x > 0).to(dtype)
    batch = (x,) if "context_shape" not in options else (x, rows(30, 2).to(dtype))
    result = fit(pg.IWAE(3, gradient="dreg")(vae), batch, steps=4, validation=batch)
    result.save(tmp_path)
    again = pg.load(tmp_path)
    assert same(state(vae), state(again.program))
    assert repr(again) == repr(result)
    assert repr(again.module.objective) == repr(result.module.objective)
    assert again.history.columns == result.history.columns
    assert again.validation == result.validation
    assert again.config == json.loads(json.dumps(result.config))
    torch.manual_seed(0)
    bound = vae.lower_bound(*batch)
    torch.manual_seed(0)
    assert torch.equal(bound, again.program.lower_bound(*batch))
    assert bound.dtype is dtype


def test_a_program_of_modules_comes_back_into_one_like_it(tmp_path: Path) -> None:
    def made() -> pg.VAE:
        return pg.VAE(3, encoder=nn.Linear(3, 4), decoder=nn.Linear(2, 3))

    result = fit(pg.ELBO()(made()), rows(30, 3), steps=4)
    result.save(tmp_path)
    with pytest.raises(
        ValueError, match=r"modules of its own, which loading cannot build.*pg.load\(folder, into=program\)"
    ):
        pg.load(tmp_path)
    program = made()
    again = pg.load(tmp_path, into=program)
    assert again.program is program
    assert same(state(program), state(result.program))


def test_a_pair_comes_back_into_an_objective_module(tmp_path: Path) -> None:
    model, result = mean_fit(rows(), 2.0, steps=3)
    result.save(tmp_path)
    other = Mean()
    again = pg.load(tmp_path, into=pg.MaximumLikelihood()(other))
    assert torch.equal(other.loc, model.loc)
    assert again.history.columns == result.history.columns
    with pytest.raises(TypeError, match=r"a model/guide pair: result\.module\.model"):
        _ = again.program


def test_repr_says_what_was_fitted_and_how_it_went() -> None:
    result = fit(pg.IWAE(3)(small_vae()), rows(40, 3), steps=20, validation=0.25, validate_every=5, patience=1, lr=0.3)
    text = repr(result)
    assert text.startswith("FitResult(VAE by IWAE(num_particles=3")
    assert f"{result.steps} steps in " in text
    train = -sum(result.history["loss"][-max(1, result.steps // 20) :]) / max(1, result.steps // 20)
    assert f"train ≥ {train:.2f} nats per datum" in text
    best = -dict(result.validation)[result.best_step or 0]
    assert f"validation ≥ {best:.2f} nats per datum (best, step {result.best_step})" in text
    assert (result.stopped_at is None) or f"stopped at step {result.stopped_at}" in text
    assert "train = -" in repr(mean_fit(rows(), steps=2)[1])  # an exact likelihood
