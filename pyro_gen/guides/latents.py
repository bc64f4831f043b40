r"""Where the latents of a Pyro program stand: read off one run, so that a guide can put its own draws there.

A latent site of batch shape b and event shape e, its value unconstrained by the map T of its support, is a number of
unconstrained numbers: of each row, where the site is inside the plate over rows, of all rows together, where it is
outside. A vector of them, drawn at once, is cut into parts, and each part is folded back to ``b + e``: the row goes to
the dimension of the data plate, what stands to the left of all plates (particles, the draws of a ``Predictive``) stays
there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from pyro_gen import handlers, scopes

__all__ = ["Latent", "Layout", "Plate", "read_layout"]


@dataclass(frozen=True)
class Plate:
    """A plate to be made again: name, dimension, length, and the full size that it stands for."""

    name: str
    dim: int
    size: int
    full_size: int
    draws: bool = False  # whether its index is to be drawn here

    def make(self) -> Any:
        """A plate of that kind. Where the rows of the batch are the sample, which rows they are is not this one's
        to say: its index stays out of the trace, or a replay would put it in place of the model's."""
        if self.draws:
            return pyro.plate(self.name, self.full_size, subsample_size=self.size, dim=self.dim)
        if self.size == self.full_size:
            return pyro.plate(self.name, self.size, dim=self.dim)
        with poutine.block():
            return pyro.plate(self.name, self.full_size, subsample=torch.arange(self.size), dim=self.dim)


@dataclass(frozen=True)
class Latent:
    """A latent site: where it stands, and how its value is made of unconstrained numbers.

    Attributes:
        name: of the site.
        support: of its values, the same for every row.
        plates: the plates around it.
        batch: its batch shape but for the rows: the length of the data plate is 1.
        event: shape of an event in unconstrained numbers; event_dim: the number of dimensions of one value.
        size: numbers of a row (or of all rows together).
        start: unconstrained numbers to begin with, near the prior's median, ``(size,)``.
    """

    name: str
    support: Any
    plates: tuple[Plate, ...]
    batch: torch.Size
    event: torch.Size
    event_dim: int
    size: int
    start: Tensor

    def transform(self, like: Tensor) -> Any:
        """T, from unconstrained numbers to the support."""
        return biject_to(_mapped(self.support, lambda t: t.to(like.device)))


@dataclass(frozen=True)
class Layout:
    """The latents of a program: ``local`` inside the plate over rows, ``shared`` outside of it.

    Attributes:
        rows: number of rows of the batch; plate: the plate over them, or None.
        nesting: number of batch dimensions that the plates of latents use.
        subsamples: whether the program takes a sample of the rows of its batch itself.
        like: a tensor with the dtype and device of the latents.
    """

    rows: int
    plate: Plate | None
    shared: tuple[Latent, ...]
    local: tuple[Latent, ...]
    nesting: int
    subsamples: bool
    like: Tensor

    def split(self, u: Tensor, latents: Sequence[Latent], dim: int | None) -> Iterator[tuple[Latent, Tensor]]:
        """Cut vectors u, ``(..., D)``, into the latents' parts, each folded to batch and event shape of its site.

        ``dim`` is where the rows are in the batch shape of u, None where u belongs to all rows.
        """
        batch = u.shape[:-1]
        lead = batch[: max(len(batch) - self.nesting, 0)]
        rows = () if dim is None else (batch[dim],)
        u = u.reshape(*lead, *rows, u.shape[-1])
        position = 0
        for latent in latents:
            part = u[..., position : position + latent.size]
            position += latent.size
            full = [1] * (self.nesting - len(latent.batch)) + list(latent.batch)
            if dim is not None:
                others = [n for i, n in enumerate(full) if i != len(full) + dim]
                part = part.reshape(*lead, *rows, *others, *latent.event)
                part = part.movedim(len(lead), len(lead) + len(full) + dim)
            else:
                part = part.reshape(*lead, *full, *latent.event)
            if not lead:
                part = part.reshape(part.shape[self.nesting - len(latent.batch) :])
            yield latent, part

    def require_same(self, other: Layout) -> None:
        """A ``ValueError`` unless another batch showed the same latents."""
        mine, its = ([(n.name, n.size) for n in (*x.shared, *x.local)] for x in (self, other))
        if mine != its or [n.name for n in self.local] != [n.name for n in other.local]:
            raise ValueError(
                f"the model has latents {mine} (name, numbers a row) for {self.rows} rows, and had {its} for "
                f"{other.rows}: a guide of fixed size needs a model of static structure"
            )


