"""From tensors to ``xarray`` datasets: plates become dims, names are guarded, labels are put on.

ArviZ's ``from_dict`` pads two sizes of one dim with NaN and drops a variable that is named like a dim, both without a
word. Datasets are therefore built here, from ``(dims, array)`` pairs, and such clashes are renamed or refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_gen.handlers import Site

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "SAMPLE_DIMS",
    "Axes",
    "Groups",
    "Variable",
    "axes_of",
    "datasets",
    "plain",
    "series_of",
    "stack_series",
    "to_array",
]

SAMPLE_DIMS = ("chain", "draw")
RESERVED = ("chain", "draw", "sample", "pred_id")  # ArviZ's own
Array = NDArray[Any]


@dataclass(frozen=True)
class Variable:
    """An array with named dims, before it meets the others.

    Attributes:
        values: the array.
        dims: a name for each of its axes, ``chain`` and ``draw`` included.
        attrs: what is said of it in the file.
        kept: dims of which only some positions are here, with the positions and the full size.
        left_out: number of event dims that were summed over, which names given for the site may still mention.
        flat: several dims of the site in one, which names given for the site do not fit.
    """

    values: Array
    dims: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, tuple[Array, int]] = field(default_factory=dict)
    left_out: int = 0
    flat: bool = False

    @property
    def sample_dims(self) -> int:
        return sum(d in SAMPLE_DIMS for d in self.dims[:2])


Groups = dict[str, dict[str, Variable]]


def to_array(tensor: Any) -> Array:
    """A tensor as an array on the CPU; bfloat16, which numpy has not, as float32."""
    if not isinstance(tensor, Tensor):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


# ------------------------------------------------------------------------------------------------------- names of axes
@dataclass(frozen=True)
class Axes:
    """How the axes of a site's value are called.

    Attributes:
        shape: of the value; names: one for each of its axes, None for an axis of size 1 that only keeps plates apart.
        batch: how many of the axes, from the left, are batch dims; the others are of the event.
    """

    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    batch: int

    def variable(self, tensor: Tensor, **more: Any) -> Variable:
        """A value of the site, with (chain, draw) before it or alone, as a variable."""
        return _named(tensor, self.shape, self.names, **more)

    def batch_variable(self, tensor: Tensor, **more: Any) -> Variable:
        """A log-probability of the site, one number a batch element, as a variable."""
        left_out = len(self.shape) - self.batch
        return _named(tensor, self.shape[: self.batch], self.names[: self.batch], left_out=left_out, **more)


def _named(tensor: Tensor, shape: Sequence[int], names: Sequence[str | None], **more: Any) -> Variable:
    lead = () if tensor.dim() == len(shape) else SAMPLE_DIMS
    stay = [k for k, name in enumerate(names) if name is not None]
    values = tensor.reshape((*tensor.shape[: len(lead)], *(shape[k] for k in stay)))
    return Variable(to_array(values), (*lead, *(str(names[k]) for k in stay)), **more)


def axes_of(name: str, site: Site, deterministic: bool = False) -> Axes:
    """Name the axes of a site: its plates, then ``infer={"event_dims": [...]}``, else ``{site}_dim_{k}``.

    Raises:
        ValueError: if ``event_dims`` does not name each event dim.
    """
    fn, value = site["fn"], site["value"]
    frames = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized}
    event = min(fn.event_dim, value.dim())
    if deterministic:
        # pyro.deterministic counts all dims as event dims unless told otherwise; its plates stand on the right
        shape, event = tuple(value.shape), 0 if event == value.dim() else event
        batch = len(shape) - event
        frames = {d: f for d, f in frames.items() if -d <= batch and shape[batch + d] == f.size}
    else:
        shape = (*fn.batch_shape, *value.shape[value.dim() - event :])
        batch = len(shape) - event
    names: list[str | None] = []
    for k in range(batch):
        frame = frames.get(k - batch)
        if frame is not None:
            names.append(frame.name)
        else:  # a size of 1 beside plates keeps them apart and means nothing
            names.append(None if frames and shape[k] == 1 else f"{name}_dim_{k - names.count(None)}")
    given = (site["infer"] or {}).get("event_dims")
    if given is not None and not deterministic:
        if isinstance(given, str) or len(given) != event:
            raise ValueError(
                f"site {name!r} names {given!r} as its event_dims and has {event} event dims, of shape "
                f"{tuple(shape[batch:])}: give a list with one name each"
            )
        names += map(str, given)
    else:
        names += [f"{name}_dim_{k - names.count(None)}" for k in range(batch, len(shape))]
    return Axes(shape, tuple(names), batch)


# ------------------------------------------------------------------------------------------------- sequential plates
def series_of(sites: Mapping[str, Site]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Sites that are the iterations of a sequential plate: ``{name: (plate, members in order)}``.

    ``for i in pyro.plate("time", 3): pyro.sample(f"y_{i}", ...)`` is one variable ``y`` along ``time``. Members must be
    there for every iteration and differ in one number only; other sites stay as they are.
    """
    groups: dict[tuple[str, str], dict[int, str]] = {}
    sizes: dict[str, int] = {}
    for name, site in sites.items():
        loops = [f for f in site["cond_indep_stack"] if not f.vectorized]
        if len(loops) != 1:
            continue
        parts = re.split(r"(\d+)", name)
        sizes[loops[0].name] = loops[0].size
        for k in range(1, len(parts), 2):
            pattern = "\0".join(["".join(parts[:k]), "".join(parts[k + 1 :])])
            groups.setdefault((loops[0].name, pattern), {})[loops[0].counter] = name
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for (plate, pattern), members in groups.items():
        names = tuple(members[k] for k in sorted(members))
        before, after = pattern.split("\0")
        merged = (before.rstrip("_") + after) if after else before.rstrip("_")
        if 1 < sizes[plate] == len(set(names)) and merged and merged not in sites and merged not in found:
            found[merged] = (plate, names)
    return found


