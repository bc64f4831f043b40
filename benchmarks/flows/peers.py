"""The flow libraries' workers: `workers.py` with this folder's `worker.py` and requirements."""

from __future__ import annotations

from pathlib import Path

import workers
from workers import ENVIRONMENTS, ROOT

__all__ = ["ENVIRONMENTS", "LIBRARIES", "ROOT", "Worker", "prepare"]

HERE = Path(__file__).parent
LIBRARIES = ("ours", "zuko", "nflows", "normflows")


def prepare(environments: Path, libraries: tuple[str, ...] = LIBRARIES) -> None:
    """Make the environments that are missing."""
    workers.prepare(environments, libraries, HERE)


class Worker(workers.Worker):
    """A flow library's process."""

    def __init__(self, library: str, environments: Path = ENVIRONMENTS) -> None:
        super().__init__(library, HERE / "worker.py", environments)
