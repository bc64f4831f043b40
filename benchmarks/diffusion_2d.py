"""Densities in the plane by diffusion: E[log p − log q] and W2 after 12 s of CPU, beside torchcfm and our flow.

    python benchmarks/diffusion_2d.py --prepare        # makes torchcfm's environment where it is missing
    python benchmarks/diffusion_2d.py                  # fits and prints; an hour, can be resumed
    python benchmarks/diffusion_2d.py --only moons     # targets and methods whose names contain a word
    python benchmarks/diffusion_2d.py --write          # puts the table into docs/benchmarks.md
    python benchmarks/diffusion_2d.py --smoke          # a minute: one target, one seed, a second a fit

Every method has the same 100 000 rows of a toy and 12 s of CPU on one thread, from building the network to the last
weights; nobody compiles. The learning rate of ours is half a cosine of the share of the budget that is spent, so that
no number of steps has to be known beforehand. The diffusion has the recipe of its target in `RECIPES`, chosen by some
twenty single fits of seed 7, which is not among those reported, on 4000 validation rows. torchcfm has the settings of
its own script for two dimensions: independent pairs, σ = .1, three layers of 64 with SELU, Adam at 1e-3, batches of
256, on data of the size at which that script has eight Gaussians. The flow has the
coupling splines that `flow_kl.py` chose for these targets: ReLU, three hidden layers, trained LU matrices.

*Gap*: mean of log p − log q over 10 000 test rows, the same for all, with the exact log p. For the ODEs log q is that
of the data carried to noise by dopri5 with the exact trace, solved at two tolerances a factor of ten apart: the tighter
one's value counts, and the largest difference of a row is in the table. *W2*: of 1024 draws and 1024 true rows, by
exact assignment, beside what two true samples of that size give.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workers
from tables import markdown, publish, spread, stamp
from torch import Tensor

import pyro_gen as pg
from pyro_gen.transforms.odes import solve_adaptive

HERE = Path(__file__).parent / "diffusion"
ROWS, TEST, MATCHED, FLOORS = 100_000, 10_000, 1024, 20
SEEDS, BUDGET, RESERVE = 5, 12.0, 0.4  # seconds; held back for what fit does at the end
TOLERANCE = 1e-4  # of the looser solve
SIZE = math.sqrt(12.6)  # standard deviation of torchcfm's eight Gaussians: radius 5, variance .1
GAP, EACH, AIM = 0.045, 0.06, 0.03  # of the median, of each seed, and what is aimed at, on eight Gaussians
TARGETS: dict[str, Callable[[], Any]] = {
    "8 Gaussians": pg.datasets.eight_gaussians,
    "moons": pg.datasets.moons,
    "checkerboard": pg.datasets.checkerboard,
    "25 Gaussians": pg.datasets.grid_gaussians,
}
Record = dict[str, Any]
# log q of rows and the numerical error of the worst; and draws, of a number and a seed
Score = tuple[Callable[[Tensor], tuple[Tensor, float]], Callable[[int, int], Tensor]]
MODES: Record = {"schedule": "cosine", "prediction": "v", "weighting": "v", "time": "lognormal", "batch": 512}
RECIPES: dict[str, Record] = {
    "8 Gaussians": MODES,
    "moons": MODES,
    # edges and narrow modes: more of low noise
    "checkerboard": {"schedule": "exploding", "prediction": "edm", "weighting": "edm", "time": "uniform", "batch": 512},
    "25 Gaussians": {
        "schedule": "rectified",
        "prediction": "edm",
        "weighting": "edm",
        "time": "uniform",
        "batch": 1024,
    },
}
HIDDEN, RATE, AVERAGE = (64, 64, 64), 5e-3, 0.999


# ------------------------------------------------------------------------------------------------------------- fitting
def fit_for(module: Any, x: Tensor, begun: float, seconds: float, seed: int, lr: float, **options: Any) -> int:
    """Train until so many CPU seconds after `begun` are spent; the learning rate follows their share. Returns steps."""

    def share() -> float:
        return min(1.0, (time.process_time() - begun) / seconds)

    def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: (1 + math.cos(math.pi * share())) / 2)

    result = pg.fit(
        module, x, steps=1_000_000, lr=lr, schedule=cosine, validation=False, compile=False, progress=False, seed=seed,
        callback=lambda step, values: share() >= 1, **options,
    )  # fmt: skip
    return len(result.history["loss"])


def diffusion(target: str, x: Tensor, seconds: float, seed: int, recipe: Record) -> tuple[Record, Score]:
    begun = time.process_time()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        program = pg.Diffusion(2, None, recipe["schedule"], None, recipe["prediction"], hidden=HIDDEN)
    objective = pg.DenoisingScoreMatching(weighting=recipe["weighting"], time=recipe["time"])
    steps = fit_for(objective(program), x, begun, seconds - RESERVE, seed, RATE,
                    batch_size=recipe["batch"], average=AVERAGE)  # fmt: skip
    used = time.process_time() - begun
    method = pg.ProbabilityFlow(rtol=TOLERANCE, atol=TOLERANCE, trace="exact")

    def log_q(rows: Tensor) -> tuple[Tensor, float]:
        found = pg.log_evidence(program, rows, method=method)
        assert found.standard_error is not None
        return found.value, float(found.standard_error.max())

    return {"steps": steps, "seconds": used}, (log_q, lambda n, s: program.sample(n, method=method, seed=s))


def flow(target: str, x: Tensor, seconds: float, seed: int) -> tuple[Record, Score]:
    begun = time.process_time()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        program = pg.Flow(2, "spline_coupling", 3, (96, 96, 96), activation="relu", mixing="lu")
    steps = fit_for(pg.MaximumLikelihood()(program), x, begun, seconds - RESERVE, seed, 3e-3,
                    batch_size=512, average=0.998)  # fmt: skip
    used = time.process_time() - begun

    def draw(n: int, seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return program.sample(n)

    return {"steps": steps, "seconds": used}, (lambda rows: (pg.log_evidence(program, rows).value, 0.0), draw)


class Carried:
    """The ODE dx/dt = v(x, t) of torchcfm's MLP, noise at t = 0 and data at t = 1, in float64."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        sizes = [weights[f"net.{i}.weight"] for i in (0, 2, 4, 6)]
        layers = [part for w in sizes for part in (torch.nn.Linear(w.shape[1], w.shape[0]), torch.nn.SELU())]
        self.net = torch.nn.Sequential(*layers[:-1]).double()
        self.net.load_state_dict({k.removeprefix("net."): torch.from_numpy(v).double() for k, v in weights.items()})

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([x, t.to(x).expand(len(x), 1)], 1))
        return out

    def along(self, x: Tensor, start: float, end: float, tolerance: float) -> tuple[Tensor, Tensor]:
        """The end of the path, and log|det d end / dx|, by the exact trace."""

        def field(t: Tensor, state: Tensor) -> Tensor:
            with torch.enable_grad():
                at = state[:, :2].detach().requires_grad_()
                v = self.velocity(t, at)
                parts = [torch.autograd.grad(v[:, i].sum(), at, retain_graph=i == 0)[0][:, i] for i in range(2)]
            return torch.cat([v.detach(), (parts[0] + parts[1]).unsqueeze(1)], 1)

        def norm(error: Tensor) -> Tensor:
            """The largest of a row, of the trace the root mean square: SELU's has a jump, which rows meet in turn."""
            return torch.maximum(error[:, :2].abs().max(), error[:, 2].square().mean().sqrt())

        state = torch.cat([x.double(), x.new_zeros(len(x), 1, dtype=torch.float64)], 1)
        solved = solve_adaptive(field, state, start, end, solver="dopri5", rtol=tolerance, atol=tolerance, norm=norm)
        return solved[-1][:, :2], solved[-1][:, 2]

    def log_prob(self, x: Tensor, tolerance: float) -> Tensor:
        parts = []
        for rows in x.split(5000):
            z, ladj = self.along(rows, 1.0, 0.0, tolerance)
            parts.append(-z.square().sum(1) / 2 - math.log(2 * math.pi) + ladj)
        return torch.cat(parts)


