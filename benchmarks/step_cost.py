"""What a training step costs: pyro_gen eager and compiled, a plain PyTorch loop, and Pyro's SVI, on one small VAE.

    python benchmarks/step_cost.py            # prints the table; about 2 minutes
    python benchmarks/step_cost.py --write    # and puts it into docs/benchmarks.md

All variants train the same hand-written networks on the same data with batches drawn anew each step, on one thread.
They take turns, round after round; a row gives the median and range over rounds of the CPU time per step, and the
ratio to the plain loop of the same round.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from tables import markdown, publish, spread, stamp
from torch import Tensor, nn

import pyro_gen as pg

ROWS, FEATURES, HIDDEN, LATENT, BATCH = 4096, 20, 32, 2, 128


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, FEATURES))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT))

    def forward(self, x: Tensor) -> None:
        loc, log_scale = self.net(x).chunk(2, -1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def batches(x: Tensor) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(len(x))
        for start in range(0, len(x), BATCH):
            yield x.index_select(0, order[start : start + BATCH])


def plain(x: Tensor, fused: bool) -> Callable[[int], None]:
    """The loop one writes without a library: no distributions, no validation."""
    model, guide = Decoder().net, Encoder().net
    parameters = [*model.parameters(), *guide.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True) if fused else torch.optim.Adam(parameters, lr=1e-3)
    stream = batches(x)

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = next(stream)
            loc, log_scale = guide(batch).chunk(2, -1)
            noise = torch.randn_like(loc)
            z = loc + log_scale.exp() * noise
            log_p = -0.5 * (batch - model(z)).square().sum() - 0.5 * z.square().sum()
            log_q = -log_scale.sum() - 0.5 * noise.square().sum()
            loss = (log_q - log_p) / BATCH
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def ours(x: Tensor, validation: bool) -> Callable[[int], None]:
    """A hand-written loop around pg.ELBO, with Pyro's validation (its default is on) or without (as the plain loop)."""
    loss = pg.ELBO()(Decoder(), Encoder())
    loss.prepare(x[:BATCH])
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3, fused=True)
    stream = batches(x)

    def run(steps: int) -> None:
        with pyro.validation_enabled(validation):
            for _ in range(steps):
                value = loss(next(stream)) / BATCH
                optimizer.zero_grad()
                value.backward()
                optimizer.step()

    return run


def fitted(x: Tensor, compile: bool) -> Callable[[int], None]:
    """All of `pg.fit`: its batches, its history, its guard against divergence. Compiling is not timed here."""
    loss = pg.ELBO()(Decoder(), Encoder())

    def run(steps: int) -> None:
        pause: list[float] = []

        def stop(step: int, values: dict[str, float]) -> bool:
            if step == 20:  # past preparing and compiling
                pause.append(time.process_time())
            return False

        pg.fit(loss, x, steps=steps + 20, batch_size=BATCH, seed=0, compile=compile, progress=False, callback=stop)
        run.seconds = time.process_time() - pause[0]  # type: ignore[attr-defined]

    return run


def svi(x: Tensor) -> Callable[[int], None]:
    model, guide = Decoder(), Encoder()

    def with_model(batch: Tensor) -> None:
        pyro.module("model", model)(batch)

    def with_guide(batch: Tensor) -> None:
        pyro.module("guide", guide)(batch)

    loop = SVI(with_model, with_guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    stream = batches(x)

    def run(steps: int) -> None:
        for _ in range(steps):
            loop.step(next(stream))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pyro_gen").setLevel(logging.ERROR)
    pyro.set_rng_seed(0)
    x = torch.randn(ROWS, FEATURES)
    names = {
        "plain PyTorch loop, Adam": plain(x, fused=False),
        "plain PyTorch loop, fused Adam": plain(x, fused=True),
        "`SVI.step`, `Trace_ELBO` (Pyro)": svi(x),
        "own loop over `pg.ELBO`, fused Adam, validation on": ours(x, validation=True),
        "own loop over `pg.ELBO`, fused Adam, validation off": ours(x, validation=False),
        "`pg.fit(compile=False)`": fitted(x, compile=False),
        "`pg.fit(compile=True)`": fitted(x, compile=True),
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in names.values():
        run(30)
    for _ in range(options.rounds):
        for name, run in names.items():
            start = time.process_time()
            run(options.steps)
            seconds = getattr(run, "seconds", time.process_time() - start)
            times[name].append(seconds / options.steps * 1e6)
    first, pyro_step = times["plain PyTorch loop, Adam"], times["`SVI.step`, `Trace_ELBO` (Pyro)"]
    rows = []
    for name, values in times.items():
        to_plain = [a / b for a, b in zip(values, first, strict=True)]
        to_svi = [a / b for a, b in zip(values, pyro_step, strict=True)]
        rows.append([name, spread(values, 0), spread(to_plain), spread(to_svi)])
    header = ["step", "CPU µs: median (range)", "over the plain loop", "over `SVI.step`"]
    note = f"*{stamp()}; {options.rounds} interleaved rounds of {options.steps} steps.*"
    publish("step_cost", markdown(header, rows) + "\n\n" + note, options.write)


if __name__ == "__main__":
    main()
