"""pyro_gen: `pg.Flow`, which has the two forms and both mixings by name. Its activation is silu.

For the rows with ReLU, which `pg.Flow` has no option for, its bijection is put together from the layers.
"""

from __future__ import annotations

from contract import Specification
from torch import Tensor, nn
from torch.nn.functional import relu

import pyro_gen as pg
from pyro_gen.transforms import Bijection, Compose, Flip, MaskedAutoregressive, Spline


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
    if s.activation == "default":
        return Flow(
            pg.Flow(
                s.features,
                "spline_autoregressive" if s.form == "autoregressive" else "spline_coupling",
                s.layers,
                (s.hidden, s.hidden),
                direction=s.direction,
                standardise=False,
                mixing=s.mixing,
                bins=s.bins,
                bound=s.bound,
            )
        )
    if (s.form, s.mixing, s.direction) != ("autoregressive", "flip", "density"):
        raise ValueError(f"with ReLU there is the plain autoregressive flow alone, not {s}")
    parts: list[Bijection] = []
    for i in range(s.layers):
        layer = MaskedAutoregressive(Spline(s.bins, s.bound), s.features, (s.hidden, s.hidden), activation=relu)
        parts += [Flip(s.features), layer] if i else [layer]
    return Flow(pg.Flow(s.features, Compose(parts), standardise=False))
