r"""Importance sampling: the integral over the latents as a mean over draws of the guide.

.. math:: p(x) = \int p(x, z)\, dz = E_{q(z \mid x)}\Big[\frac{p(x, z)}{q(z \mid x)}\Big]
          \approx \hat p(x) = \frac1K \sum_{k=1}^K w_k, \qquad w_k = \frac{p(x, z_k)}{q(z_k \mid x)} .

The mean weight is unbiased for the normalizer p(x), so its logarithm is too low on average (Jensen): by
:math:`\mathrm{Var}(w) / (2 K\, p(x)^2)` to first order, half the squared standard error. Where the weights have finite
variance that is far below the error itself and the value is an *estimate*. Where the guide's tails are thinner than the
posterior's, the draws that matter are never seen, error and effective sample size look fine, and the value is a *lower
bound* only: the tail index k̂ tells the two apart.

Draws stand in a plate to the left of the program's own, so the guide's network runs once for many draws of a row, and
the decoder sees one large batch. Weights are summed in float64 whatever the program computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Distribution
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_gen import handlers
from pyro_gen.base import (
    PARETO_K_LIMIT,
    Bounded,
    Evidence,
    EvidenceMethod,
    Exact,
    Implicit,
    Program,
    Unnormalized,
    check_count,
    describe,
)
from pyro_gen.statistics import effective_sample_size, log_mean_exp, pareto_k

__all__ = ["ImportanceSampling", "log_evidence"]

PROBE_ROWS = 32
ROW_BYTES = 48  # of a stored log weight in float64 and what the statistics make of it
CACHE = 2**25  # bytes made by a chunk on a CPU, of which a few are alive at once: larger chunks leave the cache and are slower


def log_evidence(program: Program, x: Tensor, context: Tensor | None = None, *, method: EvidenceMethod) -> Evidence:
    r"""Log-evidence of each row, :math:`\log p(x_n)`: the integral over the latents, with its kind and its error.

    Args:
        program: the model whose evidence it is; the method says which kinds it can answer for.
        x: data of shape ``(rows, *event_shape)``; context: ``(rows, *context_shape)`` for a conditional program.
        method: how, as ``pg.ImportanceSampling(5000)``. Exact programs answer exactly, whatever the method's size.

    Returns:
        :class:`Evidence` with one entry a row, in nats, float64 on the CPU; ``.mean()`` and ``.sum()`` carry its error.

    Raises:
        TypeError: for a program whose density cannot be had this way (a GAN, an energy), or a method that is none.
        ValueError: for data that do not fit the program.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0).expand([1]).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x.squeeze(-1) / 2, 0.8))
        >>> pg_program = Bounded(model, guide, event_shape=1)
        >>> log_evidence(pg_program, torch.zeros(3, 1), method=ImportanceSampling(4000, seed=0)).mean()
    """
    if not isinstance(program, Program):
        hint = "" if isinstance(program, type) or not callable(program) else ": pg.Bounded(model, guide, event_shape)"
        raise TypeError(f"log_evidence takes a program, got {describe(program)}{hint}")
    if isinstance(method, type) or not isinstance(method, EvidenceMethod):
        raise TypeError(f"method must be a method of evidence, as pg.ImportanceSampling(5000); got {describe(method)}")
    return method.log_evidence(program, x, context)


@dataclass(frozen=True, repr=False)
class ImportanceSampling:
    r"""Evidence by importance sampling from the guide: :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k \mid x)`.

    For programs of kind `Bounded` whose latents stand inside the plate over rows. Exact programs are not sampled: their
    ``log_prob`` is the answer. The result is an ``"estimate"``; if k̂ of any row is above 0.7 it is relabelled a
    ``"lower bound"``, and ``pareto_k`` says which rows are to blame.

    Args:
        num_samples: K, draws of the guide a row. Below 21 no tail can be fitted, and the result is a lower bound: the
            importance-weighted bound of K draws.
        memory: bytes the draws of one chunk may take, on the program's device; rows and draws are cut to fit.
        seed: makes the result repeatable and leaves the global generators as they were. The same seed, data, program
            and memory give the same numbers; another memory cuts other chunks and so draws other numbers.
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
        others = [f for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return f"ImportanceSampling({', '.join([str(self.num_samples), *(f'{f.name}={getattr(self, f.name)!r}' for f in others)])})"

    def log_evidence(self, program: Program, x: Tensor, context: Tensor | None = None) -> Evidence:
        """See :func:`log_evidence`."""
        if isinstance(program, Exact):
            return exact_evidence(program, x, context)
        values, errors, sizes, tails = [], [], [], []
        for log_weights, resolution in self._chunks(program, x, context):
            value, error = log_mean_exp(log_weights)
            values.append(value)
            errors.append(error)
            sizes.append(effective_sample_size(log_weights))
            tails.append(pareto_k(log_weights, resolution=resolution))
        tail = torch.cat(tails)
        return Evidence(
            torch.cat(values),
            "lower bound" if bool((tail > PARETO_K_LIMIT).any()) else "estimate",
            torch.cat(errors),
            effective_sample_size=torch.cat(sizes),
            pareto_k=tail,
        )

    def log_weights(self, program: Program, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The log weights themselves: ``(num_samples, rows)``, in nats, float64 on the CPU (8 bytes each)."""
        return torch.cat([w for w, _ in self._chunks(program, x, context)], 1)

    def _chunks(self, program: Program, x: Tensor, context: Tensor | None) -> Iterator[tuple[Tensor, float]]:
        """Log weights of some rows at a time, all draws of them: (draws, rows of the chunk); and their resolution."""
        batch = require_bounded(program).check(x, context)
        with ExitStack() as stack:
            for entered in (torch.no_grad(), poutine.block(), handlers.evaluation_mode(program)):
                stack.enter_context(entered)
            plan = self._probe(program, batch)
            if self.seed is not None:
                stack.enter_context(handlers.forked_generators(self.seed))
            stack.enter_context(_without_validation())
            for start in range(0, len(x), plan.rows):
                rows = tuple(part[start : start + plan.rows] for part in batch)
                parts = [self._draw(program, rows, k, plan.shape) for k in _even(self.num_samples, plan.draws)]
                log_weights = torch.cat(parts)
                bad = torch.isnan(log_weights).any(0) | (log_weights == math.inf).any(0)
                if bool(bad.any()):
                    raise ArithmeticError(
                        f"log p(x, z) - log q(z | x) is not a number in {int(bad.sum())} of {len(bad)} rows, first in "
                        f"row {start + int(bad.nonzero()[0])}: look at what encoder and decoder give for that row"
                    )
                yield log_weights, plan.resolution

    def _draw(self, program: Program, rows: tuple[Tensor, ...], draws: int, shape: handlers.Structure) -> Tensor:
        """Log weights of some draws of some rows, (draws, rows), float64 on the CPU."""
        model, guide = program.model, program.guide
        if self.vectorize_particles:
            weights = handlers.log_weight(model, guide, *rows, particles=draws, shape=shape)
        else:
            repeated = (part.repeat(draws, *[1] * (part.dim() - 1)) for part in rows)
            weights = handlers.log_weight(model, guide, *repeated, shape=shape)
        expected = (draws, len(rows[0])) if self.vectorize_particles else (draws * len(rows[0]),)
        if tuple(weights.shape) != expected:
            raise ValueError(
                f"the program gives weights of shape {tuple(weights.shape)} for a batch of {len(rows[0])} rows and "
                f"{draws} draws, not {expected}: its plate over rows must be as long as its batch, "
                'pyro.plate("data", x.shape[0])'
            )
        return weights.reshape(draws, -1).to("cpu", torch.float64)

    def _probe(self, program: Program, batch: tuple[Tensor, ...]) -> _Plan:
        """Run the pair plainly over all rows, with validation as it stands, and see what a draw of a row costs."""
        model, guide = program.model, program.guide
        few = tuple(part[:PROBE_ROWS] for part in batch)
        count = len(few[0])
        with handlers.preserved_state(model, guide):
            shape, _ = handlers.structure(model, guide, *few)
            missing = [name for name in shape.model_latents if name not in shape.guide_latents]
            if missing:
                raise ValueError(
                    f"latent site {', '.join(map(repr, missing))} of the model is not in the guide, so it has no weight: "
                    "add it to the guide"
                )
            handlers.require_local(shape, "ImportanceSampling")
            plain = _bytes_of(lambda: handlers.log_weight(model, guide, *few, shape=shape))
            if is_validation_enabled():
                step = max(1, count * self.memory // max(1, plain))
                for start in range(0, len(batch[0]), step):
                    handlers.log_weight(model, guide, *(part[start : start + step] for part in batch), shape=shape)
            if self.vectorize_particles:
                check_broadcasting(model, guide, few, shape)
            two, four = (_bytes_of(lambda k=k: self._draw(program, few, k, shape)) for k in (2, 4))
        a_draw = max(1, (four - two) // (2 * count)) + ROW_BYTES
        a_row = max(0, two - 2 * count * a_draw) // count
        memory = self.memory if batch[0].device.type != "cpu" else min(self.memory, CACHE)
        rows = min(len(batch[0]), max(1, memory // (self.num_samples * a_draw + a_row)))
        draws = min(self.num_samples, max(1, (memory - a_row * rows) // (a_draw * rows)))
        resolution = math.sqrt(torch.finfo(program.template().dtype).eps)
        return _Plan(shape, rows, draws, resolution)


class _Plan(NamedTuple):
    shape: handlers.Structure
    rows: int
    draws: int
    resolution: float


def exact_evidence(program: Exact, x: Tensor, context: Tensor | None = None) -> Evidence:
    """The evidence of a program that has it in closed form: ``log_prob``, of kind ``"exact"``."""
    batch = program.check(x, context)
    with torch.no_grad(), poutine.block(), handlers.evaluation_mode(program):
        parts = zip(*(part.split(1024) for part in batch), strict=True)
        return Evidence(torch.cat([program.log_prob(*rows).to("cpu", torch.float64) for rows in parts]), "exact")


def require_bounded(program: Program) -> Bounded:
    """The program, if a guide stands in for its integral; a ``TypeError`` that says what to do otherwise."""
    if isinstance(program, Bounded):
        return program
    name = describe(program)
    if isinstance(program, Implicit):
        raise TypeError(
            f"{name} can only be sampled: its density is never written down, so there is no log p(x) to estimate. "
            "Compare its samples with data, or give it an observation model and a guide: "
            "pg.Bounded(model, guide, event_shape)"
        )
    if isinstance(program, Unnormalized):
        raise TypeError(
            f"{name} has a density known up to Z only, and ImportanceSampling integrates over latents, of which it has "
            "none: take log_density(x), and log Z by a method made for it"
        )
    raise TypeError(f"ImportanceSampling needs a program of kind Bounded or Exact, got {name}")


def check_broadcasting(
    model: Callable[..., Any], guide: Callable[..., Any] | None, batch: tuple[Any, ...], shape: handlers.Structure
) -> None:
    """Check that two draws at once weigh what each weighs alone; a ``ValueError`` if the program does not broadcast."""
    advice = "make its networks take leading dimensions, or use vectorize_particles=False"
    plated = handlers.with_particles(2, shape.plate_nesting, model, guide or _nothing)
    try:
        guide_trace, model_trace = handlers.pair_traces(plated[0], plated[1], *batch)
        together = handlers.weigh(guide_trace, model_trace, shape)
        if together.dim() != 2:
            together = together.expand(2, -1)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"the program runs on a batch, but not with a dimension of draws to its left: {advice}") from error
    for index in range(2):
        one = _pick(guide_trace, index, shape)
        alone = handlers.weigh(*_replayed(model, guide, one, batch), shape)
        tolerance = math.sqrt(torch.finfo(alone.dtype).eps)
        if not torch.allclose(together[index], alone, rtol=tolerance, atol=tolerance, equal_nan=True):
            row = int((together[index] - alone).abs().argmax())
            raise ValueError(
                f"the program mixes up draws when several run at once: the log weight of row {row} is "
                f"{float(together[index, row]):.6g} among others and {float(alone[row]):.6g} alone; {advice}"
            )


def _nothing(*batch: Any) -> None:
    return None


def _pick(trace: Trace, index: int, shape: handlers.Structure) -> Trace:
    """The trace of one draw out of a plate of them."""
    one = Trace()
    for name, site in handlers.sample_sites(trace).items():
        dim = site["value"].dim() - site["fn"].event_dim - shape.plate_nesting - 1
        one.add_node(name, **{**site, "value": site["value"].select(dim, index) if dim >= 0 else site["value"]})
    return one


def _replayed(
    model: Callable[..., Any], guide: Callable[..., Any] | None, trace: Trace, batch: tuple[Any, ...]
) -> tuple[Trace, Trace]:
    return handlers.pair_traces(model, None if guide is None else poutine.replay(guide, trace=trace), *batch)


def _even(total: int, most: int) -> list[int]:
    """``total`` in the fewest parts of at most ``most``, as even as can be."""
    parts = math.ceil(total / most)
    return [total // parts + (i < total % parts) for i in range(parts)]


@contextmanager
def _without_validation() -> Iterator[None]:
    default = Distribution._validate_args  # torch's own switch, which Pyro's would leave as Pyro's own stands
    with pyro.validation_enabled(False):
        yield
    Distribution.set_default_validate_args(default)


class _Allocations(TorchDispatchMode):
    """Adds up the bytes of every tensor that is made: no less than the memory in use at any one time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in known:
                self.bytes += made.untyped_storage().nbytes()
        return out


def _bytes_of(run: Callable[[], Any]) -> int:
    with _Allocations() as seen:
        run()
    return seen.bytes
