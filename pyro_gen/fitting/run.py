"""One run of the training loop: what it holds between steps, and how it goes on from a checkpoint.

Every step's loss and gradient norm are looked at before the optimizer moves anything, so that a run that diverges stops
at its last good state.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_gen.base import SIGNS, Divergence, ObjectiveModule
from pyro_gen.compiled import CannotCompile, CompiledStep, eager_step, why_not
from pyro_gen.fitting.arguments import make_optimizer, make_scheduler
from pyro_gen.fitting.averaging import Average
from pyro_gen.fitting.batches import Batches
from pyro_gen.fitting.checkpoints import Checkpoint, checksum
from pyro_gen.fitting.interrupts import interrupts_held
from pyro_gen.fitting.progress import Progress
from pyro_gen.fitting.results import FitResult, History
from pyro_gen.scopes import evaluation_mode, preserved_state

__all__ = ["COMPILE_FROM", "Run"]

logger = logging.getLogger("pyro_gen")

COMPILE_FROM = 5000
"""Steps from which ``compile="auto"`` compiles: about where a few seconds of compiling are won back on small models.
A count and not a clock, so that the same call gives the same weights on every machine."""

SNAPSHOT_EVERY = 10  # steps between copies of the weights, one of which a diverging run goes back to
VALIDATION_ROWS = 2048
VALUELESS = ("gradient only", "game")  # kinds of loss whose value ranks no weights

Callback = Callable[[int, dict[str, float]], Any]


class Run:
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

    def start(self, optimizer: Any, lr: float, schedule: Any, average: Any) -> None:
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
        begin = self.first if self.batches.loader is not None else self.batches.data
        module.check(*self.first)
        module.initialise(*begin)
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
        self.optimizers = [make_optimizer(f, p, lr) for f, p in zip(factories, players, strict=True)]
        self.schedulers = [make_scheduler(schedule, o, self.steps) for o in self.optimizers] if schedule else []
        self.periods = module.periods
        if average is not None:  # in a game of the first player, the model's: the critic is to be that of now
            averaged = players[0] if module.objective.loss_is == "game" else self.tensors
            self.average = Average(averaged, average, self.steps // 2)
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
                for player, period in zip(self.optimizers, self.periods, strict=True):
                    if self.step % period == 0:
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
        """Validation loss per datum, under the noise of one seed; keeps the best weights if the loss ranks them."""
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
            ranks = module.objective.loss_is not in VALUELESS
            if ranks and math.isfinite(loss) and (self.best is None or loss < self.best[0]):
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

    @torch.no_grad()
    def conclude(self) -> None:
        """Let the program set what it finds from the training rows with the weights that are the result."""
        with evaluation_mode(self.module), pyro.validation_enabled(False):
            self.module.conclude(*(self.first if self.batches.loader is not None else self.batches.data))

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


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
