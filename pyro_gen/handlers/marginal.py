r"""Densities with discrete latents summed out: :math:`f(x_n) = \sum_z f(x_n, z)`, row by row and exactly.

Sites marked ``infer={"enumerate": "parallel"}`` take all values of their support at once, each site in a batch
dimension of its own, left of the plates. The joint density is then a product of small tensors over those dimensions,
and its sum is had by *variable elimination*: a latent is summed inside the innermost plate it stands in, and the
results are multiplied over that plate before the next sum,

.. math:: \sum_{h \in \{0, 1\}^H} \prod_j f_j(x_n, h_j) = \prod_j \sum_{h_j} f_j(x_n, h_j),

H · 2 terms instead of :math:`2^H`. Pyro's ``contract_tensor_tree`` does this for the ELBO of a whole program; here the
data plate is kept, so that each row has its own value. Sums are taken as log-sum-exp with a constant shift, so the
result can be differentiated twice in x, and once more in the weights.

As everywhere in :mod:`pyro_gen.handlers` masks are applied and scales are not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_gen.handlers.densities import row_total
from pyro_gen.handlers.sites import count_rows, find_data_plate, free_latents, plates_of, sample_sites, site_kind

__all__ = ["log_density", "marginal_rows"]


class _First(Messenger):
    """Give sites that are to be enumerated the first value of their support: a run for their plates, without a draw."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and not msg["is_observed"] and _marked(msg):
            value = msg["fn"].enumerate_support(expand=False)[0]
            msg["value"] = value.expand(msg["fn"].batch_shape + msg["fn"].event_shape)
            msg["done"] = True


def _marked(site: Any) -> bool:
    return (site["infer"] or {}).get("enumerate") == "parallel"


def marginal_rows(model: Callable[..., Any], *batch: Any, plate_nesting: int | None = None, **kwargs: Any) -> Tensor:
    r"""Log-density of each row, :math:`\log \sum_z f(x_n, z)`, latents marked for parallel enumeration summed out.

    A program without such latents costs one run, as ``log_density``; one with them a run to see its plates, and one
    with all values at once.

    Args:
        model: any Pyro program whose free latents are marked ``infer={"enumerate": "parallel"}`` and stand inside the
            data plate; called as ``model(*batch)``.
        batch: ``x`` of shape ``(rows, ...)`` and what else the program takes.
        plate_nesting: number of batch dimensions that its plates use, where it is known to enumerate; saves one run.

    Returns:
        Tensor of shape ``(rows,)``, in nats, twice differentiable in x.

    Raises:
        ValueError: if a latent is left free and not marked, stands outside the data plate, or no plate runs over rows.

    References:
        F. Obermeyer et al., "Tensor variable elimination for plated factor graphs", 2019, arXiv:1902.03210.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})
        ...         pyro.sample("x", dist.Normal(4 * k - 2, 1.0), obs=x)
        >>> marginal_rows(model, torch.zeros(2))           # log N(0; 2, 1) twice over, halved
        tensor([-2.9189, -2.9189])
    """
    rows = count_rows(batch)
    if plate_nesting is None:
        with _First():
            sites = sample_sites(poutine.trace(model).get_trace(*batch, **kwargs))
        hidden = [n for n, s in sites.items() if site_kind(s) == "latent"]
        if not hidden:
            return row_total(sites, _data_plate(sites, rows).name)
        free = [n for n in hidden if not _marked(sites[n])]
        if free:
            raise free_latents(free)
        plate_nesting = -min((f.dim for s in sites.values() for f in plates_of(s).values()), default=0)
    enumerated = poutine.enum(model, first_available_dim=-plate_nesting - 1)
    trace = poutine.trace(enumerated).get_trace(*batch, **kwargs)
    trace.symbolize_dims()
    return _eliminate(sample_sites(trace), trace.plate_to_symbol, rows)


def log_density(model: Callable[..., Any], *batch: Any, **kwargs: Any) -> Tensor:
    r"""Log-density of each row, :math:`\log f(x_n)`, from a trace of the program; unnormalised if it has factors.

    Args:
        model: any Pyro program without free latent sites but those it marks for parallel enumeration, which are
            summed out; called as ``model(*batch)``.
        batch: ``x`` of shape ``(rows, ...)`` and what else the program takes.

    Returns:
        Tensor of shape ``(rows,)``, in nats. Sites outside the data plate are left out: see :func:`log_prior`.

    Raises:
        ValueError: if a latent site is left free, or no plate runs over the rows.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)
        >>> log_density(model, torch.zeros(2))
        tensor([-0.9189, -0.9189])
    """
    with poutine.block():
        return marginal_rows(model, *batch, **kwargs)


def _data_plate(sites: dict[str, Any], rows: int) -> Any:
    plate = find_data_plate(sites.values(), rows)
    if plate is None:
        raise ValueError(
            f"the density of a row needs one value a row, and this program has no plate over its {rows} rows: "
            'put the sites of a row inside `with pyro.plate("data", x.shape[0]):`'
        )
    return plate


def _eliminate(sites: dict[str, Any], symbols: dict[str, str], rows: int) -> Tensor:
    """Sum enumerated dimensions out of the sites of a row, and add up what is left over all plates but that of rows."""
    plate = _data_plate(sites, rows).name
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    summed: set[str] = set()
    for name, site in sites.items():
        frames, enumerated = plates_of(site), site["infer"].get("_enumerate_symbol")
        if site_kind(site) == "latent" and enumerated is None:
            raise free_latents([name])
        if plate not in frames:
            if enumerated is not None:
                raise ValueError(
                    f"latent site {name!r} is marked for enumeration and stands outside the plate {plate!r}: summed "
                    "out it would tie all rows together. Move it inside, or fix it by pyro.poutine.condition"
                )
            continue
        log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
        term = packed.pack(log_prob, site["infer"]["_dim_to_symbol"])
        factors.setdefault(frozenset(symbols[f] for f in frames), []).append(term)
        if enumerated is not None:
            summed.add(enumerated)
    result: Tensor | None = None
    for terms in contract_tensor_tree(factors, summed).values():
        for term in terms:
            rest = [i for i, symbol in enumerate(term._pyro_dims) if symbol != symbols[plate]]
            part = term.sum(rest) if rest else term
            result = part if result is None else result + part
    assert result is not None  # the data plate was found at one of the sites
    return result.expand(rows) if result.dim() == 0 else result
