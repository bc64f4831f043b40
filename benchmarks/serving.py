"""The worker's side of `workers.py`: one library in a process and an environment of its own.

Commands are JSON objects, a line each, on standard input; each is answered by one line. What the library prints goes to
standard error. A benchmark subclasses `Library`: its methods are the commands. Models and what is timed on them are
kept by name between commands.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


class Library:
    """The commands that all benchmarks have."""

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


def serve(kind: type[Library]) -> None:
    """Answer commands for the library that the command line names, until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    commands = kind(sys.argv[1])
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        replies.write(json.dumps(getattr(commands, do)(**command)) + "\n")
