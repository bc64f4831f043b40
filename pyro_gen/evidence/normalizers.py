r"""log Z of a density known up to it: the question, and the log p(x) that follows from an answer.

With :math:`Z = \int f(x)\,dx` known, every row has :math:`\log p(x) = \log f(x) - \log Z`. One log Ẑ serves all rows,
so its error is *shared*: it does not average out over rows, and `Evidence` carries it apart. Bounds turn round: a lower
bound on log Z is an upper bound on log p.

A conditional program has a Z for each context, so rows of one context share an error and others do not. Let row i have
the error :math:`s_i` of its log Ẑ. With N rows, :math:`n_i` of them of the context of row i, what is kept is

.. math:: c^2 = \frac{1}{N (N - 1)} \sum_i (n_i - 1)\, s_i^2, \qquad e_i^2 = s_i^2 - c^2 ,

c shared and :math:`e_i` independent: c² is the mean covariance of two rows, so each row has the variance
:math:`s_i^2` and the sum over rows :math:`\sum_i e_i^2 + N^2 c^2 = \sum_i n_i s_i^2`, as it should.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Bounded, Evidence, EvidenceKind, Exact, Implicit, NormalizerMethod, Program, Unnormalized
from pyro_gen.checks import describe
from pyro_gen.evidence.methods import exact_evidence
from pyro_gen.targets import Target

__all__ = ["Normalizes", "estimating", "log_normalizer", "normalized", "require_density", "rows_at_once"]

ROWS = 1024  # whose log f is evaluated at once
TEMPORARIES = 4  # times what autograd keeps: its gradients, what a transition holds beside them
FLIPPED: dict[EvidenceKind, EvidenceKind] = {"lower bound": "upper bound", "upper bound": "lower bound"}


def log_normalizer(
    program: Unnormalized, context: Tensor | None = None, *, method: NormalizerMethod | None = None
) -> Evidence:
    r"""Log of the normalizer, :math:`\log Z = \log \int f(x)\,dx`, with its kind and its error.

    Args:
        program: a program whose density is known up to Z.
        context: of a conditional program: one context, ``context_shape``; each has a Z of its own.
        method: how: ``pg.AnnealedImportanceSampling()``, ``pg.Quadrature()`` to three dimensions,
            ``pg.Enumeration()`` for few discrete states. An exact program needs none (Z = 1); given one, it is asked,
            which is a check of the program.

    Returns:
        A scalar :class:`Evidence`, in nats, float64 on the CPU.

    Raises:
        TypeError: for a program whose density cannot be evaluated (a GAN, a VAE), or a method that is none.
        ValueError: where Z is not finite as far as can be seen, or the method cannot answer.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_gen.evidence import Quadrature
        >>> def model(x):   # exp(-x^2 / 2) on the real line: Z = sqrt(2 pi)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1).mask(False), obs=x)
        ...         pyro.factor("energy", -x.square().sum(-1) / 2)
        >>> log_z = log_normalizer(Unnormalized(model, 1), method=Quadrature())
        >>> log_z.kind, round(float(log_z.value), 4)
        ('exact', 0.9189)
    """
    if not isinstance(program, Program):
        hint = ""
        if hasattr(program, "history"):
            hint = ": pass result.program"
        elif callable(program) and not isinstance(program, type):
            hint = ": pg.Unnormalized(model, event_shape)"
        raise TypeError(f"log_normalizer takes a program, got {describe(program)}{hint}")
    if method is None and isinstance(program, Exact):
        return Evidence(torch.zeros((), dtype=torch.float64), "exact", label="log Z")
    if isinstance(method, type) or not isinstance(method, NormalizerMethod):
        raise TypeError(
            f"method must be a method for log Z, as pg.AnnealedImportanceSampling(); got {describe(method)}"
        )
    return method.log_normalizer(require_density(program, type(method).__name__), context)


def normalized(program: Unnormalized, x: Tensor, log_z: Evidence, context: Tensor | None = None) -> Evidence:
    r"""Log-evidence of rows from a log Z at hand: :math:`\log p(x_n) = \log f(x_n) - \log Z`.

    One estimate of log Z, made once, serves any number of data sets.

    Args:
        program: the program; its weights must be those that log Z was estimated at.
        x: ``(rows, *event_shape)``. context: ``(rows, *context_shape)``, of a conditional program.
        log_z: a scalar, or one entry for each row.

    Returns:
        :class:`Evidence` with one entry a row. The error of a scalar log Z is in ``shared_error``; bounds turn round.

    Raises:
        ValueError: for a log Z that is neither.
    """
    batch = program.check(x, context)
    with estimating(program):
        parts = zip(*(part.split(ROWS) for part in batch), strict=True)
        log_f = torch.cat([program.log_density_rows(*rows).to("cpu", torch.float64) for rows in parts])
    if log_z.value.dim() and tuple(log_z.value.shape) != tuple(log_f.shape):
        raise ValueError(
            f"log_z must be a scalar or have one entry for each of {len(log_f)} rows, got {tuple(log_z.value.shape)}"
        )
    error, shared = log_z.standard_error, log_z.shared_error
    if not log_z.value.dim():
        shared = math.hypot(shared, 0.0 if error is None else float(error))
        error = None
    kind = FLIPPED.get(log_z.kind, log_z.kind)
    size = log_z.effective_sample_size
    return Evidence(
        log_f - log_z.value,
        kind,
        error,
        shared_error=shared,
        effective_sample_size=None if size is None else size.expand(log_f.shape),
    )


class Normalizes:
    """Base of the methods for log Z: with it, log p(x) of rows."""

    max_contexts: int

    def log_normalizer(self, program: Unnormalized, context: Tensor | None = None) -> Evidence:
        """log Z of the program (given one context); see :func:`pyro_gen.log_normalizer`."""
        raise NotImplementedError

    def log_evidence(self, program: Program, x: Tensor, context: Tensor | None = None) -> Evidence:
        """log p(x) of each row, from one log Z, or from one for each distinct context."""
        if isinstance(program, Exact):
            return exact_evidence(program, x, context)
        known = require_density(program, type(self).__name__)
        batch = known.check(x, context)
        if len(batch) == 1:
            return normalized(known, x, self.log_normalizer(known))
        distinct, index = torch.unique(batch[1].flatten(1), dim=0, return_inverse=True)
        if len(distinct) > self.max_contexts:
            raise ValueError(
                f"context has {len(distinct)} distinct rows, and each has a Z of its own to estimate: pass fewer, or "
                f"{type(self).__name__}(max_contexts={len(distinct)}) if it may take that long"
            )
        found = [self.log_normalizer(known, row.reshape(batch[1].shape[1:])) for row in distinct]
        return normalized(known, x, _by_row(found, index.cpu()), context)

    def __repr__(self) -> str:
        given = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}  # type: ignore[arg-type]
        shown = (f"{name}={_brief(value)}" for name, (value, default) in given.items() if _differs(value, default))
        return f"{type(self).__name__}({', '.join(shown)})"


def _by_row(found: list[Evidence], index: Tensor) -> Evidence:
    """The log Z of each row, from those of its context, with the split of errors of this module's page."""
    kinds = {one.kind for one in found}
    kind: EvidenceKind = "exact"
    for worse in ("estimate", "lower bound", "upper bound"):
        kind = worse if worse in kinds else kind
    value = torch.stack([one.value for one in found])[index]
    sizes = [one.effective_sample_size for one in found if one.effective_sample_size is not None]
    size = torch.stack(sizes)[index] if len(sizes) == len(found) else None
    errors = [one.standard_error for one in found if one.standard_error is not None]
    if len(errors) < len(found):
        return Evidence(value, kind, effective_sample_size=size, label="log Z")
    variance = torch.stack(errors)[index].double().square()
    others, n = (torch.bincount(index) - 1)[index], len(index)
    shared = float((others * variance).sum()) / max(1, n * (n - 1))
    error = (variance - shared).clamp_min(0.0).sqrt()
    return Evidence(value, kind, error, math.sqrt(shared), effective_sample_size=size, label="log Z")


