r"""Score matching (Hyvärinen 2005): fit the score of a density, in which Z has dropped out.

With :math:`s_\theta = \nabla_x \log f_\theta = -\nabla_x E_\theta` and :math:`p_d` the density of the data,

.. math:: \tfrac12 E\,|s - \nabla \log p_d|^2 = \tfrac12 E\,|s|^2 - \int p_d\, s \cdot \nabla \log p_d\,dx + c, \qquad
          -\int s \cdot \nabla p_d\,dx = \int p_d\, \nabla \!\cdot s\,dx \quad (p_d\, s \to 0 \text{ at the boundary}),

so that what is *minimised* is

.. math:: J(\theta) = E\big[\tfrac12 |s|^2 + \mathrm{tr} \nabla s\big] = E\big[\tfrac12 |\nabla E|^2 - \Delta E\big] .

Some sources print :math:`E[\sum_i \partial_i^2 E - \frac12 (\partial_i E)^2]` as the objective. That is −J, the
quantity to maximise: minimised, it falls without end as the energy gets steeper. For x ~ N(0, 1/2) and E = λx²/2
(truth λ = 2) J = −λ + λ²/4 is −0.75, −1, 1.25 at λ = 1, 2, 5: least at the truth, where −J is greatest.

J needs a continuous ∇E: a piecewise-linear network has ΔE = 0 almost everywhere, and J would be least for a constant
energy. J has the unit 1/x², not the nat, and is blind to the weights of well separated modes. Here the trace is exact;
:mod:`pyro_gen.objectives.sliced_score_matching` has it along random directions, at a price that does not grow with d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_gen import handlers, scopes
from pyro_gen.base import Objective, ObjectiveModule, Unnormalized
from pyro_gen.checks import check_count, describe
from pyro_gen.handlers import Structure
from pyro_gen.handlers.marginal import marginal_rows
from pyro_gen.laplacians import Derivatives, Method, choose, derivatives, kinks
from pyro_gen.objectives.boundary_weights import check_weight, edges_of, is_bounded, quadratic, weight_and_slope
from pyro_gen.objectives.data_sites import (
    DataSite,
    check_inside,
    check_row_by_row,
    find_data_site,
    require_continuous,
)
from pyro_gen.objectives.latent_scores import draw, guide_loss, joint, square_of_mean
from pyro_gen.objectives.unreached import reaching, unreached

__all__ = ["ScoreMatching", "ScoreModule", "check_smooth_flag", "row_sum"]


class ScoreModule(ObjectiveModule):
    """What the losses made of derivatives in x share: the guards, and latents summed out."""

    objective: Any
    silent: tuple[str, ...] = ()  # parameters that the score does not contain

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        """The estimate of J of each row: ``(rows,)``, in units of 1/x²; of x⁰ under weights of a bounded support."""
        if self.structure is None:
            self.prepare(*batch, **kwargs)
        return reaching(self, self.score_rows(*batch, **kwargs), self.silent)

    def score_rows(self, *batch: Any, **kwargs: Any) -> Tensor:
        """What :meth:`pointwise` has, of a program that has been prepared."""
        raise NotImplementedError

    def prepare(self, *batch: Any, **kwargs: Any) -> Structure:
        purpose = type(self.objective).__name__
        x = require_continuous(batch[0] if batch else None, purpose)
        frozen = [p for p in self.parameters() if not p.requires_grad]
        with (
            torch.no_grad(),
            scopes.preserved_state(self.model, self.guide),
            poutine.block(),
            scopes.hide_bare_parameters(),
        ):
            _, trace = handlers.pair_traces(self.model, self.guide, *batch, **kwargs)
        for parameter in frozen:  # a first `pyro.param` of what a PyroModule holds directly thaws it
            parameter.requires_grad_(False)
        site = find_data_site(handlers.sample_sites(trace), x, *batch[1:], purpose=purpose)
        check_inside(site, x)
        shape = super().prepare(*batch, **kwargs)
        try:
            with scopes.preserved_state(self.model, self.guide), poutine.block(), scopes.hide_bare_parameters():
                self.examine(site, batch, kwargs)
                with scopes.forked_generators(0), torch.enable_grad():
                    self.silent = unreached(self, self.score_rows(*batch, **kwargs))
        except BaseException:
            self.structure = None  # what is refused once is refused again
            raise
        return shape

    def check_structure(self, shape: Structure) -> None:
        purpose = type(self.objective).__name__
        shape.require_data_plate(purpose)
        hidden = [n for n in shape.model_latents if n not in shape.enumerated]
        if hidden:
            raise ValueError(
                f"latent site {', '.join(map(repr, hidden))} is left free: {purpose} needs log f(x). Sum a discrete "
                "one out by infer={'enumerate': 'parallel'}; for a continuous one give a guide and use "
                "pg.ScoreMatching(particles=16)"
            )

    def examine(self, site: DataSite, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse data and densities that this objective cannot train; called by :meth:`prepare`."""
        purpose = type(self.objective).__name__
        self.check_boundary(site, batch[0])
        density = self.density(batch, kwargs)
        check_row_by_row(density, batch[0], purpose)
        if getattr(self.objective, "check_smooth", False):
            self.refuse_kinks(density, batch[0])

    def check_boundary(self, site: DataSite, x: Tensor) -> None:
        """Refuse a support with an edge, at which the boundary term of the integration by parts is left."""
        if is_bounded(site):
            raise ValueError(
                f"site {site.name!r} has support {site.support}, at whose edge p(x) s(x) need not vanish: "
                f"{type(self.objective).__name__} would be biased. Use pg.ScoreMatching(weight='auto'), or map x to a "
                "real space"
            )

    def refuse_kinks(self, density: Callable[[Tensor], Tensor], x: Tensor) -> None:
        found = kinks(density, x)
        if found:
            raise ValueError(
                f"the energy has {', '.join(map(repr, found))} in it, where its gradient jumps: second derivatives "
                f"miss the jumps, and {type(self.objective).__name__} would be least for a flat energy. Use a smooth "
                "activation (torch.nn.SiLU, Softplus, Tanh), pg.FiniteDifferenceScoreMatching, or check_smooth=False "
                "if the data never meet the kink"
            )

    def log_density_rows(self, *batch: Any, **kwargs: Any) -> Tensor:
        if self.structure is not None and self.structure.enumerated:
            return marginal_rows(self.model, *batch, plate_nesting=self.structure.plate_nesting, **kwargs)
        return super().log_density_rows(*batch, **kwargs)

    def density(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """log f of each row as a function of x alone."""
        return lambda x: self.log_density_rows(x, *batch[1:], **kwargs)


class ScoreMatchingModule(ScoreModule):
    objective: ScoreMatching

    def check_structure(self, shape: Structure) -> None:
        particles, latent = self.objective.particles, any(n not in shape.enumerated for n in shape.model_latents)
        self.__dict__["marginal"] = particles is not None and latent
        if not self.__dict__["marginal"]:
            super().check_structure(shape)
            return
        handlers.check_pair(shape, summed_out=True)
        handlers.require_local(shape, "ScoreMatching")
        both = [n for n in shape.guide_latents if n in shape.enumerated]
        if both:
            raise ValueError(
                f"site {', '.join(map(repr, both))} is marked for enumeration and stands in the guide: leave it out of "
                "the guide (it is summed out) or take the mark away (it is drawn)"
            )

    def check_boundary(self, site: DataSite, x: Tensor) -> None:
        weight = self.objective.weight
        self.__dict__["weight"] = self.__dict__["methods"] = None
        if callable(weight):
            check_weight(weight, x)
            self.__dict__["weight"] = weight
        elif weight == "auto":
            self.__dict__["weight"] = quadratic(edges_of(site, x)) if is_bounded(site) else None
        else:
            super().check_boundary(site, x)

    def density(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        if not self.__dict__["marginal"]:
            return super().density(batch, kwargs)
        assert self.structure is not None
        with torch.no_grad():  # one draw of the latents, held fixed
            drawn = draw(self.guide, self.structure, batch, 1, **kwargs)
        return joint(self.model, self.structure, drawn, **kwargs)

    def score_rows(self, *batch: Any, **kwargs: Any) -> Tensor:
        if self.__dict__["marginal"]:
            return self._marginal(batch, kwargs)
        _, gradient, laplacian = self._derivatives(self.density(batch, kwargs), batch[0])
        return laplacian + 0.5 * row_sum(gradient.square())

    def _marginal(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """J of each row with its latents integrated out, and the gradient of the guide's own bound."""
        assert self.structure is not None
        count, rows = cast(int, self.objective.particles), len(batch[0])
        drawn = draw(self.guide, self.structure, batch, count, **kwargs)
        log_joint = joint(self.model, self.structure, drawn, **kwargs)
        value, gradient, laplacian = self._derivatives(log_joint, drawn.batch[0])
        log_w = (value - drawn.log_guide.detach()).reshape(count, rows)
        g = gradient.reshape(count, rows, -1)
        second = (log_w.softmax(0) * (laplacian.reshape(count, rows) + g.square().sum(-1))).sum(0)
        loss = second - 0.5 * square_of_mean(log_w, g)
        if drawn.log_guide.requires_grad:
            bound = guide_loss(self.model, self.structure, drawn, **kwargs)
            loss = loss + (bound - bound.detach())
        return loss

    def _derivatives(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Derivatives:
        """Value, gradient and Laplacian of f at x; with a weight h in coordinates u where dx/du = √h, d²x/du² = h'.

        There ½|∂_u f|² + ∂²_u f = ½ h s² + h ∂s + h' s, summed over coordinates: the weighted loss as the plain one.
        """
        weight = self.__dict__["weight"]
        if weight is None:
            return derivatives(f, x, self._method(f, x))
        h, slope = weight_and_slope(weight, x)
        root, half = h.sqrt(), 0.5 * slope

        def curved(u: Tensor) -> Tensor:
            return f(x + root * u + half * u * u)

        u = torch.zeros_like(x)
        return derivatives(curved, u, self._method(curved, u))

    def _method(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Method | Any:
        """How to take second derivatives, decided once for each shape of a batch."""
        if self.objective.method != "auto":
            return self.objective.method
        known: dict[Any, Method] = self.__dict__["methods"] or {}
        key = tuple(x.shape), x.dtype, x.device
        if key not in known:
            with scopes.preserved_state(self.model, self.guide), poutine.block():
                known[key] = choose(f, x)
            self.__dict__["methods"] = known
        return known[key]


def row_sum(t: Tensor) -> Tensor:
    """Sum over all but the rows."""
    return t.reshape(len(t), -1).sum(1)


def check_smooth_flag(check_smooth: Any) -> bool:
    if not isinstance(check_smooth, bool):
        raise ValueError(f"check_smooth must be True or False, got {describe(check_smooth)}")
    return check_smooth


class ScoreMatching(Objective[Unnormalized]):
    r"""Exact score matching, :math:`J = E[\tfrac12 |s|^2 + \mathrm{tr} \nabla s]` with :math:`s = \nabla_x \log f`.

    Z has dropped out. Minimised; in units of 1/x², not nats. The trace is exact, by the forward Laplacian where it can
    be. A conditional program, called with (x, context), is differentiated in x only. Latents marked for enumeration
    are summed out.

    Args:
        method: how second derivatives are taken: ``"auto"``, ``"forward"``, ``"reverse"`` or ``"vmap"``.
        weight: h of the weighted loss for data with an edge, :math:`\sum_i \tfrac12 h_i s_i^2 + h_i \partial_i s_i +
            h_i' s_i`: None (h = 1; a bounded support is refused), ``"auto"`` (from the support of the data site: 1 on
            the real line, squared distance to the edge on half-lines, a smooth form of it on intervals), or a function
            of x to weights of its shape, each of its own number of x.
        check_smooth: refuse energies with piecewise-linear activations, whose second derivative is 0.
        particles: for a model with continuous latents: draws of the guide a row, K of at least 2; the loss is then
            that of the marginal density by Fisher's identity, with a bias of order 1/K where the guide is not the
            posterior. The guide is trained along: the gradient (not the value) has that of its −ELBO, with the model's
            weights held fixed.

    Raises:
        ValueError, TypeError: at the first call, where derivatives in x are not those of a density: see the message.

    References:
        A. Hyvärinen, "Estimation of non-normalized statistical models by score matching", JMLR 6, 2005.
        A. Hyvärinen, "Some extensions of score matching", CSDA 51, 2007.
        S. Yu, M. Drton, A. Shojaie, "Generalized score matching for non-negative data", JMLR 20, 2019.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     rate = pyro.param("rate", torch.tensor(2.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.factor("energy", -rate * x.square().sum(-1) / 2)
        >>> ScoreMatching()(model).pointwise(torch.tensor([[0.0], [1.0]])).detach()    # λ²x²/2 − λ
        tensor([-2.,  0.])
    """

    needs = (Unnormalized,)
    loss_is = "generalized"
    takes = "continuous"
    validates = True
    deterministic = True
    module_class = ScoreMatchingModule

    def __init__(
        self,
        method: Literal["auto", "forward", "reverse", "vmap"] = "auto",
        *,
        weight: Literal["auto"] | Callable[[Tensor], Tensor] | None = None,
        check_smooth: bool = True,
        particles: int | None = None,
    ) -> None:
        super().__init__()
        if method not in ("auto", "forward", "reverse", "vmap"):
            raise ValueError(f"method must be 'auto', 'forward', 'reverse' or 'vmap', got {describe(method)}")
        if not (weight is None or weight == "auto" or callable(weight)):
            raise ValueError(f"weight must be None, 'auto' or a function of x, got {describe(weight)}")
        if particles is not None and check_count(particles, "particles") < 2:
            raise ValueError("particles must be at least 2, for the square of a mean without bias, got 1")
        self.method, self.weight, self.particles = method, weight, particles
        self.check_smooth = check_smooth_flag(check_smooth)
        self.deterministic = particles is None

    def settings(self) -> dict[str, Any]:
        weight = f"<{describe(self.weight)}>" if callable(self.weight) else self.weight
        return {
            "method": self.method,
            "weight": weight,
            "check_smooth": self.check_smooth,
            "particles": self.particles,
        }
