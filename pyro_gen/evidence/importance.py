r"""Importance sampling: the integral over the latents as a mean over draws of the guide.

.. math:: p(x) = \int p(x, z)\, dz = E_{q(z \mid x)}\Big[\frac{p(x, z)}{q(z \mid x)}\Big]
          \approx \hat p(x) = \frac1K \sum_{k=1}^K w_k, \qquad w_k = \frac{p(x, z_k)}{q(z_k \mid x)} .

The mean weight is unbiased for the normalizer p(x), so its logarithm is too low on average (Jensen): by
:math:`\mathrm{Var}(w) / (2 K\, p(x)^2)` to first order, half the squared standard error. Where the weights have finite
variance that is far below the error itself and the value is an *estimate*. Where the guide's tails are thinner than the
posterior's, the draws that matter are never seen, error and effective sample size look fine, and the value is a *lower
bound* only: the tail index k̂ tells the two apart.

Draws stand in a plate to the left of the program's own, so the guide's network runs once for many draws of a row, and
the decoder sees one large batch. Weights are averaged in float64 whatever the program computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, fields
from typing import NamedTuple, TypeVar

import pyro.poutine as poutine
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_gen import handlers, scopes
from pyro_gen.base import PARETO_K_LIMIT, Evidence, EvidenceKind, Exact, Program
from pyro_gen.checks import check_count
from pyro_gen.evidence.chunks import check_broadcasting, even_parts, measure_bytes, plan_chunks
from pyro_gen.evidence.methods import exact_evidence, require_bounded
from pyro_gen.statistics import effective_sample_size, log_mean_exp, pareto_k

__all__ = ["ImportanceSampling"]

PLATE_ADVICE = "its plate over rows must be as long as its batch, pyro.plate('data', x.shape[0])"
Result = TypeVar("Result")

PROBE_ROWS = 32
WEIGHT_BYTES = 48  # a log weight in float64 and what the statistics make of it
CACHE_BYTES = 2**25  # made by one chunk on a CPU, a few of them alive at once: beyond the cache it gets slower


@dataclass(frozen=True, repr=False)
class ImportanceSampling:
    r"""Evidence by importance sampling from the guide: :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k \mid x)`.

    For programs of kind `Bounded` whose latents stand inside the plate over rows. Exact programs are not sampled: their
    ``log_prob`` is the answer. The result is an ``"estimate"``; if k̂ of any row is above 0.7 it is relabelled a
    ``"lower bound"``, and ``pareto_k`` says which rows are to blame. Networks run in evaluation mode.

    Args:
        num_samples: K, draws of the guide a row. Below 21 no tail can be fitted, and the result is a lower bound: the
            importance-weighted bound of K draws.
        memory: bytes that one chunk of draws may take, on the program's device; rows and draws are cut to fit. The log
            weights of one row are kept besides, 48 bytes a draw.
        seed: makes the result repeatable and leaves the global generators as they were. The same seed, data, program
            and memory give the same numbers; another memory cuts other chunks and so meets other draws.
        vectorize_particles: run many draws at once, in a plate left of the program's; the program must broadcast over
            a leading dimension, which is checked first. False repeats the rows instead: any program can, at the price
            of running the guide's network for every draw.

    Raises:
        ValueError: for ``num_samples`` or ``memory`` below 1, or a seed that is no int.

    References:
        Y. Burda, R. Grosse, R. Salakhutdinov, "Importance weighted autoencoders", 2016, arXiv:1509.00519, eq. 8.
        A. Vehtari et al., "Pareto smoothed importance sampling", JMLR 25(72), 2024, arXiv:1507.02646.

    Example:
        >>> ImportanceSampling(1000, seed=3)
        ImportanceSampling(1000, seed=3)
    """

    num_samples: int = 5000
    _: KW_ONLY
    memory: int = 2**28
    seed: int | None = None
    vectorize_particles: bool = True

    def __post_init__(self) -> None:
        check_count(self.num_samples, "num_samples")
        check_count(self.memory, "memory")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ValueError(f"seed must be an int or None, got {self.seed!r}")

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)[1:] if getattr(self, f.name) != f.default}
        return f"ImportanceSampling({', '.join([str(self.num_samples), *(f'{k}={v!r}' for k, v in given.items())])})"

    def log_evidence(self, program: Program, x: Tensor, context: Tensor | None = None) -> Evidence:
        """The evidence of each row; see :func:`pyro_gen.log_evidence`."""
        if isinstance(program, Exact):
            return exact_evidence(program, x, context)

        def summarise(log_weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
            size, tail = effective_sample_size(log_weights), pareto_k(log_weights, dtype=dtype)
            return (*log_mean_exp(log_weights), size, tail)

        parts = self._for_chunks(program, x, context, summarise)
        value, error, size, tail = (torch.cat(part) for part in zip(*parts, strict=True))
        kind: EvidenceKind = "lower bound" if bool((tail > PARETO_K_LIMIT).any()) else "estimate"
        return Evidence(value, kind, error, effective_sample_size=size, pareto_k=tail)

    def log_weights(self, program: Program, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The log weights themselves: ``(num_samples, rows)``, in nats, float64 on the CPU, 8 bytes each."""
        return torch.cat(self._for_chunks(program, x, context, lambda log_weights, dtype: log_weights), 1)

    def _for_chunks(
        self,
        program: Program,
        x: Tensor,
        context: Tensor | None,
        reduce: Callable[[Tensor, torch.dtype], Result],
    ) -> list[Result]:
        """What ``reduce`` makes of all log weights of some rows at a time, (draws, rows), given the dtype they had."""
        batch = require_bounded(program, type(self).__name__).check(x, context)
        with ExitStack() as stack:
            for entered in (torch.no_grad(), poutine.block(), scopes.evaluation_mode(program)):
                stack.enter_context(entered)
            plan = self._probe(program, batch)
            if self.seed is not None:
                stack.enter_context(scopes.forked_generators(self.seed))
            stack.enter_context(scopes.without_validation())
            results = []
            for start in range(0, len(x), plan.rows):
                rows = tuple(part[start : start + plan.rows] for part in batch)
                parts = [self._draw(program, rows, k, plan.shape) for k in even_parts(self.num_samples, plan.draws)]
                log_weights = torch.cat([part.to("cpu", torch.float64) for part in parts])
                _refuse_nan(log_weights, start)
                results.append(reduce(log_weights, parts[0].dtype))
            return results

    def _draw(self, program: Program, rows: tuple[Tensor, ...], draws: int, shape: handlers.Structure) -> Tensor:
        """Log weights of some draws of some rows: (draws, rows)."""
        if self.vectorize_particles:
            weights = handlers.log_weight(program.model, program.guide, *rows, particles=draws, shape=shape)
            expected: tuple[int, ...] = (draws, len(rows[0]))
        else:
            repeated = [part.repeat(draws, *[1] * (part.dim() - 1)) for part in rows]
            weights = handlers.log_weight(program.model, program.guide, *repeated, shape=shape)
            expected = (draws * len(rows[0]),)
        if tuple(weights.shape) != expected:
            raise ValueError(
                f"the program gives weights of shape {tuple(weights.shape)} for {draws} draws of {len(rows[0])} rows, "
                f"not {expected}: {PLATE_ADVICE}"
            )
        return weights.reshape(draws, -1)

    def _probe(self, program: Program, batch: tuple[Tensor, ...]) -> _Plan:
        """Run the pair once over all rows, with validation as it stands, and see what a draw of a row costs."""
        model, guide = program.model, program.guide
        few = tuple(part[:PROBE_ROWS] for part in batch)
        count, rows = len(few[0]), len(batch[0])
        with scopes.preserved_state(model, guide):
            shape = _structure(program, few, batch)
            _require_weights(shape)
            plain = measure_bytes(handlers.log_weight, model, guide, *few, shape=shape)
            if is_validation_enabled():
                step = max(1, count * self.memory // max(1, plain))
                for start in range(0, rows, step):
                    handlers.log_weight(model, guide, *(part[start : start + step] for part in batch), shape=shape)
            if self.vectorize_particles:
                advice = "make its networks take leading dimensions, or use vectorize_particles=False"
                check_broadcasting(model, guide, few, shape, advice)
            two, four = (measure_bytes(self._draw, program, few, draws, shape) for draws in (2, 4))
        a_draw = max(0, four - two) // (2 * count)
        a_row = max(0, two // count - 2 * a_draw)
        fast = min(self.memory, CACHE_BYTES) if batch[0].device.type == "cpu" else self.memory
        at_once = plan_chunks(rows, self.num_samples, a_row, a_draw + WEIGHT_BYTES, self.memory, fast)
        return _Plan(shape, *at_once)


class _Plan(NamedTuple):
    shape: handlers.Structure
    rows: int
    draws: int


def _structure(program: Program, few: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> handlers.Structure:
    """The structure of the pair, seen on a few rows; a ``ValueError`` if it runs on all of them only."""
    try:
        return handlers.structure(program.model, program.guide, *few)[0]
    except (RuntimeError, ValueError) as error:
        handlers.structure(program.model, program.guide, *batch)  # what fails here too is told by its own error
        raise ValueError(f"the program runs on {len(batch[0])} rows, not on {len(few[0])}: {PLATE_ADVICE}") from error


def _require_weights(shape: handlers.Structure) -> None:
    """Raise a ``ValueError`` unless every latent has a draw of the guide to be weighed by, and stands in a row."""
    missing = [name for name in shape.model_latents if name not in shape.guide_latents]
    if missing:
        raise ValueError(
            f"latent site {', '.join(map(repr, missing))} of the model is not in the guide, which draws what is "
            "weighed: add it there"
        )
    shape.require_weights("ImportanceSampling")
    handlers.require_local(shape, "ImportanceSampling")


def _refuse_nan(log_weights: Tensor, start: int) -> None:
    bad = (torch.isnan(log_weights) | (log_weights == math.inf)).any(0)
    if bool(bad.any()):
        raise ArithmeticError(
            f"log p(x, z) - log q(z | x) is nan or infinite, first in row {start + int(bad.nonzero()[0])}: look at "
            "what encoder and decoder give for that row"
        )
