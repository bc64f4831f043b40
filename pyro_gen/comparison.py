r"""Which model predicts better? ArviZ's comparison, where what is compared may be compared.

Models are scored by their expected log pointwise predictive density, :math:`\sum_n \log p(x_n)` over rows that took
no part in the fit: rows held out, or left out one at a time by PSIS-LOO of a posterior. ArviZ's table subtracts such
scores row by row and knows neither where they come from nor what they are. An ELBO is no log p(x), an unnormalised
density less so, and a table that mixes them ranks how tight the bounds are. So the kind of every score goes with it
(`Evidence.kind`, or the attribute ``kind`` of the group): exact values and estimates stand side by side, bounds only
on demand, the rest not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_gen.base import PARETO_K_LIMIT, Evidence
from pyro_gen.checks import describe
from pyro_gen.inference_data.containers import arviz_function, elpd_data, major, pointwise_of
from pyro_gen.inference_data.variables import plain, to_array

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped, unused-ignore]

__all__ = ["compare", "to_elpd"]

BOUNDS = ("lower bound", "upper bound")
COMPARABLE = ("exact", "estimate", *BOUNDS)


@dataclass(frozen=True)
class _Score:
    """One model's pointwise score: ArviZ's object, the kind of its numbers, and what they were computed on."""

    elpd: Any
    kind: str
    held_out: bool
    mc_se: float
    observed: Any = None


def to_elpd(source: Any) -> Any:
    """ArviZ's ``ELPDData`` of rows that were held out, for ``az.compare`` and ArviZ's plots.

    A point estimate has no posterior to leave rows out of; its score is log p of rows that took no part in the fit.

    Args:
        source: an :class:`Evidence` with one entry a row, or what ``pg.to_inference_data`` made of a fitted program
            (group ``log_evidence``).

    Returns:
        ``ELPDData``: the sum, its standard error over rows, the pointwise values, whose attributes keep the kind, and k̂
        of the importance weights of each row. ``p_loo`` is nan: nothing is left out.

    Raises:
        TypeError: for another source. ValueError: for a mean or a sum, which has no rows.

    Example:
        >>> import torch
        >>> elpd = to_elpd(Evidence(torch.tensor([-1.0, -3.0, -2.0]), "exact"))
        >>> float(elpd["elpd_loo" if "elpd_loo" in dir(elpd) else "elpd"])
        -6.0
    """
    import xarray as xr

    if isinstance(source, Evidence):
        if source.value.dim() != 1 or not len(source):
            raise ValueError(
                f"this Evidence has {'no rows' if source.value.dim() else 'no rows, it is a mean or a sum'}: give the "
                "one with an entry a row, pg.log_evidence(program, x, method=...)"
            )
        mc_se = source.sum().standard_error
        attrs = plain({"kind": source.kind, "mc_se": None if mc_se is None else float(mc_se)})
        pointwise = xr.DataArray(to_array(source.value.double()), dims=("data",), name="log_evidence", attrs=attrs)
        tail = source.pareto_k
        return elpd_data(pointwise, None if tail is None else pointwise.copy(data=to_array(tail)), PARETO_K_LIMIT)
    group = _group(source, "log_evidence")
    if group is None:
        raise TypeError(
            "to_elpd takes an Evidence, or the result of to_inference_data with a group log_evidence; got "
            f"{describe(source)}"
        )
    (name,) = (n for n in group.data_vars if "chain" in group[n].dims)
    values = torch.as_tensor(np.asarray(group[name].isel(chain=0, draw=0).values).ravel())
    error, tail = (
        torch.as_tensor(np.asarray(group[n].values)) if n in group.data_vars else None
        for n in ("standard_error", "pareto_k")
    )
    return to_elpd(Evidence(values, group[name].attrs["kind"], error, pareto_k=tail))


def compare(
    results: Mapping[str, Any], *, allow_bounds: bool = False, var_name: str | None = None, **options: Any
) -> pd.DataFrame:
    """Compare models by how well they predict: ``az.compare``, with the kind of every score.

    Args:
        results: by name, each an :class:`Evidence` of held-out rows, what ``pg.to_inference_data`` made, or an
            ``ELPDData``. Of a posterior the score is PSIS-LOO, of a point estimate its held-out log p(x).
        allow_bounds: take lower and upper bounds as well, whose differences mix fit with the gap of the bound.
        var_name: the observed variable to score, where a posterior has several.
        options: of ``az.compare``, as ``method=``.

    Returns:
        ArviZ's table, best first, with columns ``kind`` and ``mc_se``, the Monte Carlo error of the score; ``se`` and
        ``dse`` are over rows, ``dse`` of the paired difference to the best. The sign of ``elpd_diff`` is that of the
        ArviZ installed.

    Raises:
        ValueError: for bounds without ``allow_bounds``, densities that are not normalised, LOO beside held-out rows,
            different numbers of rows, or different data.

    References:
        A. Vehtari, A. Gelman, J. Gabry, "Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC", Statistics and Computing 27, 2017, arXiv:1507.04544.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 9)
        >>> table = compare({
        ...     "narrow": Evidence(torch.distributions.Normal(0.0, 0.6).log_prob(x), "exact"),
        ...     "wide": Evidence(torch.distributions.Normal(0.0, 9.0).log_prob(x), "exact")})
        >>> list(table.index), list(table["kind"])
        (['narrow', 'wide'], ['exact', 'exact'])
    """
    if not isinstance(results, Mapping) or len(results) < 2:
        raise ValueError("results must be a dict of at least two models by name")
    scores = {name: _score(name, result, var_name) for name, result in results.items()}
    _check_kinds(scores, allow_bounds)
    _check_rows(scores)
    if major() == 0:
        options = {"ic": "loo", "scale": "log", **options}
    with warnings.catch_warnings():  # of pandas, about what ArviZ does with it
        warnings.filterwarnings("ignore", "The inplace keyword")
        table = arviz_function("compare")({name: s.elpd for name, s in scores.items()}, **options)
    table["kind"] = [scores[name].kind for name in table.index]
    table["mc_se"] = [scores[name].mc_se for name in table.index]
    result: pd.DataFrame = table
    return result


def _group(container: Any, name: str) -> Any:
    """A group of an ``InferenceData`` or ``DataTree``, or None."""
    if not hasattr(container, "to_netcdf") or name not in container:
        return None
    return container[name]


def _score(name: str, result: Any, var_name: str | None) -> _Score:
    if isinstance(result, Evidence) or _group(result, "log_evidence") is not None:
        elpd = to_elpd(result)
    elif hasattr(result, "to_netcdf"):
        elpd = arviz_function("loo")(result, pointwise=True, var_name=var_name)
        group = result["log_likelihood"]
        variable = var_name or next(iter(group.data_vars))
        data = _group(result, "observed_data")
        observed = data[variable].values if data is not None and variable in data else None
        kind = group[variable].attrs.get("kind", "exact")
        return _Score(elpd, kind, False, float("nan"), observed)
    else:
        elpd = result
    pointwise = pointwise_of(elpd)
    if pointwise is None:
        raise TypeError(
            f"{name!r} is {describe(result)}: compare takes an Evidence of held-out rows, the result of "
            "to_inference_data, or an ELPDData with its pointwise values (az.loo(..., pointwise=True))"
        )
    kind = pointwise.attrs.get("kind")
    mc_se = 0.0 if kind == "exact" else pointwise.attrs.get("mc_se", float("nan"))
    return _Score(elpd, kind or "exact", kind is not None, mc_se)


def _check_kinds(scores: Mapping[str, _Score], allow_bounds: bool) -> None:
    def named(kinds: tuple[str, ...]) -> str:
        return ", ".join(f"{n!r} ({s.kind})" for n, s in scores.items() if s.kind in kinds)

    strange = tuple({s.kind for s in scores.values()} - set(COMPARABLE))
    if strange:
        raise ValueError(f"{named(strange)} is not a normalised log p(x): normalise it first, and compare log p(x)")
    if not allow_bounds and named(BOUNDS):
        raise ValueError(
            f"{named(BOUNDS)} is a bound on log p(x), and a table of bounds ranks their gaps too. Take more draws "
            "(pg.ImportanceSampling(5000); k̂ of each row says where that fails), or pass allow_bounds=True"
        )
    held_out = {n for n, s in scores.items() if s.held_out}
    if held_out and len(held_out) < len(scores):
        loo = ", ".join(repr(n) for n in scores if n not in held_out)
        raise ValueError(
            f"{', '.join(map(repr, sorted(held_out)))} is scored on rows held out and {loo} by leaving out rows of the "
            "fit: these are not scores of the same rows. Score all of them on the same held-out rows"
        )


def _check_rows(scores: Mapping[str, _Score]) -> None:
    sizes = {n: int(np.asarray(pointwise_of(s.elpd)).size) for n, s in scores.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{n!r} {size}" for n, size in sizes.items())
        raise ValueError(f"the models are scored on different numbers of rows ({listed}): score the same rows")
    given = [(n, s.observed) for n, s in scores.items() if s.observed is not None]
    for name, values in given[1:]:
        first, expected = given[0]
        if values.shape == expected.shape and not np.allclose(values, expected, rtol=1e-6, atol=0.0, equal_nan=True):
            raise ValueError(
                f"{first!r} and {name!r} were given different data (observed_data): their densities are of other rows "
                "or in other units. A transformed model needs its log-Jacobian added, log |dy/dx| a row"
            )
