"""What every check stands on: a place of its own to work in, answers to compare, and how to compare them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_gen import handlers, scopes
from pyro_gen.base import Bounded, Exact, ObjectiveModule, Program, Samples, Unnormalized

__all__ = [
    "ContractError",
    "alone",
    "answers",
    "at_seed",
    "bound",
    "differs",
    "draws",
    "expect",
    "fresh",
    "has_bound",
    "is_discrete",
    "relative_gap",
    "stir",
    "structure",
    "through_json",
]

M = TypeVar("M", bound=nn.Module)
DRAWS = 100  # repeats behind a mean that is compared with another


class ContractError(AssertionError):
    """A promise that a program or a loss does not keep; the message names it."""


def expect(kept: Any, broken: str) -> None:
    """Raise a `ContractError` that says what is broken, unless it is kept."""
    if not kept:
        raise ContractError(broken)


@contextmanager
def alone(seed: int = 0) -> Iterator[None]:
    """An empty parameter store and seeded generators inside; both as they were afterwards."""
    with pyro.get_param_store().scope(), scopes.forked_generators(seed):
        yield


def fresh(module: M) -> M:
    """A copy to work on. A loss that has run before is to look at its program anew, in the store it then finds.

    Pyro's autoguides let go of the model they guide when they are copied, original and copy alike: both get it back.
    """
    guides = {n: m for n, m in module.named_modules() if isinstance(m, AutoGuide)}
    guided, masters = {n: m._model for n, m in guides.items()}, {n: m.master for n, m in guides.items()}
    copied, theirs = copy.deepcopy((module, guided))
    for name, guide in guides.items():
        guide._model, guide.master = guided[name], masters[name]
        own: Any = copied.get_submodule(name)
        own._model = theirs[name]
    if isinstance(copied, ObjectiveModule):
        copied.structure = None
        copied.__dict__["store_parameters"] = []
    return copied


@torch.no_grad()
def stir(module: nn.Module, seed: int = 1) -> None:
    """Move every floating entry of the state by about 5 %, without a change of sign."""
    buffers = {n for n, _ in module.named_buffers()}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.dtype.is_floating_point:
            continue
        if name in buffers:  # a covariance stays one, a probability stays below one
            tensor.mul_(0.95)
        else:
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            tensor.add_(0.05 * noise.clamp(-4, 4) * (tensor.abs() + 0.01))


def structure(program: Program, *batch: Tensor) -> handlers.Structure:
    """What one run of a program shows, without a trace of the run."""
    with torch.no_grad(), scopes.preserved_state(program), scopes.evaluation_mode(program), poutine.block():
        return handlers.structure(program.model, program.guide, *batch)[0]


def is_discrete(program: Program, *batch: Tensor) -> bool:
    """Whether the data stand on a discrete support."""
    trace = poutine.trace(program.model).get_trace(*batch)
    sites = [s for s in handlers.sample_sites(trace).values() if handlers.site_kind(s) == "observed"]
    return any(s["fn"].support.is_discrete for s in sites)


def has_bound(shape: handlers.Structure) -> bool:
    """Whether rows have a bound of their own: no latent of all rows, none that only an objective sums out."""
    return bool(shape.data_plate) and not shape.global_sites and set(shape.model_latents) <= set(shape.guide_latents)


def answers(program: Program, *batch: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """All that a program of its kind can say about a batch in evaluation mode, each answer at one seed."""
    asked: dict[str, Callable[[], Tensor]] = {}
    if isinstance(program, Exact):
        asked["log_prob"] = lambda: program.log_prob(*batch)
    if isinstance(program, Unnormalized):
        asked["log_density"] = lambda: program.log_density(*batch)
    if isinstance(program, Bounded):
        shape = structure(program, *batch)
        if has_bound(shape):
            asked["lower_bound"] = lambda: bound(program, batch)
        elif shape.global_sites:
            asked["log weight"] = lambda: _whole_weight(program, *batch)
    if isinstance(program, Samples):
        asked["sample"] = lambda: program.sample(batch[0].shape[0], *batch[1:])
    with torch.no_grad(), scopes.evaluation_mode(program):
        return {name: at_seed(seed, ask) for name, ask in asked.items()}


def _whole_weight(program: Program, *batch: Tensor) -> Tensor:
    """log w of one run: all that there is of a density where latents belong to all rows at once."""
    with poutine.block():
        guide, model = handlers.pair_traces(program.model, program.guide, *batch)
    return torch.as_tensor(model.log_prob_sum() - guide.log_prob_sum())


def bound(program: Bounded, batch: tuple[Tensor, ...], particles: int = 1) -> Tensor:
    """The lower bound of each row of a batch ``(x,)`` or ``(x, context)``."""
    return program.lower_bound(batch[0], batch[1] if len(batch) > 1 else None, particles)


def at_seed(seed: int, ask: Callable[[], Tensor]) -> Tensor:
    """An answer at a seed, which leaves the generators as they were."""
    with scopes.forked_generators(seed):
        return ask()


def differs(one: dict[str, Tensor], two: dict[str, Tensor]) -> str | None:
    """The name of the first answer in which two sets of them differ, or None."""
    return next((n for n in one if not torch.allclose(one[n], two[n], rtol=1e-6, atol=0, equal_nan=True)), None)


def relative_gap(a: Tensor, b: Tensor, size: Tensor | None = None) -> float:
    """Largest difference, in units of the largest entry of ``size`` (default: of ``b``)."""
    if not b.numel():
        return 0.0
    scale = float((b if size is None else size).abs().max())
    return float((a - b).abs().max()) / max(scale, 1e-30)


@torch.no_grad()
def draws(draw: Callable[[], Tensor], repeats: int = DRAWS) -> tuple[Tensor, Tensor]:
    """Mean and standard error over repeats, in float64; error 0 where nothing is random."""
    values = [draw().double(), draw().double()]
    if torch.equal(*values):
        return values[0], torch.zeros_like(values[0])
    with pyro.validation_enabled(False):  # the two above were looked at
        values += [draw().double() for _ in range(repeats - 2)]
    stacked = torch.stack(values)
    return stacked.mean(0), stacked.std(0) / math.sqrt(repeats)


def through_json(value: Any) -> Any:
    """A value as it comes back from a file."""
    return json.loads(json.dumps(value))
