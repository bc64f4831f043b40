"""Complaints about sites: whether they fit their plates, each other, the data and the supports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_gen.diagnostics.complaints.complaint import BOUNDS, DENSITIES, LIKELIHOODS, Complaint
from pyro_gen.diagnostics.complaints.runs import Pair, leaves_of, moved_by_rows
from pyro_gen.handlers import Site, innermost, plates_of, site_kind
from pyro_gen.objectives.observed_supports import entry_support, within
from pyro_gen.targets import is_real

__all__ = [
    "batch_dims",
    "data_sites",
    "guide_sites",
    "outside_support",
    "plate_scale",
    "plates_differ",
    "raised",
    "rough_draws",
    "subsample_overridden",
    "support_mismatch",
    "value_shape",
]


def raised(pair: Pair) -> Iterator[Complaint]:
    """What the pair raised, with advice where it is a plate that does not fit."""
    for failure in pair.failures:
        said = str(failure.error).split("Trace Shapes:")[0]  # the table that Pyro appends
        what = f"{type(failure.error).__name__}: {' '.join(said.split())}".rstrip(". ")
        if mismatch := re.search(r"Shape mismatch inside plate.* at site (\S+) dim", what):
            yield Complaint(
                "plate-mismatch",
                mismatch.group(1),
                f"the {failure.part} raised {what}",
                "a plate is as long as the rows it gets, `pyro.plate('data', x.shape[0])` (or N with subsample_size=), "
                "and dimensions that are no rows are declared by .to_event(k)",
                error=failure.error,
            )
            continue
        where = f" of site {failure.site!r}" if failure.site else ""
        advice = "run it by itself on this batch; the error is kept in `.error`"
        yield Complaint("raises", failure.site, f"the {failure.part}{where} raised {what}", advice, error=failure.error)


def batch_dims(pair: Pair) -> Iterator[Complaint]:
    """Batch dimensions that no plate covers: rows without a plate, rows × rows, or a missing ``.to_event``."""
    found: dict[str, None] = {}
    for part, sites in (("model", pair.sites), ("guide", pair.guide_sites)):
        for name, site in sites.items():
            if "log_prob" not in site or name in found:
                continue
            shape, frames = tuple(site["log_prob"].shape), plates_of(site).values()
            open_dims = [d for d in range(-len(shape), 0) if shape[d] > 1 and all(f.dim != d for f in frames)]
            if open_dims:
                found[name] = None
                yield _open(pair, part, name, shape, open_dims, [f.size for f in frames])


def _open(pair: Pair, part: str, name: str, shape: Any, dims: list[int], plates: list[int]) -> Complaint:
    has = f"site {name!r} of the {part} has log-probabilities of shape {shape}"
    if any(shape[d] in plates for d in dims):
        return Complaint(
            "rows-by-rows",
            name,
            f"{has}, every row against every other: a column (n, 1) has met a vector (n,)",
            "give both one shape, by .squeeze(-1), or by .to_event(1) on what is (n, 1)",
        )
    if pair.plate is None and shape[dims[0]] == pair.rows > 1:
        rest = f" and declare what is one draw by .to_event({len(dims) - 1})" if len(dims) > 1 else ""
        return Complaint(
            "missing-plate",
            name,
            f"{has}, and no plate runs over its {pair.rows} rows",
            f'put the sites of a row inside `with pyro.plate("data", x.shape[0]):`{rest}',
        )
    return Complaint(
        "missing-to-event",
        name,
        f"{has}, and no plate covers dimension {', '.join(map(str, dims))}",
        f"declare it part of one draw by .to_event({len(dims)}) on the distribution (in a PyroSample too), or put the "
        "site in a plate",
    )


def value_shape(pair: Pair) -> Iterator[Complaint]:
    """Observed values whose event is not that of their distribution, and is broadcast against it in silence."""
    for name, site in pair.of_kind("observed").items():
        event, value = tuple(site["fn"].event_shape), site["value"]
        if event and isinstance(value, Tensor) and tuple(value.shape[-len(event) :]) != event:
            yield Complaint(
                "value-shape",
                name,
                f"site {name!r} observes a value of shape {tuple(value.shape)} under a distribution of event shape "
                f"{event}, and one is broadcast against the other",
                "reshape the value, or the parameters of the distribution, so that the last dimensions agree",
            )


def plate_scale(pair: Pair) -> Iterator[Complaint]:
    """Mini-batches (``total=``) of a program whose data plate does not say so."""
    if pair.total is None or not pair.runs:
        return
    plate, total, batch = pair.plate, pair.total, f"the batch stands for {pair.total} rows"
    if plate is None:
        advice = 'put the sites of a row inside `with pyro.plate("data", N, subsample_size=len(x)):`'
        yield Complaint("plate-scale", None, f"{batch}, and no plate runs over rows to count them", advice)
        return
    counted = plate.full_size or plate.size
    shared = [n for n, s in pair.sites.items() if "log_prob" in s and plate.name not in plates_of(s)]
    if counted != total and (shared or counted != plate.size):
        whose = f"site {', '.join(map(repr, shared))} of all rows weighs too much" if shared else "the loss is off"
        yield Complaint(
            "plate-scale",
            plate.name,
            f"{batch}, and the plate {plate.name!r} counts {counted}, so {whose}",
            f'write `pyro.plate("{plate.name}", {total}, subsample_size=len(x))`, or call the loss with total={total}',
        )


def subsample_overridden(pair: Pair) -> Iterator[Complaint]:
    """A plate given its indices in the model, and others by the guide: replay takes the guide's."""
    for name in pair.subsamples:
        yield Complaint(
            "subsample-overridden",
            name,
            f"the model gives the plate {name!r} its subsample, and the guide draws another, which replaces it",
            "give both the same indices, or let the guide make its plates from the model's (create_plates=)",
            BOUNDS,
        )


