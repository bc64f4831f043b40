"""What optimal pairs of data and noise cost, in time and in bias: pyro_gen's blocks beside torchcfm's plan.

    python benchmarks/ot_coupling.py --prepare   # makes torchcfm's environment where it is missing
    python benchmarks/ot_coupling.py             # prints the tables; about a minute
    python benchmarks/ot_coupling.py --write     # and puts them into docs/benchmarks.md
    python benchmarks/ot_coupling.py --smoke     # one round: does everything run?

*Time*: 256 rows of eight Gaussians and of standard normal noise, CPU time of pairing them, workers in turn, one thread.
torchcfm solves the plan of the whole batch and draws pairs from it with replacement, so that some rows come twice and
others not at all; ours is a permutation within blocks of 64. *Bias*: the mean squared distance of pairs in batches of
1024 rows by blocks, the last of which is the plan of the whole batch: distances fall as blocks grow.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
import workers
from tables import markdown, publish, spread, stamp

from pyro_gen.objectives.couplings import optimal_pairs, transport_cost

HERE = Path(__file__).parent / "diffusion"
AIM = 4.0  # torchcfm's time over ours
ROWS, BLOCK = 256, 64
BLOCKS = (1, 16, 64, 256, 1024)
Ask = Callable[..., dict[str, Any]]


def eight_gaussians(rows: int, rng: np.random.Generator) -> np.ndarray:
    """On a circle of radius 1, sd .1; standardised, as `fit` does: variance 1/2 + .01 a feature."""
    angle = rng.integers(8, size=rows) * math.pi / 4
    x = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * rng.normal(size=(rows, 2))
    return np.asarray(x / math.sqrt(0.51))


def timing(asked: dict[str, Ask], path: str, rounds: int, repeats: int) -> str:
    """Interleaved CPU times of 256 rows, by library and block."""
    plan = [("torchcfm", ROWS), ("ours", BLOCK), ("ours", ROWS)]
    found: dict[tuple[str, int], list[float]] = {case: [] for case in plan}
    facts = {}
    for library, block in plan:
        facts[library, block] = asked[library]("prepare", test=str(block), rows=ROWS, block=block, data=path)
    for turn in range(rounds):
        for library, block in plan[:: 1 if turn % 2 == 0 else -1]:
            answer = asked[library]("time", name="pairs", test=str(block), repeats=repeats)
            found[library, block].append(answer["cpu"])
    theirs = found["torchcfm", ROWS]
    lines = []
    for (library, block), seconds in found.items():
        ratios = [a / b for a, b in zip(theirs, seconds, strict=True)]
        judged = "—" if (library, block) != ("ours", BLOCK) else "reached" if median(ratios) >= AIM else "missed"
        name = "torchcfm, plan of the batch" if library == "torchcfm" else f"pyro_gen, blocks of {block}"
        fact = facts[library, block]
        ms = spread([1e3 * s for s in seconds])
        lines.append([name, ms, spread(ratios, 1), judged, f"{fact['cost']:.3f}", f"{100 * fact['used']:.0f} %"])
    header = [
        "pairs of 256 rows",
        "CPU ms: median (range)",
        "torchcfm / this",
        f"aim {AIM:g}",
        "mean cost",
        "rows used",
    ]
    return markdown(header, lines)


def bias(rows: int, batches: int, blocks: Sequence[int], seed: int = 0) -> str:
    """The mean cost of pairs by block, over batches, and how far it is above that of the whole batch."""
    rng = np.random.default_rng(seed)
    costs: dict[int, list[float]] = {block: [] for block in blocks}
    for _ in range(batches):
        x, e = (torch.from_numpy(part) for part in (eight_gaussians(rows, rng), rng.normal(size=(rows, 2))))
        for block in blocks:
            costs[block].append(float(transport_cost(x, e[optimal_pairs(x, e, block)])))
    whole = fmean(costs[blocks[-1]])
    lines = []
    for block, values in costs.items():
        error = stdev(values) / math.sqrt(batches) if batches > 1 else math.nan
        name = "independent pairs" if block == 1 else f"blocks of {block}"
        lines.append([name, f"{fmean(values):.3f} ± {error:.3f}", f"{fmean(values) / whole - 1:+.1%}"])
    return markdown([f"{batches} batches of {rows} rows", "mean cost", f"above blocks of {blocks[-1]}"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--prepare", action="store_true", help="make the missing environment, and do nothing else")
    parser.add_argument("--environments", type=Path, default=workers.ENVIRONMENTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="one short round")
    options = parser.parse_args()
    if options.prepare:
        workers.prepare(options.environments, ("torchcfm",), HERE)
        return
    if options.write and options.smoke:
        parser.error("--write takes a whole run: leave out --smoke")
    rounds, repeats = (1, 2) if options.smoke else (options.rounds, 30)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rng = np.random.default_rng(1)
        np.save(folder / "pairs.npy", np.stack([eight_gaussians(ROWS, rng), rng.normal(size=(ROWS, 2))]))
        asked: dict[str, Ask] = {
            name: stack.enter_context(workers.Worker(name, HERE / "torchcfm_worker.py", options.environments))
            for name in ("ours", "torchcfm")
        }
        versions = {name: ask("versions")["library"] for name, ask in asked.items()}
        times = timing(asked, str(folder / "pairs.npy"), rounds, repeats)
    costs = bias(256, 2, (1, 64, 256)) if options.smoke else bias(1024, 16, BLOCKS)
    text = [
        f"**Time**\n\n{times}",
        f"**Bias of blocks**\n\n{costs}",
        f"*{stamp()}; torchcfm {versions['torchcfm']}; {rounds} interleaved rounds.*",
    ]
    publish("ot_coupling", "\n\n".join(text), options.write)


if __name__ == "__main__":
    main()
