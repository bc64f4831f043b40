"""Pairs of data and noise in a process of their own, ours or torchcfm's; started by `ot_coupling.py`, not by hand.

    <environment>/bin/python benchmarks/diffusion/torchcfm_worker.py torchcfm

`serving.py` says how it is talked to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from serving import Library, serve


def ours(block: int) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Data as they are, each with its noise."""
    from pyro_gen.objectives.couplings import optimal_pairs

    return lambda x, e: (x, e[optimal_pairs(x, e, block)])


def torchcfm(block: int) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Pairs drawn, with replacement, from the plan of the whole batch: torchcfm has no blocks."""
    from torchcfm.optimal_transport import OTPlanSampler

    sampler = OTPlanSampler(method="exact")

    def pairs(x: Any, e: Any) -> tuple[Any, Any]:
        found = sampler.sample_plan(e, x)
        return found[1], found[0]

    return pairs


class Worker(Library):
    """The commands, one method each."""

    def prepare(self, test: str, rows: int, block: int, data: str) -> dict[str, Any]:
        """The first rows of a file of data and noise; the mean cost of pairs, and how many rows of data are in them."""
        import numpy as np
        import torch

        x, e = (torch.from_numpy(part[:rows]).float() for part in np.load(data))
        pair = {"ours": ours, "torchcfm": torchcfm}[self.library](block)
        self.tests["pairs", test] = lambda: pair(x, e)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - torchcfm draws by numpy's global generator
        a, b = pair(x, e)
        used = len(torch.unique(a, dim=0))
        return {"cost": float((a - b).square().sum(1).mean()), "used": used / rows}


if __name__ == "__main__":
    serve(Worker)
