r"""Adversarial training (Goodfellow et al. 2014): a critic learns the density ratio that Z would have given.

The model :math:`z \sim p(z),\ x = G_\theta(z)` has draws and no density. All that a likelihood would say of a datum, as
against a draw, is the ratio of the two densities, and that a classifier learns from rows alone: with logit ℓ,

.. math:: L_D(\phi) = E_{data}[\log(1 + e^{-\ell(x)})] + E_{model}[\log(1 + e^{\ell(x)})]
          \quad\Rightarrow\quad \ell^*(x) = \log \frac{p_{data}(x)}{p_\theta(x)} .

The generator then moves its draws to where the ratio is high, :math:`L_G(\theta) = E_{model}[\log(1 + e^{-\ell(x)})]`.
At :math:`p_\theta = p_{data}` the logit is 0 and neither can gain. ``divergences.py`` has the other games, among them
the f-divergences; ``penalties.py`` what makes the game settle.

*Two players, one backward.* The critic sees draws that are cut from the generator, the generator a critic whose
parameters are held: the gradient of each loss reaches its own player alone, so one graph serves both, and both move at
once. ``critic_steps`` lets the generator move at every k-th step only; two time scales are two learning rates,
``fit(..., optimizer=[slow, fast])``.

*Latents* (BiGAN, ALI: Donahue et al. 2017, Dumoulin et al. 2017). If the guide draws the model's latents given x, the
critic sees pairs: of data with latents from the guide, of draws with the latents they were made of. Where it cannot
tell them apart the joint distributions agree, and the guide is the posterior :math:`p_\theta(z \mid x)`.

The value of a game ranks no weights: judge draws by two-sample scores on rows that were not trained on.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.func import functional_call

from pyro_gen import handlers, scopes
from pyro_gen.base import Implicit, Objective, ObjectiveModule
from pyro_gen.checks import check_count, describe
from pyro_gen.objectives import penalties
from pyro_gen.objectives.divergences import LossName, game

__all__ = ["Adversarial"]

Latents = dict[str, Tensor]


class Draws(Messenger):
    """Runs a program with its data drawn anew, or with latents given, and keeps what its sites then hold.

    Args:
        given: values of latents by name.
        unobserve: whether observed sites are drawn.
    """

    def __init__(self, given: Latents | None = None, unobserve: bool = False) -> None:
        super().__init__()
        self.given, self.unobserve = given or {}, unobserve
        self.observed: dict[str, Any] = {}
        self.drawn: Latents = {}

    def _pyro_sample(self, msg: Any) -> None:
        kind = handlers.site_kind(msg)
        if kind == "observed" and self.unobserve:
            self.observed[msg["name"]] = msg["value"]
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
        elif kind == "latent" and msg["name"] in self.given:
            msg["value"], msg["done"] = self.given[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.observed or handlers.site_kind(msg) == "latent":
            self.drawn[msg["name"]] = msg["value"]


class AdversarialModule(ObjectiveModule):
    """The two losses; players are the generator (with the encoder, where the guide has one) and the critic."""

    objective: Adversarial
    average = 0.995

    def __init__(self, model: Any, guide: Any, objective: Adversarial) -> None:
        super().__init__(model, guide, objective)
        for name, part, what in (("model", model, "a generator"), ("guide", guide, "a critic")):
            if not isinstance(part, nn.Module):
                raise TypeError(
                    f"Adversarial moves the parameters of {name}, {what}, apart from those of the other, so it has to "
                    f"be a module, got {describe(part)}"
                )

    @property
    def players(self) -> tuple[nn.Module, ...]:
        encoder = getattr(self.guide, "encoder", None)
        if not isinstance(encoder, nn.Module):
            return self.model, self.guide
        critic = [part for name, part in self.guide.named_children() if name != "encoder"]
        return nn.ModuleList([self.model, encoder]), nn.ModuleList(critic)

    @property
    def periods(self) -> tuple[int, ...]:
        return self.objective.critic_steps, 1

    def check_structure(self, shape: handlers.Structure) -> None:
        shape.require_data_plate("Adversarial")
        foreign = [name for name in shape.guide_latents if name not in shape.model_latents]
        if foreign or (shape.guide_latents and not isinstance(getattr(self.guide, "encoder", None), nn.Module)):
            named = ", ".join(map(repr, foreign or shape.guide_latents))
            raise ValueError(
                f"the guide draws {named}"
                + (
                    f", which the model (of latents {', '.join(map(repr, shape.model_latents)) or 'none'}) does not"
                    if foreign
                    else ": the module that does has to be its attribute `encoder`, as it moves with the generator"
                )
            )
        if not shape.reparameterized:
            named = ", ".join(map(repr, shape.guide_latents))
            raise ValueError(f"the encoder learns through its draws, and {named} is drawn without rsample")

    def prepare(self, *batch: Any, **kwargs: Any) -> handlers.Structure:
        if self.objective.penalised:
            penalties.refuse_batch_norm(self.guide)
        if not pyro.settings.get("module_local_params"):
            for name, part in self.guide.named_modules():
                if isinstance(part, PyroModule) and [*part._parameters, *getattr(part, "_pyro_params", ())]:
                    raise ValueError(
                        f"the critic's PyroModule {name or 'guide'!r} reads its parameters from the global store, "
                        "where they cannot be held for the generator's loss: use plain torch modules, or build and "
                        "train it under pyro.settings.context(module_local_params=True)"
                    )
        shape = super().prepare(*batch, **kwargs)
        if self.__dict__["store_parameters"]:
            raise ValueError(
                "pyro.param statements outside of modules belong to no player: hold those parameters in the modules of "
                "generator and critic"
            )
        with torch.no_grad(), scopes.preserved_state(self.model, self.guide):
            made, _ = self._generate(batch, kwargs)
            self._logits(made, {}, batch[1:], kwargs)
        return shape

    # ------------------------------------------------------------------------------------------------- the two players
    def _generate(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Latents]:
        """Draws of the model, as many as there are data, and the latents they were made of."""
        x = batch[0]
        with Draws(unobserve=True) as run:
            returned = self.model(*batch, **kwargs)
        names = [n for n, held in run.observed.items() if held is x] or list(run.observed)
        made = run.drawn[names[0]] if len(names) == 1 else returned
        if not isinstance(made, Tensor) or made.numel() != x.numel():
            given = tuple(made.shape) if isinstance(made, Tensor) else describe(made)
            raise ValueError(
                f"the model must give draws of x, of shape {tuple(x.shape)}: observe x in a site (obs=x) or return "
                f"them; got {given}"
            )
        assert self.structure is not None
        kept = {n: z for n, z in run.drawn.items() if n in self.structure.guide_latents}
        return made.reshape(x.shape), kept

    def _logits(self, x: Tensor, given: Latents, rest: Any, kwargs: Any, held: bool = False) -> Tensor:
        """The critic's logit of each row, ``(rows,)``; ``held`` lets gradients through it and not into it."""
        with Draws(given):
            if held:
                parameters = {name: p.detach() for name, p in self._critic_parameters().items()}
                out = functional_call(self.guide, parameters, (x, *rest), kwargs)
            else:
                out = self.guide(x, *rest, **kwargs)
        return as_logits(out, len(x))

    def _critic_parameters(self) -> dict[str, Tensor]:
        """The guide's parameters by name, less those of an encoder."""
        own = {id(p) for p in self.players[1].parameters()}
        return {name: p for name, p in self.guide.named_parameters() if id(p) in own}

    def _slopes(self, x: Tensor, given: Latents, rest: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        """Logits of rows, and their gradients in x and in the latents beside it, flat: ``(rows, features)``."""

        def total(point: tuple[Tensor, Latents]) -> tuple[Tensor, Tensor]:
            logits = self._logits(*point, rest, kwargs)
            return logits.sum(), logits

        (in_x, in_latents), logits = torch.func.grad(total, has_aux=True)((x, given))
        scale = getattr(self.guide, "scale", None)
        if isinstance(scale, Tensor):
            in_x = in_x * scale
        return logits, torch.cat([in_x.flatten(1), *(g.flatten(1) for g in in_latents.values())], 1)

    def rows(self, *batch: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss of each row for generator and critic, unscaled: ``(rows,)`` each."""
        shape = self.structure or self.prepare(*batch, **kwargs)
        (x, *rest), objective, joint = batch, self.objective, bool(shape.guide_latents)
        play = game(objective.loss)
        made, of_made = self._generate(batch, kwargs)
        fake, of_fake = made.detach(), {name: z.detach() for name, z in of_made.items()}
        of_real: Latents = {}
        encoded: Tensor | None = None
        if joint:
            with Draws() as run:
                encoded = self._logits(x, {}, rest, kwargs, held=True)
            of_real = {name: run.drawn[name].detach() for name in shape.guide_latents}

        penalty: Any = 0.0
        if objective.r1:
            real_logits, slope = self._slopes(x, of_real, rest, kwargs)
            penalty = penalty + objective.r1 * penalties.square(slope)
        else:
            real_logits = self._logits(x, of_real, rest, kwargs)
        if objective.r2:
            fake_logits, slope = self._slopes(fake, of_fake, rest, kwargs)
            penalty = penalty + objective.r2 * penalties.square(slope)
        else:
            fake_logits = self._logits(fake, of_fake, rest, kwargs)
        if objective.gradient_penalty:
            share = penalties.shares(x)
            middle = {name: penalties.between(of_real[name], z, share) for name, z in of_fake.items()}
            _, slope = self._slopes(penalties.between(x, fake, share), middle, rest, kwargs)
            penalty = penalty + objective.gradient_penalty * penalties.towards_one(slope)
        critic = play.critic(real_logits, fake_logits) + penalty

        judged = self._logits(made, of_made, rest, kwargs, held=True)
        generator = play.generator(real_logits.detach() if encoded is None else encoded, judged, joint)
        return generator, critic

    def pointwise(self, *batch: Any, **kwargs: Any) -> Tensor:
        """The sum of both players' losses of each row: ``(rows,)``."""
        generator, critic = self.rows(*batch, **kwargs)
        return generator + critic

    def losses(self, *batch: Any, total: int | None = None, **kwargs: Any) -> tuple[Tensor, ...]:
        """The loss of the generator and that of the critic."""
        with self.scaled(*batch, total=total, apply=False, **kwargs) as seen:
            rows = self.rows(*batch, **kwargs)
        factor = seen.factor(handlers.count_rows(batch, 1))
        return tuple(cast(Tensor, (factor * part).sum()) for part in rows)

    @torch.no_grad()
    def log_ratio(self, *batch: Any, **kwargs: Any) -> Tensor:
        r"""What the critic takes :math:`\log p_{data}(x) / p_\theta(x)` for, in nats: ``(rows,)``.

        With an encoder it is the ratio of joint densities, at latents drawn for x.

        Raises:
            TypeError: for losses whose critic does not estimate it.
        """
        ratio = game(self.objective.loss).log_ratio
        if ratio is None:
            raise TypeError(
                f"the critic of loss={self.objective.loss!r} estimates no density ratio: train by 'non_saturating', "
                "'relativistic' (up to a constant) or a divergence such as 'kl'"
            )
        if self.structure is None:
            self.prepare(*batch, **kwargs)
        with scopes.evaluation_mode(self):
            return ratio(self._logits(batch[0], {}, batch[1:], kwargs))


def as_logits(out: Any, rows: int) -> Tensor:
    """What a critic gave, as one logit a row; a ``ValueError`` that says what it gave otherwise."""
    if isinstance(out, Tensor) and tuple(out.shape) in ((rows,), (rows, 1)):
        return out.reshape(rows)
    given = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else describe(out)
    hint = " (two outputs are the logits of two classes: their difference is the one)" if _two(out, rows) else ""
    raise ValueError(f"the critic must give one logit a row, of shape ({rows},) or ({rows}, 1), got {given}{hint}")


def _two(out: Any, rows: int) -> bool:
    return isinstance(out, Tensor) and tuple(out.shape) == (rows, 2)


class Adversarial(Objective[Implicit]):
    r"""Adversarial training of a generator and a critic: the density ratio is learnt in place of Z.

    Args:
        loss: what the players pay: ``"non_saturating"``, ``"minimax"``, ``"least_squares"``, ``"hinge"``,
            ``"wasserstein"``, ``"relativistic"`` (pairing), or a divergence of data from model that the generator
            lowers: ``"kl"``, ``"reverse_kl"`` (of model from data), ``"jensen_shannon"``, ``"chi2"``.
        r1: γ of :math:`\tfrac\gamma2 |\nabla_x \ell|^2` on data; r2: of the same on draws.
        gradient_penalty: γ of :math:`\tfrac\gamma2 (|\nabla_x \ell| - 1)^2` between data and draws (20 is its paper's
            λ = 10). Gradients are per unit of the critic's input: of x, or of x over a buffer ``guide.scale``, which
            `GAN` has for its own critic, so that a γ means the same whatever the units of the data.
        critic_steps: steps of the critic for each of the generator, in ``fit``.

    Called with a program of kind `Implicit`, or with a generator and a critic: modules called as ``generator(*batch)``,
    a Pyro program that observes or returns draws, and ``critic(*batch)``, one logit a row. A guide that draws latents
    holds what draws them as its attribute ``encoder``. ``losses`` are those of generator and critic.

    Raises:
        ValueError: for unknown losses, weights below 0, ``critic_steps`` below 1; at the first call for a critic that
            gives no single logit a row, or batch normalisation under a penalty.
        TypeError: for a program of known density, or a generator or critic that is no module.

    References:
        I. Goodfellow et al., "Generative adversarial nets", 2014, arXiv:1406.2661, eq. 1 and proposition 1.
        S. Nowozin, B. Cseke, R. Tomioka, "f-GAN", 2016, arXiv:1606.00709, eq. 4.
        L. Mescheder, A. Geiger, S. Nowozin, "Which training methods for GANs do actually converge?", 2018,
        arXiv:1801.04406, eqs. 9 and 10. I. Gulrajani et al., "Improved training of Wasserstein GANs", 2017,
        arXiv:1704.00028, eq. 3. N. Huang et al., "The GAN is dead; long live the GAN!", 2024, arXiv:2501.05441, eq. 2.

    Example:
        >>> import torch
        >>> from pyro_gen.programs.gan import GAN
        >>> loss = Adversarial("relativistic", r1=0.1, r2=0.1)(GAN(2, latent_dim=2))
        >>> [tuple(part.shape) for part in loss.losses(torch.randn(8, 2))]      # of the generator, of the critic
        [(), ()]
    """

    needs = (Implicit,)
    loss_is = "game"
    takes = "continuous"
    module_class: ClassVar[type[ObjectiveModule]] = AdversarialModule

    def __init__(
        self,
        loss: LossName = "non_saturating",
        *,
        r1: float = 0.0,
        r2: float = 0.0,
        gradient_penalty: float = 0.0,
        critic_steps: int = 1,
    ) -> None:
        super().__init__()
        game(loss)
        for name, value in (("r1", r1), ("r2", r2), ("gradient_penalty", gradient_penalty)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, the weight γ, got {describe(value)}")
        self.loss: LossName = loss  # type: ignore[assignment]
        self.r1, self.r2, self.gradient_penalty = r1, r2, gradient_penalty
        self.critic_steps = check_count(critic_steps, "critic_steps")

    @property
    def penalised(self) -> bool:
        """Whether a loss has gradients of the critic in it."""
        return bool(self.r1 or self.r2 or self.gradient_penalty)

    def settings(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "r1": self.r1,
            "r2": self.r2,
            "gradient_penalty": self.gradient_penalty,
            "critic_steps": self.critic_steps,
        }
