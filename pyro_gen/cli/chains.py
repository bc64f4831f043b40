"""Draws of a program that can only be sampled by Markov chains, and how far the chains have mixed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyro_gen.cli.errors import BadInput
from pyro_gen.cli.families.ebm import broad_start

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_gen.base import Program

__all__ = ["SAMPLERS", "Walk", "is_unnormalized"]

SAMPLERS = ("hmc", "mala", "langevin", "gibbs")
MIXED = 1.01  # R-hat above which chains have not (Vehtari et al. 2021)
MOST_CHAINS = 256  # that are run when nobody says how many


def is_unnormalized(program: Program) -> bool:
    """Whether the density is known up to Z only, so that draws take chains."""
    from pyro_gen.base import Exact, Unnormalized

    return isinstance(program, Unnormalized) and not isinstance(program, Exact)


@dataclass(frozen=True)
class Walk:
    """How chains are run: ``warmup`` steps, then ``draws`` more, from which R-hat and effective sizes are told."""

    sampler: str | None = None
    chains: int | None = None
    warmup: int = 500
    draws: int = 200
    step_size: float | None = None
    progress: bool | None = False

    def rows(self, program: Any, n: int, context: Tensor | None, seed: int) -> tuple[Tensor, str]:
        """So many rows, and a line on the chains they come from.

        Each chain gives its last draw or, where there are fewer chains than rows, several at even distances. With a
        context each row has a chain, on a density of its own.
        """
        import torch

        discrete = program.target(None if context is None else context[0]).support.is_discrete
        count = min(n, MOST_CHAINS) if self.chains is None else min(self.chains, n)
        if context is not None:
            if self.chains is not None and self.chains != n:
                raise BadInput(
                    "--chains has no use for a conditional model, which takes one for each row: leave it out"
                )
            count = n
        each = -(-n // count)
        if each > self.draws:
            raise BadInput(f"-n {n} from {count} chains of {self.draws} draws each: give more --chains or more --draws")
        sampler = self.make(count, discrete)
        base = broad_start(program)
        start = None
        if base is not None:
            from pyro_gen import scopes

            with scopes.forked_generators(seed):
                start = base.sample((count,))
        found = sampler.run(
            program, draws=self.draws, warmup=self.warmup, start=start, context=context, seed=seed,
            progress=self.progress,
        )  # fmt: skip
        kept = torch.linspace(self.draws - 1, 0, each + 1).round().long()[:-1].flip(0) if each > 1 else [-1]
        return found.x[:, kept].flatten(0, 1)[:n], self.said(found, alike=context is None)

    def make(self, chains: int, discrete: bool) -> Any:
        """The sampler that the options name."""
        import pyro_gen as pg

        name = self.sampler or ("gibbs" if discrete else "hmc")
        if name not in SAMPLERS:
            raise BadInput(f"--sampler must be {', '.join(SAMPLERS[:-1])} or {SAMPLERS[-1]}, got {name!r}")
        if (name == "gibbs") != discrete:
            holds = "zeros and ones: take gibbs" if discrete else "real numbers: take hmc, mala or langevin"
            raise BadInput(f"--sampler {name} cannot move on the data of this run, {holds}")
        if name == "gibbs":
            if self.step_size is not None:
                raise BadInput("--step-size belongs to hmc, mala and langevin: leave it out")
            return pg.Gibbs(chains=chains)
        if name == "langevin":
            return pg.Langevin(chains=chains, step_size=0.1 if self.step_size is None else self.step_size)
        if not self.warmup and self.step_size is None:
            raise BadInput("--warmup 0 leaves no steps to find the step size in: give some hundred, or --step-size")
        kind: Any = pg.HMC if name == "hmc" else pg.MALA
        return kind(chains=chains, step_size=self.step_size)

    def said(self, found: Any, *, alike: bool) -> str:
        """What the chains were, and whether they agree."""
        import torch

        chains, draws = found.x.shape[:2]
        name = type(found.sampler).__name__
        text = f"{chains} chains of {name}, {found.warmup} steps of warm-up and {draws} draws each"
        if found.sampler.acceptance_aim is not None:
            text += f", acceptance {float(found.acceptance.mean()):.2f} at step size {found.step_size:.3g}"
        if not alike or draws < 4:
            return text
        moving = torch.isfinite(found.r_hat)  # a value that never changes has none
        still = int((~moving).sum())
        worst = float(found.r_hat[moving].max()) if still < moving.numel() else math.nan
        least = float(found.ess[moving].min()) if still < moving.numel() else 0.0
        text += f": worst R-hat {worst:.3f}, least effective sample size {least:.0f}"
        if still:
            text += f" ({still} values never changed)"
        if not worst <= MIXED:
            text += f"; above {MIXED} the chains do not agree yet: more --warmup or --draws"
        return text
