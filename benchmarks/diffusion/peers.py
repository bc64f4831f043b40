"""The workers of the diffusion benchmarks: `workers.py` with this folder's `worker.py` and requirements."""

from __future__ import annotations

from pathlib import Path

import workers
from workers import ENVIRONMENTS

__all__ = ["ENVIRONMENTS", "LIBRARIES", "Worker", "prepare"]

HERE = Path(__file__).parent
LIBRARIES = ("ours", "diffusers", "azula")


def prepare(environments: Path, libraries: tuple[str, ...] = LIBRARIES) -> None:
    """Make the environments that are missing."""
    workers.prepare(environments, libraries, HERE)


class Worker(workers.Worker):
    """The process of a library of diffusion models."""

    def __init__(self, library: str, environments: Path = ENVIRONMENTS) -> None:
        super().__init__(library, HERE / "worker.py", environments)
