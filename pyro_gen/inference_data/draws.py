r"""Draws of latents, and what a model says of each of them.

A guide is traced, the model is run on its draws; MCMC brings draws of its own. What is asked of the model at a draw is
the log-probability of every site, its log joint density, its deterministics. Three ways lead there: one run with all
draws in a plate left of the program's own (for programs that broadcast), one run under ``torch.func.vmap`` (for
weights, which do not), and a loop. The loop is the reference: the other two are taken only where they agree with it
on the first and the last draw, so a program that mixes draws is looped over instead.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_gen import handlers, scopes
from pyro_gen.handlers import Site, SiteKind, sample_sites, site_kind

__all__ = ["Call", "Draws", "Evaluation", "draw_guide", "evaluate", "kinds_of", "own_parameters"]

logger = logging.getLogger("pyro_gen")

DRAWS_PLATE = "_draws"
NUMBERS = 2**20  # numbers of the largest site in one chunk of draws: what lies between is larger
FEW = 4  # draws not worth a vectorised run and its check
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
Method = Literal["plate", "vmap", "loop"]


@dataclass(frozen=True)
class Call:
    """A model, its guide (None for MCMC), and the arguments both are called with."""

    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Run without gradients, unseen by handlers outside, modules in evaluation mode."""
        with torch.no_grad(), poutine.block(), scopes.evaluation_mode(self.model, self.guide):
            yield

    def trace(self, program: Callable[..., Any]) -> Trace:
        return poutine.trace(program).get_trace(*self.args, **self.kwargs)

    def sites(self, program: Callable[..., Any]) -> dict[str, Site]:
        """The sample sites of a run of ``program``, by name."""
        return sample_sites(self.trace(program))

    @property
    def modules(self) -> list[nn.Module]:
        return [m for m in (self.model, self.guide) if isinstance(m, nn.Module)]


@dataclass
class Draws:
    """Draws of a guide: latents by name ``(draws, *shape)``, their log q, and the guide's sites in a plain run."""

    latents: dict[str, Tensor]
    log_q: Tensor  # (draws,), float64
    log_prob: dict[str, Tensor]  # of each guide site, (draws, *batch_shape)
    sites: dict[str, Site]
    point: bool  # the guide is a point mass: one draw says all


@dataclass
class Evaluation:
    """What a model says at each draw.

    Attributes:
        lp: log joint density, scales and factors included: ``(draws,)``, float64.
        log_prob: of each site, masked and unscaled: ``(draws, *batch_shape)``.
        deterministics: values by name: ``(draws, *shape)``.
        sites, kinds: the model's sites at the first draw, and what they are.
        method: how it was computed.
    """

    lp: Tensor
    log_prob: dict[str, Tensor]
    deterministics: dict[str, Tensor]
    sites: dict[str, Site]
    kinds: dict[str, SiteKind]
    method: Method


def kinds_of(sites: Mapping[str, Site], latents: Mapping[str, Any]) -> dict[str, SiteKind]:
    """What each site is, in a trace conditioned on ``latents``, whose sites look observed there."""
    return {name: "latent" if name in latents else site_kind(site) for name, site in sites.items()}


def is_point_mass(site: Site) -> bool:
    fn = site["fn"]
    while not isinstance(fn, dist.Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def refuse_subsampling(sites: Mapping[str, Site], what: str) -> None:
    """A plate that subsamples shows other rows at every run, so draws and likelihoods of its rows do not line up."""
    for site in sites.values():
        for frame in site["cond_indep_stack"]:
            if frame.size is not None and frame.full_size is not None and frame.size < frame.full_size:
                raise ValueError(
                    f"plate {frame.name!r} of the {what} subsamples {frame.size} of {frame.full_size} rows, other ones "
                    "at each run, so there is no draw or log-likelihood of each row. Make its subsample_size an "
                    "argument of the program and pass all rows here, or write the plate as long as its batch, "
                    f"pyro.plate({frame.name!r}, len(x))"
                )


def _nesting(*traces: Mapping[str, Site]) -> int:
    """Number of batch dims the programs use, so that a plate to the left of them is free."""
    dims = [0]
    for sites in traces:
        for site in sites.values():
            dims += [-f.dim for f in site["cond_indep_stack"] if f.vectorized]
            dims.append(len(site["fn"].batch_shape))
    return max(dims)


def _close(a: Tensor, b: Tensor) -> bool:
    eps = torch.finfo(a.dtype).eps if a.dtype.is_floating_point else 1.0
    eps = max(eps, torch.finfo(torch.get_default_dtype()).eps)
    a, b = a.double(), b.double()
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e3 * eps, atol=1e4 * eps, equal_nan=True)


