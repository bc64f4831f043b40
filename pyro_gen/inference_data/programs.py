"""What the groups of a fitted program hold: latents of rows, evidence of rows, the fit's history.

The weights are a point estimate, so ``posterior`` (scalar parameters, if any) has one draw and there is no group
``log_likelihood``: LOO of one draw, or of log p(x | z), means nothing. Rows are scored by their evidence, in group
``log_evidence`` with its kind and error, which is what ``pg.compare`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyro_gen import handlers
from pyro_gen.base import Bounded, Evidence, EvidenceMethod, Exact, Noised, Program, Unnormalized
from pyro_gen.evidence import ImportanceSampling, log_evidence
from pyro_gen.fitting import FitResult
from pyro_gen.handlers import Site
from pyro_gen.inference_data.containers import REASON
from pyro_gen.inference_data.draws import Call, Draws, draw_guide, evaluate
from pyro_gen.inference_data.groups import Chains, Model, Parts, predictive_group
from pyro_gen.inference_data.noise_levels import DRAWS, bound_of_rows
from pyro_gen.inference_data.variables import SAMPLE_DIMS, Axes, Variable, axes_of, to_array
from pyro_gen.programs import Diffusion

__all__ = ["add_history", "has_global_latents", "program_groups"]

FITTED = (
    "the weights of this result are a point estimate, one draw, and LOO needs draws of them from a posterior; log "
    "p(x | z) at the draws of z is conditional and no likelihood of the model. Score rows that were held out: their "
    "log p(x) is in group log_evidence, pg.compare takes the result as it is, pg.to_elpd gives ELPDData"
)


def has_global_latents(program: Program, batch: tuple[Tensor, ...]) -> bool:
    """Whether latents stand outside the plate over rows, so that they are no row's own."""
    call = Call(program.model, program.guide, batch)
    with call.quiet():
        shape, _ = handlers.structure(program.model, program.guide, *(part[:2] for part in batch))
    return bool(shape.global_sites)


def program_groups(
    program: Program,
    batch: tuple[Tensor, ...],
    *,
    draws: int,
    max_rows: int,
    importance: EvidenceMethod | int | None,
    predictive: bool,
    latents: bool = True,
) -> Parts:
    """Groups of a program: latent, latent_stats, log_evidence or energy, posterior, observed_data, constant_data.

    A program with a factor that holds in expectation (a diffusion in collapsed form) draws noise, no latents.

    Args:
        batch: the rows, all of which are scored; the first ``max_rows`` of them get draws of their latents.
        importance: how the evidence is had; an int is a number of draws of the guide of a `Bounded` program, None
            leaves it out. An `Unnormalized` one takes a method that estimates log Z.
        latents: False leaves their draws out.
    """
    count, parts = len(batch[0]), Parts()
    parts.attrs[""][REASON] = FITTED
    few = tuple(part[:max_rows] for part in batch)
    call = Call(program.model, program.guide, few)
    parts.add("posterior", _scalar_parameters(program))
    with call.quiet():
        values: Mapping[str, Tensor] = {}
        drawn, weighted = None, True
        if isinstance(program, Bounded) and not isinstance(program, Exact):
            shape, _ = handlers.structure(program.model, program.guide, *(part[:2] for part in batch))
            weighted = not shape.in_expectation
            latents = latents and weighted
            drawn = draw_guide(call, draws if latents else 1)
            values = drawn.latents
        said = evaluate(call, values)
        model = Model(said.sites, said.kinds)
        plate = handlers.find_data_plate(said.sites.values(), len(few[0]))
        if plate is None:
            raise ValueError(
                f"{type(program).__name__} has no plate over its {len(few[0])} rows: pyro.plate('data', len(x))"
            )
        data = plate.name
        first = {data: (np.arange(len(few[0])), count)}
        if drawn is not None and latents:
            weight = _rows(said.log_prob, model.axes, data) - _rows(drawn.log_prob, _axes(drawn.sites), data)
            about = {"rows": len(few[0]), "rows_given": count, "draws": len(weight)}
            parts.add("latent", _cut(model.values({n: v.unsqueeze(0) for n, v in values.items()}), first), **about)
            parts.add(
                "latent_stats",
                _cut(_latent_stats(drawn, model, weight, data, not isinstance(program, Noised)), first),
                **about,
            )
        if predictive:
            chains = Chains(call, {n: v.unsqueeze(0) for n, v in values.items()}, (1, _count(values)), call.quiet)
            parts.add("posterior_predictive", _cut(predictive_group([chains]), first))
        observed = model.observed()
        for name, variable in _cut(observed, first).items():
            whole = name in model.sites and model.sites[name]["value"] is few[0]
            parts.add(
                "observed_data", {name: replace(variable, values=to_array(batch[0]), kept={}) if whole else variable}
            )
        if len(batch) > 1:
            context = to_array(batch[1])
            dims = (data, *(f"context_dim_{k}" for k in range(1, context.ndim)))
            parts.add("constant_data", {"context": Variable(context, dims)})
    site = next(
        (n for n in observed if n in model.sites and model.sites[n]["value"] is few[0]), next(iter(observed), "x")
    )
    if isinstance(program, Bounded) and importance is not None and (isinstance(program, Diffusion) or not weighted):
        bound = bound_of_rows(parts, program, batch)
        if isinstance(importance, int) and not weighted:
            importance = _Bound(bound)
    if isinstance(importance, int):  # what does not broadcast over draws is scored in another way
        importance = ImportanceSampling(importance, vectorize_particles=said.method == "plate")
    _score_rows(parts, program, batch, importance, site, data)
    return parts


