"""The public surface: importing changes nothing, names and signatures are as promised, wrong kinds are refused."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts.cases import Decoder, Encoder, Hierarchy, LinearGaussian
from torch import Tensor

import pyro_gen as pg
from pyro_gen.base import Objective, Program

ROOT = Path(pg.__file__).parents[1]


# -------------------------------------------------------------------------------------------------------------- import
WATCHED = """
import importlib, locale, logging, os, random, signal, sys, warnings
import numpy, torch, pyro
import pyro.infer.autoguide, pyro.infer.inspect, pyro.poutine, torch.fx.experimental.proxy_tensor, torch.func
import torch.utils.data

def state():
    return {
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro settings": pyro.settings.get(),
        "parameter store": list(pyro.get_param_store()),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": str(numpy.random.get_state()),
        "python generator": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "print options": str(torch._tensor_str.PRINT_OPTS),
        "root logger": (logging.root.level, list(logging.root.handlers)),
        "our logger": (logging.getLogger("pyro_gen").level, logging.getLogger("pyro_gen").handlers),
        "warnings": list(warnings.filters),
        "numpy errors": numpy.geterr(),
        "excepthook": sys.excepthook,
        "interrupt": signal.getsignal(signal.SIGINT),
        "locale": locale.setlocale(locale.LC_ALL),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }

before = state()
"""
REPORT = """
after = state()
print([name for name in before if before[name] != after[name]])
print(sorted({"arviz", "matplotlib", "sklearn", "rich", "pandas"} & set(sys.modules)))
"""


def run_python(*lines: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)],
        capture_output=True, text=True, timeout=100, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_import_changes_no_global_state() -> None:
    changed, heavy = run_python(WATCHED, "import pyro_gen", REPORT)
    assert changed == "[]"
    assert heavy == "[]", "what only some functions need is imported by them"


def test_the_watch_sees_changes() -> None:
    meddling = (
        "pyro.enable_validation(False); torch.manual_seed(3); torch.set_default_dtype(torch.float64)",
        "logging.basicConfig(); warnings.simplefilter('ignore'); pyro.param('a', torch.ones(1)); import pandas",
    )
    changed, heavy = run_python(WATCHED, *meddling, REPORT)
    assert changed == str(
        ["torch validation", "pyro settings", "parameter store", "torch generator", "default dtype", "root logger",
         "warnings"]
    )  # fmt: skip
    assert heavy == "['pandas']"


# ------------------------------------------------------------------------------------------------------------- surface
# DESIGN.md, section 4: what is promised to users. Names that do not exist yet are not looked at.
PROMISED = """
    VAE(event_shape, latent_dim=ANY, likelihood="normal", encoder=None, decoder=None, prior=None, guide="diagonal")
    Flow(event_shape, transform="spline_autoregressive", layers=3, hidden=(128, 128), context_shape=None, direction="density")
    Autoregressive(event_shape, likelihood="bernoulli", hidden=(128, 128))
    EBM(event_shape, energy=None, base="normal")
    GAN(event_shape, latent_dim=ANY, generator=None, critic=None)
    Diffusion(event_shape, network=None, schedule="cosine", timesteps=1000, prediction="epsilon")
    fit(module, data, *, steps=None, epochs=None, batch_size=None, optimizer=None, lr=1e-3, validation=None, compile="auto", device=None, seed=None, progress=None, checkpoint=None)
    posterior(module, data, *, prior, method, seed=None, progress=None)
    log_evidence(program, x, context=None, *, method=None)
    log_normalizer(program, *, method=None)
    to_inference_data(source, data=None)
    Exact.log_prob(self, x, context=None)
    Exact.sample(self, n, context=None)
    Bounded.lower_bound(self, x, context=None)
    Bounded.sample(self, n, context=None)
    Implicit.sample(self, n, context=None)
    Unnormalized.log_density(self, x, context=None)
    Unnormalized(model, event_shape)
    Bounded(model, guide, event_shape)
    Exact(model, event_shape)
    FitResult.save(self, dir)
