"""An RBM on bars and stripes 3 × 3, by objective: exact log-likelihood beside its bound −log 14.

    python benchmarks/bars_and_stripes.py            # prints the table; about five minutes on one core
    python benchmarks/bars_and_stripes.py --write    # and puts it into docs/benchmarks.md
    python benchmarks/bars_and_stripes.py --smoke    # seconds: a few steps, one seed

Nine visible and 15 hidden units, the 14 patterns as one batch, Adam with half a cosine to zero. Steps, learning rate,
sweeps and chains are the same for all seeds; they were found on other seeds (100 to 103), by the exact log-likelihood
of persistent chains, and serve the other objectives too. States are enumerated to score the result, 2^9 of them in
float64; training never sees them.

Patterns are three pixels apart or more. Pseudo-likelihood compares a pattern with its neighbours of one pixel only, and
leaves open how much mass lies farther off; so does CD-1, whose negatives have hardly left the data. CD-10 has come far
enough. The machine can come as near to the data as it likes, and then the truth is where contrastive divergence stops,
whatever the number of sweeps; its chains start at every pattern equally often, which persistent ones do not.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable

import torch
from tables import markdown, publish, stamp
from torch import Tensor

from pyro_gen import fit
from pyro_gen.base import ObjectiveModule
from pyro_gen.datasets import bars_and_stripes
from pyro_gen.objectives.contrastive import ContrastiveDivergence
from pyro_gen.objectives.pseudo_likelihood import PseudoLikelihood
from pyro_gen.programs.ebm import EBM
from pyro_gen.samplers import Gibbs

STEPS, RATE, SWEEPS, CHAINS = 6000, 0.01, 5, 100
SEEDS = range(5)
BOUND = -math.log(14)

PERSISTENT = f"persistent CD, {SWEEPS} sweeps, {CHAINS} chains"
OBJECTIVES: dict[str, tuple[Callable[[EBM], ObjectiveModule], float]] = {
    PERSISTENT: (ContrastiveDivergence(Gibbs(), steps=SWEEPS, persistent=True, chains=CHAINS), RATE),
    "CD-10": (ContrastiveDivergence(Gibbs(), steps=10, chains=98), RATE),
    "CD-1": (ContrastiveDivergence(Gibbs(), steps=1, chains=98), RATE),
    "pseudo-likelihood": (PseudoLikelihood(), RATE),
}


def log_likelihood(ebm: EBM, x: Tensor) -> float:
    """Mean log p of rows, exact: Z is a sum over 2^9 states."""
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=9)), dtype=torch.float64)
    double = copy.deepcopy(ebm).double()
    with torch.no_grad():
        log_z = torch.logsumexp(double.log_density(states), 0)
        return float((double.log_density(x.double()) - log_z).mean())


def trained(name: str, seed: int, steps: int = STEPS) -> tuple[EBM, float]:
    """The program trained by one of the objectives, and the CPU seconds that took."""
    objective, rate = OBJECTIVES[name]
    x = bars_and_stripes(3).patterns
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ebm = EBM(9, energy="rbm", base="bernoulli", hidden=(15,))
    start = time.process_time()
    module = objective(ebm)
    fit(module, x, steps=steps, lr=rate, schedule="cosine", seed=seed, compile=False, progress=False)
    return ebm, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--smoke", action="store_true", help="few steps, one seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x = bars_and_stripes(3).patterns
    rows = []
    for name in OBJECTIVES:
        found, seconds = [], []
        for seed in SEEDS if not arguments.smoke else range(1):
            ebm, spent = trained(name, seed, 50 if arguments.smoke else STEPS)
            found.append(log_likelihood(ebm, x))
            seconds.append(spent)
            print(f"{name}, seed {seed}: {found[-1]:.3f} in {spent:.1f} s", flush=True)
        mean = sum(found) / len(found)
        shown = f"{mean:.3f} ({min(found):.3f} … {max(found):.3f})"
        rows.append([name, shown, f"{BOUND - mean:.3f}", f"{sum(seconds) / len(seconds):.1f}"])
    header = ["objective", "mean log p(x), nats (range over seeds)", "below −log 14 = −2.639", "CPU s a fit"]
    publish("bars_and_stripes", f"{markdown(header, rows)}\n\n{stamp()}", arguments.write)


if __name__ == "__main__":
    main()