def read_layout(model: Callable[..., Any], batch: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Layout:
    """Run a model once, without a trace, and read off where its latents stand."""
    with torch.no_grad(), scopes.preserved_state(model), poutine.block():
        run = InitMessenger(_start)(model)  # type: ignore[no-untyped-call, unused-ignore]
        trace = poutine.trace(run).get_trace(*batch, **kwargs)
    sites = handlers.sample_sites(trace)
    latents = {n: s for n, s in sites.items() if handlers.site_kind(s) == "latent" and not s["infer"].get("enumerate")}
    if not latents:
        raise ValueError("the model has no latent site for a guide to draw: it needs no guide, or other data")
    frame = handlers.find_data_plate(sites.values(), rows)
    if frame is not None and rows not in (frame.size, frame.full_size):
        raise ValueError(
            f"the plate {frame.name!r} has {frame.size} entries and the first tensor of the batch {rows} rows: an "
            "entry must have its row of data"
        )
    subsamples = frame is not None and frame.size != rows
    index: Any = None if frame is None else trace.nodes[frame.name]["fn"]
    if frame is not None and subsamples and index.subsample_size is None:
        raise ValueError(
            f"the plate {frame.name!r} is told which rows to take, and the batch holds all {rows}: which of them the "
            "guide is to read is not known to it. Pass the rows of the sample as the batch, or let the plate draw them "
            "(subsample_size=)"
        )
    data = None if frame is None else _plate(frame, subsamples)
    shared: list[Latent] = []
    local: list[Latent] = []
    for name, site in latents.items():
        _check(name, site)
        inside = data is not None and any(f.name == data.name for f in site["cond_indep_stack"])
        (local if inside else shared).append(_latent(name, site, data if inside else None, subsamples))
    dims = [plate.dim for latent in (*shared, *local) for plate in latent.plates]
    like = next(iter((*shared, *local))).start
    return Layout(rows, data, tuple(shared), tuple(local), -min(dims, default=0), subsamples, like.new_empty(0))


def _start(site: Any) -> Tensor:
    """A value of a site near its prior's median; where it cannot be drawn (an improper prior), one on its support."""
    try:
        value: Tensor = init_to_median(site)  # type: ignore[no-untyped-call, unused-ignore]
    except NotImplementedError:
        transform = biject_to(site["fn"].support)
        value = transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))
    return value


def _plate(frame: Any, draws: bool = False) -> Plate:
    return Plate(frame.name, frame.dim, frame.size, frame.full_size or frame.size, draws)


def _check(name: str, site: Any) -> None:
    """Refuse a latent that a flow cannot stand in for."""
    support = site["fn"].support
    if support.is_discrete:
        raise ValueError(
            f"latent site {name!r} is discrete ({support}), and a flow draws real numbers: have it summed out, "
            "infer={'enumerate': 'parallel'} on the site and pg.ELBO, or write the model with it marginalised "
            "(a mixture as the distribution)"
        )
    if isinstance(site["mask"], Tensor) or site["mask"] is False:
        raise ValueError(
            f"latent site {name!r} is masked inside the model, and the guide would count it in full: put "
            "poutine.mask around both model and guide, or leave the latent unmasked"
        )
    scale = 1.0
    for frame in site["cond_indep_stack"]:
        scale *= (frame.full_size or frame.size) / frame.size
    if abs(float(site["scale"]) - scale) > 1e-6 * scale:
        raise ValueError(
            f"latent site {name!r} is scaled by {float(site['scale']):g} inside the model, and the guide would count "
            "it in full: put poutine.scale around both model and guide"
        )


def _latent(name: str, site: Any, data: Plate | None, subsamples: bool) -> Latent:
    fn, frames = site["fn"], [f for f in site["cond_indep_stack"] if f.vectorized]
    others = [f for f in site["cond_indep_stack"] if data is None or f.name != data.name]
    for frame in others:
        if frame.full_size not in (None, frame.size):
            raise ValueError(
                f"latent site {name!r} stands in the plate {frame.name!r}, which subsamples and is not the plate over "
                "rows: give it all its entries"
            )
    support = fn.support
    if data is not None:
        support = _of_any_row(name, support, data.dim - fn.event_dim)
    try:
        u = biject_to(fn.support).inv(site["value"])
    except NotImplementedError as error:
        raise ValueError(f"latent site {name!r} has a support that no bijection is known for: {fn.support}") from error
    batch = list(site["value"].shape[: site["value"].dim() - fn.event_dim])
    event = u.shape[len(batch) :]
    if data is None:
        start = u.reshape(-1)
    else:
        start = u.movedim(len(batch) + data.dim, 0).reshape(batch[data.dim], -1).mean(0)
        batch[data.dim] = 1
    plates = tuple(_plate(f, subsamples and data is not None and f.name == data.name) for f in frames)
    start = torch.nan_to_num(start, 0.0, 0.0, 0.0)
    return Latent(name, support, plates, torch.Size(batch), event, fn.event_dim, start.numel(), start)


def _of_any_row(name: str, support: Any, dim: int) -> Any:
    """A support whose bounds, given for each row, are the same in all of them: the bounds of one."""

    def one(t: Tensor) -> Tensor:
        if t.dim() < -dim or t.shape[dim] == 1:
            return t
        first = t.narrow(dim, 0, 1)
        if not bool((t == first).all()):
            raise ValueError(
                f"latent site {name!r} has a support of its own in each row ({support}): draw it on a fixed one, such "
                "as the unit interval, and shift and scale it in the model"
            )
        return first

    return _mapped(support, one)


def _mapped(support: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A constraint with its tensors mapped."""
    changes: dict[str, Any] = {}
    for key, value in vars(support).items():
        if isinstance(value, Tensor):
            changes[key] = function(value)
        elif isinstance(value, Constraint):
            changes[key] = _mapped(value, function)
    if not changes:
        return support
    result = copy.copy(support)
    vars(result).update(changes)
    return result
