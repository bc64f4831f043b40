r"""Noise-contrastive estimation (Gutmann & Hyvärinen 2012): log Z learnt as a parameter, by telling data from noise.

Mix each datum with ν draws of a known density :math:`p_n`. The posterior probability that u is a datum has the log odds

.. math:: G(u) = \log f_\theta(u) - c - \log p_n(u) - \log \nu ,

if :math:`f_\theta\, e^{-c}` is the density of the data. Logistic regression on the labels, with the classifier held to
this form,

.. math:: L(\theta, c) = -\sum_n \Big[ \log \sigma(G(x_n)) + \sum_{k=1}^{\nu} \log \sigma(-G(y_{nk})) \Big],
          \qquad y_{nk} \sim p_n,

has its minimum where the odds are the true ones, :math:`f_\theta\, e^{-c} = p_{data}`, hence where :math:`c = \log Z`.
In likelihood c could not be free: log f − c would rise without end. Here noise rows pay for it.

*Errors.* With :math:`g = \nabla_{(\theta, c)}\, (\log f - c)`, :math:`P = \nu p_n / (p_{data} + \nu p_n)`,
:math:`I = \int g g^\top P\, p_{data}` and :math:`m = \int g P\, p_{data}`, N times the covariance of the estimate tends
to :math:`I^{-1} - (1 + 1/\nu)\, I^{-1} m m^\top I^{-1}`, and that of θ to the inverse Fisher information as ν grows.
Noise near the data is best; noise without mass where data lie tells nothing of Z there, and is refused. Noise that is
fitted to the same data changes none of this: the gradient has mean 0 at the truth whatever the noise, so its mean does
not move with the fit of the noise, and the first order is that of the noise it tends to.

*Second order.* Where the noise is the model itself, h = σ(G) is one constant and c − log Z(θ) has no error of order
:math:`N^{-1/2}`. With a and b the mean scores of data and of noise, in units of the Fisher information, the expansion
of both equations gives :math:`\hat\theta - \theta = a - b` and :math:`\hat c - \log Z(\hat\theta) = b \cdot (a - b)`,
where νN |b|² is χ² of p, the number of parameters. Fitted noise has a = 0: the error is −χ²/(νN), never positive, of
mean square p(p + 2)/(νN)². Independent noise has p/(νN²) beside it, which is what the sandwich of the first order then
comes to at :math:`\hat\theta`. `log_normalizer` adds p(p + 2)/(νN)²: it counts near that case, and elsewhere where p²
is no longer small beside N.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import softplus

from pyro_gen import handlers, scopes
from pyro_gen.base import Evidence, Exact, Objective, ObjectiveModule, Unnormalized
from pyro_gen.checks import check_count, describe
from pyro_gen.objectives.noises import (
    FittedNormal,
    FrozenBase,
    FrozenProgram,
    GivenNoise,
    Noise,
    NoiseModule,
    checked,
    distribution_of_row,
)
from pyro_gen.objectives.observed_supports import observing_site, outside, support_of
from pyro_gen.statistics import log_mean_exp
from pyro_gen.targets import is_real

__all__ = ["NoiseContrastive"]

START_DRAWS = 1000  # of the noise, for a first log Z
MOST_PARAMETERS = 500  # of a sandwich, whose matrices have so many rows
MOST_CONDITION = 1e10


class NoiseContrastiveModule(ObjectiveModule):
    """The loss; its state are log Z, a parameter, and the noise, which is not trained.

    Attributes:
        log_z: the estimate of log Z, a scalar parameter.
    """

    objective: NoiseContrastive
    started: Tensor

    def __init__(self, model: Any, guide: Any, objective: NoiseContrastive) -> None:
        super().__init__(model, guide, objective)
        own = next((t for t in (*self.parameters(), *self.buffers()) if t.dtype.is_floating_point), torch.empty(0))
        self.log_z = nn.Parameter(own.new_zeros(()))
        self.register_buffer("started", torch.tensor(False))
        noise = objective.noise
        self.noise: NoiseModule | None = None  # None until the program's base is looked at
        self.row: Tensor | None  # of data whose support is not the real space: noise may miss it
        self.register_buffer("row", None, persistent=False)
        if isinstance(noise, str):
            self.noise = FittedNormal(noise == "diagonal").to(own)
        elif isinstance(noise, Exact):
            self.noise = FrozenProgram(noise)
        elif isinstance(noise, Distribution):
            self.noise = GivenNoise(noise)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.noise is None and isinstance(self.model, nn.Module):  # made at the first call; what follows fills it
            if (row := state_dict.get(f"{prefix}noise.row")) is not None:
                self.noise = FrozenBase(self.model, row.to(self.log_z.device))
        elif self.noise is None:  # the base of a function is found anew, from the parameters that it then finds
            for name in [name for name in state_dict if name.startswith(f"{prefix}noise.")]:
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def check_structure(self, shape: handlers.Structure) -> None:
        shape.require_data_plate("NoiseContrastive")
        free = [name for name in shape.model_latents if name not in shape.enumerated]
        if free:
            raise handlers.free_latents(free)

    def prepare(self, *batch: Any, **kwargs: Any) -> handlers.Structure:
        x, rows = batch[0], len(batch[0])
        others = [t for t in (*batch[1:], *kwargs.values()) if isinstance(t, Tensor) and t.dim() and len(t) == rows]
        if others or (self.program is not None and self.program.context_shape is not None):
            raise ValueError(
                "NoiseContrastive learns one log Z, and this program has a Z for each context: train p(x | context) by "
                "pg.ScoreMatching or pg.DenoisingScoreMatching, or fix the context in the program"
            )
        shape = super().prepare(*batch, **kwargs)
        if (self.log_z.dtype != x.dtype and x.dtype.is_floating_point) or self.log_z.device != x.device:
            self.log_z.data = self.log_z.data.to(x if x.dtype.is_floating_point else x.device)
        if isinstance(self.noise, FittedNormal):
            self.noise.fit(x)
        site = observing_site(self.model, x[:1], *batch[1:], **kwargs)
        support = support_of(site and site["fn"], x.dim() - 1)
        if site is not None and not is_real(support) and self.row is None:
            self.register_buffer("row", x[:1].detach().clone(), persistent=False)
        if self.noise is None:
            self.noise = self._base(site, x[:1])
        if isinstance(self.noise, GivenNoise) and self.objective.noise is not None:
            self.noise.check_shape(tuple(x.shape[1:]))
        if isinstance(self.objective.noise, str) and support.is_discrete:
            raise ValueError(
                f"noise={self.objective.noise!r} is continuous and the data site is discrete ({support}): give a "
                "discrete distribution, or noise=None for the program's base"
            )
        with torch.no_grad(), scopes.forked_generators(0), poutine.block():
            if not x.is_meta:
                self.noise.check_covers(x, support)
            if not bool(self.started):
                self.started.fill_(True)
                self._start(batch, kwargs, shape)
        return shape

    def initialise(self, x: Tensor, *rest: Any) -> None:
        """Start the program, and fit the noise to these rows, where it is one that is fitted: once."""
        super().initialise(x, *rest)
        if isinstance(self.noise, FittedNormal):
            self.noise.fit(x)

    def _base(self, site: Any, row: Tensor) -> NoiseModule:
        """The program's own base as noise, as it stands now: a base that is trained on would be a moving target."""
        if isinstance(self.program, Unnormalized):
            try:
                with scopes.forked_generators():
                    self.program.target().sample_base(1)
            except (ValueError, NotImplementedError) as error:
                raise ValueError(
                    f"noise=None takes the program's base for noise: {error}; or noise='normal'"
                ) from error
        if site is None:
            raise ValueError(
                "noise=None takes the distribution at the data site for noise, and no site observes x: give "
                "noise='normal' or a distribution"
            )
        if isinstance(self.model, nn.Module):
            return FrozenBase(self.model, row)
        return GivenNoise(handlers.unmasked(site["fn"]))  # its parameters are in the tensors of the site

    def _start(self, batch: tuple[Any, ...], kwargs: dict[str, Any], shape: handlers.Structure) -> None:
        """Set log Z to its importance-sampling estimate: the classifier starts balanced, and the optimizer near."""
        rows = len(batch[0])
        count = START_DRAWS if shape.data_size == shape.rows else rows
        y = self._draw(count, batch[0])
        y, missed = self._inside(y, *batch, **kwargs)
        log_w = self.log_density_rows(y, *batch[1:], **kwargs) - self._noise_log_prob(y)
        log_z = log_mean_exp(log_w.masked_fill(missed, -math.inf))[0]
        if bool(torch.isfinite(log_z)):
            self.log_z.data.fill_(float(log_z))

    def _draw(self, n: int, like: Tensor) -> Tensor:
        """Draws of the noise: ``(n, *event_shape)``."""
        assert self.noise is not None
        return self.noise.draw(n, like)

    def _noise_log_prob(self, x: Tensor) -> Tensor:
        assert self.noise is not None
        return self.noise.log_prob(x)

    def _inside(self, y: Tensor, x: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Draws of the noise, and which of them lie where f is 0; those are moved onto data, where f can be asked."""
        if self.row is None:
            return y, torch.zeros(len(y), dtype=torch.bool, device=y.device)
        missed = outside(support_of(distribution_of_row(self.model, self.row, *rest, **kwargs), y.dim() - 1), y)
        stand_in = x.repeat(-(-len(y) // len(x)), *[1] * (x.dim() - 1))[: len(y)]
        return torch.where(missed.reshape(-1, *[1] * (y.dim() - 1)), stand_in, y), missed

    def _log_odds(self, *batch: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """G at the data, ``(rows,)``, and at as many draws of the noise for each, ``(ratio, rows)``."""
        shape = self.structure or self.prepare(*batch, **kwargs)
        x, rows, ratio = batch[0], len(batch[0]), self.objective.ratio
        with torch.no_grad(), poutine.block():
            y, missed = self._inside(self._draw(ratio * rows, x), *batch, **kwargs)
            log_noise_x, log_noise_y = self._noise_log_prob(x), self._noise_log_prob(y)
        log_f_x = self.log_density_rows(*batch, **kwargs)
        with poutine.block():  # the scale of a row is that of its data; these are other rows
            parts = [y] if shape.data_size == shape.rows else list(y.split(rows))  # a plate of fixed size takes as many
            log_f_y = torch.cat([self.log_density_rows(part, *batch[1:], **kwargs) for part in parts])
        offset = self.log_z + math.log(ratio)
        # a datum that the noise never gives would cost nothing and say nothing of Z: no number, not a wrong one
        odds_x = torch.where(log_noise_x == -math.inf, math.nan, log_f_x - log_noise_x - offset)
        odds_y = (log_f_y - log_noise_y - offset).masked_fill(missed, -math.inf)
        return odds_x, odds_y.reshape(ratio, rows)

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        """The loss of each datum and of the draws of noise that go with it: ``(rows,)``."""
        odds_x, odds_y = self._log_odds(*batch, **kwargs)
        return softplus(-odds_x) + softplus(odds_y).sum(0)

    def log_normalizer(self, *batch: Any, **kwargs: Any) -> Evidence:
        r"""log Z of the program as it now stands, by the parameter that was trained beside it: an estimate.

        Args:
            batch: the training data, for a standard error; without them there is none.

        Returns:
            Evidence: a scalar, of kind ``"estimate"``. The error is that of :math:`\hat c - \log Z(\hat\theta)` for a
            model that can fit the data: of first order by the delta method, from the sandwich covariance of all
            trained parameters at one draw of the noise, and of second order as the module's derivation has it. It is
            None where it cannot be told: the mean gradient of the loss, as the Newton step that is left, stands out of
            these errors (the optimizer has not arrived), there are more than 500 parameters, or the information is
            singular (a network's).
            ``pg.log_normalizer`` then gives a value with its own error.
        """
        value = self.log_z.detach().double().cpu()
        error = None
        if batch:
            error = self._standard_error(*batch, **kwargs)
        return Evidence(value, "estimate", error, label="log Z")

    def _standard_error(self, *batch: Any, **kwargs: Any) -> Tensor | None:
        parameters = [p for p in self.trainable() if p is not self.log_z]
        if sum(p.numel() for p in parameters) > MOST_PARAMETERS:
            return None
        with poutine.block(), scopes.evaluation_mode(self):
            odds_x, odds_y = self._log_odds(*batch, **kwargs)
            everything = torch.cat([odds_x, odds_y.flatten()])
            rows, count = len(odds_x), len(everything)
            found = []
            for i in range(count):  # one backward a row: small models only
                grads = torch.autograd.grad(everything[i], parameters, retain_graph=True, allow_unused=True)
                flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
                found.append(torch.cat([*(g.flatten() for g in flat), odds_x.new_tensor([-1.0])]))
        g = torch.stack(found).double()
        h = torch.sigmoid(everything.detach().double())
        information = (g * (h * (1 - h)).unsqueeze(1)).T @ g / rows
        residual = torch.where(torch.arange(count, device=h.device) < rows, h - 1, h)
        scores = (residual.unsqueeze(1) * g).reshape(-1, rows, g.shape[1]).sum(0)  # of each row's loss
        spread = torch.cov(scores.T, correction=0).reshape(g.shape[1], -1)
        if _condition(information) > MOST_CONDITION:
            return None
        bread = torch.linalg.inv(information)
        covariance, step = bread @ spread @ bread / rows, bread @ scores.mean(0)  # step: what Newton would still go
        contrast = -g[:rows].mean(0)  # of c − log Z(θ): ∇ log Z = E_p[∇ log f], and the last entry of g is −1
        p, ratio = g.shape[1] - 1, self.objective.ratio
        second = p * (p + 2) / (ratio * rows) ** 2
        error: Tensor = (contrast @ covariance @ contrast + second).sqrt()
        arrived = bool((contrast @ step).abs() <= 2 * error) and _is_zero(step[:-1], covariance[:-1, :-1])
        return error.cpu() if arrived else None


def _condition(matrix: Tensor) -> float:
    """The condition number of a covariance or information, in whatever units its rows are."""
    scale = matrix.diagonal().sqrt()
    if not bool((scale > 0).all()):
        return math.inf
    return float(torch.linalg.cond(matrix / torch.outer(scale, scale)))


def _is_zero(mean: Tensor, covariance: Tensor) -> bool:
    """Whether a vector is 0 within its covariance: χ² of as many degrees of freedom within 4 deviations."""
    if not len(mean):
        return True
    if _condition(covariance) > MOST_CONDITION:
        return False
    square = float(mean @ torch.linalg.solve(covariance, mean))
    return square <= len(mean) + 4 * math.sqrt(2 * len(mean))


class NoiseContrastive(Objective[Unnormalized]):
    r"""Noise-contrastive estimation: telling data from noise of known density; log Z is a parameter, ``module.log_z``.

    Args:
        noise: what the data are told from: ``"normal"``, with mean and covariance of the data (``"diagonal"`` without
            correlations), fitted once: by ``fit`` to all training rows, else to the first batch; a distribution of
            one datum with ``log_prob`` and ``sample``; a program of kind `Exact` such as a flow, of which a frozen copy
            is taken; None for the distribution at the program's data site. Noise near the data tells most.
        ratio: ν, draws of noise for each datum, new ones at each call. More of them lessen the variance, towards that
            of maximum likelihood.

    Raises:
        ValueError: for ``ratio`` below 1; at the first call for noise of another shape, noise without mass where data
            are, a program conditioned on a context (each has its own Z), a free latent site, no plate over rows.
        TypeError: for noise whose density is not known.

    References:
        M. Gutmann, A. Hyvärinen, "Noise-contrastive estimation of unnormalized statistical models, with applications to
        natural image statistics", JMLR 13, 2012, eqs. 3 to 8, theorem 3.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1).mask(False), obs=x)
        ...         pyro.factor("energy", -x.square().sum(-1) / 2)
        >>> loss = NoiseContrastive(dist.Normal(torch.zeros(1), 1.0).to_event(1))(model)
        >>> _ = loss(torch.randn(10, 1))
        >>> loss.log_normalizer()      # ½ log 2π: noise of the model's own shape tells it exactly
        Evidence(≈ 0.9189)
    """

    needs = (Unnormalized,)
    loss_is = "generalized"
    module_class = NoiseContrastiveModule

    def __init__(self, noise: Noise = "normal", ratio: int = 1) -> None:
        super().__init__()
        self.ratio = check_count(ratio, "ratio")
        self.noise = checked(noise)

    def settings(self) -> dict[str, Any]:
        named = self.noise if self.noise is None or isinstance(self.noise, str) else describe(self.noise)
        return {"noise": named, "ratio": self.ratio}
