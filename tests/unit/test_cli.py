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


def test_help_of_fit_names_every_option() -> None:
    text = run("fit", "--help").stdout
    options = (
        "FAMILY data validation test split-seed dequantize header delimiter likelihood levels scale latent-dim hidden "
        "network guide prior components objective particles gradient analytic-kl steps epochs batch-size lr schedule "
        "clip-norm average patience compile device seed progress out resume checkpoint-every importance-samples plots"
    )
    for option in shlex.split(options):
        assert option in text


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
def test_an_interrupted_run_goes_on_to_the_same_weights(table: Path, tmp_path: Path) -> None:
    words = ["fit", "vae", "--data", table, "--steps", 1500, "--batch-size", 9, "--average", 0.99, "--no-plots"]
    words += ["--checkpoint-every", 10, "--compile", "off", *SMALL]
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
