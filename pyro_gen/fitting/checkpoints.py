"""Checkpoints: all that a run needs to go on as if it had never stopped, in one file of tensors."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_gen.fitting.results import read_tensors

__all__ = ["Checkpoint", "checksum"]

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
            raise ValueError(
                f"checkpoint must be a file, and {self.path} is a folder: name one, as {self.path / 'checkpoint.pt'}"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._part.touch()
            self._part.unlink()
        except OSError as error:
            raise ValueError(
                f"checkpoint={str(path)!r} cannot be written ({error.strerror}): name another file"
            ) from error

    @property
    def _part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def write(self, state: dict[str, Any]) -> None:
        """Write the state; a crash while writing leaves the earlier file whole."""
        torch.save({"kind": KIND, "fingerprint": self.fingerprint, **state}, self._part)
        os.replace(self._part, self.path)

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
        theirs = state.get("fingerprint", {})
        apart = [k for k in self.fingerprint if theirs.get(k) != self.fingerprint[k]]
        if apart:
            said = "; ".join(f"{k} was {theirs.get(k)!r}, is {self.fingerprint[k]!r}" for k in apart)
            raise ValueError(f"{self.path} belongs to another run ({said}): name another file or remove it")
        return state


def checksum(batch: tuple[Tensor, ...]) -> int:
    """A number that tells data sets apart: CRC-32 of the bytes."""
    total = 0
    for part in batch:
        total = zlib.crc32(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, total)
    return total
