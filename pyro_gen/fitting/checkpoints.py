"""Checkpoints: all that a run needs to go on as if it had never stopped, in one file of tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pyro_gen.fitting.results import read_tensors

__all__ = ["Checkpoint"]

KIND = "pyro_gen checkpoint 1"


class Checkpoint:
    """A checkpoint file.

    Args:
        path: the file; its folder is made if need be.
        fingerprint: what a run must share with the one that wrote the file (objective, data size, seed, …).
    """

    def __init__(self, path: str | Path, fingerprint: dict[str, Any]) -> None:
        self.path, self.fingerprint = Path(path), fingerprint
        if self.path.is_dir():
            raise ValueError(f"checkpoint must be a file, and {self.path} is a folder: {self.path / 'checkpoint.pt'}")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, state: dict[str, Any]) -> None:
        """Write the state; a crash while writing leaves the earlier file whole."""
        part = self.path.with_name(self.path.name + ".part")
        torch.save({"kind": KIND, "fingerprint": self.fingerprint, **state}, part)
        os.replace(part, self.path)

    def read(self) -> dict[str, Any] | None:
        """The state in the file, or None where there is no file.

        Raises:
            ValueError: for a file that is cut short, foreign, or of another run; says what differs.
        """
        if not self.path.exists():
            return None
        state = read_tensors(self.path)
        if not isinstance(state, dict) or state.get("kind") != KIND:
            raise ValueError(f"{self.path} is not a checkpoint of pg.fit: name another file or remove it")
        theirs = state["fingerprint"]
        apart = [k for k in self.fingerprint if theirs.get(k) != self.fingerprint[k]]
        if apart:
            said = "; ".join(f"{k} was {theirs.get(k)!r}, is {self.fingerprint[k]!r}" for k in apart)
            raise ValueError(f"{self.path} belongs to another run ({said}): name another file or remove it")
        return state
