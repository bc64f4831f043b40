"""pyro_gen: `pg.EBM` with the energy as it is given, on a flat base, and the steps as `pg.fit` runs them.

The noise of the sliced loss is Rademacher's, as in torchebm; HMC's trajectories all have the same length there, and so
they have here (``jitter=0``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
from torch import Tensor, nn

import pyro_gen as pg
from energies.contract import SIGMA, Case, Moves, optimizer_of
from pyro_gen.compiled import CompiledStep


def program_of(net: nn.Module, features: int) -> pg.EBM:
    return pg.EBM(features, energy=net, base=None)


def bound(case: Case, net: nn.Module, x: Tensor, options: dict[str, Any]) -> Any:
    """The objective of a case, ready for rows like x."""
    moves = Moves(steps=10)
    langevin = pg.Langevin(chains=len(x), step_size=math.sqrt(2 * moves.step_size))
    objectives: dict[str, Callable[..., Any]] = {
        "exact": pg.ScoreMatching,
        "sliced": pg.SlicedScoreMatching,
        "denoising": lambda: pg.DenoisingScoreMatching(SIGMA),
        "cd": lambda **more: pg.ContrastiveDivergence(langevin, steps=moves.steps, **more),
    }
    settings = {"variance_reduction": False} if case == "sliced" else {}  # ½(v·s)², which is the loss of torchebm
    module = objectives[case](**(settings | options))(program_of(net, x.shape[1]))
    module.prepare(x)
    return module


def loss(case: Case, net: nn.Module, x: Tensor, options: dict[str, Any]) -> Callable[[], Tensor]:
    module = bound(case, net, x, options)

    def evaluate() -> Tensor:
        with pyro.validation_enabled(False):  # as `pg.fit` from its second step on
            value: Tensor = module(x) / len(x)
        return value

    return evaluate


def compiled(case: Case, net: nn.Module, x: Tensor) -> Callable[[], object]:
    """What `pg.fit(compile=True)` runs each step: its compiled loss and gradient, then the optimizer."""
    graph = CompiledStep(bound(case, net, x, {}))
    optimizer = optimizer_of(net)

    def run() -> None:
        graph((x,), None, len(x))
        optimizer.step()

    return run


def chains(case: Case, net: nn.Module, start: Tensor, moves: Moves) -> Callable[[], Tensor]:
    program = program_of(net, start.shape[1])
    sampler: Any
    if case == "langevin":
        sampler = pg.Langevin(chains=len(start), step_size=math.sqrt(2 * moves.step_size))
    else:
        sampler = pg.HMC(chains=len(start), step_size=moves.step_size, leapfrog=moves.leapfrog, jitter=0.0)

    def run() -> Tensor:  # the last states, as of a run whose earlier draws are not kept
        last: Tensor = sampler.run(program, draws=1, warmup=moves.steps - 1, start=start, progress=False).x[:, -1]
        return last

    return run
