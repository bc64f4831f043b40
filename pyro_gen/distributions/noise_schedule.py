r"""What a noise schedule is: α(t), σ(t), λ(t) = log α²/σ² and their relations, and the schedule of a table.

With :math:`x_t = \alpha(t)\, x_0 + \sigma(t)\, \varepsilon` and α² + σ² = 1 everything follows from λ(t) alone:
:math:`\alpha^2` is its sigmoid, :math:`\sigma^2` that of −λ, and as :math:`(\alpha^2)' = \alpha^2 \sigma^2 \lambda'`,

.. math:: \alpha' = \tfrac12 \alpha \sigma^2 \lambda', \qquad \sigma' = -\tfrac12 \sigma \alpha^2 \lambda'.

The schedules of the literature are in `pyro_gen.distributions.noise`, with what holds at t = 0 and t = 1 exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_gen.checks import check_count

__all__ = ["NoiseSchedule", "TableSchedule"]


class NoiseSchedule(nn.Module):
    r"""A schedule: α(t), σ(t), λ(t) and their relations; times are tensors of any shape, in [0, 1].

    A subclass gives :meth:`log_snr` and :meth:`time`, and :meth:`alpha`, :meth:`sigma`, :meth:`derivatives` where it
    does not preserve the variance. What follows from these has a default, right for 0 < t < 1.

    Attributes:
        name: its name in ``Diffusion(schedule=...)``.
        variance_preserving: whether α² + σ² = 1.
        ratios: the least and the greatest σ/α of continuous time: `ends` are their times.
    """

    name: str
    variance_preserving: bool = True
    ratios: tuple[float, float] = (1e-3, 1e3)

    def log_snr(self, t: Tensor) -> Tensor:
        """λ(t) = log α²/σ², of the shape of t."""
        raise NotImplementedError

    def time(self, log_snr: Tensor) -> Tensor:
        """The time at which λ is reached, the inverse of :meth:`log_snr`; past 1 for a λ that no time before 1 has."""
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        """α(t), the factor of the datum."""
        return (logsigmoid(self.log_snr(t)) / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """σ(t), the standard deviation of the noise."""
        return (logsigmoid(-self.log_snr(t)) / 2).exp()

    def log_snr_rate(self, t: Tensor) -> Tensor:
        """λ'(t), which is negative; differentiable where gradients are recorded, in t and in the parameters."""
        rate: Tensor = torch.func.jvp(self.log_snr, (t,), (torch.ones_like(t),))[1]  # traces and nests, unlike autograd
        return rate

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""α'(t) and σ'(t): :math:`\alpha' = \tfrac12 \alpha \sigma^2 \lambda'`, :math:`\sigma' = -\tfrac12 \sigma
        \alpha^2 \lambda'` where α² + σ² = 1."""
        alpha, sigma, rate = self.alpha(t), self.sigma(t), self.log_snr_rate(t)
        return alpha * sigma.square() * rate / 2, -sigma * alpha.square() * rate / 2

    @property
    def ends(self) -> tuple[float, float]:
        """The times between which continuous time runs: where σ/α has its `ratios`, 1 at most."""
        least, greatest = (torch.tensor(-2 * math.log(r), dtype=torch.float64, device="cpu") for r in self.ratios)
        with torch.no_grad():
            return float(self.time(least)), min(1.0, float(self.time(greatest)))

    def grid(self, steps: int) -> Tensor:
        """Times of a chain of T steps, ``(steps + 1,)`` in float64, from 0 upwards.

        Raises:
            ValueError: for fewer than 1 step.
        """
        return torch.arange(check_count(steps, "timesteps") + 1, dtype=torch.float64) / steps

    def extra_repr(self) -> str:
        return f"{self.name!r}"


class TableSchedule(NoiseSchedule):
    r"""The levels of a table, :math:`\bar\alpha_i = \prod_{j \le i} (1 - \beta_j)` at t = i / T.

    Between them :math:`-\log \alpha^2` is linear: in continuous time β is constant in each step. At t = 0 is the datum.

    Args:
        betas: :math:`\beta_1, \dots, \beta_T`, each in (0, 1): a tensor or a sequence of numbers.

    Raises:
        TypeError, ValueError: for another shape, an empty table, or values that are not in (0, 1).

    Example:
        >>> import torch
        >>> from pyro_gen.distributions.noise import TableSchedule
        >>> schedule = TableSchedule([0.1, 0.2, 0.5])
        >>> schedule.alpha(schedule.grid(3)).square()
        tensor([1.0000, 0.9000, 0.7200, 0.3600], dtype=torch.float64)
    """

    name = "table"
    table: Tensor

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        super().__init__()
        values = torch.as_tensor(betas, dtype=torch.float64).detach().clone()
        if values.dim() != 1 or not len(values):
            raise ValueError(f"betas must be a vector of at least one number, got shape {tuple(values.shape)}")
        bad = ~((values > 0) & (values < 1))
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"betas must lie between 0 and 1, and {int(bad.sum())} of {len(values)} do not, first betas[{first}] = "
                f"{float(values[first]):g}: they are 1 − ᾱ_i / ᾱ_(i−1), not ᾱ itself; clip them, at .999 say"
            )
        self.register_buffer("table", torch.cat([values.new_zeros(1), -torch.log1p(-values).cumsum(0)]))
        self._ends = super().ends

    @property
    def steps(self) -> int:
        """Number T of steps of the table."""
        return len(self.table) - 1

    def _step(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """−log α² at t, and its slope in t."""
        table, position = self.table.to(t.dtype), t * self.steps
        index = position.detach().long().clamp(0, self.steps - 1)
        rise = table[index + 1] - table[index]
        return torch.addcmul(table[index], position - index, rise), rise * self.steps

    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(torch.expm1(self._step(t)[0]))

    def alpha(self, t: Tensor) -> Tensor:
        return (self._step(t)[0] / -2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._step(t)[0])).sqrt()

    def log_snr_rate(self, t: Tensor) -> Tensor:
        integral, beta = self._step(t)
        return beta / torch.expm1(-integral)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self.alpha(t), self._step(t)[1]
        return -beta * alpha / 2, beta * alpha.square() / (2 * self.sigma(t))

    def time(self, log_snr: Tensor) -> Tensor:
        table, integral = self.table.to(log_snr.dtype), -logsigmoid(log_snr)
        index = (torch.searchsorted(table, integral.detach()) - 1).clamp(0, self.steps - 1)
        return (index + (integral - table[index]) / (table[index + 1] - table[index])) / self.steps

    @property
    def ends(self) -> tuple[float, float]:
        """As of any schedule."""
        return self._ends

    def grid(self, steps: int) -> Tensor:
        """The times of the table's own levels, the only chain that it has.

        Raises:
            ValueError: for another number of steps than the table's.
        """
        if check_count(steps, "timesteps") != self.steps:
            raise ValueError(
                f"a TableSchedule of {self.steps} betas makes a chain of timesteps={self.steps}, got {steps}: "
                "pass that, or timesteps=None for continuous time, or a table of other length"
            )
        return super().grid(steps)

    def extra_repr(self) -> str:
        return f"{self.steps} betas"