@dataclass(frozen=True)
class _Bound:
    """The bound of each row, where draws have no weights, and nothing better was asked for."""

    bound: Evidence
    likelihood_kind: ClassVar[str] = "elbo"

    def log_evidence(self, program: Program, x: Tensor, context: Tensor | None = None) -> Evidence:
        return self.bound

    def __repr__(self) -> str:
        return f"lower_bound at {DRAWS} draws of the noise"


def _count(latents: Mapping[str, Tensor]) -> int:
    return len(next(iter(latents.values()))) if latents else 1


def _axes(sites: Mapping[str, Site]) -> dict[str, Axes]:
    return {n: axes_of(n, s) for n, s in sites.items()}


def _rows(log_prob: Mapping[str, Tensor], axes: Mapping[str, Axes], data: str) -> Tensor:
    """Log-probabilities of all sites of a row, summed: ``(draws, rows)``, float64."""
    total: Tensor | float = 0.0
    for name, value in log_prob.items():
        names = axes[name].names[: axes[name].batch]
        if data in names:
            others = [1 + k for k, n in enumerate(names) if n != data]
            total = total + (value.double().sum(others) if others else value.double())
    assert isinstance(total, Tensor)
    return total


def _cut(variables: Mapping[str, Variable], first: Mapping[str, tuple[Any, int]]) -> dict[str, Variable]:
    """Say of variables along the rows that only the first ones are here."""
    return {
        n: replace(v, kept={d: k for d, k in first.items() if d in v.dims and len(k[0]) < k[1]})
        for n, v in variables.items()
    }


def _latent_stats(drawn: Draws, model: Model, weight: Tensor, data: str, closed: bool) -> dict[str, Variable]:
    """Moments of the guide's latents, closed forms where they are not those of one step of a chain given the last."""
    stats: dict[str, Variable] = {}
    for name, values in drawn.latents.items():
        if not values.is_floating_point():
            continue
        fn = drawn.sites[name]["fn"]
        try:
            if not closed:
                raise NotImplementedError
            mean, sd, source = fn.mean, fn.variance.sqrt(), "guide"
        except NotImplementedError:  # a flow, a chain: no closed form
            mean, sd, source = values.mean(0), values.std(0), "draws"
        for what, value in (("mean", mean), ("sd", sd)):
            stats[f"{name}_{what}"] = replace(model.axes[name].variable(value), attrs={"of": source})
    error = weight.std(0) / len(weight) ** 0.5 if len(weight) > 1 else torch.full_like(weight[0], torch.nan)
    stats["elbo"] = Variable(to_array(weight.mean(0)), (data,), {"kind": "lower bound", "units": "nats"})
    stats["elbo_se"] = Variable(to_array(error), (data,), {"units": "nats"})
    return stats


