"""Bad input, tried as a new user would: every refusal names the argument, what was given, and the fix."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from typer.testing import CliRunner

import pyro_gen as pg
from pyro_gen.cli import app

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
BINARY = (X > 0).float()
METHOD = pg.ImportanceSampling(30, seed=0)


def vae(**options: Any) -> pg.VAE:
    return pg.VAE(3, **{"hidden": (4,), **options})


def fit(data: Any = X, program: pg.VAE | None = None, **options: Any) -> pg.FitResult:
    options = {"progress": False, "seed": 0, **options}
    if "epochs" not in options:
        options.setdefault("steps", 2)
    return pg.fit(pg.ELBO()(program or vae()), data, **options)


def with_row(row: int, value: float) -> Tensor:
    x = X.clone()
    x[row, 1] = value
    return x


class Rows(Dataset[Any]):
    """A Dataset over a list."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from X


def loader(data: Dataset[Any] | None = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X) if data is None else data, **{"batch_size": 10, **options})


constant = torch.cat([X[:, :2], torch.full((40, 1), 2.5)], 1)

Case = tuple[Callable[[], object], type[Exception], tuple[str, ...]]

DATA: dict[str, Case] = {
    "another width": (lambda: fit(torch.randn(40, 4)), ValueError, ("x", "(rows, 3)", "(40, 4)", "event_shape=")),
    "1-D x": (lambda: fit(torch.randn(40)), ValueError, ("x", "(40,)", "first dimension counts rows", "unsqueeze")),
    "a single row, flat": (lambda: fit(X[0]), ValueError, ("x", "(3,)", "x.unsqueeze(0)")),
    "a number": (lambda: fit(torch.tensor(1.0)), ValueError, ("x", "(rows, 3)", "got ()")),
    "images not flat": (lambda: fit(X.reshape(40, 1, 3)), ValueError, ("x", "(40, 1, 3)", "x.reshape(-1, 3)")),
    "NaN": (lambda: fit(with_row(7, np.nan)), ValueError, ("x is not finite", "1 of 40 rows", "row 7", "drop")),
    "infinite": (lambda: fit(with_row(9, np.inf)), ValueError, ("x is not finite", "row 9", "drop")),
    "NaN in an array": (lambda: fit(with_row(7, np.nan).numpy()), ValueError, ("x is not finite", "row 7")),
    "integers": (lambda: fit(X.long()), TypeError, ("x must be floating point", "int64", "x.float()")),
    "booleans": (lambda: fit(X > 0), TypeError, ("x must be floating point", "bool", "x.float()")),
    "bytes": (lambda: fit((X > 0).to(torch.uint8)), TypeError, ("x must be floating point", "uint8", "x.float()")),
    "complex": (lambda: fit(X + 0j), TypeError, ("x must be floating point", "complex64", "real and imaginary")),
    "integer array": (lambda: fit(X.long().numpy()), TypeError, ("x must be floating point", "x.float()")),
    "byte array": (lambda: fit(np.zeros((40, 3), np.uint8)), TypeError, ("x must be floating point", "uint8")),
    "complex array": (lambda: fit(X.numpy() + 0j), TypeError, ("x must be floating point", "real and imaginary")),
    "object array": (lambda: fit(np.full((4, 3), None)), TypeError, ("x", "dtype object", "astype")),
    "text array": (lambda: fit(np.full((4, 3), "a")), TypeError, ("x", "dtype <U1", "pass numbers")),
    "a list of lists": (lambda: fit([[1.0, 2.0, 3.0]] * 2), TypeError, ("data", "list of list", "torch.as_tensor")),
    "a list of rows": (lambda: fit(list(X)), ValueError, ("data", "40 parts", "torch.stack(data)")),
    "a name": (lambda: fit("digits.npy"), TypeError, ("x", "str", "pg.datasets.load('digits.npy')")),
    "a dict": (lambda: fit({"x": X}), TypeError, ("x", "dict")),
    "nothing": (lambda: fit(None), TypeError, ("x", "NoneType")),
    "a table": (lambda: fit(__import__("pandas").DataFrame(X.numpy())), TypeError, ("x", "DataFrame", "x.to_numpy()")),
    "another dtype": (lambda: fit(X.double()), TypeError, ("x is torch.float64", "x.to(torch.float32)")),
    "no rows": (lambda: fit(X[:0]), ValueError, ("x is empty", "at least one")),
    "an empty tuple": (lambda: fit(()), ValueError, ("data is empty", "at least one")),
    "one row": (lambda: fit(X[:1]), ValueError, ("data have one row", "give more rows")),
    "fewer rows than a batch": (
        lambda: fit(batch_size=64), ValueError, ("batch_size=64", "40 rows", "leave it out", "40 or less"),
    ),
    "a constant column": (lambda: fit(constant), ValueError, ("x is constant in column 2", "1 of 3", "Drop", "scale=")),
    "a constant column, predicted noise": (
        lambda: fit(constant, vae(scale="predicted")), ValueError, ("x is constant in column 2", "scale='shared'"),
    ),
    "equal rows": (lambda: fit(X[:1].expand(40, 3), vae(scale="shared")), ValueError, ("x are equal", "scale=1.0")),
    "real numbers as binary": (
        lambda: fit(X, vae(likelihood="bernoulli")), ValueError, ("x has values outside", "0 or 1", "likelihood="),
    ),
    "bytes of an image as binary": (
        lambda: fit(255 * BINARY, vae(likelihood="bernoulli")), ValueError, ("outside", "= 255", "recode x"),
    ),
    "a level too many": (
        lambda: fit(3 * BINARY, vae(likelihood="categorical", levels=3)), ValueError, ("0 … 2", "= 3", "levels="),
    ),
    "negative levels": (
        lambda: fit(-BINARY, vae(likelihood="discretized_logistic", levels=3)), ValueError, ("0 … 2", "= -1"),
    ),
    "labels where there is no context": (
        lambda: fit((X, torch.zeros(40))), ValueError, ("context was given", "pass x alone", "context_shape="),
    ),
    "labels as integers": (
        lambda: fit((X, torch.zeros(40, 10).long()), vae(context_shape=10)), TypeError, ("context", "int64", "one_hot"),
    ),
    "labels not one-hot": (
        lambda: fit((X, torch.zeros(40)), vae(context_shape=10)), ValueError, ("context", "(rows, 10)", "(40,)"),
    ),
    "no context": (lambda: fit(X, vae(context_shape=2)), ValueError, ("context is missing", "(x, context)")),
    "too few contexts": (
        lambda: fit((X, torch.zeros(39, 2)), vae(context_shape=2)), ValueError, ("40 rows", "context has 39"),
    ),
    "three parts": (lambda: fit((X, X, X)), ValueError, ("data", "(x, context)", "3 parts")),
    "data that require grad": (lambda: fit(X.clone().requires_grad_()), ValueError, ("x requires grad", "x.detach()")),
    "data on another device": (lambda: fit(X.to("meta")), ValueError, ("data are on meta", "on cpu", ".to('cpu')")),
    "data of a pair on another device": (
        lambda: pg.fit(pg.ELBO()(vae().model, vae().guide), X.to("meta"), steps=1, progress=False),
        ValueError, ("data are on meta", "on cpu"),
    ),
    "a loader of dicts": (
        lambda: fit(loader(Rows([{"x": row} for row in X]))), TypeError, ("DataLoader yields dict", "collate_fn"),
    ),
    "a loader of nothing": (
        lambda: fit(loader(Rows([]))), ValueError, ("DataLoader yields nothing", "0 rows", "more rows"),
    ),
    "a loader that drops its only batch": (
        lambda: fit(loader(batch_size=64, drop_last=True)), ValueError, ("nothing", "40 rows", "drop_last=False"),
    ),
    "a loader of empty batches": (
        lambda: fit(loader(collate_fn=lambda rows: ())), TypeError, ("DataLoader yields []", "x first"),
    ),
    "a loader of None": (
        lambda: fit(loader(collate_fn=lambda rows: None)), TypeError, ("DataLoader yields NoneType", "x first"),
    ),
    "a loader without a length": (lambda: fit(loader(Stream())), TypeError, ("no length", "__len__")),
    "a loader of integers": (
        lambda: fit(loader(TensorDataset(X.long()))), TypeError, ("x must be floating point", "x.float()"),
    ),
    "a loader of labels too": (
        lambda: fit(loader(TensorDataset(X, torch.zeros(40)))), ValueError, ("context was given", "pass x alone"),
    ),
    "a loader of unequal batches": (
        lambda: fit(DataLoader(Rows([X[:10], X[:10, :2]]), batch_size=None)), ValueError, ("batch 1", "(2,)", "(3,)"),
    ),
    "a loader and a batch size": (lambda: fit(loader(), batch_size=5), ValueError, ("batch_size", "leave it out")),
    "a dataset of dicts": (lambda: fit(Rows([{"x": row} for row in X])), TypeError, ("data", "rows of dict", "tensor")),
    "a dataset of pictures and labels": (
        lambda: fit(Rows([(row, 3) for row in X])), TypeError, ("rows of Tensor, int", "collate_fn"),
    ),
    "a dataset of unequal rows": (lambda: fit(Rows([X[0], X[1, :2]])), ValueError, ("unequal shapes", "row 1", "pad")),
    "an empty dataset": (lambda: fit(Rows([])), ValueError, ("data is an empty Dataset", "at least one")),
    "a dataset without a length": (lambda: fit(Stream()), TypeError, ("without a length", "__len__")),
}  # fmt: skip

