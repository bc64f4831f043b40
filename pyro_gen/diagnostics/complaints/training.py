"""Complaints about training: parameters that are not found or not reached, numbers that are not finite."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_gen.diagnostics.complaints.complaint import Complaint
from pyro_gen.diagnostics.complaints.runs import Pair, Run, leaves_of

__all__ = ["not_finite", "unreached_parameters", "unseen_parameters"]


def unseen_parameters(pair: Pair) -> Iterator[Complaint]:
    """Parameters in the loss that no trainer finds: model and guide are methods, or functions around a module."""
    given = {id(t) for t in pair.batch if isinstance(t, Tensor)}
    seen = {id(p) for m in pair.owned.values() for p in m.parameters()} | set(pair.announced) | given
    missed: dict[int, Tensor] = {}
    for run in pair.runs:
        missed |= {i: t for i, t in leaves_of(run.total()).items() if i not in seen}
    if not missed:
        return
    names = pair.names(missed)
    text = (
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} would not be trained: the loss depends "
    )
    owner = getattr(pair.model, "__self__", None)
    if isinstance(owner, nn.Module) and inspect.ismethod(pair.guide) and pair.guide.__self__ is owner:
        text += f"on it, but model and guide are two methods of one {type(owner).__name__}, so no trainer finds it"
        advice = "make model and guide two modules with a forward each, or call pyro.module inside both"
    else:
        text += "on it, but no module that was given holds it, and no param site names it"
        advice = "pass modules as model and guide, or call pyro.module('net', net) inside"
    yield Complaint("unseen-parameters", names[0], text, advice)


def unreached_parameters(pair: Pair) -> Iterator[Complaint]:
    """Trainable parameters of model and guide on which no log-probability depends."""
    if not pair.runs or pair.failures:
        return
    wanted = {id(p): p for m in pair.owned.values() for p in m.parameters() if p.requires_grad}
    for run in pair.runs:
        wanted = {i: p for i, p in wanted.items() if i not in leaves_of(run.total())}
    names = pair.names(wanted)
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        text = f"the log-densities of model and guide do not depend on {names[0]}{more}, so it gets no gradient"
        advice = (
            "use it, take it out, or freeze it by requires_grad_(False): distributed training waits for it for ever"
        )
        yield Complaint("unreached-parameters", names[0], text, advice)


def not_finite(pair: Pair) -> Iterator[Complaint]:
    """Log-probabilities and gradients that are not finite at this first batch, by site."""
    found = False
    for run in pair.runs[:1]:
        for part, sites in (("model", run.model), ("guide", run.guide)):
            for name, site in sites.items():
                if "log_prob" not in site or bool(torch.isfinite(site["log_prob"]).all()):
                    continue
                found = True
                yield _bad(part, name, site)
    if pair.runs and not found:
        yield from _gradients(pair, pair.runs[0])


def _bad(part: str, name: str, site: Any) -> Complaint:
    log_prob, value = site["log_prob"], site["value"]
    bad = (~torch.isfinite(log_prob)).nonzero()
    where = f", first at {tuple(bad[0].tolist())}" if log_prob.dim() else ""
    text = (
        f"the log-probability of site {name!r} of the {part} is not finite in {len(bad)} of {log_prob.numel()} places"
    )
    if isinstance(value, Tensor) and value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
        advice = "its value is not finite: clean the data, or bound what the network gives"
    else:
        worst = [n for n, p in _parameters(site["fn"]) if not bool(torch.isfinite(p).all())]
        advice = (
            f"its {', '.join(worst)} is not finite" if worst else "its value lies where the density is 0 or undefined"
        )
        advice += ": look at the scale of the data, and at exp and log without bounds in the networks"
    return Complaint("not-finite", name, text + where, advice)


def _parameters(fn: Any) -> list[tuple[str, Tensor]]:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return [(n, v) for n, v in vars(fn).items() if isinstance(v, Tensor) and v.dtype.is_floating_point]


def _gradients(pair: Pair, run: Run) -> Iterator[Complaint]:
    total = run.total()
    leaves = list(leaves_of(total).values())
    if not leaves or _finite(total, leaves):
        return
    for part, sites in (("model", run.model), ("guide", run.guide)):
        for name, site in sites.items():
            if "log_prob" in site and not _finite(site["log_prob"].sum(), leaves):
                yield Complaint(
                    "gradient-not-finite",
                    name,
                    f"the log-probability of site {name!r} of the {part} is finite, and its gradient is not",
                    "a root, a logarithm or a norm stands at 0, or a mask hides a NaN (masked by `where` before the "
                    "operation, not after)",
                )


def _finite(value: Tensor, leaves: list[Tensor]) -> bool:
    if not value.requires_grad:
        return True
    gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return all(g is None or bool(torch.isfinite(g).all()) for g in gradients)
