r"""Diffusion: noise the data away step by step, learn each step back; Z is bounded by the fixed noising.

In standard units, :math:`x = m + s u`, a datum is noised to :math:`y_i = \alpha_i u + \sigma_i \varepsilon`. The model
is the chain that comes back, the guide the noising itself, which has no parameters:

.. math:: p(x, y_{1:T}) = p(y_T) \prod_{i=2}^T p(y_{i-1} \mid y_i)\; p(x \mid y_1), \qquad
          q(y_{1:T} \mid x) = q(y_T \mid x) \prod_{i=2}^T q(y_{i-1} \mid y_i, x),

:math:`p(y_T) = N(0, \alpha_T^2 + \sigma_T^2)` and the normals of `pyro_gen.distributions.chains`, in which a guess of
the network, :math:`\hat u(y_i, i)`, stands for the datum. Every factor of :math:`E_q[\log p - \log q]` is a KL:

.. math:: \log p(x) \ge -\Big( L_T + \sum_{i=2}^T KL_i + L_0 \Big), \qquad
          L_T = KL[q(y_T \mid x) \,\|\, p(y_T)], \quad L_0 = -E_q[\log p(x \mid y_1)] .

``form="sites"`` is this chain, T latent sites long: for proofs, traces and importance weights. ``form="collapsed"``
draws one step i instead and counts it T times, :math:`-(L_T + T L_i)`, a factor equal to the bound in expectation: a
cost that does not grow with T, for training. Without ``timesteps`` T is infinite, and with SNR = α²/σ²

.. math:: \sum_i KL_i \to \tfrac12 \int \Big(-\frac{d\,\mathrm{SNR}}{dt}\Big)\, E \|u - \hat u(y_t, t)\|^2\, dt,

which depends on the schedule through its two ends only (Kingma et al. 2021): levels are drawn evenly in log SNR there,
and evenly in t where the schedule is learnt.

*The reverse variance* is worth more nats than any number of steps. The least one, v, is that of a chain that knows the
datum; what the network does not know adds :math:`c_0^2 V_i`, V the mean square of :math:`u - \hat u` (Bao et al. 2022).
It is measured at the end of a fit; until then it is that of standard normal data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_gen import scopes
from pyro_gen.base import Coefficients, Noised, Output, Program, Schedule, context_error
from pyro_gen.checks import as_shape, check_count, check_rows, check_sizes, describe
from pyro_gen.distributions.chains import steps_between
from pyro_gen.distributions.noise import NoiseSchedule, ScheduleName, make_schedule
from pyro_gen.distributions.noising import (
    DiffusionGuide,
    DiffusionModel,
    Form,
    Order,
    Table,
    Variance,
    at_once,
    log_ratio,
    row_of,
)
from pyro_gen.distributions.parameterisations import Prediction, check_prediction, coefficients_of, linear_answer
from pyro_gen.nn.time import TimeMLP
from pyro_gen.nn.unet import ConvTime
from pyro_gen.samplers.probability_flow import ProbabilityFlow
from pyro_gen.samplers.reverse import ReverseDiffusion

__all__ = ["Diffusion"]

CHAIN = 100  # steps of a chain made of a diffusion in continuous time
MOST_SITES = 1000
POINTS = 128  # parts of the integral over continuous time, a row and particle


class _Flat(nn.Module):
    """The default network on data of any event shape."""

    def __init__(
        self,
        event_shape: torch.Size,
        context_features: int,
        hidden: Sequence[int],
        outputs: int,
        linear: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        features = event_shape.numel()
        self.outputs = (outputs * event_shape[0], *event_shape[1:])
        self.mlp = TimeMLP(
            features, outputs * features, hidden,
            context_features=context_features, waves=3 if features <= 4 else 0,
            gated=linear is not None, linear=linear or (0.0, 0.0),
        )  # fmt: skip

    def forward(self, y: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.mlp(y.flatten(1), level, None if context is None else context.flatten(1))
        return out.reshape(len(y), *self.outputs)


class _Conv(ConvTime):
    """The small network for images, given contexts of any shape."""

    def forward(self, y: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(y, level, None if context is None else context.flatten(1))


class Diffusion(Noised):
    r"""Diffusion model: :math:`p(x) = \int p(y_T) \prod_i p(y_{i-1} \mid y_i)\, dy`, its Z bounded by fixed noising.

    Args:
        event_shape: shape of one datum, an int or a tuple.
        network: a module called as ``network(y, t)`` or ``network(y, t, context)``, with y ``(rows, *event_shape)`` in
            standard units and t in (0, 1], ``(rows,)``, that gives what ``prediction`` says; ``"mlp"`` (None) or
            ``"conv"`` (events of shape (channels, height, width)) build one.
        schedule: how noise comes in: a name (see `pyro_gen.distributions.noise`) or a `NoiseSchedule`.
        timesteps: length T of the chain, or None for continuous time.
        prediction: what the network gives: ``"epsilon"``, ``"x0"``, ``"v"``, ``"score"``, ``"velocity"`` or ``"edm"``
            (Karras et al.'s preconditioning, for any schedule).
        context_shape: shape of what a row is conditioned on.
        form: of the Pyro program. ``"collapsed"`` draws one step a row and has the bound as a factor (sites ``t`` and
            ``epsilon``); ``"sites"`` is the chain itself, with latents ``y_T`` … ``y_1`` in standard units: for T up to
            100 or so, 1000 at most.
        variance: of the reverse steps: ``"optimal"`` (measured at the end of a fit, or by `conclude`), ``"small"`` (v;
            that of step 2 or, here, of the first level at step 1), ``"large"``, or ``"learned"``: the network has
            twice the outputs, along the first dimension of the event, and the second half says where between the two
            the log variance lies, −1 to 1.
        hidden: sizes of the hidden layers of ``"mlp"``.
        standardise: centre and scale by the training data, inside the bound: ``fit`` does it, or call `initialise`.
        unconditional: share of rows that are trained without their context, which ``guidance`` needs.
        guide: order in which the noising of ``"sites"`` is written: ``"posterior"`` (y_T first, then each step back
            given x, so that every KL has a closed form, ``pg.ELBO(analytic_kl=True)``) or ``"forward"`` (y_1 first).

    Raises:
        ValueError: for unknown names, sizes below 1, or options that do not go together.

    References:
        J. Ho, A. Jain, P. Abbeel, "Denoising diffusion probabilistic models", 2020, arXiv:2006.11239, eqs. 5 to 8.
        D. P. Kingma, T. Salimans, B. Poole, J. Ho, "Variational diffusion models", 2021, arXiv:2107.00630, eqs. 11, 13,
        15 and 18.
        F. Bao, C. Li, J. Zhu, B. Zhang, "Analytic-DPM", 2022, arXiv:2201.06503, eq. 10.
        A. Nichol, P. Dhariwal, "Improved denoising diffusion probabilistic models", 2021, arXiv:2102.09672, eq. 15.
        J. Ho, T. Salimans, "Classifier-free diffusion guidance", 2022, arXiv:2207.12598, eq. 6.

    Example:
        >>> import torch
        >>> diffusion = Diffusion(2, timesteps=10, hidden=(16,))
        >>> x = torch.randn(100, 2)
        >>> diffusion.initialise(x)
        >>> diffusion.lower_bound(x).shape, diffusion.terms(x).shape, diffusion.chain().form
        (torch.Size([100]), torch.Size([100, 11]), 'sites')
    """

    model: DiffusionModel
    guide: DiffusionGuide

    def __init__(
        self,
        event_shape: int | tuple[int, ...],
        network: nn.Module | Literal["mlp", "conv"] | None = None,
        schedule: ScheduleName | NoiseSchedule = "cosine",
        timesteps: int | None = 1000,
        prediction: Prediction = "epsilon",
        context_shape: int | tuple[int, ...] | None = None,
        *,
        form: Form = "collapsed",
        variance: Variance = "optimal",
        hidden: Sequence[int] = (128, 128, 128),
        standardise: bool = True,
        unconditional: float = 0.0,
        guide: Order = "posterior",
    ) -> None:
        event = as_shape(event_shape)
        if not len(event):
            raise ValueError("event_shape must have at least one dimension: data of one number have event_shape=1")
        context = None if context_shape is None else as_shape(context_shape, "context_shape")
        levels, hidden = make_schedule(schedule), check_sizes(hidden)
        check_prediction(prediction, levels)
        _check_options(form, variance, guide, timesteps, unconditional, context)
        own = not isinstance(network, nn.Module)
        answer = linear_answer(prediction, levels)
        net = _network(network, event, context, hidden, 2 if variance == "learned" else 1, answer)
        model = DiffusionModel(
            net, levels, event, context, timesteps, own,
            prediction=prediction, form=form, variance=variance, unconditional=unconditional,
        )  # fmt: skip
        super().__init__(
            model,
            DiffusionGuide(model, guide),
            tuple(event),
            None if context is None else tuple(context),
            schedule=levels,
        )
        self.prediction: Prediction = prediction
        self.timesteps, self.form, self.standardise = timesteps, form, standardise
        if own and isinstance(schedule, str):
            self.config = {
                "event_shape": list(event),
                "network": network,
                "schedule": schedule,
                "timesteps": timesteps,
                "prediction": prediction,
                "context_shape": None if context is None else list(context),
                "form": form,
                "variance": variance,
                "hidden": list(hidden),
                "standardise": standardise,
                "unconditional": unconditional,
                "guide": guide,
            }

    # ------------------------------------------------------------------------------------------------ levels and scores
    @property
    def schedule(self) -> Schedule:
        """α(t) and σ(t)."""
        return self.model.schedule

    @property
    def location(self) -> Tensor:
        """m of x = m + s u, which broadcasts to ``event_shape``."""
        return self.model.location

    @property
    def scale(self) -> Tensor:
        """s of x = m + s u, which broadcasts to ``event_shape``."""
        return self.model.scale

    @property
    def times(self) -> tuple[float, float]:
        """The least and the greatest time at which the network is trained."""
        return self.model.ends

    @property
    def grid(self) -> Tensor | None:
        """The times of the chain, ``(T + 1,)`` from 0 upwards, in float64 on the CPU; None in continuous time."""
        return self.model.numbers

    @property
    def fixed(self) -> tuple[Tensor, ...] | None:
        """What the reverse chain hangs on where the schedule is fixed: the measured errors; dtype and device."""
        tensors = self.model.ratio, self.model.location
        return None if self.model.moving or any(t.is_inference() for t in tensors) else tensors

    def training_times(self, u: Tensor) -> Tensor:
        if self.timesteps is None:
            return super().training_times(u)
        return self.model.grid[1 + (u * self.timesteps).long().clamp(max=self.timesteps - 1)]

    def dropped(self, context: Tensor) -> Tensor:
        """The context that a training step is to see: a share ``unconditional`` of its rows, drawn, is the null one."""
        return context if self.model.null is None else self.model.dropped(context)

    def reverse_variance(self, t: Tensor, s: Tensor) -> Tensor:
        r"""The chain's variance of :math:`y_s` given :math:`y_t`, :math:`v + c_0^2 V`, for any s below t.

        Args:
            t, s: times, ``(steps,)``.

        Returns:
            ``(steps, *event_shape)``, in standard units. A learnt variance belongs to y, not to t alone
            (`output_and_variance`): of such a chain this is the small one.
        """
        model, schedule = self.model, self.schedule
        step = steps_between(schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s))
        large = model.wide(step.data.square() * step.error)
        if model.variance == "optimal":
            large = large * model.ratio_at(schedule.log_snr(t) / -2)
        elif model.variance != "large":
            large = torch.zeros_like(large)
        return (model.wide(step.variance) + large).expand(len(t), *self.event_shape)

    def coefficients(self, t: Tensor) -> Coefficients:
        return coefficients_of(self.prediction, self.schedule, t, scaled=self.model.scaled)

    def levels(self, t: Tensor) -> Tensor:
        return self.model.levels(t)

    def output(self, context: Tensor | None = None, guidance: float | None = None) -> Output:
        model = self.model
        given = model.conditioned(context)
        if guidance is None and model.variance != "learned":
            net, rest = model.net, () if given is None else (given,)  # called a thousand times: nothing in between
            return lambda y, level: cast(Tensor, net(y, level, *rest))
        if guidance is None:
            return lambda y, level: model.network(y, level, given)[0]
        if model.null is None or given is None:
            what = "no context (context_shape)" if self.context_shape is None else "unconditional=0"
            raise ValueError(
                f"guidance={describe(guidance)} needs a program trained without its context too, and this one was "
                f"built with {what}: build it with context_shape= and unconditional=0.1"
            )
        both = torch.cat([given, cast(Tensor, model.conditioned(model.null)).expand_as(given)])

        def guided(y: Tensor, level: Tensor) -> Tensor:
            out, _ = model.network(torch.cat([y, y]), level.expand(len(y)).repeat(2), both)
            with_context, without = out.chunk(2)
            return with_context + guidance * (with_context - without)

        return guided

    def output_and_variance(
        self, context: Tensor | None = None, guidance: float | None = None
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """The network with what a learnt variance is made of, as `output` gives it without; None where none is learnt.

        The second is where the log variance lies between the small (−1) and the large one (1). Guidance moves the mean
        alone.
        """
        model = self.model
        if model.variance != "learned":
            return None
        given = model.conditioned(context)
        if guidance is None:
            return lambda y, level: cast("tuple[Tensor, Tensor]", model.network(y, level, given))
        guided = self.output(context, guidance)

        def both(y: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
            return guided(y, level), cast(Tensor, model.network(y, level, given)[1])

        return both

    # ---------------------------------------------------------------------------------------------------- what data set
    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Take location and scale from the rows of x (and of the context), once."""
        x, *rest = Program.check(self, x, context)
        model = self.model
        if bool(model.started):
            return
        model.started.fill_(True)
        if not self.standardise:
            return
        model.location.copy_(x.mean(0))
        model.scale.copy_(_spread(x))
        for given in rest:
            if model.own:
                model.context_location.copy_(given.mean(0))
                model.context_scale.copy_(_spread(given))
            if model.null is not None:  # a place of its own, away from contexts that mean something
                model.null.copy_(given.mean(0) + 3 * _spread(given))

    @torch.no_grad()
    def conclude(self, x: Tensor, context: Tensor | None = None) -> None:
        """Measure what the network does not know of the rows at each level, for ``variance="optimal"``.

        It is the mean square of :math:`u - \\hat u`, a number for each level and feature; `fit` calls it, last.
        """
        if self.model.variance == "optimal":
            x, *rest = Program.check(self, x, context)
            with scopes.evaluation_mode(self), scopes.forked_generators(0):
                self.model.measure(self.model.standard(x), self.model.conditioned(rest[0] if rest else None))

    # ----------------------------------------------------------------------------------------------------------- bounds
    def lower_bound(self, x: Tensor, context: Tensor | None = None, particles: int = 1) -> Tensor:
        """The bound of each row, ``(rows,)`` in nats: the sum of all its terms, `terms`, with closed KLs."""
        return -self.terms(x, context, particles).sum(1)

    def terms(self, x: Tensor, context: Tensor | None = None, particles: int = 1) -> Tensor:
        r"""The terms of the negative bound, from the datum to the noise, each a closed KL at one draw of y_i.

        Args:
            x: ``(rows, *event_shape)``. context: of each row, for a conditional program.
            particles: draws of y_i a term, over which it is averaged.

        Returns:
            ``(rows, T + 1)``, in nats: :math:`-\log p(x \mid y_1)`, the KLs of steps 2 to T, and :math:`L_T`. In
            continuous time T − 1 is 128, parts of the integral that are equally long in log SNR.
        """
        check_count(particles, "particles")
        x, *rest = self.check(x, context)
        model, u, table = self.model, self.model.standard(x), self.model.steps()
        context = model.conditioned(rest[0] if rest else None)
        total: Any = 0.0
        for _ in range(particles):
            total = total + (self._integral if self.timesteps is None else self._steps)(u, table, context)
        means = total / particles
        first = means[:, :1] + model.reconstruction(table)
        return torch.cat([first, means[:, 1:], model.prior_loss(u, table).unsqueeze(1)], 1)

    def _steps(self, u: Tensor, table: Table, context: Tensor | None) -> Tensor:
        """All steps at one draw each: ``(rows, T)``."""
        model = self.model

        def part(rows: slice, steps: slice) -> Tensor:
            here, noise = (
                u[rows],
                torch.randn((len(table.alpha[steps]), *u[rows].shape), dtype=u.dtype, device=u.device),
            )
            step = Table(*(column[steps].unsqueeze(1) for column in table))
            given = None if context is None else context[rows]
            return model.step_loss(here, noise, step, model.ratio[steps].unsqueeze(1), given).T

        return self._in_parts(part, len(u), len(table.alpha))

    def _integral(self, u: Tensor, table: Table, context: Tensor | None) -> Tensor:
        """The last step and the parts of the integral at one draw each: ``(rows, 1 + POINTS)``."""
        model, first = self.model, row_of(table, 0)
        knots = model.schedule.log_snr(model.knots[1:])
        width = (knots[0] - knots[1]) / POINTS
        dims = len(self.event_shape)

        def part(rows: slice, points: slice) -> Tensor:
            here = u[rows]
            at = torch.arange(points.start, points.stop, dtype=u.dtype, device=u.device).unsqueeze(1)
            log_snr = knots[0] - width * (at + torch.rand((len(at), len(here)), dtype=u.dtype, device=u.device))
            noise = torch.randn((len(at), *here.shape), dtype=u.dtype, device=u.device)
            given = None if context is None else context[rows]
            squares, _ = model.misses(here, noise, model.read(model.schedule.time(log_snr)), given)
            return (width / 2 * log_snr.exp() * squares.flatten(-dims).sum(-1)).T

        squares, _ = model.misses(u, torch.randn_like(u), first, context)
        end = (squares / model.error(first, model.ratio[0]) - 1).flatten(1).sum(1) / 2
        return torch.cat([end.unsqueeze(1), self._in_parts(part, len(u), POINTS)], 1)

    def _in_parts(self, part: Any, rows: int, columns: int) -> Tensor:
        """A matrix ``(rows, columns)`` from blocks whose size keeps memory bounded."""
        size = at_once(torch.Size(self.event_shape).numel())
        high = min(rows, size)
        wide = min(columns, max(1, size // high))
        blocks = [
            torch.cat([part(slice(i, min(rows, i + high)), slice(j, min(columns, j + wide)))
                       for j in range(0, columns, wide)], 1)
            for i in range(0, rows, high)
        ]  # fmt: skip
        return torch.cat(blocks)

    def chain(self, timesteps: int | None = None, variance: Variance | None = None) -> Diffusion:
        """The same network as a chain of sample sites: its draws have weights, whose mean is p(x) itself.

        Modules, weights, location and scale are shared. With as many steps as here it is the chain that `lower_bound`
        bounds. With another number, optimal variances are read off the errors found here, along straight lines in
        log σ/α; its own `conclude` finds them anew.

        Args:
            timesteps: T, at most 1000; default the own number of steps, 100 in continuous time.
            variance: default as here.

        Example:
            ``pg.log_evidence(diffusion.chain(), x, method=pg.ImportanceSampling(1000))`` is the bound of 1000 paths.
        """
        own = self.model
        steps = (CHAIN if self.timesteps is None else self.timesteps) if timesteps is None else timesteps
        kind = own.variance if variance is None else variance
        if "learned" in (kind, own.variance) and kind != own.variance:
            raise ValueError(
                f"variance={describe(variance)}: whether the network gives a variance cannot be changed, and here it "
                f"{'does' if own.variance == 'learned' else 'does not'}"
            )
        chain = Diffusion(
            self.event_shape, own.net, own.schedule, steps, self.prediction, self.context_shape,
            form="sites", variance=kind, standardise=self.standardise, unconditional=own.unconditional,
            guide=self.guide.order,
        )  # fmt: skip
        model = chain.model
        model.own, model.null = own.own, own.null
        model.ratio = model.ratio.to(own.location)
        for name in ("location", "scale", "started", "context_location", "context_scale"):
            if name in own._buffers:
                model._buffers[name] = own._buffers[name]
        model.tabulate()
        with torch.no_grad():
            model.ratio = (
                own.ratio.clone() if steps == self.timesteps else own.ratio_at(log_ratio(model.steps())).clone()
            )
        return chain.train(self.training)

    # ----------------------------------------------------------------------------------------------------------- draws
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        method: Any = None,
        guidance: float | None = None,
        seed: int | None = None,
        trajectory: bool = False,
    ) -> Tensor:
        """Draw data by running the noise backwards.

        Args:
            n: number of rows.
            context: ``(n, *context_shape)``, or ``context_shape`` for all, for a conditional program.
            method: a `ReverseDiffusion` or `ProbabilityFlow`; default ancestral sampling.
            guidance: weight w of classifier-free guidance, (1 + w) F(y, c) − w F(y); None for none.
            seed: makes the draw repeatable and leaves the global generators as they were.
            trajectory: return all states, from noise to data: ``(steps + 1, n, *event_shape)``.

        Returns:
            Tensor of shape ``(n, *event_shape)``.

        Raises:
            ValueError: for a context that is missing or misshapen, guidance without unconditional training.
        """
        check_count(n, "n")
        context = self._for_rows(context, n)
        started = self.model.started
        if self.standardise and not started.is_meta and not bool(started):
            warnings.warn(
                "this diffusion has never been fitted: it draws noise. Train it (pg.fit), or, where its weights "
                "come from elsewhere, call initialise(x) or build it with standardise=False",
                UserWarning,
                stacklevel=2,
            )
        method = ReverseDiffusion() if method is None else method
        if not hasattr(method, "sample"):
            raise TypeError(
                f"method must be how to draw: pg.ReverseDiffusion(...) or pg.ProbabilityFlow(); got {describe(method)}"
            )
        return cast(Tensor, method.sample(self, n, context, guidance=guidance, seed=seed, trajectory=trajectory))

    def distribution(self, context: Tensor | None = None, method: Any = None) -> Any:
        """p(x) as a Pyro distribution, for any ``pyro.sample``: draws and densities by the probability-flow ODE.

        Args:
            context: for a conditional program, ``(*batch_shape, *context_shape)``; the distribution has that batch.
            method: a `ProbabilityFlow`, which says how the ODE is solved and its trace had.
        """
        method = ProbabilityFlow() if method is None else method
        if not hasattr(method, "distribution"):
            raise TypeError(f"method must be a pg.ProbabilityFlow(...), got {describe(method)}")
        return method.distribution(self, context)

    def noncentered(self, name: str, context: Tensor | None = None, method: Any = None) -> Tensor:
        r"""A draw of p(x) inside a Pyro program as noise and the ODE: z ~ N(0, I), x = T(z).

        No density is needed, so it does for any number of features, and chains (NUTS) move in z, where the prior is
        standard normal.

        Args:
            name: of the deterministic site that holds x; the latent is ``f"{name}_noise"``.
            context, method: as for `distribution`.

        Returns:
            x, ``(*batch_shape, *event_shape)``.
        """
        law = self.distribution(context, method)
        zero = self.location.new_zeros((*law.batch_shape, *self.event_shape))
        noise = dist.Normal(zero, torch.ones_like(zero)).to_event(len(self.event_shape))
        x: Tensor = law.push(pyro.sample(f"{name}_noise", noise))
        pyro.deterministic(name, x, event_dim=len(self.event_shape))
        return x

    def _for_rows(self, context: Tensor | None, rows: int) -> Tensor | None:
        if (context is None) != (self.context_shape is None):
            raise ValueError(context_error(self.context_shape))
        if context is None or self.context_shape is None:
            return None
        if isinstance(context, Tensor) and context.shape == self.context_shape:
            context = context.expand(rows, *self.context_shape)
        context = check_rows(context, self.context_shape, "context")
        if len(context) != rows:
            raise ValueError(f"context has {len(context)} rows and n is {rows}: each draw needs its own")
        return context


def _spread(x: Tensor) -> Tensor:
    spread = x.std(0, unbiased=False)
    return torch.where(spread > 0, spread, torch.ones_like(spread))


def _check_options(
    form: Any, variance: Any, guide: Any, timesteps: Any, unconditional: Any, context: torch.Size | None
) -> None:
    for name, given, known in (("form", form, Form), ("variance", variance, Variance), ("guide", guide, Order)):
        if given not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, got {describe(given)}")
    if timesteps is not None:
        check_count(timesteps, "timesteps")
    if form == "sites" and (timesteps is None or timesteps > MOST_SITES):
        raise ValueError(
            f"form='sites' has a site for each step, and timesteps={timesteps}: give up to 100 of them, "
            f"{MOST_SITES} at most, or take form='collapsed', whose cost does not grow with T"
        )
    if variance == "learned" and (timesteps is None or timesteps < 2):
        raise ValueError(
            f"variance='learned' lies between the variances of a chain of 2 steps at least, and timesteps={timesteps}: "
            "use variance='optimal'"
        )
    if isinstance(unconditional, bool) or not isinstance(unconditional, (int, float)) or not 0 <= unconditional < 1:
        raise ValueError(f"unconditional must be a share of rows, from 0 to below 1, got {describe(unconditional)}")
    if unconditional and context is None:
        raise ValueError("unconditional= leaves the context out of a share of rows, and there is none: context_shape=")


def _network(
    network: Any,
    event: torch.Size,
    context: torch.Size | None,
    hidden: tuple[int, ...],
    outputs: int,
    linear: tuple[float, float] | None,
) -> nn.Module:
    if isinstance(network, Program):
        raise TypeError(f"network must be a network, not a program, got {describe(network)}")
    if isinstance(network, nn.Module):
        return network
    given = 0 if context is None else context.numel()
    if network is None or network == "mlp":
        return _Flat(event, given, hidden, outputs, linear)
    if network == "conv":
        if len(event) != 3:
            raise ValueError(f"network='conv' needs event_shape (channels, height, width), got {tuple(event)}")
        gate: dict[str, Any] = {"gated": linear is not None, "linear": linear or (0.0, 0.0)}
        return _Conv(tuple(event), outputs, context_features=given, **gate)
    raise ValueError(f"network must be a module, 'mlp', 'conv' or None, got {describe(network)}")
