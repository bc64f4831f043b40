r"""The site of a program that holds x, and what a loss made of derivatives in x needs of it.

Integration by parts, on which score matching stands, asks four things of a program: that x is a continuous quantity
at one site; that x lies inside the support of that site; that log f of a row depends on that row of x only, as else the
derivative of a sum over rows is none of a row (a scalar factor in a plate, a column that ``pyro.factor`` broadcasts to
rows × rows and batch statistics all break it in silence); and that log f depends on x at all. All four show in one run
and one backward pass, before training begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_gen import handlers
from pyro_gen.checks import describe
from pyro_gen.handlers import site_kind
from pyro_gen.objectives.observed_supports import entry_support

__all__ = ["DataSite", "Repeated", "check_inside", "check_row_by_row", "find_data_site", "require_continuous"]


class DataSite(NamedTuple):
    """The site at which a program observes x.

    Attributes:
        name: of the site; None where x enters by factors alone.
        support: constraint on one number of x; None where the program says nothing of it.
        fn: its distribution, without masks.
        value: what it observes, x or x in another shape.
    """

    name: str | None
    support: Any
    fn: Any = None
    value: Tensor | None = None


def require_continuous(x: Any, purpose: str) -> Tensor:
    """x as a floating point tensor of rows; a ``TypeError`` that says what trains a program of other data."""
    if not isinstance(x, Tensor) or not x.dim():
        raise TypeError(f"{purpose} needs x, a tensor of rows, as first argument of the program; got {describe(x)}")
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{purpose} differentiates in x, and x is {x.dtype}: for discrete data use pg.PseudoLikelihood or "
            "pg.ContrastiveDivergence, for numbers pass x.float()"
        )
    return x


def find_data_site(sites: dict[str, Any], x: Tensor, *rest: Any, purpose: str) -> DataSite:
    """The one site among a model's that observes x; sites that observe the rest of the batch are none.

    Raises:
        ValueError: if x stands at two sites or in parts at several, or where its support is discrete.
    """
    others = [t for t in rest if isinstance(t, Tensor) and t is not x]
    observed = {
        n: s
        for n, s in sites.items()
        if site_kind(s) == "observed"
        and isinstance(s["value"], Tensor)
        and not any(_same(s["value"], t) or _part(s["value"], t) for t in others)
    }
    found = [n for n, s in observed.items() if _same(s["value"], x)]
    if len(found) > 1:
        raise ValueError(
            f"x is observed at {len(found)} sites, {', '.join(map(repr, found))}: {purpose} needs one that says where "
            "x lives. Observe it once, and write the other as a factor (pyro.factor, pg.energy)"
        )
    parts = [n for n, s in observed.items() if _part(s["value"], x)]
    if not found and len(parts) > 1:
        raise ValueError(
            f"x is observed in parts, at sites {', '.join(map(repr, parts))}: {purpose} needs one data site. Observe "
            "x itself at one site, obs=x"
        )
    if not found and len(observed) > 1 and not parts:
        raise ValueError(
            f"the model's data site is not clear among {', '.join(map(repr, observed))}: observe x itself, obs=x"
        )
    names = found or parts or list(observed)
    if not names:
        return DataSite(None, None)
    site = observed[names[0]]
    fn = handlers.unmasked(site["fn"])
    if fn.support.is_discrete:
        raise ValueError(
            f"site {names[0]!r} holds discrete data ({type(handlers.innermost(fn)).__name__}), which have no score: "
            "use pg.PseudoLikelihood or pg.ContrastiveDivergence"
        )
    return DataSite(names[0], entry_support(fn.support), fn, site["value"])


def _same(value: Tensor, x: Tensor) -> bool:
    return value is x or (value.data_ptr() == x.data_ptr() != 0 and value.numel() == x.numel())


def _part(value: Tensor, x: Tensor) -> bool:
    """Whether a tensor is a view of a part of x."""
    return value._base is x or (x._base is not None and value._base is x._base)


def check_inside(site: DataSite, x: Tensor) -> None:
    """Raise a ``ValueError`` unless all rows lie in the support of their site; looks at values under validation."""
    if site.fn is None or site.value is None or x.is_meta or not is_validation_enabled():
        return
    inside = site.fn.support.check(site.value)
    rows = inside.expand(torch.broadcast_shapes(inside.shape, (len(x),))) if inside.dim() < 2 else inside
    rows = rows.reshape(len(x), -1).all(1) if rows.numel() % len(x) == 0 and rows.shape[0] == len(x) else inside.all()
    if not bool(rows.all()):
        where = f", first in row {int((~rows).nonzero()[0])}" if rows.dim() else ""
        raise ValueError(
            f"x lies outside the support of site {site.name!r} ({site.support}){where}: rescale the data, or give the "
            "site another distribution"
        )


def check_row_by_row(log_density: Callable[[Tensor], Tensor], x: Tensor, purpose: str) -> None:
    """Raise unless log f has one real value a row, of that row of x only, and depends on x.

    Raises:
        TypeError: if log f is not real.
        ValueError: otherwise.
    """
    with torch.enable_grad():
        y = x.detach().clone().requires_grad_()
        value = log_density(y)
        if not value.dtype.is_floating_point:
            raise TypeError(
                f"log f must be real, got {value.dtype}: does a factor of the program give complex numbers?"
            )
        if tuple(value.shape) != (len(x),):
            raise ValueError(
                f"log f must have one value a row, shape ({len(x)},), got {tuple(value.shape)}: a factor inside the "
                "plate over rows must have shape (rows,), as energies.squeeze(-1)"
            )
        row = len(x) - 1  # the last row: a sum over a prefix is seen too
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value[row], y, allow_unused=True)
    if gradient is None:
        raise ValueError(f"log f of the program does not depend on x, so {purpose} has nothing to train")
    if x.is_meta or len(x) == 1:
        return
    others = gradient[:row].reshape(row, -1)
    mixed = (others.ne(0) & ~others.isnan()).any(1)  # nan: 0 · inf, of a row that overflows by itself
    if bool(mixed.any()):
        other = int(mixed.nonzero()[0])
        raise ValueError(
            f"log f of row {row} depends on row {other} of x, so {purpose} would differentiate a mix of rows: a factor "
            "inside the plate over rows must have shape (rows,), neither (), a sum over the batch, nor (rows, 1), and "
            "networks must keep rows apart (no batch statistics: model.eval(), or LayerNorm)"
        )


class Repeated(Messenger):
    """Show the handlers outside a program that runs on ``times`` copies of its rows a plate of the rows themselves.

    So the one scale of a row (:class:`pyro_gen.scopes.DataScale`) is that of the batch that was given.
    """

    def __init__(self, plate: str | None, times: int) -> None:
        super().__init__()
        self.plate, self.times = plate, times
        self.subsamples: bool | None = None  # None until the program makes its plate

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.plate and isinstance(msg["fn"], _Subsample):
            self.subsamples = msg["value"] is not None or msg["fn"].subsample_size is not None
        msg["repeated"] = msg["cond_indep_stack"]
        frames = []
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate and frame.vectorized:
                subsamples = self.subsamples  # a subsampling plate may happen to have as many rows as these copies
                whole = frame.full_size in (None, frame.size) if subsamples is None else not subsamples
                if not whole:  # a plate that subsamples: its own scale is full_size / size
                    msg["scale"] = msg["scale"] * self.times
                size = frame.size // self.times
                frame = frame._replace(size=size, full_size=size if whole else frame.full_size)
            frames.append(frame)
        msg["cond_indep_stack"] = tuple(frames)

    def _pyro_post_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = msg.pop("repeated")
