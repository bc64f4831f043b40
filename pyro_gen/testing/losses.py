"""The promises of a loss on a program: gradients, scale, rows, devices, and the ways to train by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, get_args

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_gen import scopes
from pyro_gen.base import LossIs, Objective, ObjectiveModule, Program
from pyro_gen.compiled import CannotCompile, CompiledStep, eager_step
from pyro_gen.fitting import fit
from pyro_gen.testing.basis import (
    ContractError,
    alone,
    answers,
    at_seed,
    draws,
    expect,
    fresh,
    relative_gap,
    stir,
    through_json,
)

__all__ = [
    "OneDevice",
    "check_batches",
    "check_declared",
    "check_gradients",
    "check_one_device",
    "check_pointwise",
    "check_total",
    "check_traced",
    "check_trainers",
]


def check_declared(module: ObjectiveModule, *batch: Tensor) -> None:
    """The loss is a differentiable scalar of the batch's dtype; what its objective says of itself holds."""
    with alone():
        module, objective = fresh(module), module.objective
        expect(objective.loss_is in get_args(LossIs), f"loss_is={objective.loss_is!r} is none of {get_args(LossIs)}")
        settings = through_json(objective.settings())
        again = through_json(type(objective).from_settings(settings).settings())
        expect(again == settings, f"an objective of settings {settings} has settings {again}")
        before = torch.get_rng_state()
        module.prepare(*batch)
        expect(torch.equal(before, torch.get_rng_state()), "prepare() moves the global generator")
        loss = module(*batch)
        expect(isinstance(loss, Tensor) and loss.shape == (), f"the loss is no scalar tensor: {loss!r}")
        expect(loss.dtype == batch[0].dtype, f"the loss of {batch[0].dtype} data is {loss.dtype}")
        expect(loss.requires_grad, "the loss reaches no parameter")
        expect(torch.isfinite(loss), f"the loss is {float(loss.detach())}")
        losses = module.losses(*batch)
        expect(len(losses) == len(module.players), f"{len(losses)} losses for {len(module.players)} players")
        with scopes.evaluation_mode(module):
            one, two, three = (at_seed(seed, partial(module, *batch)) for seed in (0, 0, 1))
        expect(torch.equal(one, two), "two calls at one seed differ: the loss draws from elsewhere")
        expect(not objective.deterministic or torch.equal(one, three), "declared deterministic, and two calls differ")


def _named(module: ObjectiveModule) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(module.named_parameters())
    named |= {f"pyro.param {i}": t for i, t in enumerate(module.__dict__["store_parameters"])}
    return named


def check_gradients(module: ObjectiveModule, *batch: Tensor, unreached: Iterable[str] = ()) -> None:
    """The gradient of each loss reaches every parameter of its player, no other, and nothing that is frozen.

    Args:
        module: an objective bound to a program; batch: ``x`` and what else it takes.
        unreached: names of parameters that this loss cannot see, such as the constant of an energy in score matching.
    """
    unreached = set(unreached)
    with alone():
        copied = fresh(module)
        copied.prepare(*batch)
        stir(copied)  # off a start at exactly zero, which lets no gradient through
        losses, players, named = copied.losses(*batch), copied.players, _named(copied)
        for number, (loss, player) in enumerate(zip(losses, players, strict=True)):
            own = {id(t) for t in (named.values() if len(players) == 1 else player.parameters())}
            which = "" if len(players) == 1 else f" of player {number}"
            live = {n: t for n, t in named.items() if t.requires_grad}
            found = torch.autograd.grad(loss, list(live.values()), allow_unused=True, retain_graph=True)
            for name, gradient in zip(live, found, strict=True):
                reached = gradient is not None and bool(gradient.any())
                finite = gradient is None or bool(torch.isfinite(gradient).all())
                expect(finite, f"the gradient{which} is not finite in {name!r}")
                if id(live[name]) in own and name not in unreached:
                    expect(reached, f"the gradient{which} does not reach {name!r}")
                else:
                    expect(not reached, f"the gradient{which} reaches {name!r}, which is not its own to move")
    names = [n for n, p in fresh(module).named_parameters() if p.requires_grad]
    for start in (0, 1):
        with alone():
            copied = fresh(module)
            frozen = {n: p for n, p in copied.named_parameters() if n in names[start::2] or not p.requires_grad}
            for parameter in frozen.values():
                parameter.requires_grad_(False)
            copied.prepare(*batch)
            loss = copied(*batch)
            if loss.requires_grad:
                loss.backward()
            trained = {id(t) for t in copied.trainable()}
            for name, parameter in copied.named_parameters():
                if name in frozen:
                    moved = parameter.requires_grad or parameter.grad is not None or id(parameter) in trained
                    expect(
                        not moved,
                        f"the frozen parameter {name!r} is trainable after a call. Pyro thaws a parameter that a "
                        "PyroModule holds directly: hold it in a submodule, or make it a buffer",
                    )


