r"""How far a sample of importance weights can be trusted: its mean, its error, its effective size, its tail.

Weights :math:`w_k = f(z_k) / q(z_k)` of draws from q estimate :math:`Z = \int f` by their mean; everything here takes
their logarithms. Three numbers say how good that mean is. The standard error of its logarithm, by the delta method, is
the coefficient of variation over :math:`\sqrt K`,

.. math:: se = \sqrt{\frac{K \sum_k \tilde w_k^2 - 1}{K - 1}}, \qquad \tilde w_k = w_k \Big/ \sum_j w_j ,

and :math:`1 / \sum_k \tilde w_k^2` counts the draws that carry the mean. Both are computed from the weights that were
drawn and say nothing of the large ones that were not. The third looks there: above a high threshold the weights follow
a generalized Pareto distribution, whose shape k is the inverse of the number of finite moments. Its estimate k̂ above
1/2 says that the variance is infinite or as good as that; above 0.7 no practical number of draws suffices (Vehtari et
al. 2024), and the log of the mean weight, always too low on average, is then a lower bound and nothing more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["effective_sample_size", "log_mean_exp", "pareto_k"]

PRIOR_SCALE, PRIOR_SHAPE, PRIOR_COUNT = 3.0, 0.5, 10.0  # the weak priors of the fit, as in the R package loo and ArviZ
BLOCK = 2**20  # numbers in one intermediate of the fit: 8 MiB, about the size of a cache


def pareto_k(log_weights: Tensor, dim: int = 0, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""Tail index k̂ of importance weights: the shape of a generalized Pareto distribution fitted to the largest ones.

    The tail is what exceeds the (M + 1)-th largest of K weights, :math:`M = \lceil \min(K / 5, 3 \sqrt K) \rceil`. It
    is fitted by the estimator of Zhang & Stephens, drawn towards 1/2 by a prior worth ten draws.

    Args:
        log_weights: log w, in nats, any shape; -inf is a weight of zero.
        dim: the dimension of the draws.
        dtype: the type the log weights were computed in, if it is not their own. It tells rounding from spread: with
            :math:`\epsilon` its resolution, differences up to :math:`\max(\sqrt\epsilon, 16\, \epsilon\, |\log w|)`
            count as none (3e-4 nats in float32).

    Returns:
        k̂, float64, of the shape of ``log_weights`` without ``dim``. Below 0.5 good, to 0.7 usable, above it the mean
        weight cannot be trusted. Where there is nothing to fit: ``-inf`` if the largest M + 1 weights are all equal
        within ``resolution`` (a bounded tail with its mass at the end; an exact guide); ``inf`` if the tail has fewer
        than five weights (K ≤ 20, ties at the threshold, nothing but zero weights), so that nothing is known; ``nan``
        if a weight is nan or infinite.

    Raises:
        TypeError, ValueError: for anything but a real floating point tensor with at least one draw.

    References:
        A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry, "Pareto smoothed importance sampling", JMLR 25(72), 2024,
        arXiv:1507.02646, sections 2 and 3, appendix C.
        J. Zhang, M. A. Stephens, "A new and efficient estimation method for the generalized Pareto distribution",
        Technometrics 51, 2009, doi:10.1198/tech.2009.08017, eqs. 5-9.

    Example:
        >>> z = torch.randn(4000, generator=torch.Generator().manual_seed(0))
        >>> light, heavy = -0.1 * z**2, 0.6 * z**2   # weights of a guide too wide, and of one too narrow
        >>> pareto_k(torch.stack([light, heavy], 1)) > 0.7
        tensor([False,  True])
    """
    draws = _draws_first(log_weights, dim)
    epsilon = torch.finfo(dtype or log_weights.dtype).eps
    count, rest = draws.shape[0], draws.shape[1:]
    length = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    largest = draws.reshape(count, -1).T.contiguous().double()
    # descending, nan first; of a few draws all, as four of them make no tail to fit but may show that all are equal
    largest = largest.topk(length + 1 if length > 4 else count, dim=1).values
    grid = 30 + math.isqrt(length)
    blocks = largest.split(max(1, BLOCK // (grid * max(1, length))))
    return torch.cat([_tail_index(block, length, grid, epsilon) for block in blocks]).reshape(rest)


def _tail_index(largest: Tensor, length: int, grid: int, epsilon: float) -> Tensor:
    """k̂ of each row of ``largest``: log weights in descending order, of which ``length`` may make the tail."""
    top = largest[:, :1]
    relative = torch.where(torch.isfinite(top), largest - top, torch.zeros_like(largest))
    threshold = relative[:, -1:].clamp_min(math.log(torch.finfo(torch.float64).tiny))
    tail = relative[:, :-1].flip(1)[:, -length:]  # ascending
    inside = tail > threshold
    n = inside.sum(1, keepdim=True)
    # exp(tail) - exp(threshold) to full relative accuracy; zeros stand for what is not in the tail, on its left
    excess = torch.where(inside, -tail.exp() * torch.expm1(threshold - tail), 0.0)
    k = torch.full_like(top, math.inf)
    if length > 4:
        k = torch.where(n > 4, _generalized_pareto_shape(excess, n, grid), k)
    if largest.shape[1] > 1:
        rounding = (16 * epsilon * top.abs()).clamp_min(math.sqrt(epsilon))
        k = torch.where((relative[:, -1:] >= -rounding) & torch.isfinite(top), -math.inf, k)
    return torch.where(torch.isnan(top) | (top == math.inf), math.nan, k).squeeze(1)


def _generalized_pareto_shape(excess: Tensor, n: Tensor, grid: int) -> Tensor:
    """Zhang & Stephens' estimate of the shape, with its prior, from the last n of each row, ascending: (rows, 1)."""
    length = excess.shape[1]
    points = 30 + n.double().sqrt().floor()  # of the grid over b = -k / sigma; rows may use fewer than `grid`
    j = torch.arange(1, grid + 1, device=excess.device, dtype=torch.float64)
    used = j <= points
    quartile = excess.gather(1, (length - n + (n / 4 + 0.5).long() - 1).clamp(0, length - 1))
    b = (1 - (points / (j - 0.5)).sqrt()) / (PRIOR_SCALE * quartile) + 1 / excess[:, -1:]
    k = torch.log1p(-b.unsqueeze(2) * excess.unsqueeze(1)).sum(2) / n  # the zeros add nothing
    profile = n * (torch.log(-b / k) - k - 1)
    weight = torch.softmax(torch.where(used, profile, -math.inf), 1)
    weight = torch.where(weight >= 10 * torch.finfo(torch.float64).eps, weight, 0.0)
    weight = weight / weight.sum(1, keepdim=True)
    b_mean = torch.where(weight > 0, weight * b, 0.0).sum(1, keepdim=True)
    k = torch.log1p(-b_mean * excess).sum(1, keepdim=True) / n
    return (n * k + PRIOR_COUNT * PRIOR_SHAPE) / (n + PRIOR_COUNT)


def effective_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Number of draws that carry the mean weight, :math:`1 / \sum_k \tilde w_k^2`: from 1 to K.

    Args:
        log_weights: log w, in nats, any shape; -inf is a weight of zero.
        dim: the dimension of the draws.

    Returns:
        float64, of the shape of ``log_weights`` without ``dim``; 0 where all weights are zero.

    Raises:
        TypeError, ValueError: for anything but a real floating point tensor with at least one draw.

    References:
        A. Kong, "A note on importance sampling using standardized weights", technical report 348, Chicago, 1992.

    Example:
        >>> effective_sample_size(torch.tensor([0.0, 0.0, 0.0, -torch.inf]))
        tensor(3., dtype=torch.float64)
    """
    draws = _draws_first(log_weights, dim).double()
    top = draws.amax(0)
    weights = torch.exp(draws - torch.where(top == -math.inf, 0.0, top))
    size = weights.sum(0).square() / weights.square().sum(0)
    return torch.where(top == -math.inf, 0.0, size)


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    r"""Log of the mean weight, :math:`\log \frac1K \sum_k w_k`, and its standard error by the delta method.

    Args:
        log_weights: log w, in nats, any shape; -inf is a weight of zero.
        dim: the dimension of the draws.

    Returns:
        ``(value, standard_error)`` in nats, float64, of the shape of ``log_weights`` without ``dim``. The value is too
        low on average, by half the squared standard error to first order. The error of a single draw is nan.

    Raises:
        TypeError, ValueError: for anything but a real floating point tensor with at least one draw.

    Example:
        >>> value, standard_error = log_mean_exp(torch.log(torch.tensor([1.0, 3.0])))
        >>> value.exp(), standard_error   # mean 2, standard deviation of the mean 1: relative error 1/2
        (tensor(2.0000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    draws = _draws_first(log_weights, dim).double()
    top = draws.amax(0)
    weights = torch.exp(draws - torch.where(top == -math.inf, 0.0, top))  # from 0 to 1: no overflow, no cancellation
    mean = weights.mean(0)
    if draws.shape[0] == 1:
        return mean.log() + top, torch.full_like(mean, math.nan)
    return mean.log() + top, weights.std(0) / (mean * math.sqrt(draws.shape[0]))


def _draws_first(log_weights: Tensor, dim: int) -> Tensor:
    if not isinstance(log_weights, Tensor):
        raise TypeError(f"log_weights must be a tensor, got {type(log_weights).__name__}: use torch.as_tensor")
    if not log_weights.dtype.is_floating_point:
        raise TypeError(f"log_weights must be floating point, got {log_weights.dtype}")
    if not -log_weights.dim() <= dim < log_weights.dim():
        raise ValueError(f"dim={dim} is not a dimension of log_weights, which has shape {tuple(log_weights.shape)}")
    if log_weights.shape[dim] == 0:
        raise ValueError(f"log_weights has no draws: shape {tuple(log_weights.shape)}, dim={dim}")
    return log_weights.detach().movedim(dim, 0)