PROGRAMS: dict[str, Case] = {
    "likelihood": (lambda: vae(likelihood="gauss"), ValueError, ("likelihood", "'gauss'", "'normal'")),
    "guide": (lambda: vae(guide="spline"), ValueError, ("guide", "'spline'", "'full_rank'")),
    "prior": (lambda: vae(prior="spline"), ValueError, ("prior", "'spline'", "'mixture'")),
    "encoder": (lambda: vae(encoder="cnn"), ValueError, ("encoder", "'cnn'", "'conv'")),
    "scale": (lambda: vae(scale="one"), ValueError, ("scale", "'one'", "'shared'")),
    "gradient": (lambda: pg.IWAE(2, gradient="x"), ValueError, ("gradient", "'x'", "'dreg'")),
    "levels of the digits": (lambda: pg.datasets.digits(levels=3), ValueError, ("levels", "17")),
    "negative scale": (lambda: vae(scale=-1.0), ValueError, ("scale", "positive", "-1.0")),
    "levels missing": (lambda: vae(likelihood="categorical"), ValueError, ("levels=", "17 for data 0 … 16")),
    "levels too many": (lambda: vae(levels=3), ValueError, ("levels=", "'normal'")),
    "scale too many": (lambda: vae(likelihood="bernoulli", scale=1.0), ValueError, ("scale=", "'bernoulli'")),
    "convolutions of flat rows": (lambda: vae(encoder="conv"), ValueError, ("encoder='conv'", "channels", "(3,)")),
    "latent_dim 0": (lambda: vae(latent_dim=0), ValueError, ("latent_dim", "at least 1", "got 0")),
    "latent_dim 2.0": (lambda: vae(latent_dim=2.0), ValueError, ("latent_dim", "an int", "got 2.0")),
    "hidden as a number": (lambda: vae(hidden=8), ValueError, ("hidden", "(128, 128)", "got 8")),
    "hidden 0": (lambda: vae(hidden=(8, 0)), ValueError, ("hidden", "at least 1", "got 0")),
    "components 0": (lambda: vae(prior="mixture", components=0), ValueError, ("components", "got 0")),
    "event_shape 0": (lambda: pg.VAE(0), ValueError, ("event_shape", "positive int", "got 0")),
    "event_shape data": (lambda: pg.VAE(X), ValueError, ("event_shape", "positive int", "got Tensor")),
    "a prior of another size": (
        lambda: vae(prior=dist.Normal(torch.zeros(3), 1.0).to_event(1)), ValueError, ("prior", "(2,)", "(3,)"),
    ),
    "an encoder of another size": (
        lambda: fit(program=vae(encoder=nn.Linear(3, 3))), ValueError, ("encoder must give 4 numbers", "latent_dim=2"),
    ),
    "a decoder of another size": (
        lambda: fit(program=vae(decoder=nn.Linear(2, 4))), ValueError, ("decoder must give", "3 in all", "(40, 4)"),
    ),
    "K of IWAE": (lambda: pg.IWAE(0), ValueError, ("num_particles", "at least 1", "got 0")),
    "K of ELBO": (lambda: pg.ELBO(0), ValueError, ("num_particles", "at least 1", "got 0")),
    "K of importance sampling": (lambda: pg.ImportanceSampling(0), ValueError, ("num_samples", "at least 1", "got 0")),
    "half a K": (lambda: pg.IWAE(2.5), ValueError, ("num_particles", "an int", "got 2.5")),
    "a program for a K": (lambda: pg.ELBO(vae()), ValueError, ("num_particles", "got VAE")),
    "an objective of a class": (lambda: pg.ELBO()(pg.VAE), TypeError, ("class VAE", "make an instance")),
    "likelihood of a bound": (
        lambda: pg.MaximumLikelihood()(vae()), TypeError, ("Exact", "VAE is Bounded", "ELBO, IWAE"),
    ),
    "no draws": (lambda: vae().sample(0), ValueError, ("n must be", "got 0")),
    "no particles": (lambda: vae().lower_bound(X, particles=0), ValueError, ("particles", "got 0")),
    "z of another size": (lambda: vae().decode(X), ValueError, ("z must be", "(..., 2)", "(40, 3)")),
    "encode a single row": (lambda: vae().encode(X[0]), ValueError, ("x must have shape", "x.unsqueeze(0)")),
}  # fmt: skip

