"""How fast flows train and sample: pyro_gen beside zuko, nflows and normflows, each in a process of its own.

    python benchmarks/flow_speed.py --prepare   # makes the peers' environments where they are missing
    python benchmarks/flow_speed.py             # prints the tables; about 10 minutes
    python benchmarks/flow_speed.py --write     # and puts them into docs/benchmarks.md
    python benchmarks/flow_speed.py --smoke     # one round of few repeats: does everything run? about a minute

D = 16, batches of 512, 3 layers of rational-quadratic splines with 8 bins from networks with two hidden layers of 128,
float32, one thread, torch's fused Adam for everybody. *train* is -log p, backward, step; *sample* is 512 draws without
gradients; *vi* is 512 draws with their log-density, backward, step (reverse KL). Workers take turns, test by test and
round by round; a ratio is zuko's time, eager, over a variant's in the same round. Times are CPU times.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from flows.peers import ENVIRONMENTS, LIBRARIES, Worker, prepare
from tables import markdown, publish, spread, stamp

EACH = 0.5  # CPU seconds that one timing lasts, about
RELU = {"activation": "relu"}
SAMPLING = {"direction": "sampling"}


@dataclass(frozen=True)
class Variant:
    """A row: a library's model, put to one test. `test` falls back on that of the table."""

    library: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    test: str = ""


@dataclass(frozen=True)
class Table:
    form: str
    test: str
    title: str
    aims: dict[str, float]
    variants: tuple[Variant, ...]

    @property
    def baseline(self) -> Variant:
        return next(v for v in self.variants if v.library == "zuko" and not v.test)


PEERS = (Variant("zuko", "zuko"), Variant("nflows", "nflows"), Variant("normflows", "normflows"))
FIT = "train, pg.fit's compiled step"
TABLES = (
    Table(
        "autoregressive",
        "train",
        "Autoregressive, training step",
        {"pyro_gen": 1.2, "pyro_gen, `pg.fit(compile=True)`": 2.2},
        (
            Variant("ours", "pyro_gen"),
            Variant("ours", "pyro_gen, ReLU", RELU),
            Variant("ours", "pyro_gen, `pg.fit(compile=True)`", {}, FIT),
            Variant("ours", "pyro_gen, `torch.compile`", {}, "train, torch.compile"),
            *PEERS,
            Variant("zuko", "zuko, `torch.compile`", {}, "train, torch.compile"),
        ),
    ),
    Table(
        "autoregressive", "sample", "Autoregressive, 512 draws", {"pyro_gen": 8}, (Variant("ours", "pyro_gen"), *PEERS)
    ),
    Table(
        "autoregressive",
        "vi",
        "Autoregressive, step of variational inference",
        {},
        (
            Variant("ours", "pyro_gen"),
            Variant("ours", 'pyro_gen, `direction="sampling"`', SAMPLING),
            *PEERS,
        ),
    ),
    Table(
        "coupling",
        "train",
        "Coupling, training step",
        {"pyro_gen": 1.2},
        (
            Variant("ours", "pyro_gen"),
            Variant("ours", "pyro_gen, `pg.fit(compile=True)`", {}, FIT),
            Variant("ours", "pyro_gen, `torch.compile`", {}, "train, torch.compile"),
            *PEERS,
            Variant("zuko", "zuko, `torch.compile`", {}, "train, torch.compile"),
        ),
    ),
    Table("coupling", "sample", "Coupling, 512 draws", {}, (Variant("ours", "pyro_gen"), *PEERS)),
    Table(
        "coupling",
        "vi",
        "Coupling, step of variational inference",
        {"pyro_gen": 1.8},
        (
            Variant("ours", "pyro_gen"),
            Variant("ours", 'pyro_gen, `direction="sampling"`', SAMPLING),
            Variant("ours", "pyro_gen, `torch.compile`", {}, "vi, torch.compile"),
            *PEERS,
            Variant("zuko", "zuko, `torch.compile`", {}, "vi, torch.compile"),
        ),
    ),
)


def measure(tables: tuple[Table, ...], workers: dict[str, Worker], rounds: int, each: float) -> list[str]:
    """The tables as text. All tables take turns within a round, so that a busy minute meets all of them."""
    parameters: dict[tuple[int, Variant], int] = {}
    first: dict[tuple[int, Variant], float] = {}
    repeats: dict[tuple[int, Variant], int] = {}
    times: dict[tuple[int, Variant], list[float]] = {}
    names: dict[tuple[int, Variant], tuple[str, str]] = {}
    for i, table in enumerate(tables):
        for variant in table.variants:
            key, worker = (i, variant), workers[variant.library]
            # a model for each test: two optimizers on one model would share its gradients
            name, test = f"{table.title}, {variant.label}", variant.test or table.test
            names[key] = name, test
            parameters[key] = worker("build", name=name, form=table.form, **variant.settings)["parameters"]
            first[key] = worker("prepare", name=name, test=test)["cpu"]
            once = worker("time", name=name, test=test, repeats=1)["cpu"]
            repeats[key] = max(1, min(100, round(each / once)))
            times[key] = []
    for _ in range(rounds):
        for key, (name, test) in names.items():
            timing = workers[key[1].library]("time", name=name, test=test, repeats=repeats[key])
            times[key].append(timing["cpu"] * 1e3)
    text = []
    for i, table in enumerate(tables):
        rows = []
        base = times[i, table.baseline]
        for variant in table.variants:
            key = i, variant
            ratios = [b / t for b, t in zip(base, times[key], strict=True)]
            aim = table.aims.get(variant.label)
            verdict = "" if aim is None else f"{aim:g}: {'reached' if median(ratios) >= aim else 'missed'}"
            compiled = f"{first[key]:.0f}" if "compile" in names[key][1] else "—"
            rows.append([variant.label, str(parameters[key]), spread(times[key], 1), spread(ratios), compiled, verdict])
        header = ["library", "parameters", "CPU ms: median (range)", "zuko eager / this", "compiling, CPU s", "aim"]
        text.append(f"**{table.title}**\n\n{markdown(header, rows)}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--prepare", action="store_true", help="make the missing environments, and do nothing else")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="folder of the peers' environments")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tables", type=int, nargs="*", help="only these, counted from 0")
    parser.add_argument(
        "--eager", action="store_true", help="without the compiled variants, which take minutes to start"
    )
    parser.add_argument("--smoke", action="store_true", help="one short round, eager")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.environments)
        return
    if options.write and (options.smoke or options.eager or options.tables):
        parser.error("--write takes a whole run: leave out --smoke, --eager and --tables")
    tables = TABLES if options.tables is None else tuple(TABLES[i] for i in options.tables)
    if options.smoke or options.eager:
        tables = tuple(
            Table(t.form, t.test, t.title, t.aims, tuple(v for v in t.variants if not v.test)) for t in tables
        )
    rounds, each = (1, 0.0) if options.smoke else (options.rounds, EACH)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, options.environments)) for name in LIBRARIES}
        versions = {name: worker("versions") for name, worker in workers.items()}
        text = measure(tables, workers, rounds, each)
    if len({v["torch"] for v in versions.values()}) > 1:
        raise SystemExit(f"the environments differ in torch: {versions}")
    known = ", ".join(f"{'pyro_gen' if n == 'ours' else n} {v['library']}" for n, v in versions.items())
    note = f"*{stamp()}; {known}; {rounds} interleaved rounds.*"
    publish("flow_speed", "\n\n".join([*text, note]), options.write)


if __name__ == "__main__":
    main()
