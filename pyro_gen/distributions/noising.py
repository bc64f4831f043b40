r"""The reverse chain of a diffusion and the noising that guides it, as Pyro programs: what `Diffusion` is made of.

A step of the chain takes some twenty numbers from the schedule and from what the network predicts. In discrete time
they are a table, worked out in float64 and looked up by one index (`Table`); a schedule that is learnt makes it anew at
each call. Nothing is a difference of large numbers: with :math:`\hat u = a y + b F` the miss of the network is

.. math:: u - \hat u = (1 - a \alpha)\, u - a \sigma\, \varepsilon - b F,

whose first two factors are in the table. The chain is written as sample sites, or as one factor that is its bound in
expectation (`DiffusionModel`); the derivation stands in `pyro_gen.programs.diffusion` and in `chains`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_gen.base import event_names
from pyro_gen.distributions.chains import LeftOut, Stratified, normal_kl, steps_of
from pyro_gen.distributions.learned_noise import LearnedSchedule
from pyro_gen.distributions.noise import NoiseSchedule
from pyro_gen.distributions.parameterisations import Prediction, coefficients_of

__all__ = ["DiffusionGuide", "DiffusionModel", "Form", "Order", "Table", "Variance", "at_once", "log_ratio", "row_of"]

Form = Literal["collapsed", "sites"]
Variance = Literal["optimal", "small", "large", "learned"]
Order = Literal["posterior", "forward"]

LADDER = 64  # levels of continuous time at which the error of the network is measured
LAST_SHARE = 1 / 8  # of the draws in continuous time that go to the last step, x given y at the first end
DRAWS = 2**16  # rows that measuring the error may take, for data of few features


class Table(NamedTuple):
    """What a level or step takes from the schedule and the prediction: numbers of one shape.

    α, σ; the scale of the network's input and its level; û = data y + output F; u − û = from_data u + from_noise ε +
    from_output F; then of the step down to the level before: kept, added (forwards), c_0, c_t and v (backwards), the
    error of standard normal data, c_0², 1/v (0 at step 1), 1 at step 1, and the ends of a learnt variance.
    """

    alpha: Tensor
    sigma: Tensor
    scale: Tensor
    level: Tensor
    data: Tensor
    output: Tensor
    from_data: Tensor
    from_noise: Tensor
    from_output: Tensor
    kept: Tensor
    added: Tensor
    to_data: Tensor
    to_noisy: Tensor
    variance: Tensor
    error: Tensor
    weight: Tensor
    precision: Tensor
    first: Tensor
    small: Tensor
    span: Tensor


class Levels(NoiseSchedule):
    """Levels that are there already, λ and λ', as a schedule."""

    def __init__(self, log_snr: Tensor, rate: Tensor) -> None:
        super().__init__()
        self.held = log_snr, rate

    def log_snr(self, t: Tensor) -> Tensor:
        return self.held[0]

    def log_snr_rate(self, t: Tensor) -> Tensor:
        return self.held[1]


