"""One library of diffusion models in a process of its own; started by `peers.py`, not by hand.

    <environment>/bin/python benchmarks/diffusion/worker.py diffusers

`serving.py` says how it is talked to.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# what the benchmarks share; modules of this folder are `diffusion.…` for everybody
sys.path.append(str(Path(__file__).parents[1]))

from serving import Library, serve


class Worker(Library):
    """The commands, one method each."""

    def build(self, name: str, training: int = 400) -> dict[str, Any]:
        from diffusion.contract import network

        self.models[name] = network(steps=training)
        return {"parameters": sum(p.numel() for p in self.models[name].parameters())}

    def prepare(self, name: str, test: str, steps: int, rows: int, seed: int = 1) -> dict[str, Any]:
        """Set a test up: draws by a case, or ``"network"``, as many evaluations of it alone."""
        import torch

        from diffusion.contract import FEATURES, TRAINED, answers

        net = self.models[name]
        torch.manual_seed(seed)
        if test.startswith("network"):
            inputs = list(
                zip(torch.randn(steps, rows, FEATURES).unbind(), torch.rand(steps, rows).unbind(), strict=True)
            )

            @torch.no_grad()
            def run() -> None:
                for y, t in inputs:
                    net(y, t)

            self.tests[name, test] = run
        else:
            assert steps <= TRAINED
            self.tests[name, test] = answers(self.library).draws(test.split(", ")[0], net, steps, rows)
        return {}

    def spread(self, name: str, test: str) -> dict[str, Any]:
        """Rows and standard deviation of one draw: is it of the size of data?"""
        x = self.tests[name, test]()
        return {"rows": len(x), "sd": float(x.std())}  # type: ignore[arg-type, attr-defined]

    def ends(self, case: str, times: list[int], start: str, output: str) -> dict[str, Any]:
        """Where the rows of a file end, with a network that does not look at t, in float64."""
        import numpy as np
        import torch

        from diffusion.contract import Still, answers

        rows = torch.from_numpy(np.load(start))
        np.save(output, answers(self.library).ends(case, Still().to(rows.dtype), times, rows).numpy())
        return {}


if __name__ == "__main__":
    serve(Worker)
