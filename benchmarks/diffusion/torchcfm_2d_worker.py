"""Independent conditional flow matching by torchcfm, for `diffusion_2d.py`; started by that script, not by hand.

    <environment>/bin/python benchmarks/diffusion/torchcfm_2d_worker.py torchcfm

The settings are those of torchcfm's own script for two dimensions: its `MLP` of three layers of 64 with SELU, Adam at a
learning rate of 1e-3, batches of 256, σ = .1. `serving.py` says how it is talked to.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from serving import Library, serve

BATCH, RATE, WIDTH = 256, 1e-3, 64


class Worker(Library):
    """The commands, one method each."""

    def fit(self, data: str, out: str, seconds: float, seed: int, sigma: float) -> dict[str, Any]:
        """Train on the rows of a file for so many seconds of CPU; the weights go to another file, layer by layer."""
        import numpy as np
        import torch
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
        from torchcfm.models.models import MLP

        rows = torch.from_numpy(np.load(data))
        start, steps = time.process_time(), 0
        torch.manual_seed(seed)
        net = MLP(dim=2, time_varying=True, w=WIDTH)
        optimizer = torch.optim.Adam(net.parameters(), RATE)
        matcher = ConditionalFlowMatcher(sigma=sigma)
        while time.process_time() - start < seconds:
            optimizer.zero_grad()
            x1 = rows[torch.randint(len(rows), (BATCH,))]
            t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
            loss = torch.mean((net(torch.cat([xt, t[:, None]], dim=-1)) - ut) ** 2)
            loss.backward()
            optimizer.step()
            steps += 1
        spent = time.process_time() - start
        weights = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
        np.savez(out, **weights)
        return {"steps": steps, "seconds": spent, "loss": float(loss.detach())}


if __name__ == "__main__":
    serve(Worker)
