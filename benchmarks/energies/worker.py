"""One library of energy-based models in a process of its own; started by `peers.py`, not by hand.

    <environment>/bin/python benchmarks/energies/worker.py torchebm

`serving.py` says how it is talked to.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# what the benchmarks share; modules of this folder are `energies.…` for everybody
sys.path.append(str(Path(__file__).parents[1]))

from serving import Library, serve


class Worker(Library):
    """The commands, one method each."""

    def build(self, name: str, kind: str, features: int, dtype: str = "float32", **settings: Any) -> dict[str, Any]:
        import torch

        from energies.contract import energy, parts

        self.models[name] = energy(kind, features, **settings).to(getattr(torch, dtype))  # type: ignore[arg-type]
        return {"parameters": sum(p.numel() for p in parts(self.models[name]))}

    def prepare(self, name: str, test: str, rows: int, features: int, seed: int = 1, **moves: Any) -> dict[str, Any]:
        """Set one case up on standard normal rows and run it once; the CPU time of that (compilers included)."""
        import time

        import torch

        from energies.contract import TRAINING, Moves, answers, step

        library, net = answers(self.library), self.models[name]
        x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
        start = time.process_time()
        if test.endswith(", compiled"):
            run = library.compiled(test.removesuffix(", compiled"), net, x)
        elif test in TRAINING:
            run = step(library.loss(test, net, x, {}), net)
        else:
            run = library.chains(test, net, x, Moves(**moves))
        run()
        self.tests[name, test] = run
        return {"cpu": time.process_time() - start}

    def evaluate(
        self, name: str, case: str, data: str, output: str | None = None, seed: int = 0, **options: Any
    ) -> dict[str, Any]:
        """The loss on the rows of a file after a seed, and its gradient, flat, into a file; or why it is refused."""
        import numpy as np
        import torch

        from energies.contract import answers, parts

        net = self.models[name]
        try:
            evaluate = answers(self.library).loss(case, net, torch.from_numpy(np.load(data)), options)
        except ValueError as error:
            return {"refused": str(error)}
        net.zero_grad()
        torch.manual_seed(seed)
        value = evaluate()
        value.backward()
        if output is not None:
            gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts(net)]
            np.save(output, torch.cat([g.flatten() for g in gradient]).numpy())
        return {"value": float(value.detach())}

    def draw(self, name: str, case: str, start: str, output: str, seed: int = 0, **moves: Any) -> dict[str, Any]:
        """Where chains end that start at the rows of a file."""
        import numpy as np
        import torch

        from energies.contract import Moves, answers

        run = answers(self.library).chains(case, self.models[name], torch.from_numpy(np.load(start)), Moves(**moves))
        torch.manual_seed(seed)
        np.save(output, run().numpy())
        return {}


if __name__ == "__main__":
    serve(Worker)