ARGUMENTS: dict[str, Case] = {
    "lr 0": (lambda: fit(lr=0.0), ValueError, ("lr must be a positive number", "got 0.0")),
    "lr negative": (lambda: fit(lr=-1e-3), ValueError, ("lr must be a positive number", "got -0.001")),
    "lr infinite": (lambda: fit(lr=float("inf")), ValueError, ("lr must be a positive number", "got inf")),
    "lr NaN": (lambda: fit(lr=float("nan")), ValueError, ("lr must be a positive number", "got nan")),
    "lr as text": (lambda: fit(lr="1e-3"), ValueError, ("lr must be a positive number", "got '1e-3'")),
    "lr missing": (lambda: fit(lr=None), ValueError, ("lr must be a positive number", "got None")),
    **{
        f"validation {value}": (
            lambda value=value: fit(validation=value), ValueError, ("validation", "between 0 and 1", f"got {value}"),
        )
        for value in (0.0, 1.0, 1.5, -0.1, 2, True, float("nan"))
    },
    "validation of nothing": (lambda: fit(validation=0.001), ValueError, ("validation=0.001", "40 rows", "more rows")),
    "validation leaves one row": (lambda: fit(X[:3], validation=0.6), ValueError, ("one row to train on", "more rows")),
    "validation of another width": (
        lambda: fit(validation=X[:, :2]), ValueError, ("in validation=", "(rows, 3)", "(40, 2)"),
    ),
    "validation as a loader": (
        lambda: fit(validation=loader()), TypeError, ("validation is a DataLoader", "loader.dataset"),
    ),
    "a fraction of a loader": (lambda: fit(loader(), validation=0.1), ValueError, ("validation", "validation rows")),
    "patience alone": (lambda: fit(patience=3), ValueError, ("patience= needs validation=", "0.1")),
    "validate_every alone": (lambda: fit(validate_every=3), ValueError, ("validate_every= needs validation=",)),
    "steps and epochs": (lambda: fit(steps=2, epochs=2), ValueError, ("steps= or epochs=", "one of the two")),
    "neither": (lambda: fit(steps=None), ValueError, ("steps= or epochs=", "one of the two")),
    "steps 0": (lambda: fit(steps=0), ValueError, ("steps must be an int of at least 1", "got 0")),
    "steps 1e3": (lambda: fit(steps=1e3), ValueError, ("steps must be an int", "got 1000.0")),
    "batch_size 0": (lambda: fit(batch_size=0), ValueError, ("batch_size", "at least 1", "got 0")),
    "optimizer made": (
        lambda: fit(optimizer=torch.optim.SGD(vae().parameters())), TypeError, ("optimizer", "torch.optim.SGD"),
    ),
    "optimizer of Pyro": (
        lambda: fit(optimizer=pyro.optim.Adam({"lr": 1e-3})), TypeError, ("optimizer", "Pyro", "torch.optim.Adam"),
    ),
    "optimizer named": (lambda: fit(optimizer="adam"), TypeError, ("optimizer", "callable", "'adam'")),
    "schedule": (lambda: fit(schedule="linear"), ValueError, ("schedule", "'cosine'", "'linear'")),
    "schedule of numbers": (lambda: fit(schedule=lambda o: 3), TypeError, ("schedule(optimizer)", "LRScheduler", "3")),
    "clip_norm": (lambda: fit(clip_norm=0), ValueError, ("clip_norm", "positive", "got 0")),
    "average": (lambda: fit(average="ema"), ValueError, ("average", "'tail'", "0.999", "'ema'")),
    "average 1": (lambda: fit(average=1.0), ValueError, ("average", "(0, 1)", "got 1.0")),
    "compile": (lambda: fit(compile="yes"), ValueError, ("compile", "'auto'", "'yes'")),
    "device": (lambda: fit(device="gpu"), ValueError, ("device", "'cuda'", "'gpu'")),
    "device not there": (lambda: fit(device="cuda:99"), ValueError, ("device='cuda:99'", "'cpu'")),
    "seed": (lambda: fit(seed=1.5), ValueError, ("seed must be an int", "got 1.5")),
    "progress": (lambda: fit(progress="no"), ValueError, ("progress", "True", "'no'")),
    "callback": (lambda: fit(callback="print"), TypeError, ("callback", "callback(step, values)", "'print'")),
    "checkpoint_every": (lambda: fit(checkpoint_every=0), ValueError, ("checkpoint_every", "at least 1")),
    "a program to fit": (
        lambda: pg.fit(vae(), X, steps=1), TypeError, ("pg.ELBO()(program)", "got VAE"),
    ),
    "an objective to fit": (
        lambda: pg.fit(pg.ELBO(), X, steps=1), TypeError, ("pg.ELBO()(program)", "got ELBO"),
    ),
}  # fmt: skip

