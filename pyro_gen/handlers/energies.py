r"""Energies inside a Pyro program: factors :math:`\exp(-E(x))` that carry the network they come from.

A factor multiplies the density of a program and leaves it unnormalised: :math:`f(x) = b(x)\,e^{-E_\theta(x)}` with b
the rest of the program. `energy` is ``pyro.factor`` with three things beside: the network can be found at the site
(``infer["energy"]``), the shape is held against the plates, where ``pyro.factor`` broadcasts a column over its rows
without a word, and tensors that carry derivatives with them pass through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_gen.handlers.sites import innermost, site_kind

__all__ = ["Factor", "boltzmann_machine", "energy"]


class Factor(dist.Unit):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """A factor of given logarithm, as the distribution behind a site; it takes whatever behaves as a tensor."""

    def __init__(self, log_factor: Tensor) -> None:
        self.log_factor: Tensor = log_factor
        dist.TorchDistribution.__init__(self, log_factor.shape, torch.Size((0,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Factor:
        return Factor(self.log_factor.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        empty: Tensor = self.log_factor.new_empty((*sample_shape, *self.batch_shape, 0))
        return empty

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_factor


def energy(name: str, net: Callable[..., Tensor], *inputs: Any) -> Tensor:
    r"""Multiply the program's density by :math:`\exp(-E(x))`, ``E = net(*inputs)``: a factor that carries its network.

    Put it inside the plate over rows. Whatever the factor does to Z is not taken into account: train such a program by
    score matching or its kin, never by an ELBO.

    Args:
        name: of the site.
        net: the energy, a module or function that maps a batch to one value a row, ``(rows,)`` or ``(rows, 1)``.
        inputs: what it is called with, x of shape ``(rows, ...)`` first.

    Returns:
        The energies, ``(rows,)``, in nats.

    Raises:
        TypeError: if the energy is no real floating point tensor.
        ValueError: if it has not one value for each row of the plates around it.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_gen.handlers import log_density
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1).mask(False), obs=x)  # flat
        ...         energy("energy", lambda x: x.square().sum(-1) / 2, x)
        >>> log_density(model, torch.tensor([[1.0], [2.0]]))
        tensor([-0.5000, -2.0000])
    """
    plates: dict[int, int] = {
        m.dim: getattr(m, "subsample_size", m.size)
        for m in _PYRO_STACK
        if isinstance(m, IndepMessenger) and m.dim is not None
    }
    e = _rowwise(name, net(*inputs), plates)
    log_factor = -e
    factor = Factor(log_factor)
    infer: Any = {"is_auxiliary": True, "energy": net}
    pyro.sample(name, factor, obs=factor.sample(), infer=infer)
    return e


def _rowwise(name: str, e: Any, plates: dict[int, int]) -> Tensor:
    """The energies with a dimension for each plate; a column loses its last dimension."""
    if not isinstance(e, Tensor) or not e.dtype.is_floating_point:
        given = f"a tensor of {e.dtype}" if isinstance(e, Tensor) else type(e).__name__
        raise TypeError(
            f"energy {name!r} must be a real floating point tensor, one value a row; its network gave {given}"
        )
    depth = -min(plates, default=0)
    want = tuple(plates.get(-i, 1) for i in range(depth, 0, -1))
    for candidate in (e, e.squeeze(-1) if e.dim() and e.shape[-1] == 1 else e):
        if candidate.dim() >= depth and tuple(candidate.shape[candidate.dim() - depth :]) == want:
            return candidate
    rows = f"({', '.join(map(str, want))}{',' if len(want) == 1 else ''})"
    raise ValueError(
        f"energy {name!r} must have one value a row, shape {rows} for the plates around it; its network gave "
        f"{tuple(e.shape)}: " + ("sum over all but the rows" if e.dim() > depth else "keep one value for each row")
    )


def boltzmann_machine(sites: dict[str, Any]) -> tuple[Any, bool] | None:
    """The network of a program that is a Boltzmann machine over binary x and no more, and whether its base is flat.

    None for any other program: there must be one data site, of fair coins or of binary values under a mask, and one
    energy, whose network knows how to sweep. Looks at values, and at what they require gradients for: coins whose
    chances are trained do not stay fair.
    """
    kinds = {name: site_kind(site) for name, site in sites.items()}
    data = [sites[n] for n, kind in kinds.items() if kind == "observed"]
    factors = [sites[n] for n, kind in kinds.items() if kind == "factor"]
    if len(data) != 1 or len(factors) != 1 or len(sites) != 2:
        return None
    net, outer = (factors[0]["infer"] or {}).get("energy"), data[0]["fn"]
    fn = innermost(outer)
    if not isinstance(fn, dist.Bernoulli) or not all(hasattr(net, n) for n in ("log_sum", "log_uncoupled", "sweep")):
        return None
    flat = any(isinstance(d, dist.MaskedDistribution) and d._mask is False for d in _layers(outer))
    if not flat and (fn.probs.is_meta or fn.probs.requires_grad or not bool(fn.probs.eq(0.5).all())):
        return None
    return net, flat


def _layers(fn: Any) -> Iterator[Any]:
    """A distribution and those it is wrapped around."""
    while fn is not None:
        yield fn
        fn = getattr(fn, "base_dist", None)