# -------------------------------------------------------------------------------------------------------------- model
Answers = dict[tuple[str, str], Tensor]


def _read(sites: Mapping[str, Site], names: Mapping[str, SiteKind], lead: int = 0) -> Answers:
    """What is asked of a run of the model; ``lead`` is 1 for a run that holds many draws in its leftmost dim."""
    answers: Answers = {}
    lp = torch.zeros((), dtype=torch.float64)
    for name, kind in names.items():
        site = sites[name]
        if kind == "deterministic":
            answers["value", name] = site["value"]
            continue
        log_prob = site["fn"].log_prob(site["value"])
        lp = lp + _total(scale_and_mask(log_prob, scale=site["scale"], mask=site["mask"]), lead)
        if kind in ("latent", "observed"):
            answers["log_prob", name] = scale_and_mask(log_prob, mask=site["mask"])
    answers["lp", ""] = lp
    return answers


def _total(log_prob: Tensor, lead: int) -> Tensor:
    """Sum over all dims but the first ``lead``, in float64."""
    log_prob = log_prob.double()
    return log_prob.flatten(lead).sum(lead) if log_prob.dim() > lead else log_prob


def _pick(values: Mapping[str, Tensor], index: Any) -> dict[str, Tensor]:
    return {name: value[index] for name, value in values.items()}


