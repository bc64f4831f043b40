"""Held-out evidence of VAEs on scikit-learn's digits, beside baselines of closed form, in three codings of the data.

    python benchmarks/digits.py            # prints the tables; about 30 minutes on one core
    python benchmarks/digits.py --write    # and puts them into docs/benchmarks.md
    python benchmarks/digits.py --smoke    # a minute: few steps, one seed

Protocol: the fixed split of `pg.datasets.digits` (1200 train, 237 validation, 360 test). Every choice (epoch, size of a
model, smoothing of a baseline) is made on the validation rows; the test rows are touched once by each seed of what was
chosen. VAEs are scored by importance sampling with K draws of the encoder a row. Two errors are stated: Monte Carlo
(of the estimate) and sampling (from the 360 rows being a sample); the spread is over seeds of initialisation and noise.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from sklearn.decomposition import FactorAnalysis
from tables import markdown, publish, spread, stamp
from torch import Tensor

import pyro_gen as pg
from pyro_gen.nn import MLP

GREY, CENTRE = 17, 8.5  # levels, and half the width of the dequantised range [0, 17]
LOG_JACOBIAN = -64 * math.log(CENTRE)  # log p(x) = log p(y) + this, for y = (x - CENTRE) / CENTRE


@dataclass
class Score:
    """Log p of the test rows of one fit, in nats, with the Monte Carlo error of their mean."""

    rows: Tensor
    error: float = 0.0
    sign: str = "="
    seconds: float = 0.0
    note: str = ""


# --------------------------------------------------------------------------------------------------------- baselines
def gaussian(train: Tensor, validation: Tensor, test: Tensor, seed: int) -> Score:
    """Full covariance, shrunk towards its diagonal by a weight chosen on validation rows."""
    mean, cov = train.double().mean(0), torch.cov(train.T.double(), correction=0)

    def model(weight: float) -> Any:
        return dist.MultivariateNormal(mean, (1 - weight) * cov + weight * torch.diag(cov.diagonal()))

    best = max(np.linspace(0, 0.5, 26), key=lambda w: float(model(w).log_prob(validation.double()).mean()))
    return Score(model(best).log_prob(test.double()), note=f"shrinkage {best:.2f}")


def factor_analysis(train: Tensor, validation: Tensor, test: Tensor, seed: int) -> Score:
    fitted = FactorAnalysis(30, tol=1e-4, max_iter=2000, random_state=seed).fit(train.double().numpy())
    return Score(torch.from_numpy(fitted.score_samples(test.double().numpy())), note="30 factors")


def histograms(train: Tensor, validation: Tensor, test: Tensor, seed: int, levels: int = GREY) -> Score:
    """One histogram a pixel, smoothed by a count chosen on validation rows."""
    counts = torch.nn.functional.one_hot(train.long(), levels).double().sum(0)

    def score(count: float, x: Tensor) -> Tensor:
        log_p = ((counts + count) / (counts + count).sum(-1, keepdim=True)).log()
        return log_p.expand(len(x), -1, -1).gather(-1, x.long().unsqueeze(-1)).squeeze(-1).sum(-1)

    best = max(np.geomspace(0.01, 3, 20), key=lambda c: float(score(c, validation).mean()))
    return Score(score(best, test), note=f"{best:.2f} pseudo-counts")


def mixture(train: Tensor, validation: Tensor, test: Tensor, seed: int, levels: int = GREY) -> Score:
    """Twenty products of histograms by EM; smoothing and number of iterations chosen on validation rows."""
    start, best = time.process_time(), (-math.inf, test, "")
    coded = {k: torch.nn.functional.one_hot(x.long(), levels).double().flatten(1) for k, x in
             (("train", train), ("validation", validation), ("test", test))}  # fmt: skip
    for count in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
        generator = torch.Generator().manual_seed(seed)
        resp = torch.rand(len(train), 20, generator=generator, dtype=torch.float64).log().mul(4).softmax(-1)
        for step in range(60):
            weights = (resp.sum(0) + 1).log() - (resp.sum() + 20).log()
            table = (resp.T @ coded["train"]).reshape(20, 64, levels) + count
            log_p = (table / table.sum(-1, keepdim=True)).log().flatten(1).T
            joint = coded["train"] @ log_p + weights
            resp = joint.softmax(-1)
            held = torch.logsumexp(coded["validation"] @ log_p + weights, -1).mean()
            if float(held) > best[0]:
                tested = torch.logsumexp(coded["test"] @ log_p + weights, -1)
                best = (float(held), tested, f"20 components, {count} pseudo-counts, {step + 1} iterations")
    return Score(best[1], seconds=time.process_time() - start, note=best[2])


def bernoulli(train: Tensor, validation: Tensor, test: Tensor, seed: int) -> Score:
    return histograms(train, validation, test, seed, levels=2)


def bernoulli_mixture(train: Tensor, validation: Tensor, test: Tensor, seed: int) -> Score:
    return mixture(train, validation, test, seed, levels=2)


# -------------------------------------------------------------------------------------------------------------- VAEs
class NormalMixture:
    """A mixture of k normals for each pixel: a likelihood given as a callable, as any user's could be.

    A pixel of dequantised data is uniform within a level, often within level 0: one normal fits that badly.
    """

    def __init__(self, components: int) -> None:
        self.components = components
        self.centres = torch.linspace(-0.95, 0.8, components)

    def __call__(self, raw: Tensor) -> Any:
        logits, loc, log_scale = raw.reshape(*raw.shape[:-1], 64, 3, self.components).unbind(-2)
        parts = dist.Normal(loc + self.centres, (log_scale - 1.5).exp())
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), parts).to_event(1)


def discrete(latent_dim: int, hidden: tuple[int, ...], likelihood: str) -> pg.VAE:
    levels = None if likelihood == "bernoulli" else GREY
    return pg.VAE(64, latent_dim, likelihood, hidden=hidden, levels=levels)


def continuous(latent_dim: int, hidden: tuple[int, ...], components: int) -> pg.VAE:
    decoder = MLP(latent_dim, 64 * 3 * components, hidden)
    return pg.VAE(64, latent_dim, NormalMixture(components), decoder=decoder, hidden=hidden)


def fitted(
    make: Callable[[], pg.VAE], train: Tensor, validation: Tensor, steps: int, seed: int
) -> tuple[pg.VAE, float, float]:
    """A VAE fitted with one seed, its validation bound and the CPU seconds it took."""
    start = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = make()
    result = pg.fit(
        pg.ELBO()(vae), train, steps=steps, batch_size=128, lr=2e-3, schedule="cosine", validation=validation,
        seed=seed, compile=False, progress=False,
    )  # fmt: skip
    return vae, -min(value for _, value in result.validation), time.process_time() - start


def chosen(
    makes: dict[str, Callable[[], pg.VAE]], data: tuple[Tensor, Tensor, Tensor], steps: int, seeds: int, draws: int,
    log_jacobian: float = 0.0,
) -> list[Score]:  # fmt: skip
    """Fit every candidate with every seed, take the one of the best median validation bound, score its seeds."""
    train, validation, test = data
    runs = {
        name: [fitted(make, train, validation, steps, seed) for seed in range(seeds)] for name, make in makes.items()
    }
    medians = {name: statistics.median(bound for _, bound, _ in run) for name, run in runs.items()}
    for name, bound in medians.items():
        print(f"  candidate {name}: validation ELBO {bound + log_jacobian:.2f} (median of {seeds})", flush=True)
    best = max(medians, key=lambda name: medians[name])
    scores = []
    for seed, (vae, _, seconds) in enumerate(runs[best]):
        evidence = pg.log_evidence(vae, test, method=pg.ImportanceSampling(draws, seed=seed))
        mean = evidence.mean()
        k = evidence.pareto_k
        note = f"{best}; k̂ > .7 in {int((k > 0.7).sum())} rows" if k is not None else best
        sign = {"lower bound": "≥", "estimate": "≈"}[mean.kind]
        assert mean.standard_error is not None
        scores.append(Score(evidence.value + log_jacobian, float(mean.standard_error), sign, seconds, note))
    return scores


def row(name: str, scores: list[Score]) -> list[str]:
    means = [float(s.rows.mean()) for s in scores]
    middle = scores[means.index(statistics.median_low(means))]
    sampling = float(middle.rows.std()) / math.sqrt(len(middle.rows))
    error = f"{max(s.error for s in scores):.3f}" if any(s.error for s in scores) else "—"
    sign = "≥" if any(s.sign == "≥" for s in scores) else scores[0].sign
    value = f"{sign} {spread(means)}" if len(scores) > 1 else f"{sign} {means[0]:.2f}"
    cpu = f"{statistics.median(s.seconds for s in scores):.0f}" if any(s.seconds for s in scores) else "—"
    return [name, value, error, f"{sampling:.2f}", cpu, middle.note]


HEADER = ["model", "log p(x), nats per datum: median (range) of seeds", "Monte Carlo error", "sampling error",
          "CPU s", "chosen on validation"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument(
        "--smoke", action="store_true", help="few steps and one seed: tries the script, gives no result"
    )
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps, draws = (1, 60, 50) if options.smoke else (options.seeds, 4000, 5000)

    data = pg.datasets.digits(levels=GREY)
    binary = pg.datasets.digits(levels=2)

    def dequantized(x: Tensor, copies: int, seed: int) -> Tensor:
        return pg.datasets.dequantize(x.repeat(copies, 1), seed=seed)

    noisy = tuple(dequantized(x, copies, seed) for x, copies, seed in zip(data, (1, 4, 1), (1, 2, 3), strict=True))
    many = (dequantized(data.train, 20, 4), noisy[1], noisy[2])  # so that no noise is learnt by heart
    scaled = tuple((x - CENTRE) / CENTRE for x in many)

    grey = [
        row("VAE, 17 levels (discretised logistic)", chosen({
            "latent 8, hidden 128-128": lambda: discrete(8, (128, 128), "discretized_logistic"),
            "latent 16, hidden 256": lambda: discrete(16, (256,), "discretized_logistic"),
        }, tuple(data), steps, seeds, draws)),
        row("VAE, 17 levels (categorical)", chosen({
            "latent 8, hidden 128-128": lambda: discrete(8, (128, 128), "categorical"),
            "latent 16, hidden 256": lambda: discrete(16, (256,), "categorical"),
        }, tuple(data), steps // 4, seeds, draws)),
        row("mixture of 20 products of histograms", [mixture(*data, seed) for seed in range(seeds)]),
        row("a histogram for each pixel", [histograms(*data, 0)]),
    ]  # fmt: skip
    real = [
        row("VAE, mixture-of-normals likelihood", chosen({
            "latent 8, hidden 128, 4 components": lambda: continuous(8, (128,), 4),
            "latent 12, hidden 256, 3 components": lambda: continuous(12, (256,), 3),
        }, scaled, steps, seeds, draws, LOG_JACOBIAN)),
        row("factor analysis", [factor_analysis(*noisy, 0)]),
        row("full Gaussian", [gaussian(*noisy, 0)]),
    ]  # fmt: skip
    ink = [
        row("VAE, Bernoulli", chosen({
            "latent 8, hidden 128-128": lambda: discrete(8, (128, 128), "bernoulli"),
            "latent 16, hidden 256": lambda: discrete(16, (256,), "bernoulli"),
        }, tuple(binary), steps, seeds, draws)),
        row("mixture of 20 products of Bernoullis", [bernoulli_mixture(*binary, seed) for seed in range(seeds)]),
        row("independent Bernoullis", [bernoulli(*binary, 0)]),
    ]  # fmt: skip
    parts = [
        "**Grey levels**, whole numbers 0 … 16: log-probabilities.\n\n" + markdown(HEADER, grey),
        "**Dequantised**, x + U[0, 1) in [0, 17]^64: log-densities, comparable with the table above as lower bounds of "
        "it.\n\n" + markdown(HEADER, real),
        "**Binarised**, x > 8: log-probabilities.\n\n" + markdown(HEADER, ink),
        f"*{stamp()}; {seeds} seeds, K = {draws}, {len(data.test)} test rows.*",
    ]
    publish("digits", "\n\n".join(parts), options.write and not options.smoke)


if __name__ == "__main__":
    main()