def _scalar_parameters(program: Program) -> dict[str, Variable]:
    """Single numbers among the model's parameters, as a shared scale; no weights and biases of networks."""
    return {
        name: Variable(to_array(parameter).reshape(1, 1), SAMPLE_DIMS, {"point_estimate": True})
        for name, parameter in program.model.named_parameters()
        if parameter.numel() == 1 and name.split(".")[-1] not in ("weight", "bias")
    }


def _score_rows(
    parts: Parts,
    program: Program,
    batch: tuple[Tensor, ...],
    method: EvidenceMethod | None,
    site: str,
    data: str,
) -> None:
    """Add what each row is worth: its evidence where there is one, its log-density, or nothing."""
    dims = (*SAMPLE_DIMS, data)
    open_z = program if isinstance(program, Unnormalized) and not isinstance(program, Exact) else None
    if isinstance(method, ImportanceSampling) and open_z is not None:  # the default: it has nothing to say of a log Z
        method = None
    if isinstance(program, Exact) or (method is not None and isinstance(program, (Bounded, Unnormalized))):
        evidence = log_evidence(program, *batch, method=method or ImportanceSampling(1))  # an exact one needs none
        mean = evidence.mean()
        attrs: dict[str, Any] = {"kind": evidence.kind, "likelihood_kind": "exact", "units": "nats"}
        if open_z is not None:
            attrs |= {"likelihood_kind": "normalized", "method": repr(method), "shared_error": evidence.shared_error}
        elif not isinstance(program, Exact):
            kind = getattr(method, "likelihood_kind", "marginal_iwae")
            attrs |= {"likelihood_kind": kind, "method": repr(method)}
            attrs |= {"n_importance": getattr(method, "num_samples", None)}
        if mean.standard_error is not None:
            attrs["mc_se"] = float(mean.standard_error)
        rows = {site: Variable(to_array(evidence.value)[None, None], dims, attrs)}
        for name in ("standard_error", "effective_sample_size", "pareto_k"):
            value = getattr(evidence, name)
            if value is not None:
                rows[name] = Variable(to_array(value), (data,))
        parts.add("log_evidence", rows, **attrs)
    if open_z is not None:
        with Call(program.model, None, batch).quiet():
            value = to_array(open_z.log_density(*batch))
        attrs = {"kind": "unnormalized", "likelihood_kind": "unnormalized", "long_name": "log f(x) = log p(x) + log Z"}
        parts.add("energy", {site: Variable(value[None, None], dims, attrs)}, **attrs)
    elif not isinstance(program, Bounded):
        parts.attrs[""]["likelihood_kind"] = "implicit"


def add_history(parts: Parts, result: FitResult) -> None:
    """Add group ``fit``: loss, gradient norm, learning rate and seconds by step, and the validation loss."""
    history = result.history
    units = {
        "loss": "nats per datum" if result.module.objective.loss_is in ("log-likelihood", "lower bound") else "",
        "seconds": "s",
    }
    columns: dict[str, Variable] = {}
    for name, values in history.columns.items():
        array = np.asarray(values, dtype=np.float64)
        dim = "step" if len(array) == len(history) else f"{name}_step"
        columns[name] = Variable(array, (dim,), {"units": units.get(name.split(".")[0], "")})
    if history.validation:
        steps, losses = (np.asarray(v) for v in zip(*history.validation, strict=True))
        kept = {"validation_step": (steps, len(history))}
        columns["validation"] = Variable(losses, ("validation_step",), {"units": units["loss"]}, kept)
    marks = {"best_step": result.best_step, "stopped_at": result.stopped_at, "seconds": result.seconds}
    parts.add("fit", columns, **marks)
