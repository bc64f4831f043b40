"""What there is to convert, and how each gives its draws: MCMC, guides, fits, programs."""

from __future__ import annotations

import datetime
import inspect
import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, SVI
from pyro.infer.autoguide import AutoGuide
from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_gen import scopes
from pyro_gen.base import Bounded, EvidenceMethod, Exact, ObjectiveModule, Program
from pyro_gen.checks import check_count, describe
from pyro_gen.fitting import FitResult
from pyro_gen.fitting.batches import as_batch
from pyro_gen.inference_data.containers import wrap
from pyro_gen.inference_data.draws import Call, draw_guide, own_parameters
from pyro_gen.inference_data.groups import Chains, Parts, bayesian_groups, predictive_group, prior_groups
from pyro_gen.inference_data.markov import markov_groups
from pyro_gen.inference_data.programs import add_history, has_global_latents, program_groups
from pyro_gen.inference_data.variables import SAMPLE_DIMS, Variable, datasets, plain, to_array
from pyro_gen.samplers import Draws
from pyro_gen.statistics import pareto_k

__all__ = ["to_inference_data"]

DRAWS = 500
TAKES = (
    "pyro.infer.MCMC, pyro.infer.SVI, a pair (model, guide), an AutoGuide, a program, an objective module, the result "
    "of pg.fit, the draws of a sampler's run, or a list of runs as chains"
)


