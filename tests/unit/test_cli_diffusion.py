"""The command line of diffusions: two ways to an evidence, samplers by name, figures of the levels of noise."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pyro_gen as pg
from pyro_gen.cli import app
from pyro_gen.cli.families import diffusion as family
from pyro_gen.evidence.bounds import LowerBound

OWN = (
    "network hidden noise-schedule timesteps prediction variance unconditional objective weighting times coupling "
    "log-p probes"
)
SMALL = ["--hidden", "8", "--timesteps", "6", "--no-progress", "--no-plots"]


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
    """A plane, pairs with a context, counts, images."""
    here, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    np.save(here / "plane.npy", pg.datasets.moons().sample(200, seed=0).numpy())
    np.save(here / "solid.npy", draw.normal(size=(60, 3)).astype("float32"))
    np.save(here / "wide.npy", draw.normal(size=(40, 17)).astype("float32"))
    contexts = draw.integers(0, 2, size=(60, 1)).astype("float32")
    np.savez(here / "pairs.npz", x=4 * contexts + 0.1 * draw.normal(size=(60, 2)), context=contexts)
    np.save(here / "counts.npy", draw.poisson(5, size=(60, 2)))
    np.save(here / "images.npy", draw.normal(size=(40, 1, 4, 4)).astype("float32"))
    return here


@pytest.fixture(scope="module")
def plane(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run in the plane, with figures, and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "plane"
    words = ["--data", files / "plane.npy", "--steps", 60, "--hidden", 16, "--timesteps", 20, "--seed", 3]
    return folder, done("fit", "diffusion", *words, "--prediction", "v", "--no-progress", "--out", folder)


@pytest.fixture(scope="module")
def pairs(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a context, a tenth of the rows without it."""
    folder = tmp_path_factory.mktemp("cli") / "pairs"
    words = [
        "--data",
        files / "pairs.npz",
        "--steps",
        200,
        "--lr",
        0.01,
        "--timesteps",
        10,
        "--hidden",
        16,
        "--seed",
        0,
    ]
    done("fit", "diffusion", *words, "--unconditional", 0.1, "--no-plots", "--no-progress", "--out", folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- help --
def test_help_says_what_becomes_of_z_and_names_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [" ".join(line.strip(" │").split()) for line in done("fit", "--help").splitlines()]
    assert any(line.startswith("diffusion ") and "Z is bounded by fixed noise" in line for line in lines)
    for width in (80, 120):
        monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", width)
        text = done("fit", "diffusion", "--help")
        assert max(map(len, text.splitlines())) == width
        assert "…" not in text.replace("0 … levels", "")
        for option in OWN.split():
            assert f"--{option}" in text.split()
    for command, options in (("evaluate", "log-p probes"), ("sample", "method steps eta guidance")):
        for option in options.split():
            assert f"--{option}" in done(command, "--help").split()


def test_names_are_those_of_the_library() -> None:
    from pyro_gen.distributions.noise import ScheduleName
    from pyro_gen.distributions.noising import Variance
    from pyro_gen.distributions.parameterisations import Prediction
    from pyro_gen.objectives.noise_regression import Time, Weighting
    from pyro_gen.samplers.reverse import Method

    assert set(get_args(ScheduleName)) == set(family.SCHEDULES)
    assert set(get_args(Prediction)) == set(family.PREDICTIONS)
    assert set(get_args(Variance)) == set(family.VARIANCES)
    assert set(get_args(Weighting)) == set(family.WEIGHTINGS)
    assert set(get_args(Time)) == set(family.TIMES)
    assert {*get_args(Method), "ode"} == set(family.METHODS)


# -------------------------------------------------------------------------------------------------------------- fit --
def test_a_run(plane: tuple[Path, str]) -> None:
    folder, said = plane
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    names = ("loss", "samples", "strips", "trajectories", "score_field", "loss_by_level")
    assert found == {
        "config.json", "checkpoint.pt", "program.json", "weights.pt", "fit.json", "history.csv", "evidence.json",
        "inference_data.nc", *(f"figures/{name}.png" for name in names),
    }  # fmt: skip
    result = pg.load(folder)
    assert isinstance(result.program, pg.Diffusion)
    assert (result.program.timesteps, result.program.prediction) == (20, "v")
    first, evidence, seconds, place = said.splitlines()
    assert first.startswith("Diffusion by DenoisingScoreMatching")
    assert evidence.startswith("log p(x) = -")
    assert "exact for 40 test rows of plane.npy, by ProbabilityFlow(" in evidence
    assert " s in all" in seconds
    assert str(folder) in place


def test_the_evidence_is_that_of_the_ode_on_the_test_rows(plane: tuple[Path, str]) -> None:
    folder, _ = plane
    x = pg.datasets.moons().sample(200, seed=0)[np.random.default_rng(0).permutation(200)]
    program = pg.load(folder).program
    kept = json.loads((folder / "evidence.json").read_text())["log_evidence"]
    expected = pg.log_evidence(program, x[160:], method=pg.ProbabilityFlow())
    assert kept["mean"] == pytest.approx(float(expected.mean().value), abs=1e-6)
    assert kept["standard_error"] < 1e-3  # of the numerical solution
    others = pg.log_evidence(program, x[:40], method=pg.ProbabilityFlow(rtol=1e-3, atol=1e-3))
    assert abs(kept["mean"] - float(others.mean().value)) > 1e-3


def test_the_bound_is_that_of_the_program(plane: tuple[Path, str]) -> None:
    folder, _ = plane
    kept = json.loads((folder / "evidence.json").read_text())
    again = facts(folder, "--seed", 3)
    for name in ("rows", "log_evidence", "method", "bits_per_dimension"):
        assert again[name] == kept[name]
    bound = facts(folder, "--log-p", "bound", "--probes", 32)
    assert bound["log_evidence"]["kind"] == "lower bound"
    assert bound["log_evidence"]["standard_error"] > 0
    assert "LowerBound(draws=32, seed=0)" in bound["method"]
    assert done("evaluate", folder, "--log-p", "bound").startswith("log p(x) ≥ -")
    x = pg.datasets.moons().sample(200, seed=0)
    order = np.random.default_rng(0).permutation(200)
    program: Any = pg.load(folder).program
    torch.manual_seed(1)
    with torch.no_grad():
        several = torch.stack([program.lower_bound(x[order[160:]]).double() for _ in range(64)])
    mean = several.mean(1)
    error = float(mean.std()) / 8
    spread = (error**2 + bound["log_evidence"]["standard_error"] ** 2) ** 0.5
    assert abs(float(mean.mean()) - bound["log_evidence"]["mean"]) < 4 * spread
    assert abs(float(mean.mean()) - 1 - bound["log_evidence"]["mean"]) > 4 * spread


@pytest.mark.parametrize(
    ("data", "words", "objective"),
    [
        ("plane.npy", "", "DenoisingScoreMatching(weighting='epsilon', time='uniform')"),
        ("plane.npy", "--timesteps 0 --weighting elbo", "DenoisingScoreMatching(weighting='elbo', time='uniform')"),
        ("plane.npy", "--prediction edm --noise-schedule karras --weighting edm --times lognormal --timesteps 0",
         "DenoisingScoreMatching(weighting='edm', time='lognormal')"),
        ("plane.npy", "--objective flow_matching --noise-schedule rectified --timesteps 0",
         "FlowMatching()"),
        ("plane.npy", "--objective flow_matching --coupling optimal --noise-schedule rectified --timesteps 0",
         "FlowMatching(coupling='optimal'"),
        ("plane.npy", "--objective elbo --noise-schedule learned --timesteps 0", "ELBO("),
        ("solid.npy", "--objective elbo --variance learned", "ELBO("),
        ("counts.npy", "--dequantize --variance small --log-p bound", "DenoisingScoreMatching("),
        ("images.npy", "--network conv --prediction x0", "DenoisingScoreMatching("),
    ],
)  # fmt: skip
def test_objectives(data: str, words: str, objective: str, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    given = [word for word in SMALL if "conv" not in words or word not in ("--hidden", "8")]
    asked = ["--data", files / data, "--steps", 4, "--out", folder, *given, *words.split()]
    said = done("fit", "diffusion", *asked)
    assert ("bits per dimension" in said) == (data == "counts.npy")
    result = pg.load(folder)
    assert repr(result.module.objective).startswith(objective.removesuffix(")"))
    assert same(weights(folder), dict(result.module.state_dict()))
    done("sample", folder, "-n", 6, "--method", "ddim", "--steps", 3)
    assert np.load(folder / "samples.npy").shape == (6, *result.program.event_shape)
    command = shlex.split(json.loads((folder / "config.json").read_text())["command"])
    command[command.index("--out") + 1] = str(tmp_path / "again")
    done(*command[1:])
    assert same(weights(folder), weights(tmp_path / "again"))


def test_more_numbers_than_sixteen_have_an_estimate_with_its_error(files: Path, tmp_path: Path) -> None:
    words = ["--data", files / "wide.npy", "--steps", 2, "--probes", 3, "--out", tmp_path / "run", *SMALL]
    said = done("fit", "diffusion", *words)
    assert "log p(x) ≈ " in said
    assert "an estimate for 8 test rows" in said
    assert facts(tmp_path / "run")["log_evidence"]["standard_error"] > 0


@pytest.mark.slow
def test_digits_come_with_noise_and_figures_of_images(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["--data", "digits", "--steps", 2, "--hidden", 8, "--timesteps", 4, "--log-p", "bound", "--probes", 2]
    said = done("fit", "diffusion", *words, "--no-progress", "--out", folder)
    assert "360 test rows of digits + U[0, 1)" in said
    assert "≤" in said.split("nats per datum, ")[1].split(" bits per dimension")[0]
    figures = {path.stem for path in (folder / "figures").iterdir()}
    assert figures == {"loss", "samples", "strips", "loss_by_level"}


def test_an_interrupted_run_goes_on_to_the_same_weights(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyro_gen.fitting.run import Run

    asked = ["fit", "diffusion", "--data", files / "plane.npy", "--steps", 30, "--checkpoint-every", 10, *SMALL]
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
    done(*shlex.split(result.stderr.split("go on by ")[1])[1:])
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


# ----------------------------------------------------------------------------------------------------------- sample --
@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("", None),
        ("--steps 5", pg.ReverseDiffusion("ancestral", 5)),
        ("--method ddim --steps 7 --eta 0.5", pg.ReverseDiffusion("ddim", 7, eta=0.5)),
        ("--method heun --steps 6", pg.ReverseDiffusion("heun", 6)),
        ("--method dpm++2m", pg.ReverseDiffusion("dpm++2m")),
        ("--method ode", pg.ProbabilityFlow()),
    ],
)
def test_samplers(words: str, method: Any, plane: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = plane
    out = tmp_path / "x.npy"
    assert done("sample", folder, "-n", 9, "--seed", 4, "--out", out, *words.split()) == (
        f"9 rows of shape (2,), seed 4: {out}\n"
    )
    program: Any = pg.load(folder).program
    expected = program.sample(9, method=method, seed=4)
    assert np.array_equal(np.load(out), expected.numpy())
    done("sample", folder, "-n", 9, "--out", tmp_path / "x.png", *words.split())
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_draws_have_the_context_of_the_test_rows_and_guidance_their_weight(pairs: Path, tmp_path: Path) -> None:
    drawn = []
    for name, words in (("plain", []), ("guided", ["--guidance", 2])):
        out = tmp_path / f"{name}.npy"
        done("sample", pairs, "-n", 24, "--out", out, *words)
        drawn.append(np.load(out))
    assert drawn[0].shape == (24, 2)
    assert not np.array_equal(*drawn)
    assert facts(pairs)["rows"] == 12


# ------------------------------------------------------------------------------------------------- wrong arguments --
FIT = "fit diffusion --data plane.npy --out new --steps 2"
PAIRS = "fit diffusion --data pairs.npz --out new --steps 2"
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "network": (f"{FIT} --network unet", ("--network must be mlp or conv", "'unet'")),
    "images": (f"{FIT} --network conv", ("--network conv needs images", "(2,)")),
    "hidden": (f"{FIT} --hidden big", ("--hidden must be", "128,128", "'big'")),
    "hidden of conv": ("fit diffusion --data images.npy --out new --network conv --hidden 8", ("--hidden", "mlp")),
    "noise schedule": (f"{FIT} --noise-schedule quadratic", ("--noise-schedule must be linear", "'quadratic'")),
    "the other schedule": (f"{FIT} --schedule linear", ("--schedule", "learning rate", "--noise-schedule linear")),
    "timesteps": (f"{FIT} --timesteps -1", ("--timesteps must be at least 1", "0 for continuous time", "-1")),
    "timesteps as text": (f"{FIT} --timesteps inf", ("--timesteps", "integer")),
    "prediction": (f"{FIT} --prediction noise", ("--prediction must be epsilon", "'noise'")),
    "v of another sum": (f"{FIT} --prediction v --noise-schedule karras", ("--prediction v", "edm")),
    "variance": (f"{FIT} --variance tiny", ("--variance must be optimal", "'tiny'")),
    "variance learned": (f"{FIT} --variance learned", ("--variance learned", "--objective elbo")),
    "variance learned without steps": (f"{FIT} --variance learned --objective elbo --timesteps 0", ("--timesteps 2",)),
    "schedule learned": (f"{FIT} --noise-schedule learned", ("--noise-schedule learned", "--objective elbo")),
    "objective": (f"{FIT} --objective ddpm", ("--objective must be denoising, flow_matching or elbo", "'ddpm'")),
    "weighting": (f"{FIT} --weighting snr", ("--weighting must be epsilon", "'snr'")),
    "weighting of a bound": (f"{FIT} --objective elbo --weighting v", ("--weighting belongs to", "not elbo")),
    "noise of no signal": (f"{FIT} --noise-schedule rectified", ("--prediction epsilon", "edm", "--timesteps 0")),
    "times": (f"{FIT} --times normal", ("--times must be uniform", "'normal'")),
    "times of an integral": (f"{FIT} --weighting elbo --times lognormal", ("--weighting elbo", "leave --times out")),
    "coupling": (f"{FIT} --objective flow_matching --coupling ot", ("--coupling must be independent", "'ot'")),
    "coupling of denoising": (f"{FIT} --coupling optimal", ("--coupling belongs to --objective flow_matching",)),
    "coupling and bound": (f"{FIT} --objective flow_matching --coupling optimal --log-p bound", ("--log-p ode",)),
    "coupling and context": (f"{PAIRS} --objective flow_matching --coupling optimal", ("--coupling", "context")),
    "unconditional": (f"{PAIRS} --unconditional 1", ("--unconditional must be a share", "1.0")),
    "unconditional without": (f"{FIT} --unconditional 0.1", ("--unconditional", "--data has none")),
    "whole numbers": ("fit diffusion --data counts.npy --out new", ("--data", "whole numbers", "--dequantize")),
    "log p": (f"{FIT} --log-p elbo", ("--log-p must be ode or bound", "'elbo'")),
    "probes": (f"{FIT} --probes 1", ("--probes must be at least 2", "got 1")),
    "option of another family": (f"{FIT} --latent-dim 2", ("--latent-dim", "diffusion", "vae")),
    "evaluate by what": ("evaluate plane --log-p exact", ("--log-p must be ode or bound", "'exact'")),
    "evaluate with a guide": ("evaluate plane --importance-samples 9", ("--importance-samples", "--log-p", "leave it")),
    "evaluate with log Z": ("evaluate plane --log-z annealed", ("--log-z has no use here", "--log-p")),
    "evaluate other rows": ("evaluate plane --data solid.npy", ("--data", "x must have shape")),
    "sample by what": ("sample plane --method euler --out x.npy", ("--method must be ancestral", "ode", "'euler'")),
    "sample in no steps": ("sample plane --steps 0 --out x.npy", ("--steps must be at least 1", "got 0")),
    "sample in too many": ("sample plane --steps 21 --out x.npy", ("--steps", "20")),
    "sample by an ODE in steps": ("sample plane --method ode --steps 9 --out x.npy", ("--steps", "tolerance")),
    "noise of another": ("sample plane --method heun --eta 0.5 --out x.npy", ("--eta belongs to --method ddim",)),
    "too much noise": ("sample plane --method ddim --eta 2 --out x.npy", ("--eta must lie between 0", "got 2")),
    "guidance": ("sample plane --guidance 1 --out x.npy", ("--guidance needs", "--unconditional")),
    "chains": ("sample plane --chains 4 --out x.npy", ("--chains has no use here", "leave it out")),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(files: Path, plane: tuple[Path, str]) -> Path:
    (files / "plane").symlink_to(plane[0])
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


def test_options_of_noise_are_no_options_of_others(files: Path, tmp_path: Path) -> None:
    words = ["--data", files / "plane.npy", "--transform", "linear", "--steps", 2, "--no-plots", "--no-progress"]
    done("fit", "flow", *words, "--out", tmp_path / "run")
    for asked in (["sample", tmp_path / "run", "--method", "ddim"], ["evaluate", tmp_path / "run", "--log-p", "ode"]):
        result = run(*asked)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert f"{asked[2]} has no use here" in result.stderr


# ------------------------------------------------------------------------------------------------- the bound as method
def test_the_bound_averages_draws_and_states_their_error() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 2, dtype=torch.float64)
    diffusion = pg.Diffusion(2, timesteps=5, hidden=(8,)).double()
    diffusion.initialise(x)
    found = LowerBound(400, seed=1).log_evidence(diffusion, x)
    again = LowerBound(400, seed=1).log_evidence(diffusion, x)
    other = LowerBound(400, seed=2).log_evidence(diffusion, x)
    assert found.kind == "lower bound"
    assert torch.equal(found.value, again.value)
    spread = (found.standard_error.square() + other.standard_error.square()).sqrt()  # type: ignore[union-attr]
    z = (found.value - other.value) / spread
    assert float(z.abs().max()) < 5  # 20 rows, of which the largest is below 5 but for 1 in 80 000
    assert float(((found.value - other.value - 1) / spread).abs().min()) > 5
    few = LowerBound(100, seed=1).log_evidence(diffusion, x)
    assert few.standard_error is not None
    assert found.standard_error is not None
    assert float((few.standard_error / found.standard_error).mean()) == pytest.approx(2, rel=0.2)


def test_the_bound_of_an_exact_program_is_exact_and_of_others_refused() -> None:
    flow = pg.Flow(2, "linear")
    x = torch.randn(5, 2)
    assert LowerBound(2).log_evidence(flow, x).kind == "exact"
    with pytest.raises(TypeError, match="up to Z"):
        LowerBound(2).log_evidence(pg.EBM(2, hidden=(4,)), x)
    with pytest.raises(ValueError, match="draws=1"):
        LowerBound(1)
