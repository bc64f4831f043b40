"""What a training step of a diffusion costs: pyro_gen beside a plain PyTorch loop of the same network.

    python benchmarks/diffusion_training.py           # prints the table; about five minutes, most of them compiling
    python benchmarks/diffusion_training.py --write   # and puts it into docs/benchmarks.md
    python benchmarks/diffusion_training.py --smoke   # one round of few steps: does everything run?

The network is an MLP 3-64-64-2 with SiLU over (y, t), the loss the mean square error of ε at 1000 levels of the linear
schedule, 256 rows of standard normal data a step, torch's fused Adam, float32, one thread. The plain loop looks α and σ
up in tables made beforehand and does nothing else. Ours are the objective in such a loop, and `pg.fit` as it is: with
its batches, its gradient norm, its guard against divergence and its history; the average of the weights that it takes
by default has a row of its own. All take turns within a round; a ratio is of one round. Times are CPU times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from tables import markdown, publish, spread, stamp
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen.objectives.denoising import DenoisingScoreMatching
from pyro_gen.programs.diffusion import Diffusion

ROWS, LEVELS, FEATURES = 256, 1000, 2
AIM = 1.15  # of the eager rows
Run = Callable[[int], float]  # from a number of steps to the CPU seconds of one


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(FEATURES + 1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, FEATURES)]
        self.net = nn.Sequential(*layers)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([y, t.unsqueeze(1)], 1))
        return out


def rows() -> Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0))


def timed(step: Callable[[], None]) -> Run:
    def run(steps: int) -> float:
        step()
        start = time.process_time()
        for _ in range(steps):
            step()
        return (time.process_time() - start) / steps

    return run


def plain() -> Run:
    net, x = Network(), rows()
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64), 0)
    alpha, sigma = signal.sqrt().float(), (1 - signal).sqrt().float()
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> None:
        level = torch.randint(LEVELS, (ROWS,))
        noise = torch.randn_like(x)
        y = alpha[level].unsqueeze(1) * x + sigma[level].unsqueeze(1) * noise
        loss = nn.functional.mse_loss(net(y, level / LEVELS), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return timed(step)


def program() -> Diffusion:
    return Diffusion(FEATURES, network=Network(), schedule="linear", timesteps=LEVELS)


def objective() -> Run:
    x, module = rows(), DenoisingScoreMatching()(program())
    module.initialise(x)
    module.prepare(x)
    optimizer = torch.optim.Adam(module.parameters(), fused=True)

    def step() -> None:
        loss = module(x) / ROWS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return timed(step)


def fitted(compiled: bool, average: float | bool | None) -> Run:
    """From the fifth step on: what `fit` does once, compiling too, does not count."""

    def run(steps: int) -> float:
        marks: list[float] = []

        def mark(step: int, values: dict[str, float]) -> None:
            if step in (5, 5 + steps):
                marks.append(time.process_time())

        pg.fit(
            DenoisingScoreMatching()(program()), rows(), steps=5 + steps, compile=compiled, average=average,
            callback=mark, progress=False, seed=0,
        )  # fmt: skip
        return (marks[1] - marks[0]) / steps

    return run


CASES: dict[str, Callable[[], Run]] = {
    "plain PyTorch loop": plain,
    "`pg.DenoisingScoreMatching()`, loop": objective,
    "`pg.fit`, `average=False`": lambda: fitted(False, False),
    "`pg.fit`": lambda: fitted(False, None),
    "`pg.fit(compile=True)`": lambda: fitted(True, None),
}


def measure(cases: dict[str, Run], rounds: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds of a step, by case and round."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name in list(cases)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(cases[name](steps))
    return found


def table(found: dict[str, list[float]]) -> str:
    first, *_ = found
    lines = []
    for name, seconds in found.items():
        ratios: Sequence[float] = [a / b for a, b in zip(seconds, found[first], strict=True)]
        judged = "—" if name == first else "reached" if median(ratios) <= AIM else "missed"
        lines.append([name, spread([1e6 * s for s in seconds], 0), spread(ratios), judged])
    return markdown(["step", "CPU µs: median (range)", "ratio to the plain loop", f"aim {AIM:g}"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=200)  # short turns: load drifts within seconds
    parser.add_argument("--smoke", action="store_true", help="one short round, nothing compiled")
    options = parser.parse_args()
    if options.write and options.smoke:
        parser.error("--write takes a whole run: leave out --smoke")
    torch.set_num_threads(1)
    cases = {name: make() for name, make in CASES.items() if not (options.smoke and "compile" in name)}
    found = measure(cases, 1, 10) if options.smoke else measure(cases, options.rounds, options.steps)
    rounds = len(next(iter(found.values())))
    publish("diffusion_training", f"{table(found)}\n\n*{stamp()}; {rounds} interleaved rounds.*", options.write)


if __name__ == "__main__":
    main()
