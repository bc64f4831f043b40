r"""Adversarial variational Bayes (Mescheder, Nowozin & Geiger 2017): a guide that can be drawn from, and no more.

The evidence lower bound asks for the density of the guide's draws. A guide made of a network that is fed noise,
:math:`z = g_\phi(x, \epsilon)`, can be any distribution at all, but has no density to ask for. A critic T learns what
is missing, by telling draws of the guide from draws of a *contrast* r(z | x) whose density is known:

.. math:: L_T = E_q[\log(1 + e^{-T(x, z)})] + E_r[\log(1 + e^{T(x, z)})]
          \quad\Rightarrow\quad T^*(x, z) = \log \frac{q_\phi(z \mid x)}{r(z \mid x)} ,

.. math:: -\mathrm{ELBO} = E_q\big[\, T^*(x, z) + \log r(z \mid x) - \log p_\theta(x, z) \,\big] .

T itself depends on φ, yet its gradient in φ has mean 0 under q at the optimum (proposition 2 there), so that T is held
still in the bound and φ moves through the draws alone: two players, as in any adversarial game. The value is the bound
as far as the critic is optimal, which nobody guarantees: it is no bound that can be quoted.

*Contrast.* With r the prior (the paper's first form), critics see two distributions that hardly overlap once the
posterior is narrow, and learn little of their ratio. With r a normal that has the guide's mean and scale (its *adaptive
contrast*) what is left to learn is how far the guide is from normal. Here mean and scale are functions of x, fitted to
draws of the guide by maximum likelihood beside the critic; for the bound any r does, as it is added and taken away.

Latents are seen in unconstrained coordinates :math:`u`, with
:math:`\log p(u) = \log p(z) + \log |dz / du|`. Those inside the data plate have a guide and a ratio for each row, those
outside have one of the whole data set, of which ``num_particles`` draws are a batch for the critic.

Under ``contrast="prior"`` the prior cancels from the bound with T held still, so that parameters of the prior learn
nothing; under ``"normal"`` they learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.func import functional_call
from torch.nn.functional import softplus

from pyro_gen import handlers, scopes
from pyro_gen.base import Bounded, Objective, ObjectiveModule
from pyro_gen.checks import check_count, check_sizes, describe
from pyro_gen.nn import MLP

__all__ = ["AdversarialELBO"]

Contrast = Literal["normal", "prior"]
GLOBAL_PARTICLES = 128  # draws at a call, of latents that belong to all rows: the critic's batch


class Ratio(nn.Module):
    """The critic: T from latents and data; and the normal contrast, whose moments are a function of the data.

    Args:
        latents: size of all latents, flat and unconstrained; features: size of the data of a row, flat, 0 for latents
            that belong to all rows.
        hidden: sizes of the hidden layers.
        moments: whether there is a contrast to learn.
    """

    location: Tensor
    scale: Tensor

    def __init__(self, latents: int, features: int, hidden: Sequence[int], moments: bool) -> None:
        super().__init__()
        self.latents, self.features = latents, features
        self.net = MLP(latents + features, 1, hidden)
        self.register_buffer("sizes", torch.tensor([latents, features]))
        self.register_buffer("location", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.moments = MLP(features, 2 * latents, hidden) if moments and features else None
        self.constant = nn.Parameter(torch.zeros(2 * latents)) if moments and not features else None

    @torch.no_grad()
    def place(self, rows: Tensor) -> None:
        """Take location and scale of the data from rows, ``(rows, features)``."""
        self.location.copy_(rows.mean(0))
        spread = rows.std(0, unbiased=False)
        self.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def forward(self, u: Tensor, rows: Tensor | None) -> Tensor:
        """T of standardised latents, ``(particles, rows, latents)``, beside data ``(rows, features)``."""
        if rows is not None:
            seen = (rows - self.location) / self.scale
            u = torch.cat([u, seen.expand(*u.shape[:-1], seen.shape[-1])], -1)
        return cast(Tensor, self.net(u)).squeeze(-1)

    def contrast(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log scale of the normal contrast: ``(rows, latents)``, or ``(latents,)``."""
        if self.moments is not None:
            assert rows is not None
            loc, log_scale = self.moments((rows - self.location) / self.scale).chunk(2, -1)
        else:
            assert self.constant is not None
            loc, log_scale = self.constant.chunk(2, -1)
        return loc, log_scale


