r"""What a diffusion's bound is made of: a price for each level of noise, and the bound of each row with its error.

The negative bound of a row is a sum over the chain's steps, each a closed KL at one draw of the noise, and of what the
last level still knows of the datum. Averaged over draws and rows the terms say at which levels nats are spent; their
sum, row by row, is a lower bound on log p(x), random as the draws, with a standard error from repeating them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Bounded, Evidence
from pyro_gen.inference_data.groups import Parts
from pyro_gen.inference_data.variables import Variable, to_array
from pyro_gen.programs import Diffusion

__all__ = ["DRAWS", "bound_of_rows"]

DRAWS = 4  # of the noise, a row and level


@torch.no_grad()
def bound_of_rows(parts: Parts, program: Bounded, batch: tuple[Tensor, ...]) -> Evidence:
    """The bound of each row at a few draws of its noise; of a diffusion also group ``noise_levels``."""
    x, context = batch[0], batch[1] if len(batch) > 1 else None
    with scopes.evaluation_mode(program):
        if not isinstance(program, Diffusion):
            bounds = torch.stack([program.lower_bound(x, context).double() for _ in range(DRAWS)])
        else:
            sums, total = [], torch.zeros((), dtype=torch.float64, device=x.device)
            for _ in range(DRAWS):
                terms = program.terms(x, context).double()
                sums.append(-terms.sum(1))
                total = total + terms / DRAWS
            bounds = torch.stack(sums)
            _add_levels(parts, program, total)
    return Evidence(bounds.mean(0).cpu(), "lower bound", (bounds.std(0) / DRAWS**0.5).cpu())


def _add_levels(parts: Parts, program: Diffusion, terms: Tensor) -> None:
    """Means over rows of the terms ``(rows, steps + 1)``, by the time and log SNR of each step's noisier end."""
    schedule, count = program.schedule, terms.shape[1] - 1
    if program.timesteps is None:  # the first step, and then parts of the integral, by their middles
        ends = schedule.log_snr(torch.tensor(program.times, dtype=torch.float64)).cpu()
        knots = torch.linspace(float(ends[0]), float(ends[1]), count, dtype=torch.float64)
        log_snr = torch.cat([ends[:1], (knots[1:] + knots[:-1]) / 2])
        times = schedule.time(log_snr)
    else:
        times = program.model.grid[1:].double().clone()
        log_snr = schedule.log_snr(times)
    kept = {"time": (to_array(times), count)}
    error = terms.std(0) / len(terms) ** 0.5 if len(terms) > 1 else torch.full_like(terms[0], torch.nan)
    mean = terms.mean(0)
    parts.add(
        "noise_levels",
        {
            "step_loss": Variable(to_array(mean[:-1]), ("time",), {"units": "nats", "of": "mean over rows"}, kept),
            "step_loss_se": Variable(to_array(error[:-1]), ("time",), {"units": "nats"}, kept),
            "log_snr": Variable(to_array(log_snr), ("time",), {"long_name": "log α²/σ²"}, kept),
            "prior_loss": Variable(to_array(mean[-1]), (), {"units": "nats", "of": "mean over rows"}),
        },
        rows=len(terms),
        draws=DRAWS,
        long_name="terms of the negative bound; their sum is minus the mean bound",
    )
