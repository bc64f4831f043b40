r"""The evidence lower bound: the guide stands in for the integral over latents.

With :math:`\log w = \log p(x, z) - \log q(z \mid x)` and z drawn from the guide,

.. math:: \log p(x) = E_q[\log w] + KL[q(z \mid x) \,\|\, p(z \mid x)] \ge E_q[\log w] = E_q[\log p(x \mid z)] -
          KL[q(z \mid x) \,\|\, p(z)],

so the loss :math:`-E_q[\log w]` bounds the negative log-evidence from above and is tight where the guide is the
posterior. The expectation is a mean over draws; where site and prior have a closed-form KL, ``analytic_kl`` takes it.

Gradients. Through reparameterized draws, :math:`z = g(\phi, \epsilon)`, the loss is differentiated as it stands. A site
without (a Poisson, a Categorical) adds the score-function term :math:`\log w \, \nabla_\phi \log q`, with
:math:`\log w` reduced to the plates the site is in (Ranganath et al. 2014). Discrete sites marked
``infer={"enumerate": "parallel"}`` are summed over exactly, by Pyro's own tensor variable elimination.

Scaling is by site: rows inside the data plate count N/B, what stands outside counts once. No value leaves the device
inside the loss, so it can be traced and compiled.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from pyro.distributions import Independent, Normal
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import TraceEnum_ELBO
from pyro.infer.util import MultiFrameTensor
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_gen import handlers, scopes
from pyro_gen.base import Bounded, Objective, ObjectiveModule
from pyro_gen.checks import check_count

__all__ = ["ELBO"]

Site = Any
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def closed_kl(q: Any, p: Any) -> Tensor | None:
    """KL(q ‖ p) in closed form, or None where there is none.

    None too for a ``Delta``: ``kl_divergence(Delta, p)`` drops its log-density, the Jacobian of an autoguide's
    transform, and with it a term of the bound (Pyro's ``TraceMeanField_ELBO`` has that error).
    """
    if type(handlers.innermost(q)).__name__ == "Delta":
        return None
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


class ELBOModule(ObjectiveModule):
    objective: ELBO

    def check_structure(self, shape: handlers.Structure) -> None:
        handlers.check_pair(shape, summed_out=True)
        if shape.enumerated and self.objective.analytic_kl:
            raise ValueError("analytic_kl=True and enumerated sites do not go together: use pg.ELBO() for this program")
        if self.objective.analytic_kl and not shape.reparameterized:  # its gradient needs the sampled bound
            raise ValueError(
                "analytic_kl=True differentiates through the draws, and the guide has a site that is not "
                "reparameterized: use pg.ELBO() for this program"
            )

    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        shape = self.structure or self.prepare(*batch, **kwargs)
        if shape.enumerated:
            with self.scaled(*batch, total=total, apply=True, **kwargs):
                return self._enumerated(batch, kwargs)
        self.check_total(shape, total)
        objective = self.objective
        model, guide, runs = self.model, self.guide, objective.num_particles
        if objective.vectorize_particles and runs > 1:
            model, guide = handlers.with_particles(runs, shape.plate_nesting, model, guide)
            runs = 1
        losses = []
        for _ in range(runs):
            with scopes.hide_bare_parameters():
                pair = handlers.pair_sites(model, guide, *batch, **kwargs)
            if total is not None:  # as DataScale does, without a handler's work at every message
                for sites in pair:
                    for site in sites.values():
                        site["scale"] = scopes.total_scale(site, shape.data_plate, total)
            losses.append(self._loss(*pair))
        loss = sum(losses[1:], start=losses[0])
        return loss / objective.num_particles if objective.num_particles > 1 else loss

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        """Negative ELBO of each row: ``(rows,)``, in nats."""
        shape = self.structure or self.prepare(*batch, **kwargs)
        handlers.require_local(shape, "ELBO.pointwise")
        if shape.enumerated:
            raise ValueError("ELBO.pointwise is not defined for enumerated sites: use the loss itself")
        model, guide = handlers.with_particles(
            self.objective.num_particles, shape.plate_nesting, self.model, self.guide
        )
        guide_trace, model_trace = handlers.pair_traces(model, guide, *batch, **kwargs)
        weight = handlers.weigh(guide_trace, model_trace, shape)
        return -with_score_function(weight, weight, guide_trace, shape).mean(0)

    def _loss(self, q: dict[str, Site], p: dict[str, Site]) -> Tensor:
        """-log w from the sites of guide and model in one run; its gradient is that of the bound."""
        if self.objective.analytic_kl:
            shared = [n for n in p if n in q and _one_scale(p[n], q[n])]
            kl = {n: v for n in shared if (v := closed_kl(q[n]["fn"], p[n]["fn"])) is not None}
        else:
            kl = {}
        parts: list[Any] = [scale_and_mask(v, q[n]["scale"], q[n]["mask"]).sum() for n, v in kl.items()]
        rough = [s for n, s in q.items() if n not in kl and not s["fn"].has_rsample]
        if not rough:
            parts += [_sum(site) for name, site in q.items() if name not in kl]
            gains = [_sum(site) for name, site in p.items() if name not in kl]
            return cast(Tensor, sum(parts) - sum(gains))
        loss: Any = sum(parts)
        for name, site in p.items():
            if name not in kl:
                loss = loss - _scaled(site).sum()
        score: list[tuple[Site, Tensor]] = []
        for name, site in q.items():
            if name in kl:
                continue
            log_q = _scaled(site)
            if site["fn"].has_rsample or is_identically_zero(log_q):
                loss = loss + log_q.sum()
            else:  # E[grad log q] = 0: its own gradient would be noise
                loss = loss + log_q.detach().sum()
                score.append((site, site["fn"].log_prob(site["value"])))
        log_r = _log_ratio(p, q)
        for site, log_q in score:
            term = (log_r.sum_to(site["cond_indep_stack"]) * log_q).sum()
            loss = loss - (term - term.detach())
        return cast(Tensor, loss)

    def _enumerated(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert self.structure is not None
        objective = self.objective
        elbo = TraceEnum_ELBO(
            num_particles=objective.num_particles,
            max_plate_nesting=self.structure.plate_nesting,
            vectorize_particles=objective.vectorize_particles,
        )
        if not torch.is_grad_enabled():  # where Pyro's differentiable loss is an error
            return torch.tensor(elbo.loss(self.model, self.guide, *batch, **kwargs))
        return cast(Tensor, elbo.differentiable_loss(self.model, self.guide, *batch, **kwargs))


def _plates(site: Site) -> list[Any]:
    """The vectorised plates a site stands in."""
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _one_scale(p: Site, q: Site) -> bool:
    """Whether log p and log q of a site count alike; under two scales their sum is no multiple of a KL."""
    scales = p["scale"], q["scale"]
    return any(isinstance(s, Tensor) for s in scales) or scales[0] == scales[1]


def _sum(site: Site) -> Tensor:
    """Scaled and masked log-probability of a site, summed; without a mask the event at once with the batch."""
    fn, scale, mask = site["fn"], site["scale"], site["mask"]
    if mask is not None or isinstance(scale, Tensor):
        return cast(Tensor, scale_and_mask(fn.log_prob(site["value"]), scale, mask).sum())
    while type(fn) is Independent:
        fn = fn.base_dist
    log_prob = _normal_sum(fn, site["value"]) if type(fn) is Normal else fn.log_prob(site["value"]).sum()
    return cast(Tensor, log_prob if scale == 1.0 else log_prob * scale)


def _normal_sum(fn: Any, value: Tensor) -> Tensor:
    """Sum of a normal's log-probabilities, in half the operations of ``log_prob``: most of a small program's step."""
    if fn._validate_args:
        fn._validate_sample(value)
    standard = (value - fn.loc) / fn.scale
    size = standard.numel()
    log_scale = fn.scale.log().sum()
    if fn.scale.numel() != size:  # the value broadcasts over it
        log_scale = log_scale * (size / fn.scale.numel())
    return cast(Tensor, -0.5 * standard.square().sum() - log_scale - size * HALF_LOG_TWO_PI)


def _scaled(site: Site) -> Tensor:
    """Scaled and masked log-probability of a site, kept on it for score-function terms."""
    site["log_prob"] = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
    return cast(Tensor, site["log_prob"])


def _log_ratio(p: dict[str, Site], q: dict[str, Site]) -> Any:
    """log w as a sum over plates, from which a site takes what its plates do not separate from it."""
    log_r = MultiFrameTensor()
    for name, site in p.items():
        term = site["log_prob"] if name not in q else site["log_prob"] - q[name]["log_prob"]
        log_r.add((_plates(site), term.detach()))
    for name, site in q.items():
        if name not in p:  # auxiliary
            log_r.add((_plates(site), -site["log_prob"].detach()))
    return log_r


def with_score_function(value: Tensor, signal: Tensor, guide_trace: Trace, shape: handlers.Structure) -> Tensor:
    """Add the score-function gradient of sites that are not reparameterized; the value stays as it is.

    Args:
        value: ``(..., rows)``, what the gradient flows through already.
        signal: what multiplies the gradient of log q, of a shape that broadcasts to ``(particles, rows)``.
    """
    assert shape.data_plate is not None
    rough = {n: s for n, s in handlers.sample_sites(guide_trace).items() if not s["fn"].has_rsample}
    if not rough:
        return value
    log_q = handlers.row_total(rough, shape.data_plate)
    term = signal.detach() * log_q
    term = term - term.detach()
    return value + (term if value.dim() == term.dim() else term.sum(0))


class ELBO(Objective[Bounded]):
    r"""Evidence lower bound as a loss, :math:`-E_q[\log p(x, z) - \log q(z \mid x)] \ge -\log p(x)`.

    Args:
        num_particles: draws of the guide over which the bound is averaged.
        analytic_kl: take the KL of a latent site to its prior in closed form where there is one; less noise. Equal to
            Pyro's ``TraceMeanField_ELBO`` then (but for its error at ``Delta`` sites), else to ``Trace_ELBO``.
        vectorize_particles: run the draws at once, in a plate left of the program's; the program must broadcast.

    Raises:
        ValueError: for ``num_particles`` below 1; at the first call, for sites that only one of model and guide has.
        TypeError: for a program without a bound.

    References:
        M. I. Jordan et al., "An introduction to variational methods for graphical models", Mach. Learn. 37, 1999.
        D. P. Kingma, M. Welling, "Auto-encoding variational Bayes", 2014, arXiv:1312.6114, eqs. 3, 7, 10.
        R. Ranganath, S. Gerrish, D. M. Blei, "Black box variational inference", 2014, arXiv:1401.0118.
    """

    needs = (Bounded,)
    loss_is = "lower bound"
    module_class = ELBOModule

    def __init__(self, num_particles: int = 1, *, analytic_kl: bool = False, vectorize_particles: bool = False) -> None:
        super().__init__()
        self.num_particles = check_count(num_particles, "num_particles")
        self.analytic_kl = bool(analytic_kl)
        self.vectorize_particles = bool(vectorize_particles)

    def settings(self) -> dict[str, Any]:
        return {
            "num_particles": self.num_particles,
            "analytic_kl": self.analytic_kl,
            "vectorize_particles": self.vectorize_particles,
        }
