"""pyro_gen: `pg.Flow`, which has the two forms and both mixings by name; its own activation is silu."""

from __future__ import annotations

from contract import Specification
from torch import Tensor, nn

import pyro_gen as pg


class Flow(nn.Module):
    def __init__(self, program: pg.Flow) -> None:
        super().__init__()
        self.program = program

    def log_prob(self, x: Tensor) -> Tensor:
        return self.program.log_prob(x)

    def sample(self, n: int) -> Tensor:
        return self.program.distribution().sample((n,))

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        return self.program.distribution().rsample_and_log_prob((n,))

    def objective(self, x: Tensor) -> nn.Module:
        """Maximum likelihood as `pg.fit` has it, ready for rows like x."""
        module = pg.MaximumLikelihood()(self.program)
        module.prepare(x)
        return module


def build(s: Specification) -> nn.Module:
    # the rows of the benchmarks are standardised for every library alike
    return Flow(
        pg.Flow(
            s.features,
            "spline_autoregressive" if s.form == "autoregressive" else "spline_coupling",
            s.layers,
            s.widths,
            direction=s.direction,
            standardise=False,
            mixing=s.mixing,
            bins=s.bins,
            bound=s.bound,
            activation="silu" if s.activation == "default" else s.activation,
        )
    )
