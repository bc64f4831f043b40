"""The command line as a newcomer meets it: what it writes, what it says, how it ends."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pyro_gen as pg
from pyro_gen.cli import app

SMALL = ["--hidden", "8", "--latent-dim", "2", "--importance-samples", "30", "--no-progress"]
FLOW = ["--hidden", "8", "--layers", "1", "--no-progress"]
AUTOREGRESSIVE = ["--hidden", "8", "--no-progress"]
COMMON = (
    "data validation test split-seed dequantize header delimiter steps epochs batch-size lr schedule clip-norm average "
    "patience compile device seed progress out resume checkpoint-every plots"
)
OWN = {
    "vae": "likelihood levels scale latent-dim hidden network guide prior components objective particles gradient "
    "analytic-kl importance-samples",
    "flow": "transform layers hidden mixing activation direction base components support bins bound",
    "autoregressive": "likelihood levels components orders hidden",
}


def run(*words: object) -> Any:
    """One command in this process; a bug's exception is raised here."""
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="pyro-gen")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*words: object) -> str:
    """A command that is refused as bad input: exit status 2, nothing on stdout, one line on stderr."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith("\n")
    return str(result.stderr)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return content


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on the digits, and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = run("fit", "vae", "--data", "digits", "--levels", 2, "--steps", 60, "--seed", 3, "--out", folder, *SMALL)
    assert result.exit_code == 0
    return folder, result.stdout


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A file of 60 rows, three numbers each."""
    path = tmp_path / "table.npy"
    np.save(path, np.random.default_rng(1).normal(size=(60, 3)).astype("float32"))
    return path


# ------------------------------------------------------------------------------------------------------------- help --
def test_alone_shows_help_and_version_shows_the_version() -> None:
    for words in ([], ["--help"], ["-h"]):
        result = run(*words)
        assert result.exit_code == 0
        for word in ("fit", "sample", "evaluate", "--version", "Exit status"):
            assert word in result.stdout
    assert run("--version").stdout == f"pyro-gen {pg.__version__}\n"


