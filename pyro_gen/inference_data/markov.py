"""What the groups of a sampler's run hold: the draws are of x, the model's data, at weights that stay as they are.

Group ``posterior`` is where ArviZ looks for draws, so ``az.summary``, ``az.ess``, ``az.rhat`` and ``az.plot_trace``
work on it; an attribute says that what it holds is p(x), no posterior of parameters. ``sample_stats`` has what is known
of each draw, and ``ess``, the effective sample size of each chain by itself, the least over the coordinates of x.
"""

from __future__ import annotations

import numpy as np
import torch

from pyro_gen.base import event_names
from pyro_gen.inference_data.containers import REASON
from pyro_gen.inference_data.groups import Parts
from pyro_gen.inference_data.variables import SAMPLE_DIMS, Variable, to_array
from pyro_gen.samplers import Draws
from pyro_gen.statistics import chain_ess

__all__ = ["markov_groups"]

OF_DATA = "the draws are of x, the model's data"
NO_LIKELIHOOD = (
    f"{OF_DATA}: there are no parameters whose predictions LOO could hold out. Score rows of data by pg.log_evidence, "
    "and compare models by pg.compare"
)


def markov_groups(draws: Draws) -> Parts:
    """Groups ``posterior`` (x) and ``sample_stats`` of the draws of a run."""
    parts = Parts()
    shape = tuple(draws.log_density.shape)
    parts.attrs[""] |= {REASON: NO_LIKELIHOOD, "draws_of": OF_DATA, "sampler": repr(draws.sampler)}
    about = {"sampler": repr(draws.sampler), "draws_of": OF_DATA, "tuning_steps": draws.warmup}
    x = Variable(to_array(draws.x), (*SAMPLE_DIMS, *event_names(draws.x.shape[2:])))
    parts.add("posterior", {"x": x}, **about)
    stats = {
        "lp": Variable(to_array(draws.log_density), SAMPLE_DIMS, {"long_name": "log f(x) = log p(x) + log Z"}),
        "acceptance_rate": Variable(to_array(draws.acceptance), SAMPLE_DIMS),
        "diverging": Variable(to_array(draws.diverging), SAMPLE_DIMS),
        "step_size": Variable(np.full(shape, draws.step_size), SAMPLE_DIMS),
    }
    if shape[1] >= 4:  # fewer draws have no autocorrelation
        least = [chain_ess(chain.unsqueeze(0)).min() for chain in draws.x]
        words = {"long_name": "effective sample size of each chain, the least over the coordinates of x"}
        stats["ess"] = Variable(to_array(torch.stack(least)), ("chain",), words)
    parts.add("sample_stats", stats, **about)
    return parts
