"""A loss of two players, for tests: a bound, and a critic that learns to predict it row by row."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen.base import Bounded, ObjectiveModule
from pyro_gen.objectives.elbo import ELBOModule


class GameModule(ELBOModule):
    leaks: ClassVar[bool] = False

    def __init__(self, model: Any, guide: Any, objective: Any) -> None:
        super().__init__(model, guide, objective)
        self.critic = nn.Linear(3, 1)
        nn.init.constant_(self.critic.weight, 0.1)
        nn.init.zeros_(self.critic.bias)
        self.__dict__["pair"] = nn.ModuleList([model, guide])

    @property
    def players(self) -> tuple[nn.Module, ...]:
        return self.__dict__["pair"], self.critic

    def losses(self, *batch: Any, total: int | None = None, **kwargs: Any) -> tuple[Tensor, ...]:
        scale = 1 if total is None else total / len(batch[0])
        rows = self.pointwise(*batch, **kwargs)
        target = rows if self.leaks else rows.detach()
        return scale * rows.sum(), scale * (self.critic(batch[0]).squeeze(-1) - target).square().sum()

    def forward(self, *batch: Any, total: int | None = None, **kwargs: Any) -> Tensor:
        with self.scaled(*batch, total=None, apply=False, **kwargs):
            return sum(self.losses(*batch, total=total, **kwargs), start=batch[0].new_zeros(()))


class LeakyModule(GameModule):
    """The critic's loss moves the pair too."""

    leaks = True


class Game(pg.ELBO):
    needs = (Bounded,)
    loss_is = "game"
    module_class: ClassVar[type[ObjectiveModule]] = GameModule


class LeakyGame(Game):
    module_class = LeakyModule
