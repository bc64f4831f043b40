"""How fast energy-based models train and sample: pyro_gen beside torchebm, each in a process of its own.

    python benchmarks/energy_speed.py --prepare   # makes torchebm's environment where it is missing
    python benchmarks/energy_speed.py             # prints the tables; about 8 minutes
    python benchmarks/energy_speed.py --write     # and puts them into docs/benchmarks.md
    python benchmarks/energy_speed.py --smoke     # one round of few repeats: does everything run? about a minute

One energy for both, the same torch module with the same weights: d-128-128-1 with softplus and no output bias, float32,
512 rows or chains, one thread, eager where nothing else is said. A *training step* is loss, backward and a step of
torch's fused Adam: exact score matching, sliced with one Rademacher direction, denoising at σ = .3, CD with 10 Langevin
steps (η = .005) from the data and no penalty. A *run of chains* returns where 512 chains end: 100 Langevin steps, or 20
HMC proposals of 10 leapfrog steps (ε = .1). Workers take turns, case by case and round by round; a ratio is torchebm's
time over ours in the same round. Times are CPU times. Rows with `pg.fit(compile=True)` are its compiled step beside
torchebm's eager one: ``torch.compile`` fails on its denoising and sliced losses.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from energies import comparisons
from energies.peers import ENVIRONMENTS, LIBRARIES, Worker, prepare
from tables import markdown, publish, spread, stamp

EACH = 0.4  # CPU seconds that one timing lasts, about
ROWS = 512
AIM = 1.0  # torchebm's time over ours, in every case
HMC = {"step_size": 0.1, "steps": 20, "leapfrog": 10}
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("exact", "exact score matching, step", {}),
    ("exact, compiled", "… `pg.fit(compile=True)`", {}),
    ("sliced", "sliced score matching, step", {}),
    ("sliced, compiled", "… `pg.fit(compile=True)`", {}),
    ("denoising", "denoising score matching, step", {}),
    ("denoising, compiled", "… `pg.fit(compile=True)`", {}),
    ("cd", "CD-10, step", {}),
    ("langevin", "Langevin, 100 steps", {}),
    ("hmc", "HMC, 20 × 10 leapfrog", HMC),
)
FEATURES = (2, 32)


@dataclass
class Times:
    """CPU seconds of one case in each round, by library; those of compiling, where it is compiled."""

    label: str
    features: int
    seconds: dict[str, list[float]]
    compiling: float | None = None

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.seconds["torchebm"], self.seconds["ours"], strict=True)]


def measure(
    workers: dict[str, Any],
    rounds: int,
    each: float,
    cases: Sequence[tuple[str, str, dict[str, Any]]] = CASES,
    features: Sequence[int] = FEATURES,
) -> list[Times]:
    """All cases take turns within a round, so that a busy minute meets all of them."""
    plan: dict[tuple[str, int], tuple[list[str], int, Times]] = {}
    for case, label, moves in cases:
        for d in features:
            name, eager = f"{case}, {d}", case.removesuffix(", compiled")
            times, libraries, once = Times(label, d, {n: [] for n in workers}), list(workers), 0.0
            if case != eager:  # ours alone, beside what torchebm takes for the same
                libraries, times.seconds["torchebm"] = ["ours"], plan[eager, d][2].seconds["torchebm"]
            for library in libraries:
                worker = workers[library]
                worker("build", name=name, kind="mlp", features=d)
                setting_up = worker("prepare", name=name, test=case, rows=ROWS, features=d, **moves)["cpu"]
                if case != eager:
                    times.compiling = setting_up
                once = max(once, worker("time", name=name, test=case, repeats=1)["cpu"])
            plan[case, d] = libraries, max(1, min(200, round(each / once))) if once else 1, times
    for turn in range(rounds):
        for (case, d), (libraries, repeats, times) in plan.items():
            for library in libraries if turn % 2 == 0 else libraries[::-1]:
                answer = workers[library]("time", name=f"{case}, {d}", test=case, repeats=repeats)
                times.seconds[library].append(answer["cpu"])
    return [times for *_, times in plan.values()]


def verdict(ratio: float, aim: float = AIM) -> str:
    """Who is faster, at the median."""
    return "reached" if ratio >= aim else "missed: torchebm is faster"


def timing_table(found: Sequence[Times]) -> str:
    header = [
        "case",
        "d",
        "pyro_gen, CPU ms: median (range)",
        "torchebm, CPU ms",
        "torchebm / pyro_gen",
        "compiling, CPU s",
        f"aim {AIM:g}",
    ]
    rows = []
    for times in found:
        ms = {n: [1e3 * s for s in seconds] for n, seconds in times.seconds.items()}
        shown = [spread(ms[n], 1) for n in ("ours", "torchebm")]
        compiling = "—" if times.compiling is None else f"{times.compiling:.0f}"
        says = verdict(median(times.ratios))
        rows.append([times.label, str(times.features), *shown, spread(times.ratios), compiling, says])
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--prepare", action="store_true", help="make the missing environment, and do nothing else")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="folder of the peers' environments")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="one short round")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.environments)
        return
    if options.write and options.smoke:
        parser.error("--write takes a whole run: leave out --smoke")
    rounds, each = (1, 0.0) if options.smoke else (options.rounds, EACH)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {name: stack.enter_context(Worker(name, options.environments)) for name in LIBRARIES}
        versions = {name: worker("versions") for name, worker in workers.items()}
        if len({v["torch"] for v in versions.values()}) > 1:
            raise SystemExit(f"the environments differ in torch: {versions}")
        times = timing_table(measure(workers, rounds, each))
        equal = markdown(
            ["case", "d", "what", "largest difference / largest entry"], comparisons.agreement(workers, folder)
        )
        header = ["library", "E x₁² = 1", "E x₂² = 4", "E x₁x₂ = 1.6", "worst, in standard errors"]
        moments = markdown(header, comparisons.gaussian(workers, folder))
        header = ["what", "truth", "torchebm", "pyro_gen"]
        wrong = markdown(header, comparisons.defects(workers, folder))
    known = ", ".join(f"{'pyro_gen' if n == 'ours' else n} {v['library']}" for n, v in versions.items())
    text = [
        f"**Time of a training step and of a run of chains**\n\n{times}",
        f"**Equal weights, rows and noise, float64**\n\n{equal}",
        f"**HMC on a normal with correlation .8, 20 000 chains**\n\n{moments}",
        f"**Where torchebm gives another number**\n\n{wrong}",
        f"*{stamp()}; {known}; {rounds} interleaved rounds.*",
    ]
    publish("energy_speed", "\n\n".join(text), options.write)


if __name__ == "__main__":
    main()