"""  # noqa: E501
ANY = object()
LINES = [line.strip() for line in PROMISED.strip().splitlines()]


def promised(line: str) -> inspect.Signature:
    space: dict[str, Any] = {"ANY": ANY}
    exec(f"def f{line[line.index('(') :]}: ...", space)
    return inspect.signature(space["f"])


def differences(found: inspect.Signature, wanted: inspect.Signature) -> list[str]:
    """What a caller who relies on ``wanted`` would trip over in ``found``."""
    said = []
    positional = [p.name for p in wanted.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    first = [p.name for p in found.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][: len(positional)]
    if [n for n in first if n not in ("dir", "folder")] != [n for n in positional if n not in ("dir", "folder")]:
        said.append(f"positional {first} for {positional}")
    for name, parameter in wanted.parameters.items():
        have = found.parameters.get("folder" if name == "dir" else name)
        if have is None:
            said.append(f"no {name}")
        elif parameter.default is ANY:
            said += [f"{name} is required"] if have.default is have.empty else []
        elif have.default != parameter.default:
            said.append(f"{name}={have.default!r} for {parameter.default!r}")
    for name, have in found.parameters.items():
        open_ended = have.kind in (have.VAR_KEYWORD, have.VAR_POSITIONAL)
        if name not in wanted.parameters and have.default is have.empty and not open_ended and name != "folder":
            said.append(f"{name} is asked for")
    return said


def find(path: str) -> Any:
    thing: Any = pg
    for part in path.split("."):
        thing = getattr(thing, part, None)
    return thing


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("(")[0])
def test_signatures_are_as_promised(line: str) -> None:
    thing = find(line.split("(")[0])
    if thing is None:
        pytest.skip("not there yet")
    assert differences(inspect.signature(thing), promised(line)) == []


def test_most_promises_are_kept_by_now() -> None:
    assert {"VAE", "fit", "log_evidence", "Bounded"} <= {
        line.split("(")[0] for line in LINES if find(line.split("(")[0])
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("f(a, c, b=1)", "positional"),
        ("f(a, b=2)", "b=1 for 2"),
        ("f(a, b=1, d=2)", "no d"),
        ("f(b=1)", "a is asked for"),
        ("f(a=ANY, b=1)", "a is required"),
    ],
)
def test_signature_check_can_fail(line: str, said: str) -> None:
    def f(a: int, b: int = 1, *, c: int = 0, **rest: int) -> None: ...

    assert differences(inspect.signature(f), promised("f(a, b=1)")) == []
    assert any(said in text for text in differences(inspect.signature(f), promised(line)))


def families() -> list[type[Program]]:
    public = [getattr(pg, name) for name in pg.__all__]
    return [t for t in public if isinstance(t, type) and issubclass(t, Program) and ".programs." in t.__module__]


def objectives() -> list[type[Objective[Any]]]:
    public = [getattr(pg, name) for name in pg.__all__]
    return [t for t in public if isinstance(t, type) and issubclass(t, Objective)]


@pytest.mark.parametrize("family", families(), ids=lambda t: t.__name__)
def test_families_take_a_context_and_are_not_called(family: type[Program]) -> None:
    assert "context_shape" in inspect.signature(family).parameters
    with pytest.raises(TypeError, match="objective"):
        family(2)(torch.zeros(1, 2))  # type: ignore[misc]


@pytest.mark.parametrize("objective", objectives(), ids=lambda t: t.__name__)
def test_objectives_declare_what_they_are(objective: type[Objective[Any]]) -> None:
    assert objective.needs
    assert objective.loss_is
    made = objective()
    assert repr(type(made).from_settings(made.settings())) == repr(made)
    assert isinstance(made, pyro.infer.ELBO)  # SVI looks


def test_all_is_sorted_and_there() -> None:
    assert list(pg.__all__) == sorted(pg.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert all(hasattr(pg, name) for name in pg.__all__)
    public = {n for n, thing in vars(pg).items() if not n.startswith("_") and not isinstance(thing, ModuleType)}
    assert public <= set(pg.__all__)
    from_design = set(re.findall(r"^ *([A-Za-z_]\w*)\(", PROMISED, re.M))
    assert {n for n in from_design if hasattr(pg, n)} <= set(pg.__all__)


def documented() -> list[tuple[str, Any]]:
    """Public objects and their public methods, by name."""
    found: list[tuple[str, Any]] = []
    for name in pg.__all__:
        thing = getattr(pg, name)
        members = [(name, thing)]
        if isinstance(thing, ModuleType):
            members += [(f"{name}.{n}", getattr(thing, n)) for n in getattr(thing, "__all__", [])]
        found += members
    for name, thing in list(found):
        if isinstance(thing, type):
            own = [(f"{name}.{n}", m) for n, m in vars(thing).items() if not n.startswith("_")]
            found += [(n, getattr(m, "fget", m)) for n, m in own if inspect.isfunction(m) or isinstance(m, property)]
    return found


def test_every_public_name_has_a_docstring() -> None:
    bare = []
    for name, thing in documented():
        owner, _, last = name.rpartition(".")
        inherited = isinstance(find(owner), type) and inspect.getdoc(getattr(find(owner), last))
        if not (inspect.getdoc(thing) or inherited) and (callable(thing) or isinstance(thing, ModuleType)):
            bare.append(name)
    assert bare == []


def test_docstrings_begin_with_one_line_and_name_every_argument() -> None:
    wrong = []
    for name, thing in documented():
        doc = inspect.getdoc(thing) or ""
        if not (inspect.isfunction(thing) or isinstance(thing, type)) or not doc or "." in name.split(".", 1)[-1]:
            continue
        lines = doc.splitlines()
        if len(lines) > 1 and lines[1].strip():
            wrong.append(f"{name}: first line runs on")
        if not lines[0].rstrip().endswith((".", ":", "?")):
            wrong.append(f"{name}: first line does not end")
        if isinstance(thing, type) and (issubclass(thing, Exception) or "Attributes:" in doc):
            continue
        for parameter in inspect.signature(thing).parameters.values():
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name == "self":
                continue
            if "Args:" in doc and not re.search(rf"\b{parameter.name}\b", doc):
                wrong.append(f"{name}: says nothing of {parameter.name}")
    assert wrong == []


# --------------------------------------------------------------------------------------------------------- wrong kinds
def sampler(x: Tensor) -> None:
    with pyro.plate("data", x.shape[0]):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), x.new_ones(1)).to_event(1))
        pyro.sample("x", dist.Delta(z.expand(-1, 3)).to_event(1), obs=x)


def kinds() -> dict[str, Program]:
    return {
        "VAE": pg.VAE(3),
        "Noised": pg.Diffusion(3),
        "Bounded": pg.Bounded(Decoder(), Encoder(), 3),
        "Implicit": pg.Implicit(sampler, event_shape=3),
        "Unnormalized": pg.Unnormalized(LinearGaussian(), 3),
        "Exact": pg.Exact(LinearGaussian(), 3),
    }


@pytest.mark.parametrize("objective", objectives(), ids=lambda t: t.__name__)
@pytest.mark.parametrize("kind", sorted(kinds()))
def test_wrong_kind_is_a_type_error_that_names_what_works(objective: type[Objective[Any]], kind: str) -> None:
    program = kinds()[kind]
    works = sorted(o.__name__ for o in objectives() if isinstance(program, o.needs))
    if isinstance(program, objective.needs):
        assert objective()(program).program is program
        return
    with pytest.raises(
        TypeError, match=re.escape(f"what trains it: {', '.join(works) or 'no objective here'}")
    ) as told:
        objective()(program)
    assert objective.__name__ in str(told.value)
    assert type(program).__name__ in str(told.value)


@pytest.mark.parametrize("objective", objectives(), ids=lambda t: t.__name__)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((pg.VAE,), r"the class VAE \(make an instance: VAE\(...\)\)"),
        ((3,), "a program, or a model and a guide"),
        ((Decoder(), 3), "a program, or a model and a guide"),
        ((pg.VAE(3), Encoder()), "brings its own guide"),
    ],
)
def test_what_is_no_program_is_refused(objective: type[Objective[Any]], given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        objective()(*given)


def test_pieces_of_a_program_without_a_density_do_not_get_through() -> None:
    implicit, x = pg.Implicit(sampler, event_shape=3), torch.zeros(4, 3)
    for objective in objectives():
        refused, why = ValueError, "critic" if pg.Implicit in objective.needs else "'z'"
        if objective.needs == (pg.Noised,):  # takes programs only
            refused, why = TypeError, "not a bare pair"
        with pytest.raises(refused, match=why):
            objective()(implicit.model, implicit.guide)(x)


def test_programs_are_not_built_of_programs() -> None:
    vae = pg.VAE(3)
    with pytest.raises(TypeError, match=r"program\.model"):
        pg.Bounded(vae, Encoder(), 3)
    with pytest.raises(TypeError, match="callable"):
        pg.Bounded(Decoder(), 3, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="event_shape"):
        pg.Bounded(Decoder(), Encoder(), 0)


def test_densities_of_programs_with_free_latents_name_the_way() -> None:
    x = torch.zeros(4, 3)
    for ask in (pg.log_density, pg.score):
        with pytest.raises(ValueError, match=r"'z' is left free.*pg\.Bounded"):
            ask(Decoder(), x)
    with pytest.raises(ValueError, match="'loc', 'scale' is left free"):
        pg.log_density(Hierarchy(), x)


TYPES = """
import pyro_gen as pg

def model(x: object) -> None: ...

vae, implicit, exact = pg.VAE(3), pg.Implicit(model), pg.Exact(model, 3)
pg.ELBO()(vae)
pg.IWAE(4)(exact)
pg.MaximumLikelihood()(exact)
pg.ELBO()(vae.model, vae.guide)
pg.MaximumLikelihood()(model)
pg.ELBO()(implicit)  # refused
pg.MaximumLikelihood()(vae)  # refused
pg.IWAE()(pg.Unnormalized(model, 3))  # refused
pg.fit(vae, [])  # refused
vae(3)  # refused
"""


@pytest.mark.slow
def test_type_checker_refuses_the_wrong_kind(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(TYPES)
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary"]
    done = subprocess.run([*mypy, str(snippet)], capture_output=True, text=True, timeout=280, cwd=ROOT)
    flagged = {int(m) for m in re.findall(r"snippet\.py:(\d+): error", done.stdout)}
    refused = {number for number, line in enumerate(TYPES.splitlines(), 1) if line.endswith("# refused")}
    assert flagged == refused, done.stdout + done.stderr
