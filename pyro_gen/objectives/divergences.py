r"""The losses of adversarial games, each as what critic and generator pay for the logit of a row.

The critic gives a logit ℓ(x). Data p pay ``critic_real`` and draws of the model q pay ``critic_fake``; the generator
pays ``generator_fake``, and, where the critic sees latents that an encoder drew for the data, ``generator_real`` too.

*Variational divergences* (Nguyen, Wainwright & Jordan 2010; Nowozin et al. 2016). For a convex f with f(1) = 0 and its
conjugate :math:`f^*(t) = \sup_u\, (u t - f(u))`,

.. math:: D_f(p \,\|\, q) = E_q[f(p / q)] \;\ge\; E_p[T(x)] - E_q[f^*(T(x))], \qquad
          \text{equal at } T = f'(p / q) .

All of them are written here in :math:`T = f'(e^{\ell})`, so that for each the best logit is the log density ratio,
:math:`\ell = \log p/q`, the critic's loss is minus a lower bound on the divergence, and the generator lowers the bound.
With :math:`f^*(f'(u)) = u f'(u) - f(u)` nothing but f is needed:

================== =============================== ====================== ====================================
name               f(u)                            T                      f*(T)
================== =============================== ====================== ====================================
KL(p ‖ q)          u log u                         1 + ℓ                  e^ℓ
KL(q ‖ p)          −log u                          −e^−ℓ                  ℓ − 1
Jensen–Shannon     ½ (u log u − (u+1) log ½(u+1))  ½ (log 2 + log σ(ℓ))   −½ (log 2 + log σ(−ℓ))
χ²(p ‖ q)          (u − 1)²                        2 (e^ℓ − 1)            e^2ℓ − 1
================== =============================== ====================== ====================================

The others: *minimax* is Jensen–Shannon, doubled and shifted by log 4; *non-saturating* swaps the generator's labels
(same optimum, gradients that do not vanish where the critic is sure); *least squares* regresses labels, with optimum
:math:`\ell = p / (p + q)`; *hinge* and *Wasserstein* give no ratio; *relativistic pairing* classifies which of two rows
is the datum, :math:`\log \sigma(\ell(x) - \ell(y))`, which determines log p/q up to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from pyro_gen.checks import describe

__all__ = ["GAMES", "Game", "LossName", "game"]

LossName = Literal[
    "non_saturating",
    "minimax",
    "least_squares",
    "hinge",
    "wasserstein",
    "relativistic",
    "kl",
    "reverse_kl",
    "jensen_shannon",
    "chi2",
]
OfLogit = Callable[[Tensor], Tensor]


class Game(NamedTuple):
    """What the two players pay for a logit, row by row.

    Attributes:
        critic_real, critic_fake: of the critic, for the logit of a datum and of a draw of the model; minimised.
        generator_fake: of the generator, for the logit of a draw; minimised.
        generator_real: of the encoder, for the logit of a datum and the latents drawn for it.
        log_ratio: log p/q from the logit that is best for the critic; None where the loss does not tell it.
        paired: whether losses are of differences of logits, real less fake: ``critic_real`` and ``generator_fake`` (of
            fake less real) alone.
    """

    critic_real: OfLogit
    critic_fake: OfLogit
    generator_fake: OfLogit
    generator_real: OfLogit
    log_ratio: OfLogit | None = None
    paired: bool = False

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        """The critic's loss of each row: ``(rows,)``."""
        if self.paired:
            return self.critic_real(real - fake)
        return self.critic_real(real) + self.critic_fake(fake)

    def generator(self, real: Tensor, fake: Tensor, joint: bool = False) -> Tensor:
        """The generator's loss of each row: ``(rows,)``; ``joint`` where the logits of data move with it too."""
        if self.paired:
            return self.generator_fake(fake - real)
        return self.generator_fake(fake) + self.generator_real(real) if joint else self.generator_fake(fake)


def _same(logit: Tensor) -> Tensor:
    return logit


def _minus(logit: Tensor) -> Tensor:
    return -logit


def _of_shares(logit: Tensor) -> Tensor:
    """log p/q of ℓ = p / (p + q); infinite from 0 and from 1 on."""
    return torch.logit(logit.clamp(0, 1))


def _variational(t: OfLogit, conjugate: OfLogit) -> Game:
    """The game of an f-divergence, from T(ℓ) and f*(T(ℓ))."""
    return Game(lambda v: -t(v), conjugate, lambda v: -conjugate(v), t, _same)


def _squared(target: float) -> OfLogit:
    return lambda v: (v - target).square() / 2


def _log_sigmoid(v: Tensor) -> Tensor:
    return -softplus(-v)


_classify: tuple[OfLogit, OfLogit] = (lambda v: softplus(-v), lambda v: softplus(v))

GAMES: dict[str, Game] = {
    "minimax": Game(*_classify, lambda v: -softplus(v), _log_sigmoid, _same),
    "non_saturating": Game(*_classify, *_classify, _same),
    "least_squares": Game(_squared(1.0), _squared(0.0), _squared(1.0), _squared(0.0), _of_shares),
    "hinge": Game(lambda v: relu(1 - v), lambda v: relu(1 + v), _minus, _same),
    "wasserstein": Game(_minus, _same, _minus, _same),
    "relativistic": Game(*_classify, *_classify, _same, paired=True),
    "kl": _variational(lambda v: 1 + v, torch.exp),
    "reverse_kl": _variational(lambda v: -torch.exp(-v), lambda v: v - 1),
    "jensen_shannon": _variational(
        lambda v: (math.log(2) + _log_sigmoid(v)) / 2, lambda v: -(math.log(2) + _log_sigmoid(-v)) / 2
    ),
    "chi2": _variational(lambda v: 2 * torch.expm1(v), lambda v: torch.expm1(2 * v)),
}


def game(name: LossName) -> Game:
    """The losses of this name.

    Raises:
        ValueError: for a name that is none of them.
    """
    if not isinstance(name, str) or name not in GAMES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, get_args(LossName)))}; got {describe(name)}")
    return GAMES[name]
