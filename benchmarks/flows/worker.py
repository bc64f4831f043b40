"""One library in a process and an environment of its own; started by `peers.py`, not by hand.

    <environment>/bin/python benchmarks/flows/worker.py zuko

`serving.py` says how it is talked to.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # what the benchmarks share; this folder stays the first

from serving import Library, serve


class Worker(Library):
    """The commands, one method each."""

    def build(self, name: str, seed: int = 0, **settings: Any) -> dict[str, Any]:
        from contract import Specification, build, count

        self.models[name] = build(self.library, Specification(**settings), seed)
        return {"parameters": count(self.models[name])}

    def prepare(self, name: str, test: str, batch: int = 512, seed: int = 1) -> dict[str, Any]:
        """Set one test up and run it once; the CPU time of that (compilers included) comes back."""
        import tests_of_speed
        from training import cpu

        start, wall = cpu(), time.perf_counter()
        run = tests_of_speed.make(test, self.models[name], batch, seed)
        run()
        self.tests[name, test] = run
        return {"cpu": cpu() - start, "wall": time.perf_counter() - wall}

    def size(self, parameters: int, **settings: Any) -> dict[str, Any]:
        """The hidden size whose number of parameters is nearest to the one wanted."""
        from contract import Specification, build, count, with_parameters

        found = with_parameters(self.library, Specification(**settings), parameters)
        return {"hidden": found.hidden, "parameters": count(build(self.library, found))}

    def fit(
        self,
        specification: dict[str, Any],
        folder: str,
        seconds: float,
        lr: float,
        batch: int,
        seed: int,
        output: str | None = None,
    ) -> dict[str, Any]:
        """Train on `train.npy` and choose on `validation.npy` of a folder; log q of `test.npy` goes to `output`."""
        import numpy as np
        import torch
        from contract import Specification, build
        from training import log_prob, standardise, train

        rows = {
            name: torch.from_numpy(np.load(os.path.join(folder, f"{name}.npy")))
            for name in ("train", "validation", "test")
        }
        location, scale, log_jacobian = standardise(rows["train"])
        ready = {name: (x - location) / scale for name, x in rows.items()}
        model, report = train(
            lambda: build(self.library, Specification(**specification), seed),
            ready["train"],
            ready["validation"],
            seconds=seconds,
            lr=lr,
            batch=batch,
            seed=seed,
        )
        report["validation"] += log_jacobian
        if output is not None:
            np.save(output, (log_prob(model, ready["test"]).double() + log_jacobian).numpy())
        return report


def main() -> None:
    serve(Worker)


if __name__ == "__main__":
    main()
