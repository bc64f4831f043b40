r"""What all methods of evidence share: the question, and who can answer it without a method.

The evidence of a row is its density under the model, :math:`\log p(x) = \log f(x) - \log Z`, latents integrated out.
What can be said of it follows from the kind of the program: an `Exact` one says it; a `Bounded` one has a guide, from
whose draws it is estimated; an `Unnormalized` one lacks log Z; an `Implicit` one has no density at all.
"""

from __future__ import annotations

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Bounded, Evidence, EvidenceMethod, Exact, Implicit, Program, Unnormalized
from pyro_gen.checks import describe

REPEATS = 16  # of a density that is estimated, to know its error

__all__ = ["exact_evidence", "log_evidence", "require_bounded"]


def log_evidence(
    program: Program, x: Tensor, context: Tensor | None = None, *, method: EvidenceMethod | None = None
) -> Evidence:
    r"""Log-evidence of each row, :math:`\log p(x_n)`: the latents integrated out, with its kind and its error.

    Args:
        program: the model whose evidence it is; the method says which kinds it can answer for.
        x: data of shape ``(rows, *event_shape)``.
        context: ``(rows, *context_shape)``, for a conditional program.
        method: how, as ``pg.ImportanceSampling(5000)``. An exact program needs none and answers exactly whatever it is.

    Returns:
        :class:`Evidence` with one entry a row, in nats, float64 on the CPU; ``.mean()`` and ``.sum()`` carry its error.

    Raises:
        TypeError: for a program whose density cannot be had this way (a GAN, an energy), or a method that is none.
        ValueError: for data that do not fit the program.

    Example:
        >>> from pyro_gen import VAE
        >>> from pyro_gen.evidence import ImportanceSampling
        >>> vae = VAE(event_shape=3, latent_dim=2)
        >>> evidence = log_evidence(vae, vae.sample(4, seed=0), method=ImportanceSampling(100, seed=0))
        >>> evidence.value.shape, evidence.mean().value.shape
        (torch.Size([4]), torch.Size([]))
    """
    if not isinstance(program, Program):
        hint = "" if isinstance(program, type) or not callable(program) else ": pg.Bounded(model, guide, event_shape)"
        if hasattr(program, "history"):
            hint = ": pass result.program"
        raise TypeError(f"log_evidence takes a program, got {describe(program)}{hint}")
    if method is None and isinstance(program, Exact):
        return exact_evidence(program, x, context)
    if isinstance(method, type) or not isinstance(method, EvidenceMethod):
        raise TypeError(f"method must be a method of evidence, as pg.ImportanceSampling(5000); got {describe(method)}")
    return method.log_evidence(program, x, context)


def exact_evidence(program: Exact, x: Tensor, context: Tensor | None = None) -> Evidence:
    """The evidence of a program that has it in closed form: its ``log_prob``, of kind ``"exact"``.

    Where ``log_prob`` is itself an unbiased estimate, the mean of several, an ``"estimate"`` with its standard error.
    """
    batch = program.check(x, context)

    def once() -> Tensor:
        parts = zip(*(part.split(1024) for part in batch), strict=True)
        return torch.cat([program.log_prob(*rows).to("cpu", torch.float64) for rows in parts])

    with torch.no_grad(), poutine.block(), scopes.evaluation_mode(program):
        if not program.stochastic:
            return Evidence(once(), "exact")
        values = torch.stack([once() for _ in range(REPEATS)])
        return Evidence(values.mean(0), "estimate", values.std(0) / REPEATS**0.5)


def require_bounded(program: Program, method: str) -> Bounded:
    """The program, if a guide stands in for its integral; a ``TypeError`` that says what to do otherwise."""
    if isinstance(program, Bounded):
        return program
    name = describe(program)
    if isinstance(program, Implicit):
        raise TypeError(
            f"{name} can only be sampled: its density is never written down, so there is no log p(x) to estimate. "
            "Compare its samples with data by two-sample scores (pg.diagnostics.mmd, energy_distance, c2st), or give "
            "the model an observation noise and a guide: pg.Bounded(model, guide, event_shape)"
        )
    if isinstance(program, Unnormalized):
        raise TypeError(
            f"{name} has its density up to Z only, and {method} integrates over latents, of which it has none: "
            "log p(x) is log_density(x) less log Z, which takes a method of its own"
        )
    raise TypeError(f"{method} needs a program of kind Bounded or Exact, got {name}")
