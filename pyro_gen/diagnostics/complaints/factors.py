r"""Complaints about Z: factors whose normalizer moves in training, and energies that a score cannot learn.

A factor :math:`e^{-E_\theta(x)}` leaves :math:`f_\theta(x) = p_\theta(x)\, Z(\theta)`, and a likelihood or bound takes
log f for log p: it can always gain by raising Z, without end and without a word. Whether a factor does so is decided
by what its graph ends in: trainable tensors *and* something that is integrated over, x or a latent. A factor of
parameters alone (a penalty), or of x alone, has a Z that does not move.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_gen.diagnostics.complaints.complaint import LIKELIHOODS, SCORES, SMOOTH, Complaint
from pyro_gen.diagnostics.complaints.runs import Pair, leaves_of, moved_by_rows, run_model
from pyro_gen.diagnostics.complaints.sites import shares, support_of
from pyro_gen.handlers import plates_of
from pyro_gen.laplacians import kinks

__all__ = ["kinked_energy", "unhandled_normalizer", "unidentified_bias"]


def unhandled_normalizer(pair: Pair) -> Iterator[Complaint]:
    """Factors whose Z depends on what is trained, or on latent weights, under losses that take f for p."""
    if pair.leaf is None:
        return
    plate = pair.plate
    for name, site in pair.of_kind("factor").items():
        if (site["infer"] or {}).get("in_expectation"):  # a bound on log p, in expectation over its auxiliary sites
            continue
        reached = leaves_of(pair.leaf.model[name].get("log_prob"))
        in_x = _depends_on_data(pair, name, reached)
        in_z = [n for n, t in pair.z_leaves.items() if id(t) in reached]
        own = {id(t) for t in (*pair.x_leaves, *pair.z_leaves.values())}
        trained = pair.names({i: t for i, t in reached.items() if i not in own})
        weights = [n for n in in_z if plate is None or plate.name not in plates_of(pair.sites[n])]
        if not (in_x and (trained or weights)) and not (in_z and trained):
            continue
        net = (site["infer"] or {}).get("energy")
        by = f"trainable {_listed(trained)}" if trained else f"latent {_listed(weights)}"
        over = "x" if in_x else f"latent {_listed(in_z)}"
        text = f"factor {name!r} depends on {by} and on {over}, so its normalizer Z does too, and a bound or "
        if trained:
            text += "likelihood takes it for constant: its loss falls without end as Z grows"
        else:
            text += "likelihood leaves it out: the posterior would be another"
        ways = "pg.PseudoLikelihood" if _is_discrete(pair) else "pg.ScoreMatching or its kin, pg.NoiseContrastive"
        advice = f"train by {ways} or pg.ContrastiveDivergence"
        if not in_x:
            advice = "normalise the prior: a flow, or a base measure of fixed parameters"
        if net is None:
            advice += "; if the factor is a normalised log-probability (a likelihood written by hand), all is well"
        yield Complaint("unhandled-normalizer", name, text, advice, LIKELIHOODS)


def _is_discrete(pair: Pair) -> bool:
    supports = [support_of(s["fn"]) for s in pair.of_kind("observed").values()]
    return any(s is not None and s.is_discrete for s in supports) or not (
        pair.x is None or pair.x.dtype.is_floating_point
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _depends_on_data(pair: Pair, name: str, reached: dict[int, Tensor]) -> bool:
    """Whether a factor moves with what is observed: by its graph, or for whole numbers by turning the rows round."""
    tensors = [t for t in pair.batch if isinstance(t, Tensor)]
    if not tensors:
        return True  # data in a closure: it cannot be told
    values = [s["value"] for s in pair.of_kind("observed").values()]
    data = [t for t in tensors if any(shares(v, t) for v in values)] or tensors[:1]
    if any(shares(leaf, t) for leaf in pair.x_leaves if id(leaf) in reached for t in data):
        return True
    return not all(t.dtype.is_floating_point for t in data) and name in moved_by_rows(pair, data)


def kinked_energy(pair: Pair) -> Iterator[Complaint]:
    """Energies whose gradient jumps: second derivatives miss the jumps, and a flat energy would be the best."""
    factors = pair.of_kind("factor")
    asked = pair.objective in SMOOTH and pair.smooth
    if pair.x is None or not pair.x.dtype.is_floating_point or pair.leaf is None:
        return
    if not asked and (not factors or pair.objective is not None):
        return
    names = list(pair.sites if asked else factors)

    def density(y: Tensor) -> Any:
        sites = run_model(pair, (y, *pair.batch[1:]))
        return [sites[n]["fn"].log_prob(sites[n]["value"]) for n in names if "log_prob" in pair.sites[n]]

    found = kinks(density, pair.x) if pair.batch[0] is pair.x else []
    if found:
        site = next(iter(factors)) if len(factors) == 1 else None
        yield Complaint(
            "kinked-energy",
            site,
            f"log f has {', '.join(map(repr, found))} in it, where its gradient jumps: second derivatives do not see "
            "them, and a flat energy would be the minimum",
            "use a smooth activation (torch.nn.SiLU, Softplus, Tanh) or pg.FiniteDifferenceScoreMatching, or say "
            "check_smooth=False if the data never meet the kink",
            SMOOTH,
        )


def unidentified_bias(pair: Pair) -> Iterator[Complaint]:
    """Parameters that only shift an energy of x: the score does not contain them."""
    if pair.leaf is None or not pair.x_leaves or pair.batch[0] is not pair.x:
        return
    x, latents = pair.x_leaves[0], {id(t) for t in pair.z_leaves.values()}
    weights: dict[int, Tensor] = {}
    for name in pair.of_kind("factor"):
        reached = leaves_of(pair.leaf.model[name].get("log_prob"))
        if id(x) in reached and not latents & set(reached):  # summed over a latent a shift is none
            weights |= reached
    weights = {i: t for i, t in weights.items() if all(t is not leaf for leaf in pair.x_leaves)}
    if not weights:
        return
    total: Any = sum(s["log_prob"].sum() for s in pair.leaf.model.values() if "log_prob" in s)
    (score,) = torch.autograd.grad(total, x, create_graph=True)
    gradients: Any = [None] * len(weights)
    if score.requires_grad:
        gradients = torch.autograd.grad(score.square().sum(), list(weights.values()), allow_unused=True)
    for name in pair.names({i: t for (i, t), g in zip(weights.items(), gradients, strict=True) if g is None}):
        yield Complaint(
            "unidentified-parameter",
            name,
            f"{name} shifts log f by a constant, which the score does not contain, so it gets no gradient",
            "leave it out, nn.Linear(…, 1, bias=False): distributed training waits for its gradient for ever",
            SCORES,
        )