def evaluate(call: Call, latents: Mapping[str, Tensor]) -> Evaluation:
    """Run the model at each draw.

    Args:
        call: the model and its arguments.
        latents: every latent of the model: ``(draws, *shape)``.

    Raises:
        ValueError: for a latent without draws, a discrete latent that was summed out, a plate that subsamples.
    """
    count = len(next(iter(latents.values()))) if latents else 1

    def run(values: Mapping[str, Tensor]) -> dict[str, Site]:
        return call.sites(poutine.condition(call.model, dict(values)))

    sites = run(_pick(latents, 0))
    kinds = kinds_of(sites, latents)
    refuse_subsampling(sites, "model")
    _refuse_missing(sites, kinds, latents)
    asked = {n: k for n, k in kinds.items() if k != "subsample"}
    reference = _read(sites, asked)

    def loop() -> Answers:
        runs = [reference, *(_read(run(_pick(latents, i)), asked) for i in range(1, count))]
        return {key: torch.stack([r[key] for r in runs]) for key in reference}

    def by_vmap(part: Mapping[str, Tensor]) -> Answers:
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return dict(torch.func.vmap(lambda values: _read(run(values), asked))(dict(part)))

    def by_plate(part: Mapping[str, Tensor]) -> Answers:
        size, nesting = len(next(iter(part.values()))), _nesting(sites)
        wide = {n: _widen(v, nesting - len(sites[n]["fn"].batch_shape)) for n, v in part.items()}
        model = pyro.plate(DRAWS_PLATE, size, dim=-nesting - 1)(poutine.condition(call.model, wide))
        with pyro.validation_enabled(False):
            answers = _read(call.sites(model), asked, lead=1)
        return {key: _narrow(value, size, reference[key].shape) for key, value in answers.items()}

    if count <= FEW:
        return _evaluation(loop(), sites, kinds, "loop")
    last = _read(run(_pick(latents, -1)), asked)
    largest = max([1, *(v.numel() for v in reference.values()), *(v[0].numel() for v in latents.values())])
    chunks = torch.arange(count).split(max(1, NUMBERS // largest))
    ways: list[tuple[Method, Callable[[Mapping[str, Tensor]], Answers]]] = [("plate", by_plate), ("vmap", by_vmap)]
    for method, way in ways:
        try:
            ends = way(_pick(latents, [0, -1]))
            for i, expected in ((0, reference), (-1, last)):
                for key, value in expected.items():
                    if not _close(ends[key][i], value):
                        raise ValueError(f"{' of '.join(key)} differs from a plain run")
            parts = [way(_pick(latents, chunk)) for chunk in chunks]
        except REFUSALS as error:  # the loop is the answer then, and raises what is wrong with the program itself
            logger.debug("draws are not evaluated by %s: %s", method, str(error).split("\n")[0])
            continue
        return _evaluation({key: torch.cat([p[key] for p in parts]) for key in reference}, sites, kinds, method)
    return _evaluation(loop(), sites, kinds, "loop")


def _evaluation(answers: Answers, sites: dict[str, Site], kinds: dict[str, SiteKind], method: Method) -> Evaluation:
    log_prob = {n: v for (what, n), v in answers.items() if what == "log_prob"}
    values = {n: v for (what, n), v in answers.items() if what == "value"}
    return Evaluation(answers["lp", ""], log_prob, values, sites, kinds, method)


def _widen(value: Tensor, pad: int) -> Tensor:
    """Put dims of size 1 between the draws and the value."""
    return value.reshape(value.shape[0], *[1] * pad, *value.shape[1:])


def _narrow(value: Tensor, draws: int, shape: torch.Size) -> Tensor:
    """Undo the padding: ``(draws, *shape)``; a value that depends on no draw is repeated."""
    if tuple(value.shape) == tuple(shape):  # either it depends on no draw, or the check will find that it should
        return value.expand(draws, *shape)
    return value.reshape(draws, *shape)


def _refuse_missing(sites: Mapping[str, Site], kinds: Mapping[str, SiteKind], latents: Mapping[str, Any]) -> None:
    missing = [n for n, k in kinds.items() if k == "latent" and n not in latents]
    if not missing:
        return
    listed = ", ".join(map(repr, missing))
    if any((sites[n]["infer"] or {}).get("enumerate") or sites[n]["fn"].has_enumerate_support for n in missing):
        why = "is discrete and was summed out, so it has no draws"
    else:
        why = "has no draws (MCMC keeps some latents only under save_params=)"
    raise ValueError(
        f"latent {listed} {why}, and the model cannot be run at the others alone: pass log_likelihood=False for the "
        "draws without log_likelihood, log_prior, lp and deterministics"
    )


# -------------------------------------------------------------------------------------------------------------- guide
def draw_guide(call: Call, count: int) -> Draws:
    """Draw latents from the guide: ``count`` times, or once if it is a point mass.

    Raises:
        ValueError: if the sites of model and guide do not match, or a plate subsamples.
    """
    guide = call.guide
    if guide is None:
        raise ValueError("a guide is needed to draw latents: pass a pair (model, guide)")
    guide_trace = call.trace(guide)
    model_trace = call.trace(poutine.replay(call.model, trace=guide_trace))
    q, p = sample_sites(guide_trace), sample_sites(model_trace)
    refuse_subsampling(q, "guide")
    refuse_subsampling(p, "model")
    names = tuple(n for n, s in p.items() if site_kind(s) == "latent")
    _check_pair(names, q, p)
    drawn = {n: s for n, s in q.items() if site_kind(s) in ("latent", "auxiliary")}
    point = all(is_point_mass(s) for s in drawn.values())
    if point:
        count = 1
    nesting = _nesting(q, p)

    def read(sites: Mapping[str, Site], lead: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        values, log_probs, log_q = {}, {}, torch.zeros((), dtype=torch.float64)
        for name in q:
            site = sites[name]
            values[name] = site["value"]
            log_prob = site["fn"].log_prob(site["value"])
            log_probs[name] = scale_and_mask(log_prob, mask=site["mask"])
            log_q = log_q + _total(scale_and_mask(log_prob, scale=site["scale"], mask=site["mask"]), lead)
        return values, log_probs, log_q

    def loop() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        runs = [read(q), *(read(call.sites(guide)) for _ in range(count - 1))]
        values = {n: torch.stack([r[0][n] for r in runs]) for n in q}
        return values, {n: torch.stack([r[1][n] for r in runs]) for n in q}, torch.stack([r[2] for r in runs])

    def by_plate(size: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        with pyro.validation_enabled(False):
            wide = call.sites(pyro.plate(DRAWS_PLATE, size, dim=-nesting - 1)(guide))
            values, log_probs, log_q = read(wide, lead=1)
        values = {n: v.reshape(size, *q[n]["value"].shape) for n, v in values.items()}
        shapes = {n: q[n]["fn"].batch_shape for n in q}
        return values, {n: v.reshape(size, *shapes[n]) for n, v in log_probs.items()}, log_q

    if count <= FEW:
        values, log_probs, log_q = loop()
    else:
        try:
            largest = max([1, *(s["value"].numel() for s in q.values())])
            parts = [by_plate(len(c)) for c in torch.arange(count).split(max(1, NUMBERS // largest))]
            values = {n: torch.cat([part[0][n] for part in parts]) for n in q}
            log_probs = {n: torch.cat([part[1][n] for part in parts]) for n in q}
            log_q = torch.cat([part[2] for part in parts])
            for i in (0, -1):  # given what was drawn, a plain run must find the same latents and the same log q
                free = {n: v[i] for n, v in values.items() if not is_point_mass(q[n])}
                again, _, again_q = read(call.sites(poutine.condition(guide, free)))
                if not all(_close(values[n][i], again[n]) for n in q) or not _close(log_q[i], again_q):
                    raise ValueError("draws in a plate differ from a plain run")
        except REFUSALS as error:
            logger.debug("draws of the guide are not made in a plate: %s", str(error).split("\n")[0])
            values, log_probs, log_q = loop()
    return Draws({n: values[n] for n in names}, log_q, log_probs, q, point)


def _check_pair(names: tuple[str, ...], guide: Mapping[str, Site], model: Mapping[str, Site]) -> None:
    missing = [n for n in names if n not in guide]
    if missing and any((s["infer"] or {}).get("enumerate") for s in model.values()):
        _refuse_missing(model, dict.fromkeys(missing, "latent"), {})
    handlers.check_pair(
        handlers.Structure(
            rows=0,
            data_plate=None,
            data_dim=None,
            data_size=None,
            plate_nesting=0,
            model_latents=names,
            guide_latents=tuple(n for n, s in guide.items() if site_kind(s) == "latent"),
            global_sites=(),
            enumerated=(),
            reparameterized=True,
        )
    )


@contextmanager
def own_parameters(calls: list[Call], index: int) -> Iterator[None]:
    """Let a restart read its own parameters, not those that a later one left in the param store under their names.

    Raises:
        ValueError: if two guides hold the same tensors, because the store handed those of the first to the second.
    """
    others = [c for i, c in enumerate(calls) if i != index]
    guide = calls[index].guide
    for other in others:
        if not isinstance(guide, nn.Module) or not isinstance(other.guide, nn.Module):
            raise ValueError(
                "guides given as chains must be modules (AutoGuides, PyroModules): functions with pyro.param share one "
                "global store, so that only the parameters of the last fit are left"
            )
        if {id(p) for p in guide.parameters()} & {id(p) for p in other.guide.parameters()}:
            raise ValueError(
                "two of the guides given as chains hold the same parameters: call pyro.clear_param_store() between "
                "restarts, or the store hands the tensors of the first to the second"
            )
    mine = {id(p) for m in calls[index].modules for p in m.parameters()}
    foreign = {id(p) for c in others for m in c.modules for p in m.parameters()} - mine
    store = pyro.get_param_store()
    state = store.get_state()
    if not any(id(p) in foreign for p in state["params"].values()):
        yield
        return
    kept = {n: p for n, p in state["params"].items() if id(p) not in foreign}
    constraints = {n: c for n, c in state["constraints"].items() if n in kept}
    with store.scope({"params": kept, "constraints": constraints}):
        yield
