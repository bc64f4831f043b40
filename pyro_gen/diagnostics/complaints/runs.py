"""What checks look at: a few plain runs of a pair, after which everything is as it was.

Two kinds of run. A *plain* one is what a loss does: the guide, then the model on the guide's draws. A run *on leaves*
repeats the model with x and the latents cut off from what they came from, so that the graph of a log-probability ends
in what it depends on: parameters, x, latents.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_gen import handlers, scopes
from pyro_gen.base import Calls
from pyro_gen.handlers import Site, site_kind

__all__ = [
    "Failure",
    "Lenient",
    "Pair",
    "Run",
    "examine",
    "leaves_of",
    "modules_of",
    "moved_by_rows",
    "run_model",
    "untouched",
]

RUNS = 3  # plain runs: a random program need not show all of itself in one
RAISED = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
Sites = dict[str, Site]


@dataclass(frozen=True)
class Failure:
    """Something the pair raised: ``part`` is the model, the guide, or the log-probability at ``site``."""

    part: str
    site: str | None
    error: Exception


@dataclass
class Run:
    """Sample sites of model and guide from one run; each that could be scored has a masked ``"log_prob"``."""

    model: Sites
    guide: Sites = field(default_factory=dict)

    def total(self) -> Any:
        """log w of the run, without scales."""
        gain: Any = sum(s["log_prob"].sum() for s in self.model.values() if "log_prob" in s)
        return gain - sum(s["log_prob"].sum() for s in self.guide.values() if "log_prob" in s)


@dataclass
class Pair:
    """A model and guide with what their runs showed.

    Attributes:
        model, guide: the callables; guide None where there is none.
        batch: what they are called with. x: its first tensor, or None. rows: of x, 0 without it.
        objective: name of the objective asked for. smooth: whether it looks for kinks. total: rows of all data.
        modules: every module found behind model and guide. owned: model and guide as far as they are modules.
        runs: plain runs. leaf: the model on leaves, None where it could not be run so.
        x_leaves: leaves of the batch. z_leaves: of the latents, by site.
        announced: tensors behind param sites, by id.
        subsamples: indices of subsampling plates that the model set itself, and what the guide made of them.
        failures: what was raised.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    batch: tuple[Any, ...]
    objective: str | None
    smooth: bool
    total: int | None
    modules: list[nn.Module]
    owned: dict[str, nn.Module]
    runs: list[Run] = field(default_factory=list)
    leaf: Run | None = None
    x_leaves: list[Tensor] = field(default_factory=list)
    z_leaves: dict[str, Tensor] = field(default_factory=dict)
    announced: dict[int, str] = field(default_factory=dict)
    subsamples: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def x(self) -> Tensor | None:
        return next((t for t in self.batch if isinstance(t, Tensor)), None)

    @property
    def rows(self) -> int:
        return handlers.count_rows(self.batch, 0)

    @property
    def sites(self) -> Sites:
        """The model's sites in the first run; none if it did not run."""
        return self.runs[0].model if self.runs else {}

    @property
    def guide_sites(self) -> Sites:
        return self.runs[0].guide if self.runs else {}

    @property
    def plate(self) -> Any | None:
        """The frame of the plate over rows."""
        return handlers.find_data_plate(self.sites.values(), self.rows)

    def of_kind(self, *kinds: str) -> Sites:
        return {n: s for n, s in self.sites.items() if site_kind(s) in kinds}

    @property
    def summed_out(self) -> set[str]:
        return {n for n, s in self.of_kind("latent").items() if (s["infer"] or {}).get("enumerate")}

    def named(self) -> dict[str, Tensor]:
        """Trainable tensors that belong to a module or a param site, by name."""
        found: dict[int, tuple[str, Tensor]] = {}
        for module in self.modules:
            prefix = next((f"{n}." for n, m in self.owned.items() if m is module), "")
            for name, parameter in module.named_parameters():
                found.setdefault(id(parameter), (prefix + name, parameter))
        for name, tensor in pyro.get_param_store()._params.items():
            found.setdefault(id(tensor), (name, tensor))
        return {name: p for name, p in found.values() if p.requires_grad}

    def names(self, tensors: Mapping[int, Tensor]) -> list[str]:
        """The names of some trainable tensors."""
        known = {id(p): name for name, p in self.named().items()}
        strange = [f"a tensor of shape {tuple(t.shape)}" for i, t in tensors.items() if i not in known]
        return [name for i, name in known.items() if i in tensors] + strange