def guide_sites(pair: Pair) -> Iterator[Complaint]:
    """Sites that only one of model and guide has, and observations in the guide."""
    if not pair.sites or any(f.part == "guide" for f in pair.failures):
        return
    latents, q = pair.of_kind("latent"), pair.guide_sites
    for name in latents:
        if name not in q and name not in pair.summed_out:
            text = f"latent site {name!r} of the model is not in the guide: nothing stands in for its integral"
            advice = "add it to the guide, or sum a discrete one out by infer={'enumerate': 'parallel'}"
            yield Complaint("free-latent", name, text, advice)
    for name, site in q.items():
        kind = site_kind(site)
        if kind == "observed":
            text = f"the guide observes {name!r}, and q(z | x) is a distribution of latents only"
            yield Complaint("guide-observes", name, text, "take obs= out of the guide", BOUNDS)
        elif kind == "latent" and name not in latents:
            there = pair.sites.get(name)
            if there is not None and site_kind(there) == "observed":
                text, advice = f"the guide draws {name!r}, which the model observes", "take the site out of the guide"
            else:
                has = ", ".join(map(repr, latents)) or "none"
                text = f"guide site {name!r} is not a latent site of the model, which has {has}"
                advice = "rename it, drop it, or mark it infer={'is_auxiliary': True}"
            yield Complaint("foreign-guide-site", name, text, advice, BOUNDS)


def _shared(pair: Pair) -> Iterator[tuple[str, Site, Site]]:
    """Name, model site and guide site of the latents that both have."""
    for name, site in pair.of_kind("latent").items():
        if name in pair.guide_sites:
            yield name, site, pair.guide_sites[name]