def stack_series(
    variables: Mapping[str, Variable], series: Mapping[str, tuple[str, tuple[str, ...]]]
) -> dict[str, Variable]:
    """Put the members of each series together along the dim of its plate, where they have one shape."""
    out = dict(variables)
    for name, (plate, members) in series.items():
        parts = [out[m] for m in members if m in out]
        alike = {
            (p.values.shape, tuple(d.replace(f"{m}_dim_", f"{name}_dim_") for d in p.dims))
            for m, p in zip(members, parts, strict=False)
        }
        if len(parts) < len(members) or len(alike) > 1 or any(p.kept for p in parts):
            continue
        (_, dims), lead = alike.pop(), parts[0].sample_dims
        out = {k: v for k, v in out.items() if k not in members}
        out[name] = replace(
            parts[0],
            values=np.stack([p.values for p in parts], axis=lead),
            dims=(*dims[:lead], plate, *dims[lead:]),
            attrs={**parts[0].attrs, "sites": ", ".join(members)},
        )
    return out


# ------------------------------------------------------------------------------------------------------------ datasets
def datasets(
    groups: Groups,
    coords: Mapping[str, Sequence[Hashable]] | None,
    dims: Mapping[str, Sequence[str]] | None,
    attrs: Mapping[str, Mapping[str, Any]],
) -> dict[str, xr.Dataset]:
    """Groups of variables as datasets, with the user's names and labels.

    Args:
        groups: variables by group and name.
        coords: labels by dim; dims: names of the dims of a variable, ``chain`` and ``draw`` left out.
        attrs: attributes by group.

    Raises:
        ValueError: for a dim or variable that no group has, a wrong number of labels or names, or two sizes of one dim
            within a group.
    """
    import xarray as xr

    coords, dims = dict(coords or {}), dict(dims or {})
    groups = _rename(groups, dims)
    labels = _labels(groups, coords)
    out: dict[str, xr.Dataset] = {}
    for group, variables in groups.items():
        owner: dict[str, tuple[int, str]] = {}
        index: dict[str, Array] = {}
        for name, variable in variables.items():
            for dim, size in zip(variable.dims, variable.values.shape, strict=True):
                other = owner.setdefault(dim, (size, name))
                positions = variable.kept[dim][0] if dim in variable.kept else np.arange(size)
                same = np.array_equal(index.setdefault(dim, positions), positions)
                if other[0] != size or not same:
                    raise ValueError(
                        f"dim {dim!r} has size {other[0]} in {other[1]!r} and {size} in {name!r} (group {group}): give "
                        "one of them another name, by dims= or infer={'event_dims': [...]} of its site"
                    )
        data = {n: (v.dims, v.values, plain(v.attrs)) for n, v in variables.items()}
        along = {d: (d, labels[d][p] if d in labels else p) for d, p in index.items()}
        out[group] = xr.Dataset(data, coords=along, attrs=plain(attrs.get(group, {})))
    return out


