"""How near flows come to known densities in a minute: KL(p ‖ q) of pyro_gen, zuko, nflows and normflows.

    python benchmarks/flow_speed.py --prepare   # makes the peers' environments where they are missing
    python benchmarks/flow_kl.py                # searches, fits, prints; four hours, can be resumed
    python benchmarks/flow_kl.py --targets funnel --libraries ours --again   # repeats a part
    python benchmarks/flow_kl.py --write        # puts the table into docs/benchmarks.md
    python benchmarks/flow_kl.py --smoke        # a minute: one target, a second a fit

Each library gets the same 50 000 training rows, 10 000 validation rows, seeds, batches of 512, training loop
(`flows/training.py`: Adam, clipping at 5, half a cosine over the budget, best weights on validation) and 60 s of CPU a
fit on one thread, building and evaluations on validation included. Nobody compiles: on this machine compilers take most
of the 60 s (`flow_speed.py` counts them). Every flow has 3 spline layers (8 bins, box at 5 standard deviations of the
training rows) and the hidden size that brings it nearest to the parameters of an autoregressive flow whose networks
have two hidden layers of 128. Form (autoregressive, coupling), mixing between layers (reversed order, trained LU
matrix), activation (ReLU, SiLU) and depth of the networks (2 or 3 hidden layers, at equal parameters) are chosen for
each library and target by the validation rows: fits of 10 s on seed 0 at depth 2, which settle the activation, then of
30 s of each form and mixing at both depths (coupling layers and LU matrices are ahead early, and overtaken). The
learning rate is .003, which an earlier search of .001 and .003 chose for every library. Test rows, 100 000, are looked
at once for each final fit.

Every fit is a line of `fits.jsonl` in the folder of `--results`; what is there is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from flows.peers import ENVIRONMENTS, LIBRARIES, ROOT, Worker
from flows.summaries import Rows, mean, paired_over_rows, paired_over_seeds, summarise
from flows.targets import TARGETS, write_rows
from tables import markdown, publish, stamp

SIZES = {"train": 50_000, "validation": 10_000, "test": 100_000}
FORMS, MIXINGS, ACTIVATIONS = ("autoregressive", "coupling"), ("flip", "lu"), ("relu", "silu")
DEPTHS = (2, 3)
RATE, BATCH = 3e-3, 512
LONGER = 3  # of the search: how many times more each form and mixing get
NAMES = {"ours": "pyro_gen"}
Record = dict[str, Any]


class Results:
    """The lines of `fits.jsonl`, by (stage, target, library, configuration or seed); the last of a key counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "fits.jsonl"
        self.records: dict[tuple[Any, ...], Record] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                record = json.loads(line)
                self.records[self.key(record)] = record

    @staticmethod
    def key(record: Record) -> tuple[Any, ...]:
        return tuple(record["key"])

    def add(self, record: Record) -> Record:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records[self.key(record)] = record
        return record

    def forget(self, targets: list[str], libraries: list[str]) -> None:
        """Leave the fits of these libraries on these targets out, so that they are run again."""
        self.records = {k: r for k, r in self.records.items() if not (k[1] in targets and k[2] in libraries)}
        lines = "".join(json.dumps(record) + "\n" for record in self.records.values())
        self.path.write_text(lines)

    def log_q(self, target: str, library: str, configuration: Record, seed: int) -> Path:
        return self.folder / target / f"log_q-{'-'.join(map(str, [library, *configuration.values(), seed]))}.npy"


def rows_of(target: str, results: Results, sizes: dict[str, int]) -> Path:
    folder = results.folder / target
    if not (folder / "log_p.npy").exists():
        write_rows(target, folder, sizes)
    return folder


def configurations() -> list[Record]:
    """Those of the first round, all of the first depth."""
    names = ("form", "mixing", "activation", "depth")
    values = itertools.product(FORMS, MIXINGS, ACTIVATIONS, DEPTHS[:1])
    return [dict(zip(names, value, strict=True)) for value in values]


def fit(
    worker: Worker, configuration: Record, target: str, folder: Path, parameters: int, **options: Any
) -> tuple[Record, Record]:
    """Specification with the hidden size of this number of parameters, and the worker's report."""
    layout = {**configuration, "features": TARGETS[target].dim}
    size = worker("size", parameters=parameters, **layout)
    specification = layout | {"hidden": size["hidden"]}
    report = worker("fit", specification=specification, folder=str(folder), lr=RATE, batch=BATCH, **options)
    return specification | {"parameters": size["parameters"]}, report