def plates_differ(pair: Pair) -> Iterator[Complaint]:
    """Latents whose plates, or events, are others in the guide."""
    for name, p, q in _shared(pair):
        ours, theirs = set(plates_of(p)), set(plates_of(q))
        whole = tuple(q["value"].shape) == tuple(p["fn"].shape())
        if ours != theirs and not (isinstance(innermost(q["fn"]), dist.Delta) and whole):
            named = [", ".join(map(repr, sorted(s))) or "no plate" for s in (ours, theirs)]
            lost = " (one draw for all rows)" if ours - theirs and not whole else ""
            text = f"latent site {name!r} stands in {named[0]} in the model and in {named[1]} in the guide{lost}"
            yield Complaint("plates-differ", name, text, "put it into the same plates, by name, in both", BOUNDS)
        elif p["fn"].event_dim != q["fn"].event_dim:
            dims = f"{p['fn'].event_dim} event dimensions in the model and {q['fn'].event_dim} in the guide"
            advice = "make .to_event(k) alike in both"
            yield Complaint("events-differ", name, f"latent site {name!r} has {dims}", advice, BOUNDS)
        elif not whole:
            text = f"latent site {name!r} has shape {tuple(p['fn'].shape())} in the model and "
            text += f"{tuple(q['value'].shape)} in the guide"
            yield Complaint("shapes-differ", name, text, "make the two shapes one", BOUNDS)


def support_mismatch(pair: Pair) -> Iterator[Complaint]:
    """Guides that draw, or may draw, where the prior has no density."""
    for name, p, q in _shared(pair):
        prior, guide = support_of(p["fn"]), support_of(q["fn"])
        if prior is None:
            continue
        drawn = [(r.model[name]["fn"], r.guide[name]["value"]) for r in pair.runs if name in r.guide]
        out = any(not bool(fn.support.check(v).all()) for fn, v in drawn if bool(torch.isfinite(v).all()))
        may = guide is not None and not isinstance(innermost(q["fn"]), dist.Delta) and not _fits(guide, prior)
        if out or may:
            does = "has drawn" if out else "can draw"
            made = f"{type(innermost(q['fn'])).__name__} guide" if may else "guide"
            yield Complaint(
                "support-mismatch",
                name,
                f"the {made} of latent site {name!r} {does} values outside the prior's support, "
                f"{entry_support(prior)}, where log p is −∞ or wrong",
                f"use a guide distribution on that support, such as {type(innermost(p['fn'])).__name__}, or a "
                "TransformedDistribution (Pyro's autoguides do so)",
                BOUNDS,
            )


def support_of(fn: Any) -> Any:
    """The support of a distribution, or None where it says nothing of it."""
    try:
        return fn.support
    except NotImplementedError:
        return None


def _fits(guide: Any, prior: Any) -> bool:
    if guide.is_discrete != prior.is_discrete:
        return False
    q, p = entry_support(guide), entry_support(prior)
    return within(q, p) and (is_real(p) or not is_real(q))


def rough_draws(pair: Pair) -> Iterator[Complaint]:
    """Guide sites without reparameterized draws that nothing sums out."""
    for name, site in pair.guide_sites.items():
        if site_kind(site) == "latent" and not site["fn"].has_rsample and not (site["infer"] or {}).get("enumerate"):
            discrete = (support := support_of(site["fn"])) is not None and support.is_discrete
            advice = (
                "sum it out by infer={'enumerate': 'parallel'}"
                if discrete
                else "take a distribution with rsample, as Normal or a flow, where gradients pass through the draws"
            )
            text = f"guide site {name!r} ({type(innermost(site['fn'])).__name__}) is not reparameterized"
            text += ": its gradient is a score-function estimate, noisy, and IWAE's 'dreg' and 'stl' refuse it"
            yield Complaint("rough-draws", name, text, advice, BOUNDS)


def outside_support(pair: Pair) -> Iterator[Complaint]:
    """Observed values outside the support of their site; validation would say so, and it may be off."""
    for name, site in pair.of_kind("observed").items():
        support, value = support_of(site["fn"]), site["value"]
        if support is None or not isinstance(value, Tensor) or not bool(torch.isfinite(value).all()):
            continue  # what is not finite is a complaint of its own
        inside = support.check(value)
        for mask in (site["mask"], getattr(site["fn"], "_mask", None)):
            if isinstance(mask, Tensor) and mask.dim() <= inside.dim():
                inside = inside | ~mask
        if not bool(inside.all()):
            row = f", first at {tuple((~inside).nonzero()[0].tolist())}" if inside.dim() else ""
            text = f"site {name!r} observes values outside its support, {entry_support(support)}{row}"
            advice = "rescale the data, or take a distribution that lives where they do"
            yield Complaint("outside-support", name, text, advice)


