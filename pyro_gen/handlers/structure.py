"""The structure of a model/guide pair: one plain run shows its plates and latents, and whether the two fit together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pyro.poutine as poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.util import check_site_shape
from torch import Tensor

from pyro_gen.handlers.sites import (
    Site,
    count_rows,
    find_data_plate,
    innermost,
    plates_of,
    sample_sites,
    site_kind,
    without_subsampling,
)

__all__ = ["Structure", "check_pair", "pair_sites", "pair_traces", "require_local", "structure"]


@dataclass(frozen=True)
class Structure:
    """What one plain run of a model/guide pair shows; it holds for later runs of a program of static structure.

    Attributes:
        rows: number of rows of the first tensor of the batch.
        data_plate: name of the plate over rows, or None where the program has none.
        data_dim: its batch dimension (negative), or None.
        data_size: the full size of the data plate (more than its rows where it subsamples), or None.
        plate_nesting: the number of batch dimensions that plates use.
        model_latents: latent sites of the model.
        guide_latents: sample sites of the guide that are not auxiliary.
        global_sites: latent sites of the model and sites of the guide that stand outside the data plate.
        enumerated: names of the sites that ask for enumeration (``infer={"enumerate": "parallel"}``).
        reparameterized: True if every guide site is drawn by the reparameterization trick.
        drawn_stepwise: guide sites whose draws are made feature by feature.
        in_expectation: factors of the model whose mean over draws is meant (``infer={"in_expectation": True}``), a
            bound among them: no draw of theirs is the weight of a draw.
    """

    rows: int
    data_plate: str | None
    data_dim: int | None
    data_size: int | None
    plate_nesting: int
    model_latents: tuple[str, ...]
    guide_latents: tuple[str, ...]
    global_sites: tuple[str, ...]
    enumerated: tuple[str, ...]
    reparameterized: bool
    drawn_stepwise: tuple[str, ...] = ()
    in_expectation: tuple[str, ...] = ()

    def require_data_plate(self, purpose: str) -> str:
        """The data plate's name; a ``ValueError`` that names ``purpose`` where there is none."""
        if self.data_plate is None:
            raise ValueError(
                f"{purpose} needs one value a row, and this program has no plate over its {self.rows} rows: "
                'put the sites of a row inside `with pyro.plate("data", x.shape[0]):`'
            )
        return self.data_plate

    def require_weights(self, purpose: str) -> None:
        """Raise a ``ValueError`` that names ``purpose`` where a factor of the program holds in expectation only."""
        if self.in_expectation:
            raise ValueError(
                f"{purpose} needs the weight of each draw, and the factor {', '.join(map(repr, self.in_expectation))} "
                "of this program holds in expectation only: the logarithm of a mean of its exponentials is no bound "
                "on log p(x). Use the program whose draws have weights: of a diffusion its chain of sample sites, "
                "diffusion.chain(timesteps)"
            )


def structure(
    model: Callable[..., Any], guide: Callable[..., Any] | None, *batch: Any, **kwargs: Any
) -> tuple[Structure, list[Tensor]]:
    """Run a pair once, plainly, and report its structure and the unconstrained tensors behind its param sites."""
    with poutine.trace(param_only=True) as params:
        guide_trace, model_trace = pair_traces(model, guide, *batch, **kwargs)
    q, p = sample_sites(guide_trace), sample_sites(model_trace)
    if is_validation_enabled():  # says which site's shape does not fit its plates
        for site in (*q.values(), *p.values()):
            if site_kind(site) != "deterministic":
                site["log_prob"] = site["fn"].log_prob(site["value"])
                check_site_shape(site, cast(int, math.inf))
    rows = count_rows((*batch, *kwargs.values()), 0)  # 0: a script whose data is not passed
    plate = find_data_plate(p.values(), rows)
    dims = [f.dim for s in (*q.values(), *p.values()) for f in plates_of(s).values()]
    latents = [n for n, s in p.items() if site_kind(s) == "latent"]
    unobserved = {**{n: p[n] for n in latents}, **q}
    outside = [n for n, s in unobserved.items() if plate is None or plate.name not in plates_of(s)]
    result = Structure(
        rows=rows,
        data_plate=None if plate is None else plate.name,
        data_dim=None if plate is None else plate.dim,
        data_size=None if plate is None else plate.full_size,
        plate_nesting=-min(dims, default=0),
        model_latents=tuple(latents),
        guide_latents=tuple(n for n, s in q.items() if site_kind(s) == "latent"),
        global_sites=tuple(outside),
        enumerated=tuple(n for n, s in {**p, **q}.items() if (s["infer"] or {}).get("enumerate")),
        reparameterized=all(s["fn"].has_rsample for s in q.values() if not s["is_observed"]),
        drawn_stepwise=tuple(n for n, s in q.items() if getattr(innermost(s["fn"]), "stepwise", None) == "rsample"),
        in_expectation=tuple(n for n, s in p.items() if (s["infer"] or {}).get("in_expectation")),
    )
    tensors: list[Tensor] = []
    for site in params.trace.nodes.values():
        value: Any = site["value"]
        tensors.append(value.unconstrained() if hasattr(value, "unconstrained") else value)
    return result, tensors


