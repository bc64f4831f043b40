"""The weights of far modes, by objective: 0.2 N(−4, 1) + 0.8 N(4, 1), from 5000 rows.

    python benchmarks/far_modes.py            # prints the table; about 10 minutes on one core
    python benchmarks/far_modes.py --write    # and puts it into docs/benchmarks.md
    python benchmarks/far_modes.py --smoke    # a minute: one seed, few steps

One network, one optimizer and one number of steps for all objectives; they differ in the loss alone. The weight is the
mass of the fitted density left of 0, its Z by quadrature. Between the modes there are no data, and the score of either
mode does not know of the other: matching scores leaves their weights to chance. Noise lays data in between; telling
data from noise compares the two masses themselves.

With σ as context every level has its own density, and that of the least noise knows the weights no better than plain
score matching does. What does is the way through the levels: along dx/dσ = −σ s(x, σ), which carries the density of one
level into that of the next, the point that ends at 0 under the least noise started at some x* under the most, and the
mass left of x* there is the weight.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from tables import markdown, publish, stamp
from torch import Tensor

from pyro_gen import fit
from pyro_gen.base import Objective, ObjectiveModule, Unnormalized
from pyro_gen.objectives.denoising import DenoisingScoreMatching
from pyro_gen.objectives.noise_contrastive import NoiseContrastive
from pyro_gen.programs.ebm import EBM

WEIGHT, ROWS, STEPS, BATCH = 0.2, 5000, 3000, 500
GRID = torch.linspace(-20.0, 20.0, 8001)
LOW, HIGH, LEVELS = 0.3, 2.0, 5
WIDEST = 8.0  # of a ladder that ends where both modes are one


class PlainModule(ObjectiveModule):
    """Exact score matching of one feature: ½ s² + s′."""

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        def score(y: Tensor) -> Tensor:
            found: Tensor = torch.func.grad(lambda at: self.log_density_rows(at).sum())(y)
            return found

        s, slope = torch.func.jvp(score, (batch[0],), (torch.ones_like(batch[0]),))
        return (0.5 * s.square() + slope).sum(1)


class Plain(Objective[Unnormalized]):
    needs = (Unnormalized,)
    loss_is = "generalized"
    deterministic = True
    module_class = PlainModule


OBJECTIVES: dict[str, Callable[[], Objective[Any]]] = {
    "score matching": Plain,
    f"denoising, σ = {LOW}": lambda: DenoisingScoreMatching(LOW, antithetic=True),
    "denoising, σ = 1.5": lambda: DenoisingScoreMatching(1.5, antithetic=True),
    f"denoising, {LEVELS} levels {LOW} … {HIGH}, one energy": lambda: DenoisingScoreMatching(
        sigmas=(LOW, HIGH), levels=LEVELS, mixture=[1.0] * LEVELS, antithetic=True
    ),
    f"denoising, 10 levels {LOW} … {WIDEST}, σ as context": lambda: DenoisingScoreMatching(
        sigmas=(LOW, WIDEST), levels=10, condition=True, antithetic=True
    ),
    "noise-contrastive, fitted normal": lambda: NoiseContrastive("normal", ratio=2),
}


def data(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    left = torch.rand(ROWS, 1, generator=generator) < WEIGHT
    return torch.randn(ROWS, 1, generator=generator) + torch.where(left, -4.0, 4.0)


@torch.no_grad()
def left_of(point: float, program: EBM, level: float | None = None) -> float:
    """The mass of the fitted density left of a point, by quadrature."""
    context = () if level is None else (torch.full((len(GRID), 1), math.log(level)),)
    log_f = program.log_density(GRID.unsqueeze(1), *context).double()
    density = (log_f - log_f.max()).exp()
    return float(density[point > GRID].sum() / density.sum())


def carried(program: EBM, steps: int = 400) -> float:
    """The weight by the way through the levels: x* from Heun's steps in log σ, then the mass left of it."""
    grid = torch.linspace(math.log(LOW), math.log(WIDEST), steps + 1)

    def slope(x: Tensor, level: Tensor) -> Tensor:  # dx / d log σ = −σ² s
        score = torch.func.grad(lambda at: program.log_density(at, level.reshape(1, 1)).sum())(x)
        found: Tensor = -(2 * level).exp() * score.detach()
        return found

    x = torch.zeros(1, 1)
    for a, b in pairwise(grid):
        first = slope(x, a)
        x = x + (b - a) * (first + slope(x + (b - a) * first, b)) / 2
    return left_of(float(x), program, WIDEST)


def weight(objective: Objective[Any], seed: int, steps: int = STEPS) -> float:
    """The weight of the left mode that an objective finds."""
    x = data(seed)
    conditional = isinstance(objective, DenoisingScoreMatching) and bool(objective.condition)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        program = EBM(1, hidden=(64, 64), context_shape=1 if conditional else None)
    batch: Any = (x, torch.zeros(ROWS, 1)) if conditional else x
    fit(
        objective(program), batch, steps=steps, batch_size=BATCH, lr=5e-3, schedule="cosine", average="tail",
        seed=seed, compile=False, progress=False,
    )  # fmt: skip
    return carried(program) if conditional else left_of(0.0, program)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--smoke", action="store_true", help="one seed, few steps")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = (1, 300) if options.smoke else (options.seeds, STEPS)
    rows = []
    for name, make in OBJECTIVES.items():
        start = time.process_time()
        found = [weight(make(), seed, steps) for seed in range(seeds)]
        spent = (time.process_time() - start) / seeds
        errors = [abs(value - WEIGHT) for value in found]
        rows.append([
            name, f"{statistics.mean(found):.3f} ({min(found):.3f} … {max(found):.3f})",
            f"{statistics.mean(errors):.3f}", f"{spent:.0f}",
        ])  # fmt: skip
        print(f"  {' | '.join(rows[-1])}", flush=True)
    header = ["objective", "weight of the left mode, 0.2 in truth", "mean error", "s of CPU a fit"]
    text = f"{markdown(header, rows)}\n\nMean (range) over {seeds} seeds of data and network. {stamp()}."
    publish("far modes", text, options.write)


if __name__ == "__main__":
    main()