def search(target: str, workers: dict[str, Worker], results: Results, seconds: float, sizes: dict[str, int]) -> None:
    """Every configuration of a library for ``seconds``, then each form and mixing, at each depth, `LONGER` times that.

    Libraries take turns.
    """

    def run(library: str, worker: Worker, configuration: Record, seconds: float) -> None:
        key = ["search", target, library, *configuration.values(), seconds]
        if tuple(key) in results.records:
            return
        layout, report = fit(worker, configuration, target, folder, parameters, seconds=seconds, seed=0)
        results.add({"key": key, "configuration": configuration, "layout": layout, **report})
        print(f"search {target} {library} {configuration} {seconds} s: {report['validation']:.4f}", flush=True)

    folder, parameters = rows_of(target, results, sizes), wanted(target)
    for configuration in configurations():
        for library, worker in workers.items():
            run(library, worker, configuration, seconds)
    for place in range(len(FORMS) * len(MIXINGS) * len(DEPTHS)):
        for library, worker in workers.items():
            run(library, worker, finalists(target, library, results, seconds)[place], LONGER * seconds)


def finalists(target: str, library: str, results: Results, seconds: float) -> list[Record]:
    """Each form and mixing with the activation that was best after ``seconds``, at each depth."""
    best = ranked(target, library, results, seconds)
    pairs = itertools.product(FORMS, MIXINGS)
    leaders = [next((c for c in best if (c["form"], c["mixing"]) == pair), best[0]) for pair in pairs]
    return [leader | {"depth": depth} for leader in leaders for depth in DEPTHS]