def pair_traces(
    model: Callable[..., Any], guide: Callable[..., Any] | None, *batch: Any, **kwargs: Any
) -> tuple[Trace, Trace]:
    """Trace the guide, then the model replayed on it: ``(guide_trace, model_trace)``."""
    if guide is None:
        return Trace(), poutine.trace(model).get_trace(*batch, **kwargs)
    guide_trace = poutine.trace(guide).get_trace(*batch, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch, **kwargs)
    return guide_trace, model_trace


class _Record(Messenger):
    """Keep the sample sites of a run, and give those already drawn their values: a trace and a replay at less cost."""

    def __init__(self, drawn: dict[str, Site]) -> None:
        super().__init__()
        self.drawn = drawn
        self.sites: dict[str, Site] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and (site := self.drawn.get(msg["name"])) is not None:
            msg["value"], msg["infer"], msg["done"] = site["value"], site["infer"], True

    def _pyro_post_sample(self, msg: Any) -> None:
        self.sites[msg["name"]] = msg.copy()


def pair_sites(
    model: Callable[..., Any], guide: Callable[..., Any], *batch: Any, **kwargs: Any
) -> tuple[dict[str, Site], dict[str, Site]]:
    """The sample sites of the guide, and of the model run on its draws, without those of subsampling plates."""
    with _Record({}) as first:
        guide(*batch, **kwargs)
    with _Record(first.sites) as second:
        model(*batch, **kwargs)
    return without_subsampling(first.sites), without_subsampling(second.sites)


def require_local(shape: Structure, purpose: str) -> None:
    """Raise a ``ValueError`` unless every latent stands inside a plate over rows, so that rows have weights."""
    plate = shape.require_data_plate(purpose)
    if shape.global_sites:
        raise ValueError(
            f"{purpose} needs one value a row, and site {', '.join(map(repr, shape.global_sites))} stands outside the "
            f"plate {plate!r}: its weight belongs to all rows together. Condition on it, or use an objective of the "
            "whole program (pg.ELBO, pg.IWAE)"
        )


def check_pair(shape: Structure, *, summed_out: bool = False) -> None:
    """Raise a ``ValueError`` that names the sites which only one of model and guide has.

    Args:
        shape: of the pair.
        summed_out: True where latents marked for enumeration are summed out, and so may be missing from the guide.
    """
    there = {*shape.guide_latents, *(shape.enumerated if summed_out else ())}
    missing = [n for n in shape.model_latents if n not in there]
    if missing:
        raise ValueError(
            f"latent site {', '.join(map(repr, missing))} of the model is not in the guide: nothing stands in for its "
            "integral. Add it to the guide, or mark it for enumeration (infer={'enumerate': 'parallel'}) under pg.ELBO"
        )
    foreign = [n for n in shape.guide_latents if n not in shape.model_latents]
    if foreign:
        raise ValueError(
            f"guide site {', '.join(map(repr, foreign))} is not a latent site of the model "
            f"(which has {', '.join(map(repr, shape.model_latents)) or 'none'}): rename it, drop it, or mark it "
            "infer={'is_auxiliary': True}"
        )
