"""The weights of far modes, by objective: 0.2 N(−4, 1) + 0.8 N(4, 1), from 5000 rows.

    python benchmarks/far_modes.py            # prints the table; about 12 minutes on one core
    python benchmarks/far_modes.py --write    # and puts it into docs/benchmarks.md
    python benchmarks/far_modes.py --smoke    # a minute: one seed, few steps

One network, one optimizer and one number of steps for all objectives; they differ in the loss alone. The weight is the
mass of the fitted density left of 0, its Z by quadrature.

Between the modes there are next to no data, and the score of either mode does not know of the other. How little, says
the least that can be asked: components that are known, and w = 1 / (1 + e^−η) the one parameter. With r the posterior
probability of the left mode, ∂ log p / ∂η = r − w, and the curvature in η of the likelihood is E(r − w)² ≈ w (1 − w).
That of score matching is E(∂s/∂η)² = E(r′)², and r′ is 0 but for the few rows where r is neither 0 nor 1. The standard
error of ŵ at N rows is √(B / A² / N) w (1 − w), with A the curvature and B the variance of a row's gradient. What a
network makes of so weak a voice is up to its start and to the gap's few rows. Noise lays data in between; telling data
from noise compares the masses of the two modes themselves.

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
from pyro_gen.base import Objective
from pyro_gen.objectives.denoising import DenoisingScoreMatching
from pyro_gen.objectives.noise_contrastive import NoiseContrastive
from pyro_gen.objectives.score_matching import ScoreMatching
from pyro_gen.programs.ebm import EBM

WEIGHT, ROWS, STEPS, BATCH, HIDDEN = 0.2, 5000, 1500, 250, (32, 32)
GRID = torch.linspace(-20.0, 20.0, 8001)
LOW, HIGH, LEVELS = 0.3, 2.0, 5
WIDEST = 8.0  # of a ladder that ends where both modes are one


OBJECTIVES: dict[str, Callable[[], Objective[Any]]] = {
    "score matching": ScoreMatching,
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
        program = EBM(1, hidden=HIDDEN, context_shape=1 if conditional else None)
    fit(
        objective(program), x, steps=steps, batch_size=BATCH, lr=5e-3, schedule="cosine", average="tail",
        seed=seed, validation=False, compile=False, progress=False,
    )  # fmt: skip
    return carried(program) if conditional else left_of(0.0, program)


def known_form(levels: dict[float, float] | None = None, noise_ratio: float | None = None) -> tuple[float, float]:
    """Where the components are known and only η is not: curvature of the loss in η, and the standard error of ŵ.

    Args:
        levels: σ of denoising to its share of the mixture that is estimated, {0: 1} for score matching; None for the
            likelihood, or for telling data from draws of the normal of their mean and variance, ``noise_ratio`` a row.
    """
    x = torch.linspace(-40.0, 40.0, 8001, dtype=torch.float64)
    step = float(x[1] - x[0])

    def density(sigma: float, w: Tensor | float, at: Tensor) -> Tensor:
        scale = math.sqrt(1 + sigma**2)
        left, right = (torch.distributions.Normal(m, scale).log_prob(at).exp() for m in (-4.0, 4.0))
        mixed: Tensor = w * left + (1 - w) * right
        return mixed

    p = density(0.0, WEIGHT, x)
    if levels is None:
        slope = (density(0.0, 1.0, x) / p - 1) * WEIGHT  # ∂ log p / ∂η = r − w
        if noise_ratio is None:
            curvature = float((slope.square() * p).sum()) * step
            return curvature, WEIGHT * (1 - WEIGHT) / math.sqrt(curvature * ROWS)
        mean, variance = 4 - 8 * WEIGHT, 1 + 64 * WEIGHT * (1 - WEIGHT)
        noise = noise_ratio * torch.distributions.Normal(mean, math.sqrt(variance)).log_prob(x).exp()
        g, weight = torch.stack([slope, -torch.ones_like(x)]), noise / (p + noise) * p * step
        inverse, m = torch.linalg.inv((g * weight) @ g.T), (g * weight).sum(1)
        covariance = inverse - (1 + 1 / noise_ratio) * torch.outer(inverse @ m, inverse @ m)
        return float(1 / inverse[0, 0]), WEIGHT * (1 - WEIGHT) * math.sqrt(float(covariance[0, 0]) / ROWS)

    def log_q(at: Tensor, eta: Tensor) -> Tensor:
        logs = torch.nn.functional.logsigmoid(torch.stack([eta, -eta]))
        parts = [
            math.log(share) + log_w + torch.distributions.Normal(m, math.sqrt(1 + sigma**2)).log_prob(at)
            for sigma, share in levels.items()
            for m, log_w in zip((-4.0, 4.0), logs, strict=True)
        ]
        return torch.logsumexp(torch.stack(parts), 0)

    score = torch.func.grad(log_q)

    def rho(at: Tensor, eta: Tensor) -> Tensor:
        found: Tensor = 0.5 * score(at, eta) ** 2 + torch.func.grad(score)(at, eta)
        return found

    eta = torch.tensor(math.log(WEIGHT / (1 - WEIGHT)), dtype=torch.float64)
    s_eta = torch.func.vmap(torch.func.grad(score, argnums=1), (0, None))(x, eta)
    rate = torch.func.vmap(torch.func.grad(rho, argnums=1), (0, None))(x, eta)
    curvature, gradient = 0.0, torch.zeros_like(x)
    for sigma, share in levels.items():  # by Stein's lemma E_n[(σ s + n) σ ∂s] = σ² E_n[s ∂s + ∂s′]
        curvature += share * float((s_eta.square() * density(sigma, WEIGHT, x)).sum()) * step
        gradient += share * (rate if sigma == 0 else _smoothed(rate, sigma / step))
    variance = float((gradient.square() * p).sum()) * step
    return curvature, WEIGHT * (1 - WEIGHT) * math.sqrt(variance / ROWS) / curvature


def _smoothed(values: Tensor, width: float) -> Tensor:
    """Values on a grid under normal noise of so many grid steps."""
    reach = math.ceil(8 * width)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=values.dtype) / width) ** 2)
    found: Tensor = torch.nn.functional.conv1d(values[None, None], (kernel / kernel.sum())[None, None], padding=reach)
    return found[0, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--smoke", action="store_true", help="one seed, few steps")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = (1, 300) if options.smoke else (options.seeds, STEPS)
    ladder = DenoisingScoreMatching(sigmas=(LOW, HIGH), levels=LEVELS).levels
    forms: dict[str, tuple[float, float]] = {
        "score matching": known_form({0.0: 1.0}),
        f"denoising, σ = {LOW}": known_form({LOW: 1.0}),
        "denoising, σ = 1.5": known_form({1.5: 1.0}),
        next(name for name in OBJECTIVES if "one energy" in name): known_form(dict.fromkeys(ladder, 1 / LEVELS)),
        next(name for name in OBJECTIVES if "noise-" in name): known_form(noise_ratio=2.0),
    }
    rows = []
    for name, make in OBJECTIVES.items():
        start = time.process_time()
        found = [weight(make(), seed, steps) for seed in range(seeds)]
        spent = (time.process_time() - start) / seeds
        errors = [abs(value - WEIGHT) for value in found]
        rows.append([
            name, f"{statistics.mean(found):.3f} ({min(found):.3f} … {max(found):.3f})",
            f"{statistics.mean(errors):.3f}", f"{forms[name][1]:.3g}" if name in forms else "–", f"{spent:.0f}",
        ])  # fmt: skip
        print(f"  {' | '.join(rows[-1])}", flush=True)
    header = [
        "objective", "weight of the left mode, 0.2 in truth", "mean error", "standard error, form known",
        "s of CPU a fit",
    ]  # fmt: skip
    likelihood, matching = known_form(), forms["score matching"]
    text = (
        f"{markdown(header, rows)}\n\nMean (range) over {seeds} seeds of data and network. The standard error is "
        f"that of the weight by {ROWS} rows, where both components are known; by maximum likelihood it is "
        f"{likelihood[1]:.2g}. There the curvature in the logit of the weight is {likelihood[0]:.3f} for the "
        f"likelihood and {matching[0]:.1e} for score matching. {stamp()}."
    )
    publish("far_modes", text, options.write)


if __name__ == "__main__":
    main()
