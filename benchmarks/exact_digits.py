"""Exact log-densities of scikit-learn's digits, beside the VAEs of `digits.py` row by row.

    python benchmarks/exact_digits.py            # prints the tables; about 20 minutes on one core
    python benchmarks/exact_digits.py --write    # and puts them into docs/benchmarks.md
    python benchmarks/exact_digits.py --smoke    # a minute: few steps, one seed

Split, dequantisation and protocol are those of `digits.py`: candidates are fitted with every seed, the one of the best
median on the validation rows is scored on the test rows, once by each seed. The VAEs are the candidates chosen there,
fitted anew, so that a difference can be taken row by row: its standard error is that of the mean of paired
differences. A VAE's number is a lower bound in expectation, so a difference from it is an upper bound of the true one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from digits import GREY, HEADER, LOG_JACOBIAN, Score, chosen, continuous, discrete, row
from tables import markdown, publish, stamp
from torch import Tensor

import pyro_gen as pg

Data = tuple[Tensor, Tensor, Tensor]
CENTRE = 8.5


def autoregressive(hidden: tuple[int, ...], components: int, orders: int = 1) -> pg.Autoregressive:
    return pg.Autoregressive(64, "discretized_logistic", hidden, levels=GREY, components=components, orders=orders)


def flow(layers: int, hidden: tuple[int, ...]) -> pg.Flow:
    return pg.Flow(64, "spline_autoregressive", layers, hidden, support=(0.0, 17.0), mixing="flip")


def best_of(candidates: dict[str, tuple[Callable[[], Any], dict[str, Any]]], data: Data, seeds: int) -> list[Score]:
    """Fit every candidate with every seed, take the one of the best median on the validation rows, score its seeds."""
    train, validation, test = data
    runs: dict[str, list[tuple[Any, float, float]]] = {}
    for name, (make, options) in candidates.items():
        runs[name] = []
        for seed in range(seeds):
            start = time.process_time()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                program = make()
            result = pg.fit(
                pg.MaximumLikelihood()(program), train, schedule="cosine", average=0.998, validation=validation,
                seed=seed, compile=False, progress=False, **options,
            )  # fmt: skip
            runs[name].append((program, -min(v for _, v in result.validation), time.process_time() - start))
        held = statistics.median(value for _, value, _ in runs[name])
        print(f"  candidate {name}: validation {held:.2f} (median of {seeds})", flush=True)
    best = max(runs, key=lambda name: statistics.median(value for _, value, _ in runs[name]))
    return [
        Score(pg.log_evidence(program, test).value, seconds=seconds, note=best) for program, _, seconds in runs[best]
    ]


def middle(scores: list[Score]) -> Tensor:
    """The rows of the fit of the median seed."""
    means = [float(score.rows.mean()) for score in scores]
    return scores[means.index(statistics.median_low(means))].rows


def paired(label: str, one: list[Score], other: list[Score]) -> list[str]:
    difference = middle(one) - middle(other)
    error = float(difference.std()) / math.sqrt(len(difference))
    higher = int((difference > 0).sum())
    return [label, f"≤ {float(difference.mean()):+.2f} ± {error:.2f}", f"{higher} of {len(difference)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument(
        "--smoke", action="store_true", help="few steps and one seed: tries the script, gives no result"
    )
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps, draws = (1, 30, 20) if options.smoke else (options.seeds, 1500, 5000)

    data = pg.datasets.digits(levels=GREY)

    def dequantized(x: Tensor, copies: int, seed: int) -> Tensor:
        return pg.datasets.dequantize(x.repeat(copies, 1), seed=seed)

    # as in digits.py: twenty copies of the training rows, so that no noise is learnt by heart
    noisy = (dequantized(data.train, 20, 4), dequantized(data.validation, 4, 2), dequantized(data.test, 1, 3))
    scaled: Any = tuple((x - CENTRE) / CENTRE for x in noisy)

    quick = {"steps": steps, "batch_size": 16, "lr": 8e-3}
    chain = best_of({
        "hidden 128-128, 5 components": (lambda: autoregressive((128, 128), 5), quick),
        "hidden 512, 2 components": (lambda: autoregressive((512,), 2), quick),
        "hidden 1024, 2 components": (lambda: autoregressive((1024,), 2), quick),
    }, tuple(data), seeds)  # fmt: skip
    slow = {"steps": steps, "batch_size": 32, "lr": 4e-3}
    density = best_of({
        "1 layer, hidden 512": (lambda: flow(1, (512,)), slow),
        "2 layers, hidden 256": (lambda: flow(2, (256,)), slow),
    }, noisy, seeds)  # fmt: skip
    many: Any = (4000 if not options.smoke else 30, seeds, draws)
    grey = chosen({"latent 16, hidden 256": lambda: discrete(16, (256,), "discretized_logistic")}, tuple(data), *many)
    real = chosen({"latent 8, hidden 128, 4 components": lambda: continuous(8, (128,), 4)}, scaled, *many, LOG_JACOBIAN)

    parts = [
        "**Grey levels**, whole numbers 0 … 16: log-probabilities.\n\n"
        + markdown(
            HEADER, [row("autoregressive, 17 levels", chain), row("VAE, 17 levels (discretised logistic)", grey)]
        ),
        "**Dequantised**, x + U[0, 1) in [0, 17]^64: log-densities.\n\n"
        + markdown(
            HEADER, [row("flow, autoregressive splines", density), row("VAE, mixture-of-normals likelihood", real)]
        ),
        "**Differences**, row by row, of the fits of the median seeds.\n\n"
        + markdown(
            ["difference", "nats per datum ± paired standard error", "rows where the first is higher"],
            [
                paired("autoregressive − VAE, grey levels", chain, grey),
                paired("flow − VAE, dequantised", density, real),
            ],
        ),
        f"*{stamp()}; {seeds} seeds, K = {draws}, {len(data.test)} test rows.*",
    ]
    publish("exact_digits", "\n\n".join(parts), options.write and not options.smoke)


if __name__ == "__main__":
    main()
