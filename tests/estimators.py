"""Losses with their gradients: at one seed, or in the mean over repeats with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import torch
from torch import Tensor


def evaluate(loss: Callable[[], Tensor], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss at a seed, with its gradient in every parameter of the store."""
    torch.manual_seed(seed)
    value = loss()
    params = dict(pyro.get_param_store().named_parameters())
    grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    found = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads, strict=True)}
    return value.detach(), found


def assert_same(
    one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]], rtol: float = 1e-9
) -> None:
    torch.testing.assert_close(one[0], two[0], rtol=rtol, atol=rtol)
    for name in two[1]:
        torch.testing.assert_close(one[1][name], two[1][name], rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def repeat(loss: Callable[[], Tensor], repeats: int) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Means and standard errors of a loss and of its gradients."""
    params = dict(pyro.get_param_store().named_parameters())
    values, grads = [], []
    for _ in range(repeats):
        value = loss()
        found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        values.append(value.detach())
        grads.append([torch.zeros_like(p) if g is None else g for p, g in zip(params.values(), found, strict=True)])
    value, root = torch.stack(values), math.sqrt(repeats)
    stacked = {n: torch.stack([g[i] for g in grads]) for i, n in enumerate(params)}
    means = {n: g.mean(0) for n, g in stacked.items()}
    errors = {n: g.std(0) / root for n, g in stacked.items()}
    return value.mean(), value.std() / root, means, errors


def worst(means: dict[str, Tensor], errors: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest deviation of a mean from the exact value, in standard errors."""
    z = [((means[n] - e).abs() / errors[n].clamp_min(1e-12)).max() for n, e in exact.items()]
    return float(torch.stack(z).max())
