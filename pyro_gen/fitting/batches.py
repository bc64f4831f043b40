"""From what a user has (tensor, array, Dataset, DataLoader) to batches; everything is checked at this door."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_gen.base import Program
from pyro_gen.checks import check_count, check_rows

__all__ = ["Batches", "as_batch", "split"]


def as_batch(
    data: Any,
    program: Program | None = None,
    name: str = "data",
    check: Callable[..., tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, ...]:
    """Data in memory as a tuple of tensors with equal numbers of rows, ``x`` first; ``check`` instead of the program's.

    Arrays are taken over with the dtype of the program; tensors are taken as they are.

    Raises:
        TypeError, ValueError: for anything that is not finite floating point rows, saying what to do.
    """
    if isinstance(data, DataLoader):
        raise TypeError(f"{name} is a DataLoader, and rows in memory are needed here: pass its Dataset, loader.dataset")
    if isinstance(data, Dataset):
        data = _stack(data, name)
    parts = data if isinstance(data, (tuple, list)) else (data,)
    if not len(parts):
        raise ValueError(f"{name} is empty: it has no rows, and at least one is needed")
    if isinstance(data, list) and not all(isinstance(part, (Tensor, np.ndarray)) for part in data):
        raise TypeError(
            f"{name} is a list of {type(data[0]).__name__}: torch.as_tensor({name}) makes a tensor of numbers"
        )
    labels = ("x", "context") if program is not None else tuple(f"{name}[{i}]" for i in range(len(parts)))
    if program is not None and len(parts) > 2:
        raise ValueError(
            f"{name} must be a tensor x or a pair (x, context), got {len(parts)} parts: torch.stack({name}) makes one "
            "tensor of a list of rows"
        )
    like = program.template() if program is not None else torch.empty(0)
    batch = tuple(_tensor(part, label, like) for part, label in zip(parts, labels, strict=False))
    if program is not None:
        batch = (check or program.check)(*batch)
    else:
        for part, label in zip(batch, labels, strict=True):
            if part.dim() == 0:
                raise ValueError(f"{label} is a single number: data have a first dimension of rows")
            if part.dtype.is_floating_point:
                check_rows(part, part.shape[1:], label)
        sizes = [part.shape[0] for part in batch]
        if len(set(sizes)) > 1:
            raise ValueError(f"the parts of {name} have {sizes} rows: they must agree")
        if sizes[0] == 0:
            raise ValueError(f"{name} is empty: it has no rows, and at least one is needed")
    return batch


def _tensor(part: Any, label: str, like: Tensor) -> Tensor:
    if isinstance(part, np.ndarray):
        if part.dtype.kind not in "fiubc":
            raise TypeError(f"{label} is an array of dtype {part.dtype}: pass numbers, {label}.astype('float32')")
        part = torch.as_tensor(part)
        part = part.to(like.dtype) if part.dtype.is_floating_point else part
    if not isinstance(part, Tensor):
        hint = f"torch.as_tensor({label}) makes a tensor of numbers"
        if isinstance(part, (str, Path)):
            hint = f"pg.datasets.load({str(part)!r}) reads a file"
        elif hasattr(part, "to_numpy"):
            hint = f"pass {label}.to_numpy()"
        raise TypeError(f"{label} must be a tensor or an array, got {type(part).__name__}: {hint}")
    if part.requires_grad:
        raise ValueError(f"{label} requires grad: data are constants here, pass {label}.detach()")
    return part


def _stack(data: Any, name: str) -> tuple[Any, ...]:
    if hasattr(data, "tensors"):
        return tuple(data.tensors)
    if not hasattr(data, "__len__"):
        raise TypeError(
            f"{name} is a Dataset without a length, and a loss estimates a total over all rows: add __len__"
        )
    if len(data) == 0:
        raise ValueError(f"{name} is an empty Dataset: at least one row is needed")
    rows = [data[i] for i in range(len(data))]
    rows = [row if isinstance(row, (tuple, list)) else (row,) for row in rows]
    if not all(isinstance(part, (Tensor, np.ndarray)) for part in rows[0]):
        kinds = ", ".join(type(part).__name__ for part in rows[0])
        raise TypeError(
            f"{name} gives rows of {kinds}: a Dataset must give a tensor, or a tuple of tensors, a row; for "
            "others wrap it in a DataLoader with a collate_fn that makes tensors"
        )
    shapes = [[tuple(part.shape) for part in row] for row in rows]
    odd = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise ValueError(
            f"{name} gives rows of unequal shapes, {shapes[0]} and, in row {odd}, {shapes[odd]}: pad or crop them"
        )
    return tuple(torch.stack([torch.as_tensor(row[i]) for row in rows]) for i in range(len(rows[0])))


def split(
    batch: tuple[Tensor, ...], fraction: float, seed: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Split rows at random into training and validation parts; the second holds ``fraction`` of them.

    Returns:
        ``(training, validation, rows)``, the last being where the training rows stood in ``batch``.
    """
    if isinstance(fraction, bool) or not 0 < fraction < 1:
        raise ValueError(
            f"validation as a fraction must lie between 0 and 1, got {fraction!r}: 0.1 holds out a tenth of the rows"
        )
    rows = batch[0].shape[0]
    held = round(rows * fraction)
    if not 0 < held < rows:
        raise ValueError(
            f"validation={fraction} of {rows} rows leaves one side empty: give more rows or another fraction"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(batch[0].device)
    return tuple(p[order[held:]] for p in batch), tuple(p[order[:held]] for p in batch), order[held:]


class Batches:
    """An endless, seeded stream of batches: every epoch in a new order, a short last batch dropped.

    Args:
        data: a batch of tensors (all rows), or a DataLoader.
        batch_size: rows a batch; None for 256, or all rows where there are at most 512.
        seed: of the order.
        device: where batches go.

    Attributes:
        rows: number of rows of the full data set; per_epoch: batches in one pass.
    """

    def __init__(
        self, data: tuple[Tensor, ...] | DataLoader[Any], batch_size: int | None, seed: int, device: Any
    ) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.indices: Tensor | None = None  # rows of the batch last given, where they are known
        self._epoch = self.generator.get_state()
        self._given = 0
        if isinstance(data, DataLoader):
            if batch_size is not None:
                raise ValueError("batch_size belongs to the DataLoader: leave it out")
            self.loader: DataLoader[Any] | None = data
            try:
                self.rows, self.per_epoch = len(data.dataset), len(data)  # type: ignore[arg-type]
            except TypeError as error:
                raise TypeError(
                    "the DataLoader's Dataset has no length, and a loss estimates a total over all rows: add __len__"
                ) from error
            if not self.rows or not self.per_epoch:
                raise ValueError(
                    f"the DataLoader yields nothing: its Dataset has {self.rows} rows, less than one batch; give it "
                    "more rows, a smaller batch_size, or drop_last=False"
                )
            return
        self.loader, self.rows = None, data[0].shape[0]
        size = batch_size if batch_size is not None else (self.rows if self.rows <= 512 else 256)
        if check_count(size, "batch_size") > self.rows:
            raise ValueError(
                f"batch_size={size} is more than the {self.rows} rows of the data: leave it out, or take "
                f"{self.rows} or less"
            )
        self.size = size
        self.data = tuple(part.to(device) for part in data)
        self.per_epoch = self.rows // size

    @property
    def full(self) -> bool:
        """Whether every batch is the whole data set."""
        return self.loader is None and self.size == self.rows

    def state(self) -> dict[str, Any]:
        """Where the stream stands, to go on from there. A DataLoader starts a new epoch instead."""
        return {"epoch": self._epoch, "given": self._given}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self._epoch, self._given = state["epoch"], state["given"]
        self.generator.set_state(self._epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        while True:
            if self.loader is not None:
                yield from self._load()
            elif self.full:
                yield self.data
            else:
                self._epoch = self.generator.get_state()
                order = torch.randperm(self.rows, generator=self.generator).to(self.device)
                while self._given < self.per_epoch:
                    start = self._given * self.size
                    self._given += 1
                    self.indices = order[start : start + self.size]
                    yield tuple(part.index_select(0, self.indices) for part in self.data)
                self._given = 0

    def _load(self) -> Iterator[tuple[Tensor, ...]]:
        assert self.loader is not None
        given = 0
        first: list[Any] = []
        for item in self.loader:
            parts = item if isinstance(item, (tuple, list)) else (item,)
            if not parts or not all(isinstance(part, Tensor) for part in parts):
                kind = type(item).__name__ if not isinstance(item, (tuple, list)) else [type(p).__name__ for p in parts]
                raise TypeError(
                    f"the DataLoader yields {kind}: it must yield a tensor, or a tuple of tensors with x first "
                    "(a collate_fn can turn a dict into one)"
                )
            kinds = [(tuple(part.shape[1:]), part.dtype) for part in parts]
            first = first or kinds
            if kinds != first:
                raise ValueError(
                    f"batch {given} of the DataLoader has rows of {kinds}, the first had {first}: make them equal"
                )
            given += 1
            yield tuple(part.to(self.device) for part in parts)
        if not given:
            raise ValueError("the DataLoader yields nothing: it has a length, but gave no batch")
