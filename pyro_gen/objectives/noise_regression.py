r"""Regressing noise (Vincent 2011; Ho et al. 2020): what a program with a score at every noise level is trained by.

Draw a level t and noise, :math:`y = \alpha u + \sigma \varepsilon` with :math:`u = (x - m) / s`. Whatever the network
predicts, its output F is linear in :math:`\hat\varepsilon = c y + d F` (`Coefficients`), and the mean of ε given y is
:math:`-\sigma \nabla \log p_t(y)`. So the minimum over all functions of

.. math:: L = E_{x, t, \varepsilon}\, \tfrac12\, w(t)\, |\hat\varepsilon - \varepsilon|^2
            = E\, \tfrac12\, w(t)\, \frac{\alpha^2 b^2}{\sigma^2}\, |F - F^*|^2, \qquad
            F^* = \frac{\sigma c}{b} u - \frac{\sigma a}{b} \varepsilon

is the score at every level, for every w > 0; w says how the levels share one network. The second form is the first
without its cancellation, with :math:`\hat u = a y + b F`: as :math:`\alpha a + \sigma c = 1` and
:math:`\alpha b + \sigma d = 0`, the target has two terms, those of the prediction itself (ε for ε, u for u,
:math:`\alpha\varepsilon - \sigma u` for v), and it holds at a last level where α = 0 too, at which errors of ε vanish.

*Weights.* With :math:`\lambda = \log \alpha^2/\sigma^2` the errors of the predictions differ by factors of λ alone,
:math:`|\hat u - u|^2 = e^{-\lambda} |\hat\varepsilon - \varepsilon|^2`, and the variational bound in continuous time is
:math:`\tfrac12 \int |\hat\varepsilon - \varepsilon|^2\, d\lambda` (Kingma et al. 2021): its weight is the step of λ,
divided by the density of the levels that are drawn.

*Levels* are drawn with low discrepancy, :math:`u_i = (u + i/B) \bmod 1` with one uniform u for the B rows: each row has
the right distribution, and a batch has all levels in equal shares, which spares most of the variance that t adds.

In discrete time all that depends on the level is a table of six numbers a level, looked up by one index.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import pyro.poutine as poutine
import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor
from torch.nn.functional import mse_loss

from pyro_gen import handlers, scopes
from pyro_gen.base import Noised, ObjectiveModule, context_error
from pyro_gen.checks import describe
from pyro_gen.objectives.couplings import Coupling, optimal_pairs
from pyro_gen.objectives.unreached import reaching, unreached

__all__ = ["NoiseRegressionModule", "Regression", "Time", "Weighting"]

Weighting = Literal["epsilon", "x0", "v", "edm", "truncated_snr", "min_snr", "velocity", "elbo", "sigmoid"]
Time = Literal["uniform", "logit_normal", "lognormal"]

FARTHEST = 30.0  # nats of λ that an integral counts: a last level may have no signal at all, λ = −∞
EDM_MEAN, EDM_SPREAD = -1.2 + math.log(2), 1.2  # of log σ/α, for data of standard deviation 1: Karras et al. have .5


@dataclass(frozen=True)
class Regression:
    """Which levels, how weighed, and which noise for which datum.

    Attributes:
        weighting: w(t), by name; time: distribution of the level, by name.
        gamma: of ``"min_snr"``; bias: of ``"sigmoid"``.
        coupling: of data and noise; block: rows within which it is optimal.
    """

    weighting: Weighting
    time: Time
    gamma: float = 5.0
    bias: float = 2.0
    coupling: Coupling = "independent"
    block: int = 64

    def __post_init__(self) -> None:
        for name, names in (("weighting", Weighting), ("time", Time), ("coupling", Coupling)):
            given = getattr(self, name)
            if not isinstance(given, str) or given not in get_args(names):
                known = ", ".join(map(repr, get_args(names)))
                raise ValueError(f"{name} must be one of {known}, got {describe(given)}")
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)) or not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be positive and finite, got {describe(self.gamma)}")
        if isinstance(self.bias, bool) or not isinstance(self.bias, (int, float)) or not math.isfinite(self.bias):
            raise ValueError(f"bias must be a finite number, got {describe(self.bias)}")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 2:
            raise ValueError(f"block must be a number of rows, 2 at least, got {describe(self.block)}")

        if self.integral and self.time != "uniform":
            raise ValueError(
                f"weighting={self.weighting!r} is an integral over λ, to which time={self.time!r} would only add a "
                "variance without bound: leave time= out"
            )

    @property
    def integral(self) -> bool:
        """Whether the loss is an integral over λ, so that w(t) has the density of the levels drawn in it."""
        return self.weighting in ("elbo", "sigmoid")


class Levels(NamedTuple):
    """What the loss has of a level, numbers of one shape: the network sees ``signal · u + noise · ε`` and ``level``,
    is to say ``of_data · u + of_noise · ε``, and its squared error counts ``weight``."""

    signal: Tensor
    noise: Tensor
    level: Tensor
    of_data: Tensor
    of_noise: Tensor
    weight: Tensor


class NoiseRegressionModule(ObjectiveModule):
    """The loss; in discrete time its state is the table of the levels, which no checkpoint holds."""

    objective: Any
    average = 0.999
    table: Tensor
    cumulative: Tensor

    def __init__(self, model: Any, guide: Any, objective: Any) -> None:
        super().__init__(model, guide, objective)
        self.register_buffer("table", torch.empty(0), persistent=False)
        self.register_buffer("cumulative", torch.empty(0), persistent=False)
        self.silent: tuple[str, ...] = ()  # parameters that the loss does not contain
        self.plain = False  # whether the target is the noise, at every level
        self.even: float | None = None  # the weight, where all levels have one

    @property
    def validates(self) -> bool:
        """Not without being asked: its target is known, so that it has no bottom to run away through."""
        return False

    @property
    def regression(self) -> Regression:
        return cast(Regression, self.objective.regression)

    @property
    def noised(self) -> Noised:
        return cast(Noised, self.program)

    def check_structure(self, shape: handlers.Structure) -> None:
        shape.require_data_plate(type(self.objective).__name__)

    def prepare(self, *batch: Any, **kwargs: Any) -> handlers.Structure:
        shape = super().prepare(*batch, **kwargs)
        self._tabulate(batch[0])
        with (
            scopes.forked_generators(0),
            scopes.preserved_state(self.model, self.guide),
            poutine.block(),
            scopes.hide_bare_parameters(),
            torch.enable_grad(),
        ):
            self.silent = unreached(self, self._rows(*batch, **kwargs))
        return shape

    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        """The loss: an estimate of the total over ``total`` rows (default: what the data plate says, else the batch).

        Raises:
            ValueError: for a ``total`` that is no count.
        """
        shape, rows = self.structure or self.prepare(*batch, **kwargs), batch[0].shape[0]
        if total is not None:
            self.check_total(shape, total)
        elif shape.data_size not in (None, shape.rows):  # a plate that subsamples
            total = shape.data_size
        factor = 1.0 if total is None else total / rows
        watched = am_i_wrapped()  # by a handler, SVI's above all
        with scopes.hide_bare_parameters() if watched else nullcontext():
            out, target, weight = self._regress(*batch, **kwargs)
        if self.even is not None:  # as below, in fewer operations: they are what a step costs beside its network
            loss = mse_loss(out, target, reduction="sum") * (self.even * factor)
        else:
            loss = torch.dot(weight, _squares(out, target)) * factor
        return reaching(self, loss, self.silent)

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        """The loss of each row at one draw of its level and noise: ``(rows,)``."""
        if self.structure is None:
            self.prepare(*batch, **kwargs)
        return reaching(self, self._rows(*batch, **kwargs), self.silent)

    def _rows(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out, target, weight = self._regress(x, context)
        return weight * _squares(out, target)

    def _regress(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the network says, what it is to say, and the weight of each row, at one draw of level and noise."""
        program, rows = self.noised, x.shape[0]
        if (context is None) != (program.context_shape is None):
            raise ValueError(context_error(program.context_shape))
        if self.table.dtype != x.dtype or self.table.device != x.device:
            self._tabulate(x)
        u = (x - program.location) / program.scale
        noise = torch.normal(0.0, 1.0, x.shape, dtype=x.dtype, device=x.device)
        if self.regression.coupling == "optimal":
            noise = noise[optimal_pairs(u, noise, self.regression.block)]
        levels = self._draw(rows, x)
        over = (rows, *[1] * (x.dim() - 1))
        y = torch.addcmul(levels.signal.view(over) * u, levels.noise.view(over), noise)
        if self.training and context is not None:
            context = program.dropped(context)
        out = program.output(context)(y, levels.level)
        target = noise
        if not self.plain:
            target = torch.addcmul(levels.of_data.view(over) * u, levels.of_noise.view(over), noise)
        return out, target, levels.weight

    # ------------------------------------------------------------------------------------------------------ levels --
    def _draw(self, rows: int, like: Tensor) -> Levels:
        """Levels of so many rows, with low discrepancy."""
        start = torch.rand((), dtype=like.dtype, device=like.device)
        places = torch.arange(rows, dtype=like.dtype, device=like.device)
        count = self.table.shape[0]
        if count and not self.cumulative.shape[0]:  # as below, in fewer operations: they are a step's overhead
            index = torch.add(start * count, places, alpha=count / rows).long().remainder_(count)
            return Levels(*self.table.index_select(0, index).unbind(1))
        u = (start + places / rows) % 1
        if count:
            index = torch.searchsorted(self.cumulative, u, right=True).clamp_(max=count - 1)
            return Levels(*self.table.index_select(0, index).unbind(1))
        with torch.no_grad():
            t, steps = self._times(u), None
            if self.regression.integral:
                first, last = self.noised.times
                steps = self.noised.schedule.log_snr_rate(t) * (first - last)
            found = self._numbers(t, steps)
        # a schedule that learns does so by the bound: a weighted loss would have it move the levels to where w is small
        return Levels(*(part.detach() for part in found))

    @torch.no_grad()
    def _tabulate(self, x: Tensor) -> None:
        """In discrete time: the numbers of every level, and the probabilities of the levels where they differ."""
        program, count = self.noised, program_steps(self.noised)
        self.plain, self.even = False, None
        if count is None:
            self.table = x.new_empty(0)
            return
        u = (torch.arange(count, dtype=x.dtype, device=x.device) + 0.5) / count
        t = program.training_times(u)
        shares = torch.full_like(t, 1 / count)
        if self.regression.time != "uniform":
            edges = torch.cat([t[:1], (t[1:] + t[:-1]) / 2, t[-1:]])
            reached = torch.special.ndtr(self._standard(edges))
            shares = reached.diff() / (reached[-1] - reached[0])
            self.cumulative = shares.cumsum(0)
        steps = None
        if self.regression.integral:
            if count < 2:
                raise ValueError(
                    f"weighting={self.regression.weighting!r} is an integral over levels, and timesteps=1 has one: use "
                    "weighting='epsilon', or more timesteps"
                )
            at = program.schedule.log_snr(t).clamp(-FARTHEST, FARTHEST)  # the trapezoidal rule, as each level's share
            steps = torch.cat([at[:1], (at[1:] + at[:-1]) / 2, at[-1:]]).diff().neg() * count
        numbers = self._numbers(t, steps)
        self.table = torch.stack([part.expand_as(t) for part in numbers], 1)
        if not t.is_meta:
            bad = ~torch.isfinite(self.table).all(1)
            if bool(bad.any()):
                raise ValueError(
                    f"weighting={self.regression.weighting!r} is infinite at {int(bad.sum())} of the {count} levels, "
                    f"the first at t = {float(t[bad][0]):g}: use weighting='epsilon' or 'v', or timesteps=None, whose "
                    "levels stop before"
                )
            off = torch.maximum(numbers.of_data.abs(), (numbers.of_noise - 1).abs())
            close = 8 * torch.finfo(t.dtype).eps
            self.plain = bool((off <= close).all())
            least, greatest = numbers.weight.aminmax()
            self.even = float(least) if bool(greatest - least <= close * least) else None

    def _standard(self, t: Tensor) -> Tensor:
        """What is standard normal of the levels that are drawn, before they are cut to the program's times."""
        if self.regression.time == "logit_normal":
            return torch.logit(t.clamp(max=1))  # a short chain may end later
        return (-self.noised.schedule.log_snr(t) / 2 - EDM_MEAN) / EDM_SPREAD

    def _times(self, u: Tensor) -> Tensor:
        """Times from uniform numbers."""
        program = self.noised
        if self.regression.time == "uniform":
            return program.training_times(u)
        first, last = program.times
        low, high = torch.special.ndtr(self._standard(u.new_tensor([first, last]))).unbind()
        z = torch.special.ndtri(low + (high - low) * u)
        logit = self.regression.time == "logit_normal"
        t = z.sigmoid() if logit else program.schedule.time(-2 * (EDM_MEAN + EDM_SPREAD * z))
        return t.clamp(first, last)

    def _numbers(self, t: Tensor, steps: Tensor | None) -> Levels:
        """What the loss has of the levels t; ``steps`` are those of λ down to each, over its share of the draws."""
        program = self.noised
        c, schedule = program.coefficients(t), program.schedule
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        (a, b), (k, _) = c.data, c.noise
        weight = self._weight(t, alpha, sigma, steps) * b.square() / 2
        return Levels(c.scale * alpha, c.scale * sigma, program.levels(t), sigma * k / b, -sigma * a / b, weight)

    def _weight(self, t: Tensor, alpha: Tensor, sigma: Tensor, steps: Tensor | None) -> Tensor:
        """The weight of |û − u|², which is w · SNR, of the shape of t."""
        asked, snr = self.regression, (alpha / sigma).square()
        if steps is not None:
            return steps * snr if asked.weighting == "elbo" else steps * snr * torch.sigmoid(asked.bias - snr.log())
        if asked.weighting == "velocity":
            d_alpha, d_sigma = self.noised.schedule.derivatives(t)
            return (d_sigma * alpha / sigma - d_alpha).square()
        return {
            "epsilon": snr,
            "x0": torch.ones_like(snr),
            "v": snr + 1,
            "edm": snr + 1,
            "truncated_snr": snr.clamp(min=1),
            "min_snr": snr.clamp(max=asked.gamma),
        }[asked.weighting]


def _squares(out: Tensor, target: Tensor) -> Tensor:
    """Squared distance of each row."""
    return mse_loss(out, target, reduction="none").sum(tuple(range(1, out.dim())))


def program_steps(program: Noised) -> int | None:
    """The number of levels of a program in discrete time whose levels stay as they are; None for all others."""
    schedule = program.schedule
    moves = isinstance(schedule, torch.nn.Module) and any(True for _ in (*schedule.parameters(), *schedule.buffers()))
    return None if moves else program.timesteps
