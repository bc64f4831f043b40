"""The one training loop: the frequentist view, a point estimate of the weights.

What is minimised is loss / N, N the rows of the data set, so that learning rate and clipping mean the same for every
N. The first step runs eagerly with validation on: what is wrong with a program or its data is said there, by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from pyro_gen.base import ObjectiveModule, Program
from pyro_gen.checks import describe
from pyro_gen.fitting.arguments import check_numbers, home_of, moved, name_of, named_device
from pyro_gen.fitting.batches import Batches, as_batch, split
from pyro_gen.fitting.checkpoints import Checkpoint
from pyro_gen.fitting.progress import Progress
from pyro_gen.fitting.results import FitResult
from pyro_gen.fitting.run import VALUELESS, Callback, Run
from pyro_gen.scopes import forked_generators

__all__ = ["fit"]

HELD_OUT = 0.1  # of the rows, where a loss asks for validation by itself

Factory = Callable[..., Optimizer]


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
    average: float | Literal["tail", False] | None = None,
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
            over the second half of the run; the averaged weights are the result, and are what is validated. None is
            what the loss asks for (a decay of .999 for denoising scores and flow matching, nothing for others); False
            is nothing for any.
        validation: rows held out: a fraction of the data, or data like ``data``. The weights of the evaluation with the
            least validation loss are the result. None is a tenth for score matching and its kin, which run away on the
            rows they are trained on (ten rows or more), and nothing for other losses; False is nothing for any.
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
    check_numbers(steps, epochs, lr, clip_norm, patience, validate_every, checkpoint_every, seed)
    by_default = validation is None and module.validates and not isinstance(data, DataLoader)
    validation = None if validation is False else HELD_OUT if by_default else validation
    average = None if average is False else module.average if average is None else average
    if patience is not None and module.objective.loss_is in VALUELESS:
        raise ValueError(
            f"patience= needs a loss that ranks weights, and the value of {type(module.objective).__name__} does not: "
            "leave it out, and judge the result by an estimate of log p or by samples"
        )
    if validation is None and (patience is not None or validate_every is not None):
        name = "patience" if patience is not None else "validate_every"
        raise ValueError(f"{name}= needs validation=: a fraction such as 0.1, or rows held out")
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto', got {describe(compile)}")
    if progress not in (True, False, None):
        raise ValueError(f"progress must be True, False or None, got {describe(progress)}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable as callback(step, values), got {describe(callback)}")
    where = home_of(module, data) if device is None else named_device(device)
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
        source = tuple(part.to(where) for part in as_batch(moved(data, where), program, check=module.check))
        if by_default and len(source[0]) * HELD_OUT < 1:  # too few to hold one out
            validation = None
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
            held = tuple(p.to(where) for p in as_batch(moved(validation, where), program, "validation", module.check))
        except (TypeError, ValueError) as error:
            where_from = "" if str(error).startswith("validation") else "in validation=: "
            raise type(error)(f"{where_from}{error}") from error

    batches = Batches(source, batch_size, seed, where)
    if steps is None:
        assert epochs is not None
        steps = epochs * batches.per_epoch
    run = Run(module, batches, held, kept, steps, seed, clip_norm, compile)
    run.config.update(
        lr=lr, schedule=name_of(schedule), optimizer=name_of(optimizer) or "Adam", clip_norm=clip_norm, average=average,
        validation_rows=None if held is None else len(held[0]), validate_every=validate_every, patience=patience,
        device=str(where),
    )  # fmt: skip
    training = {m: m.training for m in module.modules()}
    module.train()
    try:
        with forked_generators(seed), Progress(steps, progress, run.sign) as bar:
            run.start(optimizer, lr, schedule, average)
            saved = None if checkpoint is None else Checkpoint(checkpoint, run.fingerprint())
            try:
                run.go(bar, callback, validate_every or max(1, steps // 40), patience, saved, checkpoint_every)
            finally:
                run.finish()
            run.conclude()
    finally:
        for sub, flag in training.items():
            sub.training = flag
    return run.result()
