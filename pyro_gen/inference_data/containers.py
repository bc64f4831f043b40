"""The one place that knows which ArviZ is installed.

ArviZ 0.x keeps groups in ``arviz.InferenceData``; 1.x (and ``arviz-base``, ``arviz-stats`` without ``arviz``) in
``xarray.DataTree``. Datasets are made by :mod:`pyro_gen.inference_data.variables` and only wrapped here. ArviZ is
imported when first needed, so that ``import pyro_gen`` neither needs it nor waits for it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["arviz_function", "elpd_data", "major", "pointwise_of", "wrap"]

REASON = "no_log_likelihood"  # root attribute: why there is no group `log_likelihood`


@functools.cache
def major() -> int:
    """0 for ArviZ 0.x, where results are ``InferenceData``; else 1, where they are ``DataTree``."""
    try:
        return min(1, int(importlib.metadata.version("arviz").split(".")[0]))
    except importlib.metadata.PackageNotFoundError:
        return 1


def arviz_function(name: str) -> Any:
    """``arviz.<name>``, or ``arviz_stats.<name>`` where ArviZ 1.x is installed in parts."""
    try:
        importlib.metadata.version("arviz")
        package = "arviz"
    except importlib.metadata.PackageNotFoundError:
        package = "arviz_stats"
    try:
        return getattr(import_module(package), name)
    except ImportError as error:
        raise ImportError(f"{name} needs ArviZ: pip install arviz (or arviz-base and arviz-stats[xarray])") from error


class Reason:
    """Class attribute that answers ``.log_likelihood``, where there is no such group, with the reason why.

    ``az.loo`` asks for the attribute, so its error says what is wrong with the request and what to do instead. A
    group that is added later is found as ever; without a reason the attribute is missing as ever.
    """

    def __get__(self, container: Any, owner: Any = None) -> Any:
        if container is None:
            return self
        if "log_likelihood" in container:
            return container["log_likelihood"]
        if container.attrs.get(REASON):
            raise TypeError(container.attrs[REASON])
        raise AttributeError("log_likelihood")


@functools.cache
def _with_reason() -> Any:
    name = "InferenceData" if major() == 0 else "DataTree"  # ArviZ goes by the name in places
    base = import_module("arviz").InferenceData if major() == 0 else import_module("xarray").DataTree
    body = {"__doc__": base.__doc__, "__module__": __name__, "log_likelihood": Reason()}
    return type(name, (base,), body if major() == 0 else {**body, "__slots__": ()})


def __getattr__(name: str) -> Any:
    if name in ("InferenceData", "DataTree"):  # where pickle looks for them
        return _with_reason()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def wrap(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> Any:
    """Datasets by group name as an ``InferenceData`` or a ``DataTree``."""
    import xarray as xr

    if major() == 0:
        container = _with_reason() if REASON in attrs else import_module("arviz").InferenceData
        return container(attrs=dict(attrs), **groups)
    container = _with_reason() if REASON in attrs else xr.DataTree
    return container.from_dict({"/": xr.Dataset(attrs=dict(attrs)), **groups})


def elpd_data(pointwise: xr.DataArray, pareto_k: xr.DataArray | None, good_k: float) -> Any:
    """ArviZ's ``ELPDData`` of pointwise log scores, for ``az.compare`` and the plots.

    Args:
        pointwise: log p of each row; pareto_k: k̂ of each row, or None; good_k: the limit of k̂.
    """
    import numpy as np

    values = np.asarray(pointwise.values, dtype=np.float64).ravel()
    tail = None if pareto_k is None else pareto_k.values
    numbers: dict[str, Any] = {
        "elpd": float(values.sum()),
        "se": float(np.sqrt(values.size * values.var())),
        "p": float("nan"),  # each row was held out: no parameters are integrated over
        "n_samples": 1,
        "n_data_points": int(values.size),
        "warning": bool(tail is not None and (tail > good_k).any()),
        "elpd_i": pointwise,
        "scale": "log",
        "pareto_k": pareto_k,
        "good_k": good_k,
    }
    if major() == 0:
        names = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
        given = {names.get(n, n): v for n, v in numbers.items() if v is not None}
        return arviz_function("ELPDData")(data=list(given.values()), index=list(given), dtype=object)
    stats = import_module("arviz_stats")
    kind = getattr(stats, "ELPDDataLOO", None) or stats.ELPDData
    fields = {f.name for f in dataclasses.fields(kind)}
    return kind(**({"kind": "loo"} if "kind" in fields else {}), **numbers)


def pointwise_of(elpd: Any) -> Any:
    """The pointwise values of an ``ELPDData`` of either ArviZ, or None."""
    for name in ("elpd_i", "loo_i"):
        values = getattr(elpd, name, None)
        if values is not None:
            return values
    return None
