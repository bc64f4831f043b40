"""How fast an exact score matching step is: the forward Laplacian beside three ways through torch.func and autograd.

    python benchmarks/second_derivatives.py             # prints the table; about 5 minutes
    python benchmarks/second_derivatives.py --write     # and puts it into docs/benchmarks.md
    python benchmarks/second_derivatives.py --smoke     # one round at d = 2 and 10: does everything run?

Loss E[½|∇E|² − ΔE] and its gradient in the weights, for an energy network d-128-128-1 with softplus, batch 128 (64 at
d = 784), float32, eager, one thread. All compute the same numbers, checked before timing. Methods take turns round by
round; a ratio is vmap(jacrev(grad))'s time over a method's in the same round. Times are CPU times of one step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from tables import markdown, publish, spread, stamp
from torch import Tensor, nn

from pyro_gen.laplacians import Method, derivatives

AIMS = {100: 3.0, 784: 6.0}  # times vmap(jacrev(grad))
Energy = Callable[[Tensor], Tensor]
BASELINE = "vmap(jacrev(grad))"


def loss(gradient: Tensor, laplacian: Tensor) -> Tensor:
    """The objective from derivatives of the energy (not of log f, whose signs are the opposite)."""
    return (0.5 * gradient.square().sum(-1) - laplacian).mean()


def ours(energy: Energy, x: Tensor, method: Method) -> Tensor:
    _, gradient, laplacian = derivatives(energy, x, method)
    return loss(gradient, laplacian)


def hessian_by_row(energy: Energy, x: Tensor) -> Tensor:
    gradient = torch.func.grad(lambda row: energy(row.unsqueeze(0)).squeeze(0))
    hessian = torch.func.vmap(torch.func.jacrev(gradient))(x)
    return loss(torch.func.vmap(gradient)(x), hessian.diagonal(dim1=1, dim2=2).sum(-1))


def reverse_loop(energy: Energy, x: Tensor) -> Tensor:
    """The usual loop, by plain autograd."""
    y = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)
    laplacian = torch.zeros(len(y))
    for k in range(y.shape[1]):
        laplacian = laplacian + torch.autograd.grad(gradient[:, k].sum(), y, create_graph=True)[0][:, k]
    return loss(gradient, laplacian)


METHODS: dict[str, Callable[[Energy, Tensor], Tensor]] = {
    "pyro_gen, forward": partial(ours, method=Method("forward")),
    "pyro_gen, reverse": partial(ours, method=Method("reverse")),
    "pyro_gen, vmap(jvp∘grad)": partial(ours, method=Method("vmap")),
    "loop of double backward": reverse_loop,
    BASELINE: hessian_by_row,
}


def measure(d: int, rounds: int, each: float) -> str:
    """The table at one dimension, as text."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(d, 128), nn.Softplus(), nn.Linear(128, 128), nn.Softplus(), nn.Linear(128, 1))
    x = torch.randn(64 if d > 500 else 128, d)
    weights = [p for p in net.parameters() if p is not net[-1].bias]  # which no derivative in x sees

    def energy(y: Tensor) -> Tensor:
        return net(y).squeeze(-1)

    def step(method: Callable[[Energy, Tensor], Tensor]) -> tuple[Tensor, ...]:
        value = method(energy, x)
        return value.detach(), *torch.autograd.grad(value, weights)

    truth = step(METHODS["loop of double backward"])
    repeats, times = {}, {}
    for name, method in METHODS.items():
        for got, expected in zip(step(method), truth, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        begin = time.process_time()
        step(method)
        repeats[name] = max(1, min(200, round(each / max(1e-6, time.process_time() - begin))))
        times[name] = []
    for _ in range(rounds):
        for name, method in METHODS.items():
            begin = time.process_time()
            for _ in range(repeats[name]):
                step(method)
            times[name].append((time.process_time() - begin) / repeats[name] * 1e3)
    rows = []
    for name in METHODS:
        ratios = [b / t for b, t in zip(times[BASELINE], times[name], strict=True)]
        verdict = ""
        if name == "pyro_gen, forward" and d in AIMS:
            verdict = f"{AIMS[d]:g}: {'reached' if median(ratios) >= AIMS[d] else 'missed'}"
        rows.append([name, spread(times[name]), spread(ratios), verdict])
    header = ["method", "CPU ms: median (range)", f"{BASELINE} / this", "aim"]
    return f"**d = {d}, batch {len(x)}**\n\n{markdown(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--smoke", action="store_true", help="one short round, small dimensions")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--each", type=float, default=0.3, help="CPU seconds that one timing lasts, about")
    parser.add_argument("--dimensions", type=int, nargs="*", default=[2, 10, 32, 100, 784])
    options = parser.parse_args()
    if options.write and options.smoke:
        parser.error("--write takes a whole run: leave out --smoke")
    torch.set_num_threads(1)
    dimensions, rounds, each = options.dimensions, options.rounds, options.each
    if options.smoke:
        dimensions, rounds, each = [2, 10], 1, 0.0
    text = [measure(d, rounds, each) for d in dimensions]
    note = f"*{stamp()}; {rounds} interleaved rounds; forward at every d of the loss and the gradient in the weights.*"
    publish("second_derivatives", "\n\n".join([*text, note]), options.write)


if __name__ == "__main__":
    main()