EVIDENCE: dict[str, Case] = {
    "another width": (lambda: pg.log_evidence(vae(), X[:, :2], method=METHOD), ValueError, ("(rows, 3)", "(40, 2)")),
    "1-D x": (lambda: pg.log_evidence(vae(), X[0], method=METHOD), ValueError, ("x", "x.unsqueeze(0)")),
    "NaN": (lambda: pg.log_evidence(vae(), with_row(7, np.nan), method=METHOD), ValueError, ("x is not", "row 7")),
    "integers": (lambda: pg.log_evidence(vae(), X.long(), method=METHOD), TypeError, ("x must be", "x.float()")),
    "an array": (
        lambda: pg.log_evidence(vae(), X.numpy(), method=METHOD), TypeError, ("x must be", "torch.as_tensor(x)"),
    ),
    "no rows": (lambda: pg.log_evidence(vae(), X[:0], method=METHOD), ValueError, ("x is empty",)),
    "outside the support": (
        lambda: pg.log_evidence(vae(likelihood="bernoulli"), X, method=METHOD), ValueError, ("outside", "0 or 1"),
    ),
    "another device": (
        lambda: pg.log_evidence(vae(), X.to("meta"), method=METHOD), ValueError, ("x is on meta", "x.to('cpu')"),
    ),
    "a number for a method": (
        lambda: pg.log_evidence(vae(), X, method=100), TypeError, ("method", "pg.ImportanceSampling(5000)", "100"),
    ),
    "a class for a method": (
        lambda: pg.log_evidence(vae(), X, method=pg.ImportanceSampling), TypeError, ("method", "make an instance"),
    ),
    "a class for a program": (
        lambda: pg.log_evidence(pg.VAE, X, method=METHOD), TypeError, ("class VAE", "make an instance"),
    ),
    "a fit for a program": (
        lambda: pg.log_evidence(fit(), X, method=METHOD), TypeError, ("takes a program", "FitResult", ".program"),
    ),
}  # fmt: skip

ALL = {
    f"{group}: {name}": case
    for group, cases in {"data": DATA, "programs": PROGRAMS, "arguments": ARGUMENTS, "evidence": EVIDENCE}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", ALL)
def test_is_refused_by_name(name: str) -> None:
    call, expected, said = ALL[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert type(caught.value) is expected, repr(caught.value)
    message = str(caught.value)
    for part in said:
        assert part in message, message
    message = message.split("\nTrace Shapes:")[0].rstrip()  # Pyro adds the shapes of the program so far
    assert "\n" not in message
    assert len(message) < 500


def test_what_is_refused_changes_nothing() -> None:
    program = vae()
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    state = torch.get_rng_state()
    for options in ({"lr": 0.0}, {"validation": 2.0}, {"data": with_row(3, np.nan)}, {"batch_size": 99}):
        with pytest.raises(ValueError, match=r"must|not finite|more than"):
            fit(program=program, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


# -------------------------------------------------------------------------------------------- model/guide pairs --
def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(len(x), 3), 1.0).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))