def to_inference_data(
    source: Any,
    data: Any = None,
    *,
    model: Any = None,
    draws: int | None = None,
    coords: Mapping[str, Sequence[Hashable]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = None,
    log_likelihood: bool = True,
    predictive: bool = False,
    prior: int = 0,
    importance: EvidenceMethod | int | None = 1000,
    max_rows: int = 100,
    latents: bool = True,
) -> Any:
    r"""Convert a result of inference for ArviZ: an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x).

    Args:
        source: an ``MCMC`` after its run, an ``SVI``, a pair ``(model, guide)``, an ``AutoGuide``, a guide with
            ``model=``, an objective module, the result of ``pg.fit``, a program, the `Draws` of a sampler's run; or a
            list of runs of one kind, which become chains. Modules are run in evaluation mode.
        data: what the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments. MCMC knows
            it. Of a program: rows x of shape ``(rows, *event_shape)``, or ``(x, context)``; best rows held out.
        model: the model, where ``source`` is a guide that does not know it.
        draws: number of draws from a guide, a chain (default 500); MCMC brings its own, a point mass gives one.
        coords: labels by dim, as in ArviZ. dims: names of the dims of a variable; both win over what the plates say.
        seed: makes the result repeatable and leaves the global generators as they were.
        log_likelihood: False leaves out ``log_likelihood``, ``log_prior``, ``lp`` and deterministics, for a model that
            cannot be run at its draws (discrete latents that were summed out).
        predictive: also draw data at each draw, group ``posterior_predictive``.
        prior: also draw that often from the model, groups ``prior`` and ``prior_predictive``.
        importance: of programs: draws for the evidence of each row, or a method of evidence (of unnormalised programs
            one of log Z, as ``pg.AnnealedImportanceSampling()``); None leaves it out. A diffusion in collapsed form has
            no weights: its bound is taken at 4 draws of the noise, unless a method is given.
        max_rows: of programs: rows that get draws of their latents, the first ones; all rows get their evidence.
        latents: of programs: False leaves those draws out, which of a diffusion's chain are a whole path each.

    Returns:
        The groups that the module's page lists. Plates are dims; ``infer={"event_dims": [...]}`` of a site names its
        event dims; other dims are ``{site}_dim_{k}``. Iterations of a sequential plate, ``y_0``, ``y_1`` …, are one
        variable ``y``. Masked entries are left out of ``log_likelihood`` and nan in ``observed_data``; scales
        (``poutine.scale``) change ``lp`` and nothing else. A plate named like a variable gets ``_id`` appended.

    Raises:
        TypeError: for a source of another type, or one without a model (a kernel of a potential function).
        ValueError: for missing data, sites that do not match, a plate that subsamples, discrete latents that were
            summed out, labels that do not fit.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("school", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide = lambda y: pyro.sample("mu", dist.Normal(y.mean(), 0.5))
        >>> idata = to_inference_data((model, guide), torch.tensor([1.0, 2.0, 3.0]), draws=50, seed=0)
        >>> dict(idata["log_likelihood"]["y"].sizes)
        {'chain': 1, 'draw': 50, 'school': 3}
    """
    if draws is not None:
        check_count(draws, "draws")
    check_count(max_rows, "max_rows")
    if isinstance(importance, int):
        check_count(importance, "importance")
    if isinstance(prior, bool) or not isinstance(prior, int) or prior < 0:
        raise ValueError(f"prior must be a number of draws, 0 for none, got {prior!r}")
    if isinstance(source, (list, tuple)) and not source:
        raise ValueError(f"source is an empty {type(source).__name__}: give {TAKES}")
    with ExitStack() as stack:
        if seed is not None:
            stack.enter_context(scopes.forked_generators(seed))
        program = _program(source)
        parts = None
        if isinstance(source, Draws):
            _refuse_options(data=data, model=model, draws=draws, predictive=predictive or None, prior=prior or None)
            parts = markov_groups(source)
            parts.attrs[""] |= _device_of(source.x) | {"chain_kind": "MCMC chain"}
        if program is not None:
            batch = as_batch(_in_memory(_need(data, "the rows x to convert")), program)
            if not (
                isinstance(program, Bounded) and not isinstance(program, Exact) and has_global_latents(program, batch)
            ):
                if prior:
                    raise ValueError(
                        "prior= belongs to models with global latents: draw from a program by program.sample(n)"
                    )
                parts = program_groups(
                    program,
                    batch,
                    draws=draws or DRAWS,
                    max_rows=max_rows,
                    importance=importance,
                    predictive=predictive,
                    latents=latents,
                )
                parts.attrs[""] |= {"family": type(program).__name__, "inference_view": "frequentist"}
                parts.attrs[""] |= _device_of(program.template())
        if parts is None:
            chains, more, point = _chains(source, data, model, draws)
            parts = bayesian_groups(chains, point=point, log_likelihood=log_likelihood)
            _add_stats(parts, chains, more)
            if predictive:
                parts.add("posterior_predictive", predictive_group(chains))
            if prior:
                for group, variables in zip(("prior", "prior_predictive"), prior_groups(chains[0], prior), strict=True):
                    parts.add(group, variables)
            drawn = next(iter(chains[0].latents.values()), torch.empty(0))
            parts.attrs[""] |= _device_of(drawn) | {"inference_view": "frequentist" if point else "bayesian"}
            parts.attrs[""]["chain_kind"] = "MCMC chain" if more else "restart"
    if isinstance(source, FitResult):
        add_history(parts, source)
    parts.attrs[""] |= _describe(source, seed)
    root = plain(parts.attrs.pop(""))
    return wrap(datasets(parts.groups, coords, dims, parts.attrs), root)


def _need(data: Any, what: str) -> Any:
    if data is None:
        raise ValueError(f"data is missing: give {what}, to_inference_data(source, data)")
    return data


def _refuse_options(**given: Any) -> None:
    """Refuse what is said of models with latents where the draws of a sampler are converted."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}= is for models and guides: draws of a sampler are converted as they are")


def _in_memory(data: Any) -> Any:
    """The batches of a DataLoader, one after the other."""
    if not isinstance(data, DataLoader):
        return data
    batches = [b if isinstance(b, (tuple, list)) else (b,) for b in data]
    if not batches or not all(isinstance(part, Tensor) for batch in batches for part in batch):
        raise TypeError("the DataLoader must yield tensors, or tuples of tensors with x first")
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def _device_of(tensor: Tensor) -> dict[str, Any]:
    return {"device": str(tensor.device), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _program(source: Any) -> Program | None:
    if isinstance(source, FitResult):
        source = source.module
    if isinstance(source, ObjectiveModule):
        return source.program
    return source if isinstance(source, Program) else None


# ------------------------------------------------------------------------------------------------------------- sources
def _chains(source: Any, data: Any, model: Any, draws: int | None) -> tuple[list[Chains], list[dict[str, Any]], bool]:
    """The draws of each run, what MCMC says of them, and whether they are a point estimate."""
    runs = list(source) if isinstance(source, list) else [source]
    mcmc = [isinstance(run, AbstractMCMC) for run in runs]
    if all(mcmc):
        if draws is not None:
            raise ValueError("draws= is for guides: MCMC brings its own draws, MCMC(num_samples=...)")
        converted = [_mcmc(run, data) for run in runs]
        return [c for c, _ in converted], [m for _, m in converted], False
    if any(mcmc):
        raise TypeError("a list of runs is of one kind: MCMC and guides were mixed")
    calls = [_call(run, data, model) for run in runs]
    if draws is not None and draws < 2 and len(calls) > 1:
        raise ValueError(f"draws={draws} of each chain is too few: give at least 2")
    chains, points = [], []
    for i, call in enumerate(calls):

        @contextmanager
        def scope(i: int = i, call: Call = call) -> Any:
            with own_parameters(calls, i), call.quiet():
                yield

        with scope():
            drawn = draw_guide(call, draws or DRAWS)
        latents = {n: v.unsqueeze(0) for n, v in drawn.latents.items()}
        chains.append(Chains(call, latents, (1, len(drawn.log_q)), scope, drawn.log_q.unsqueeze(0)))
        points.append(drawn.point)
    if len(set(points)) > 1:
        raise ValueError("some of the guides are point masses and some are not: convert them apart")
    return chains, [], points[0]


def _call(source: Any, data: Any, model: Any) -> Call:
    """The pair behind a source, and its arguments."""
    if isinstance(source, FitResult):
        source = source.module
    if isinstance(source, (ObjectiveModule, SVI, Program)):
        pair = (source.model, source.guide)
    elif isinstance(source, tuple):
        if len(source) != 2:
            raise TypeError(f"a tuple is a pair (model, guide), got {len(source)} entries; several runs are a list")
        pair = source
    elif isinstance(source, AutoGuide):
        pair = (model or source.model, source)
    elif callable(source) and not isinstance(source, type):
        if model is None:
            raise TypeError(
                f"{describe(source)} is taken for a guide, and its model is missing: give model=, or a pair"
            )
        pair = (model, source)
    else:
        raise TypeError(f"source is {describe(source)}; to_inference_data takes {TAKES}")
    if isinstance(pair[0], Program) or isinstance(pair[1], Program):
        raise TypeError("model and guide are Pyro callables; of a program pass the program itself")
    if not callable(pair[0]) or not (pair[1] is None or callable(pair[1])):
        raise TypeError(f"a pair is (model, guide), two callables; got {describe(pair[0])} and {describe(pair[1])}")
    guide = pair[1]
    if isinstance(guide, AutoGuide) and getattr(guide, "prototype_trace", ()) is None:
        raise ValueError(f"this {type(guide).__name__} was never run: train it first")
    return Call(pair[0], guide if guide is not None else _nothing, *_arguments(pair[0], data))


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _arguments(model: Any, data: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: positional and keyword arguments."""
    if data is None:
        function = getattr(model, "function", model)
        try:
            inspect.signature(getattr(function, "forward", function)).bind()
        except (TypeError, ValueError):
            _need(None, "the arguments the model was trained with")
        return (), {}
    if isinstance(data, Mapping):
        return (), dict(data)
    return (tuple(data), {}) if isinstance(data, (tuple, list)) else ((data,), {})


def _mcmc(mcmc: Any, data: Any) -> tuple[Chains, dict[str, Any]]:
    """Draws and statistics of an MCMC run."""
    if not isinstance(mcmc, MCMC):
        raise TypeError(f"{type(mcmc).__name__} keeps statistics and no draws: run pyro.infer.MCMC")
    samples = mcmc._samples
    if samples is None:
        raise ValueError("this MCMC has no draws yet: call mcmc.run(...) first")
    model = getattr(mcmc.kernel, "model", None)
    if model is None:
        raise TypeError(
            f"this {type(mcmc.kernel).__name__} was built from a potential function: there is no model to say what the "
            "plates, the data and the likelihood are. Build it from the model, or pass ArviZ's from_dict the draws of "
            "mcmc.get_samples(group_by_chain=True)"
        )
    args, kwargs = _arguments(model, data) if data is not None else (tuple(mcmc._args or ()), dict(mcmc._kwargs or {}))
    if not samples:
        raise ValueError("this MCMC has no latents to convert")
    shape = tuple(next(iter(samples.values())).shape[:2])
    call = Call(model, None, args, kwargs)
    diagnostics: list[dict[str, Any]] = [d or {} for d in mcmc._diagnostics]
    stats: dict[str, Any] = {"kernel": type(mcmc.kernel).__name__, "warmup": mcmc.warmup_steps}
    if all("divergences" in d for d in diagnostics):
        diverging = np.zeros(shape, dtype=bool)
        for chain, found in enumerate(diagnostics):
            diverging[chain, list(found["divergences"])] = True
        stats["diverging"] = diverging
    if all("acceptance rate" in d for d in diagnostics):
        stats["acceptance_rate"] = [float(d["acceptance rate"]) for d in diagnostics]
    return Chains(call, dict(samples), (shape[0], shape[1]), call.quiet), stats


def _add_stats(parts: Parts, chains: Sequence[Chains], mcmc: Sequence[Mapping[str, Any]]) -> None:
    """What the sampler, or the guide, says of its draws."""
    if mcmc:
        if all("diverging" in m for m in mcmc):
            diverging = np.concatenate([m["diverging"] for m in mcmc])
            parts.add("sample_stats", {"diverging": Variable(diverging, SAMPLE_DIMS)})
        rates = [rate for m in mcmc for rate in m.get("acceptance_rate", [])]
        marks = {"acceptance_rate": rates} if rates else {}
        parts.attrs.setdefault("sample_stats", {}).update(marks, tuning_steps=mcmc[0]["warmup"])
        parts.attrs.get("posterior", {}).update(tuning_steps=mcmc[0]["warmup"])
        return
    if "lp" not in parts.groups.get("sample_stats", {}) or not chains[0].latents:
        return
    log_q = np.concatenate([to_array(c.log_q) for c in chains if c.log_q is not None])
    log_weight = parts.groups["sample_stats"]["lp"].values - log_q
    if log_weight.shape[1] == 1:
        return  # a point mass has no density
    stats = {
        "log_q": Variable(log_q, SAMPLE_DIMS, {"long_name": "log density of the guide"}),
        "log_weight": Variable(log_weight, SAMPLE_DIMS, {"long_name": "lp - log_q"}),
    }
    parts.add("sample_stats", stats)
    error = log_weight.std(1, ddof=1) / log_weight.shape[1] ** 0.5
    parts.add(
        "fit",
        {
            "elbo": Variable(log_weight.mean(1), ("chain",), {"kind": "lower bound", "units": "nats"}),
            "elbo_se": Variable(error, ("chain",), {"units": "nats"}),
            "pareto_k": Variable(to_array(pareto_k(torch.as_tensor(log_weight), dim=1)), ("chain",)),
        },
    )


# --------------------------------------------------------------------------------------------------------- description
def _describe(source: Any, seed: int | None) -> dict[str, Any]:
    """Attributes of the root: where the result came from."""
    first = source[0] if isinstance(source, list) else source
    attrs: dict[str, Any] = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "creation_library": "pyro_gen",
        "creation_library_version": sys.modules["pyro_gen"].__version__,
        "creation_library_language": "Python",
        "inference_library": "pyro_gen" if isinstance(first, (FitResult, ObjectiveModule, Program, Draws)) else "pyro",
        "pyro_version": pyro.__version__,
        "torch_version": torch.__version__,
        "sample_dims": "chain, draw",
        "seed": seed,
    }
    attrs["inference_library_version"] = attrs[
        "creation_library_version" if attrs["inference_library"] == "pyro_gen" else "pyro_version"
    ]
    if isinstance(first, MCMC):
        return attrs | {"inference_method": type(first.kernel).__name__, "num_samples": first.num_samples}
    if isinstance(first, Draws):
        return attrs | {"inference_method": type(first.sampler).__name__, "num_samples": len(first)}
    module = first.module if isinstance(first, FitResult) else first
    if isinstance(module, ObjectiveModule):
        attrs |= {"objective": repr(module.objective), "inference_method": f"fit by {module.objective!r}"}
    elif isinstance(module, SVI):
        attrs["inference_method"] = f"SVI ({_name(module.guide)})"
    elif isinstance(module, tuple):
        attrs["inference_method"] = f"guide ({_name(module[1])})"
    elif not isinstance(module, Program):
        attrs["inference_method"] = f"guide ({_name(module)})"
    if isinstance(first, FitResult):
        attrs |= {"num_steps": first.steps, "config_json": json.dumps(first.config, default=str)}
        if first.config.get("seed") is not None:
            attrs["fit_seed"] = first.config["seed"]
    return attrs


def _name(guide: Any) -> str:
    return type(guide).__name__ if isinstance(guide, nn.Module) else getattr(guide, "__name__", type(guide).__name__)
