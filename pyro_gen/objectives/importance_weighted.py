r"""The importance-weighted bound: K draws of the guide make a tighter one.

.. math:: L_K(x) = E_{z_{1..K} \sim q} \Big[ \log \tfrac1K \sum_k w_k \Big] \le \log p(x), \qquad
          w_k = p(x, z_k) / q(z_k \mid x),

rises with K to the evidence (Burda et al. 2016). For the latents of a row the logarithm is taken row by row, and the
scale s of a row (N/B of a plate that subsamples, ``poutine.scale``) stands *outside* it,
:math:`\sum_n s_n \log \frac1K \sum_k w_{n,k}`. Scaling inside, :math:`\log \frac1K \sum_k w_k^s`, is no bound at all
(Pyro's ``RenyiELBO`` does so). Latents outside the data plate share one weight for all rows.

Gradients, with normalised weights :math:`\tilde w_k`. ``"iwae"``: :math:`\sum_k \tilde w_k \nabla \log w_k`, whose
signal-to-noise for the guide falls as K grows (Rainforth et al. 2018). ``"dreg"``: for the guide
:math:`\sum_k \tilde w_k^2 \, \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}`, unbiased and
free of that defect (Tucker et al. 2019, eq. 8). ``"stl"``: the score of q is dropped and :math:`\tilde w_k` kept, of
least variance near the optimum and biased for K > 1 (Roeder et al. 2017).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd

from pyro_gen import handlers
from pyro_gen.base import Bounded, Objective, ObjectiveModule
from pyro_gen.checks import check_count
from pyro_gen.handlers import PARTICLE_PLATE, Structure, row_log_prob, sample_sites
from pyro_gen.objectives.elbo import with_score_function

__all__ = ["IWAE"]

Gradient = Literal["iwae", "dreg", "stl"]
Weigh = Callable[[Trace, Trace], Tensor]


class IWAEModule(ObjectiveModule):
    objective: IWAE

    def check_structure(self, shape: Structure) -> None:
        if shape.enumerated:
            raise ValueError("IWAE does not enumerate discrete sites: use pg.ELBO, which sums them out")
        handlers.check_pair(shape)
        if self.objective.num_particles > 1:  # one draw makes it the ELBO
            shape.require_weights("IWAE")
        if self.objective.gradient != "iwae" and not shape.reparameterized:
            raise ValueError(
                f"gradient={self.objective.gradient!r} differentiates through the draws, and the guide has a site that "
                "is not reparameterized: use gradient='iwae'"
            )
        twice = {"iwae": (), "stl": (self.guide,), "dreg": (self.guide, self.model)}[self.objective.gradient]
        parts = [m for part in twice if isinstance(part, nn.Module) for m in part.modules() if m.training]
        if any(isinstance(m, _DropoutNd) and m.p for m in parts):
            raise ValueError(
                f"gradient={self.objective.gradient!r} runs the program twice for one draw, and dropout would differ "
                "between the runs: use gradient='iwae', or take the dropout out"
            )

    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        shape = self.structure or self.prepare(*batch, **kwargs)
        if shape.data_plate is not None and not shape.global_sites:
            return super().forward(*batch, total=total, **kwargs)
        with self.scaled(*batch, total=total, apply=True, **kwargs):
            log_w, guide_traces = self._log_weights(batch, kwargs, whole_weight, shape)
        bound = torch.logsumexp(log_w, 0) - math.log(len(log_w))
        rough = [s for t in guide_traces for s in sample_sites(t).values() if not s["fn"].has_rsample]
        if rough:
            log_q = torch.stack([row_log_prob(s, ()) for s in rough]).sum()
            bound = bound + bound.detach() * (log_q - log_q.detach())
        return -bound

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        """Negative bound of each row: ``(rows,)``, in nats."""
        shape = self.structure or self.prepare(*batch, **kwargs)
        handlers.require_local(shape, "IWAE.pointwise")

        def rows(guide_trace: Trace, model_trace: Trace) -> Tensor:
            return handlers.weigh(guide_trace, model_trace, shape)

        log_w, guide_traces = self._log_weights(batch, kwargs, rows, shape)
        bound = signal = torch.logsumexp(log_w, 0) - math.log(len(log_w))
        for guide_trace in guide_traces:
            bound = with_score_function(bound, signal, guide_trace, shape)
        return -bound

    def _log_weights(
        self, batch: tuple[Any, ...], kwargs: dict[str, Any], weigh: Weigh, shape: Structure
    ) -> tuple[Tensor, list[Trace]]:
        """log w, ``(particles, ...)``, whose gradient under logsumexp is the one asked for; the guide's traces."""
        k, gradient = self.objective.num_particles, self.objective.gradient
        model, guide, fixed, runs = self.model, self.guide, still(self.guide), k
        if self.objective.vectorize_particles and k > 1:
            model, guide, fixed = handlers.with_particles(k, shape.plate_nesting, model, guide, fixed)
            runs = 1

        def joined(found: list[Tensor]) -> Tensor:
            return found[0] if runs == 1 and k > 1 else torch.stack(found)

        def one(q: Trace, drawn: Trace) -> Tensor:
            return weigh(q, poutine.trace(poutine.replay(model, drawn)).get_trace(*batch, **kwargs))

        def weights(guide_traces: list[Trace], stopped: bool) -> Tensor:
            found = []
            for drawn in guide_traces:
                q = poutine.trace(poutine.replay(fixed, drawn)).get_trace(*batch, **kwargs) if stopped else drawn
                found.append(one(q, drawn))
            return joined(found)

        guide_traces, found = [], []
        for _ in range(runs):
            guide_traces.append(poutine.trace(guide).get_trace(*batch, **kwargs))
            if gradient == "iwae":  # weighed at once: Pyro's flows remember the last draw, and may have no inverse
                found.append(one(guide_traces[-1], guide_traces[-1]))
        if gradient == "iwae":
            return joined(found), guide_traces
        if gradient == "dreg" and k > 1:
            with torch.no_grad():
                normalized = torch.softmax(weights(guide_traces, stopped=False), 0)
            parts = [normalized] if runs == 1 else list(normalized)
            for drawn, weight in zip(guide_traces, parts, strict=True):
                scale_gradients(drawn, weight, shape)
        return weights(guide_traces, stopped=True), guide_traces


