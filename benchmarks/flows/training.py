"""The one training loop of the KL benchmark: every library's model goes through it, on a budget of CPU time.

The budget holds all that happens between asking for a model and having its best weights: building, steps, and
evaluations on the validation rows. It is CPU time of the process and of the children it has waited for. The learning
rate falls by half a cosine of the share of the budget that is spent. Weights are judged on the validation rows alone,
at fixed shares of the budget; the last evaluation ends within it, as time for it is held back. Nothing else differs
from one library to another.
"""

from __future__ import annotations

import copy
import math
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

CHECKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)  # and at the end
CLIP = 5.0
CHUNK = 5000


def cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def batches(x: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Whole batches of a new order each epoch, the same for every library."""
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - size + 1, size):
            yield x.index_select(0, order[start : start + size])


@torch.no_grad()
def log_prob(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model.log_prob(rows) for rows in x.split(CHUNK)])


def standardise(train: Tensor) -> tuple[Tensor, Tensor, float]:
    """Location and scale of the training rows, and the log-Jacobian of dividing by the scale."""
    location, scale = train.mean(0), train.std(0)
    return location, scale, -float(scale.double().log().sum())


def train(
    make: Callable[[], nn.Module],
    x: Tensor,
    validation: Tensor,
    *,
    seconds: float,
    lr: float,
    batch: int = 512,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with its best weights, and a report: steps, validation nats, times.

    x and the validation rows are standardised; the validation nats are of the standardised rows.
    """
    start, wall = cpu(), time.perf_counter()
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    stream = batches(x, batch, torch.Generator().manual_seed(seed))
    best, best_state, best_step = -math.inf, copy.deepcopy(model.state_dict()), 0
    evaluation = step = 0
    reserve, evaluation_seconds, diverged = 0.0, 0.0, False
    checks = list(CHECKS)

    def evaluate() -> None:
        nonlocal best, best_state, best_step, reserve, evaluation, evaluation_seconds
        before = cpu()
        value = float(log_prob(model, validation).double().mean())
        if value > best:  # never true of NaN
            best, best_state, best_step = value, copy.deepcopy(model.state_dict()), step
        evaluation += 1
        spent = cpu() - before
        evaluation_seconds += spent
        reserve = max(reserve, 1.2 * spent)

    evaluate()
    while True:
        share = (cpu() - start) / (seconds - reserve)
        if share >= 1:
            break
        if checks and share >= checks[0]:
            while checks and share >= checks[0]:
                checks.pop(0)
            evaluate()
            continue
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * share))
        loss = -model.log_prob(next(stream)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not math.isfinite(float(norm)):
            diverged = True
            break
        optimizer.step()
        step += 1
    evaluate()
    model.load_state_dict(best_state)
    report = {
        "steps": step,
        "best_step": best_step,
        "validation": best,
        "diverged": diverged,
        "evaluations": evaluation,
        "evaluation_seconds": evaluation_seconds,
        "cpu": cpu() - start,
        "wall": time.perf_counter() - wall,
    }
    return model, report
