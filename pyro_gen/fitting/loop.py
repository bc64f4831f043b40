"""The one training loop: the frequentist view, a point estimate of the weights.

What is minimised is loss / N, N the rows of the data set, so that learning rate and clipping mean the same for every
N. The first step runs eagerly with validation on: what is wrong with a program or its data is said there, by name.
Every step's loss and gradient norm are looked at before the optimizer moves anything, so that a run that diverges
stops at its last good state.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader

from pyro_gen.base import SIGNS, Divergence, ObjectiveModule, Program, check_count, describe
from pyro_gen.compiled import CannotCompile, CompiledStep, eager_step, why_not
from pyro_gen.fitting.averaging import Average
from pyro_gen.fitting.batches import Batches, as_batch, split
from pyro_gen.fitting.checkpoints import Checkpoint, checksum
from pyro_gen.fitting.progress import Progress
from pyro_gen.fitting.results import FitResult, History
from pyro_gen.handlers import forked_generators, preserved_state

__all__ = ["COMPILE_FROM", "fit"]

logger = logging.getLogger("pyro_gen")

COMPILE_FROM = 5000
"""Steps from which ``compile="auto"`` compiles: about where a few seconds of compiling are won back on small models.
A count and not a clock, so that the same call gives the same weights on every machine."""

SNAPSHOT_EVERY = 10  # steps between copies of the weights, one of which a diverging run goes back to
VALIDATION_ROWS = 2048

Factory = Callable[..., Optimizer]
Callback = Callable[[int, dict[str, float]], Any]


def fit(
    module: ObjectiveModule,
    data: Any,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: Factory | list[Factory] | None = None,
    lr: float = 1e-3,
    schedule: Literal["cosine"] | Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    average: float | Literal["tail"] | None = None,
    validation: Any = None,
    validate_every: int | None = None,
    patience: int | None = None,
    compile: bool | Literal["auto"] = "auto",
    device: str | torch.device | None = None,
    seed: int | None = None,
    progress: bool | None = None,
    callback: Callback | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
) -> FitResult:
    """Minimise an objective over its parameters; the program is trained in place.

    Args:
        module: an objective bound to a program, ``pg.ELBO()(program)``, or to a pair, ``pg.ELBO()(model, guide)``.
        data: a tensor or array of rows, a tuple ``(x, context)``, a ``Dataset`` or a ``DataLoader``.
        steps: optimizer steps; or epochs: passes over the data. Give one of them.
        batch_size: rows a step; None for 256, or all rows where there are at most 512. A short last batch is dropped.
        optimizer: called as ``optimizer(parameters, lr=lr)``, for instance ``torch.optim.SGD``; a list of them, one a
            player, in games. None is Adam (fused).
        lr: learning rate, of the loss per datum.
        schedule: ``"cosine"`` to zero over the run, or a callable from the optimizer to a torch scheduler.
        clip_norm: gradients of a larger norm are scaled down to it.
        average: a decay such as 0.999 for an exponential moving average of the weights, or ``"tail"`` for their mean
            over the second half of the run; the averaged weights are the result, and are what is validated.
        validation: rows held out: a fraction of the data, or data like ``data``. The weights of the evaluation with the
            least validation loss are the result.
        validate_every: steps between evaluations; None for 40 over the run.
        patience: evaluations without a new least loss after which the run stops; None runs through.
        compile: trace and compile the step: True, False, or ``"auto"`` (from `COMPILE_FROM` steps on, where it can).
        device: moves module and data there first; ``"auto"`` takes CUDA where there is one; None leaves the module.
        seed: of batches and noise. The same seed gives the same weights; global generators are left as they were.
        progress: show a progress line; None does on a terminal.
        callback: called as ``callback(step, values)`` after each step, with loss, grad_norm and lr (and validation
            where it was evaluated); if it returns True the run stops.
        checkpoint: a file, written every ``checkpoint_every`` steps (None: 20 times) and when interrupted; a run that
            finds its file goes on from it.

    Returns:
        FitResult: the fitted program, the history in nats per datum, and how to save it.

    Raises:
        TypeError, ValueError: for arguments or data that cannot be, naming them and the fix.
        Divergence: if loss or gradient is not finite; the module then holds its last good state.
    """
    if not isinstance(module, ObjectiveModule):
        hint = ": bind it to an objective first, pg.ELBO()(program)" if isinstance(module, Program) else ""
        raise TypeError(f"fit takes an objective bound to a program, pg.ELBO()(program), got {describe(module)}{hint}")
    _check_numbers(steps, epochs, lr, clip_norm, patience, validate_every, checkpoint_every, seed)
    if validation is None and (patience is not None or validate_every is not None):
        name = "patience" if patience is not None else "validate_every"
        raise ValueError(f"{name}= needs validation=: a fraction such as 0.1, or rows held out")
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto', got {describe(compile)}")
    if progress not in (True, False, None):
        raise ValueError(f"progress must be True, False or None, got {describe(progress)}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable as callback(step, values), got {describe(callback)}")
    where = _home(module, data) if device is None else named_device(device)
    if device is not None:
        module.to(where)
    program = module.program

    if seed is None:
        with forked_generators():  # from the caller's generator, which stays where it is
            seed = int(torch.randint(2**31, ()))
    held: tuple[Tensor, ...] | None = None
    kept: Tensor | None = None
    source: tuple[Tensor, ...] | DataLoader[Any]
    if isinstance(data, DataLoader):
        source = data
        if isinstance(validation, float):
            raise ValueError("validation as a fraction needs data in memory: give validation rows beside a DataLoader")
    else:
        source = tuple(part.to(where) for part in as_batch(_moved(data, where), program))
        if isinstance(validation, (int, float)):
            source, held, kept = split(source, validation, seed)
        if program is not None:
            if source[0].shape[0] < 2:
                raise ValueError(
                    "data have one row to train on, and a distribution is not learnt from it: give more rows"
                )
            program.check_training(source[0])
    if validation is not None and held is None:
        try:
            held = tuple(p.to(where) for p in as_batch(_moved(validation, where), program, "validation"))
        except (TypeError, ValueError) as error:
            where_from = "" if str(error).startswith("validation") else "in validation=: "
            raise type(error)(f"{where_from}{error}") from error

    batches = Batches(source, batch_size, seed, where)
    if steps is None:
        assert epochs is not None
        steps = epochs * batches.per_epoch
    run = _Run(module, batches, held, kept, steps, seed, clip_norm, compile)
    run.config.update(
        lr=lr, schedule=_name(schedule), optimizer=_name(optimizer) or "Adam", clip_norm=clip_norm, average=average,
        validation_rows=None if held is None else len(held[0]), validate_every=validate_every, patience=patience,
        device=str(where),
    )  # fmt: skip
    training = {m: m.training for m in module.modules()}
    module.train()
    try:
        with forked_generators(seed), Progress(steps, progress, run.sign) as bar:
            run.start(optimizer, lr, schedule, average, program)
            saved = None if checkpoint is None else Checkpoint(checkpoint, run.fingerprint())
            try:
                run.go(bar, callback, validate_every or max(1, steps // 40), patience, saved, checkpoint_every)
            finally:
                run.finish()
    finally:
        for sub, flag in training.items():
            sub.training = flag
    return run.result()


class _Run:
    """One run of the loop: what it holds between steps."""

    def __init__(
        self,
        module: ObjectiveModule,
        batches: Batches,
        held: tuple[Tensor, ...] | None,
        kept: Tensor | None,
        steps: int,
        seed: int,
        clip_norm: float | None,
        compile: bool | str,
    ) -> None:
        self.module, self.batches, self.held, self.steps, self.seed = module, batches, held, steps, seed
        self.kept = kept  # where the training rows stood in the user's data, if they were split
        self.clip_norm, self.compile = clip_norm, compile
        self.history = History()
        self.step = 0
        self.whole = True  # False within a step, whose state no checkpoint may keep
        self.finished = False  # stopped early: a resumed run has nothing left to do
        self.looked = False  # whether a step was run with validation on
        self.suspect: ValueError | None = None  # what validation said of the first batch, to be judged by its loss
        self.best: tuple[float, int, list[Tensor]] | None = None
        self.stopped_at: int | None = None
        self.seconds = 0.0
        self.compiled: CompiledStep | None = None
        self.average: Average | None = None
        loss_is = module.objective.loss_is
        self.sign = {"lower bound": SIGNS["lower bound"], "log-likelihood": SIGNS["exact"]}.get(loss_is, "")
        self.config: dict[str, Any] = {
            "objective": repr(module.objective),
            "steps": steps,
            "rows": batches.rows,
            "batch_size": getattr(batches, "size", None),
            "seed": seed,
            "compile": str(compile),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
        }

    def start(self, optimizer: Any, lr: float, schedule: Any, average: Any, program: Program | None) -> None:
        """The first look: run the program once, validation on, then build optimizers over what there is to train."""
        module = self.module
        self.stream = iter(self.batches)
        state = self.batches.state()
        self.first = next(self.stream)
        if self.batches.loader is None:
            self.batches.resume(state)
            self.stream = iter(self.batches)
        else:
            self.stream = _chain(self.first, self.stream)
        if program is not None:
            program.check(*self.first)
        try:
            with pyro.validation_enabled(True):
                module.prepare(*self.first)
        except ValueError as error:  # a program that is wrong fails once more; one that gives NaN is a divergence
            with pyro.validation_enabled(False):
                module.prepare(*self.first)
            self.suspect = error
        assert module.structure is not None
        # a program without a plate over rows estimates its own total, and cannot be given part of the rows
        self.total = self.batches.rows if module.structure.data_plate is not None or not self.batches.full else None
        self.divisor = self.batches.rows
        players: list[list[Tensor]] = [[p for p in player.parameters() if p.requires_grad] for player in module.players]
        if len(players) == 1:
            players = [module.trainable()]
        if not all(players):
            raise ValueError("there is nothing to train: every parameter is frozen, or the program has none")
        self.tensors = [t for p in players for t in p]
        self.buffers = list(module.buffers())
        factories = optimizer if isinstance(optimizer, list) else [optimizer] * len(players)
        if len(factories) != len(players):
            raise ValueError(f"optimizer has {len(factories)} entries for {len(players)} players")
        self.optimizers = [_optimizer(f, p, lr) for f, p in zip(factories, players, strict=True)]
        self.schedulers = [_scheduler(schedule, o, self.steps) for o in self.optimizers] if schedule else []
        if average is not None:
            self.average = Average(self.tensors, average, self.steps // 2)
        self.good_step, self.good = 0, [t.detach().clone() for t in (*self.tensors, *self.buffers)]

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on from it."""
        places = ("compile", "device", "torch", "pyro")  # may change: the results stay the same, to rounding
        asked = {name: value for name, value in self.config.items() if name not in places}
        shapes = [list(t.shape) for t in self.tensors]
        data = None if self.batches.loader is not None else checksum((*self.batches.data, *(self.held or ())))
        return {**asked, "parameters": shapes, "data": data}

    def go(
        self,
        bar: Progress,
        callback: Callback | None,
        validate_every: int,
        patience: int | None,
        saved: Checkpoint | None,
        checkpoint_every: int | None,
    ) -> None:
        if saved is not None and (state := saved.read()) is not None:
            self.restore(state)
        every = checkpoint_every or max(1, self.steps // 20)
        begun = time.perf_counter() - self.seconds
        names = [f"loss.{i}" for i in range(len(self.optimizers))] if len(self.optimizers) > 1 else ["loss"]
        with interrupts_held() as interrupted, self.kept_when_interrupted(saved):
            while self.step < self.steps and not self.finished:
                if interrupted:
                    raise KeyboardInterrupt
                self.whole = False
                batch = next(self.stream)
                noise = torch.get_rng_state()
                evaluated = self.evaluate(batch)
                *losses, square = evaluated.tolist()
                if not (math.isfinite(square) and all(map(math.isfinite, losses))):
                    raise self.diverged(batch, losses, noise)
                if self.step % SNAPSHOT_EVERY == 0:  # of weights whose loss and gradient are known to be finite
                    self.keep()
                norm = math.sqrt(square)
                if self.clip_norm is not None and norm > self.clip_norm:
                    torch._foreach_mul_([t.grad for t in self.tensors if t.grad is not None], self.clip_norm / norm)
                lr = self.optimizers[0].param_groups[0]["lr"]
                for player in self.optimizers:
                    player.step()
                for scheduler in self.schedulers:
                    scheduler.step()
                self.step += 1
                if self.average is not None:
                    self.average.update(self.step)
                self.seconds = time.perf_counter() - begun
                values = dict(zip(names, losses, strict=True))
                self.history.append(**values, grad_norm=norm, lr=lr, seconds=self.seconds)
                if self.held is not None and (self.step % validate_every == 0 or self.step == self.steps):
                    values["validation"] = self.validate()
                if self.step % 20 == 0 or self.step == self.steps:
                    bar.update(
                        self.step, losses[0], self.history.validation[-1][1] if self.history.validation else None
                    )
                self.finished = patience is not None and self.waited() >= patience
                self.whole = True
                if saved is not None and (self.step % every == 0 or self.step == self.steps or self.finished):
                    self.save(saved)
                stop = callback is not None and callback(self.step, {**values, "grad_norm": norm, "lr": lr}) is True
                if stop or self.finished:
                    self.stopped_at = self.step
                    break
            if interrupted:
                raise KeyboardInterrupt

    @contextmanager
    def kept_when_interrupted(self, saved: Checkpoint | None) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.stopped_at = self.step
            if saved is not None and self.whole:
                self.save(saved)
            raise

    def save(self, saved: Checkpoint) -> None:
        """Write a checkpoint, unless the weights are beyond repair: the next step will say so."""
        if all(bool(torch.isfinite(t).all()) for t in self.tensors):
            saved.write(self.state())

    def evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Losses and squared gradient norm of a batch; gradients into ``.grad``."""
        if self.compiled is not None:
            return self.compiled(batch, self.total, self.divisor)
        if self.looked:  # later steps are watched by the guard, eager or compiled
            with pyro.validation_enabled(False):
                return eager_step(self.module, batch, self.total, self.divisor)
        self.looked = True
        try:
            if self.suspect is not None:
                raise self.suspect
            with pyro.validation_enabled(True):
                return self.first_step(batch)
        except (ValueError, CannotCompile):
            with pyro.validation_enabled(False):
                evaluated = eager_step(self.module, batch, self.total, self.divisor)
            if bool(torch.isfinite(evaluated).all()):
                raise
            return evaluated

    def first_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        """An eager step, which is compiled for those to come if that is wanted."""
        wanted = self.compile is True or (self.compile == "auto" and self.steps >= COMPILE_FROM)
        if wanted:
            try:
                if (reason := why_not(self.module)) is not None:
                    raise CannotCompile(reason)
                compiled = CompiledStep(self.module)
                evaluated = compiled(batch, self.total, self.divisor)
                self.compiled = compiled
                return evaluated
            except CannotCompile as error:
                if self.compile is True:
                    raise CannotCompile(f"compile=True, but this loss does not compile: {error}") from error
                logger.warning("pyro_gen: eager steps, as this loss does not compile: %s", error)
        return eager_step(self.module, batch, self.total, self.divisor)

    @torch.no_grad()
    def validate(self) -> float:
        """Validation loss per datum, with the noise of one fixed seed; keeps the best weights."""
        assert self.held is not None
        module, rows = self.module, self.held[0].shape[0]
        training = module.training
        module.eval()
        with preserved_state(module, seed=self.seed), self.average.applied() if self.average else nullcontext():
            loss = 0.0
            for start in range(0, rows, VALIDATION_ROWS):
                part = tuple(p[start : start + VALIDATION_ROWS] for p in self.held)
                total = None if self.total is None else self.divisor
                with pyro.validation_enabled(False):  # the rows were checked; a NaN is for the guard of the next step
                    value = float(module(*part, total=total)) / (part[0].shape[0] if total is None else self.divisor)
                loss += value * part[0].shape[0] / rows
            self.history.validation.append((self.step, loss))
            if math.isfinite(loss) and (self.best is None or loss < self.best[0]):
                self.best = (loss, self.step, [t.detach().clone() for t in (*self.tensors, *self.buffers)])
        module.train(training)
        return loss

    def waited(self) -> int:
        """Evaluations since the best one."""
        return 0 if self.best is None else sum(step > self.best[1] for step, _ in self.history.validation)

    @torch.no_grad()
    def keep(self) -> None:
        torch._foreach_copy_(self.good, [t.detach() for t in (*self.tensors, *self.buffers)])
        self.good_step = self.step

    @torch.no_grad()
    def diverged(self, batch: tuple[Tensor, ...], losses: list[float], noise: Tensor) -> Divergence:
        """Say where it broke, and leave the last good state behind."""
        module = self.module
        named = {id(p): n for n, p in module.named_parameters()}
        bad = [
            named.get(id(t), f"pyro.param {tuple(t.shape)}")
            for t in self.tensors
            if t.grad is not None and not bool(torch.isfinite(t.grad.square().sum()))
        ]
        rows: list[int] = []
        torch.set_rng_state(noise)
        try:
            with pyro.validation_enabled(False):
                each = module.pointwise(*batch)
        except (TypeError, ValueError):  # not a sum over rows
            pass
        else:
            rows = (~torch.isfinite(each)).nonzero().flatten().tolist()
            if self.batches.indices is not None:
                rows = self.batches.indices[rows].tolist()
            if self.kept is not None:
                rows = self.kept[rows].tolist()
        torch._foreach_copy_([t.detach() for t in (*self.tensors, *self.buffers)], self.good)
        known = self.batches.full or self.batches.indices is not None
        what = "loss" if not all(map(math.isfinite, losses)) else "gradient"
        shown = ", ".join(map(repr, bad[:3])) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        shown_rows = f"{rows[:5]} and {len(rows) - 5} more" if len(rows) > 5 else f"{rows}"
        message = (
            f"the {what} is not finite at step {self.step}"
            + (f", in the gradient of {shown}" if bad else "")
            + (f", at rows {shown_rows} of the {'data' if known else 'batch'}" if rows else "")
            + f". The module holds its state after {self.good_step} steps. "
            "A smaller lr=, clip_norm=, or data of unit scale often help"
        )
        self.best = self.average = None
        self.stopped_at = self.step
        return Divergence(message, self.step, bad, rows, self.result())

    @torch.no_grad()
    def finish(self) -> None:
        """Put the weights in place that are the result: the best validated, else the average, else the last."""
        if self.best is not None:
            torch._foreach_copy_([t.detach() for t in (*self.tensors, *self.buffers)], self.best[2])
        elif self.average is not None:
            self.average.apply()
        for tensor in self.tensors:
            tensor.grad = None

    def result(self) -> FitResult:
        spent = 0.0 if self.compiled is None else self.compiled.seconds
        self.config["compiled"] = self.compiled is not None
        best = None if self.best is None else self.best[1]
        return FitResult(self.module, self.history, self.config, best, self.stopped_at, self.seconds, spent)

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "step": self.step,
            "finished": self.finished,
            "tensors": [t.detach() for t in self.tensors],
            "buffers": self.buffers,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedulers": [s.state_dict() for s in self.schedulers],
            "noise": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "batches": self.batches.state(),
            "columns": self.history.columns,
            "validation": self.history.validation,
            "best": None if self.best is None else list(self.best),
            "average": None if self.average is None else {"mean": self.average.mean, "count": self.average.count},
            "seconds": self.seconds,
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        torch._foreach_copy_([t.detach() for t in self.tensors], state["tensors"])
        if self.buffers:
            torch._foreach_copy_(self.buffers, state["buffers"])
        owners: list[Any] = [*self.optimizers, *self.schedulers]
        for own, theirs in zip(owners, (*state["optimizers"], *state["schedulers"]), strict=True):
            own.load_state_dict(theirs)
        torch.set_rng_state(state["noise"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        if self.batches.loader is None:
            self.batches.resume(state["batches"])
            self.stream = iter(self.batches)
        self.step, self.seconds, self.finished = state["step"], state["seconds"], state["finished"]
        self.stopped_at = self.step if self.finished else None
        self.history = History(state["columns"], [(int(s), float(v)) for s, v in state["validation"]])
        self.best = None if state["best"] is None else tuple(state["best"])
        if self.average is not None and state["average"] is not None:
            torch._foreach_copy_(self.average.mean, state["average"]["mean"])
            self.average.count = state["average"]["count"]
        self.keep()


def _check_numbers(
    steps: Any,
    epochs: Any,
    lr: Any,
    clip_norm: Any,
    patience: Any,
    validate_every: Any,
    checkpoint_every: Any,
    seed: Any,
) -> None:
    if (steps is None) == (epochs is None):
        raise ValueError("give steps= or epochs=, one of the two")
    counts = {
        "steps": steps,
        "epochs": epochs,
        "patience": patience,
        "validate_every": validate_every,
        "checkpoint_every": checkpoint_every,
    }
    for name, value in counts.items():
        if value is not None:
            check_count(value, name)
    for name, value in (("lr", lr), ("clip_norm", clip_norm)):
        if value is None and name == "clip_norm":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {describe(value)}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed must be an int, got {describe(seed)}")


def named_device(device: str | torch.device) -> torch.device:
    """The device of a name, if there is one; ``"auto"`` takes CUDA where it can."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:0', got {describe(device)}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device={str(device)!r} is not there (CUDA devices: {count}): use 'auto' or 'cpu'")
    return found


