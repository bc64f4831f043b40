"""The tail of a guide's importance weights: can it stand in for the posterior?"""

from __future__ import annotations

from torch import Tensor

from pyro_gen import statistics
from pyro_gen.base import Evidence, Program
from pyro_gen.checks import describe
from pyro_gen.evidence import ImportanceSampling

__all__ = ["pareto_k"]


def pareto_k(
    source: Tensor | Evidence | Program,
    x: Tensor | None = None,
    context: Tensor | None = None,
    *,
    dim: int = 0,
    num_samples: int = 1000,
    seed: int | None = None,
) -> Tensor:
    r"""Tail index k̂ of importance weights: of log weights, of an evidence, or of a program's guide row by row.

    The weights :math:`p(x, z) / q(z \mid x)` of a guide have about 1/k finite moments. Below 0.5 the guide is a good
    stand-in for the posterior; above 0.7 it misses a part of it that matters, and what rests on it is a bound at best.

    Args:
        source: log weights (a tensor), an :class:`~pyro_gen.Evidence` that was estimated, or a program with a guide.
        x: data of shape ``(rows, *event_shape)``, and ``context`` beside it: with a program only.
        dim: the dimension of the draws, of a tensor of log weights.
        num_samples: draws of the guide a row, with a program.
        seed: with a program, makes the result repeatable.

    Returns:
        k̂, float64: one a row, or of the shape of the log weights without ``dim``. See
        :func:`pyro_gen.statistics.pareto_k` for ±inf and nan.

    Raises:
        TypeError: for another source, or a program or evidence without weights.

    References:
        Y. Yao, A. Vehtari, D. Simpson, A. Gelman, "Yes, but did it work? Evaluating variational inference", 2018,
        arXiv:1802.02538, section 3.

    Example:
        >>> import torch
        >>> pareto_k(torch.zeros(100))   # equal weights: an exact guide
        tensor(-inf, dtype=torch.float64)
    """
    if isinstance(source, Tensor):
        if x is not None or context is not None:
            raise TypeError("pareto_k of log weights takes no x or context: they belong to a program")
        return statistics.pareto_k(source, dim)
    if isinstance(source, Program):
        if x is None:
            raise TypeError("pareto_k of a program needs the data whose weights it judges: pareto_k(program, x)")
        source = ImportanceSampling(num_samples, seed=seed).log_evidence(source, x, context)
    if not isinstance(source, Evidence):
        raise TypeError(f"pareto_k takes log weights, an Evidence or a program, got {describe(source)}")
    if source.pareto_k is None:
        raise TypeError(f"there are no importance weights to judge: this evidence is of kind {source.kind!r}")
    return source.pareto_k