def leaves_of(value: Any) -> dict[int, Tensor]:
    """The leaves that a tensor's graph ends in, by id."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return {}
    if value.grad_fn is None:
        return {id(value): value}
    found: dict[int, Tensor] = {}
    seen, stack = {value.grad_fn}, [value.grad_fn]
    while stack:
        node: Any = stack.pop()
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def modules_of(program: Any) -> list[nn.Module]:
    """The modules behind a callable: itself, its owner, or what its function and those wrapped in it hold."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    stack = [program]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nn.Module):
            found[id(part)] = part
            stack += [part.function] if isinstance(part, Calls) else []
        elif isinstance(part, partial):
            stack += [part.func, *part.args, *part.keywords.values()]
        elif inspect.ismethod(part):
            stack += [part.__self__, part.__func__]
        elif inspect.isfunction(part):
            stack += [cell.cell_contents for cell in part.__closure__ or () if _filled(cell)]
            named = (part.__globals__.get(name) for name in part.__code__.co_names)
            stack += [value for value in named if isinstance(value, nn.Module)]
        elif part is program:  # an object with a __call__ of its own
            stack += [value for value in getattr(part, "__dict__", {}).values() if isinstance(value, nn.Module)]
    return list(found.values())


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  an empty cell says so by an error
    except ValueError:
        return False
    return True


@contextmanager
def untouched(modules: list[nn.Module]) -> Iterator[None]:
    """Put everything back afterwards: attributes and buffers of modules, the parameter store, the generators.

    What a lazy guide has built at its first run is forgotten again, so that its next first run is like this one.
    """
    parts = {m: None for root in modules for m in root.modules()}
    owners: list[dict[str, Any]] = [m.__dict__ for m in parts]
    owners += [m._pyro_context.__dict__ for m in parts if hasattr(m, "_pyro_context")]
    kept: list[tuple[Any, Any]] = []
    for owner in owners:
        _keep(owner, kept)
    trainable = [(p, p.requires_grad) for m in modules for p in m.parameters()]
    store, state = pyro.get_param_store(), get_rng_state()
    try:
        with scopes.preserved_state(*modules), store.scope(store.get_state()):
            yield
    finally:
        set_rng_state(state)
        for container, content in kept:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _keep(container: Any, kept: list[tuple[Any, Any]]) -> None:
    if type(container) not in (dict, OrderedDict, list, set) or any(container is c for c, _ in kept[-50:]):
        return
    kept.append((container, container.copy()))
    if type(container) is not set:
        for value in container.values() if isinstance(container, dict) else container:
            _keep(value, kept)


class Lenient(Messenger):
    """Take validation from distributions made before it was switched off: they carry it along when they expand."""

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], Distribution) and _validates(msg["fn"]):
            msg["fn"] = _lenient(msg["fn"])


def _validates(fn: Any) -> bool:
    return fn._validate_args or any(_validates(v) for v in vars(fn).values() if isinstance(v, Distribution))


def _lenient(fn: Any) -> Any:
    result = copy.copy(fn)
    result._validate_args = False
    for key, value in vars(fn).items():
        if isinstance(value, Distribution):
            result.__dict__[key] = _lenient(value)
    return result


def examine(pair: Pair) -> None:
    """Run the pair and note on it what is seen; called inside :func:`untouched`."""
    with poutine.block(), scopes.hide_bare_parameters(), Lenient(), poutine.trace(param_only=True) as params:
        for _ in range(RUNS):
            run = _plain(pair)
            if run is not None:
                pair.runs.append(run)
            if pair.failures:
                break
        for name, site in params.trace.nodes.items():
            value: Any = site["value"]
            pair.announced[id(value.unconstrained() if hasattr(value, "unconstrained") else value)] = name
        if pair.runs:
            _on_leaves(pair)