def foreign_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
        pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))


def empty_guide(x: Tensor) -> None:
    pyro.param("loc", torch.zeros(()))


@pytest.mark.parametrize("objective", [pg.ELBO(), pg.IWAE(3)], ids=repr)
def test_sites_of_model_and_guide_must_match(objective: Any) -> None:
    for pair in (objective(model, foreign_guide), objective(pg.Bounded(model, foreign_guide, 3))):
        with pytest.raises(
            ValueError, match=r"guide site 'w' is not a latent site of the model \(which has 'z'\).*drop"
        ):
            pg.fit(pair, X, steps=1, progress=False)
    with pytest.raises(ValueError, match=r"latent site 'z' of the model is not in the guide.*Add it"):
        pg.fit(objective(model, empty_guide), X, steps=1, progress=False)


def test_evidence_needs_every_latent_in_the_guide() -> None:
    for other, said in ((foreign_guide, "guide site 'w'"), (empty_guide, "latent site 'z'")):
        with pytest.raises(ValueError, match=said):
            pg.log_evidence(pg.Bounded(model, other, 3), X, method=METHOD)


def test_data_of_a_pair_are_checked_too() -> None:
    for x, said in ((with_row(7, np.nan), "not finite"), (X[:0], "empty"), (torch.tensor(1.0), "rows")):
        with pytest.raises(ValueError, match=said):
            pg.fit(pg.ELBO()(model, guide), x, steps=1, progress=False)
    with pytest.raises(ValueError, match=r"the parts of data have \[40, 39\] rows"):
        pg.fit(pg.ELBO()(lambda x, y: model(x), lambda x, y: guide(x)), (X, X[:39]), steps=1, progress=False)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_data_beside_a_cpu_program() -> None:
    with pytest.raises(
        ValueError, match=r"data are on cuda:0 and the program on cpu: move one, program.to\('cuda:0'\)"
    ):
        fit(X.cuda())
    with pytest.raises(ValueError, match=r"x is on cuda:0 and the program on cpu"):
        pg.log_evidence(vae(), X.cuda(), method=METHOD)
    with pytest.raises(ValueError, match=r"in validation=: data are on cuda:0"):
        fit(X, validation=X.cuda())


# ------------------------------------------------------------------------------------------------- saved fits --
@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return fit().save(tmp_path / "fit")


def test_load_of_no_fit(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match=r"program.json is missing: .* not a folder written by FitResult.save"
        ):
            pg.load(folder)