def _refuses(module: ObjectiveModule, *batch: Tensor, total: int) -> bool:
    """Whether a loss says that it needs all rows at once, as some do where latents belong to all rows."""
    try:
        module(*batch, total=total)
    except ValueError:
        return True
    return False


def check_batches(module: ObjectiveModule, *batch: Tensor) -> None:
    """The mean of the loss over mini-batches, each standing for all rows, is the loss of the full batch.

    With latents that belong to all rows a loss may also refuse mini-batches by a ``ValueError``.
    """
    with alone():
        module = fresh(module)
        size = batch[0].shape[0] // 2
        expect(size, "mini-batches need at least two rows to be checked")
        batch = tuple(t[: 2 * size] for t in batch)
        halves = [tuple(t[i : i + size] for t in batch) for i in (0, size)]
        if module.prepare(*batch).global_sites and _refuses(module, *halves[0], total=2 * size):
            return
        with scopes.evaluation_mode(module):
            full, error = draws(lambda: module(*batch, total=2 * size))
            part, other = draws(lambda: (module(*halves[0], total=2 * size) + module(*halves[1], total=2 * size)) / 2)
    tolerance = 4 * float(torch.hypot(error, other)) + 1e-5 * abs(float(full))
    expect(
        abs(float(full - part)) <= tolerance,
        f"mini-batches give {float(part):.6g} in the mean, the full batch {float(full):.6g} (tolerance "
        f"{tolerance:.2g}): is a sum over rows scaled twice, or not at all?",
    )


def check_total(module: ObjectiveModule, *batch: Tensor) -> None:
    """``total`` multiplies what belongs to rows and nothing else.

    A program without a plate over rows refuses it by a ``ValueError``; with latents that belong to all rows a loss may.
    """
    rows = batch[0].shape[0]
    with alone():
        module = fresh(module)
        shape = module.prepare(*batch)
        if shape.data_plate is None:
            said = _refuses(module, *batch, total=2 * rows)
            expect(said, "total= is taken without a word by a program that has no plate over its rows")
            return
        if shape.global_sites and _refuses(module, *batch, total=2 * rows):
            return
        with scopes.evaluation_mode(module):
            plain = at_seed(0, partial(module, *batch)).detach()
            once, twice, thrice = (at_seed(0, partial(module, *batch, total=k * rows)).detach() for k in (1, 2, 3))
        size = thrice.abs() + once.abs()
        same = shape.data_size != rows or relative_gap(plain, once, size) <= 1e-6
        expect(same, "total=rows is not what no total gives")
        gap = relative_gap(thrice - once, 2 * (twice - once), size)
        expect(gap <= 1e-5, f"the loss is not linear in total: off by {gap:.2g} of its size")
        gap = relative_gap(twice, 2 * once, size)
        if shape.global_sites:
            expect(gap > 1e-6, "twice the rows are twice the loss: what belongs to all rows at once is scaled too")
        else:
            expect(gap <= 1e-5, f"every site belongs to rows, yet twice the rows are no double loss: off by {gap:.2g}")


