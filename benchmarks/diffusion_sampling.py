"""How fast diffusion models are sampled: pyro_gen beside diffusers and azula, each in a process of its own.

    python benchmarks/diffusion_sampling.py --prepare   # makes the peers' environments where they are missing
    python benchmarks/diffusion_sampling.py             # prints the tables; about 5 minutes
    python benchmarks/diffusion_sampling.py --write     # and puts them into docs/benchmarks.md
    python benchmarks/diffusion_sampling.py --smoke     # one round of few steps: does everything run? half a minute

512 draws of 2 features by one network for all, an MLP 3-64-64-2 with SiLU over (y, t), float32, one thread. *Network
alone* are as many evaluations as the method makes, on rows that are there already; *overhead* is what pyro_gen takes
beyond that. Workers take turns, case by case and round by round, in turn forwards and backwards; ratios are of times in
the same round. Times are CPU times of a whole call, set-up and noise included, over its steps.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from diffusion.contract import FEATURES, visited
from diffusion.peers import ENVIRONMENTS, LIBRARIES, Worker, prepare
from tables import markdown, publish, spread, stamp

ROWS = 512
EACH = 0.3  # CPU seconds that one timing lasts, about
OVERHEAD = 0.35  # of the network's own time, at most
PEERS = ("diffusers", "azula")


@dataclass(frozen=True)
class Case:
    method: str
    label: str
    steps: int
    aim: float  # the peers' time over ours

    @property
    def test(self) -> str:
        return f"{self.method}, {self.steps}"


CASES = (
    Case("ddpm", "DDPM", 1000, 2.0),
    Case("ddpm", "DDPM", 50, 2.0),
    Case("ddim", "DDIM", 50, 1.5),
    Case("dpm++2m", "DPM-Solver++(2M)", 50, 2.0),
    Case("dpm++2m", "DPM-Solver++(2M)", 20, 2.0),
)


@dataclass
class Times:
    """CPU seconds of a case in each round, by library, and of the network alone (in our worker)."""

    case: Case
    seconds: dict[str, list[float]]
    network: list[float] = field(default_factory=list)

    def ratios(self, peer: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[peer], self.seconds["ours"], strict=True)]

    @property
    def overheads(self) -> list[float]:
        return [a / b - 1 for a, b in zip(self.seconds["ours"], self.network, strict=True)]


def measure(
    workers: dict[str, Any], rounds: int, each: float, cases: Sequence[Case] = CASES, training: int = 400
) -> list[Times]:
    """All cases take turns within a round, so that a busy minute meets all of them."""
    found = [Times(case, {name: [] for name in workers}) for case in cases]
    repeats: list[int] = []
    for worker in workers.values():
        worker("build", name="net", training=training)
    for times in found:
        case, once = times.case, 0.0
        for worker in workers.values():
            worker("prepare", name="net", test=case.test, steps=case.steps, rows=ROWS)
            once = max(once, worker("time", name="net", test=case.test, repeats=1)["cpu"])
        workers["ours"]("prepare", name="net", test=f"network, {case.steps}", steps=case.steps, rows=ROWS)
        repeats.append(max(1, min(100, round(each / once))) if once else 1)
    for turn in range(rounds):
        for times, count in zip(found, repeats, strict=True):
            plan = [(name, times.case.test, times.seconds[name]) for name in workers]
            plan.insert(1, ("ours", f"network, {times.case.steps}", times.network))
            for name, test, seconds in plan if turn % 2 == 0 else plan[::-1]:
                seconds.append(workers[name]("time", name="net", test=test, repeats=count)["cpu"])
    return found


def verdict(reached: bool, aim: str) -> str:
    return f"{aim}: {'reached' if reached else 'missed'}"


def timing_table(found: Sequence[Times]) -> str:
    header = ["method", "steps", "pyro_gen, µs a step: median (range)", "network alone", *PEERS]
    header += [f"{peer} / pyro_gen" for peer in PEERS] + ["aim"]
    rows = []
    for times in found:
        case = times.case
        each = [[1e6 * s / case.steps for s in seconds] for seconds in (times.seconds["ours"], times.network)]
        each += [[1e6 * s / case.steps for s in times.seconds[peer]] for peer in PEERS]
        ratios = [times.ratios(peer) for peer in PEERS]
        says = verdict(min(median(r) for r in ratios) >= case.aim, f"{case.aim:g}")
        shown = [spread(values, 0) for values in each] + [spread(r) for r in ratios]
        rows.append([case.label, str(case.steps), *shown, says])
    return markdown(header, rows)


def overhead_table(found: Sequence[Times]) -> str:
    rows = [
        [
            t.case.label,
            str(t.case.steps),
            spread(t.overheads),
            verdict(median(t.overheads) <= OVERHEAD, f"{OVERHEAD:g}"),
        ]
        for t in found
    ]
    return markdown(["method", "steps", "overhead / network alone: median (range)", "aim"], rows)


def agreement(workers: dict[str, Any], folder: Path, steps: int = 20) -> list[list[str]]:
    """Do both libraries whose levels can be chosen compute the same? Largest difference over the largest entry."""
    start, rows = folder / "start.npy", []
    np.save(start, np.random.default_rng(0).standard_normal((ROWS, FEATURES)))
    for method, label in (("ddim", "DDIM"), ("dpm++2m", "DPM-Solver++(2M)")):
        ends = {}
        for name in ("ours", "diffusers"):
            output = folder / f"{name}.npy"
            workers[name]("ends", case=method, times=visited(steps), start=str(start), output=str(output))
            ends[name] = np.load(output)
        off = float(np.abs(ends["ours"] - ends["diffusers"]).max() / np.abs(ends["ours"]).max())
        rows.append([label, str(steps), f"{off:.0e}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--prepare", action="store_true", help="make the missing environments, and do nothing else")
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
        found = measure(workers, rounds, each)
        equal = markdown(["method", "steps", "largest difference / largest entry"], agreement(workers, folder))
    known = ", ".join(f"{'pyro_gen' if n == 'ours' else n} {v['library']}" for n, v in versions.items())
    text = [
        f"**Time of a step**\n\n{timing_table(found)}",
        f"**What a step takes beyond the network**\n\n{overhead_table(found)}",
        f"**pyro_gen and diffusers from the same noise at the same levels, float64**\n\n{equal}",
        f"*{stamp()}; {known}; {rounds} interleaved rounds.*",
    ]
    publish("diffusion_sampling", "\n\n".join(text), options.write)


if __name__ == "__main__":
    main()
