r"""The kernels of a noising chain, forwards and backwards, as tables over its steps.

At level i a datum u has become :math:`y_i = \alpha_i u + \sigma_i \varepsilon`, with :math:`\alpha_0 = 1` and
:math:`\sigma_0 = 0`. Between neighbouring levels s = i − 1 and i the same process is the Markov chain

.. math:: q(y_i \mid y_s) = N(k\, y_s,\; b), \qquad k = \alpha_i / \alpha_s, \qquad b = \sigma_i^2 - k^2 \sigma_s^2,

and Bayes' rule for three normals turns one step of it round, once the datum is known:

.. math:: q(y_s \mid y_i, u) = N(c_0 u + c_t y_i,\; v), \qquad c_0 = \frac{\alpha_s b}{\sigma_i^2}, \qquad
          c_t = \frac{k \sigma_s^2}{\sigma_i^2}, \qquad v = \frac{\sigma_s^2 b}{\sigma_i^2} .

A reverse chain that replaces u by a guess :math:`\hat u(y_i)` errs by :math:`c_0 (u - \hat u)`, so its best variance is
:math:`v + c_0^2 V` with V the mean square of :math:`u - \hat u` (Bao et al. 2022), and with variance
:math:`w = v + c_0^2 V` a step costs

.. math:: KL[N(c_0 u + c_t y_i, v) \,\|\, N(c_0 \hat u + c_t y_i, w)] =
          \tfrac12 \Big[ \frac{c_0^2\, ((u - \hat u)^2 - V)}{w} + \log\Big(1 + \frac{c_0^2 V}{v}\Big) \Big]

a feature, whose terms are small where the KL is, so that a sum over a thousand steps loses no digits. At i = 1 the
datum itself is left: :math:`c_0 = 1`, :math:`c_t = v = 0`, and the cost is :math:`-\log N(u; \hat u, V)`. Standard
normal data have :math:`V = \sigma^2 / (\alpha^2 + \sigma^2)`, for which w is the "large" variance of the literature, b
where :math:`\alpha^2 + \sigma^2 = 1`; V = 0 gives the "small" one.

References:
    J. Ho, A. Jain, P. Abbeel, "Denoising diffusion probabilistic models", 2020, arXiv:2006.11239, eqs. 4 to 7;
    F. Bao, C. Li, J. Zhu, B. Zhang, "Analytic-DPM", 2022, arXiv:2201.06503, eq. 10 (the optimal variance).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import register_kl

__all__ = ["LeftOut", "Steps", "Stratified", "normal_kl", "steps_between", "steps_of"]


class Steps(NamedTuple):
    """The numbers of steps 1 to T of a chain; each of shape ``(T,)``.

    Attributes:
        alpha, sigma: of the level a step starts from (backwards), y_i.
        kept, added: forwards, :math:`y_i \\mid y_{i-1} \\sim N(\\mathrm{kept}\\, y_{i-1}, \\mathrm{added})`.
        data, noisy, variance: backwards, :math:`y_{i-1} \\mid y_i, u \\sim N(\\mathrm{data}\\, u + \\mathrm{noisy}\\,
            y_i, \\mathrm{variance})`.
        error: mean square of :math:`u - \\hat u` for standard normal data.
    """

    alpha: Tensor
    sigma: Tensor
    kept: Tensor
    added: Tensor
    data: Tensor
    noisy: Tensor
    variance: Tensor
    error: Tensor


def steps_of(alpha: Tensor, sigma: Tensor) -> Steps:
    """The kernels of a chain from its levels 0 to T, each ``(T + 1,)``; at level 0 they are 1 and 0.

    Example:
        >>> steps = steps_of(torch.tensor([1.0, 0.8, 0.0]), torch.tensor([0.0, 0.6, 1.0]))
        >>> steps.data, steps.variance
        (tensor([1.0000, 0.8000]), tensor([0.0000, 0.3600]))
    """
    return steps_between(alpha[1:], sigma[1:], alpha[:-1], sigma[:-1])


def steps_between(alpha: Tensor, sigma: Tensor, before: Tensor, noise: Tensor) -> Steps:
    """The kernels between levels of ``alpha`` and ``sigma`` and lower ones of ``before`` and ``noise``."""
    spread, power, kept = noise.square(), sigma.square(), alpha / before
    added = power - kept.square() * spread
    return Steps(
        alpha, sigma, kept, added, before * added / power, kept * spread / power, spread * added / power,
        power / (alpha.square() + power),
    )  # fmt: skip


def normal_kl(squared_error: Tensor, error: Tensor, weight: Tensor, variance: Tensor, precision: Tensor) -> Tensor:
    r"""Cost of a reverse step a feature: the KL above; at i = 1, :math:`-\log N(u; \hat u, V)` less its entropy.

    Args:
        squared_error: :math:`(u - \hat u)^2`. error: V. weight: :math:`c_0^2`. variance: v.
        precision: 1 / v, and 0 at i = 1.
    """
    spread = weight * error
    return (weight * (squared_error - error) / (variance + spread) + torch.log1p(spread * precision)) / 2


class Stratified(dist.Uniform):  # type: ignore[misc, no-any-unimported, unused-ignore]
    r"""Numbers that are each uniform in [0, 1), and together evenly spread over the rows.

    .. math:: t_i = (u + i / B) \bmod 1, \qquad u \sim U(0, 1),

    one u for the B rows of a batch (Kingma et al. 2021, appendix I.1). Its density is that of each number alone: model
    and guide have the same site, and it cancels between them.

    Example:
        >>> t = Stratified(torch.tensor(0.0), torch.tensor(1.0)).expand((4,)).sample()
        >>> (t.sort().values.diff() - 0.25).abs().max() < 1e-6
        tensor(True)
    """

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        rows = shape[-1] if len(shape) else 1
        shared = torch.rand((*shape[:-1], 1) if len(shape) else (), dtype=self.low.dtype, device=self.low.device)
        offsets = torch.arange(rows, dtype=self.low.dtype, device=self.low.device) / rows
        return (shared + (offsets if len(shape) else 0.0)) % 1.0


class LeftOut(dist.MaskedDistribution):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """A distribution whose log-density is left out, and so is a KL between two: model and guide have the same one.

    It is ``fn.mask(False)``, but for the KL of that, which is a bare number that losses cannot sum.
    """


@register_kl(LeftOut, LeftOut)  # type: ignore[untyped-decorator, unused-ignore]
def _no_kl(q: LeftOut, p: LeftOut) -> Tensor:
    zero: Tensor = q.base_dist.mean.new_zeros(())
    return zero.expand(q.batch_shape)