class DiffusionModel(nn.Module):
    """The model: the reverse chain, as sites or as a factor; and all that a step of it takes."""

    location: Tensor
    scale: Tensor
    started: Tensor
    grid: Tensor
    knots: Tensor
    table: Tensor
    ratio: Tensor
    context_location: Tensor
    context_scale: Tensor
    null: nn.Parameter | None
    numbers: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        schedule: NoiseSchedule,
        event_shape: torch.Size,
        context_shape: torch.Size | None,
        timesteps: int | None,
        own: bool,
        *,
        prediction: Prediction,
        form: Form,
        variance: Variance,
        unconditional: float,
    ) -> None:
        super().__init__()
        self.net, self.schedule, self.event_shape, self.context_shape = net, schedule, event_shape, context_shape
        self.timesteps, self.own, self.prediction, self.form = timesteps, own, prediction, form
        self.variance, self.unconditional = variance, unconditional
        self.names: Any = {"event_dims": event_names(event_shape)}
        self.moving = any(True for _ in (*schedule.parameters(), *schedule.buffers()))  # tables are then made anew
        self.register_buffer("location", torch.zeros(event_shape))
        self.register_buffer("scale", torch.ones(event_shape))
        self.register_buffer("started", torch.tensor(False))
        if context_shape is not None:
            self.register_buffer("context_location", torch.zeros(context_shape))
            self.register_buffer("context_scale", torch.ones(context_shape))
        self.null = nn.Parameter(torch.zeros(context_shape)) if context_shape is not None and unconditional else None
        # mean square of u - û at each level, in units of its value for standard normal data
        self.register_buffer("ratio", torch.ones(LADDER if timesteps is None else timesteps, *event_shape))
        self.register_buffer("grid", torch.empty(0), persistent=False)
        self.register_buffer("knots", torch.empty(0), persistent=False)
        self.register_buffer("table", torch.empty(0), persistent=False)
        self.tabulate()

    # -------------------------------------------------------------------------------------------------------- tables
    @torch.no_grad()
    def tabulate(self) -> None:
        """Make grid and table from float64 numbers, in the dtype and on the device of the module."""
        if self.timesteps is None:
            self.ends = self.schedule.ends
            times, self.numbers = torch.tensor([0.0, *self.ends], dtype=torch.float64), None
            if not self.moving:
                self.span: tuple[float, float] = tuple(self.schedule.log_snr(times[1:]).tolist())
        else:
            times = self.schedule.grid(self.timesteps)
            self.ends = float(times[1]), float(times[-1])
            self.grid, self.numbers = times.to(self.location), times
        self.knots = times.to(self.location)
        if not self.moving:
            self.table = torch.stack(self.steps_at(times), -1).to(self.location)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tabulate()  # a table that is converted keeps the rounding of the dtype it was in
        return self

    def steps(self) -> Table:
        """The table of now, each column ``(T,)``; of continuous time its first step, and the rest as one."""
        if self.moving:
            return self.steps_at(self.knots)
        return Table(*self.table.unbind(-1))

    def steps_at(self, times: Tensor) -> Table:
        """The table of a chain through given times, ``(T + 1,)`` and the first of them 0."""
        reading = self.read(times[1:])
        if not reading[0].is_meta and not self.moving and not all(bool(torch.isfinite(c).all()) for c in reading):
            raise ValueError(
                f"prediction={self.prediction!r} breaks at the last level of this schedule, whose α is 0: there y says "
                "nothing of the datum. Use prediction='edm' or 'x0', or timesteps=None, whose levels stop before"
            )
        alpha, sigma = (
            torch.cat([torch.full_like(column[:1], start), column])
            for start, column in ((1.0, reading[0]), (0.0, reading[1]))
        )
        steps = steps_of(alpha, sigma)
        first = torch.zeros_like(steps.variance)
        first[0] = 1.0
        weight = steps.data.square()
        precision = (1 - first) / torch.where(first > 0, torch.ones_like(first), steps.variance)
        large = steps.variance + weight * steps.error
        small = steps.variance if len(first) == 1 else torch.cat([steps.variance[1:2], steps.variance[1:]])
        columns = (*reading, *steps[2:], weight, precision, first, small, torch.log(large / small))
        return Table(*columns)

    def read(self, t: Tensor, schedule: NoiseSchedule | None = None) -> tuple[Tensor, ...]:
        """The columns of a table that belong to a level, at times of any shape, of this schedule or another."""
        schedule = self.schedule if schedule is None else schedule
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        c = coefficients_of(self.prediction, schedule, t, scaled=self.scaled)
        data, output = c.data
        level = (schedule.log_snr(t) / -2).clamp(-14, 14) if self.own else t
        return alpha, sigma, c.scale, level, data, output, 1 - data * alpha, -data * sigma, -output

    @property
    def scaled(self) -> bool:
        return self.own or self.prediction == "edm"

    def levels(self, t: Tensor) -> Tensor:
        """What the network is told of the times: log σ/α for one of ours."""
        return (self.schedule.log_snr(t) / -2).clamp(-14, 14) if self.own else t

    def prior_scale(self, table: Table) -> Tensor:
        """Standard deviation of the last level, before the chain comes back: that of standard normal data."""
        return (table.alpha[-1].square() + table.sigma[-1].square()).sqrt()

    # ------------------------------------------------------------------------------------------------------- network
    def network(
        self, y: Tensor, level: Tensor, context: Tensor | None = None, *, held: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """F, of the shape of y, and what a learnt variance is made of; for any leading dimensions.

        Args:
            y: ``(..., *event_shape)``, scaled; level: of a shape that broadcasts to the leading one.
            context: as the network sees it, ``(..., *context_shape)``, broadcasting likewise.
            held: no gradient goes into the weights; it goes through them.
        """
        lead = y.shape[: y.dim() - len(self.event_shape)]
        flat = y.reshape(-1, *self.event_shape)
        level = level.expand(lead).reshape(-1)
        given: tuple[Tensor, ...] = ()
        if context is not None and self.context_shape is not None:
            given = (context.expand(*lead, *self.context_shape).reshape(-1, *self.context_shape),)
        if held:
            weights = {name: p.detach() for name, p in self.net.named_parameters()}
            out = torch.func.functional_call(self.net, weights, (flat, level, *given))
        else:
            out = self.net(flat, level, *given)
        channels = self.event_shape[0]
        wanted = (len(flat), (1 + (self.variance == "learned")) * channels, *self.event_shape[1:])
        if not isinstance(out, Tensor) or tuple(out.shape) != wanted:
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"network must give shape {wanted} for y of shape {tuple(flat.shape)}"
                + (", twice its channels for variance='learned'," if self.variance == "learned" else "")
                + f" and t of shape {tuple(level.shape)}; got {found}"
            )
        if self.variance != "learned":
            return out.reshape(y.shape), None
        return out[:, :channels].reshape(y.shape), out[:, channels:].reshape(y.shape)

    def conditioned(self, context: Tensor | None) -> Tensor | None:
        """The context as the network sees it: standardised for one of ours."""
        if context is None or not self.own:
            return context
        return (context - self.context_location) / self.context_scale

    def dropped(self, context: Tensor) -> Tensor:
        """The context with a share of its rows replaced by the null context."""
        assert self.null is not None
        out = torch.rand(len(context), dtype=context.dtype, device=context.device) < self.unconditional
        return torch.where(out.reshape(-1, *[1] * (context.dim() - 1)), self.null, context)

    def standard(self, x: Tensor) -> Tensor:
        return (x - self.location) / self.scale

    def wide(self, value: Tensor) -> Tensor:
        """Numbers of rows, so that they multiply data."""
        return value.reshape(*value.shape, *[1] * len(self.event_shape))

    # --------------------------------------------------------------------------------------------- terms of the bound
    def error(self, step: Table, ratio: Tensor) -> Tensor:
        """Mean square of u − û that the reverse variance counts on, for data."""
        normal = self.wide(step.error)
        if self.variance == "optimal":
            return ratio * normal
        return (normal * self.wide(step.first) if self.variance == "small" else normal).expand(ratio.shape)

    def misses(
        self, u: Tensor, noise: Tensor, step: Any, context: Tensor | None, *, held: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(u − û)² at a level, without a difference of large numbers; and the network's second output."""
        alpha, sigma, scale, level, _, _, from_data, from_noise, from_output = step[:9]
        wide = self.wide
        y = wide(scale * alpha) * u + wide(scale * sigma) * noise
        out, extra = self.network(y, level, context, held=held)
        return (wide(from_data) * u + wide(from_noise) * noise + wide(from_output) * out).square(), extra

    def step_loss(self, u: Tensor, noise: Tensor, step: Table, ratio: Tensor, context: Tensor | None) -> Tensor:
        """KL of a step, or at step 1 the reconstruction less `reconstruction`; one value a leading index, in nats."""
        squares, extra = self.misses(u, noise, step, context)
        wide = self.wide
        if extra is None:
            cost = normal_kl(
                squares, self.error(step, ratio), wide(step.weight), wide(step.variance), wide(step.precision)
            )
        else:
            log_ratio = wide(step.span) * (1 + extra) / 2
            small = wide(step.small)
            constant = wide(step.first) * (1 + torch.log(2 * math.pi * small))
            spread = (wide(step.variance) + wide(step.weight) * squares) / (small * log_ratio.exp())
            cost = (spread - 1 + log_ratio + constant) / 2
        return cost.flatten(-len(self.event_shape)).sum(-1)

    def reconstruction(self, table: Table) -> Tensor:
        """What every datum pays at the last step: the entropy of its normal, and the units of x; a scalar."""
        total = self.scale.log().sum()
        if self.variance == "learned":
            return total
        error = self.error(row_of(table, 0), self.ratio[0])
        return total + (0.5 + torch.log(2 * math.pi * error) / 2).sum()

    def chain_at(self, times: Tensor) -> Table:
        """The table of a chain through times given in float64, ``(T,)``, in the dtype of the module."""
        times = torch.cat([times.new_zeros(1), times])
        if self.moving:
            return self.steps_at(times.to(self.location))
        return Table(*(column.to(self.location) for column in self.steps_at(times)))

    def prior_loss(self, u: Tensor, table: Table) -> Tensor:
        """KL of q(y_T | x) to p(y_T) of each row, in nats."""
        signal = (table.alpha[-1] / table.sigma[-1]).square()
        part = signal / (1 + signal)  # α² / (α² + σ²)
        return ((part * (u.square() - 1) + torch.log1p(signal)) / 2).flatten(-len(self.event_shape)).sum(-1)

    def drawn_loss(self, u: Tensor, t: Tensor, noise: Tensor, table: Table, context: Tensor | None) -> Tensor:
        """An unbiased estimate of the sum over all steps from one of them, t in [0, 1) saying which."""
        if self.timesteps is not None:
            index = (t * self.timesteps).long().clamp(max=self.timesteps - 1)
            if self.moving:
                step = row_of(table, index)
            else:
                step = Table(*self.table[index].unbind(-1))
            return self.timesteps * self.step_loss(u, noise, step, self.ratio[index], context)
        ending, way = t < LAST_SHARE, (t - LAST_SHARE).clamp(min=0) / (1 - LAST_SHARE)
        if isinstance(self.schedule, LearnedSchedule):
            middle, squares = self.learning(u, way, noise, context)
        elif self.moving:
            first, last = self.ends
            times = first + (last - first) * way
            rates = (first - last) * self.schedule.log_snr_rate(times)
            middle, squares = self.integrand(u, times, noise, context, self.schedule.log_snr(times), rates)
        else:  # evenly in log SNR, where the integrand is bounded; in t it need not be, for the same integral
            high, low = self.span
            log_snr = high + (low - high) * way
            rates = log_snr.new_tensor(high - low)
            middle, squares = self.integrand(u, self.schedule.time(log_snr), noise, context, log_snr, rates)
        error = self.error(row_of(table, 0), self.ratio[0])
        end = (squares / error - 1).flatten(-len(self.event_shape)).sum(-1) / (2 * LAST_SHARE)
        return torch.where(ending, end, middle / (1 - LAST_SHARE))

    def integrand(
        self,
        u: Tensor,
        times: Tensor,
        noise: Tensor,
        context: Tensor | None,
        log_snr: Tensor,
        rate: Tensor,
        *,
        schedule: NoiseSchedule | None = None,
        held: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """−½ SNR' |u − û|² at levels λ that fall at this rate, a value a row; and (u − û)²."""
        squares, _ = self.misses(u, noise, self.read(times, schedule), context, held=held)
        return rate * log_snr.exp() / 2 * squares.flatten(-len(self.event_shape)).sum(-1), squares

    def learning(self, u: Tensor, times: Tensor, noise: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The integrand on a way that is learnt: its ends by the value, the way between by the value's mean square.

        The second part is 0 and has that gradient; see `LearnedSchedule`.
        """
        assert isinstance(self.schedule, LearnedSchedule)
        pairs: Any = torch.func.jvp(self.schedule.log_snr_parts, (times,), (torch.ones_like(times),))
        (by_ends, by_way), (ends_rate, way_rate) = pairs
        (value, squares), (spread, _) = (
            self.integrand(u, times, noise, context, level, -rate, schedule=Levels(level, rate), held=held)
            for level, rate, held in ((by_ends, ends_rate, False), (by_way, way_rate, True))
        )
        square = spread.square()
        return value + (square - square.detach()), squares

    # --------------------------------------------------------------------------------------------------------- pyro
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None and self.training and self.null is not None:
            context = self.dropped(context)
        context = self.conditioned(context)
        with pyro.plate("data", x.shape[0]):
            return self.chain(x, context) if self.form == "sites" else self.factor(x, context)

    def chain(self, x: Tensor, context: Tensor | None) -> Tensor:
        dims = len(self.event_shape)
        table = self.steps()
        noise = dist.Normal(torch.zeros_like(self.location), self.prior_scale(table))
        y = pyro.sample(f"y_{len(table.alpha)}", noise.to_event(dims), infer=self.names)
        for i in range(len(table.alpha) - 1, -1, -1):
            mean, deviation = self.reverse(y, row_of(table, i), self.ratio[i], context)
            if i:
                y = pyro.sample(f"y_{i}", dist.Normal(mean, deviation).to_event(dims), infer=self.names)
        normal = dist.Normal(self.location + self.scale * mean, self.scale * deviation)
        return pyro.sample("x", normal.to_event(dims), obs=x, infer=self.names)

    def reverse(self, y: Tensor, step: Table, ratio: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a step down from y."""
        out, extra = self.network(step.scale * y, step.level, context)
        mean = step.to_data * (step.data * y + step.output * out) + step.to_noisy * y
        if extra is not None:
            return mean, (step.small * (step.span * (1 + extra) / 2).exp()).sqrt()
        return mean, (step.variance + step.weight * self.error(step, ratio)).sqrt()

    def factor(self, x: Tensor, context: Tensor | None) -> Tensor:
        whole = _Whole(self, (len(x),), context)
        x = pyro.sample("x", whole.mask(False), obs=x, infer=self.names)
        u, table = self.standard(x), self.steps()
        t, noise = auxiliaries(self)
        bound = -(self.prior_loss(u, table) + self.reconstruction(table) + self.drawn_loss(u, t, noise, table, context))
        unit = dist.Unit(bound)
        marks: Any = {"is_auxiliary": True, "in_expectation": True}
        pyro.sample("bound", unit, obs=bound.new_empty((*bound.shape, 0)), infer=marks)
        return x

    @torch.no_grad()
    def draw(self, shape: torch.Size, context: Tensor | None) -> Tensor:
        """Data from the whole chain: ``(*shape, *event_shape)``; continuous time is cut into 250 steps."""
        if self.timesteps is None:
            table = self.chain_at(torch.linspace(*self.ends, 250, dtype=torch.float64))
            ratio = self.ratio_at(log_ratio(table))
        else:
            table, ratio = self.steps(), self.ratio
        like = self.location
        y = self.prior_scale(table) * torch.randn((*shape, *self.event_shape), dtype=like.dtype, device=like.device)
        for i in range(len(table.alpha) - 1, -1, -1):
            mean, deviation = self.reverse(y, row_of(table, i), ratio[i], context)
            y = torch.normal(mean, deviation.expand_as(mean))
        return self.location + self.scale * y

    # ----------------------------------------------------------------------------------------- the error, as measured
    def ladder(self) -> Table:
        """The levels at which `ratio` is kept, each column ``(T,)``."""
        if self.timesteps is not None:
            return self.steps()
        ends = torch.tensor(self.ends, dtype=torch.float64)
        ends = ends.to(self.location) if self.moving else ends
        low, high = self.schedule.log_snr(ends).unbind()
        way = torch.linspace(0, 1, LADDER, dtype=ends.dtype, device=ends.device)
        times = self.schedule.time(low + (high - low) * way)
        return self.chain_at(torch.cat([ends[:1], times[1:]]))

    def ratio_at(self, there: Tensor) -> Tensor:
        """`ratio` at other levels log σ/α, ``(levels,)``: straight lines, and beyond the ends what it is there."""
        here = log_ratio(self.ladder()).to(there)
        if len(here) == 1:
            return self.ratio.expand(len(there), *self.ratio.shape[1:])
        right = torch.searchsorted(here, there.contiguous()).clamp(1, len(here) - 1)
        share = ((there - here[right - 1]) / (here[right] - here[right - 1])).clamp(0, 1)
        share = self.wide(torch.nan_to_num(share))
        logs = self.ratio.log().to(there)
        return torch.exp(torch.lerp(logs[right - 1], logs[right], share))

    @torch.no_grad()
    def measure(self, u: Tensor, context: Tensor | None) -> None:
        """Set `ratio` by draws of data and noise at every level, the more the more the error counts there."""
        table = self.ladder()
        levels, features = len(table.alpha), self.event_shape.numel()
        share = table.weight * table.error * table.precision
        share = (share / (1 + share)).double()
        share[0] = 1.0
        budget = 16 * DRAWS / max(16, features)
        draws = (budget * (0.5 / levels + 0.5 * share / share.sum())).clamp(32, 2**14).long()
        index = torch.repeat_interleave(torch.arange(levels, device=u.device), draws.to(u.device))
        total = torch.zeros_like(self.ratio, dtype=torch.float64)
        for part in index.split(at_once(features)):
            rows = torch.randint(len(u), (len(part),), device=u.device)
            step = row_of(table, part)
            given = None if context is None else context[rows]
            squares, _ = self.misses(u[rows], torch.randn_like(u[rows]), step, given)
            total.index_add_(0, part, squares.double())
        found = total / self.wide(draws.to(u.device) * table.error)
        self.ratio.copy_(found.clamp(min=1e-6))


def row_of(table: Table, index: Any) -> Table:
    """Some rows of a table, or one."""
    return Table(*(column[index] for column in table))


def log_ratio(table: Table) -> Tensor:
    """log σ/α of levels."""
    return (table.sigma / table.alpha).log()


def at_once(features: int) -> int:
    """Rows of one call of a network in loops over levels."""
    return min(2**14, max(64, 2**19 // features))


def auxiliaries(model: DiffusionModel) -> tuple[Tensor, Tensor]:
    """The two sites that model and guide of the collapsed form share: which step, and its noise.

    Their densities would cancel, and are left out on both sides.
    """
    zero = torch.zeros_like(model.location)
    low = model.location.new_zeros(())
    t = pyro.sample("t", LeftOut(Stratified(low, low + 1, validate_args=False), False))
    noise = dist.Normal(zero, torch.ones_like(zero), validate_args=False).to_event(zero.dim())
    return t, pyro.sample("epsilon", LeftOut(noise, False), infer=model.names)


class DiffusionGuide(nn.Module):
    """The guide: the fixed noising. It has no tensors of its own."""

    def __init__(self, chain: DiffusionModel, order: Order) -> None:
        super().__init__()
        self.__dict__["chain"] = chain  # not as a submodule: it is the model
        self.order = order

    def forward(self, x: Tensor, context: Tensor | None = None) -> None:
        chain: DiffusionModel = self.__dict__["chain"]
        with pyro.plate("data", x.shape[0]):
            if chain.form == "collapsed":
                auxiliaries(chain)
                return
            u, table, dims = chain.standard(x), chain.steps(), len(chain.event_shape)
            last = len(table.alpha)

            def sample(i: int, mean: Tensor, deviation: Tensor) -> Tensor:
                normal = dist.Normal(mean, deviation).to_event(dims)
                return pyro.sample(f"y_{i}", normal, infer=chain.names)

            if self.order == "forward":
                y = u
                for i in range(1, last + 1):
                    y = sample(i, table.kept[i - 1] * y, table.added[i - 1].sqrt())
                return
            y = sample(last, table.alpha[-1] * u, table.sigma[-1])
            for i in range(last - 1, 0, -1):
                y = sample(i, table.to_data[i] * u + table.to_noisy[i] * y, table.variance[i].sqrt())

    def extra_repr(self) -> str:
        return f"order={self.order!r}"


class _Whole(TorchDistribution):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """p(x), of the whole chain: it can be drawn from; its density is what the bound stands for."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = False

    def __init__(self, model: DiffusionModel, batch_shape: Any, context: Tensor | None) -> None:
        self.model, self.context = model, context
        super().__init__(torch.Size(batch_shape), model.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Whole:
        return _Whole(self.model, batch_shape, self.context)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.model.draw(torch.Size(sample_shape) + self.batch_shape, self.context)

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError(
            "log p(x) of a diffusion is not known: program.lower_bound(x) bounds it, and so does the model's own trace"
        )
