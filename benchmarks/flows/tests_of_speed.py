"""What is timed: functions of no arguments on a library's model. The optimizer is torch's fused Adam for everybody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def make(test: str, model: Any, batch: int, seed: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, model_features(model), generator=generator)
    if test == "sample":

        def sample() -> Tensor:
            with torch.no_grad():
                drawn: Tensor = model.sample(batch)
            return drawn

        return sample
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    if test == "train, pg.fit's compiled step":
        return fit_step(model, optimizer, x)
    loss = {"train": likelihood, "train, torch.compile": likelihood, "vi": reverse, "vi, torch.compile": reverse}[test]
    evaluate = loss(model, x)
    if test.endswith("torch.compile"):
        evaluate = torch.compile(evaluate, dynamic=False)

    def step() -> None:
        value = evaluate()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def model_features(model: nn.Module) -> int:
    return int(model.features)


def likelihood(model: Any, x: Tensor) -> Callable[[], Tensor]:
    return lambda: -model.log_prob(x).mean()


def reverse(model: Any, x: Tensor) -> Callable[[], Tensor]:
    """KL(q ‖ N(1, I)): draws, their log-density under the flow and under the target."""
    rows = len(x)

    def loss() -> Tensor:
        drawn, log_q = model.rsample_and_log_prob(rows)
        value: Tensor = (log_q + 0.5 * (drawn - 1).square().sum(-1)).mean()
        return value

    return loss


def fit_step(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> Callable[[], object]:
    """What `pg.fit(compile=True)` runs each step: its compiled loss and gradient, then the optimizer."""
    from pyro_gen.compiled import CompiledStep

    compiled = CompiledStep(model.objective(x))

    def step() -> None:
        compiled((x,), None, len(x))
        optimizer.step()

    return step
