r"""Denoising score matching (Vincent 2011): regress the score on the direction back from a noisy datum to its source.

Add noise, :math:`y = x + \sigma n` with :math:`n \sim N(0, I)`. The density of y is
:math:`p_\sigma = p_{data} * N(0, \sigma^2 I)`, and :math:`\nabla_y \log p(y \mid x) = -n / \sigma` has
:math:`\nabla \log p_\sigma(y)` for its mean given y. So the score s of a model that minimises

.. math:: L(\theta) = \sum_x E_n\, \tfrac12 \sigma^2\, \Big| s_\theta(x + \sigma n) + \frac{n}{\sigma} \Big|^2

is that of :math:`p_\sigma`. First derivatives suffice, no Laplacian. The factor :math:`\sigma^2` makes the loss free of
units, :math:`\frac12 |\sigma s + n|^2`: scores are of size 1/σ, so every level weighs alike, and x and σ may be
rescaled together. The price is a bias that no amount of data removes: the estimate is of :math:`p_\sigma`. Gaussian
data of variance v give the precision :math:`1 / (v + \sigma^2)`. And as σ falls the variance of the gradient grows as
:math:`1/\sigma^2`, unless the noise comes in pairs ±n, where the leading term cancels.

*Several levels.* An energy that takes the level as its context learns every :math:`p_\sigma`. One energy for all
levels, with shares :math:`w_l` of the loss, has the minimum :math:`s = \sum_l w_l \sigma_l^2\, \nabla p_{\sigma_l} /
\sum_l w_l \sigma_l^2\, p_{\sigma_l}` (as :math:`p \nabla \log p = \nabla p`), which is again a score, that of the
*mixture* :math:`\sum_l \pi_l\, p_{\sigma_l}` with :math:`\pi_l \propto w_l \sigma_l^2`: that is what ``mixture=`` sets.
A small share of broad noise lays a bridge of data between far modes, without which no score knows their weights.

A program of kind `Noised` has a network, a schedule and levels of its own: there the loss is `noise_regression`.

*Which σ?* This loss cannot tell: its least value is :math:`\frac d2 - \frac12 \sigma^2 E|\nabla \log p_\sigma|^2`,
another for each σ. `sigma_choice.choose_sigma` compares by a criterion on clean held-out rows, whose unknown constant
has no σ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_gen import handlers, scopes
from pyro_gen.base import Noised, Objective, ObjectiveModule, Program, Unnormalized, context_error
from pyro_gen.checks import check_count, describe
from pyro_gen.objectives.noise_regression import NoiseRegressionModule, Regression, Time, Weighting
from pyro_gen.objectives.observed_supports import observing_site, support_of
from pyro_gen.objectives.unreached import reaching, unreached
from pyro_gen.targets import is_real

__all__ = ["DenoisingScoreMatching", "positive"]

DEFAULT = 0.1  # standard deviations of the data


class DenoisingScoreMatchingModule(ObjectiveModule):
    """The loss; its state are the levels, and the spread of the data where σ is relative to it."""

    objective: DenoisingScoreMatching
    levels: Tensor
    shares: Tensor
    spread: Tensor
    measured: Tensor

    def __init__(self, model: Any, guide: Any, objective: DenoisingScoreMatching) -> None:
        super().__init__(model, guide, objective)
        self.register_buffer("levels", torch.tensor(objective.levels))
        self.register_buffer("shares", torch.tensor(objective.shares))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("measured", torch.tensor(False))
        self.silent: tuple[str, ...] = ()  # parameters that the score does not contain

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if (saved := state_dict.get(f"{prefix}spread")) is not None:  # one number until measured, then one a feature
            self.spread = torch.empty_like(saved, device=self.spread.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def check(self, *batch: Any) -> tuple[Any, ...]:
        """As the program does, with the level that this loss adds: it is not asked for."""
        x, *given = batch
        if self.program is None or not x.dim() or any(part.dim() != 2 or len(part) != len(x) for part in given):
            return super().check(*batch)
        index = torch.zeros(len(x), dtype=torch.long, device=self.levels.device)
        return (super().check(*self._with_level(batch, index))[0], *given)

    def initialise(self, x: Tensor, *rest: Any) -> None:
        """Start the program, at all levels alike where it takes them, and measure the unit of a relative σ: once."""
        index = torch.arange(len(x), device=self.levels.device) % len(self.levels)
        super().initialise(*self._with_level((x, *rest), index))
        self._measure(x)

    def _measure(self, x: Tensor) -> None:
        """Take the standard deviation of each feature for the unit of a relative σ, once."""
        if not self.objective.relative or bool(self.measured):
            return
        if len(x) < 2:
            raise ValueError(
                "relative=True takes standard deviations from the first batch, which has one row: give more"
            )
        spread = x.detach().std(0, unbiased=False)
        self.spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        self.measured.fill_(True)

    def prepare(self, *batch: Any, **kwargs: Any) -> handlers.Structure:
        x = batch[0]
        full = self._with_level(batch, torch.zeros(len(x), dtype=torch.long, device=x.device))
        shape = super().prepare(*full, **kwargs)
        site = observing_site(self.model, *full, **kwargs)
        support = support_of(site and site["fn"], x.dim() - 1)
        if support.is_discrete or not x.dtype.is_floating_point:
            raise ValueError(
                f"DenoisingScoreMatching adds normal noise to x, and the data site is discrete ({support}): use "
                "pg.PseudoLikelihood, or pg.NoiseContrastive with discrete noise"
            )
        if not is_real(support):
            raise ValueError(
                f"DenoisingScoreMatching moves x by normal noise, out of the support of the data site ({support}): "
                "use pg.ScoreMatching, whose weighted form takes bounded supports, or transform x to the real line"
            )
        if self.levels.dtype != x.dtype or self.levels.device != x.device:  # from the numbers, so none is rounded twice
            self.levels = torch.tensor(self.objective.levels, dtype=x.dtype, device=x.device)
            self.shares = torch.tensor(self.objective.shares, dtype=x.dtype, device=x.device)
            self.spread = self.spread.to(self.levels)
        self._measure(x)
        with (
            scopes.forked_generators(0),
            scopes.preserved_state(self.model, self.guide),
            poutine.block(),
            scopes.hide_bare_parameters(),
            torch.enable_grad(),
        ):
            self.silent = unreached(self, self._rows(batch, kwargs))
        return shape

    def check_structure(self, shape: handlers.Structure) -> None:
        shape.require_data_plate("DenoisingScoreMatching")
        free = [name for name in shape.model_latents if name not in shape.enumerated]
        if free:
            raise handlers.free_latents(free)

    def score(self, y: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """∇ log f at y, of the shape of y: the one place where this loss meets the kind of its program."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            result: Tensor = torch.func.grad(lambda at: self.log_density_rows(at, *rest, **kwargs).sum())(y)
            return result
        recorded = torch.is_grad_enabled()  # plain autograd where it can be: less overhead
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            (result,) = torch.autograd.grad(self.log_density_rows(y, *rest, **kwargs).sum(), y, create_graph=recorded)
        return result

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        """The loss of each row at one draw of its noise (or of a pair ±n), and of its level: ``(rows,)``."""
        if self.structure is None:
            self.prepare(*batch, **kwargs)
        return reaching(self, self._rows(batch, kwargs), self.silent)

    def _rows(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, count = batch[0], len(self.levels)
        noise = torch.normal(0.0, 1.0, x.shape, dtype=x.dtype, device=x.device)
        # each row's level is uniform, and a batch has all of them in equal numbers, which spares variance
        index = None
        if count > 1:
            index = (torch.arange(len(x), device=x.device) + torch.randint(count, (), device=x.device)) % count
        sigma, share = self._of_levels(index, x.dim())
        signs = (1.0, -1.0) if self.objective.antithetic else (1.0,)
        total: Any = 0.0
        for sign in signs:
            y, *rest = self._with_level((x + sign * sigma * noise, *batch[1:]), index)
            gap = sigma * self.score(y, *rest, **kwargs) + sign * noise
            total = total + gap.square().reshape(len(x), -1).sum(1)
        loss: Tensor = share * total / (2 * len(signs))
        return loss

    def _of_levels(self, index: Tensor | None, dims: int) -> tuple[Tensor, Tensor]:
        """σ in the units of x, and the weight of the loss, of each row's level; of the only one for index None."""
        if index is None:
            return self.levels[0] * self.spread, self.shares[0]
        return self.levels[index].reshape(-1, *[1] * (dims - 1)) * self.spread, self.shares[index]

    def _with_level(self, batch: tuple[Any, ...], index: Tensor | None) -> tuple[Any, ...]:
        """The batch with log σ as the last entry of its context, where the program takes the level."""
        x, *given = batch
        shape = None if self.program is None else self.program.context_shape
        found = shape == (1,) and not given and len(self.levels) > 1
        if not (found if self.objective.condition is None else self.objective.condition):
            return batch
        index = torch.zeros(len(x), dtype=torch.long, device=self.levels.device) if index is None else index
        level = self.levels[index].log().to(x).unsqueeze(1)
        if self.program is not None and (shape is None or len(shape) != 1):
            raise ValueError(
                "condition=True passes log σ as the last entry of the context, so the program needs a context_shape of "
                f"one dimension, 1 without other context; it has {None if shape is None else tuple(shape)}"
            )
        if not given:
            if shape is not None and shape[0] != 1:
                raise ValueError(context_error(shape))
            return x, level
        context = given[0]
        if shape is None or context.shape[1] == shape[0]:  # as wide as the program's: its last entry is the level's
            context = context[:, :-1]
        return x, torch.cat([context, level], 1), *given[1:]


class DenoisingScoreMatching(Objective[Unnormalized | Noised]):
    r"""Denoising score matching, :math:`\frac12 |\sigma\, s(x + \sigma n) + n|^2`: the score of the data under noise.

    Z has dropped out of the score. What is estimated is the density of x + σn, at one level or, annealed, at several.

    A program of kind `Noised` (`Diffusion`) has levels of its own: the loss is
    :math:`E_t\, \tfrac12 w(t)\, |\hat\varepsilon - \varepsilon|^2` in units of the standardised data, its options are
    ``weighting`` and ``time``, and the other arguments are refused. With λ = log SNR = log α²/σ², and p(t) the density
    of the levels that are drawn:

    =================== ================================== =========================================================
    ``weighting``       w(t)                               source; the same on another prediction
    =================== ================================== =========================================================
    ``"epsilon"``       1                                  Ho et al. 2020 (L_simple)
    ``"x0"``            1 / SNR                            :math:`|\hat u - u|^2`
    ``"v"``, ``"edm"``  1 + 1 / SNR                        :math:`|\hat v - v|^2` (Salimans & Ho 2022); Karras et al.
                                                           2022, whose levels are ``time="lognormal"``
    ``"truncated_snr"`` max(1, 1 / SNR)                    Salimans & Ho 2022: max(SNR, 1) on u
    ``"min_snr"``       min(1, γ / SNR)                    Hang et al. 2023: min(SNR, γ) on u
    ``"velocity"``      σ² λ'² / 4                         flow matching (Lipman et al. 2023), on dy/dt
    ``"elbo"``          −λ' / p(t)                         the bound in continuous time (Kingma et al. 2021), without
                                                           the terms of its two ends
    ``"sigmoid"``       −λ' sigmoid(b − λ) / p(t)          Kingma & Gao 2023; Hoogeboom et al. 2024
    =================== ================================== =========================================================

    The last two are integrals over λ, in discrete time by the trapezoidal rule; they draw the program's own levels. The
    others are means over the levels drawn, so that ``time`` changes the measure: it is a weight of its own.

    Args:
        sigma: standard deviation of the noise, in the units of x; by default a tenth of that of each feature.
        sigmas: instead of ``sigma``, several levels; or two ends of a ladder of ``levels`` steps.
        levels: number of levels, geometric between the two numbers of ``sigmas``.
        relative: σ counts standard deviations of each feature instead, measured once: by ``fit`` on all training rows,
            else on the first batch.
        condition: the program takes the level: log σ is passed as the last entry of its context (``context_shape=1``
            where there is no other). None finds out: a program with ``context_shape=1`` under several levels. Data are
            ``x``, or ``(x, context)`` where the context may have a column for the level, whose values are not used.
        mixture: for an energy without level, the share :math:`\pi_l` of each level in the mixture of noisy densities
            that it estimates, in the order of the levels; None weighs the losses of all levels alike, which is
            :math:`\pi_l \propto \sigma_l^2`.
        antithetic: draw the noise in pairs ±n: twice the work, and a gradient whose variance stays finite as σ falls.
        weighting: of the levels of a `Noised` program, by the names above; None is ``"epsilon"``.
        time: the distribution of its levels: None or ``"uniform"`` in its training times, ``"lognormal"``
            (log σ/α from Karras et al.'s normal, for data of variance 1), ``"logit_normal"`` (Esser et al. 2024), the
            latter two cut to its times.
        gamma: γ of ``"min_snr"``; bias: b of ``"sigmoid"``.

    Raises:
        ValueError: for σ that is not positive and finite, or both of ``sigma`` and ``sigmas``; options of the one kind
            of program with the other; at the first call for discrete or bounded data, a free latent site, no plate
            over rows.
        TypeError: for a program whose log f is not known.

    References:
        P. Vincent, "A connection between score matching and denoising autoencoders", Neural Computation 23,
        2011, eq. 12.
        Y. Song, S. Ermon, "Generative modeling by estimating gradients of the data distribution", 2019,
        arXiv:1907.05600, eqs. 5 and 6.
        Z. Li, Y. Chen, F. Sommer, "Learning energy-based models in high-dimensional spaces with multiscale denoising
        score matching", 2019, arXiv:1910.07762 (one energy for all levels).
        J. Ho et al. 2020, arXiv:2006.11239, eq. 14; D. Kingma et al. 2021, arXiv:2107.00630, eq. 17; T. Salimans, J. Ho
        2022, arXiv:2202.00512, section 4; T. Karras et al. 2022, arXiv:2206.00364, table 1; T. Hang et al. 2023,
        arXiv:2303.09556; D. Kingma, R. Gao 2023, arXiv:2303.00848; E. Hoogeboom et al. 2024, arXiv:2410.19324;
        P. Esser et al. 2024, arXiv:2403.03206.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1), obs=x)
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(4000, 1)      # ½ E|σ s(y) + n|² with s = −y: ½ (σ² (1 + σ²) + 1 − 2 σ²) = .45 at σ = .3…
        >>> DenoisingScoreMatching(0.3)(model)(x) / len(x)
        tensor(0.4...)
    """

    needs = (Unnormalized, Noised)
    loss_is = "generalized"
    takes = "continuous"
    validates = True
    module_class = DenoisingScoreMatchingModule

    def __init__(
        self,
        sigma: float | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        levels: int | None = None,
        relative: bool = False,
        condition: bool | None = None,
        mixture: Sequence[float] | None = None,
        antithetic: bool = False,
        weighting: Weighting | None = None,
        time: Time | None = None,
        gamma: float | None = None,
        bias: float | None = None,
    ) -> None:
        super().__init__()
        self.given: dict[str, Any] = {
            "sigma": sigma, "sigmas": sigmas, "levels": levels, "relative": relative, "condition": condition,
            "mixture": mixture, "antithetic": antithetic,
        }  # fmt: skip
        self.asked: dict[str, Any] = {"weighting": weighting, "time": time, "gamma": gamma, "bias": bias}
        for name, owner in (("gamma", "min_snr"), ("bias", "sigmoid")):
            if self.asked[name] is not None and weighting != owner:
                raise ValueError(f"{name}= belongs to weighting={owner!r}; got weighting={describe(weighting)}")
        defaults = {"weighting": "epsilon", "time": "uniform"}
        self.regression = Regression(**(defaults | {k: v for k, v in self.asked.items() if v is not None}))
        if sigma is None and sigmas is None:
            sigma, relative = DEFAULT, True
        if sigma is not None and sigmas is not None:
            raise ValueError(
                "give sigma=, one level of noise in the units of x (or in standard deviations of x, with "
                f"relative=True), or sigmas=, several of them; got sigma={describe(sigma)}, sigmas={describe(sigmas)}"
            )
        if sigmas is not None and (isinstance(sigmas, str) or not isinstance(sigmas, Sequence) or not len(sigmas)):
            raise ValueError(f"sigmas must be a sequence of numbers such as (0.1, 1.0), got {describe(sigmas)}")
        given = [sigma] if sigmas is None else list(sigmas)
        name = "sigma" if sigmas is None else "sigmas"
        values = [positive(value, name) for value in given]
        if levels is not None:
            if sigmas is None or len(values) != 2 or values[0] == values[1]:
                raise ValueError(
                    f"levels= divides the way between two different numbers, sigmas=(low, high); got "
                    f"{name}={describe(sigma if sigmas is None else sigmas)}"
                )
            if check_count(levels, "levels") < 2:
                raise ValueError("levels must be at least 2, both ends of sigmas: for one level give sigma=")
            low, high = map(math.log, values)
            values = [math.exp(low + (high - low) * i / (levels - 1)) for i in range(levels)]
        if condition not in (None, True, False):
            raise ValueError(f"condition must be True, False or None, got {describe(condition)}")
        if mixture is not None:
            if condition:
                raise ValueError("mixture= belongs to an energy without level: with condition=True each has its own")
            if isinstance(mixture, str) or not isinstance(mixture, Sequence) or len(mixture) != len(values):
                raise ValueError(
                    f"mixture must have one share for each of the {len(values)} levels, got {describe(mixture)}"
                )
            mixture = [positive(share, "mixture") for share in mixture]
        self.sigma, self.sigmas, self.levels_given, self.levels = sigma, sigmas, levels, values
        self.relative, self.mixture, self.antithetic = bool(relative), mixture, bool(antithetic)
        self.condition = condition
        weights = [1.0] * len(values) if mixture is None else [m / v**2 for m, v in zip(mixture, values, strict=True)]
        self.shares = [weight * len(values) / sum(weights) for weight in weights]

    def module_of(self, program: Program | None) -> type[ObjectiveModule]:
        noised = isinstance(program, Noised)
        wrong = [name for name, value in (self.given if noised else self.asked).items() if value not in (None, False)]
        if wrong:
            what, own, other = "levels of noise", "weighting= and time=", "sigma= or sigmas="
            raise ValueError(
                f"{', '.join(f'{name}=' for name in wrong)} does not go with a program that "
                + (f"has {what} of its own: its options are {own}" if noised else f"has no {what}: set it by {other}")
            )
        return NoiseRegressionModule if noised else DenoisingScoreMatchingModule

    def settings(self) -> dict[str, Any]:
        given = dict(self.given)
        given["sigmas"] = None if self.sigmas is None else [float(value) for value in self.sigmas]
        return {**given, "mixture": self.mixture, **self.asked}


def positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {describe(value)}")
    return float(value)