@pytest.mark.parametrize("words", [["fit"], ["fit", "--help"]])
def test_help_of_fit_lists_the_families_and_what_they_do_about_z(words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 0
    lines = [" ".join(line.strip(" │").split()) for line in result.stdout.splitlines()]
    for family, answer in (("vae", "bounded"), ("flow", "made tractable"), ("autoregressive", "built in")):
        assert any(line.startswith(f"{family} ") and f"Z is {answer}" in line for line in lines)


@pytest.mark.parametrize("family", OWN)
def test_help_of_a_family_names_the_common_options_and_its_own(family: str) -> None:
    words = run("fit", family, "--help").stdout.split()
    others = {option for options in OWN.values() for option in options.split()} - set(OWN[family].split())
    for option in f"{COMMON} {OWN[family]}".split():
        assert f"--{option}" in words
    assert not {f"--{option}" for option in others} & set(words)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("family", OWN)
def test_help_keeps_to_the_width_and_cuts_nothing(family: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", width)
    text = run("fit", family, "--help").stdout
    assert max(map(len, text.splitlines())) == width
    assert "…" not in text.replace("0 … levels", "")


# -------------------------------------------------------------------------------------------------------------- fit --
def test_a_run_folder_holds_everything(digits_run: tuple[Path, str]) -> None:
    folder, _ = digits_run
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "config.json", "checkpoint.pt", "program.json", "weights.pt", "fit.json", "history.csv", "evidence.json",
        "inference_data.nc", "figures/loss.png", "figures/samples.png", "figures/latent.png", "figures/pareto_k.png",
    }  # fmt: skip
    for picture in (folder / "figures").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    result = pg.load(folder)
    assert [float(row["loss"]) for row in rows] == result.history["loss"]
    assert {int(row["step"]): float(row["validation"]) for row in rows if row["validation"]} == dict(result.validation)


def test_inference_data_has_the_posterior_of_test_rows(digits_run: tuple[Path, str]) -> None:
    import xarray as xr

    folder, _ = digits_run
    with xr.open_dataset(folder / "inference_data.nc", group="latent", engine="h5netcdf") as latent:
        assert latent["z"].dims[:2] == ("chain", "draw")
        assert latent["z"].sizes["latent"] == 2
    with xr.open_dataset(folder / "inference_data.nc", group="log_evidence", engine="h5netcdf") as evidence:
        mean = float(evidence["x"].mean())
    assert mean == pytest.approx(json.loads((folder / "evidence.json").read_text())["log_evidence"]["mean"], rel=1e-6)


def test_the_closing_lines_say_evidence_tail_seconds_and_place(digits_run: tuple[Path, str]) -> None:
    folder, said = digits_run
    first, evidence, tail, seconds, place = said.splitlines()
    assert first.startswith("VAE by ELBO")
    assert evidence.startswith(("log p(x) ≈ -", "log p(x) ≥ -"))
    assert evidence.count("±") == 2
    assert "nats per datum" in evidence
    assert "360 test rows of digits" in evidence
    assert tail.startswith("k̂ above 0.7 in ")
    assert "of 360 rows" in tail
    assert " s in all" in seconds
    assert str(folder) in place
    assert "inference_data.nc" in place
    facts = json.loads((folder / "evidence.json").read_text())
    assert facts["log_evidence"]["kind"] in evidence
    assert f"in {facts['pareto_k']['above_0.7']} of" in tail


def test_the_evidence_is_that_of_the_fitted_program(digits_run: tuple[Path, str]) -> None:
    folder, _ = digits_run
    test = pg.datasets.digits(levels=2).test
    expected = pg.log_evidence(pg.load(folder).program, test, method=pg.ImportanceSampling(30, seed=3)).mean()
    facts = json.loads((folder / "evidence.json").read_text())["log_evidence"]
    assert facts["mean"] == pytest.approx(float(expected.value), abs=1e-9)
    assert facts["kind"] == expected.kind
    assert expected.standard_error is not None
    assert expected.sampling_error is not None
    assert facts["standard_error"] == pytest.approx(float(expected.standard_error))
    assert facts["sampling_error"] == pytest.approx(float(expected.sampling_error))


def test_the_command_in_the_config_repeats_the_run(digits_run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = digits_run
    words = shlex.split(json.loads((folder / "config.json").read_text())["command"])
    assert words[:3] == ["pyro-gen", "fit", "vae"]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    words[words.index("--plots")] = "--no-plots"
    assert run(*words[1:]).exit_code == 0
    assert same(weights(folder), weights(tmp_path / "again"))
    assert not (tmp_path / "again" / "figures").exists()


def test_the_seed_decides_the_weights(table: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ["fit", "vae", "--data", table, "--steps", 5, "--no-plots", "--seed", seed, "--out", tmp_path / name]
        assert run(*words, *SMALL).exit_code == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_file_is_split_by_fractions_that_are_stated(table: Path, tmp_path: Path) -> None:
    words = ["fit", "vae", "--data", table, "--steps", 3, "--no-plots", "--validation", 0.25, "--test", 0.5]
    assert run(*words, "--out", tmp_path / "run", *SMALL).exit_code == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["rows"] == {"train": 15, "validation": 15, "test": 30}
    assert config["data"]["source"] == str(table.resolve())
    facts = json.loads(run("evaluate", tmp_path / "run", "--json").stdout)
    assert facts["rows"] == 30


def test_options_reach_program_objective_and_fit(table: Path, tmp_path: Path) -> None:
    words = shlex.split(
        "--likelihood normal --scale shared --latent-dim 3 --hidden 5,6 --guide full_rank --prior mixture "
        "--components 4 --objective iwae --particles 7 --gradient dreg --epochs 2 --batch-size 21 --lr 0.003 "
        "--schedule constant --clip-norm 2 --average tail --patience 9 --compile off --device cpu --seed 5 "
        "--importance-samples 25 --no-plots"
    )
    assert run("fit", "vae", "--data", table, *words, "--out", tmp_path / "run").exit_code == 0
    result = pg.load(tmp_path / "run")
    assert isinstance(result.program, pg.VAE)
    assert result.program.config is not None
    names = ("scale", "latent_dim", "hidden", "guide", "prior", "components")
    assert [result.program.config[name] for name in names] == ["shared", 3, [5, 6], "full_rank", "mixture", 4]
    assert repr(result.module.objective).startswith("IWAE(num_particles=7, gradient='dreg'")
    names = ("steps", "batch_size", "lr", "schedule", "clip_norm", "average", "patience", "seed")
    assert [result.config[name] for name in names] == [4, 21, 0.003, None, 2.0, "tail", 9, 5]
    assert json.loads((tmp_path / "run" / "evidence.json").read_text())["method"] == "ImportanceSampling(25, seed=5)"


@pytest.mark.parametrize(
    ("words", "likelihood", "levels"),
    [
        ([], "discretized_logistic", 17),
        (["--levels", "2"], "bernoulli", None),
        (["--likelihood", "bernoulli"], "bernoulli", None),
        (["--likelihood", "categorical"], "categorical", 17),
        (["--likelihood", "normal", "--dequantize"], "normal", None),
        (["--dequantize"], "normal", None),
    ],
)
def test_digits_choose_their_likelihood(words: list[str], likelihood: str, levels: int | None, tmp_path: Path) -> None:
    words = ["--steps", "2", "--no-plots", "--out", str(tmp_path / "run"), *words, *SMALL]
    assert run("fit", "vae", "--data", "digits", *words).exit_code == 0
    config = pg.load(tmp_path / "run").program.config
    assert config is not None
    assert (config["likelihood"], config["levels"]) == (likelihood, levels)


def test_a_vae_with_flows_for_prior_and_guide(table: Path, tmp_path: Path) -> None:
    words = ["fit", "vae", "--data", table, "--steps", 2, "--prior", "flow", "--guide", "flow"]
    assert run(*words, "--out", tmp_path / "run", *SMALL).exit_code == 0
    config: Any = pg.load(tmp_path / "run").program.config
    assert (config["prior"], config["guide"]) == ("flow", "flow")
    assert not (tmp_path / "run" / "figures" / "latent.png").exists()  # its means have no closed form
    assert run("evaluate", tmp_path / "run").exit_code == 0


def test_convolutions_take_the_digits_as_images(tmp_path: Path) -> None:
    words = ["--network", "conv", "--steps", "2", "--no-plots", "--out", str(tmp_path / "run"), *SMALL]
    assert run("fit", "vae", "--data", "digits", *words).exit_code == 0
    assert tuple(pg.load(tmp_path / "run").program.event_shape) == (1, 8, 8)


def test_a_context_in_the_file_makes_the_model_conditional(tmp_path: Path) -> None:
    draw = np.random.default_rng(0).normal
    np.savez(tmp_path / "pairs.npz", x=draw(size=(40, 3)), context=draw(size=(40, 2)))
    words = ["fit", "vae", "--data", tmp_path / "pairs.npz", "--steps", 3, "--out", tmp_path / "run", *SMALL]
    assert run(*words).exit_code == 0
    assert pg.load(tmp_path / "run").program.context_shape == (2,)
    assert run("sample", tmp_path / "run", "-n", 11, "--out", tmp_path / "x.npy").exit_code == 0
    assert np.load(tmp_path / "x.npy").shape == (11, 3)
    assert run("evaluate", tmp_path / "run").exit_code == 0
    np.save(tmp_path / "alone.npy", draw(size=(5, 3)))
    assert "context is missing" in refused("evaluate", tmp_path / "run", "--data", tmp_path / "alone.npy")


# ------------------------------------------------------------------------------------------- exact families --
@pytest.fixture(scope="module")
def flow_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of a flow on the digits, and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "flow"
    words = ["--data", "digits", "--transform", "affine_coupling", "--steps", 8, "--seed", 3, "--out", folder]
    result = run("fit", "flow", *words, *FLOW)
    assert result.exit_code == 0
    return folder, result.stdout


def test_a_run_of_a_flow_holds_what_there_is_of_it(flow_run: tuple[Path, str]) -> None:
    import xarray as xr

    folder, said = flow_run
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {  # no latents, and no weights of importance
        "config.json", "checkpoint.pt", "program.json", "weights.pt", "fit.json", "history.csv", "evidence.json",
        "inference_data.nc", "figures/loss.png", "figures/samples.png",
    }  # fmt: skip
    program = pg.load(folder).program
    assert isinstance(program, pg.Flow)
    x = pg.datasets.digits(dequantize=True).test
    expected = program.log_prob(x).double()
    facts = json.loads((folder / "evidence.json").read_text())
    assert facts["log_evidence"]["kind"] == "exact"
    assert facts["log_evidence"]["mean"] == pytest.approx(float(expected.detach().mean()), rel=1e-6)
    assert facts["log_evidence"]["standard_error"] is None
    with xr.open_dataset(folder / "inference_data.nc", group="log_evidence", engine="h5netcdf") as evidence:
        assert evidence["x"].values.ravel() == pytest.approx(expected.detach().numpy(), rel=1e-5)
        assert evidence["x"].attrs["kind"] == "exact"
    first, evidence_line, seconds, place = said.splitlines()
    assert first.startswith("Flow by MaximumLikelihood")
    assert evidence_line.startswith("log p(x) = -")
    assert evidence_line.endswith("exact for 360 test rows of digits + U[0, 1)")
    assert " s in all" in seconds
    assert str(folder) in place


def test_a_flow_takes_the_digits_with_noise_and_says_so(flow_run: tuple[Path, str]) -> None:
    folder, _ = flow_run
    program: Any = pg.load(folder).program
    assert program.config["support"] == [0.0, 17.0]
    draws = program.sample(50, seed=0)
    assert 0 <= float(draws.min()) < float(draws.max()) <= 17
    help_text = " ".join(run("fit", "flow", "--help").stdout.split())
    assert "--data digits it is implied" in help_text


def test_bits_per_dimension_stand_beside_nats(flow_run: tuple[Path, str], digits_run: tuple[Path, str]) -> None:
    import math

    for (folder, _), kind, sign in ((flow_run, "exact", "="), (digits_run, None, None)):
        facts = json.loads((folder / "evidence.json").read_text())
        nats, bits = facts["log_evidence"], facts["bits_per_dimension"]
        assert bits["dimensions"] == 64
        assert bits["mean"] == pytest.approx(-nats["mean"] / (64 * math.log(2)), rel=1e-12)
        assert bits["sampling_error"] == pytest.approx(nats["sampling_error"] / (64 * math.log(2)), rel=1e-12)
        assert bits["kind"] == (kind or {"lower bound": "upper bound"}.get(nats["kind"], nats["kind"]))
        said = run("evaluate", folder).stdout
        sign = sign or {"upper bound": "≤", "estimate": "≈"}[bits["kind"]]
        assert f"nats per datum, {sign} {bits['mean']:.3f} bits per dimension: " in said


def test_real_data_have_no_bits(table: Path, tmp_path: Path) -> None:
    words = ["--data", table, "--steps", 3, "--no-plots", "--out"]
    assert run("fit", "flow", *words, tmp_path / "flow", *FLOW).exit_code == 0
    assert run("fit", "vae", *words, tmp_path / "vae", *SMALL).exit_code == 0
    for name in ("flow", "vae"):
        assert json.loads((tmp_path / name / "evidence.json").read_text())["bits_per_dimension"] is None
        assert "bits" not in run("evaluate", tmp_path / name).stdout


def test_evaluate_of_a_flow_repeats_its_evidence_and_has_no_draws(flow_run: tuple[Path, str]) -> None:
    folder, _ = flow_run
    facts = json.loads(run("evaluate", folder, "--json").stdout)
    kept = json.loads((folder / "evidence.json").read_text())
    for name in ("rows", "log_evidence", "bits_per_dimension", "dequantized", "pareto_k", "method"):
        assert facts[name] == kept[name]
    said = refused("evaluate", folder, "--importance-samples", 50)
    for word in ("--importance-samples", "exact", "leave it out"):
        assert word in said


def test_whole_numbers_of_another_file_get_the_noise_of_the_run(flow_run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = flow_run
    whole = pg.datasets.digits().test[:30]
    noisy = pg.datasets.dequantize(whole, seed=0)
    program: Any = pg.load(folder).program
    found = {}
    for name, x in (("whole", whole), ("noisy", noisy)):
        np.save(tmp_path / f"{name}.npy", x.numpy())
        facts = json.loads(run("evaluate", folder, "--data", tmp_path / f"{name}.npy", "--json").stdout)
        found[name] = facts["log_evidence"]["mean"]
    expected = float(program.log_prob(noisy).detach().double().mean())
    assert found["whole"] == pytest.approx(expected, rel=1e-6)
    assert found["noisy"] == pytest.approx(expected, rel=1e-6)
    bare = float(program.log_prob(whole.clamp(1e-6, 16)).detach().double().mean())  # what it would be without
    assert abs(bare - expected) > 1


def test_training_rows_have_many_draws_of_the_noise_and_held_out_rows_one(tmp_path: Path) -> None:
    from pyro_gen.cli.sources import read_data

    np.savez(tmp_path / "counts.npz", x=np.arange(60).reshape(30, 2) % 7, context=np.arange(30.0).reshape(30, 1))
    given = {"family": "flow", "data": str(tmp_path / "counts.npz"), "validation": None, "test": None, "split_seed": 3}
    plain = read_data({**given, "dequantize": False})
    noisy = read_data({**given, "dequantize": True})
    assert plain.copies == 1
    assert noisy.copies == 20
    assert noisy.facts["rows"] == plain.facts["rows"] == {"train": 21, "validation": 3, "test": 6}
    x, context = noisy.train
    assert torch.equal(x.floor(), plain.train[0].repeat(20, 1))
    assert torch.equal(context, plain.train[1].repeat(20, 1))
    draws = (x - x.floor()).reshape(20, -1)
    assert len(torch.unique(draws)) == draws.numel()  # no draw twice
    assert torch.equal(noisy.test[0].floor(), plain.test[0])
    assert noisy.rows is not None
    assert plain.rows is not None
    assert noisy.rows[21 + 4] == plain.rows[4]  # where a row stands in the file


def test_an_epoch_is_a_pass_over_the_rows_given(tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", np.arange(120).reshape(60, 2) % 7)
    words = ["--data", tmp_path / "counts.npy", "--transform", "linear", "--dequantize", "--batch-size", 7]
    folder = tmp_path / "run"
    assert run("fit", "flow", *words, "--epochs", 3, "--no-plots", "--out", folder).exit_code == 0
    assert pg.load(folder).steps == 18  # 42 rows to train on, 6 steps an epoch


def test_samples_of_a_flow(flow_run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = flow_run
    assert run("sample", folder, "-n", 5, "--seed", 2, "--out", tmp_path / "x.npy").exit_code == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), pg.load(folder).program.sample(5, seed=2).numpy())
    assert run("sample", folder, "-n", 9, "--out", tmp_path / "x.png").exit_code == 0


def test_options_of_a_flow_reach_it(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "plane.npz", x=draw.uniform(-1, 3, size=(60, 2)), context=draw.normal(size=(60, 3)))
    words = shlex.split(
        "--transform spline_coupling --layers 2 --hidden 5,6 --direction sampling --base mixture --components 3 "
        "--support -1.5,3.5 --bins 4 --bound 3 --steps 3"
    )
    said = run("fit", "flow", "--data", tmp_path / "plane.npz", *words, "--out", tmp_path / "run")
    assert said.exit_code == 0
    config: Any = pg.load(tmp_path / "run").program.config
    names = ("transform", "layers", "hidden", "direction", "base", "components", "support", "bins", "bound")
    expected = ["spline_coupling", 2, [5, 6], "sampling", "mixture", 3, [-1.5, 3.5], 4, 3.0]
    assert [config[name] for name in names] == expected
    assert config["context_shape"] == [3]
    assert not (tmp_path / "run" / "figures" / "density.png").exists()  # at which context?
    again = shlex.split(json.loads((tmp_path / "run" / "config.json").read_text())["command"])
    again[again.index("--out") + 1] = str(tmp_path / "again")
    assert run(*again[1:]).exit_code == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "again"))


def test_a_flow_of_two_features_has_a_picture_of_its_density(tmp_path: Path) -> None:
    np.save(tmp_path / "plane.npy", np.random.default_rng(0).normal(size=(60, 2)))
    words = ["--data", tmp_path / "plane.npy", "--transform", "linear", "--steps", 3, "--out", tmp_path / "run"]
    assert run("fit", "flow", *words, "--no-progress").exit_code == 0
    assert (tmp_path / "run" / "figures" / "density.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "likelihood", "levels", "noise"),
    [
        ("", "discretized_logistic", 17, False),
        ("--levels 2", "bernoulli", None, False),
        ("--likelihood bernoulli", "bernoulli", None, False),
        ("--likelihood categorical --orders 2", "categorical", 17, False),
        ("--likelihood normal", "normal", None, True),
        ("--dequantize", "mixture_of_logistics", None, True),
    ],
)
def test_digits_of_an_autoregressive_model(
    words: str, likelihood: str, levels: int | None, noise: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    asked = ["--data", "digits", "--steps", 2, "--out", folder, *words.split(), *AUTOREGRESSIVE]
    said = run("fit", "autoregressive", *asked)
    assert said.exit_code == 0
    program: Any = pg.load(folder).program
    assert (program.config["likelihood"], program.config["levels"]) == (likelihood, levels)
    assert program.config["orders"] == (2 if "--orders" in words else 1)
    assert ("+ U[0, 1)" in said.stdout) == noise
    x = pg.datasets.digits(levels=2 if likelihood == "bernoulli" else 17, dequantize=noise).test
    facts = json.loads(run("evaluate", folder, "--json").stdout)
    assert facts["log_evidence"]["kind"] == "exact"
    assert facts["log_evidence"]["mean"] == pytest.approx(float(program.log_prob(x).detach().double().mean()), rel=1e-6)
    assert facts["bits_per_dimension"]["dimensions"] == 64
    assert run("sample", folder, "-n", 4).exit_code == 0
    assert np.load(folder / "samples.npy").shape == (4, 64)


# -------------------------------------------------------------------------------------------- sample, evaluate --
def test_samples_come_in_three_formats_and_by_seed(digits_run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = digits_run
    for name, seed in (("a.npy", 4), ("b.pt", 4), ("c.npy", 5)):
        assert run("sample", folder, "-n", 7, "--seed", seed, "--out", tmp_path / name).exit_code == 0
    a, b, c = np.load(tmp_path / "a.npy"), torch.load(tmp_path / "b.pt", weights_only=True), np.load(tmp_path / "c.npy")
    assert a.shape == (7, 64)
    assert np.array_equal(a, pg.load(folder).program.sample(7, seed=4).numpy())
    assert np.array_equal(a, b.numpy())
    assert not np.array_equal(a, c)
    assert run("sample", folder, "-n", 7, "--out", tmp_path / "d.png").exit_code == 0
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_samples_go_into_the_run_folder_by_default(digits_run: tuple[Path, str]) -> None:
    folder, _ = digits_run
    said = run("sample", folder, "-n", 3).stdout
    assert str(folder / "samples.npy") in said
    assert "--overwrite" in refused("sample", folder, "-n", 4)
    assert len(np.load(folder / "samples.npy")) == 3
    assert run("sample", folder, "-n", 4, "--overwrite").exit_code == 0
    assert len(np.load(folder / "samples.npy")) == 4
    (folder / "samples.npy").unlink()


def test_evaluate_repeats_the_evidence_of_the_fit(digits_run: tuple[Path, str]) -> None:
    folder, _ = digits_run
    facts = json.loads(run("evaluate", folder, "--seed", 3, "--json").stdout)
    kept = json.loads((folder / "evidence.json").read_text())
    for name in ("rows", "log_evidence", "pareto_k", "effective_sample_size", "method"):
        assert facts[name] == kept[name]
    plain = run("evaluate", folder, "--seed", 3).stdout
    assert f"{kept['log_evidence']['mean']:.2f}" in plain
    assert "k̂ above 0.7" in plain


def test_evaluate_takes_other_data_and_another_size(digits_run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = digits_run
    x = pg.datasets.digits(levels=2).train[:20]
    np.save(tmp_path / "x.npy", x.numpy())
    words = ["evaluate", folder, "--data", tmp_path / "x.npy", "--importance-samples", 40, "--json"]
    facts = json.loads(run(*words).stdout)
    expected = pg.log_evidence(pg.load(folder).program, x, method=pg.ImportanceSampling(40, seed=0)).mean()
    assert facts["rows"] == 20
    assert facts["log_evidence"]["mean"] == pytest.approx(float(expected.value), abs=1e-9)
    assert facts["method"] == "ImportanceSampling(40, seed=0)"


def test_json_has_no_infinities(digits_run: tuple[Path, str]) -> None:
    folder, _ = digits_run
    said = run("evaluate", folder, "--importance-samples", 5, "--json").stdout  # too few for a tail: k̂ is infinite
    facts = json.loads(said, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert facts["pareto_k"]["max"] is None
    assert facts["log_evidence"]["kind"] == "lower bound"


# ------------------------------------------------------------------------------------------------------ divergence --
def test_divergence_is_status_3_and_keeps_the_last_good_state(table: Path, tmp_path: Path) -> None:
    words = ["fit", "vae", "--data", table, "--lr", "1e15", "--steps", 50, "--checkpoint-every", 1, "--no-plots"]
    result = run(*words, "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "not finite at step" in result.stderr
    assert "of 'model." in result.stderr or "of 'guide." in result.stderr  # a parameter
    assert "rows [" in result.stderr
    assert "--lr" in result.stderr
    kept = pg.load(tmp_path / "run")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(tmp_path / "run").values())
    x = torch.from_numpy(np.load(table))
    assert bool(torch.isfinite(kept.program.lower_bound(x)).all())
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint["tensors"])


def test_divergence_of_a_flow_keeps_a_state_that_can_be_read(tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", np.random.default_rng(1).poisson(5, size=(60, 3)))
    words = ["--data", tmp_path / "counts.npy", "--dequantize", "--lr", 1e15, "--no-plots", "--out", tmp_path / "run"]
    result = run("fit", "flow", *words, *FLOW)
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    assert "not finite at step" in result.stderr
    found = result.stderr.partition("Of the file these are rows [")[2].partition("]")[0]
    rows = [int(row) for row in found.split(",")] if found else []
    assert all(row < 60 for row in rows)  # of the file, not of its copies
    assert len(rows) == len(set(rows))
    program: Any = pg.load(tmp_path / "run").program
    assert all(bool(torch.isfinite(tensor).all()) for tensor in program.state_dict().values())


def test_divergence_names_rows_of_the_file(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(60, 3)).astype("float32")
    row = int(np.random.default_rng(0).permutation(60)[4])  # a training row
    x[row] = 1e30  # finite, and its square is not
    np.save(tmp_path / "huge.npy", x)
    result = run("fit", "vae", "--data", tmp_path / "huge.npy", "--out", tmp_path / "run", "--no-plots", *SMALL)
    assert result.exit_code == 3
    assert "at rows [4] of the data" in result.stderr
    assert f"Of the file these are rows [{row}]" in result.stderr


# ----------------------------------------------------------------------------------------- what is no bad input --
def test_a_bug_keeps_its_traceback(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["fit", "vae", "--data", table, "--steps", 2, *SMALL]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("a bug in a library")

    monkeypatch.setattr(torch.optim.Adam, "step", broken)  # raised by code that is not ours
    with pytest.raises(ValueError, match="a bug in a library"):
        run(*words, "--out", tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr("pyro_gen.datasets.load", lambda *args, **kwargs: 3)  # our code stumbles, nothing says `raise`
    with pytest.raises(TypeError, match="has no len"):
        run(*words, "--out", tmp_path / "other")


# --------------------------------------------------------------------------------------------------------- processes --
def process(*words: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pyro_gen", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.Popen(
        command, text=True, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )


def heed_interrupts() -> None:
    """A shell starts what it runs in the background with SIGINT ignored, and a child inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_module_is_the_command(tmp_path: Path) -> None:
    child = process("fit", "vae", "--data", "nowhere.npy", "--out", tmp_path / "run", cwd=tmp_path)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 2
    assert out == ""
    assert err.startswith("pyro-gen: --data: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child there")
@pytest.mark.parametrize(
    ("family", "own"), [("vae", SMALL), ("flow", ["--transform", "linear", *FLOW]), ("autoregressive", AUTOREGRESSIVE)]
)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    family: str, own: list[str], table: Path, tmp_path: Path
) -> None:
    words = ["fit", family, "--data", table, "--steps", 1500, "--batch-size", 9, "--average", 0.99, "--no-plots"]
    words += ["--checkpoint-every", 10, "--compile", "off", *own]
    child = process(*words, "--out", tmp_path / "run", preexec_fn=heed_interrupts)
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert out == ""
    assert err.count("\n") == 1
    steps = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert 10 <= steps < 1500
    assert f"after {steps} steps" in err
    assert "--resume" in err
    assert "unfinished" in refused("evaluate", tmp_path / "run")
    command = shlex.split(err.split("go on by ")[1])
    assert command[0] == "pyro-gen"
    assert run(*command[1:]).exit_code == 0
    assert run(*words, "--out", tmp_path / "whole").exit_code == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert pg.load(tmp_path / "run").history["loss"] == pg.load(tmp_path / "whole").history["loss"]


def test_a_resumed_run_keeps_its_options_and_data(table: Path, tmp_path: Path) -> None:
    words = ["fit", "vae", "--data", table, "--steps", 4, "--no-plots", "--out", tmp_path / "run", *SMALL]
    assert run(*words).exit_code == 0
    before = weights(tmp_path / "run")
    assert run("fit", "vae", "--out", tmp_path / "run", "--resume").exit_code == 0  # complete: nothing changes
    assert same(before, weights(tmp_path / "run"))
    assert run("fit", "vae", "--out", tmp_path / "run", "--resume", "--steps", 4).exit_code == 0  # the same again
    assert "--lr 0.5" in refused("fit", "vae", "--out", tmp_path / "run", "--resume", "--lr", 0.5)
    np.save(table, np.load(table) + 1)
    for words in (["fit", "vae", "--out", tmp_path / "run", "--resume"], ["evaluate", tmp_path / "run"]):
        assert "has changed" in refused(*words)
