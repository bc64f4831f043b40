"""Two-dimensional energies by objective: KL(data ‖ model), with log Z by quadrature on a grid.

    python benchmarks/energies_2d.py                     # fits and prints; forty minutes, can be resumed
    python benchmarks/energies_2d.py --only persistent   # objectives whose name contains a word
    python benchmarks/energies_2d.py --write             # puts the table into docs/benchmarks.md
    python benchmarks/energies_2d.py --smoke             # seconds: one target, one seed, a few steps

The data are 20 000 draws of a toy, moved and scaled to mean 0 and unit standard deviation over both coordinates (one
scale, which leaves KL as it is). Every objective trains the same network, an energy with two hidden layers of 128 that
tilts a normal base fitted to the data, by Adam with half a cosine, weights averaged over the second half, for as many
steps as fit into the budget of CPU time on one thread. A trial run measures how many those are; it is not counted.
One row tilts a flow that has been fitted before, which is its noise too; it has three times the budget, most of it for
the flow. Denoising over many levels trains p(x | σ) and is scored at the lowest σ.

KL(p ‖ q) = Σ_j h² p_j (log p_j − log f_j) + log Σ_j h² f_j over a grid that reaches 3 units beyond 100 000 draws, with
the exact log p, in float64: there is no sampling in it. A grid of half the spacing must agree: a fit for which the two
differ by more than .001 nat is marked.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tables import markdown, publish, stamp
from torch import Tensor

import pyro_gen as pg
from pyro_gen import datasets

ROWS, BATCH = 20_000, 512
SEEDS, BUDGET, TRIAL = 5, 20.0, 100
TILTED, LONGER = "NCE, a flow as noise and base", 3.0  # times the budget, 0.6 of it for the flow
TARGETS: dict[str, Callable[[], datasets.Toy]] = {
    "8 Gaussians": datasets.eight_gaussians,
    "moons": datasets.moons,
}
POINTS, REACH, AGREE = (250, 500), 3.0, 1e-3


def fitted_flow(x: Tensor, seconds: float, seed: int) -> pg.Flow:
    """A flow fitted to the data, as noise and base."""
    flow = pg.Flow(2, "spline_coupling", 3, (96, 96), standardise=False, activation="relu", bins=16, bound=3.0)
    fit_for(pg.MaximumLikelihood()(flow), x, seconds, seed, lr=3e-3)
    return flow


# name: (objective, made of data, seconds and seed; learning rate). Classes are looked up when they are used
OBJECTIVES: dict[str, tuple[Callable[[Tensor, float, int], Any], float]] = {
    "score matching": (lambda x, s, n: named("ScoreMatching")(), 2e-3),
    "sliced, 1 projection": (lambda x, s, n: named("SlicedScoreMatching")(1), 2e-3),
    "finite differences": (lambda x, s, n: named("FiniteDifferenceScoreMatching")(0.05), 2e-3),
    "denoising, σ = .1": (lambda x, s, n: named("DenoisingScoreMatching")(0.1), 2e-3),
    "denoising, 8 levels .03 … 2": (
        lambda x, s, n: named("DenoisingScoreMatching")(sigmas=(0.03, 2.0), levels=8, condition=True),
        2e-3,
    ),
    "NCE, normal noise": (lambda x, s, n: named("NoiseContrastive")("normal", ratio=4), 2e-3),
    TILTED: (lambda x, s, n: named("NoiseContrastive")(fitted_flow(x, 0.6 * s, n), ratio=1), 1e-3),
    "CD, short-run": (lambda x, s, n: named("ContrastiveDivergence")(pg.MALA(), 20, start="base"), 2e-3),
    "CD-5": (lambda x, s, n: named("ContrastiveDivergence")(pg.MALA(), 5), 2e-3),
    "CD, persistent": (
        lambda x, s, n: named("ContrastiveDivergence")(pg.MALA(), 5, persistent=True, chains=512, refresh=0.01),
        2e-3,
    ),
}


def named(name: str) -> Any:
    """An objective of the package, looked up when it is used."""
    return getattr(pg, name)


@cache
def place(target: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and scale of a toy, and the corners of the grid in standard units."""
    x = TARGETS[target]().sample(100_000, seed=0)
    loc, size = x.mean(0), (x - x.mean(0)).square().mean().sqrt()
    return loc, size, (x.amin(0) - loc) / size - REACH, (x.amax(0) - loc) / size + REACH


def standardised(target: str, n: int, seed: int) -> Tensor:
    loc, size, _, _ = place(target)
    return (TARGETS[target]().sample(n, seed=seed) - loc) / size


