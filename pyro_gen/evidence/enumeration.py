r"""log Z of discrete data as the sum that it is, :math:`Z = \sum_x f(x)` over all states.

A restricted Boltzmann machine has two layers, each independent given the other, so either can be summed in closed form:

.. math:: Z = \sum_v e^{b^\top v} \prod_j \big(1 + e^{c_j + (vW)_j}\big)
            = \sum_h e^{c^\top h} \prod_i \big(1 + e^{b_i + (Wh)_i}\big) .

The smaller layer is enumerated: 2^15 terms for 15 hidden units, however many visible ones there are. The terms are also
the probabilities of the states, so exact draws come with them: of the enumerated layer, then of the other given it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_gen import scopes
from pyro_gen.base import Evidence, Unnormalized
from pyro_gen.checks import check_count
from pyro_gen.evidence.normalizers import Normalizes, estimating, one_target, require_density, rows_at_once
from pyro_gen.nn import RBM
from pyro_gen.samplers.gibbs import levels_of
from pyro_gen.targets import Target

__all__ = ["Enumeration"]


@dataclass(frozen=True, repr=False)
class Enumeration(Normalizes):
    r"""log Z as the sum over all states of binary or integer data, :math:`\log \sum_x f(x)`; of kind ``"exact"``.

    Restricted Boltzmann machines (``EBM(..., energy="rbm")``) are summed over their smaller layer. Terms are added in
    float64; the ``standard_error`` is what the rounding of log f in the program's dtype can do.

    Args:
        max_states: more than that many are refused.
        memory: bytes that the states evaluated at once may take, on the program's device.
        max_contexts: how many distinct contexts ``log_evidence`` may meet; each is a sum of its own.

    Raises:
        ValueError: for counts below 1; when asked, for continuous data or too many states.

    Example:
        >>> from pyro_gen.programs.ebm import EBM
        >>> log_z = Enumeration().log_normalizer(EBM(3, energy=lambda x: 0.0 * x.sum(-1), base="bernoulli"))
        >>> print(log_z.kind, abs(round(float(log_z.value), 6)))   # fair coins sum to one
        exact 0.0
    """

    max_states: int = 2**22
    _: KW_ONLY
    memory: int = 2**28
    max_contexts: int = 1000

    def __post_init__(self) -> None:
        for name in ("max_states", "memory", "max_contexts"):
            check_count(getattr(self, name), name)

    def log_normalizer(self, program: Unnormalized, context: Tensor | None = None) -> Evidence:
        """log Z of the program; see :func:`pyro_gen.log_normalizer`."""
        with estimating(program), scopes.without_validation():
            states = self._states(one_target(program, context))
            total = torch.full((), -math.inf, dtype=torch.float64)
            largest = 0.0
            for _, value in self._chunks(states):
                total = torch.logaddexp(total, torch.logsumexp(value, 0).cpu())
                largest = max(largest, float(torch.where(torch.isfinite(value), value.abs(), 0.0).amax()))
            error = torch.tensor(torch.finfo(states.template.dtype).eps * largest, dtype=torch.float64)
            return Evidence(total, "exact", error, label="log Z")

    def draw(self, program: Unnormalized, n: int, context: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        """Exact, independent draws of the program: ``(n, *event_shape)``; they make reverse annealing a bound.

        Args:
            program: as for log Z. n: number of draws. context: one context, of a conditional program.
            seed: makes the draws repeatable and leaves the global generators as they were.
        """
        check_count(n, "n")
        known = require_density(program, type(self).__name__)
        with estimating(known, seed), scopes.without_validation():
            states = self._states(one_target(known, context))
            values = torch.cat([value for _, value in self._chunks(states)])
            if len(values) > 2**24:
                raise ValueError(f"draws are made among up to 2^24 states, and there are {len(values)}")
            picked = torch.multinomial((values - values.max()).exp(), n, replacement=True)
            return states.complete(states.at(picked)).reshape(n, *known.event_shape)

    def _states(self, target: Target) -> _States:
        if not target.support.is_discrete:
            raise ValueError(
                f"Enumeration sums over discrete data, and the support is {target.support}: pg.Quadrature() integrates "
                "up to three dimensions, pg.AnnealedImportanceSampling() estimates"
            )
        states = _layer(target) or _every(target)
        count = states.levels**states.entries
        if count > self.max_states:
            raise ValueError(
                f"Enumeration(max_states={self.max_states}) was asked to sum {states.levels}^{states.entries} = "
                f"{count:.3g} states: pg.AnnealedImportanceSampling() estimates log Z"
            )
        return states

    def _chunks(self, states: _States) -> Iterator[tuple[Tensor, Tensor]]:
        """All states and their log terms in float64, some at a time."""
        device = states.template.device
        rows = rows_at_once(states.value, states.at(torch.zeros(1, dtype=torch.long, device=device)), self.memory)
        count = states.levels**states.entries
        for start in range(0, count, rows):
            index = torch.arange(start, min(count, start + rows), device=device)
            value = states.value(states.at(index)).double()
            if bool((torch.isnan(value) | (value == math.inf)).any()):
                raise ValueError("log f is not a number, or infinite, in some states: Z does not exist")
            yield index, value


class _States(NamedTuple):
    """States that are enumerated: their log terms, and how a whole datum comes from one."""

    entries: int
    low: int
    levels: int
    template: Tensor
    value: Callable[[Tensor], Tensor]
    complete: Callable[[Tensor], Tensor]

    def at(self, index: Tensor) -> Tensor:
        """States by number: ``(n,)`` to ``(n, entries)``."""
        powers = self.levels ** torch.arange(self.entries, device=index.device)
        return (self.low + index.unsqueeze(1).to(self.template.device) // powers % self.levels).to(self.template)


def _every(target: Target) -> _States:
    """All states of the data."""
    low, levels = levels_of(target.support)
    shape = target.event_shape

    def value(x: Tensor) -> Tensor:
        return target.log_density(x.reshape(-1, *shape))

    return _States(shape.numel(), low, levels, target.template, value, lambda x: x)


def _layer(target: Target) -> _States | None:
    """The hidden states of a Boltzmann machine, where there are fewer of them; None elsewhere."""
    net = getattr(target, "net", None)
    if not isinstance(net, RBM) or net.weight.shape[1] >= net.weight.shape[0]:
        return None
    # what the base adds to log f, the same in every state
    zero = target.template.new_zeros((1, *target.event_shape))
    constant = target.log_density(zero) - net.log_sum(zero, 1.0)

    def value(h: Tensor) -> Tensor:
        return constant + h @ net.hidden_bias + softplus(net.visible_bias + h @ net.weight.T).sum(1)

    def complete(h: Tensor) -> Tensor:
        return torch.bernoulli(torch.sigmoid(net.visible_bias + h @ net.weight.T))

    return _States(net.weight.shape[1], 0, 2, target.template, value, complete)