def check_pointwise(module: ObjectiveModule, *batch: Tensor) -> None:
    """``pointwise`` has one value a row, and they add up to the loss (in the mean where it is random)."""
    with alone():
        module = fresh(module)
        module.prepare(*batch)
        rows = batch[0].shape[0]
        with scopes.evaluation_mode(module):
            found = module.pointwise(*batch)
            expect(tuple(found.shape) == (rows,), f"pointwise has shape {tuple(found.shape)}, ({rows},) was promised")
            summed, error = draws(lambda: module.pointwise(*batch).sum())
            loss, other = draws(lambda: module(*batch))
    tolerance = 4 * float(torch.hypot(error, other)) + 1e-5 * abs(float(loss))
    expect(
        abs(float(summed - loss)) <= tolerance,
        f"pointwise adds up to {float(summed):.6g} in the mean, the loss is {float(loss):.6g} (tolerance "
        f"{tolerance:.2g})",
    )


class OneDevice(TorchDispatchMode):
    """Refuses operations that mix a CPU tensor of at least one dimension with a tensor of another device.

    With program and data on ``meta`` it finds what breaks on a GPU without one: tensors made on the CPU, tables that
    are no buffers, CPU masks. (Plain ``meta`` lets a CPU matrix in a product pass.)
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        if any(t.device.type != "cpu" for t in tensors):
            for tensor in tensors:
                if tensor.device.type == "cpu" and tensor.dim() and tensor.numel():
                    raise ContractError(
                        f"a CPU tensor of shape {tuple(tensor.shape)} meets another device in {func}: make it from the "
                        "batch (x.new_zeros), or register it as a buffer"
                    )
        return func(*args, **(kwargs or {}))


def check_one_device(module: ObjectiveModule, *batch: Tensor) -> None:
    """Loss, gradients and answers stay on the device of weights and data; run on ``meta``, so it needs no GPU.

    A ``pyro.param`` statement outside of modules lives where its initial value does: there is nothing to move.
    """
    with alone():
        module = fresh(module)
        module.prepare(*batch)
        moved = module.to("meta")
        pyro.clear_param_store()  # of the parameters as they were on the CPU
        there = tuple(t.to("meta") for t in batch)
        with pyro.validation_enabled(False), OneDevice():
            loss: Any = sum(moved.losses(*there, total=None))
            expect(loss.device.type == "meta", f"the loss is on {loss.device}, weights and data are on meta")
            loss.backward()
            if moved.program is not None:
                for name, found in answers(moved.program, *there).items():
                    expect(found.device.type == "meta", f"{name} is on {found.device}, weights and data are on meta")


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights and buffers of a module and of the parameter store."""
    found = dict(module.state_dict()) | {f"store: {n}": t for n, t in pyro.get_param_store().named_parameters()}
    return {n: t.detach().clone() for n, t in found.items()}


def _loop(
    module: ObjectiveModule, batch: tuple[Tensor, ...], steps: int, lr: float, step: Callable[..., Tensor] | None
) -> list[float]:
    """A plain torch loop of gradient descent on the loss per row; ``step`` evaluates it (default: eagerly)."""
    rows = batch[0].shape[0]
    total = None if module.prepare(*batch).data_plate is None else rows
    optimizer = torch.optim.SGD(module.trainable(), lr=lr)
    losses = []
    for _ in range(steps):
        found = eager_step(module, batch, total, rows) if step is None else step(batch, total, rows)
        optimizer.step()
        losses.append(float(found[:-1].sum()))
    return losses


