r"""Conditional flow matching (Lipman et al. 2023): regress the velocity that carries noise to data.

A datum and a noise that are joined by the path :math:`y_t = \alpha(t)\, u + \sigma(t)\, \varepsilon` move along it at
:math:`\dot y_t = \alpha' u + \sigma' \varepsilon`. The mean of that velocity over all pairs that pass through y at time
t, :math:`v_t(y) = E[\dot y_t \mid y_t = y]`, is a field whose ODE carries the density of ε into that of u through the
densities of all :math:`y_t`: both sides satisfy one continuity equation. It is the minimum of

.. math:: L(\theta) = E_{t, (u, \varepsilon)}\, \tfrac12\, \Big| \hat v_\theta(y_t, t) - \dot y_t \Big|^2,

and so of any coupling of data and noise with these marginals. With *independent* pairs the field is
:math:`\alpha' E[u|y] + \sigma' E[\varepsilon|y]`: flow matching is denoising score matching with the weight
:math:`(\sigma' - \sigma \alpha'/\alpha)^2 = \sigma^2 \lambda'^2 / 4` (`noise_regression`), and the program's score and
its bound hold as ever. With *optimal* pairs (`couplings`) the paths hardly cross, the field is straighter and the
regression less noisy; but y is no longer a datum with independent noise, so that :math:`\hat\varepsilon` is no score:
what is right then is the ODE, its samples and its density, not the reverse chain, its bound or guidance by scores.
"""

from __future__ import annotations

from typing import Any

from pyro_gen.base import Noised, Objective, ObjectiveModule, Program
from pyro_gen.objectives.couplings import Coupling
from pyro_gen.objectives.noise_regression import NoiseRegressionModule, Regression, Time, Weighting

__all__ = ["FlowMatching"]


class FlowMatching(Objective[Noised]):
    r"""Conditional flow matching, :math:`\frac12 |\hat v(y_t, t) - \dot y_t|^2`: the velocity from noise to data.

    Z plays no part: the velocity is that of the densities' flow, and log p(x) is had by its ODE afterwards. The path is
    the program's own schedule, in units of the standardised data; ``pg.Diffusion(d, schedule="rectified",
    prediction="velocity", timesteps=None)`` is the straight one.

    Args:
        coupling: of data and noise: ``"independent"``, or ``"optimal"``, an exact assignment within blocks of rows.
            The latter pairs by x alone, so that the noise of a row would tell of its context: it is refused for
            conditional programs. It serves samples and densities by the ODE; a reverse chain needs independent pairs.
        block: rows in a block of ``"optimal"``. The mean cost of its pairs is above that of the full plan, the less the
            greater the block; the time of a batch grows with the square of it.
        weighting: of the levels. ``"velocity"`` is the loss above; the others of `DenoisingScoreMatching` have the same
            minimum for independent pairs.
        time: the distribution of t: ``"uniform"``, ``"logit_normal"`` (more of the middle, where the velocity is
            hardest), or ``"lognormal"`` in σ/α. The loss is a mean over it, another loss with the same minimum.

    Raises:
        ValueError: for names that are none; for an optimal coupling and a conditional program.
        TypeError: for a program without noise levels.

    References:
        Y. Lipman et al., "Flow matching for generative modeling", 2023, arXiv:2210.02747, eq. 9; A. Tong et al.,
        "Improving and generalizing flow-based generative models with minibatch optimal transport", 2024,
        arXiv:2302.00482, algorithms 1 and 3; P. Esser et al., "Scaling rectified flow transformers", 2024,
        arXiv:2403.03206, eq. 19 (logit-normal t).

    Example:
        >>> FlowMatching("optimal", block=128)
        FlowMatching(coupling='optimal', block=128)
    """

    needs = (Noised,)
    loss_is = "generalized"
    takes = "continuous"
    module_class = NoiseRegressionModule

    def __init__(
        self,
        coupling: Coupling = "independent",
        *,
        block: int = 64,
        weighting: Weighting = "velocity",
        time: Time = "uniform",
    ) -> None:
        super().__init__()
        self.regression = Regression(weighting, time, coupling=coupling, block=block)

    def module_of(self, program: Program | None) -> type[ObjectiveModule]:
        if program is None:
            raise TypeError(
                "FlowMatching needs a program of kind Noised, whose schedule and network it knows, not a bare pair: "
                "pg.Diffusion(...), or pg.Noised(model, guide, event_shape, schedule=..., denoiser=...)"
            )
        if self.regression.coupling == "optimal" and program.context_shape is not None:
            raise ValueError(
                "coupling='optimal' pairs data and noise by x alone, so that each context would get noise of its own "
                "and p(x | context) would be biased: use coupling='independent' for a program with context_shape="
            )
        return NoiseRegressionModule

    def settings(self) -> dict[str, Any]:
        asked = self.regression
        return {
            "coupling": asked.coupling,
            "block": asked.block,
            "weighting": asked.weighting,
            "time": asked.time,
        }