def _home(module: ObjectiveModule, data: Any) -> torch.device:
    """Where the module is; for one without tensors, where the data are."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    x = data[0] if isinstance(data, (tuple, list)) and data else data
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def _moved(data: Any, device: torch.device) -> Any:
    """Data on the CPU are taken to the module's device; data elsewhere are refused."""
    if isinstance(data, (tuple, list)):
        parts = [_moved(part, device) for part in data]
        return parts if isinstance(data, list) else tuple(parts)
    if not isinstance(data, Tensor):
        return data
    if data.device.type != "cpu" and data.device.type != device.type:
        raise ValueError(
            f"data are on {data.device} and the program on {device}: move one, program.to({str(data.device)!r}) or "
            f"data.to({str(device)!r}), or give device="
        )
    return data.to(device)


def _name(factory: Any) -> str | None:
    """A short name of an optimizer or schedule, for configurations."""
    if factory is None or isinstance(factory, str):
        return factory
    if isinstance(factory, list):
        return ", ".join(str(_name(f)) for f in factory)
    return str(getattr(factory, "__qualname__", type(factory).__qualname__))


@contextmanager
def interrupts_held() -> Iterator[list[bool]]:
    """Hold back the first Ctrl-C: the list fills, and the loop stops between two steps, where its state is whole.

    The second one interrupts at once, as does the first outside the main thread or where a handler is set already.
    """
    interrupted: list[bool] = []
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupted
        return

    def note(number: int, frame: Any) -> None:
        if interrupted:
            signal.default_int_handler(number, frame)
        interrupted.append(True)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _optimizer(factory: Any, parameters: list[Tensor], lr: float) -> Optimizer:
    if factory is None:
        fused = all(p.device.type in ("cpu", "cuda") and p.dtype.is_floating_point for p in parameters)
        return torch.optim.Adam(parameters, lr=lr, fused=fused)
    if isinstance(factory, Optimizer):
        raise TypeError(
            "optimizer must be a callable such as torch.optim.SGD: fit calls it as optimizer(parameters, lr=lr)"
        )
    if isinstance(factory, pyro.optim.PyroOptim):
        raise TypeError("optimizer is a Pyro optimizer: pass the torch one, such as torch.optim.Adam")
    if not callable(factory):
        raise TypeError(f"optimizer must be callable as optimizer(parameters, lr=lr), got {factory!r}")
    made = factory(parameters, lr=lr)
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer(parameters, lr=lr) must give a torch optimizer, got {describe(made)}")
    return made


def _scheduler(schedule: Any, optimizer: Optimizer, steps: int) -> LRScheduler:
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if not callable(schedule):
        raise ValueError(f"schedule must be 'cosine' or a callable from the optimizer to a scheduler, got {schedule!r}")
    made = schedule(optimizer)
    if not isinstance(made, LRScheduler):
        raise TypeError(f"schedule(optimizer) must give a torch LRScheduler, got {describe(made)}")
    return made


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