# -------------------------------------------------------------------------------------------------------------- data
def data_sites(pair: Pair) -> Iterator[Complaint]:
    """Where x is: nowhere, twice, in parts, or only as a function of itself."""
    if not pair.sites:
        return
    observed, factors, x = pair.of_kind("observed"), pair.of_kind("factor"), pair.x
    if not observed and not factors:
        text, advice = "the model observes nothing", "give the data to a site, obs=x, or to a factor"
        yield Complaint("nothing-observed", None, text, advice)
        return
    if x is None:
        return
    tensors = [t for t in pair.batch if isinstance(t, Tensor)]
    given = [n for n, s in observed.items() if any(shares(s["value"], t) for t in tensors)]
    twice = [n for n in given if shares(observed[n]["value"], x) and observed[n]["value"].numel() == x.numel()]
    parts = [n for n in given if shares(observed[n]["value"], x) and n not in twice]
    if len(twice) > 1:
        text = f"x is observed at {len(twice)} sites, {', '.join(map(repr, twice))}: the model is a product of their "
        text += "densities, which is not normalised"
        advice = "observe x once, and write the other as a factor of an unnormalised model (pg.energy)"
        yield Complaint("observed-twice", twice[1], text, advice)
    if not twice and len(parts) > 1 and pair.objective in DENSITIES:
        text = f"x is observed in parts, at sites {', '.join(map(repr, parts))}"
        yield Complaint("observed-in-parts", parts[0], text, "observe x itself at one site, obs=x", DENSITIES)
    if pair.leaf is None or not pair.x_leaves:
        return
    from_x = {id(t) for t in pair.x_leaves}
    depends = {n for n, s in pair.leaf.model.items() if from_x & set(leaves_of(s.get("log_prob")))}
    if not depends and not given and not moved_by_rows(pair, tensors):
        text = "the density of the model does not depend on the batch"
        advice = "observe x itself, obs=x: data kept in a closure do not change with mini-batches"
        yield Complaint("batch-unused", None, text, advice)
    yield from _transformed(pair, {n: s for n, s in observed.items() if n not in given}, from_x)


def shares(value: Any, x: Tensor) -> bool:
    """Whether a value is x, a view of it, or of one storage with it."""
    if not isinstance(value, Tensor):
        return False
    return value is x or (value.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() != 0)


def _transformed(pair: Pair, observed: dict[str, Site], from_x: set[int]) -> Iterator[Complaint]:
    """Observed functions of x: a density of x lacks their Jacobian."""
    assert pair.leaf is not None
    own = {**{id(t): t for t in pair.x_leaves}, **{id(t): t for t in pair.z_leaves.values()}}
    for name, site in observed.items():
        reached = leaves_of(pair.leaf.model[name]["value"]) if name in pair.leaf.model else {}
        if not from_x & set(reached) or _same_numbers(site["value"], pair.batch):
            continue
        learnt = pair.names({i: t for i, t in reached.items() if i not in own})
        made = f"site {name!r} observes a function of x instead of x"
        if learnt:
            text = f"{made}, with trainable {', '.join(learnt[:3])} in it: without its Jacobian the likelihood grows "
            text += "without end as it shrinks the data"
            yield Complaint("learnt-data", name, text, "make it a transform of the distribution (pg.Flow does so)")
        else:
            text = f"{made}, so log p(x) lacks the log Jacobian of that function"
            advice = "transform the data before they enter the program, or give the distribution the transform"
            yield Complaint("transformed-data", name, text, advice, (*LIKELIHOODS, *DENSITIES))


def _same_numbers(value: Tensor, batch: tuple[Any, ...]) -> bool:
    """Whether a copy holds numbers of the batch only: rows of it, in whatever order."""
    there = [t.detach() for t in batch if isinstance(t, Tensor) and t.numel() >= value.numel()]
    return any(bool(torch.isin(value.detach(), t.to(value.dtype)).all()) for t in there)