def require_density(program: Program, method: str) -> Unnormalized:
    """The program, if its density is known up to Z; a ``TypeError`` that says what to do otherwise."""
    if isinstance(program, Unnormalized):
        return program
    name = describe(program)
    if isinstance(program, Bounded):
        raise TypeError(
            f"{name}: its density of x is an integral over latents, not a density up to Z, so {method} cannot answer: "
            "log_evidence with pg.ImportanceSampling() does"
        )
    if isinstance(program, Implicit):
        raise TypeError(f"{name} can only be sampled: its density is never written down, so it has no Z to estimate")
    raise TypeError(f"{method} needs a program of kind Unnormalized or Exact, got {name}")


@contextmanager
def estimating(program: Program, seed: int | None = None) -> Iterator[None]:
    """What log Z is estimated under: no gradients, evaluation mode, no handler outside seeing it, a seed of its own."""
    with ExitStack() as stack:
        for entered in (torch.no_grad(), poutine.block(), scopes.evaluation_mode(program)):
            stack.enter_context(entered)
        if seed is not None:
            stack.enter_context(scopes.forked_generators(seed))
        yield


def one_target(program: Unnormalized, context: Tensor | None) -> Target:
    """The program's target for one context; a ``ValueError`` for several."""
    shape = program.context_shape
    if context is not None and shape is not None and tuple(context.shape) not in (tuple(shape), (1, *shape)):
        raise ValueError(
            f"context must be one, of shape {tuple(shape)}, as each has a Z of its own; got {tuple(context.shape)}. "
            "log_evidence takes one for each row of x"
        )
    return program.target(context)


def rows_at_once(log_density: Callable[[Tensor], Any], row: Tensor, memory: int) -> int:
    """How many rows fit into memory at once, by what autograd keeps of two and of four of them.

    Args:
        log_density: what is to run on them; row: one of them, ``(1, ...)``; memory: bytes.
    """
    kept = [0, 0]
    for i, n in enumerate((2, 4)):

        def note(t: Tensor, i: int = i) -> Tensor:
            kept[i] += t.numel() * t.element_size()
            return t

        rows = row.detach().expand(n, *row.shape[1:]).clone().requires_grad_(row.dtype.is_floating_point)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            log_density(rows)
    own = row.numel() * row.element_size()
    return max(1, memory // (TEMPORARIES * max(own, (kept[1] - kept[0]) // 2)))


def check_seed(seed: Any) -> None:
    """An int or None; a ``ValueError`` otherwise."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed must be an int or None, got {describe(seed)}")


def _differs(value: Any, default: Any) -> bool:
    return value is not default and (isinstance(value, Tensor) or value != default)


def _brief(value: Any) -> str:
    return f"<tensor {tuple(value.shape)}>" if isinstance(value, Tensor) else repr(value)