def torchcfm(
    target: str, x: Tensor, seconds: float, seed: int, worker: Callable[..., Record], sigma: float
) -> tuple[Record, Score]:
    """In torchcfm's own process, on rows scaled to the size of its own eight Gaussians."""
    location, scale = x.mean(0), (x - x.mean(0)).square().mean().sqrt() / SIZE
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "rows.npy", Path(folder) / "weights.npz"
        np.save(data, ((x - location) / scale).float().numpy())
        answer = worker("fit", data=str(data), out=str(out), seconds=seconds, seed=seed, sigma=sigma)
        with np.load(out) as saved:
            ode = Carried(dict(saved))

    def log_q(rows: Tensor) -> tuple[Tensor, float]:
        u = (rows.double() - location) / scale
        loose, tight = (ode.log_prob(u, tolerance) for tolerance in (TOLERANCE, TOLERANCE / 10))
        return tight - 2 * math.log(float(scale)), float((tight - loose).abs().max())

    def draw(n: int, seed: int) -> Tensor:
        z = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return ode.along(z, 0.0, 1.0, TOLERANCE)[0] * scale + location

    return {"steps": answer["steps"], "seconds": answer["seconds"]}, (log_q, draw)


# ------------------------------------------------------------------------------------------------------------- scoring
def scored(target: str, seed: int, score: Score, test: int = TEST, matched: int = MATCHED) -> Record:
    """The gap on the test rows, the same for all fits, and W2 to fresh true rows."""
    log_q, draw = score
    toy = TARGETS[target]()
    rows = toy.sample(test, seed=1)
    value, error = log_q(rows)
    difference = toy.log_prob(rows).double() - value
    true = toy.sample(matched, seed=2000 + seed)
    distance = pg.diagnostics.wasserstein(draw(matched, 3000 + seed).double(), true.double())
    return {"gap": float(difference.mean()), "gap_error": float(difference.std()) / math.sqrt(test),
            "numerical": error, "w2": distance.value}  # fmt: skip


