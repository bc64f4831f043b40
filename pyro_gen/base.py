r"""The contracts of pyro_gen on one page: programs, objectives, samplers, evidence.

A generative model approximates a data distribution by :math:`p(x) = f(x) / Z` with :math:`Z = \int f(x)\,dx`. What a
family does about Z is its *kind*, and the kind is its base class:

=============== ================================= ======================================
kind            what it can say                   what stands in for Z
=============== ================================= ======================================
`Exact`         ``log_prob(x)``                   nothing: Z = 1 by construction
`Bounded`       ``lower_bound(x)``, ``sample(n)`` a guide q(z | x): log p(x) ≥ E[log w]
`Noised`        a score at every noise level      the fixed noising: a bound, and an ODE for log p
`Unnormalized`  ``log_density(x)`` = log f        left open: the score needs no Z
`Implicit`      ``sample(n)``                     never written down
=============== ================================= ======================================

A `Program` is a pair of modules, ``model`` and ``guide``, each a Pyro program called as ``model(*batch)``. An
`Objective` is configuration; called with a program (or any model and guide) it gives an `ObjectiveModule`, whose
``forward(*batch)`` is the loss: an estimate of :math:`-\log L(\theta)` of the *full* data set, in nats. A `Sampler`
moves chains over a `Target`, which any program of known density gives. An `Evidence` is a number with its kind (exact,
bound, estimate) and its error.

To read on: ``programs/vae.py`` is one family, ``objectives/likelihood.py`` the shortest objective.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar, cast, overload, runtime_checkable

import pyro.infer
import pyro.poutine as poutine
import torch
from pyro.distributions import ImproperUniform
from pyro.infer.elbo import ELBOModule
from pyro.infer.util import is_validation_enabled
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_gen import handlers, scopes
from pyro_gen.checks import as_shape, check_count, check_rows, describe
from pyro_gen.densities import Density
from pyro_gen.handlers import Structure
from pyro_gen.targets import BoltzmannTarget, Target

EvidenceKind = Literal["exact", "lower bound", "upper bound", "estimate"]
LossIs = Literal["log-likelihood", "lower bound", "generalized", "gradient only", "game"]

PARETO_K_LIMIT = 0.7  # above it a mean of weights cannot be trusted at any practical size (Vehtari et al. 2024)


# ---------------------------------------------------------------------------------------------------------- programs
class Nothing(nn.Module):
    """The guide of a program that needs none."""

    def forward(self, *batch: Any, **kwargs: Any) -> None:
        return None


class Calls(nn.Module):
    """A bare Pyro callable as a module, so that a `Program` can hold it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *batch: Any, **kwargs: Any) -> Any:
        return self.function(*batch, **kwargs)

    def extra_repr(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


class Program(nn.Module):
    """A generative model as a Pyro model/guide pair; its subclass says what it does about Z.

    Args:
        model: the Pyro program of the data; a module (or any callable) called as ``model(*batch)``.
        guide: what stands in for the integral, called likewise; None where nothing is needed.
        event_shape: shape of one datum, an int or a tuple.
        context_shape: shape of what a row is conditioned on, or None.

    Model and guide are two modules, never two methods of one, and a program is not called itself: call its objective.
    """

    __call__: None  # type: ignore[assignment]
    model: nn.Module
    guide: nn.Module
    config: dict[str, Any] | None = None  # what `load` builds the program from; None where it was given modules

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        event_shape: int | tuple[int, ...],
        context_shape: int | tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, Program) or isinstance(guide, Program):
            raise TypeError("model and guide are Pyro callables; of a program pass program.model and program.guide")
        if not callable(model) or not (guide is None or callable(guide)):
            raise TypeError(f"model and guide must be callable, got {type(model).__name__}, {type(guide).__name__}")
        self.model = model if isinstance(model, nn.Module) else Calls(model)
        self.guide = Nothing() if guide is None else guide if isinstance(guide, nn.Module) else Calls(guide)
        self.event_shape = as_shape(event_shape)
        self.context_shape = None if context_shape is None else as_shape(context_shape, "context_shape")

    def forward(self, *batch: Any, **kwargs: Any) -> Any:
        """A program is not called; a ``TypeError`` says what is."""
        raise TypeError(
            f"{describe(self)} is not called itself: its model and guide are (program.model(x)), its objective is "
            "(pg.ELBO()(program)(x)), and program.sample(n) draws from it"
        )

    def check(self, x: Any, context: Any = None) -> tuple[Tensor, ...]:
        """Check data at the door and return the batch ``(x,)`` or ``(x, context)``.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what to do.
        """
        batch: tuple[Tensor, ...] = (check_rows(x, self.event_shape),)
        if (context is None) != (self.context_shape is None):
            raise ValueError(context_error(self.context_shape))
        if self.context_shape is not None:
            batch += (check_rows(context, self.context_shape, "context"),)
            if batch[0].shape[0] != batch[1].shape[0]:
                raise ValueError(
                    f"x has {batch[0].shape[0]} rows and context has {batch[1].shape[0]}: each row of x needs its own"
                )
        like = self._own_tensor()
        for name, part in zip(("x", "context"), batch, strict=False):
            if like is None:  # nothing of its own: it takes data as they come
                break
            if part.dtype != like.dtype:
                raise TypeError(
                    f"{name} is {part.dtype} and the program {like.dtype}: pass {name}.to({like.dtype}), or "
                    "program.to(...) the other way"
                )
            if part.device != like.device:
                raise ValueError(
                    f"{name} is on {part.device} and the program on {like.device}: move one, "
                    f"program.to({str(part.device)!r}) or {name}.to({str(like.device)!r})"
                )
        return batch

    def check_training(self, x: Tensor) -> None:
        """Refuse data on which the fit has no maximum; families override it."""

    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set what starts from data (a location and scale, say), once: a second call changes nothing.

        ``fit`` calls it with the training rows before its first step; call it before a training loop of your own.
        """

    def conclude(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set what is found from data with the weights as they ended; ``fit`` calls it with the training rows, last."""

    def template(self) -> Tensor:
        """An empty tensor with the device and dtype of the program's parameters, or of torch's defaults."""
        own = self._own_tensor()
        return torch.empty(0) if own is None else torch.empty(0, device=own.device, dtype=own.dtype)

    def _own_tensor(self) -> Tensor | None:
        return next((t for t in (*self.parameters(), *self.buffers()) if t.dtype.is_floating_point), None)

    def _data_site(self, n: int, context: Tensor | None) -> Any:
        """The site of x in a run of the model with nothing observed."""
        x = self.template().new_zeros((n, *self.event_shape))
        batch = Program.check(self, x, context)  # zeros need not lie in the support
        with poutine.block(), handlers.Unobserve() as redrawn:
            trace = poutine.trace(self.model).get_trace(*batch)
        found = [name for name, value in redrawn.observed.items() if value is x] or list(redrawn.observed)
        if len(found) != 1:
            raise ValueError(f"the model's data site is not clear among {found}: observe x itself, obs=x")
        site: Any = trace.nodes[found[0]]
        drawn, shape = site["value"], (n, *self.event_shape)
        if [d for d in drawn.shape if d != 1] != [d for d in shape if d != 1]:  # obs=x.squeeze(-1) is x all the same
            given = f"the model's site {found[0]!r} has shape {tuple(drawn.shape)}"
            raise ValueError(f"{given}, x has {shape}: observe x itself, obs=x")
        return site


