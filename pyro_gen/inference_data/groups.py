"""What the groups of a Bayesian result hold: from draws of a Pyro model to variables by group.

``posterior`` has the latents and the deterministics, ``log_likelihood`` one variable for each observed site. Factors
and deterministics are no data and reach neither ``observed_data`` nor ``log_likelihood``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_gen.handlers import Site, SiteKind, Unobserve
from pyro_gen.inference_data.containers import REASON
from pyro_gen.inference_data.draws import Call, Evaluation, evaluate, kinds_of
from pyro_gen.inference_data.variables import (
    SAMPLE_DIMS,
    Groups,
    Variable,
    axes_of,
    series_of,
    stack_series,
    to_array,
)

__all__ = ["Chains", "Model", "Parts", "bayesian_groups", "constant_data", "predictive_group", "prior_groups"]

ONE_DRAW = (
    "this result has one draw, a point estimate, and LOO needs draws from a posterior. Score rows that were held out: "
    "pg.log_evidence(...) with pg.compare, or pg.to_elpd(...) for an ELPDData"
)
CONDITIONAL = (
    "log p(x | z) given a latent of each row's own is not a likelihood of the model: LOO of it takes the evidence by "
    "its harmonic mean, whose variance is infinite. Its values are in group conditional_log_likelihood; integrate z "
    "out instead, pg.log_evidence(pg.Bounded(model, guide, event_shape), x, method=pg.ImportanceSampling(5000)), and "
    "compare held-out rows by pg.compare"
)


@dataclass
class Parts:
    """Groups of variables and the attributes of each; ``""`` is the root."""

    groups: Groups = field(default_factory=dict)
    attrs: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})

    def add(self, group: str, variables: Mapping[str, Variable], **attrs: Any) -> None:
        if variables:
            self.groups.setdefault(group, {}).update(variables)
            self.attrs.setdefault(group, {}).update(attrs)


@dataclass
class Chains:
    """Draws of a model's latents: ``(chain, draw, *shape)`` each.

    Attributes:
        call: the model and its arguments; latents: by name; shape: number of chains, and of draws in each.
        scope: what the model is run in (its parameters, no gradients).
        log_q: log density of the guide that they were drawn from, (chain, draw); None for MCMC.
    """

    call: Call
    latents: Mapping[str, Tensor]
    shape: tuple[int, int]
    scope: Callable[[], AbstractContextManager[None]]
    log_q: Tensor | None = None

    @property
    def flat(self) -> dict[str, Tensor]:
        return {n: v.flatten(0, 1) for n, v in self.latents.items()}

    def fold(self, tensor: Tensor) -> Tensor:
        """From one leading dim of all draws to (chain, draw)."""
        return tensor.reshape(*self.shape, *tensor.shape[1:])

    def template(self) -> tuple[dict[str, Site], dict[str, SiteKind]]:
        """The sites of a plain run at the first draw, and what they are."""
        first = {n: v[0, 0] for n, v in self.latents.items()}
        sites = self.call.sites(poutine.condition(self.call.model, first))
        return sites, kinds_of(sites, first)


class Model:
    """The sites of a model as one run showed them: what they are, how their axes are called."""

    def __init__(self, sites: Mapping[str, Site], kinds: Mapping[str, SiteKind]) -> None:
        self.sites, self.kinds = sites, kinds
        self.axes = {n: axes_of(n, s, kinds[n] == "deterministic") for n, s in sites.items()}
        self.series = series_of({n: s for n, s in sites.items() if kinds[n] in ("latent", "observed")})
        self.masks = {n: _mask(sites[n]) for n in self.names("observed")}

    def names(self, *kinds: SiteKind) -> list[str]:
        return [n for n, k in self.kinds.items() if k in kinds]

    def stack(self, variables: Mapping[str, Variable]) -> dict[str, Variable]:
        """Put the iterations of sequential plates together."""
        return stack_series(variables, self.series)

    def values(self, tensors: Mapping[str, Tensor]) -> dict[str, Variable]:
        """Values of sites, (chain, draw, *shape), as variables."""
        marks: dict[str, dict[str, Any]] = {n: {"deterministic": True} for n in self.names("deterministic")}
        return self.stack({n: self.axes[n].variable(v, attrs=marks.get(n, {})) for n, v in tensors.items()})

    def observed(self) -> dict[str, Variable]:
        """The data, masked entries as nan."""
        out = {}
        for name, mask in self.masks.items():
            value = torch.broadcast_to(self.sites[name]["value"], self.axes[name].shape)
            if mask is not None:
                wide = mask.reshape(*mask.shape, *[1] * (value.dim() - mask.dim())).to(value.device)
                value = torch.where(wide, value if value.is_floating_point() else value.double(), torch.nan)
            out[name] = self.axes[name].variable(value)
        return self.stack(out)

    def plates(self, name: str) -> set[str]:
        return {f.name for f in self.sites[name]["cond_indep_stack"]}

    def own_latents(self) -> set[str]:
        """Latents that each entry of an observed site has for itself: they stand in all of its plates."""
        observed = [self.plates(o) for o in self.names("observed")]
        return {n for n in self.names("latent") for o in observed if o and o <= self.plates(n)}


def bayesian_groups(chains: Sequence[Chains], *, point: bool = False, log_likelihood: bool = True) -> Parts:
    """Groups of draws: posterior, sample_stats, log_likelihood, log_prior, observed_data, constant_data.

    Args:
        chains: draws of one model; several where chains are restarts with parameters of their own.
        point: the draws are a point estimate.
        log_likelihood: False to leave out what the model has to be run for at every draw.
    """
    parts = Parts()
    if not log_likelihood:
        with chains[0].scope():
            model = Model(*chains[0].template())
        drawn = {n: torch.cat([c.latents[n] for c in chains]) for n in chains[0].latents}
        parts.add("posterior", model.values({n: v for n, v in drawn.items() if n in model.sites}))
        parts.attrs[""][REASON] = "log_likelihood=False was asked for, so there is no log-likelihood to score"
        return _add_data(parts, chains[0].call, model)

    evaluations: list[Evaluation] = []
    for part in chains:
        with part.scope():
            evaluations.append(evaluate(part.call, part.flat))
    model = Model(evaluations[0].sites, evaluations[0].kinds)

    def chained(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([c.fold(t) for c, t in zip(chains, tensors, strict=True)])

    def log_probs(name: str) -> Variable:
        return model.axes[name].batch_variable(chained([e.log_prob[name] for e in evaluations]))

    values = {n: torch.cat([c.latents[n] for c in chains]) for n in model.names("latent")}
    values |= {n: chained([e.deterministics[n] for e in evaluations]) for n in model.names("deterministic")}
    parts.add("posterior", model.values(values))
    lp = chained([e.lp for e in evaluations])
    parts.add("sample_stats", {"lp": Variable(to_array(lp), SAMPLE_DIMS, {"long_name": "log joint density"})})
    parts.add("log_prior", model.stack({n: log_probs(n) for n in model.names("latent")}))

    cut = {n: _without_masked(n, log_probs(n), mask) for n, mask in model.masks.items()}
    pointwise = _one_index({n: v for n, v in cut.items() if v is not None})
    group, attrs, reason = _likelihood_group(model, draws=lp.numel(), point=point)
    pointwise = {n: replace(v, attrs={**v.attrs, **attrs}) for n, v in pointwise.items()}
    parts.add(group, model.stack(pointwise), method=evaluations[0].method, **attrs)
    if reason and pointwise:
        parts.attrs[""][REASON] = reason
    return _add_data(parts, chains[0].call, model)


def _add_data(parts: Parts, call: Call, model: Model) -> Parts:
    parts.add("observed_data", model.observed())
    parts.add("constant_data", constant_data(call, model))
    return parts


# --------------------------------------------------------------------------------------------------------- likelihood
def _likelihood_group(model: Model, draws: int, point: bool) -> tuple[str, dict[str, Any], str | None]:
    """The group that the observed sites' log-probabilities belong to, what kind they are, and why LOO is refused.

    Beside global latents, latents of each row's own make an ordinary hierarchy (eight schools), whose LOO is sound
    where its k̂ says so. Without them, LOO of log p(x | z) is the harmonic mean estimate of the evidence.
    """
    own = model.own_latents()
    attrs = {"kind": "exact", "likelihood_kind": "conditional" if own else "exact"}
    if own and not point and len(own) == len(model.names("latent")):
        return "conditional_log_likelihood", attrs, CONDITIONAL
    if draws == 1:
        return "log_evidence" if point and not own else "conditional_log_likelihood", attrs, ONE_DRAW
    return "log_likelihood", attrs, None


def _mask(site: Site) -> Tensor | None:
    """Which batch elements of a site are observed, or None for all: ``poutine.mask`` and ``dist.mask`` together."""
    shape = tuple(site["fn"].batch_shape)
    found = [] if site["mask"] is None else [torch.as_tensor(site["mask"])]
    fn = site["fn"]
    while True:
        if hasattr(fn, "_mask"):
            inner = torch.as_tensor(fn._mask).expand(fn.batch_shape)
            while inner.dim() > len(shape):  # masked inside an event: observed if any of it is
                inner = inner.any(-1)
            found.append(inner)
        if type(fn).__name__ not in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
            break
        fn = fn.base_dist
    if not found:
        return None
    mask = torch.ones(shape, dtype=torch.bool)
    for part in found:
        mask = mask & part.bool().cpu()
    return None if bool(mask.all()) else mask


def _without_masked(name: str, variable: Variable, mask: Tensor | None) -> Variable | None:
    """Leave out entries that are masked: they are no observations, and their zeros would count as such."""
    if mask is None:
        return variable
    seen = to_array(mask).reshape(variable.values.shape[2:])
    if not seen.any():
        return None
    if seen.ndim == 1:
        (dim,), kept = variable.dims[2:], np.flatnonzero(seen)
        return replace(variable, values=variable.values[..., kept], kept={dim: (kept, seen.size)})
    attrs = {"flattened": ", ".join(variable.dims[2:])}
    flat = variable.values.reshape(*variable.values.shape[:2], -1)[..., np.flatnonzero(seen)]
    return Variable(flat, (*variable.dims[:2], f"{name}_observed"), attrs, flat=True)


def _one_index(variables: dict[str, Variable]) -> dict[str, Variable]:
    """Call the dim of a masked site after the site, where others of the group have other positions along it."""
    positions: dict[str, set[bytes]] = {}
    for v in variables.values():
        for dim, size in zip(v.dims, v.values.shape, strict=True):
            positions.setdefault(dim, set()).add(
                v.kept[dim][0].tobytes() if dim in v.kept else np.arange(size).tobytes()
            )
    out = {}
    for name, v in variables.items():
        new = {d: f"{name}_{d}" for d in v.kept if len(positions[d]) > 1}
        dims = tuple(new.get(d, d) for d in v.dims)
        out[name] = replace(v, dims=dims, kept={new.get(d, d): k for d, k in v.kept.items()})
    return out


# --------------------------------------------------------------------------------------------------------------- data
def constant_data(call: Call, model: Model) -> dict[str, Variable]:
    """Tensors the model was given that it does not observe, by the names of its arguments.

    The first dim is called after the plate of the observed sites that is as long.
    """
    observed = [model.sites[n] for n in model.names("observed")]
    plates = {f.name: f.size for s in observed for f in s["cond_indep_stack"] if f.vectorized}
    out = {}
    for name, value in _arguments(call).items():
        if isinstance(value, np.ndarray):
            value = torch.as_tensor(value) if value.dtype.kind in "fiub" else None
        if not isinstance(value, Tensor) or any(_same(value, s["value"]) for s in observed) or name in model.kinds:
            continue
        along = [p for p, size in plates.items() if value.dim() and size == value.shape[0]]
        dims = [f"{name}_dim_{k}" for k in range(value.dim())]
        if len(along) == 1:
            dims[0] = along[0]
        out[name] = Variable(to_array(value), tuple(dims))
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.cpu(), b.cpu())))


def _arguments(call: Call) -> dict[str, Any]:
    function: Callable[..., Any] = getattr(call.model, "function", call.model)
    function = getattr(function, "forward", function)
    try:
        bound = inspect.signature(function).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):  # a handler that takes anything, or a callable without a signature
        return {**{f"arg_{i}": v for i, v in enumerate(call.args)}, **call.kwargs}
    out: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            out.update({f"{name}_{i}": v for i, v in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            out.update(value)
        else:
            out[name] = value
    return out


# --------------------------------------------------------------------------------------------------------- predictive
def predictive_group(chains: Sequence[Chains]) -> dict[str, Variable]:
    """Data drawn anew at each draw of the latents: ``posterior_predictive``."""
    drawn: list[dict[str, Tensor]] = []
    model: Model | None = None
    for part in chains:
        with part.scope():
            model = model or Model(*part.template())
            flat, names = part.flat, model.names("observed")
            program = Unobserve(names)(part.call.model)
            runs = []
            for i in range(math.prod(part.shape)):
                run = part.call.sites(poutine.condition(program, {n: v[i] for n, v in flat.items()}))
                runs.append({n: run[n]["value"] for n in names})
        drawn.append({n: part.fold(torch.stack([r[n] for r in runs])) for n in names})
    assert model is not None
    return model.values({n: torch.cat([d[n] for d in drawn]) for n in drawn[0]})


def prior_groups(part: Chains, count: int) -> tuple[dict[str, Variable], dict[str, Variable]]:
    """Latents and data drawn from the model: ``prior`` and ``prior_predictive``."""
    with part.scope():
        model, runs = Model(*part.template()), []
        for _ in range(count):
            run = part.call.sites(Unobserve(model.names("observed"))(part.call.model))
            runs.append({n: run[n]["value"] for n in model.names("latent", "deterministic", "observed")})

    def drawn(*kinds: SiteKind) -> dict[str, Variable]:
        return model.values({n: torch.stack([r[n] for r in runs]).unsqueeze(0) for n in model.names(*kinds)})

    return drawn("latent", "deterministic"), drawn("observed")
