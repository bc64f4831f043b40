"""torchebm: its losses and samplers as documented, on an energy wrapped into its `BaseModel`.

Contrastive divergence leaves out its penalty of energy² (``energy_reg_weight``, .001 unless set), and the exact loss
takes ``hessian_method="exact"``: the other one, ``"approx"``, is another function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchebm.core import BaseModel
from torchebm.losses import ContrastiveDivergence, DenoisingScoreMatching, ScoreMatching, SlicedScoreMatching
from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics

from energies.contract import SIGMA, Case, Moves


class Model(BaseModel):
    """An energy of one value a row, as torchebm wants it."""

    def __init__(self, net: nn.Module, dtype: Any) -> None:
        super().__init__(dtype=dtype)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        e: Tensor = self.net(x)
        return e.squeeze(-1)


def loss(case: Case, net: nn.Module, x: Tensor, options: dict[str, Any]) -> Callable[[], Tensor]:
    model, dtype = Model(net, x.dtype), x.dtype
    if case == "cd":
        moves = Moves(steps=10)
        sampler = LangevinDynamics(model, step_size=moves.step_size, dtype=dtype)
        settings = {"energy_reg_weight": 0.0} | options
        divergence = ContrastiveDivergence(model, sampler, k_steps=moves.steps, dtype=dtype, **settings)
        return lambda: divergence(x)[0]
    made: dict[str, Callable[[], Any]] = {
        "exact": lambda: ScoreMatching(model, dtype=dtype, **({"hessian_method": "exact"} | options)),
        "sliced": lambda: SlicedScoreMatching(model, dtype=dtype, **({"n_projections": 1} | options)),
        "denoising": lambda: DenoisingScoreMatching(model, noise_scale=SIGMA, dtype=dtype),
    }
    objective = made[case]()
    return lambda: objective(x)


def chains(case: Case, net: nn.Module, start: Tensor, moves: Moves) -> Callable[[], Tensor]:
    model, dtype = Model(net, start.dtype), start.dtype
    sampler: Any
    if case == "langevin":
        sampler = LangevinDynamics(model, step_size=moves.step_size, dtype=dtype)
    else:
        sampler = HamiltonianMonteCarlo(model, step_size=moves.step_size, n_leapfrog_steps=moves.leapfrog, dtype=dtype)
    return lambda: sampler.sample(x=start, n_steps=moves.steps)
