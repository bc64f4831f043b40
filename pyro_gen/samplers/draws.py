"""What a run of chains gave: the draws, and what is needed to judge them and to go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_gen.base import State
from pyro_gen.statistics import chain_ess, r_hat

__all__ = ["Draws", "Summary"]


@dataclass(frozen=True, repr=False)
class Summary:
    """Moments of each coordinate over all draws, and how well the chains know them; each of ``event_shape``.

    Attributes:
        mean: over chains and draws; sd: standard deviation.
        mcse_mean: Monte Carlo standard error of the mean, sd / √ESS.
        ess_bulk: effective number of independent draws for the centre of the distribution.
        ess_tail: likewise for its 5 % and 95 % quantiles.
        r_hat: how much the chains disagree, 1 for not at all; above 1.01 they have not mixed.
    """

    mean: Tensor
    sd: Tensor
    mcse_mean: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    r_hat: Tensor

    def __repr__(self) -> str:
        rows = torch.stack([getattr(self, name).flatten() for name in self.__dataclass_fields__], 1).tolist()
        head = "          " + "".join(f"{name:>11}" for name in self.__dataclass_fields__)
        lines = [f"x[{i}]".ljust(10) + "".join(f"{v:11.4g}" for v in row) for i, row in enumerate(rows[:20])]
        more = [f"... {len(rows) - 20} more"] if len(rows) > 20 else []
        return "\n".join([head, *lines, *more])


@dataclass(frozen=True, repr=False)
class Draws:
    """Draws of x along (chain, draw), in the support.

    Attributes:
        x: ``(chains, draws, *event_shape)``.
        log_density: log f of each, ``(chains, draws)``, in nats up to log Z.
        acceptance: acceptance probability of the step that led there; 1 where nothing is rejected.
        diverging: whether a proposal on the way there was not finite or lost too much energy.
        step_size: at which the draws were made; warmup: steps before the first draw.
        sampler: what made them.
        state: where the chains stand: ``sampler.run(program, start=draws)`` goes on.
    """

    x: Tensor
    log_density: Tensor
    acceptance: Tensor
    diverging: Tensor
    step_size: float
    warmup: int
    sampler: Any
    state: State = field(repr=False)

    def __len__(self) -> int:
        return self.x.shape[1]

    @property
    def flat(self) -> Tensor:
        """The draws of all chains in one row each: ``(chains * draws, *event_shape)``."""
        return self.x.flatten(0, 1)

    @cached_property
    def r_hat(self) -> Tensor:
        """R-hat of each coordinate, ``event_shape``: split, rank-normalised, the larger of bulk and tails."""
        return r_hat(self.x)

    @cached_property
    def ess(self) -> Tensor:
        """Bulk effective sample size of each coordinate over all chains, ``event_shape``."""
        return chain_ess(self.x)

    def summary(self) -> Summary:
        """Moments of each coordinate with their errors."""
        x = self.x.double()
        sd = x.flatten(0, 1).std(0)
        return Summary(
            mean=x.flatten(0, 1).mean(0),
            sd=sd,
            mcse_mean=sd / chain_ess(self.x, "mean").sqrt(),
            ess_bulk=self.ess,
            ess_tail=chain_ess(self.x, "tail"),
            r_hat=self.r_hat,
        )

    def __repr__(self) -> str:
        chains, draws = self.x.shape[:2]
        text = f"Draws({chains} chains × {draws} draws of x {tuple(self.x.shape[2:])} by {self.sampler!r}"
        if self.sampler.acceptance_aim is not None:
            text += f": acceptance {float(self.acceptance.mean()):.2f} at step size {self.step_size:.3g}"
        lost = int(self.diverging.sum())
        if lost:
            text += f", {lost} diverging"
        if draws < 4:
            return text + ")"
        still = torch.isnan(self.r_hat)  # coordinates of one value in all draws (a dead pixel)
        if not bool(still.all()):
            worst, least = float(self.r_hat[~still].max()), float(self.ess[~still].min())
            text += f", worst R-hat {worst:.3f}, least ESS {least:.0f}"
        if bool(still.any()):
            text += f", {int(still.sum())} of {still.numel()} coordinates never change"
        return text + ")"
