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
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["chain_ess", "effective_sample_size", "log_mean_exp", "pareto_k", "r_hat"]

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


# ------------------------------------------------------------------------------------------------------- Markov chains
def chain_ess(draws: Tensor, kind: Literal["bulk", "tail", "mean"] = "bulk") -> Tensor:
    r"""Effective number of independent draws in Markov chains: :math:`m n / \tau`, τ the autocorrelation time.

    Chains are split in halves. Autocorrelations combine those within chains, :math:`\gamma_t`, with the variance
    between them, :math:`\hat\rho_t = 1 - (W - \bar\gamma_t) / \widehat{\mathrm{var}}^+`, and are summed in pairs up to
    the first that is not positive, after which there is only noise (Geyer's initial monotone sequence).

    Args:
        draws: ``(chains, draws, ...)``, at least four draws of each.
        kind: ``"bulk"``, of the ranks' normal scores; ``"tail"``, the smaller of those of the 5 % and 95 % quantiles;
            ``"mean"``, of the values themselves, for the error of their mean.

    Returns:
        float64, of the shape of one draw; the number of draws where all are equal, nan where some are not finite.

    Raises:
        TypeError, ValueError: for anything but a real tensor with a chain and four draws, or an unknown kind.

    References:
        A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P.-C. Bürkner, "Rank-normalization, folding, and localization:
        an improved R-hat for assessing convergence of MCMC", Bayesian Analysis 16, 2021, arXiv:1903.08008, section 3.

    Example:
        >>> noise = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
        >>> 3500 < chain_ess(noise) < 4500, 350 < chain_ess(noise[:, :100].repeat_interleave(10, 1)) < 450
        (tensor(True), tensor(True))
    """
    if kind not in ("bulk", "tail", "mean"):
        raise ValueError(f"kind must be 'bulk', 'tail' or 'mean', got {kind!r}")

    def of(columns: Tensor) -> Tensor:
        if kind == "mean":
            return _ess(_halves(columns))
        if kind == "bulk":
            return _ess(_normal_scores(_halves(columns)))
        ends = (_ess(_halves((columns <= _quantile(columns, q)).double())) for q in (0.05, 0.95))
        return torch.minimum(*ends)

    return _by_columns(draws, of)


def r_hat(draws: Tensor) -> Tensor:
    r"""How much Markov chains disagree, R-hat: :math:`\sqrt{\widehat{\mathrm{var}}^+ / W}`, 1 where they agree.

    The larger of two: of the ranks' normal scores, for the location, and of those of the distances from the median, for
    the spread; chains split in halves, so that a drift within a chain counts too.

    Args:
        draws: ``(chains, draws, ...)``, at least four draws of each.

    Returns:
        float64, of the shape of one draw; above 1.01 the chains have not mixed. nan where all draws are equal, or some
        are not finite.

    Raises:
        TypeError, ValueError: for anything but a real tensor with a chain and four draws.

    References:
        A. Vehtari et al., 2021, arXiv:1903.08008, sections 2 and 4, as `chain_ess`.

    Example:
        >>> noise = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
        >>> apart = noise + torch.tensor([[0.0], [0.0], [0.0], [2.0]])
        >>> r_hat(noise) < 1.01, r_hat(apart) > 1.1
        (tensor(True), tensor(True))
    """

    def of(columns: Tensor) -> Tensor:
        halves = _halves(columns)
        folded = (halves - _quantile(halves, 0.5)).abs()  # of fair coins all equal, and without an R-hat
        return torch.fmax(*(_scale_reduction(_normal_scores(c)) for c in (halves, folded)))

    return _by_columns(draws, of)


def _by_columns(draws: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``of`` gives for each number of a draw, some columns (chains, draws, columns) at a time."""
    if not isinstance(draws, Tensor) or draws.dtype.is_complex:
        raise TypeError(f"draws must be a real tensor, got {getattr(draws, 'dtype', type(draws).__name__)}")
    if draws.dim() < 2 or draws.shape[0] < 1 or draws.shape[1] < 4:
        raise ValueError(f"draws must have shape (chains, draws, ...) with at least 4 draws, got {tuple(draws.shape)}")
    chains, count = draws.shape[:2]
    flat = draws.detach().reshape(chains, count, -1)
    blocks = flat.split(max(1, BLOCK // (chains * count)), 2)
    found = [torch.where(torch.isfinite(b).all(0).all(0), of(b.double()), math.nan) for b in blocks]
    return torch.cat(found).reshape(draws.shape[2:])


def _halves(columns: Tensor) -> Tensor:
    half = columns.shape[1] // 2
    return torch.cat([columns[:, :half], columns[:, -half:]])


def _normal_scores(columns: Tensor) -> Tensor:
    """Normal quantiles of the ranks over all chains, ties at the mean of theirs (Blom 1958)."""
    chains, count = columns.shape[:2]
    values = columns.flatten(0, 1).T.contiguous()
    ordered = values.sort(1).values
    low, high = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    rank = (low + high + 1).double() / 2
    score: Tensor = torch.special.ndtri((rank - 3 / 8) / (chains * count + 1 / 4))
    return score.T.reshape(columns.shape)


def _quantile(columns: Tensor, q: float) -> Tensor:
    ordered = columns.flatten(0, 1).sort(0).values
    at = q * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return low + (at - math.floor(at)) * (high - low)


def _variances(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Variance within chains, and the estimate of the whole that takes their means into account."""
    count = columns.shape[1]
    within = columns.var(1).mean(0)
    total = within * (count - 1) / count
    return within, total + columns.mean(1).var(0) if len(columns) > 1 else total


def _scale_reduction(columns: Tensor) -> Tensor:
    within, total = _variances(columns)
    return (total / within).sqrt()


def _ess(columns: Tensor) -> Tensor:
    """Effective sample size of (chains, draws, columns), as they are."""
    chains, count, width = columns.shape
    within, total = _variances(columns)
    spectrum = torch.fft.rfft(columns - columns.mean(1, keepdim=True), 2 * count, dim=1)
    covariance = torch.fft.irfft(spectrum.abs().square(), 2 * count, dim=1)[:, :count].mean(0) / count
    rho = 1 - (within - covariance) / total  # (draws, columns)
    rho[0] = 1.0
    pairs = max(0, (count - 3) // 2)  # the last that is looked at, as the noise of the longest lags is the largest
    sums = rho[: 2 * pairs + 2].reshape(pairs + 1, 2, width).sum(1)
    positive = (sums[:pairs] > 0).long().cumprod(0)
    kept = positive.sum(0)
    monotone = sums[:pairs].cummin(0).values
    rest = rho.gather(0, (2 * kept).unsqueeze(0)).squeeze(0).clamp(min=0.0)
    size = chains * count
    tau = (-1 + 2 * (positive * monotone).sum(0) + rest).clamp(min=1 / math.log10(size))
    constant = columns.flatten(0, 1).amax(0) - columns.flatten(0, 1).amin(0) < torch.finfo(torch.float64).eps
    return torch.where(constant, float(size), size / tau)
