r"""Contrastive divergence (Hinton 2002): the gradient of log Z is an expectation, and a Markov chain draws it.

With :math:`p_\theta = f_\theta / Z`, :math:`\log f_\theta = -E_\theta` up to the base, and
:math:`\partial_\theta \log Z = \int \partial_\theta f_\theta / Z = E_{p_\theta}[\partial_\theta \log f_\theta]`,

.. math:: \partial_\theta \log p_\theta(x) = \partial_\theta \log f_\theta(x)
          - E_{x^- \sim p_\theta}\big[\partial_\theta \log f_\theta(x^-)\big] .

Draws of the model, the *negatives*, take the place of the expectation. They come from chains that leave
:math:`p_\theta` invariant and are not differentiated, so the gradient is that of the *energy gap*

.. math:: L(\theta) = \sum_n \Big[ -\log f_\theta(x_n) + \frac1M \sum_m \log f_\theta(x^-_m) \Big] ,

the energy of the data less that of the negatives. Its value, which is what ``fit`` shows, is no likelihood: Z is not in
it. It is near 0 where negatives look like data and below 0 where the model prefers data, however good the fit; only its
gradient is meant. A constant added to E cancels in it.

- *CD-k*: k steps from the data. Where the chain has not mixed, the negatives know the model only near the data, and a
  mode without data stays where it is. Its fixed points are those of :math:`E_{data} = E_{data\,T^k}`: the truth is one
  of them for any kernel T that leaves the model invariant, and any k; in a model that cannot fit the data the answer is
  not the maximum likelihood estimate (Carreira-Perpiñán & Hinton 2005).
- *Persistent* (Tieleman 2008; Younes 1999): the chains go on from where they stood. As steps of θ become small beside
  the mixing of the chains, they are draws of the model, and the fixed point is maximum likelihood.
- *Short-run* (Nijkamp et al. 2019): k steps from the base each time. It trains a sampler of k steps; unless the chain
  mixes within them its energy is not the density of what is drawn.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import pyro.poutine as poutine
import torch
from pyro.distributions import ImproperUniform
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_gen import handlers, scopes
from pyro_gen.base import Objective, ObjectiveModule, Sampler, Unnormalized
from pyro_gen.checks import check_count, describe
from pyro_gen.handlers.marginal import marginal_rows
from pyro_gen.objectives.observed_supports import observing_site, support_of
from pyro_gen.samplers import MALA, Gibbs
from pyro_gen.samplers.adaptation import first_step_size, nudge
from pyro_gen.samplers.chains import Chains
from pyro_gen.samplers.settings import described, rebuilt
from pyro_gen.targets import BoltzmannTarget, Target

__all__ = ["ContrastiveDivergence"]

NUDGE = 0.3  # of log ε for each unit of acceptance, at each call: chains must keep pace with an optimizer


class Kept:
    """A target kept from call to call; it holds the program it was made of, so a copy of the module makes its own."""

    target: Target | None = None

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


class ContrastiveDivergenceModule(ObjectiveModule):
    """The loss; its state are the persistent chains and the step size, where there are any.

    Attributes:
        chains: where the persistent chains stand, ``(chains, *event_shape)``; None before the first call, or where
            every call starts new ones.
        step_size: of a sampler that was given none, a scalar; None otherwise.
    """

    objective: ContrastiveDivergence
    chains: Tensor | None
    step_size: Tensor | None

    def __init__(self, model: Any, guide: Any, objective: ContrastiveDivergence) -> None:
        super().__init__(model, guide, objective)
        self.register_buffer("chains", None)
        self.register_buffer("step_size", None)
        self.kept = Kept()
        self.machine: tuple[Any, bool] | None = None  # a bare model that is a Boltzmann machine

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in ("chains", "step_size"):  # made at the first call, which may not have been yet
            if prefix + name in state_dict and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def check_structure(self, shape: handlers.Structure) -> None:
        shape.require_data_plate("ContrastiveDivergence")
        free = [name for name in shape.model_latents if name not in shape.enumerated]
        if free:
            raise handlers.free_latents(free)

    def prepare(self, *batch: Any, **kwargs: Any) -> handlers.Structure:
        x, objective = batch[0], self.objective
        if not isinstance(x, Tensor) or not x.dim() or not x.dtype.is_floating_point:
            given = x.dtype if isinstance(x, Tensor) else describe(x)
            raise TypeError(f"ContrastiveDivergence needs x, a floating point tensor of rows, got {given}: x.float()")
        if objective.persistent and _conditional(batch, kwargs):
            raise ValueError(
                "persistent chains belong to one density, and this program has one for each context: leave out "
                "persistent=True, so that the chains of a row start anew with its context"
            )
        shape = super().prepare(*batch, **kwargs)
        with scopes.forked_generators():
            seed = int(torch.randint(2**31, ()))
        with torch.no_grad(), poutine.block(), scopes.evaluation_mode(self.model), scopes.forked_generators(seed):
            if self.program is None:
                with torch.enable_grad():
                    sites = handlers.sample_sites(poutine.trace(self.model).get_trace(*batch, **kwargs))
                self.machine = handlers.boltzmann_machine(sites)
            target = self._target(batch, kwargs, shape)
            sampler: Any = self._sampler(target)
            if isinstance(sampler, Chains):
                sampler.check_target(target)
            if not x.is_meta:
                if is_validation_enabled() and not _conditional(batch, kwargs):
                    target.check_inside(x, "x")
                if isinstance(objective.start, Tensor):
                    target.check_inside(self._fresh(target, batch, kwargs), "start")
            with scopes.without_validation():
                start = self._fresh(target, batch, kwargs)
                if objective.persistent and self.chains is None:
                    self.chains = start.detach().clone()
                if self.step_size is None and _seeks(sampler) and not x.is_meta:
                    with scopes.forked_generators(0):  # the same under every trainer and seed
                        found = first_step_size(sampler, target, sampler.init(target, start))
                    self.step_size = found.detach().clone()
        return shape

    def log_density_rows(self, *batch: Any, **kwargs: Any) -> Tensor:
        if self.structure is not None and self.structure.enumerated:
            return marginal_rows(self.model, *batch, plate_nesting=self.structure.plate_nesting, **kwargs)
        return super().log_density_rows(*batch, **kwargs)

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        """The energy gap of each row: ``(rows,)``; to the mean over all negatives, or over the chains of the row."""
        shape = self.structure or self.prepare(*batch, **kwargs)
        rows, penalty = len(batch[0]), self.objective.energy_penalty
        negatives = self.negatives(*batch, **kwargs)
        data = self.log_density_rows(*batch, **kwargs)
        with (
            poutine.block(),
            scopes.without_validation(),
        ):  # the scale of a row is that of its data; these are other rows
            drawn = self._density(negatives, batch, kwargs, shape)
        gap = self._of_rows(drawn, rows) - data
        if penalty:
            gap = gap + penalty * (data.square() + self._of_rows(drawn.square(), rows))
        return gap

    def negatives(self, *batch: Any, **kwargs: Any) -> Tensor:
        """Where the chains stand after ``steps`` steps: ``(chains, *event_shape)``, without a graph.

        Persistent chains, and the step size, move on only where gradients are recorded in training mode: an evaluation
        leaves them as they are.
        """
        shape = self.structure or self.prepare(*batch, **kwargs)
        moves = self.training and torch.is_grad_enabled()
        with torch.no_grad(), poutine.block(), scopes.evaluation_mode(self.model), scopes.without_validation():
            target = self._target(batch, kwargs, shape)
            x, size = self._advance(target, self._begin(target, batch, kwargs))
            if moves and self.chains is not None:
                self.chains.copy_(x)
            if moves and self.step_size is not None and size is not None:
                self.step_size.copy_(size)
        return x

    def _begin(self, target: Target, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Where the chains of this call start."""
        fresh = self.objective.refresh
        if self.chains is None:
            return self._fresh(target, batch, kwargs)
        if not fresh:
            return self.chains
        restarts = torch.rand(len(self.chains), device=self.chains.device) < fresh
        event = [1] * (self.chains.dim() - 1)
        return torch.where(restarts.reshape(-1, *event), self._fresh(target, batch, kwargs), self.chains)

    def _fresh(self, target: Target, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """New chains: from the data, the base, or the start that was given."""
        x, start, count = batch[0], self.objective.start, self._count(target, batch)
        if count % len(x) and _conditional(batch, kwargs):
            raise ValueError(
                f"chains={count} cannot be shared out among {len(x)} rows, each with a density of its own: give a "
                "multiple of the rows, or None for one chain a row"
            )
        if isinstance(start, Tensor):
            if tuple(start.shape) not in (tuple(x.shape[1:]), (count, *x.shape[1:])):
                raise ValueError(
                    f"start must be one datum, of shape {tuple(x.shape[1:])}, or one for each of {count} chains, got "
                    f"{tuple(start.shape)}"
                )
            return start.to(x).expand(count, *x.shape[1:])
        if start == "base":
            return target.sample_base(count).to(x)
        if count % len(x) == 0:
            return _repeated(x.detach(), count // len(x))
        rows: Tensor = x.detach()[torch.randint(len(x), (count,), device=x.device)]
        return rows

    def _count(self, target: Target | None, batch: tuple[Any, ...]) -> int:
        """How many chains there are."""
        objective, x = self.objective, batch[0]
        if objective.chains is not None:
            return objective.chains
        if isinstance(objective.start, Tensor) and objective.start.dim() == x.dim():
            return len(objective.start)
        return self._sampler(target).chains if objective.persistent and target is not None else len(x)

    def _advance(self, target: Target, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Chains after all steps, and the step size that their acceptance asks for."""
        sampler, steps, size = self._sampler(target), self.objective.steps, self.step_size
        aim = sampler.acceptance_aim
        if (size is None or aim is None) and isinstance(sampler, Chains):
            return sampler.advance(target, x, steps), None
        state, acceptance = sampler.init(target, x, step_size=size), []
        for _ in range(steps):
            state, info = sampler.step(target, state)
            acceptance.append(info.acceptance)
        if size is None or aim is None:
            return state.x, None
        return state.x, nudge(size, torch.cat(acceptance), aim, NUDGE)

    def _sampler(self, target: Target) -> Sampler:
        if self.objective.sampler is not None:
            return self.objective.sampler
        return Gibbs() if target.support.is_discrete else MALA()

    def _target(self, batch: tuple[Any, ...], kwargs: dict[str, Any], shape: handlers.Structure) -> Target:
        """The density that the chains move on, with the weights of now."""
        x, rest, program = batch[0], batch[1:], self.program
        if isinstance(program, Unnormalized) and not kwargs and not shape.enumerated and shape.data_size == shape.rows:
            if rest or (isinstance(self.objective.start, str) and self.objective.start == "base"):
                # contexts go along with the chains of their rows, and a base may be trained
                times = max(1, self._count(None, batch) // len(x))
                return program.target(*(_repeated(part, times) for part in rest))
            kept = self.kept.target  # it reads the weights as they are when it is asked
            if kept is None or kept.template.dtype != x.dtype or kept.template.device != x.device:
                kept = self.kept.target = program.target()
            return kept
        site = observing_site(self.model, *batch, **kwargs)
        fn = None if site is None else handlers.unmasked(site["fn"])

        def sample_base(n: int) -> Tensor:
            draws: Tensor = fn.sample((-(-n // len(x)),))  # type: ignore[union-attr]
            return draws.reshape(-1, *x.shape[1:])[:n]

        can_sample = fn is not None and type(fn).sample is not ImproperUniform.sample
        target = Target(
            lambda y: self._density(y, batch, kwargs, shape),
            x.shape[1:],
            x.new_empty(0),
            support_of(fn, x.dim() - 1),
            None,
            sample_base if can_sample else None,
        )
        return target if self.machine is None else BoltzmannTarget(self.machine[0], target, flat=self.machine[1])

    def _density(self, y: Tensor, batch: tuple[Any, ...], kwargs: dict[str, Any], shape: handlers.Structure) -> Tensor:
        """log f at other data than x, what else is in the batch going along row by row: ``(chains,)``."""
        rows = len(batch[0])
        if shape.data_size == shape.rows and not _conditional(batch, kwargs):
            return self.log_density_rows(y, *batch[1:], **kwargs)
        short = -len(y) % rows  # a plate of fixed size takes so many rows, no fewer
        parts = torch.cat([y, y[:1].expand(short, *y.shape[1:])]).split(rows)
        return torch.cat([self.log_density_rows(part, *batch[1:], **kwargs) for part in parts])[: len(y)]

    def _of_rows(self, values: Tensor, rows: int) -> Tensor:
        """What each row is held against: the mean over its own chains, or over all where chains are nobody's own."""
        if self.chains is None and len(values) % rows == 0:
            return values.reshape(-1, rows).mean(0)
        return values.mean()


def _repeated(part: Tensor, times: int) -> Tensor:
    """Rows again and again: ``(times * rows, ...)``."""
    return part.repeat(times, *[1] * (part.dim() - 1))


def _conditional(batch: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether rows have a density each: something beside x comes row by row."""
    others = (*batch[1:], *kwargs.values())
    return any(isinstance(t, Tensor) and t.dim() and len(t) == len(batch[0]) for t in others)


def _seeks(sampler: Sampler) -> bool:
    """Whether a sampler's step size is to be found."""
    return sampler.acceptance_aim is not None and getattr(sampler, "step_size", None) is None


class ContrastiveDivergence(Objective[Unnormalized]):
    r"""Contrastive divergence: data against draws of a chain, :math:`-\log f(x_n) + \mathrm{mean}_m \log f(x^-_m)`.

    The gradient estimates that of maximum likelihood; the value is the energy gap, no likelihood, and says nothing of
    the fit (validate by an estimate of log p, or by samples). Z is never needed: its gradient is the second term.

    Args:
        sampler: moves the chains: `MALA`, `HMC`, `Langevin`, `Gibbs` or any `Sampler`; None for MALA on continuous and
            Gibbs on discrete data. A step size that the sampler leaves open is steered to its acceptance at every call.
        steps: transitions at each call, the k of CD-k.
        persistent: chains go on from call to call. They are state of the loss, in checkpoints, and stand still in
            evaluations (without gradients, or in evaluation mode). Not for programs with a context.
        chains: number of chains; None for one a row of the batch, and if persistent for ``sampler.chains``. With a
            context it must be a multiple of the rows: a chain moves on the density of its row.
        refresh: probability with which a persistent chain starts anew at a call.
        energy_penalty: α of a penalty :math:`\alpha (\log f(x_n)^2 + \mathrm{mean}\, \log f(x^-)^2)`, which keeps
            energies small. It is no part of the gradient of the likelihood, and biases the answer: 0 unless asked for.
        start: where chains start: ``"data"`` (rows of the batch), ``"base"`` (draws of the program's base), or a
            tensor, ``event_shape`` or ``(chains, *event_shape)``.

    Raises:
        TypeError: for what is no sampler; at the first call for a sampler that cannot move on the support.
        ValueError: for ``steps`` or ``chains`` below 1, ``refresh`` outside [0, 1] or without ``persistent``, a
            negative penalty, another ``start``; at the first call for a start outside the support, no base to start
            from, a free latent site, no plate over rows, ``persistent`` with a context.

    References:
        G. Hinton, "Training products of experts by minimizing contrastive divergence", Neural Computation 14, 2002.
        T. Tieleman, "Training restricted Boltzmann machines using approximations to the likelihood gradient", ICML
        2008. Y. Du, I. Mordatch, "Implicit generation and modeling with energy-based models", 2019, arXiv:1903.08689
        (penalty, restarts). W. Grathwohl et al., "Your classifier is secretly an energy based model and you should
        treat it like one", 2020, arXiv:1912.03263.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> precision = torch.tensor([1.0], requires_grad=True)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1).mask(False), obs=x)
        ...         pyro.factor("energy", -precision * x.square().sum(-1) / 2)
        >>> ContrastiveDivergence(steps=5)(model)(torch.randn(10, 1)).shape
        torch.Size([])
    """

    needs = (Unnormalized,)
    loss_is = "gradient only"
    module_class: ClassVar[type[ObjectiveModule]] = ContrastiveDivergenceModule

    def __init__(
        self,
        sampler: Sampler | None = None,
        steps: int = 1,
        persistent: bool = False,
        chains: int | None = None,
        *,
        refresh: float = 0.0,
        energy_penalty: float = 0.0,
        start: Literal["data", "base"] | Tensor = "data",
    ) -> None:
        super().__init__()
        if sampler is not None and (isinstance(sampler, type) or not isinstance(sampler, Sampler)):
            raise TypeError(
                f"sampler must be a sampler such as pg.MALA(), pg.Langevin(step_size=.1) or pg.Gibbs(), or None; got "
                f"{describe(sampler)}"
            )
        if not isinstance(persistent, bool):
            raise ValueError(f"persistent must be True or False, got {describe(persistent)}")
        if isinstance(refresh, bool) or not isinstance(refresh, (int, float)) or not 0 <= refresh <= 1:
            raise ValueError(f"refresh must be a probability in [0, 1], got {describe(refresh)}")
        if refresh and not persistent:
            raise ValueError(
                "refresh restarts persistent chains, and without persistent=True every call starts new ones"
            )
        if (
            isinstance(energy_penalty, bool)
            or not isinstance(energy_penalty, (int, float))
            or not 0 <= energy_penalty < math.inf
        ):
            raise ValueError(f"energy_penalty must be a number of at least 0, got {describe(energy_penalty)}")
        if not isinstance(start, Tensor) and start not in ("data", "base"):
            raise ValueError(f"start must be 'data', 'base' or a tensor of where chains start, got {describe(start)}")
        self.sampler, self.steps, self.persistent = sampler, check_count(steps, "steps"), persistent
        self.chains = None if chains is None else check_count(chains, "chains")
        self.refresh, self.energy_penalty, self.start = float(refresh), float(energy_penalty), start

    def settings(self) -> dict[str, Any]:
        return {
            "sampler": None if self.sampler is None else described(self.sampler),
            "steps": self.steps,
            "persistent": self.persistent,
            "chains": self.chains,
            "refresh": self.refresh,
            "energy_penalty": self.energy_penalty,
            "start": self.start if isinstance(self.start, str) else describe(self.start),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> ContrastiveDivergence:
        """The objective of these settings; of the samplers of the package, by their name."""
        sampler = settings.get("sampler")
        return cls(**{**settings, "sampler": rebuilt(sampler) if isinstance(sampler, dict) else sampler})

    def __repr__(self) -> str:
        shown = super().__repr__()
        return shown if self.sampler is None else shown.replace(repr(described(self.sampler)), repr(self.sampler))