def wanted(target: str, layers: int = 3, hidden: int = 128, outputs: int = 23) -> int:
    """Parameters of an autoregressive flow of 8 bins, 23 numbers a feature, with two hidden layers of 128 a layer."""
    dim = TARGETS[target].dim
    return layers * ((dim + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * outputs * dim)


def chosen(target: str, library: str, results: Results, seconds: float) -> Record:
    """The best finalist on the validation rows."""
    those = finalists(target, library, results, seconds)
    return next(c for c in ranked(target, library, results, LONGER * seconds) if c in those)


def ranked(target: str, library: str, results: Results, seconds: float) -> list[Record]:
    """Configurations that were fitted for so long, best validation first."""
    found = [
        record
        for key, record in results.records.items()
        if key[:3] == ("search", target, library) and key[-1] == seconds and not math.isnan(record["validation"])
    ]
    return [r["configuration"] for r in sorted(found, key=lambda r: r["validation"], reverse=True)]


def final(
    target: str,
    workers: dict[str, Worker],
    results: Results,
    seconds: float,
    searched: float,
    seeds: int,
    sizes: dict[str, int],
) -> None:
    """The fits that are reported: seed by seed, libraries in turn, so that a busy minute meets all of them."""
    folder, parameters = rows_of(target, results, sizes), wanted(target)
    log_p = np.load(folder / "log_p.npy")
    for seed in range(1, seeds + 1):
        for library, worker in workers.items():
            configuration = chosen(target, library, results, searched)
            key = ["final", target, library, *configuration.values(), seed, seconds]
            if tuple(key) in results.records:
                continue
            path = results.log_q(target, library, configuration, seed)
            layout, report = fit(
                worker, configuration, target, folder, parameters, seconds=seconds, seed=seed, output=str(path)
            )
            judged = summarise(log_p, np.load(path))
            numbers = {
                "kl": judged.kl.value,
                "kl_error": judged.kl.standard_error,
                "median": judged.median,
                "quantile": judged.quantile,
            }
            versions = worker("versions")
            results.add(
                {
                    "key": key,
                    "configuration": configuration,
                    "layout": layout,
                    "versions": versions,
                    **report,
                    **numbers,
                }
            )
            print(f"final {target} {library} seed {seed}: KL {judged.kl}, {report['steps']} steps", flush=True)


def table(target: str, libraries: list[str], results: Results, seconds: float, searched: float, seeds: int) -> str:
    """A table of one target: rows are libraries, those that have all seeds."""
    runs: dict[str, list[Record]] = {}
    rows_q: dict[str, Rows] = {}
    for library in libraries:
        if not ranked(target, library, results, LONGER * searched):
            continue
        configuration = chosen(target, library, results, searched)
        keys = [("final", target, library, *configuration.values(), seed, seconds) for seed in range(1, seeds + 1)]
        if all(key in results.records for key in keys):
            runs[library] = [results.records[key] for key in keys]
            paths = [results.log_q(target, library, configuration, seed) for seed in range(1, seeds + 1)]
            rows_q[library] = np.stack([np.load(path) for path in paths])
    kls = {library: np.array([run["kl"] for run in records]) for library, records in runs.items()}
    lines = []
    for library, records in runs.items():
        over_seeds = mean(kls[library])
        if library == "ours" or "ours" not in runs:
            difference = paired = "—"
        else:
            by_seed = paired_over_seeds(kls["ours"], kls[library])
            difference = f"{by_seed}{verdict(by_seed.value, by_seed.standard_error)}"
            paired = str(paired_over_rows(rows_q["ours"], rows_q[library]))
        first = records[0]
        steps = [record["steps"] for record in records]
        lines.append(
            [
                NAMES.get(library, library),
                str(over_seeds),
                f"{np.mean([record['kl_error'] for record in records]):.4f}",
                f"{np.mean([record['median'] for record in records]):.3f}",
                f"{np.mean([record['quantile'] for record in records]):.2f}",
                difference,
                paired,
                ", ".join(map(str, first["configuration"].values())),
                str(first["layout"]["parameters"]),
                str(round(float(np.mean(steps)))),
            ]
        )
    header = [
        "library",
        "KL: mean of seeds ± s.e.",
        "s.e. over rows",
        "median",
        "99.9 %",
        "ours − this, over seeds",
        "ours − this, over rows",
        "chosen",
        "parameters",
        "steps",
    ]
    return f"**{TARGETS[target].label}**\n\n{markdown(header, lines)}"


def verdict(difference: float, error: float) -> str:
    """How ours stands: ahead, or behind by more than two standard errors."""
    if difference <= 0:
        return ", ahead"
    return ", within 2 s.e." if difference <= 2 * error else ", behind"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--write", action="store_true", help="put the table of all that is there into docs/benchmarks.md"
    )
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="folder of the peers' environments")
    parser.add_argument("--results", type=Path, default=ROOT / ".benchmark-results" / "flow_kl")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of a fit")
    parser.add_argument("--search-seconds", type=float, default=10.0, help="CPU seconds of a first fit of the search")
    parser.add_argument("--again", action="store_true", help="run these targets and libraries again")
    parser.add_argument("--table", action="store_true", help="run nothing: print what is there")
    parser.add_argument("--smoke", action="store_true", help="one target, a second a fit, in a folder of its own")
    options = parser.parse_args()
    if options.smoke:
        if options.write:
            parser.error("--write takes a whole run: leave out --smoke")
        options.targets, options.seeds, options.seconds, options.search_seconds = ["moons"], 2, 1.0, 0.3
        options.results, options.again = options.results.parent / "flow_kl_smoke", True
    return options


def main() -> None:
    options = arguments()
    results = Results(options.results)
    sizes = {"train": 4000, "validation": 500, "test": 2000} if options.smoke else SIZES
    if options.again:
        results.forget(options.targets, options.libraries)
    if not options.table:
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(name, options.environments)) for name in options.libraries}
            for target in options.targets:
                search(target, workers, results, options.search_seconds, sizes)
                final(target, workers, results, options.seconds, options.search_seconds, options.seeds, sizes)
    text = [
        table(target, list(LIBRARIES), results, options.seconds, options.search_seconds, options.seeds)
        for target in options.targets
    ]
    used = {k[2]: r["versions"] for k, r in results.records.items() if k[0] == "final" and k[2] in LIBRARIES}
    known = ", ".join(f"{NAMES.get(name, name)} {used[name]['library']}" for name in LIBRARIES if name in used)
    note = (
        f"*{stamp()}; {known}; {options.seeds} seeds, {options.seconds:g} s of CPU a fit, {sizes['train']} training "
        f"rows, {sizes['test']} test rows, nats.*"
    )
    publish("flow_kl", "\n\n".join([*text, note]), options.write)


if __name__ == "__main__":
    main()