def whole_weight(guide_trace: Trace, model_trace: Trace) -> Tensor:
    """log w of the whole program, one value a particle: ``()`` or ``(particles,)``."""
    total: Any = 0.0
    for sign, trace in ((1, model_trace), (-1, guide_trace)):
        for name, site in sample_sites(trace).items():
            if isinstance(site["scale"], Tensor) or site["scale"] != 1.0:
                raise ValueError(
                    f"site {name!r} is scaled by {site['scale']}, and latents outside the data plate share one weight "
                    "for all rows: IWAE then needs the whole data set in every batch. Use pg.ELBO with mini-batches"
                )
            dims = tuple(f.dim for f in site["cond_indep_stack"] if f.name == PARTICLE_PLATE)
            total = total + sign * row_log_prob(site, dims)
    return torch.as_tensor(total)


def scale_gradients(trace: Trace, weight: Tensor, shape: Structure) -> None:
    """Multiply the gradient that reaches each draw of a trace by its particle's weight; the values stay."""
    sizes = [1] * (shape.plate_nesting + 1)
    kept = list(weight.shape)
    if shape.data_dim is not None and not shape.global_sites:
        sizes[shape.data_dim] = kept.pop()
    if kept:
        sizes[0] = kept.pop()
    weight = weight.reshape(sizes)
    for site in sample_sites(trace).values():
        if site["is_observed"] or not site["value"].dtype.is_floating_point:
            continue
        factor = weight.reshape(sizes + [1] * site["fn"].event_dim)
        while factor.dim() > site["value"].dim() and factor.shape[0] == 1:
            factor = factor.squeeze(0)
        fixed = site["value"].detach()
        site["value"] = fixed + factor * (site["value"] - fixed)


class _Detached(Messenger):
    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


def still(guide: Callable[..., Any]) -> Callable[..., Any]:
    """The guide with its parameters held fixed: gradients go through what it is given, not into it."""

    def run(*batch: Any, **kwargs: Any) -> Any:
        with poutine.block(hide_types=["param"]), _Detached(), warnings.catch_warnings():
            if not isinstance(guide, nn.Module):
                return guide(*batch, **kwargs)
            # a PyroModule names its parameters to the store, which remarks that the detached ones need no gradient
            warnings.filterwarnings("ignore", ".* was not registered in the param store", UserWarning)
            fixed = {n: p.detach() for n, p in guide.named_parameters() if not n.endswith("_unconstrained")}
            return functional_call(guide, fixed, batch, kwargs)

    return run


class IWAE(Objective[Bounded]):
    r"""Importance-weighted bound as a loss, :math:`-E[\log \frac1K \sum_k w_k] \ge -\log p(x)`, tighter as K grows.

    Args:
        num_particles: K, draws of the guide a row.
        gradient: ``"iwae"`` (any guide), ``"dreg"`` (unbiased, best for the guide) or ``"stl"`` (biased for K > 1).
        vectorize_particles: run the draws at once, in a plate left of the program's; the program must broadcast over
            a leading dimension. False runs it K times.

    Raises:
        ValueError: for ``num_particles`` below 1, an unknown gradient, a guide that is not reparameterized or has
            dropout under ``"dreg"`` or ``"stl"``, or shared latents under mini-batches.
        TypeError: for a program without a bound.

    References:
        Y. Burda, R. Grosse, R. Salakhutdinov, "Importance weighted autoencoders", 2016, arXiv:1509.00519, eq. 8.
        G. Roeder, Y. Wu, D. Duvenaud, "Sticking the landing", 2017, arXiv:1703.09194.
        G. Tucker, D. Lawson, S. Gu, C. J. Maddison, "Doubly reparameterized gradient estimators for Monte Carlo
        objectives", 2019, arXiv:1810.04152, eq. 8.
        T. Rainforth et al., "Tighter variational bounds are not necessarily better", 2018, arXiv:1802.04537.
    """

    needs = (Bounded,)
    loss_is = "lower bound"
    module_class = IWAEModule

    def __init__(
        self, num_particles: int = 16, *, gradient: Gradient = "iwae", vectorize_particles: bool = True
    ) -> None:
        super().__init__()
        self.num_particles = check_count(num_particles, "num_particles")
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient must be one of {', '.join(map(repr, get_args(Gradient)))}, got {gradient!r}")
        self.gradient = gradient
        self.vectorize_particles = bool(vectorize_particles)

    def settings(self) -> dict[str, Any]:
        return {
            "num_particles": self.num_particles,
            "gradient": self.gradient,
            "vectorize_particles": self.vectorize_particles,
        }