def floors(target: str, matched: int = MATCHED, pairs: int = FLOORS) -> list[float]:
    """W2 of pairs of true samples."""
    toy = TARGETS[target]()
    draws = [[toy.sample(matched, seed=4000 + 2 * i + j).double() for j in (0, 1)] for i in range(pairs)]
    return [pg.diagnostics.wasserstein(a, b).value for a, b in draws]


METHODS = ("diffusion", "flow, coupling splines", "torchcfm, I-CFM σ = .1")


def run(method: str, target: str, seed: int, seconds: float, worker: Callable[..., Record]) -> tuple[Record, Score]:
    x = TARGETS[target]().sample(ROWS, seed=100 + seed)
    if method == "diffusion":
        return diffusion(target, x, seconds, seed, RECIPES[target])
    if method == "flow, coupling splines":
        return flow(target, x, seconds, seed)
    return torchcfm(target, x, seconds, seed, worker, 0.1)


def verdict(gaps: list[float]) -> str:
    middle, worst = statistics.median(gaps), max(gaps)
    parts = [f"median ≤ {GAP:g}: {'reached' if middle <= GAP else 'missed'}",
             f"each ≤ {EACH:g}: {'reached' if worst <= EACH else 'missed'}",
             f"aim {AIM:g}: {'reached' if middle <= AIM else 'missed'}"]  # fmt: skip
    return ", ".join(parts)


def table(records: list[Record], floor: dict[str, list[float]]) -> str:
    header = [
        "target",
        "method",
        "gap, nats: median (range)",
        "s.e. over rows",
        "numerical error, worst row",
        "W2: median (range)",
        "steps",
        "CPU s",
    ]
    lines, notes = [], []
    for target in floor:
        for method in METHODS:
            found = [r for r in records if r["key"][:2] == [method, target]]
            if not found:
                continue
            gaps = [r["gap"] for r in found]
            lines.append([
                target, method, spread(gaps, 3), f"{max(r['gap_error'] for r in found):.3f}",
                f"{max(r['numerical'] for r in found):.0e}" if any(r["numerical"] for r in found) else "—",
                spread([r["w2"] for r in found], 3), f"{statistics.median(r['steps'] for r in found):.0f}",
                f"{max(r['seconds'] for r in found):.1f}",
            ])  # fmt: skip
            if method == "diffusion":
                notes.append(f"{target}: {verdict(gaps)}")
        lines.append([target, "*true rows against true rows*", "0", "—", "—", spread(floor[target], 3), "—", "—"])
    return f"{markdown(header, lines)}\n\nDiffusion, in nats. {'; '.join(notes)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--prepare", action="store_true", help="make the missing environment, and do nothing else")
    parser.add_argument("--smoke", action="store_true", help="one target, one seed, a second a fit")
    parser.add_argument("--only", default="", help="targets or methods whose name contains this")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="CPU time of a fit")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--environments", type=Path, default=workers.ENVIRONMENTS)
    parser.add_argument("--results", type=Path, default=Path(".benchmark-results/diffusion_2d.jsonl"),
                        help="one line a fit")  # fmt: skip
    options = parser.parse_args()
    if options.prepare:
        workers.prepare(options.environments, ("torchcfm",), HERE)
        return
    if options.write and (options.smoke or options.only):
        parser.error("--write takes a whole run: leave out --smoke and --only")
    torch.set_num_threads(1)
    nothing = torch.zeros(1, requires_grad=True)
    nothing.grad = torch.zeros(1)
    torch.optim.Adam([nothing], fused=True).step()  # the first step in a process imports a second's worth of torch
    targets = list(TARGETS)[: 1 if options.smoke else None]
    seeds, seconds = (1, 1.5) if options.smoke else (options.seeds, options.seconds)
    sizes = {"test": 500, "matched": 128} if options.smoke else {}
    records: dict[tuple[Any, ...], Record] = {}
    if options.results.exists() and not options.smoke:
        records = {tuple(r["key"]): r for r in map(json.loads, options.results.read_text().splitlines())}
    with workers.Worker("torchcfm", HERE / "torchcfm_2d_worker.py", options.environments) as worker:
        version = worker("versions")["library"]
        for seed in range(seeds):
            for target in targets:
                for method in METHODS:
                    key = (method, target, seed, seconds)
                    if key in records or options.only not in f"{target} {method}":
                        continue
                    report, score = run(method, target, seed, seconds, worker)
                    record = {"key": list(key), **report, **scored(target, seed, score, **sizes)}
                    records[key] = record
                    print(json.dumps(record), flush=True)
                    if not options.smoke:
                        options.results.parent.mkdir(exist_ok=True)
                        with options.results.open("a") as file:
                            file.write(json.dumps(record) + "\n")
    chosen = [r for r in records.values() if r["key"][3] == seconds]
    floor = {t: floors(t, **({"matched": 128, "pairs": 2} if options.smoke else {})) for t in targets}
    note = (
        f"*{stamp()}; torchcfm {version}; {seeds} seeds, {seconds:g} s of CPU a fit, {ROWS} training rows, "
        f"{TEST} test rows.*"
    )
    publish("diffusion_2d", f"{table(chosen, floor)}\n\n{note}", options.write)


if __name__ == "__main__":
    main()