@cache
def truth(target: str, points: int) -> tuple[Tensor, Tensor, float]:
    """A grid in standard units, log p on it, and the log of the area of a cell."""
    loc, size, low, high = place(target)
    axes = [torch.linspace(float(a), float(b), points, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    x = torch.cartesian_prod(*axes)
    log_p = TARGETS[target]().log_prob(x * size.double() + loc.double()) + 2 * math.log(float(size))
    return x, log_p, sum(math.log(float(axis[1] - axis[0])) for axis in axes)


def fit_for(
    module: Any, x: Tensor, seconds: float, seed: int, lr: float, steps: int | None = None
) -> tuple[int, float]:
    """Train for so much CPU time: a trial gives the steps a second. Returns steps and seconds."""
    options: dict[str, Any] = {"lr": lr, "seed": seed, "batch_size": BATCH, "compile": False, "progress": False}
    if steps is None:
        kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        pg.fit(module, x, steps=10, validation=False, **options)  # what is made once
        start = time.process_time()
        pg.fit(module, x, steps=TRIAL, validation=False, **options)
        steps = max(1, int(seconds / (time.process_time() - start) * TRIAL))
        for name, tensor in module.state_dict().items():  # back to the start; what was made of the data stays
            if name in kept and kept[name].shape == tensor.shape:
                tensor.copy_(kept[name])
    start = time.process_time()
    pg.fit(module, x, steps=steps, schedule="cosine", average="tail", **options)
    return steps, time.process_time() - start


@torch.no_grad()
def divergence(ebm: pg.EBM, target: str, level: float | None, points: int) -> float:
    """KL(p ‖ q) in nats on a grid; of a conditional energy at one noise level."""
    x, log_p, cell = truth(target, points)
    parts = []
    for part in x.split(50_000):
        context = () if level is None else (part.new_full((len(part), 1), math.log(level)),)
        parts.append(ebm.log_density(part, *context))
    log_f = torch.cat(parts)
    p = (log_p + cell).exp()
    kept = p > 0
    gap = (p[kept] * (log_p - log_f)[kept]).sum() / p.sum()
    return float(gap + torch.logsumexp(log_f, 0) + cell)


def run(name: str, target: str, seed: int, seconds: float, steps: int | None = None) -> dict[str, Any]:
    x = standardised(target, ROWS, 100 + seed)
    make, lr = OBJECTIVES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        begun = time.process_time()
        allowed = seconds * (LONGER if name == TILTED else 1.0)
        objective = make(x, allowed, seed)
        spent = time.process_time() - begun  # a noise that had to be fitted
        levels = objective.levels if getattr(objective, "condition", None) else None
        base = objective.noise if name == TILTED else "normal"
        ebm = pg.EBM(2, hidden=(128, 128), base=base, context_shape=None if levels is None else 1)
        taken, used = fit_for(objective(ebm), x, allowed - spent, seed, lr, steps)
    ebm = ebm.double()
    kl, finer = (divergence(ebm, target, levels and min(levels), points) for points in POINTS)
    return {"key": [name, target, seed, seconds], "kl": finer, "apart": abs(kl - finer), "steps": taken,
            "seconds": used + spent}  # fmt: skip


def cell(records: list[dict[str, Any]]) -> str:
    if not records:
        return "–"
    values = [r["kl"] for r in records]
    mark = "" if all(r["apart"] <= AGREE for r in records) else " (grids differ)"
    return f"{statistics.median(values):.3f} ({min(values):.3f} … {max(values):.3f}){mark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--smoke", action="store_true", help="one target, one seed, a few steps")
    parser.add_argument("--only", default="", help="objectives whose name contains this")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="CPU time of a fit")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--results", type=Path, default=Path(".benchmark-results/energies_2d.jsonl"), help="one line a fit"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    targets = list(TARGETS)[: 1 if arguments.smoke else None]
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    if arguments.results.exists() and not arguments.smoke:
        lines = map(json.loads, arguments.results.read_text().splitlines())
        records = {tuple(r["key"]): r for r in lines}
    for seed in range(1 if arguments.smoke else arguments.seeds):
        for target in targets:
            for name in (n for n in OBJECTIVES if arguments.only in n):
                key = (name, target, seed, arguments.seconds)
                if key in records:
                    continue
                try:
                    smoke: dict[str, Any] = {"seconds": 1.0, "steps": 20} if arguments.smoke else {}
                    record = run(name, target, seed, **({"seconds": arguments.seconds} | smoke))
                except pg.Divergence as error:
                    print(f"{name}, {target}, seed {seed}: {error}", flush=True)
                    continue
                records[key] = record
                print({**record, "key": None}, name, target, seed, flush=True)
                if not arguments.smoke:
                    arguments.results.parent.mkdir(exist_ok=True)
                    with arguments.results.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    rows = []
    for name in OBJECTIVES:
        found = [[r for r in records.values() if r["key"][:2] == [name, t] and r["key"][3] in (arguments.seconds, 1.0)]
                 for t in TARGETS]  # fmt: skip
        steps = [r["steps"] for part in found for r in part]
        rows.append([name, *map(cell, found), f"{statistics.median(steps):.0f}" if steps else "–"])
    header = ["objective", *(f"{t}: KL, nats" for t in TARGETS), "steps"]
    publish("energies_2d", f"{markdown(header, rows)}\n\n{stamp()}", arguments.write)


if __name__ == "__main__":
    main()