class AdversarialELBOModule(ObjectiveModule):
    """The bound, and the critic that says what the guide's density would have said; players are the pair and it."""

    objective: AdversarialELBO
    critic: Ratio | None
    average = 0.995

    def __init__(self, model: Any, guide: Any, objective: AdversarialELBO) -> None:
        super().__init__(model, guide, objective)
        self.critic = None
        for name, part in (("model", model), ("guide", guide)):
            if not isinstance(part, nn.Module):
                raise TypeError(
                    f"AdversarialELBO moves the parameters of model and guide apart from those of its critic, so "
                    f"{name} has to be a module, got {describe(part)}"
                )

    @property
    def players(self) -> tuple[nn.Module, ...]:
        return nn.ModuleList([self.model, self.guide]), nn.ModuleList([] if self.critic is None else [self.critic])

    @property
    def periods(self) -> tuple[int, ...]:
        return self.objective.critic_steps, 1

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        sizes = state_dict.get(f"{prefix}critic.sizes")
        if sizes is not None and self.critic is None:  # made at the first call, which may not have been yet
            self._build(*sizes.tolist())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _build(self, latents: int, features: int) -> None:
        objective = self.objective
        self.critic = Ratio(latents, features, objective.hidden, objective.contrast == "normal")

    def check_structure(self, shape: handlers.Structure) -> None:
        handlers.check_pair(shape)
        if not shape.model_latents:
            raise ValueError("AdversarialELBO needs latents, and this model has none: use pg.MaximumLikelihood")
        if not shape.reparameterized:
            raise ValueError(
                "AdversarialELBO differentiates through the guide's draws, and the guide has a site without rsample: "
                "draw it by a network from noise, pyro.sample('z', dist.Delta(network(noise), event_dim=1))"
            )
        of_all = [name for name in shape.model_latents if name in shape.global_sites]
        if of_all and len(of_all) < len(shape.model_latents):
            raise ValueError(
                f"{', '.join(map(repr, of_all))} belongs to all rows and other latents to one row each: AdversarialELBO"
                " takes the one kind or the other; condition on some, or use pg.ELBO"
            )
        if not of_all:
            shape.require_data_plate("AdversarialELBO")

    def prepare(self, *batch: Any, **kwargs: Any) -> handlers.Structure:
        shape = super().prepare(*batch, **kwargs)
        if self.__dict__["store_parameters"]:
            raise ValueError(
                "pyro.param statements outside of modules belong to no player: hold those parameters in the modules of "
                "model and guide"
            )
        if self.critic is None:
            with torch.no_grad(), scopes.preserved_state(self.model, self.guide):
                u = self._coordinates(self._run(batch, kwargs, shape)[0], shape)[0]
                rows = self._rows(batch, shape)
                self._build(u.shape[-1], 0 if rows is None else rows.shape[-1])
            assert self.critic is not None
            self.critic.to(u)
            if rows is not None and not rows.is_meta:
                self.critic.place(rows)
        return shape

    # ------------------------------------------------------------------------------------------------------ one look
    def _rows(self, batch: tuple[Any, ...], shape: handlers.Structure) -> Tensor | None:
        """All tensors of a row beside each other, flat: ``(rows, features)``; None where latents belong to all."""
        if _of_all(shape):
            return None
        parts = [part for part in batch if isinstance(part, Tensor) and part.dim() and len(part) == len(batch[0])]
        return torch.cat([part.reshape(len(part), -1).to(self._dtype(batch[0])) for part in parts], -1)

    def _dtype(self, x: Tensor) -> torch.dtype:
        """That of the weights, as data may be whole numbers."""
        own = next((p.dtype for p in (*self.guide.parameters(), *self.model.parameters())), None)
        return own or (x.dtype if x.dtype.is_floating_point else torch.get_default_dtype())

    def _particles(self, shape: handlers.Structure) -> int:
        given = self.objective.num_particles
        return given if given is not None else GLOBAL_PARTICLES if _of_all(shape) else 1

    def _run(self, batch: tuple[Any, ...], kwargs: Any, shape: handlers.Structure) -> tuple[Trace, Trace | None]:
        """The model on draws of the guide, and on draws of its own prior where they are the contrast."""
        count, model, guide = self._particles(shape), self.model, self.guide
        if count > 1:
            model, guide = handlers.with_particles(count, shape.plate_nesting, model, guide)
        _, joint = handlers.pair_traces(model, guide, *batch, **kwargs)
        if self.objective.contrast != "prior":
            return joint, None
        with torch.no_grad():
            return joint, handlers.pair_traces(model, None, *batch, **kwargs)[1]

    def _coordinates(self, trace: Trace, shape: handlers.Structure) -> tuple[Tensor, Tensor, Tensor]:
        """Latents in unconstrained coordinates, with their log density there, and that of the data, row by row.

        Returns:
            ``(particles, rows, latents)``, ``(particles, rows)`` and ``(particles, rows)``, with one row where latents
            belong to all rows.
        """
        count = self._particles(shape)
        keep = [] if _of_all(shape) else [shape.data_dim or -1]
        keep = [-shape.plate_nesting - 1, *keep] if count > 1 else keep
        parts, log_prior, log_data = [], [], []
        for name, site in handlers.sample_sites(trace).items():
            kind = handlers.site_kind(site)
            if kind in ("deterministic", "auxiliary"):
                continue
            value = handlers.row_log_prob(site, tuple(keep))
            value = value * site["scale"] if _of_all(shape) else value
            value = value.reshape(count, -1)
            if name not in shape.model_latents:
                log_data.append(value)
                continue
            fn = site["fn"]
            if fn.support.is_discrete:
                raise ValueError(f"latent {name!r} is discrete: AdversarialELBO needs continuous latents")
            z = site["value"].expand(fn.batch_shape + fn.event_shape)
            bijection = biject_to(fn.support)
            u = bijection.inv(z)
            jacobian = bijection.log_abs_det_jacobian(u, z)
            batch = len(fn.batch_shape)
            parts.append(_by_row(u, keep, batch, value.shape))
            log_prior.append(value + _by_row(jacobian, keep, batch, value.shape).sum(-1))
        total = torch.stack(log_data).sum(0) if log_data else torch.zeros_like(log_prior[0])
        return torch.cat(parts, -1), torch.stack(log_prior).sum(0), total

    def rows(self, *batch: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The two losses, a mean over particles: of the pair, and of the critic, each of a row or of all rows."""
        shape = self.structure or self.prepare(*batch, **kwargs)
        critic, seen = self.critic, self._rows(batch, shape)
        assert critic is not None
        joint, other = self._run(batch, kwargs, shape)
        u, log_prior, log_data = self._coordinates(joint, shape)
        fit: Any = 0.0
        if other is not None:
            log_r, mine, theirs = log_prior, u, self._coordinates(other, shape)[0]
        else:
            loc, log_scale = critic.contrast(seen)
            fit = -_log_normal(u.detach(), loc, log_scale)
            loc, log_scale = loc.detach(), log_scale.detach()
            log_r = _log_normal(u, loc, log_scale)
            mine, theirs = (u - loc) * (-log_scale).exp(), torch.normal(torch.zeros_like(u), 1.0)
        told = softplus(-critic(mine.detach(), seen)) + softplus(critic(theirs, seen)) + fit
        held = {name: p.detach() for name, p in critic.named_parameters()}
        ratio = functional_call(critic, held, (mine, seen))
        return (ratio + log_r - log_prior - log_data).mean(0), told.mean(0)

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        """The sum of both players' losses of each row: ``(rows,)``."""
        shape = self.structure or self.prepare(*batch, **kwargs)
        handlers.require_local(shape, "AdversarialELBO.pointwise")
        bound, critic = self.rows(*batch, **kwargs)
        return bound + critic

    def losses(self, *batch: Any, total: int | None = None, **kwargs: Any) -> tuple[Tensor, ...]:
        """The negative bound, and the loss of the critic."""
        shape = self.structure or self.prepare(*batch, **kwargs)
        if _of_all(shape):
            self.check_total(shape, total)
            with scopes.DataScale(shape.data_plate, total, apply=True):
                bound, critic = self.rows(*batch, **kwargs)
            rows = (shape.data_size or shape.rows) if total is None else total
            return bound.sum(), rows * critic.sum()  # of the size of the other, so that one learning rate serves both
        with self.scaled(*batch, total=total, apply=False, **kwargs) as seen:
            parts = self.rows(*batch, **kwargs)
        factor = seen.factor(handlers.count_rows(batch, 1))
        return tuple(cast(Tensor, (factor * part).sum()) for part in parts)

    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        bound, critic = self.losses(*batch, total=total, **kwargs)
        return bound + critic


def _of_all(shape: handlers.Structure) -> bool:
    """Whether the latents belong to all rows at once; `check_structure` has refused a mixture."""
    return shape.model_latents[0] in shape.global_sites


def _by_row(value: Tensor, keep: list[int], batch: int, shape: torch.Size) -> Tensor:
    """``(particles, rows, rest)`` of a value of so many batch dimensions, of which ``keep`` (negative) come first."""
    first = [batch + d for d in keep]
    return value.movedim(first, list(range(len(first)))).reshape(*shape, -1)


def _log_normal(u: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Log density of a diagonal normal, summed over the last dimension."""
    z = (u - loc) * (-log_scale).exp()
    return (-z.square() / 2 - log_scale - math.log(2 * math.pi) / 2).sum(-1)


class AdversarialELBO(Objective[Bounded]):
    r"""The evidence lower bound of a guide without a density, its log-ratio learnt by a critic: AVB.

    Args:
        contrast: what the critic tells the guide's draws from: ``"normal"``, with moments learnt along (the paper's
            adaptive contrast), or ``"prior"``.
        num_particles: draws of the guide at each call; None for 1 where each row has latents of its own, and 128 where
            latents belong to all rows: there they are the critic's batch.
        hidden: sizes of the hidden layers of critic and contrast.
        critic_steps: steps of the critic for each of model and guide, in ``fit``.

    The guide is a Pyro program with the model's latents as sites, drawn as point masses of what a network makes of
    noise; the noise is a site marked ``infer={"is_auxiliary": True}``. ``losses`` are the negative bound, in nats as
    far as the critic is right, and the critic's.

    Raises:
        ValueError: for unknown contrasts and sizes below 1; at the first call for latents that are discrete, or some
            of which belong to one row and some to all.

    References:
        L. Mescheder, S. Nowozin, A. Geiger, "Adversarial variational Bayes", 2017, arXiv:1701.04722, eqs. 3.1 to 3.3,
        proposition 2, section 4.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x):
        ...         with pyro.plate("data", len(x)):
        ...             z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        ...             pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)
        >>> class Guide(torch.nn.Linear):
        ...     def forward(self, x):
        ...         hidden, normal = {"is_auxiliary": True}, dist.Normal(x.new_zeros(1), 1.0).to_event(1)
        ...         with pyro.plate("data", len(x)):
        ...             noise = pyro.sample("noise", normal, infer=hidden)
        ...             pyro.sample("z", dist.Delta(super().forward(torch.cat([x, noise], -1)), event_dim=1))
        >>> loss = AdversarialELBO()(Model(), Guide(2, 1))
        >>> len(loss.losses(torch.randn(4, 1)))      # of the pair, of the critic
        2
    """

    needs = (Bounded,)
    loss_is = "game"
    takes = "any"
    module_class: ClassVar[type[ObjectiveModule]] = AdversarialELBOModule

    def __init__(
        self,
        contrast: Contrast = "normal",
        *,
        num_particles: int | None = None,
        hidden: Sequence[int] = (64, 64),
        critic_steps: int = 1,
    ) -> None:
        super().__init__()
        if contrast not in ("normal", "prior"):
            raise ValueError(f"contrast must be 'normal' or 'prior', got {describe(contrast)}")
        self.contrast: Contrast = contrast
        self.num_particles = None if num_particles is None else check_count(num_particles, "num_particles")
        self.hidden = check_sizes(hidden)
        self.critic_steps = check_count(critic_steps, "critic_steps")

    def settings(self) -> dict[str, Any]:
        return {
            "contrast": self.contrast,
            "num_particles": self.num_particles,
            "hidden": list(self.hidden),
            "critic_steps": self.critic_steps,
        }
