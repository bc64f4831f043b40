"""What a fit returns, and how it is kept: tensors and JSON in a folder, read back without running any code of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyro_gen import objectives, programs
from pyro_gen.base import SIGNS, Objective, ObjectiveModule, Program
from pyro_gen.checks import describe
from pyro_gen.fitting.sandwich import StandardErrors, sandwich

__all__ = ["FitResult", "History", "load"]

PROGRAMS: dict[str, type[Program]] = {name: getattr(programs, name) for name in programs.__all__}
OBJECTIVES: dict[str, type[Objective[Any]]] = {name: getattr(objectives, name) for name in objectives.__all__}
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
FORMAT = 1


@dataclass
class History:
    """What happened at each step; ``loss`` is in nats per datum where the loss is one of log-likelihood or bound.

    Attributes:
        columns: name to one number a step: ``loss`` (one column ``loss.0``, ``loss.1`` … a player in a game),
            ``grad_norm``, ``lr``, ``seconds`` since the start.
        validation: pairs (steps done, validation loss per datum).
    """

    columns: dict[str, list[float]] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)

    def __getitem__(self, name: str) -> list[float]:
        return self.columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def append(self, **values: float) -> None:
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)


@dataclass
class FitResult:
    """A point estimate: the program with its fitted weights, and how it got there.

    Attributes:
        module: the objective module that was trained, in place.
        history: see `History`.
        config: what was asked: steps, batch size, seed, optimizer, objective, versions; numbers and strings.
        best_step: steps after which the validation loss was least, whose weights these are; None without validation.
        stopped_at: steps after which early stopping, a callback or an interrupt ended the run; None if it ran through.
        seconds: wall time of the fit; compile_seconds: the part of it spent compiling.
    """

    module: ObjectiveModule
    history: History
    config: dict[str, Any]
    best_step: int | None = None
    stopped_at: int | None = None
    seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def program(self) -> Program:
        """The fitted program; a ``TypeError`` for a bare pair, which is in ``module.model`` and ``module.guide``."""
        program = self.module.program
        if program is None:
            raise TypeError("this fit was of a model/guide pair: result.module.model and result.module.guide hold it")
        return program

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return len(self.history)

    @property
    def validation(self) -> list[tuple[int, float]]:
        """Pairs (steps done, validation loss per datum)."""
        return self.history.validation

    def standard_errors(
        self, data: Any, *, parameters: Sequence[str] | None = None, seed: int | None = 0
    ) -> StandardErrors:
        """Standard errors of the fitted weights from the spread of the rows' gradients: see :func:`sandwich`.

        The weights have to be at the minimum for ``data``: fit to the end, on all of it (``validation=False``).

        Args:
            data: the rows of the fit: x, or a tuple ``(x, context)``.
            parameters: names of the parameters to take, the others held fixed; None for all that are trainable.
            seed: of the draws of a loss that has any.

        Raises:
            TypeError, ValueError: as :func:`sandwich`.
        """
        return sandwich(self.module, data, parameters=parameters, seed=seed)

    def __repr__(self) -> str:
        module = self.module
        name = type(module.program).__name__ if module.program is not None else "model/guide pair"
        parts = [f"{name} by {module.objective!r}", f"{self.steps} steps in {self.seconds:.1f} s"]
        if self.compile_seconds:
            parts[-1] += f" ({self.compile_seconds:.1f} s compiling)"
        sign = {"lower bound": SIGNS["lower bound"], "log-likelihood": SIGNS["exact"]}.get(module.objective.loss_is)
        if "loss" in self.history:
            last = self.history["loss"][-max(1, self.steps // 20) :]
            mean = sum(last) / len(last)
            parts.append(f"train {sign} {-mean:.2f} nats per datum" if sign else f"train loss {mean:.4g} per datum")
        if self.best_step is not None:
            best = dict(self.validation)[self.best_step]
            shown = f"{sign} {-best:.2f} nats per datum" if sign else f"loss {best:.4g} per datum"
            parts.append(f"validation {shown} (best, step {self.best_step})")
        if self.stopped_at is not None:
            parts.append(f"stopped at step {self.stopped_at}")
        return f"FitResult({'; '.join(parts)})"

    def save(self, folder: str | Path) -> Path:
        """Write ``program.json``, ``weights.pt`` and ``fit.json`` into a folder, made if need be.

        Programs built from numbers and strings come back by ``pg.load(folder)``; those given modules of your own by
        ``pg.load(folder, into=program)``.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        program, objective = self.module.program, self.module.objective
        described = {
            "format": FORMAT,
            "program": None if program is None else type(program).__name__,
            "config": None if program is None else program.config,
            "dtype": None if program is None else str(program.template().dtype).removeprefix("torch."),
            "objective": type(objective).__name__,
            "objective_settings": objective.settings(),
        }
        state = {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}
        torch.save(state, path / "weights.pt")
        (path / "program.json").write_text(json.dumps(described, indent=2) + "\n")
        fit = {
            "config": self.config,
            "history": self.history.columns,
            "validation": self.history.validation,
            "best_step": self.best_step,
            "stopped_at": self.stopped_at,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
        }
        (path / "fit.json").write_text(json.dumps(fit) + "\n")
        return path