def context_error(context_shape: torch.Size | None) -> str:
    """What to say where a context is missing, or is one too many."""
    if context_shape is None:
        return "context was given to a program without one: pass x alone, or build the program with context_shape="
    return f"context is missing: this program was built with context_shape={tuple(context_shape)}: pass (x, context)"


def event_names(event_shape: torch.Size) -> list[str]:
    """What ArviZ is to call the dimensions of one datum."""
    names = {1: ["feature"], 2: ["height", "width"], 3: ["channel", "height", "width"]}
    return names.get(len(event_shape), [f"event_{i}" for i in range(len(event_shape))])


class Samples(Program):
    """What programs with a normalised model share: ancestral draws."""

    @torch.no_grad()
    def sample(self, n: int, context: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        """Draw data from the model, by running it with nothing observed.

        Args:
            n: number of rows.
            context: tensor of shape ``(n, *context_shape)``, for a conditional program.
            seed: makes the draw repeatable and leaves the global generators as they were.

        Returns:
            Tensor of shape ``(n, *event_shape)``.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a positive int, got {describe(n)}")
        with nullcontext() if seed is None else scopes.forked_generators(seed):
            return cast(Tensor, self._data_site(n, context)["value"]).reshape(n, *self.event_shape)


class Implicit(Samples):
    """A program that can only be sampled: its density is never written down.

    Args:
        model: Pyro program that observes ``x``; guide: None, or a critic.
        event_shape: shape of one datum; context_shape: of what a row is conditioned on, or None.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None = None,
        event_shape: int | tuple[int, ...] = 1,
        context_shape: int | tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(model, guide, event_shape, context_shape)


class Bounded(Samples):
    r"""A program with latents, whose Z is bounded: :math:`\log p(x) \ge E_q[\log p(x, z) - \log q(z \mid x)]`.

    Args:
        model: Pyro program of x and its latents; guide: Pyro program of the same latents given x.
        event_shape: shape of one datum; context_shape: of what a row is conditioned on, or None.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x.squeeze(-1))
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x.squeeze(-1) / 2, 0.5**0.5))   # the exact posterior
        >>> Bounded(model, guide, event_shape=1).lower_bound(torch.zeros(2, 1))  # so the bound is log N(0; 0, 2)
        tensor([-1.2655, -1.2655])
    """

    def lower_bound(self, x: Tensor, context: Tensor | None = None, particles: int = 1) -> Tensor:
        """ELBO of each row, a mean over ``particles`` draws of the guide: ``(rows,)``, in nats; random as the draws."""
        check_count(particles, "particles")
        weights = handlers.log_weight(self.model, self.guide, *self.check(x, context), particles=particles)
        return weights.mean(0)


class Schedule(Protocol):
    r"""How a datum turns into noise, :math:`y_t = \alpha(t)\, u + \sigma(t)\, \varepsilon`, from t = 0 to t = 1.

    Attributes:
        variance_preserving: whether α² + σ² = 1.
        ends: the times between which continuous time runs.
    """

    variance_preserving: bool

    @property
    def ends(self) -> tuple[float, float]: ...

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def log_snr(self, t: Tensor) -> Tensor: ...

    def log_snr_rate(self, t: Tensor) -> Tensor: ...

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    def time(self, log_snr: Tensor) -> Tensor: ...

    def grid(self, steps: int) -> Tensor: ...


class Coefficients(NamedTuple):
    r"""How a network's output F splits :math:`y = \alpha u + \sigma \varepsilon` into its two halves, linearly.

    :math:`F = \mathrm{network}(\mathrm{scale} \cdot y, \ldots)`, and then :math:`\hat u = a y + b F` with
    ``data = (a, b)``, and :math:`\hat\varepsilon = c y + d F` with ``noise = (c, d)``. All have the shape of the times.
    """

    scale: Tensor
    data: tuple[Tensor, Tensor]
    noise: tuple[Tensor, Tensor]


Output = Callable[[Tensor, Tensor], Tensor]  # (scale · y, level of each row) to F, of the shape of y


class Noised(Bounded):
    r"""A program with a score at every noise level: :math:`x_t = m + s\,(\alpha(t)\, u + \sigma(t)\, \varepsilon)`.

    The latents are the datum's noisier and noisier versions, the guide the fixed noising, and Z is bounded as in any
    `Bounded` program. Beyond that, one network says at every t what is datum and what is noise, :math:`\hat u` and
    :math:`\hat\varepsilon`, which is the score of the density at that level,
    :math:`\nabla \log p_t(x) = -\hat\varepsilon / (s\, \sigma)`, and its velocity,
    :math:`dx_t/dt = s\,(\alpha' \hat u + \sigma' \hat\varepsilon)`.

    Args:
        model, guide: the pair, for the bound.
        event_shape: shape of one datum; context_shape: of what a row is conditioned on, or None.
        schedule: α(t) and σ(t).
        denoiser: :math:`E[u \mid y]`, called as ``denoiser(y, t)`` or ``denoiser(y, t, context)`` with t of shape
            ``(rows,)``; its parameters are the model's. Families with a network of another kind override
            `coefficients`, `levels` and `output`.

    Attributes:
        location, scale: m and s, tensors that broadcast to ``event_shape``: a datum is x = m + s u.
        times: the least and the greatest time at which the network is trained.
        timesteps: how many these times are, None in continuous time; `training_times` gives each an equal share of u.
    """

    timesteps: int | None = None

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        event_shape: int | tuple[int, ...],
        context_shape: int | tuple[int, ...] | None = None,
        *,
        schedule: Schedule,
        denoiser: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__(model, guide, event_shape, context_shape)
        self.model.__dict__["_owner"] = self  # so that `SVI`, which sees the pair, finds schedule and network
        self.__dict__["schedule"] = schedule  # the model holds them where they have parameters
        self.__dict__["denoiser"] = denoiser

    @property
    def schedule(self) -> Schedule:
        """α(t) and σ(t)."""
        return cast(Schedule, self.__dict__["schedule"])

    @property
    def location(self) -> Tensor:
        """m of x = m + s u, which broadcasts to ``event_shape``."""
        return self.template().new_zeros(())

    @property
    def scale(self) -> Tensor:
        """s of x = m + s u, which broadcasts to ``event_shape``."""
        return self.template().new_ones(())

    @property
    def times(self) -> tuple[float, float]:
        """The least and the greatest time at which the network is trained."""
        return self.schedule.ends

    def coefficients(self, t: Tensor) -> Coefficients:
        """What makes :math:`\\hat u` and :math:`\\hat\\varepsilon` of the network's output, at times of any shape."""
        one, alpha, sigma = torch.ones_like(t), self.schedule.alpha(t), self.schedule.sigma(t)
        return Coefficients(one, (0 * one, one), (1 / sigma, -alpha / sigma))

    def levels(self, t: Tensor) -> Tensor:
        """What the network is told of the times, of their shape: t itself, or a function of it."""
        return t

    @property
    def fixed(self) -> tuple[Tensor, ...] | None:
        """The tensors that the numbers of all levels hang on, so that samplers may keep them; None: make them anew."""
        return None

    def training_times(self, u: Tensor) -> Tensor:
        """Times from numbers that are uniform in [0, 1), of their shape: those that the network is trained at."""
        first, last = self.times
        return first + (last - first) * u

    def dropped(self, context: Tensor) -> Tensor:
        """The contexts that a training step is to show the network: those given, or others for some of the rows."""
        return context

    def output(self, context: Tensor | None = None, guidance: float | None = None) -> Output:
        """The network as a function of (scale · y, level of each row) alone, for loops over many levels.

        Args:
            context: of each row, for a conditional program; it has been checked.
            guidance: weight w of classifier-free guidance, :math:`(1 + w) F(y, c) - w F(y)`; None for none.

        Raises:
            ValueError: for guidance of a program that was not trained without its context too.
        """
        if guidance is not None:
            raise ValueError(f"guidance= needs a program trained without its context too, and {describe(self)} is not")
        denoiser, given = self.__dict__["denoiser"], () if context is None else (context,)
        if denoiser is None:
            raise NotImplementedError(f"{describe(self)} has no denoiser: pass denoiser=, or override output")
        return lambda y, level: denoiser(y, level, *given)

    def split(self, y: Tensor, t: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""What is datum and what is noise in y, in standard units: :math:`\hat u` and :math:`\hat\varepsilon`.

        Args:
            y: :math:`(x_t - m) / s`, ``(rows, *event_shape)``; t: ``(rows,)``; context: of each row, or None.
        """
        c = self.coefficients(t)
        a, b, d, e, scale = (_over_rows(part, y) for part in (*c.data, *c.noise, c.scale))
        out = self.output(context)(scale * y, self.levels(t))
        return a * y + b * out, d * y + e * out

    def denoise(self, x: Tensor, t: Tensor | float, context: Tensor | None = None) -> Tensor:
        """The mean of the datum given its noised version x at level t: ``(rows, *event_shape)``, in units of x."""
        y, t, context = self._at_level(x, t, context)
        return self.location + self.scale * self.split(y, t, context)[0]

    def score(self, x: Tensor, t: Tensor | float, context: Tensor | None = None) -> Tensor:
        r"""The score :math:`\nabla \log p_t(x)` of the noised data at level t, per unit of x.

        Args:
            x: ``(rows, *event_shape)``, noised to level t.
            t: one time for all rows or one for each, ``(rows,)``; in (0, 1].
            context: of each row, for a conditional program.
        """
        y, t, context = self._at_level(x, t, context)
        noise = self.split(y, t, context)[1]
        return -noise / (_over_rows(self.schedule.sigma(t), y) * self.scale)

    def velocity(self, x: Tensor, t: Tensor | float, context: Tensor | None = None) -> Tensor:
        """dx/dt of the probability-flow ODE, in units of x: its solutions have the densities of the noised data."""
        y, t, context = self._at_level(x, t, context)
        data, noise = self.split(y, t, context)
        alpha, sigma = (_over_rows(part, y) for part in self.schedule.derivatives(t))
        return self.scale * (alpha * data + sigma * noise)

    def _at_level(self, x: Tensor, t: Tensor | float, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        x, *rest = Program.check(self, x, context)  # noised data need not lie in the support
        times = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if times.dim() > 1 or (times.dim() == 1 and len(times) != len(x)):
            raise ValueError(f"t must be one time, or one for each of {len(x)} rows; got shape {tuple(times.shape)}")
        last = max(1.0, self.times[1])
        if is_validation_enabled() and not times.is_meta and not bool(((times > 0) & (times <= last)).all()):
            given = f"{float(times.min()):g} to {float(times.max()):g}"
            raise ValueError(f"t must lie in (0, {last:g}], from datum to noise; got {given}")
        return (x - self.location) / self.scale, times.expand(len(x)), rest[0] if rest else None


def _over_rows(value: Tensor, y: Tensor) -> Tensor:
    """Numbers of rows (or one number) so that they multiply rows."""
    return value.reshape(*value.shape, *[1] * (y.dim() - 1)) if value.dim() else value


class Unnormalized(Program):
    r"""A program whose density is known up to Z: sites of any kind, factors among them.

    Args:
        model: Pyro program that observes ``x``; latents of it are summed out where they are marked for enumeration.
        event_shape: shape of one datum; context_shape: of what a row is conditioned on, or None.
        guide: Pyro program of the continuous latents given x, where the model has any.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        event_shape: int | tuple[int, ...],
        context_shape: int | tuple[int, ...] | None = None,
        guide: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, guide, event_shape, context_shape)

    def log_density(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log f of each row, not log p: ``(rows,)``, in nats up to one constant, log Z."""
        return self.log_density_rows(*self.check(x, context))

    def log_density_rows(self, *batch: Tensor) -> Tensor:
        """log f of each row of a batch that has been checked; families override it with a faster way than a trace."""
        return handlers.log_density(self.model, *batch)

    def target(self, context: Tensor | None = None) -> Target:
        """The density as samplers and methods of log Z see it, with the weights of now.

        Its base is the distribution at the data site, without a mask around it; its path the geometric one. That of a
        Boltzmann machine runs over its hidden units too, and is moved by blocks.

        Args:
            context: of a conditional program: one context for all chains, ``context_shape``, or one for each.
        """
        contexts, shape = self._contexts(context, None), self.event_shape
        rows = len(contexts[0]) if contexts else 1
        fn = self._base(rows, *contexts)
        site_shape = fn.batch_shape[1:] + fn.event_shape

        def log_density(x: Tensor) -> Tensor:
            return self.log_density_rows(x, *self._contexts(context, len(x)))

        def log_base(x: Tensor) -> Tensor:
            value: Tensor = fn.log_prob(x.reshape(len(x), *site_shape))
            return value.reshape(len(x), -1).sum(1)

        def sample_base(n: int) -> Tensor:
            with torch.no_grad():
                draws: Tensor = fn.sample(() if rows == n else (n,))
            return draws.reshape(n, *shape)

        support = constraints.independent(fn.support, len(shape) - fn.support.event_dim)
        can_sample = type(fn).sample is not ImproperUniform.sample
        target = Target(
            log_density,
            shape,
            self.template(),
            support,
            log_base if can_sample else None,
            sample_base if can_sample else None,
        )
        machine = self._machine(rows, *contexts) if support.is_discrete else None
        return target if machine is None else BoltzmannTarget(machine[0], target, flat=machine[1])

    def _machine(self, rows: int, *contexts: Tensor) -> tuple[Any, bool] | None:
        """What `handlers.boltzmann_machine` says of the model: found once, as it looks at values."""
        if "_found_machine" not in self.__dict__:
            with torch.enable_grad():
                self.__dict__["_found_machine"] = handlers.boltzmann_machine(self._sites(rows, *contexts)[1])
        return cast("tuple[Any, bool] | None", self.__dict__["_found_machine"])

    def _sites(self, rows: int, *contexts: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Zeros for so many rows, and the sites of the model run on them."""
        x = self.template().new_zeros((rows, *self.event_shape))
        with poutine.block():
            return x, handlers.sample_sites(poutine.trace(self.model).get_trace(x, *contexts))

    def _base(self, rows: int, *contexts: Tensor) -> Any:
        """The distribution at the data site for so many rows, without the mask that makes it flat."""
        with torch.no_grad():
            x, sites = self._sites(rows, *contexts)
        observed = {name: s for name, s in sites.items() if handlers.site_kind(s) == "observed"}
        found = [s for s in observed.values() if s["value"] is x] or list(observed.values())
        if len(found) != 1:
            raise ValueError(f"the model's data site is not clear among {list(observed)}: observe x itself, obs=x")
        return handlers.unmasked(found[0]["fn"])

    def _contexts(self, context: Tensor | None, rows: int | None) -> tuple[Tensor, ...]:
        """The context of each of so many rows (None: of as many as it has), as the rest of a batch."""
        if (context is None) != (self.context_shape is None):
            raise ValueError(context_error(self.context_shape))
        if context is None or self.context_shape is None:
            return ()
        if tuple(context.shape) == tuple(self.context_shape):
            context = context.unsqueeze(0)
        rows = len(context) if rows is None else rows
        if tuple(context.shape[1:]) != tuple(self.context_shape) or len(context) not in (1, rows):
            raise ValueError(
                f"context must be one for all, of shape {tuple(self.context_shape)}, or one for each of {rows} chains; "
                f"got {tuple(context.shape)}"
            )
        return (context.expand(rows, *self.context_shape),)


class Exact(Unnormalized, Bounded):
    """A program whose density is normalised: Z = 1, the bound's gap is 0, so every objective of the others fits it."""

    @property
    def stochastic(self) -> bool:
        """Whether ``log_prob`` is an unbiased estimate, another at each call (a continuous flow of many features)."""
        return False

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p of each row: ``(rows,)``, in nats."""
        return handlers.log_density(self.model, *self.check(x, context))

    def log_density(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p of each row: f = p, as Z = 1."""
        return self.log_prob(x, context)

    def log_density_rows(self, *batch: Tensor) -> Tensor:
        """log p of each row of a batch."""
        if type(self).log_prob is Exact.log_prob:
            return handlers.log_density(self.model, *batch)
        return self.log_prob(*batch)

    def lower_bound(self, x: Tensor, context: Tensor | None = None, particles: int = 1) -> Tensor:
        """log p of each row: the bound's gap is 0."""
        return self.log_prob(x, context)

    def distribution(self, context: Tensor | None = None) -> Any:
        """p(x) as a Pyro distribution, for any ``pyro.sample``: as a prior, a likelihood or a guide.

        Args:
            context: for a conditional program, ``(*batch_shape, *context_shape)``; the distribution has that batch.

        Returns:
            A distribution of event shape ``event_shape``, with ``log_prob``, ``sample``, ``support`` and ``expand``.
        """
        if (context is None) != (self.context_shape is None):
            raise ValueError(context_error(self.context_shape))
        ndim = 0 if self.context_shape is None else len(self.context_shape)
        one = None if context is None else context.reshape(-1, *context.shape[context.dim() - ndim :])[:1]
        with torch.no_grad():
            fn = self._data_site(1, one)["fn"]
        events = len(self.event_shape)
        support = fn.support if fn.event_dim >= events else constraints.independent(fn.support, events - fn.event_dim)
        return Density(self.log_prob, self.sample, self.event_shape, support, context, ndim)


# -------------------------------------------------------------------------------------------------------- objectives
K = TypeVar("K", bound=Program, contravariant=True)


@effectful(type="param")  # type: ignore[untyped-decorator, unused-ignore]
def _emit(value: Tensor, name: str | None = None, constraint: Any = None) -> Tensor:
    return value


def announce(prefix: str, module: nn.Module) -> None:
    """Emit a param site for each trainable parameter of a module, so that ``SVI.step`` finds and trains it.

    Unlike ``pyro.module`` this does not go through the global store, which would hand a second module of equal
    parameter names the tensors of the first.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            view = parameter.view_as(parameter)
            view.unconstrained = lambda p=parameter: p  # type: ignore[attr-defined]
            _emit(view, name=f"{prefix}.{name}", constraint=constraints.real)


class ObjectiveModule(ELBOModule):
    """An objective bound to one model and guide; its ``forward(*batch)`` is the loss.

    Subclasses implement :meth:`pointwise` where the loss is a sum over rows, else :meth:`forward`. State that a loss
    keeps (a learnt log Z, a chain, a critic) is parameters and buffers of this module.
    """

    model: Any  # a module, or any callable
    guide: Any
    objective: Objective[Any]
    average: float | None = None  # decay of the average of the weights that `fit` takes where it is not told

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any] | None, objective: Objective[Any]) -> None:
        super().__init__(cast(nn.Module, model), cast(nn.Module, guide), objective)
        self.objective = objective
        self.__dict__["program"] = None
        self.structure: Structure | None = None
        self.__dict__["store_parameters"] = []  # tensors of `pyro.param` sites that no module owns

    @property
    def program(self) -> Program | None:
        """The program this objective was called with, or None for a bare pair."""
        return cast("Program | None", self.__dict__["program"])

    @property
    def validates(self) -> bool:
        """Whether ``fit`` holds rows out without being asked: as the objective says, but for some programs."""
        return self.objective.validates

    @property
    def players(self) -> tuple[nn.Module, ...]:
        """The modules whose parameters each loss of :meth:`losses` trains; one, but for games."""
        return (self,)

    @property
    def periods(self) -> tuple[int, ...]:
        """Steps from one move of each player to its next, in ``fit``; 1 where a player moves at every step."""
        return (1,) * len(self.players)

    def prepare(self, *batch: Any, **kwargs: Any) -> Structure:
        """Run the pair once, plainly: creates lazy parameters, checks that the sites match, leaves no trace.

        The first :meth:`forward` does this by itself; an optimizer built before it misses lazy parameters.
        """
        frozen = [p for p in self.parameters() if not p.requires_grad]
        with (
            torch.no_grad(),
            scopes.preserved_state(self.model, self.guide),
            poutine.block(),
            scopes.hide_bare_parameters(),
        ):
            shape, tensors = handlers.structure(self.model, self.guide, *batch, **kwargs)
        for parameter in frozen:  # a first `pyro.param` of what a PyroModule holds directly thaws it
            parameter.requires_grad_(False)
        self.check_structure(shape)
        if shape.drawn_stepwise:
            warnings.warn(
                f"the guide draws {', '.join(map(repr, shape.drawn_stepwise))} feature by feature, from a flow built "
                "with direction='density': training it is slow. Build it with direction='sampling'",
                UserWarning,
                stacklevel=2,
            )
        own = {id(p) for p in self.parameters()}
        unique = {id(t): t for t in tensors if id(t) not in own and t.is_leaf and t.requires_grad}
        self.__dict__["store_parameters"] = list(unique.values())
        self.structure = shape
        return shape

    def check(self, *batch: Any) -> tuple[Any, ...]:
        """Check data at the door, for ``fit``: as the program does, unless the loss itself adds to the batch."""
        return batch if self.program is None else self.program.check(*batch)

    def initialise(self, x: Tensor, *rest: Any) -> None:
        """Set what program and loss take from data (a base, the noise of a classifier), once; ``fit`` calls it."""
        if self.program is not None:
            self.program.initialise(x, *rest)

    def conclude(self, x: Tensor, *rest: Any) -> None:
        """Let the program set what it finds from data at the end; ``fit`` calls it once the weights are the result."""
        if self.program is not None:
            self.program.conclude(x, *rest)

    def check_structure(self, shape: Structure) -> None:
        """Refuse a pair that this objective cannot train; called by :meth:`prepare`."""
        handlers.check_pair(shape)

    def trainable(self) -> list[Tensor]:
        """The tensors an optimizer gets: own parameters, then those of ``pyro.param`` statements."""
        return [p for p in (*self.parameters(), *self.__dict__["store_parameters"]) if p.requires_grad]

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        """The loss of each row, unscaled: ``(rows,)``, in nats where the loss is one of log-likelihood or bound."""
        raise TypeError(f"{type(self.objective).__name__} is not a sum over rows: it has no pointwise loss")

    def log_density_rows(self, *batch: Any, **kwargs: Any) -> Tensor:
        """log f of each row, by the family's own way where the program has one, else from a trace of the model."""
        if isinstance(self.program, Unnormalized):
            return self.program.log_density_rows(*batch, **kwargs)
        return handlers.marginal_rows(self.model, *batch, **kwargs)

    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        """The loss: an estimate of the total over ``total`` rows (default: what the data plate says, else the batch).

        Raises:
            ValueError: if ``total`` is given and no plate runs over the rows.
        """
        with self.scaled(*batch, total=total, apply=False, **kwargs) as seen:
            rows = self.pointwise(*batch, **kwargs)
        return cast(Tensor, (seen.factor(handlers.count_rows(batch, 1)) * rows).sum())

    def losses(self, *batch: Any, total: int | None = None, **kwargs: Any) -> tuple[Tensor, ...]:
        """One loss per player, whose gradient reaches that player's parameters only; :meth:`forward` is their sum."""
        return (self.forward(*batch, total=total, **kwargs),)

    @contextmanager
    def scaled(self, *batch: Any, total: int | None, apply: bool, **kwargs: Any) -> Iterator[scopes.DataScale]:
        """Run the program under the one scale: prepared, its data plate counted as ``total`` rows."""
        shape = self.structure or self.prepare(*batch, **kwargs)
        self.check_total(shape, total)
        with scopes.hide_bare_parameters(), scopes.DataScale(shape.data_plate, total, apply) as seen:
            yield seen

    def check_total(self, shape: Structure, total: int | None) -> None:
        """Refuse a ``total`` that is no count, or that no plate over rows can carry."""
        if total is not None:
            check_count(total, "total")
            shape.require_data_plate("total=")

    def extra_repr(self) -> str:
        return repr(self.objective)


class Objective(pyro.infer.ELBO, Generic[K]):
    """Configuration of a loss; ``objective(program)`` or ``objective(model, guide)`` gives the loss as a module.

    It subclasses Pyro's ``ELBO``, so ``SVI(model, guide, optim, loss=objective)`` takes it. Generic in the kind of
    program it needs: a type checker refuses an objective on the wrong kind, and at run time it is a ``TypeError``.

    Attributes:
        needs: the kinds of program it trains.
        loss_is: what the loss says of log L: ``"log-likelihood"`` (its negative, up to a constant), ``"lower bound"``,
            ``"generalized"`` (another minimum of the same kind), ``"gradient only"`` (its value means nothing) or
            ``"game"``.
        deterministic: whether two calls with one batch agree.
        takes: ``"continuous"`` or ``"discrete"`` data, or ``"any"``.
        validates: whether ``fit`` holds rows out without being asked: a loss of derivatives in x runs away on the rows
            it is trained on, long before a likelihood does.
        module_class: the `ObjectiveModule` it makes.
    """

    needs: ClassVar[tuple[type[Program], ...]]
    loss_is: ClassVar[LossIs]
    deterministic: bool = False
    takes: ClassVar[Literal["any", "continuous", "discrete"]] = "any"
    validates: ClassVar[bool] = False
    module_class: ClassVar[type[ObjectiveModule]]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bound: dict[tuple[int, int], ObjectiveModule] = {}

    @overload
    def __call__(self, program: K, /) -> ObjectiveModule: ...
    @overload
    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any] | None = None, /) -> ObjectiveModule: ...
    def __call__(self, model: Any, guide: Any = None, /) -> ObjectiveModule:
        owner = getattr(model, "__dict__", {}).get("_owner")
        if Noised in self.needs and isinstance(owner, Noised) and guide in (None, owner.guide):
            model, guide = owner, None  # a pair does not show what such a loss is made of
        if not isinstance(model, Program):
            if isinstance(model, type) or not callable(model) or not (guide is None or callable(guide)):
                raise TypeError(
                    f"{type(self).__name__}()(...) takes a program, or a model and a guide (callables); got "
                    f"{describe(model)}" + ("" if guide is None else f" and {describe(guide)}")
                )
            return self.module_of(None)(model, Nothing() if guide is None else guide, self)
        if guide is not None:
            raise TypeError("a program brings its own guide: call the objective with the program alone")
        if not isinstance(model, self.needs):
            others = sorted(o.__name__ for o in known_objectives() if isinstance(model, o.needs))
            raise TypeError(
                f"{type(self).__name__} needs a program of kind {' or '.join(k.__name__ for k in self.needs)}, and "
                f"{describe(model)} is {_kind(model)}; what trains it: {', '.join(others) or 'no objective here'}"
            )
        module = self.module_of(model)(model.model, model.guide, self)
        module.__dict__["program"] = model
        return module

    def module_of(self, program: Program | None) -> type[ObjectiveModule]:
        """The `ObjectiveModule` for this program (None: a bare pair)."""
        return self.module_class

    # Pyro's side: SVI calls these with the pair it holds
    def _module(self, model: Callable[..., Any], guide: Callable[..., Any]) -> ObjectiveModule:
        key = (id(model), id(guide))  # the module keeps both alive, so the ids stay theirs
        if key not in self._bound:
            self._bound[key] = self(model, guide)
        return self._bound[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": {}}

    def differentiable_loss(self, model: Any, guide: Any, *batch: Any, **kwargs: Any) -> Tensor:
        """The loss of a pair, for ``SVI`` and code written for Pyro's own ELBOs."""
        return cast(Tensor, self._module(model, guide)(*batch, **kwargs))

    def loss(self, model: Any, guide: Any, *batch: Any, **kwargs: Any) -> float:
        """The loss as a float, without gradients."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *batch, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *batch: Any, **kwargs: Any) -> float:
        """The loss as a float; accumulates gradients and shows every trainable parameter to ``SVI``."""
        module = self._module(model, guide)
        new = module.structure is None
        value = module(*batch, **kwargs)
        if new and value.requires_grad and not module.trainable():
            raise ValueError(
                "the loss depends on parameters that SVI cannot find: pass modules as model and guide, not methods or "
                "functions around them, or name what they hold by pyro.module inside"
            )
        announce("objective", module)
        if value.requires_grad:
            value.backward()
        return float(value.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return handlers.pair_traces(model, guide, *args, **kwargs)[::-1]

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        shown = [f"{k}={v!r}" for k, v in self.settings().items() if k not in defaults or v != defaults[k].default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def settings(self) -> dict[str, Any]:
        """The configuration as numbers and strings: results record it, `repr` shows what is not the default."""
        return {}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Objective[K]:
        """The objective of these :meth:`settings`; what `load` builds, from numbers and strings alone."""
        return cls(**settings)


def _kind(program: Program) -> str:
    return next(k.__name__ for k in (Exact, Noised, Bounded, Unnormalized, Implicit, Program) if isinstance(program, k))


def known_objectives(root: type[Any] | None = None) -> list[type[Objective[Any]]]:
    """The objectives of the package that have been imported."""
    found: list[type[Objective[Any]]] = []
    for cls in (root or Objective).__subclasses__():
        if cls.__module__.startswith("pyro_gen."):
            found += [cls, *known_objectives(cls)]
    return found


# ---------------------------------------------------------------------------------------------------------- samplers
class State(NamedTuple):
    """Where the chains of a sampler stand: all it needs to go on.

    Attributes:
        x: positions in the support, ``(chains, *event_shape)``.
        log_density: log f of each chain, ``(chains,)``, in nats; in unconstrained space with the Jacobian in it.
        gradient: its gradient in the unconstrained position, or None where the sampler uses none.
        step_size: of the transition, a scalar tensor shared by the chains.
        scale: standard deviation of each unconstrained coordinate, the diagonal preconditioner, ``(*event_shape,)``.
        position: unconstrained positions; x itself on the real space.
    """

    x: Tensor
    log_density: Tensor
    gradient: Tensor | None
    step_size: Tensor
    scale: Tensor
    position: Tensor


class Info(NamedTuple):
    """What a transition did, for diagnostics only.

    Attributes:
        acceptance: acceptance probability of each chain, ``(chains,)``; 1 where nothing is rejected.
        diverging: chains whose proposal was not finite or lost too much energy, ``(chains,)``.
    """

    acceptance: Tensor
    diverging: Tensor


@runtime_checkable
class Sampler(Protocol):
    """Markov chains that leave a `Target` invariant (or nearly, where nothing is rejected), many at once.

    Configuration only; ``init`` and ``step`` are pure: the state goes in and comes out.

    Attributes:
        chains: how many chains ``run`` starts.
        acceptance_aim: the mean acceptance that warm-up adapts the step size to, or None where it adapts nothing.
    """

    @property
    def chains(self) -> int: ...

    @property
    def acceptance_aim(self) -> float | None: ...

    def init(self, target: Target, x: Tensor, *, step_size: Tensor | float | None = None) -> State: ...

    def step(self, target: Target, state: State) -> tuple[State, Info]: ...


# ---------------------------------------------------------------------------------------------------------- evidence
SIGNS: dict[str, str] = {"exact": "=", "lower bound": "≥", "upper bound": "≤", "estimate": "≈"}


@dataclass(frozen=True)
class Evidence:
    """A log-evidence (log p(x), or log Z) with its kind and its error, in nats; one entry a datum, or a scalar.

    Attributes:
        value: the number(s), float64 on the CPU.
        kind: ``"exact"``; ``"lower bound"`` or ``"upper bound"`` (in expectation); ``"estimate"``.
        standard_error: Monte Carlo (or numerical) standard error of each entry, independent between entries.
        shared_error: standard error of what all entries share (one estimated log Z): it does not average out.
        sampling_error: of a mean or sum over rows: standard error from the rows being a sample.
        effective_sample_size: of each entry's weights.
        pareto_k: tail index k̂ of each entry's weights; above 0.7 the estimate is relabelled a lower bound.
        rows: number of rows behind a mean or sum.
    """

    value: Tensor
    kind: EvidenceKind
    standard_error: Tensor | None = None
    shared_error: float = 0.0
    sampling_error: Tensor | None = None
    effective_sample_size: Tensor | None = None
    pareto_k: Tensor | None = None
    rows: int | None = None
    label: str = field(default="log p(x)", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in SIGNS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, SIGNS))}, got {self.kind!r}")

    def __len__(self) -> int:
        return self.value.shape[0]

    def __getitem__(self, index: Any) -> Evidence:
        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[index]

        tail, kind = pick(self.pareto_k), self.kind
        if tail is not None and kind in ("estimate", "lower bound"):  # the label of a mean of weights hangs on its tail
            kind = "lower bound" if bool((tail > PARETO_K_LIMIT).any()) else "estimate"
        return replace(
            self,
            value=self.value[index],
            kind=kind,
            standard_error=pick(self.standard_error),
            effective_sample_size=pick(self.effective_sample_size),
            pareto_k=tail,
        )

    def sum(self) -> Evidence:
        """Sum over rows: independent errors add in quadrature, the shared one linearly."""
        n = self.value.numel()
        independent = torch.zeros(()) if self.standard_error is None else self.standard_error.square().sum().sqrt()
        total = torch.hypot(independent.double(), torch.tensor(n * self.shared_error, dtype=torch.float64))
        spread = self.value.std(unbiased=True) * math.sqrt(n) if n > 1 else torch.tensor(math.nan)
        worst = None if self.pareto_k is None else self.pareto_k.max()
        least = None if self.effective_sample_size is None else self.effective_sample_size.min()
        return Evidence(
            self.value.sum(),
            self.kind,
            None if self.standard_error is None and not self.shared_error else total,
            n * self.shared_error,
            spread.double(),
            least,
            worst,
            n,
            self.label,
        )

    def mean(self) -> Evidence:
        """Mean over rows (nats per datum); ``sampling_error`` is its standard error from the rows being a sample.

        ``effective_sample_size`` and ``pareto_k`` of the result are those of the worst row.
        """
        total, n = self.sum(), self.value.numel()
        return replace(
            total,
            value=total.value / n,
            standard_error=None if total.standard_error is None else total.standard_error / n,
            shared_error=self.shared_error,
            sampling_error=None if total.sampling_error is None else total.sampling_error / n,
        )

    def bits_per_dimension(self, dims: int) -> Evidence:
        r"""The code length :math:`-\log_2 p(x) / D` of whole numbers, with its errors; lower bounds become upper.

        Args:
            dims: number D of values in a datum.

        Returns:
            An evidence in bits per dimension. For dequantised data it is that of x + U[0, 1), in expectation an upper
            bound on that of x.

        References:
            L. Theis, A. van den Oord, M. Bethge, "A note on the evaluation of generative models", 2016,
            arXiv:1511.01844, section 3.1.
        """
        per = 1 / (check_count(dims, "dims") * math.log(2))
        flipped: dict[str, EvidenceKind] = {"lower bound": "upper bound", "upper bound": "lower bound"}

        def scaled(t: Tensor | None) -> Tensor | None:
            return None if t is None else t * per

        return replace(
            self,
            value=-self.value * per,
            kind=flipped.get(self.kind, self.kind),
            standard_error=scaled(self.standard_error),
            shared_error=self.shared_error * per,
            sampling_error=scaled(self.sampling_error),
            label="bits per dimension",
        )

    def __str__(self) -> str:
        if self.value.dim():
            k = (
                ""
                if self.pareto_k is None
                else f", k̂ > {PARETO_K_LIMIT} in {int((self.pareto_k > PARETO_K_LIMIT).sum())}"
            )
            return f"{self.label} of {len(self)} rows ({self.kind}{k}): mean {self.mean()}"
        text = f"{SIGNS[self.kind]} {float(self.value):.4g}" if abs(float(self.value)) < 1 else ""
        if self.standard_error is None or not math.isfinite(float(self.standard_error)):
            text = text or f"{SIGNS[self.kind]} {float(self.value):.2f}"
        else:
            error = float(self.standard_error)
            digits = max(2, 1 - math.floor(math.log10(error))) if error > 0 else 2
            shown = f"{error:.{digits}f}" if digits <= 6 else f"{error:.0e}"
            text = f"{SIGNS[self.kind]} {float(self.value):.{min(digits, 6)}f} ± {shown}"
        if self.sampling_error is not None and math.isfinite(float(self.sampling_error)):
            text += f" (± {float(self.sampling_error):.2f} over {self.rows} rows)"
        return text

    def __repr__(self) -> str:
        return f"Evidence({self})"


@runtime_checkable
class EvidenceMethod(Protocol):
    """How log p(x) is had: configuration, with one method that answers for a program it can answer for."""

    def log_evidence(self, program: Program, x: Tensor, context: Tensor | None = None) -> Evidence: ...


@runtime_checkable
class NormalizerMethod(Protocol):
    """How log Z is had: configuration, with one method that answers for a program whose density it can evaluate."""

    def log_normalizer(self, program: Unnormalized, context: Tensor | None = None) -> Evidence: ...


class Divergence(ArithmeticError):
    """A loss or gradient that is not finite; the program holds its last good state.

    Attributes:
        step: the step at which it happened, counted from 0.
        parameters: names of the parameters with a gradient that is not finite.
        rows: indices of the rows whose loss is not finite, where the loss is a sum over rows.
        result: the `FitResult` up to there, to be looked at or saved; None outside of `fit`.
    """

    def __init__(self, message: str, step: int, parameters: list[str], rows: list[int], result: Any = None) -> None:
        super().__init__(message)
        self.step, self.parameters, self.rows, self.result = step, parameters, rows, result