def _plain(pair: Pair) -> Run | None:
    guide_trace = poutine.Trace()
    try:
        if pair.guide is not None:
            guide_trace = poutine.trace(pair.guide).get_trace(*pair.batch)
    except RAISED as error:
        pair.failures.append(Failure("guide", None, error))
    try:
        model_trace = poutine.trace(poutine.replay(pair.model, trace=guide_trace)).get_trace(*pair.batch)
        _note_subsamples(pair, guide_trace, model_trace)
    except RAISED as error:
        pair.failures.append(Failure("model", None, error))
        return None
    run = Run(handlers.sample_sites(model_trace), handlers.sample_sites(guide_trace))
    for part, sites in (("model", run.model), ("guide", run.guide)):
        _score(pair, part, sites)
    return run


def _score(pair: Pair, part: str, sites: Sites) -> None:
    for name, site in sites.items():
        if site_kind(site) == "deterministic":
            continue
        try:
            site["log_prob"] = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
        except RAISED as error:
            pair.failures.append(Failure(f"log-probability in the {part}", name, error))


def _note_subsamples(pair: Pair, guide_trace: Any, model_trace: Any) -> None:
    """Where the guide draws indices too, compare what the model would have taken of itself, twice."""
    names = [n for n, s in model_trace.nodes.items() if s["type"] == "sample" and site_kind(s) == "subsample"]
    shared = [n for n in names if n in guide_trace.nodes]
    if pair.runs or not shared:
        return
    first, second = (poutine.trace(pair.model).get_trace(*pair.batch) for _ in range(2))
    for name in shared:
        own, again = (torch.as_tensor(t.nodes[name]["value"]) for t in (first, second))
        replayed = torch.as_tensor(model_trace.nodes[name]["value"])
        if torch.equal(own, again) and not torch.equal(own, replayed):
            pair.subsamples[name] = (own, replayed)


def run_model(pair: Pair, batch: tuple[Any, ...], latents: dict[str, Any] | None = None) -> Sites:
    """The model's sites on another batch, its latents as they were in the first run, or as given."""
    drawn = poutine.Trace()
    for name, site in pair.sites.items():
        if not site["is_observed"]:
            drawn.add_node(name, **{**site, "value": (latents or {}).get(name, site["value"])})
    with poutine.block(), scopes.hide_bare_parameters(), Lenient():
        return handlers.sample_sites(poutine.trace(poutine.replay(pair.model, trace=drawn)).get_trace(*batch))


def moved_by_rows(pair: Pair, data: list[Tensor]) -> set[str]:
    """The model's sites whose log-probability changes when the rows of these tensors are turned round.

    For dependence that no graph shows: of whole numbers, or through a conversion to them.
    """
    turned = tuple(p.flip(0) if any(p is t for t in data) and p.dim() else p for p in pair.batch)
    try:
        there = run_model(pair, turned)
        return {n for n, s in there.items() if "log_prob" in pair.sites[n] and not _as_before(s, pair.sites[n])}
    except RAISED:  # as it may for rows in another order: then it looks at them
        return set(pair.sites)


def _as_before(there: Site, here: Site) -> bool:
    log_prob = scale_and_mask(there["fn"].log_prob(there["value"]), mask=there["mask"])
    return log_prob.shape == here["log_prob"].shape and torch.allclose(log_prob, here["log_prob"], equal_nan=True)


def _on_leaves(pair: Pair) -> None:
    batch = tuple(_leaf(part) for part in pair.batch)
    latents = {n: _leaf(s["value"]) for n, s in pair.of_kind("latent", "auxiliary").items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gradients that are dropped, as by float(x)
            run = Run(run_model(pair, batch, latents))
    except RAISED:  # a model that takes its data apart outside of torch: what needs this run is not looked at
        return
    for site in run.model.values():
        if site_kind(site) != "deterministic":
            try:
                site["log_prob"] = site["fn"].log_prob(site["value"])
            except RAISED:
                continue  # said of the plain run
    pair.leaf = run
    pair.x_leaves = [t for t in batch if isinstance(t, Tensor) and t.requires_grad]
    pair.z_leaves = {n: t for n, t in latents.items() if isinstance(t, Tensor) and t.requires_grad}


def _leaf(part: Any) -> Any:
    """A tensor of its own on the same storage, to be found in graphs; anything else as it is."""
    if isinstance(part, Tensor) and part.dtype.is_floating_point:
        return part.detach().requires_grad_()
    return part
