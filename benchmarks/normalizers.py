"""log Z by annealed importance sampling, where it is known: error, stated error, cost.

    python benchmarks/normalizers.py            # prints the table; about 3 minutes
    python benchmarks/normalizers.py --write    # and puts it into docs/benchmarks.md

Boltzmann machines of 50 visible and 15 hidden units (exact by 2^15 terms), another draw of the weights for each seed,
1000 temperatures and 100 chains; a Gaussian of ten dimensions. z is the error over the stated standard error: its root
mean square is 1 where the stated error is right.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from tables import markdown, publish, stamp

from pyro_gen.base import Unnormalized
from pyro_gen.evidence import AnnealedImportanceSampling, Enumeration, log_normalizer
from pyro_gen.programs.ebm import EBM
from pyro_gen.samplers import HMC, MALA

Problem = Callable[[int], tuple[Unnormalized, float]]


def machine(seed: int, scale: float) -> tuple[Unnormalized, float]:
    torch.manual_seed(seed)
    ebm = EBM(50, "rbm", "bernoulli", hidden=(15,)).double()
    with torch.no_grad():
        for parameter, size in zip(ebm.model.net.parameters(), (scale, 0.5, 0.5), strict=True):
            parameter.copy_(size * torch.randn(parameter.shape, dtype=torch.float64))
    return ebm, float(log_normalizer(ebm, method=Enumeration()).value)


def gaussian(seed: int, d: int = 10) -> tuple[Unnormalized, float]:
    torch.manual_seed(seed)
    a = torch.randn(d, d, dtype=torch.float64)
    covariance = a @ a.T / d + 0.3 * torch.eye(d, dtype=torch.float64)
    precision = torch.linalg.inv(covariance).float()
    half_logs = 0.5 * d * math.log(2 * math.pi)

    def energy(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((x @ precision) * x).sum(-1) - 0.5 * x.square().sum(-1) - half_logs

    return EBM(d, energy=energy), half_logs + 0.5 * float(torch.logdet(covariance))


def measure(name: str, problem: Problem, seeds: int, reverse: bool = False, **options: object) -> list[str]:
    errors, stated, seconds = [], [], []
    for seed in range(seeds):
        program, truth = problem(seed)
        given: dict[str, object] = dict(options)
        if reverse:
            chains = AnnealedImportanceSampling(**options).chains  # type: ignore[arg-type]
            draws = Enumeration().draw(program, chains, seed=1000 + seed)
            given |= {"reverse": True, "start": draws, "exact": True}
        method = AnnealedImportanceSampling(seed=seed, **given)  # type: ignore[arg-type]
        begun = time.process_time()
        found = log_normalizer(program, method=method)
        seconds.append(time.process_time() - begun)
        errors.append(float(found.value) - truth)
        stated.append(float(found.standard_error))  # type: ignore[arg-type]
    e, s = torch.tensor(errors), torch.tensor(stated)
    z = e / s
    inside = float((z.abs() < 1.645).double().mean())
    numbers = [e.square().mean().sqrt(), e.abs().max(), s.max(), z.square().mean().sqrt(), z.abs().max()]
    shown = [f"{float(number):.4f}" for number in numbers[:3]] + [f"{float(number):.2f}" for number in numbers[3:]]
    return [name, str(seeds), *shown, f"{inside:.0%}", f"{sorted(seconds)[len(seconds) // 2]:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    log_normalizer(gaussian(0)[0], method=AnnealedImportanceSampling(8, 50))  # imports are not timed
    rows = [
        measure("Boltzmann machine, weights .15, forward", lambda s: machine(s, 0.15), 20),
        measure("— reverse from exact draws", lambda s: machine(s, 0.15), 20, reverse=True),
        measure("— forward, linear ladder", lambda s: machine(s, 0.15), 20, schedule="linear"),
        measure("Boltzmann machine, weights .5, forward", lambda s: machine(s, 0.5), 50),
        measure("— reverse from exact draws", lambda s: machine(s, 0.5), 50, reverse=True),
        measure("Gaussian, d = 10: 200 × 2500, `MALA()`", gaussian, 20, temperatures=200, chains=2500, sampler=MALA()),
        measure(
            "Gaussian, d = 10: 100 × 3000, `HMC(leapfrog=3)`",
            gaussian,
            20,
            temperatures=100,
            chains=3000,
            sampler=HMC(leapfrog=3),
        ),
    ]
    header = ["log Z of", "runs", "rmse", "largest error", "largest stated", "rms z", "largest z", "in 90 %", "CPU s"]
    publish("normalizers", markdown(header, rows) + f"\n\n*{stamp()}; errors in nats.*", options.write)


if __name__ == "__main__":
    main()
