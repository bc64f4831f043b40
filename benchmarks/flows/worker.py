"""One library in a process and an environment of its own; started by `peers.py`, not by hand.

    <environment>/bin/python benchmarks/flows/worker.py zuko

Commands are JSON objects, a line each, on standard input; each is answered by one line. What the library prints goes to
standard error. Models are kept by name between commands.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


class Worker:
    """The commands, one method each."""

    def __init__(self, library: str) -> None:
        import torch

        torch.set_num_threads(1)
        nothing = torch.zeros(1, requires_grad=True)
        nothing.grad = torch.zeros(1)
        torch.optim.Adam([nothing], fused=True).step()  # the first step in a process imports a second's worth of torch
        self.library = library
        self.models: dict[str, Any] = {}
        self.tests: dict[tuple[str, str], Callable[[], object]] = {}

    def versions(self) -> dict[str, Any]:
        if self.library == "ours":  # it may be imported from the working tree
            from pyro_gen import __version__ as of_library
        else:
            of_library = version(self.library)
        return {"library": of_library, "torch": version("torch"), "numpy": version("numpy")}

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

    def time(self, name: str, test: str, repeats: int) -> dict[str, Any]:
        """CPU and wall seconds of one repeat, the mean over `repeats` after one that is not timed."""
        run = self.tests[name, test]
        run()
        start, wall = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            run()
        return {
            "cpu": (time.process_time() - start) / repeats,
            "wall": (time.perf_counter() - wall) / repeats,
        }

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
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        replies.write(json.dumps(getattr(worker, do)(**command)) + "\n")


if __name__ == "__main__":
    main()