def _agree(
    what: str,
    one: tuple[list[float], dict[str, Tensor]],
    two: tuple[list[float], dict[str, Tensor]],
    start: dict[str, Tensor],
) -> None:
    """Two runs: equal losses to 1e-5, and weights that moved alike to 1 % of the way they went."""
    size = max(map(abs, two[0]))
    expect(all(map(math.isfinite, two[0])), f"the loss is not finite after a few steps {two[0]}: try a smaller lr=")
    for step, (a, b) in enumerate(zip(one[0], two[0], strict=True)):
        expect(abs(a - b) <= 1e-5 * size, f"{what}: loss {a:.8g} and {b:.8g} at step {step}")
    for name, there in two[1].items():
        if not there.is_floating_point():
            expect(torch.equal(one[1][name], there), f"{what}: {name!r} is {one[1][name]} and {there}")
            continue
        way = there - start[name] if name in start else there
        if there.numel():
            same = one[1][name] == there  # an infinite entry of a buffer may stay what it is
            apart = float((one[1][name] - there).abs().masked_fill(same, 0.0).max())
            gone, largest = (float(t.abs().masked_fill(same, 0.0).max()) for t in (way, there))
            most = 1e-2 * gone + 1e-6 * largest
            expect(apart <= most, f"{what}: {name!r} differs by {apart:.2g}, of a way of {gone:.2g}")


def check_traced(
    module: ObjectiveModule, *batch: Tensor, steps: int = 3, lr: float = 1e-2, inductor: bool = False
) -> None:
    """The step traced to one graph follows the eager one: same seed, same losses, weights and buffers.

    Args:
        module: an objective bound to a program; batch: ``x`` and what else it takes.
        steps, lr: of gradient descent on the loss per row.
        inductor: compile the graph too, which takes seconds.
    """
    runs = []
    for traced in (True, False):
        with alone():
            copied = fresh(module)
            copied.prepare(*batch)
            start = _weights(copied)
            try:
                step = CompiledStep(copied, inductor=inductor) if traced else None
                losses = _loop(copied, batch, steps, lr, step)
            except CannotCompile as error:
                raise ContractError(f"the loss does not {'compile' if inductor else 'trace'}: {error}") from error
            expect(step is None or step.graphs == 1, "a batch of one shape takes more than one graph")
            runs.append((losses, _weights(copied)))
    _agree("compiled and eager steps" if inductor else "traced and eager steps", runs[0], runs[1], start)


def check_trainers(
    objective: Objective[Any],
    program: Program,
    x: Tensor,
    context: Tensor | None = None,
    *,
    steps: int = 3,
    lr: float = 1e-2,
) -> None:
    """``SVI``, a plain torch loop and ``fit`` take the same steps from the same seed."""
    rows = x.shape[0]
    with alone():
        copied = fresh(program)
        batch = copied.check(x, context)
        copied.initialise(*batch)
        module = objective(copied)
        module.prepare(*batch)
        start = _weights(copied)
        losses = _loop(module, batch, steps, lr, None)
        copied.conclude(*batch)  # as `fit` does
        loop = losses, _weights(copied)
        moved = any(not torch.equal(start[n], t) for n, t in loop[1].items() if n in start)
        expect(moved, "a plain torch loop moves no weight")
    with alone():
        copied = fresh(program)
        copied.initialise(*batch)
        optimizer = PyroOptim(torch.optim.SGD, {"lr": lr / rows})
        svi = SVI(copied.model, copied.guide, optimizer, loss=type(objective).from_settings(objective.settings()))
        losses = [svi.step(*batch) / rows for _ in range(steps)]
        copied.conclude(*batch)
        _agree("SVI and a plain torch loop", (losses, _weights(copied)), loop, start)
    with alone():
        copied = fresh(program)
        module = objective(copied)
        options: Any = {"optimizer": torch.optim.SGD, "lr": lr, "seed": 0, "compile": False, "progress": False}
        options["average"] = False
        result = fit(module, batch, steps=steps, batch_size=rows, validation=False, **options)
        columns = [result.history[n] for n in result.history.columns if n.split(".")[0] == "loss"]
        losses = [sum(values) for values in zip(*columns, strict=True)]
        _agree("fit and a plain torch loop", (losses, _weights(copied)), loop, start)