@pytest.mark.parametrize("name", ["program.json", "weights.pt", "fit.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "missing"])
def test_load_of_a_damaged_fit(saved: Path, name: str, damage: str) -> None:
    file = saved / name
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "missing":
        file.unlink()
    elif name == "weights.pt":
        torch.save({"other": torch.zeros(3)}, file)
    else:
        file.write_text('{"name": "another program\'s file"}')
    with pytest.raises(
        FileNotFoundError if damage == "missing" else ValueError, match=name.replace(".", r"\.") + "|weights in"
    ):
        pg.load(saved)


def test_load_of_a_file_that_names_other_things(saved: Path) -> None:
    text = (saved / "program.json").read_text()
    for old, new, said in (
        ('"ELBO"', '"os.system"', "objective unknown here"),
        ('"float32"', '"load"', "no program of this version"),
        ('"latent_dim": 2', '"latent_dim": -2', "no program of this version"),
        ('"latent_dim"', '"width"', "no program of this version"),
        ('"format": 1', '"format": 99', "format 99"),
    ):
        assert old in text
        (saved / "program.json").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            pg.load(saved)


def test_load_into_another_program(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"the weights in .* do not fit this program"):
        pg.load(saved, into=vae(latent_dim=3))
    with pytest.raises(TypeError, match=r"into must be a program.*got 'vae'"):
        pg.load(saved, into="vae")


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_loading_runs_no_code(saved: Path, tmp_path: Path, how: str) -> None:
    bomb = Bomb(tmp_path / "it went off")
    for path in (saved / "weights.pt", tmp_path / "checkpoint.pt"):
        if how == "torch":
            torch.save({"weight": bomb}, path)
        else:
            path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match="not a file of tensors"):
        pg.load(saved)
    with pytest.raises(ValueError, match="not a file of tensors"):
        fit(checkpoint=tmp_path / "checkpoint.pt")
    assert not bomb.path.exists()
    if how == "torch":  # the fuse is live: this is what must not be called
        torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    else:
        pickle.loads((tmp_path / "checkpoint.pt").read_bytes())
    assert bomb.path.exists()


# ------------------------------------------------------------------------------------------------ checkpoints --
def test_checkpoints_cut_short_or_foreign(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    fit(checkpoint=path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is cut short, or not a file of tensors"):
        fit(checkpoint=path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"is not a checkpoint of pg.fit: name another file or remove it"):
        fit(checkpoint=path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0.5}, "lr was 0.001, is 0.5"),
        ({"steps": 9}, "steps was 2, is 9"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch_size": 10}, "batch_size was 40, is 10"),
        ({"average": 0.9}, "average was None, is 0.9"),
        ({"schedule": "cosine"}, "schedule was None, is 'cosine'"),
        ({"optimizer": torch.optim.SGD}, "optimizer was 'Adam', is 'SGD'"),
        ({"clip_norm": 1.0}, "clip_norm was None, is 1.0"),
        ({"validation": X[:5]}, "validation_rows was None, is 5"),
        ({"data": X + 1}, "data was"),
        ({"data": X[:20]}, "rows was 40, is 20"),
        ({"program": vae(latent_dim=3)}, "parameters was"),
    ],
)
def test_checkpoints_of_another_run(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    path = tmp_path / "checkpoint.pt"
    fit(checkpoint=path)
    with pytest.raises(ValueError, match="belongs to another run") as caught:
        fit(checkpoint=path, **options)
    assert said in str(caught.value)
    assert "name another file or remove it" in str(caught.value)


def test_checkpoints_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint must be a file.*is a folder: name one, as .*checkpoint\.pt"):
        fit(checkpoint=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint='.*' cannot be written \(.+\): name another file"):
        fit(checkpoint=tmp_path / "file" / "checkpoint.pt")


# ----------------------------------------------------------------------------------------------- command line --
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files good and bad, and a run."""
    here = tmp_path_factory.mktemp("bad")
    np.save(here / "good.npy", X.numpy())
    np.save(here / "narrow.npy", X[:, :2].numpy())
    np.save(here / "nan.npy", with_row(7, np.nan).numpy())
    np.save(here / "flat.npy", X[:, 0].numpy())
    np.save(here / "complex.npy", X.numpy() + 0j)
    np.save(here / "empty.npy", X[:0].numpy())
    np.save(here / "few.npy", X[:4].numpy())
    np.save(here / "one.npy", X[:1].numpy())
    np.save(here / "constant.npy", constant.numpy())
    np.save(here / "levels.npy", np.full((40, 3), 5) * (X > 0).numpy())
    np.save(here / "objects.npy", np.full((4, 3), None), allow_pickle=True)
    (here / "cut.npy").write_bytes((here / "good.npy").read_bytes()[:100])
    (here / "header.csv").write_text("a,b,c\n" + "1,2,3\n4,5,7\n" * 20)
    (here / "gap.csv").write_text("1,2,3\n4,,6\n" * 20)
    (here / "text.txt").write_text("1 2 3")
    torch.save({"model": {"weight": X}}, here / "foreign.pt")
    words = ["fit", "vae", "--data", str(here / "good.npy"), "--steps", "2", "--hidden", "4", "--no-plots"]
    assert CliRunner().invoke(app, [*words, "--importance-samples", "30", "--out", str(here / "run")]).exit_code == 0
    words = ["fit", "flow", "--data", str(here / "good.npy"), "--steps", "2", "--transform", "linear", "--no-plots"]
    assert CliRunner().invoke(app, [*words, "--out", str(here / "flow")]).exit_code == 0
    damaged = shutil.copytree(here / "run", here / "damaged")
    (damaged / "weights.pt").write_bytes((damaged / "weights.pt").read_bytes()[:500])
    (damaged / "checkpoint.pt").write_bytes((damaged / "checkpoint.pt").read_bytes()[:500])
    foreign = shutil.copytree(here / "run", here / "foreign")
    (foreign / "config.json").write_text('{"model": "another"}')
    for name, change in (("later", {"family": "nebula"}), ("lacking", {"layers": ...})):
        other = shutil.copytree(here / "flow", here / name)
        config = json.loads((other / "config.json").read_text())
        options = {key: value for key, value in {**config["options"], **change}.items() if value is not ...}
        (other / "config.json").write_text(json.dumps({**config, "options": options}))
    (here / "a folder").mkdir()
    return here


FIT = "fit vae --data good.npy --out new --steps 2"
FLOW = "fit flow --data good.npy --out new --steps 2"
AR = "fit autoregressive --data good.npy --out new --steps 2"
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no such file": ("fit vae --data no.npy --out new", ("--data", "no.npy", "no such file")),
    "no such name": ("fit vae --data mnist --out new", ("--data", "'digits'", ".npy")),
    "another suffix": ("fit vae --data text.txt --out new", ("--data", "text.txt", ".csv")),
    "a folder": ("fit vae --data . --out new", ("--data", "folder", ".npy")),
    "NaN": ("fit vae --data nan.npy --out new", ("--data", "nan.npy", "row 7", "drop")),
    "1-D x": ("fit vae --data flat.npy --out new", ("--data", "one-dimensional", "reshape(-1, 1)")),
    "complex": ("fit vae --data complex.npy --out new", ("--data", "complex", "real")),
    "no rows": ("fit vae --data empty.npy --out new", ("--data", "empty")),
    "one row": ("fit vae --data one.npy --out new", ("--validation", "--test", "1 rows", "more rows")),
    "few rows": ("fit vae --data few.npy --out new", ("--validation", "4 rows", "more rows")),
    "objects": ("fit vae --data objects.npy --out new", ("--data", "object", "pickle", "astype")),
    "a file cut short": ("fit vae --data cut.npy --out new", ("--data", "cut.npy", "cut short")),
    "a foreign file": ("fit vae --data foreign.pt --out new", ("--data", "foreign.pt")),
    "a header": ("fit vae --data header.csv --out new", ("--data", "header", "line 1", "--header")),
    "missing cells": ("fit vae --data gap.csv --out new", ("--data", "line 2, column 2", "empty", "fill")),
    "header of no table": ("fit vae --data good.npy --header --out new", ("header", ".csv", "leave them out")),
    "a constant column": ("fit vae --data constant.npy --out new", ("x is constant in column 2", "--scale='shared'")),
    "outside the support": (
        "fit vae --data good.npy --likelihood bernoulli --out new", ("outside the support", "0 or 1", "--likelihood"),
    ),
    "levels out of range": (
        "fit vae --data levels.npy --likelihood categorical --levels 5 --out new", ("0 … 4", "= 5", "--levels"),
    ),
    "levels missing": ("fit vae --data levels.npy --likelihood categorical --out new", ("--levels", "got None")),
    "levels of the digits": ("fit vae --data digits --levels 5 --out new", ("--levels", "2", "17", "got 5")),
    "digits are split": ("fit vae --data digits --test 0.5 --out new", ("--test", "leave it out")),
    "family": (
        "fit vea --data good.npy --out new", ("FAMILY must be vae, flow", "ebm or diffusion", "'vea'", "--help"),
    ),
    "options before the family": ("fit --data good.npy vae --out new", ("FAMILY is missing", "--data", "flow")),
    "option of another family": ("fit flow --data good.npy --out new --latent-dim 2", ("--latent-dim", "flow", "vae")),
    "option without its value": ("fit flow --data good.npy --out new --layers", ("--layers", "argument", "--help")),
    "transform": (f"{FLOW} --transform nsf", ("--transform must be", "'nsf'", "spline_autoregressive")),
    "layers": (f"{FLOW} --layers 0", ("--layers must be", "at least 1", "got 0")),
    "hidden of a flow": (f"{FLOW} --hidden 8,big", ("--hidden must be", "128,128", "'8,big'")),
    "direction": (f"{FLOW} --direction both", ("--direction must be", "'both'", "'sampling'")),
    "base": (f"{FLOW} --base cauchy", ("--base must be", "'cauchy'", "student_t")),
    "support": (f"{FLOW} --support half", ("--support must be", "'half'", "LOW,HIGH", "0,17")),
    "support of one end": (f"{FLOW} --support 1", ("--support must be", "LOW,HIGH", "'1'")),
    "support upside down": (f"{FLOW} --support 17,0", ("--support", "below", "17")),
    "outside the support of a flow": (f"{FLOW} --support positive", ("outside the support", "row", "--support")),
    "bins": (f"{FLOW} --bins 0", ("--bins must be", "got 0")),
    "bound": (f"{FLOW} --bound -1", ("--bound must be", "positive", "got -1")),
    "base without an interval": (f"{FLOW} --base uniform", ("--base", "uniform", "interval")),
    "whole numbers": ("fit flow --data levels.npy --out new", ("--data", "whole numbers", "--dequantize")),
    "no whole numbers": (f"{FLOW} --dequantize", ("--data", "whole numbers", "scaled")),
    "likelihood of levels": (f"{AR} --likelihood gauss", ("--likelihood must be", "'gauss'", "'bernoulli'")),
    "levels left out": (f"{AR} --likelihood categorical", ("--levels", "got None")),
    "orders": (f"{AR} --orders 0", ("--orders must be", "got 0")),
    "components": (f"{AR} --components 0", ("--components must be", "got 0")),
    "whole numbers, real likelihood": (
        "fit autoregressive --data levels.npy --out new", ("--data", "whole numbers", "--dequantize", "--levels"),
    ),
    "levels of an exact model": (
        "fit autoregressive --data digits --levels 5 --out new", ("--levels", "2", "17", "got 5"),
    ),
    "importance samples of a fit": (f"{FLOW} --importance-samples 9", ("--importance-samples", "flow", "vae")),
    "importance samples of a flow": ("evaluate flow --importance-samples 9", ("--importance-samples", "exact")),
    "resume as another family": ("fit vae --out flow --resume", ("FAMILY", "flow", "vae")),
    "likelihood": (f"{FIT} --likelihood gauss", ("--likelihood must be", "'gauss'", "'normal'")),
    "guide": (f"{FIT} --guide spline", ("--guide must be", "'spline'", "'full_rank'")),
    "prior": (f"{FIT} --prior spline", ("--prior must be", "'spline'", "mixture")),
    "network": (f"{FIT} --network cnn", ("--network must be", "'cnn'", "conv")),
    "convolutions of a table": (f"{FIT} --network conv", ("--network conv", "channels", "(3,)")),
    "objective": (f"{FIT} --objective nce", ("--objective must be", "'nce'", "iwae")),
    "gradient": (f"{FIT} --objective iwae --gradient x", ("--gradient must be", "'x'", "'dreg'")),
    "gradient of elbo": (f"{FIT} --gradient dreg", ("--gradient", "iwae", "leave it out")),
    "schedule": (f"{FIT} --schedule linear", ("--schedule must be", "'linear'", "cosine")),
    "scale": (f"{FIT} --scale one", ("--scale must be", "'one'", "'shared'")),
    "hidden": (f"{FIT} --hidden big", ("--hidden must be", "128,128", "'big'")),
    "average": (f"{FIT} --average ema", ("--average must be", "'ema'", "'tail'")),
    "compile": (f"{FIT} --compile yes", ("--compile must be", "'yes'", "auto")),
    "device": (f"{FIT} --device gpu", ("--device must be", "'gpu'", "'cuda'")),
    "device not there": (f"{FIT} --device cuda:99", ("--device='cuda:99'", "'cpu'")),
    "K of iwae": (f"{FIT} --objective iwae --particles 0", ("--particles must be", "at least 1", "got 0")),
    "K of elbo": (f"{FIT} --particles -3", ("--particles must be", "at least 1", "got -3")),
    "K of the evidence": (f"{FIT} --importance-samples 0", ("--importance-samples must be", "at least 1", "got 0")),
    "lr": (f"{FIT} --lr 0", ("--lr must be a positive number", "got 0")),
    "lr negative": (f"{FIT} --lr -0.1", ("--lr must be a positive number", "got -0.1")),
    "lr infinite": (f"{FIT} --lr inf", ("--lr must be a positive number", "got inf")),
    "lr as text": (f"{FIT} --lr high", ("--lr", "number", "--help")),
    "steps": ("fit vae --data good.npy --out new --steps 0", ("--steps must be", "at least 1", "got 0")),
    "steps as text": ("fit vae --data good.npy --out new --steps many", ("--steps", "--help")),
    "steps and epochs": (f"{FIT} --epochs 3", ("--steps or --epochs", "one of the two")),
    "batch size": (f"{FIT} --batch-size 64", ("--batch-size=64", "28 rows", "leave it out")),
    "latent size": (f"{FIT} --latent-dim 0", ("--latent-dim must be", "got 0")),
    "validation 0": (f"{FIT} --validation 0", ("--validation must lie between 0 and 1", "got 0")),
    "validation 1": (f"{FIT} --validation 1", ("--validation must lie between 0 and 1", "got 1")),
    "test 1.5": (f"{FIT} --test 1.5", ("--test must lie between 0 and 1", "got 1.5")),
    "validation and test": (f"{FIT} --validation 0.6 --test 0.5", ("--validation", "--test", "other fractions")),
    "patience": (f"{FIT} --patience 0", ("--patience must be", "got 0")),
    "seed": (f"{FIT} --seed -1", ("--seed must be", "got -1")),
    "no such option": (f"{FIT} --learning-rate 1", ("--learning-rate", "--help")),
    "no data": ("fit vae --out new", ("--data is missing", "digits")),
    "no folder": ("fit vae --data good.npy", ("--out is missing", "--out RUN")),
    "no family": ("fit --out new", ("FAMILY is missing", "vae, flow, autoregressive, ebm or diffusion", "--help")),
    "out exists": ("fit vae --data good.npy --out run", ("--out", "run exists", "new folder", "--resume")),
    "out is a file": ("fit vae --data good.npy --out good.npy", ("--out", "exists", "new folder")),
    "out is an empty folder": ("fit vae --data good.npy --out a\\ folder", ("--out", "exists", "new folder")),
    "out below a file": ("fit vae --data good.npy --out good.npy/run", ("--out", "Not a directory", "can be written")),
    "resume nothing": ("fit vae --out new --resume", ("--out", "new does not exist", "pyro-gen fit")),
    "resume no run": ("fit vae --out a\\ folder --resume", ("--out", "no config.json")),
    "resume a foreign run": ("fit vae --out foreign --resume", ("--out", "config.json", "not written by")),
    "resume a damaged run": ("fit vae --out damaged --resume", ("checkpoint.pt", "cut short")),
    "resume with another lr": ("fit vae --out run --resume --lr 1", ("--lr 1", "differs", "leave it out")),
    "command": ("train", ("train", "--help")),
    "evaluate nothing": ("evaluate", ("RUN", "--help")),
    "evaluate no run": ("evaluate new", ("RUN", "new does not exist", "pyro-gen fit")),
    "evaluate a file": ("evaluate good.npy", ("RUN", "no folder")),
    "evaluate a damaged run": ("evaluate damaged", ("RUN", "weights.pt", "cut short")),
    "evaluate a foreign run": ("evaluate foreign", ("RUN", "config.json", "not written by")),
    "evaluate a run of a later family": ("evaluate later", ("RUN", "'nebula'", "vae, flow", "ebm or diffusion")),
    "evaluate a run that lacks an option": ("evaluate lacking", ("RUN", "config.json lacks layers")),
    "resume a run that lacks an option": ("fit flow --out lacking --resume", ("--out", "lacks layers")),
    "evaluate other rows": ("evaluate run --data narrow.npy", ("--data", "x must have shape", "(40, 2)")),
    "evaluate on digits": ("evaluate run --data digits", ("--data digits", "good.npy")),
    "evaluate with no draws": ("evaluate run --importance-samples 0", ("--importance-samples must be", "got 0")),
    "sample no rows": ("sample run -n 0", ("-n must be", "got 0")),
    "sample to a format": ("sample run --out x.jpg", ("--out", ".npy", ".png", "x.jpg")),
    "sample over a file": ("sample run --out good.npy", ("--out", "good.npy exists", "--overwrite")),
    "sample below a file": ("sample run --out good.npy/x.npy", ("--out", "cannot be written", "another file")),
    "sample below a file, torch": ("sample run --out good.npy/x.pt", ("--out", "cannot be written", "another file")),
    "sample no run": ("sample new", ("RUN", "new does not exist", "pyro-gen fit")),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_refused_in_one_line(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, said = COMMANDS[name]
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(app, words, prog_name="pyro-gen")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("pyro-gen")
    for part in said:
        assert part in result.stderr, result.stderr
    assert sorted(folder.rglob("*")) == before  # nothing is left behind