def _rename(groups: Groups, dims: Mapping[str, Sequence[str]]) -> Groups:
    """Give variables the dims the user names, and names that ArviZ, xarray and netCDF can take."""
    named: Groups = {}
    for group, variables in groups.items():
        named[group] = {}
        for name, variable in variables.items():
            safe = _safe(name)
            if safe in named[group]:
                raise ValueError(f"two variables of group {group} would be called {safe!r}: rename site {name!r}")
            if safe != name:
                variable = replace(variable, attrs={**variable.attrs, "site": name})
            given = dims.get(name, dims.get(safe))
            named[group][safe] = variable if given is None or variable.flat else _with_dims(name, variable, given)
    names = {n for variables in named.values() for n in variables}
    unknown = [n for n in dims if n not in names and _safe(n) not in names]
    if unknown:
        raise ValueError(f"dims= names {', '.join(map(repr, unknown))}; the variables are {_listed(names)}")
    for given in dims.values():
        clash = [d for d in given if d in names or d in RESERVED]
        if clash:
            raise ValueError(
                f"dims= calls a dim {clash[0]!r}, which is the name of a variable or ArviZ's own: choose another"
            )

    def dim_name(dim: str, position: int) -> str:
        sample = position < 2 and dim in SAMPLE_DIMS
        dim = dim if sample else dim.replace("/", ".")
        while not sample and (dim in names or dim in RESERVED):
            dim += "_id"
        return dim

    for variables in named.values():
        for name, variable in variables.items():
            lead = variable.sample_dims
            new = tuple(dim_name(d, k if lead else 2) for k, d in enumerate(variable.dims))
            if len(set(new)) < len(new):
                raise ValueError(
                    f"{name!r} has a dim twice, {new}: name its dims by dims={{{name!r}: [...]}} or "
                    "infer={'event_dims': [...]}"
                )
            kept = {dim_name(d, 2): v for d, v in variable.kept.items()}
            variables[name] = replace(variable, dims=new, kept=kept)
    return named


def _safe(name: str) -> str:
    name = name.replace("/", ".")
    return f"{name}_site" if name in RESERVED else name


def _with_dims(name: str, variable: Variable, given: Sequence[str]) -> Variable:
    lead = variable.sample_dims
    count = len(variable.dims) - lead
    if isinstance(given, str) or len(given) != count + variable.left_out:
        raise ValueError(
            f"dims={{{name!r}: {given!r}}} names {1 if isinstance(given, str) else len(given)} dims, and {name!r} has "
            f"{count + variable.left_out} beside chain and draw: {list(variable.dims[lead:])}"
        )
    new = list(map(str, given))[:count]
    known = dict(zip(variable.dims[lead:], new, strict=True))
    return replace(
        variable,
        dims=(*variable.dims[:lead], *new),
        kept={known.get(d, d): v for d, v in variable.kept.items()},
    )


def _labels(groups: Groups, coords: Mapping[str, Sequence[Hashable]]) -> dict[str, Array]:
    sizes: dict[str, set[int]] = {}
    for variables in groups.values():
        for variable in variables.values():
            for dim, size in zip(variable.dims, variable.values.shape, strict=True):
                sizes.setdefault(dim, set()).add(variable.kept[dim][1] if dim in variable.kept else size)
    labels = {}
    for asked, values in coords.items():
        dim = asked if asked in sizes else f"{asked}_id"  # a dim that had to be renamed
        if dim not in sizes:
            raise ValueError(
                f"coords= has labels for {asked!r}, and no variable has that dim: the dims are {_listed(sizes)}"
            )
        array = np.asarray(to_array(values) if isinstance(values, Tensor) else list(values))
        if array.ndim != 1 or sizes[dim] != {len(array)}:
            size = " and ".join(str(s) for s in sorted(sizes[dim]))
            raise ValueError(f"coords[{asked!r}] has {len(array)} labels, and dim {dim!r} has size {size}")
        labels[dim] = array
    return labels


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def plain(attrs: Mapping[str, Any]) -> dict[str, str | int | float | list[float]]:
    """Attributes that netCDF can keep: strings, numbers, lists of numbers; None is left out, the rest put in words."""
    out: dict[str, str | int | float | list[float]] = {}
    for name, value in attrs.items():
        if isinstance(value, (Tensor, np.ndarray, np.generic)):
            value = to_array(value).tolist()
        if value is None:
            continue
        if isinstance(value, str):
            out[name] = str(value)  # of subclasses (torch.__version__) h5netcdf knows nothing
        elif isinstance(value, int):
            out[name] = int(value)
        elif isinstance(value, float):
            out[name] = float(value)
        elif isinstance(value, Mapping):
            out[name] = json.dumps(value, default=str)
        elif isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value) and len(value):
            out[name] = [float(v) if isinstance(v, float) else int(v) for v in value]
        elif isinstance(value, (list, tuple)):
            out[name] = ", ".join(map(str, value))
        else:
            out[name] = str(value)
    return out