def read_tensors(path: Path) -> Any:
    """Tensors and plain values of a file, or a ``ValueError`` where it is cut short or holds anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError … for one cause: a bad file
        raise ValueError(
            f"{path} is cut short, or not a file of tensors written by pyro_gen ({type(error).__name__})"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} is not a folder written by FitResult.save")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: the file is cut short or foreign ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold what FitResult.save writes")
    return content


def load(folder: str | Path, into: Program | ObjectiveModule | None = None) -> FitResult:
    """Read a saved fit. No code of the folder is run: classes come from a table, tensors from a tensors-only file.

    Args:
        folder: what `FitResult.save` wrote.
        into: the program to fill, for programs given modules of your own; or the objective module, for a bare pair or
            an objective given modules or distributions.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: for files that are cut short or foreign, or weights that do not fit.
    """
    path = Path(folder)
    described = _read_json(path / "program.json")
    if described.get("format") != FORMAT or "objective" not in described:
        raise ValueError(f"{path / 'program.json'} has format {described.get('format')!r}; this version reads {FORMAT}")
    if not (into is None or isinstance(into, (Program, ObjectiveModule))):
        raise TypeError(f"into must be a program, or the objective module of a pair, got {describe(into)}")
    objective: Any = None
    if not isinstance(into, ObjectiveModule):  # which brings its own, with modules that no settings describe
        try:
            objective = OBJECTIVES[described["objective"]].from_settings(described["objective_settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path / 'program.json'} names an objective unknown here ({error}): make the same one "
                "and call pg.load(folder, into=objective(program))"
            ) from error
    if isinstance(into, ObjectiveModule):
        module = into
    elif into is not None:
        module = objective(into)
    elif described.get("program") in PROGRAMS and described.get("config") is not None:
        try:
            program = PROGRAMS[described["program"]](**_rebuilt(described["config"]))
            module = objective(program.to(DTYPES[described["dtype"]]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path / 'program.json'} describes no program of this version: {error}") from error
    else:
        what = described.get("program") or "a model/guide pair"
        raise ValueError(
            f"{path} holds {what} with modules of its own, which loading cannot build: make the same one and call "
            "pg.load(folder, into=program)"
        )
    state = read_tensors(path / "weights.pt")
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path / 'weights.pt'} does not hold named tensors")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"the weights in {path} do not fit this program: {said}") from error
    fit = _read_json(path / "fit.json")
    try:
        history = History(fit["history"], [(int(s), float(v)) for s, v in fit["validation"]])
        return FitResult(
            module, history, fit["config"], fit["best_step"], fit["stopped_at"], fit["seconds"], fit["compile_seconds"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'fit.json'} does not hold what FitResult.save writes: {error}") from error


def _rebuilt(config: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
