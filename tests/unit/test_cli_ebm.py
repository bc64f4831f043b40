"""The command line of energy-based models: chains behind ``sample``, one log Z behind ``evaluate``."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pyro_gen as pg
from pyro_gen.cli import app

OWN = (
    "energy hidden activation base support objective sigma eps projections noise ratio cd-steps negatives log-z "
    "temperatures chains contexts"
)
SMALL = ["--hidden", "8", "--no-progress", "--no-plots"]


def run(*words: object) -> Any:
    """One command in this process; a bug's exception is raised here."""
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="pyro-gen")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*words: object) -> str:
    """What a command that goes well says on standard output."""
    result = run(*words)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def facts(*words: object) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(done("evaluate", *words, "--json"))
    return content


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return content


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plane, zeros and ones, numbers between 0 and 1, pairs with a context, counts."""
    here, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    np.save(here / "plane.npy", pg.datasets.moons().sample(200, seed=0).numpy())
    np.save(here / "solid.npy", draw.normal(size=(60, 4)).astype("float32"))
    np.save(here / "unit.npy", draw.beta(2, 3, size=(80, 2)).astype("float32"))
    coin = draw.random((150, 1)) < 0.5
    np.save(here / "bits.npy", (coin ^ (draw.random((150, 6)) < 0.2)).astype("float32"))  # six looks at one coin
    contexts = draw.integers(0, 5, size=(60, 1)).astype("float32")
    np.savez(here / "pairs.npz", x=contexts + draw.normal(size=(60, 2)), context=contexts)
    np.save(here / "counts.npy", draw.poisson(5, size=(60, 2)))
    return here


@pytest.fixture(scope="module")
def plane(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on real numbers, with figures, and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "plane"
    words = ["--data", files / "plane.npy", "--steps", 40, "--hidden", 8, "--seed", 3, "--out", folder]
    return folder, done("fit", "ebm", *words)


@pytest.fixture(scope="module")
def bits(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on zeros and ones, log Z by annealing, and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "bits"
    words = ["--data", files / "bits.npy", "--steps", 500, "--hidden", 3, "--log-z", "annealed", "--temperatures", 100]
    return folder, done("fit", "ebm", *words, "--lr", 0.05, "--seed", 1, "--chains", 50, "--out", folder)


# ------------------------------------------------------------------------------------------------------------- help --
def test_help_says_what_becomes_of_z_and_names_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [" ".join(line.strip(" │").split()) for line in done("fit", "--help").splitlines()]
    assert any(line.startswith("ebm ") and "Z is left open" in line for line in lines)
    for width in (80, 120):
        monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", width)
        text = done("fit", "ebm", "--help")
        assert max(map(len, text.splitlines())) == width
        assert "…" not in text
        for option in OWN.split():
            assert f"--{option}" in text.split()
    for command, options in (("evaluate", "log-z temperatures chains"), ("sample", "sampler chains warmup draws")):
        for option in options.split():
            assert f"--{option}" in done(command, "--help").split()


# -------------------------------------------------------------------------------------------------------------- fit --
def test_a_run_on_real_numbers(plane: tuple[Path, str]) -> None:
    folder, said = plane
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "config.json", "checkpoint.pt", "program.json", "weights.pt", "fit.json", "history.csv", "evidence.json",
        "inference_data.nc", "figures/loss.png", "figures/samples.png",
    }  # fmt: skip
    program = pg.load(folder).program
    assert isinstance(program, pg.EBM)
    first, evidence, log_z, seconds, place = said.splitlines()
    assert first.startswith("EBM by ScoreMatching")
    assert evidence.startswith("log p(x) = -")
    assert "exact for 40 test rows of plane.npy, by Quadrature()" in evidence
    assert log_z.startswith("log Z = ")
    assert "one error for all rows" in log_z
    assert " s in all" in seconds
    assert str(folder) in place


def test_the_density_that_evaluate_states_sums_to_one(plane: tuple[Path, str]) -> None:
    folder, _ = plane
    program: Any = pg.load(folder).program
    log_z = facts(folder)["log_normalizer"]["value"]
    side = torch.linspace(-12, 12, 601)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = program.log_density(grid).double().sub(log_z).exp().sum() * 0.04**2
    assert float(mass) == pytest.approx(1, abs=1e-4)  # a Riemann sum of a smooth density, float32


def test_a_run_on_zeros_and_ones(bits: tuple[Path, str]) -> None:
    folder, said = bits
    result = pg.load(folder)
    assert result.program.config is not None
    assert (result.program.config["energy"], result.program.config["base"]) == ("rbm", "bernoulli")
    assert repr(result.module.objective).startswith("ContrastiveDivergence(steps=10, persistent=True, chains=128")
    assert result.validation == []  # an energy gap chooses no weights
    assert result.best_step is None
    _, evidence, log_z, *_ = said.splitlines()
    assert evidence.startswith("log p(x) ≈ -")
    assert "an estimate for 30 test rows of bits.npy, by AnnealedImportanceSampling(" in evidence
    assert "bits per dimension" in evidence
    assert log_z.startswith("log Z ≈ ")
    assert "effective sample size" in log_z


def test_rows_share_the_error_of_log_z(bits: tuple[Path, str]) -> None:
    folder, _ = bits
    kept = json.loads((folder / "evidence.json").read_text())
    error = kept["log_normalizer"]["standard_error"]
    assert error > 0
    assert kept["log_evidence"]["standard_error"] == pytest.approx(error, rel=1e-12)  # not over the root of 30
    exact = facts(folder, "--log-z", "enumeration")
    assert exact["log_evidence"]["kind"] == "exact"
    assert abs(exact["log_evidence"]["mean"] - kept["log_evidence"]["mean"]) < 4 * error
    states = torch.tensor([[k >> i & 1 for i in range(6)] for k in range(64)], dtype=torch.float32)
    program: Any = pg.load(folder).program
    with torch.no_grad():
        log_z = torch.logsumexp(program.log_density(states).double(), 0)
    assert exact["log_normalizer"]["value"] == pytest.approx(float(log_z), abs=1e-5)


def test_evaluate_repeats_the_evidence_by_its_seed(bits: tuple[Path, str]) -> None:
    folder, said = bits
    kept = json.loads((folder / "evidence.json").read_text())
    again = facts(folder, "--seed", 1)
    for name in ("rows", "log_evidence", "log_normalizer", "bits_per_dimension", "method"):
        assert again[name] == kept[name]
    first, second = (done("evaluate", folder, "--temperatures", 40, "--chains", 30) for _ in range(2))
    assert first == second
    assert "temperatures=40, chains=30, seed=0" in first
    assert first.splitlines()[0] != said.splitlines()[1]


def test_the_automatic_log_z_sums_what_is_small(files: Path, tmp_path: Path) -> None:
    words = ["--data", files / "bits.npy", "--steps", 2, "--out", tmp_path / "run", *SMALL]
    assert "by Enumeration()" in done("fit", "ebm", *words)


@pytest.mark.parametrize(
    ("data", "words", "objective"),
    [
        ("plane.npy", "", "ScoreMatching(weight='auto')"),
        ("plane.npy", "--base uniform", "ScoreMatching(weight='auto')"),
        ("plane.npy", "--objective sliced --projections 2 --activation tanh", "SlicedScoreMatching(projections=2)"),
        ("plane.npy", "--objective finite_difference --activation relu", "FiniteDifferenceScoreMatching(eps=0.0"),
        ("plane.npy", "--objective finite_difference --eps 0.2", "FiniteDifferenceScoreMatching(eps=0.2)"),
        ("plane.npy", "--objective denoising", "DenoisingScoreMatching(sigma=0.2, relative=True, antithetic=True)"),
        ("plane.npy", "--objective denoising --sigma 0.1,1", "DenoisingScoreMatching(sigmas=[0.1, 1.0]"),
        ("plane.npy", "--objective nce", "NoiseContrastive(ratio=8)"),
        ("plane.npy", "--objective nce --noise base --ratio 2", "NoiseContrastive(noise=None, ratio=2)"),
        ("plane.npy", "--objective cd --cd-steps 2", "ContrastiveDivergence(steps=2)"),
        ("plane.npy", "--objective pcd --cd-steps 1 --negatives 9", "ContrastiveDivergence(persistent=True, chains=9"),
        ("counts.npy", "--dequantize", "DenoisingScoreMatching(sigma=0.2, relative=True, antithetic=True)"),
        ("counts.npy", "--dequantize --base flat --support 0,40", "ScoreMatching(weight='auto')"),
        ("bits.npy", "--energy mlp", "PseudoLikelihood()"),
        ("bits.npy", "--objective nce --base bernoulli", "NoiseContrastive(noise=None, ratio=8)"),
        ("bits.npy", "--base flat --objective cd", "ContrastiveDivergence(steps=10)"),
        ("bits.npy", "--objective pseudo_likelihood", "PseudoLikelihood()"),
        ("unit.npy", "--base flat --support unit", "ScoreMatching(weight='auto')"),
        ("unit.npy", "--base flat --support 0,2 --objective score_matching", "ScoreMatching(weight='auto')"),
    ],
)
def test_objectives(data: str, words: str, objective: str, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    asked = ["--data", files / data, "--steps", 4, "--out", folder, *SMALL, *words.split()]
    assert "log Z" in done("fit", "ebm", *asked)
    result = pg.load(folder)
    assert repr(result.module.objective).startswith(objective.removesuffix(")"))
    assert same(weights(folder), dict(result.module.state_dict()))
    done("evaluate", folder)
    done("sample", folder, "-n", 6, "--warmup", 60, "--draws", 4)
    x = torch.from_numpy(np.load(folder / "samples.npy"))
    assert x.shape == (6, *result.program.event_shape)
    result.program.check(x)  # inside the support
    command = shlex.split(json.loads((folder / "config.json").read_text())["command"])
    command[command.index("--out") + 1] = str(tmp_path / "again")
    done(*command[1:])
    assert same(weights(folder), weights(tmp_path / "again"))


def test_annealing_of_more_than_two_numbers_and_a_flat_base(files: Path, tmp_path: Path) -> None:
    words = ["--data", files / "solid.npy", "--steps", 3, "--temperatures", 20, "--chains", 30, *SMALL]
    assert "by AnnealedImportanceSampling(temperatures=20" in done("fit", "ebm", *words, "--out", tmp_path / "tilted")
    result = run("fit", "ebm", *words, "--base", "flat", "--out", tmp_path / "flat")
    assert result.exit_code == 2  # a perceptron does not grow in all directions by itself
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "does not fall fast enough for a finite Z" in result.stderr
    pg.load(tmp_path / "flat")  # the fit is kept


def test_digits_are_black_and_white_or_grey(tmp_path: Path) -> None:
    words = ["--data", "digits", "--steps", 2, "--temperatures", 10, "--chains", 25, *SMALL]
    said = done("fit", "ebm", *words, "--hidden", 20, "--out", tmp_path / "two")
    assert "360 test rows of digits, by Annealed" in said
    assert pg.load(tmp_path / "two").program.config == pg.EBM(64, "rbm", "bernoulli", hidden=(20,)).config
    said = done("fit", "ebm", *words, "--dequantize", "--out", tmp_path / "grey")
    assert "digits + U[0, 1)" in said
    assert pg.load(tmp_path / "grey").program.config == pg.EBM(64, hidden=(8,)).config


def test_a_context_has_a_log_z_of_its_own(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["--data", files / "pairs.npz", "--steps", 3, "--contexts", 2, "--out", folder, *SMALL]
    said = done("fit", "ebm", *words)
    assert pg.load(folder).program.context_shape == (1,)
    kept = json.loads((folder / "evidence.json").read_text())
    assert kept["rows"] + kept["rows_left_out"] == 12
    assert 0 < kept["rows_left_out"] < 12
    assert f"{kept['rows']} test rows of pairs.npz ({kept['rows_left_out']} of other contexts left out)" in said
    assert kept["log_normalizer"] is None
    done("sample", folder, "-n", 15, "--warmup", 50, "--draws", 2)
    assert np.load(folder / "samples.npy").shape == (15, 2)


# ----------------------------------------------------------------------------------------------- state of the loss --
@pytest.mark.parametrize("words", ["--objective nce", "--objective nce --noise base", "--objective pcd --negatives 7"])
def test_the_state_of_a_loss_comes_back(words: str, files: Path, tmp_path: Path) -> None:
    done("fit", "ebm", "--data", files / "plane.npy", "--steps", 6, "--out", tmp_path / "run", *SMALL, *words.split())
    x = torch.from_numpy(np.load(files / "plane.npy"))[:50].float()
    one: Any = pg.load(tmp_path / "run").module
    other: Any = pg.load(tmp_path / "run").module
    if "nce" in words:
        assert float(one.log_z.detach()) != 0
    else:
        assert tuple(one.chains.shape) == (7, 2)
    found = []
    for module in (one, other):
        torch.manual_seed(0)
        found.append(float(module(x).detach()))
    assert found[0] == found[1]
    state = one.state_dict()
    key = "log_z" if "nce" in words else "chains"
    with torch.no_grad():
        state[key] += 3  # another state, another loss
    other.load_state_dict(state)
    torch.manual_seed(0)
    assert float(other(x).detach()) != found[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [("bits.npy", "--objective pcd"), ("plane.npy", "--objective nce"), ("plane.npy", "--objective pcd --cd-steps 2")],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    data: str, words: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyro_gen.fitting.run import Run

    asked = ["fit", "ebm", "--data", files / data, "--steps", 30, "--checkpoint-every", 10, *SMALL, *words.split()]
    done(*asked, "--out", tmp_path / "whole")
    evaluate = Run.evaluate

    def stopped(self: Run, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if self.step == 15:
            raise KeyboardInterrupt
        return evaluate(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", stopped)
        result = run(*asked, "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert "after 10 steps" in result.stderr
    done(*shlex.split(result.stderr.split("go on by ")[1])[1:])
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))  # chains and log Z among them


# ----------------------------------------------------------------------------------------------------------- sample --
def test_samples_come_from_chains_that_are_judged(plane: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = plane
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        words = ["-n", 20, "--seed", seed, "--chains", 10, "--warmup", 100, "--draws", 30]
        result = run("sample", folder, *words, "--out", tmp_path / f"{name}.npy")
        assert result.exit_code == 0
        assert result.stdout == f"20 rows of shape (2,), seed {seed}: {tmp_path / name}.npy\n"
        assert result.stderr.startswith("10 chains of HMC, 100 steps of warm-up and 30 draws each, acceptance 0.")
        assert "worst R-hat 1." in result.stderr
        assert "least effective sample size" in result.stderr
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert a.shape == (20, 2)
    assert len(np.unique(a, axis=0)) == 20  # two draws of each chain, not one twice
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    said = run("sample", folder, "-n", 8, "--sampler", "mala", "--warmup", 50, "--out", tmp_path / "x.png").stderr
    assert said.startswith("8 chains of MALA")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_samples_of_zeros_and_ones_have_the_model_for_their_distribution(
    bits: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = bits
    n = 2000
    said = run("sample", folder, "-n", n, "--chains", n, "--draws", 4, "--warmup", 50, "--out", tmp_path / "x.npy")
    assert said.stderr.startswith(f"{n} chains of Gibbs")
    x = np.load(tmp_path / "x.npy")
    assert set(np.unique(x)) == {0.0, 1.0}
    states = torch.tensor([[k >> i & 1 for i in range(6)] for k in range(64)], dtype=torch.float32)
    program: Any = pg.load(folder).program
    with torch.no_grad():
        p = program.log_density(states).double().softmax(0)
    square = (states.sum(1) - 3).square()  # of fair coins 1.5 on average; the data are six looks at one coin
    mean = float((p * square).sum())
    error = math.sqrt(float((p * (square - mean).square()).sum()) / n)  # one independent draw a chain
    assert abs(((x.sum(1) - 3) ** 2).mean() - mean) < 4 * error
    assert abs(1.5 - mean) > 8 * error


# ------------------------------------------------------------------------------------------------- wrong arguments --
FIT = "fit ebm --data plane.npy --out new --steps 2"
BITS = "fit ebm --data bits.npy --out new --steps 2"
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "energy": (f"{FIT} --energy resnet", ("--energy must be mlp or rbm", "'resnet'")),
    "objective": (f"{FIT} --objective elbo", ("--objective must be", "score_matching", "'elbo'")),
    "base": (f"{FIT} --base cauchy", ("--base must be normal", "'cauchy'")),
    "activation": (f"{FIT} --activation elu", ("--activation must be", "'silu'", "'elu'")),
    "hidden": (f"{FIT} --hidden big", ("--hidden must be", "128,128", "'big'")),
    "hidden 0": (f"{FIT} --hidden 0", ("--hidden", "got")),
    "support": (f"{FIT} --base flat --support half", ("--support must be", "'half'", "LOW,HIGH")),
    "infinite support": (f"{FIT} --base flat --support 0,inf", ("--support must be", "finite")),
    "support of a tilted base": (f"{FIT} --support unit", ("--support belongs to --base flat", "leave it out")),
    "outside the support": (f"{FIT} --base flat --support unit", ("--data", "outside the support", "row")),
    "rbm of real numbers": (f"{FIT} --energy rbm", ("--energy rbm", "zeros and ones", "mlp")),
    "coins of real numbers": (f"{FIT} --base bernoulli", ("--base bernoulli", "zeros and ones", "normal")),
    "real base of coins": (f"{BITS} --base normal", ("--base normal", "zeros and ones", "bernoulli")),
    "layers of an rbm": (f"{BITS} --hidden 8,8", ("--energy='rbm'", "one hidden layer")),
    "activation of an rbm": (f"{BITS} --activation tanh", ("--activation belongs to --energy mlp", "leave it out")),
    "score of coins": (f"{BITS} --objective score_matching", ("--objective score_matching", "zeros and ones", "pcd")),
    "pseudo-likelihood of reals": (f"{FIT} --objective pseudo_likelihood", ("zeros and ones", "score_matching")),
    "noise of coins": (f"{BITS} --objective nce --noise normal", ("--noise normal", "zeros and ones", "base")),
    "kinks": (f"{FIT} --activation relu", ("--activation relu", "second derivative 0", "finite_difference")),
    "whole numbers": ("fit ebm --data counts.npy --out new", ("--data", "whole numbers", "--dequantize")),
    "sigma": (f"{FIT} --objective denoising --sigma 0", ("--sigma must be positive", "0.1,1", "'0'")),
    "sigma as text": (f"{FIT} --objective denoising --sigma low", ("--sigma must be", "'low'")),
    "sigma of another": (f"{FIT} --sigma 0.1", ("--sigma belongs to --objective denoising", "leave it out")),
    "eps": (f"{FIT} --objective finite_difference --eps -1", ("--eps must be", "got -1")),
    "eps below rounding": (f"{FIT} --objective finite_difference --eps 1e-6", ("--eps must be at least", "1e-06")),
    "projections": (f"{FIT} --objective sliced --projections 0", ("--projections must be", "got 0")),
    "noise": (f"{FIT} --objective nce --noise white", ("--noise must be normal, diagonal or base", "'white'")),
    "ratio": (f"{FIT} --objective nce --ratio 0", ("--ratio must be", "got 0")),
    "noise beyond an edge": (f"{FIT} --objective nce --base uniform", ("--objective nce", "edge", "--noise base")),
    "draws of a flat base": (f"{FIT} --objective nce --base flat --noise base", ("--base flat", "--noise normal")),
    "draws of flat coins": (f"{BITS} --objective nce --base flat", ("--base flat", "--base bernoulli")),
    "draws of a flat box": (f"{FIT} --objective nce --base flat --support -9,9", ("flat", "--base uniform")),
    "edges": (f"{FIT} --objective denoising --base uniform", ("--objective denoising", "edge", "score_matching")),
    "steps of chains": (f"{FIT} --objective cd --cd-steps 0", ("--cd-steps must be at least 1", "got 0")),
    "persistent chains": (f"{BITS} --negatives 0", ("--negatives must be at least 1", "got 0")),
    "persistent chains of cd": (f"{BITS} --objective cd --negatives 9", ("--negatives belongs to", "pcd")),
    "patience with an energy gap": (f"{BITS} --patience 3", ("--patience", "means nothing", "leave it out")),
    "nce with a context": ("fit ebm --data pairs.npz --out new --objective nce", ("--objective nce", "context", "cd")),
    "log Z": (f"{FIT} --log-z ais", ("--log-z must be auto", "annealed", "'ais'")),
    "temperatures": (f"{FIT} --temperatures 1", ("--temperatures must be at least 2",)),
    "chains": (f"{FIT} --chains 0", ("--chains must be", "at least 1", "got 0")),
    "contexts": (f"{FIT} --contexts 0", ("--contexts must be", "got 0")),
    "option of another family": (f"{FIT} --latent-dim 2", ("--latent-dim", "ebm", "vae")),
    "evaluate by what": ("evaluate plane --log-z ais", ("--log-z must be", "'ais'")),
    "evaluate with one temperature": ("evaluate plane --log-z annealed --temperatures 1", ("--temperatures must be",)),
    "evaluate a sum of reals": ("evaluate plane --log-z enumeration", ("Enumeration", "discrete")),
    "evaluate an integral of bits": ("evaluate bits --log-z quadrature", ("Quadrature", "discrete")),
    "evaluate with a guide": ("evaluate plane --importance-samples 9", ("--importance-samples", "log Z", "leave it")),
    "evaluate other rows": ("evaluate plane --data solid.npy", ("--data", "x must have shape")),
    "evaluate bits with others": ("evaluate bits --data solid.npy", ("--data", "x must have shape")),
    "sample by what": ("sample plane --sampler nuts --out x.npy", ("--sampler must be hmc", "'nuts'")),
    "sample reals by Gibbs": ("sample plane --sampler gibbs --out x.npy", ("--sampler gibbs", "real numbers", "hmc")),
    "sample bits by HMC": ("sample bits --sampler hmc --out x.npy", ("--sampler hmc", "zeros and ones", "gibbs")),
    "sample with no chains": ("sample plane --chains 0 --out x.npy", ("--chains must be at least 1", "got 0")),
    "sample with no draws": ("sample plane --draws 0 --out x.npy", ("--draws must be at least 1", "got 0")),
    "sample with no warm-up": ("sample plane --warmup 0 --out x.npy", ("--warmup", "--step-size")),
    "sample with less": ("sample plane --warmup -1 --out x.npy", ("--warmup must be at least 0", "got -1")),
    "sample with no step": ("sample plane --step-size 0 --out x.npy", ("--step-size must be", "got 0")),
    "step size of Gibbs": ("sample bits --step-size 1 --out x.npy", ("--step-size", "hmc", "leave it out")),
    "sample too many of few": ("sample plane -n 9 --chains 2 --draws 4 --out x.npy", ("-n 9", "--chains", "--draws")),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(files: Path, plane: tuple[Path, str], bits: tuple[Path, str]) -> Path:
    for path, _ in (plane, bits):
        (files / path.name).symlink_to(path)
    return files


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_refused_in_one_line(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, said = COMMANDS[name]
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(app, words, prog_name="pyro-gen")
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("pyro-gen")
    for part in said:
        assert part in result.stderr, result.stderr
    assert sorted(folder.rglob("*")) == before  # nothing is left behind


def test_options_of_chains_are_no_options_of_others(files: Path, tmp_path: Path) -> None:
    words = ["--data", files / "plane.npy", "--transform", "linear", "--steps", 2, "--no-plots", "--no-progress"]
    done("fit", "flow", *words, "--out", tmp_path / "run")
    for asked in (["sample", tmp_path / "run", "--chains", 3], ["evaluate", tmp_path / "run", "--chains", 3]):
        result = run(*asked)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert "--chains has no use here" in result.stderr
