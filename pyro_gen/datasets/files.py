"""The user's own files: ``.npy``, ``.npz``, ``.csv`` and ``.pt``, read without running code from them.

One file holds one data set: x, rows first, and where there is one a context with as many rows. Whatever a model could
not be fitted to (text, gaps, NaN, one number too many in a line) is refused with the place where it stands.
"""

from __future__ import annotations

import csv
import os
import pickle
from array import array as number_array
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["load"]

Array = npt.NDArray[Any]
Named = dict[str, Array]  # "x", and "context" where there is one
SUFFIXES = (".npy", ".npz", ".csv", ".pt")
NUMPY_TYPES = {torch.float32: np.float32, torch.float64: np.float64}


def load(
    path: str | os.PathLike[str],
    *,
    header: bool = False,
    delimiter: str = ",",
    dtype: torch.dtype = torch.float32,
) -> Tensor | tuple[Tensor, Tensor]:
    """Read x, or x and its context, from a file of numbers.

    ======== ==============================================================================================
    suffix   what it holds
    ======== ==============================================================================================
    ``.npy`` x
    ``.npz`` one array, x, of any name; or two, named ``x`` and ``context``
    ``.csv`` x, a row a line; no header line unless ``header=True``
    ``.pt``  x; or ``(x, context)``; or a dictionary, as ``.npz``: tensors, written by ``torch.save``
    ======== ==============================================================================================

    Whole numbers and truth values become floating point, without a change of scale: a uint8 image stays 0 to 255. No
    pickle is ever run: NumPy files of objects, and ``.pt`` files of more than tensors, are refused.

    Args:
        path: the file.
        header: ``.csv`` only: skip the first line.
        delimiter: ``.csv`` only: what stands between two cells.
        dtype: ``torch.float32`` or ``torch.float64``, the type of what is returned.

    Returns:
        x, of shape (rows, ...), or ``(x, context)``, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if the file holds something other than real numbers (objects, text, complex numbers).
        ValueError: if the file is damaged, empty, of another format, or has gaps, NaN or infinite values.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "data.csv")
        ...     _ = path.write_text("1,2\\n3,4\\n")
        ...     load(path)
        tensor([[1., 2.],
                [3., 4.]])
    """
    path = Path(path).expanduser()
    if dtype not in NUMPY_TYPES:
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file (looked from {Path.cwd()})")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name one file in it ({', '.join(SUFFIXES)})")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: cannot read {suffix or 'a file without a suffix'}; save the numbers as one of "
            f"{', '.join(SUFFIXES)}, for example np.save('data.npy', x)"
        )
    if suffix != ".csv" and (header or delimiter != ","):
        raise ValueError(f"{path}: header and delimiter are for .csv files; leave them out for {suffix}")
    with path.open("rb") as file:
        start = file.read(6)
    if not start:
        raise ValueError(f"{path}: the file is empty (0 bytes); save it again")
    if suffix == ".csv":
        arrays = _read_csv(path, header, delimiter)
    else:
        arrays = _read_torch(path) if suffix == ".pt" else _read_numpy(path, start)
    parts = {name: _rows(path, name, array, dtype) for name, array in arrays.items()}
    if "context" not in parts:
        return parts["x"]
    x, context = parts["x"], parts["context"]
    if len(x) != len(context):
        raise ValueError(f"{path}: x has {len(x)} rows and context {len(context)}; every row of x needs its context")
    return x, context


def _rows(path: Path, name: str, array: Array, dtype: torch.dtype) -> Tensor:
    """Check that an array is rows of finite real numbers, and convert it."""
    kind = array.dtype.kind
    if kind == "c":
        raise TypeError(
            f"{path}: {name} is complex ({array.dtype}); save real numbers, for example np.stack([x.real, x.imag], -1)"
        )
    if array.dtype.names is not None:
        raise TypeError(
            f"{path}: {name} is a table with the columns {', '.join(array.dtype.names)}; save a plain array, "
            "for example numpy.lib.recfunctions.structured_to_unstructured(x)"
        )
    if kind not in "biuf":
        raise TypeError(f"{path}: {name} holds {array.dtype} entries; save numbers, for example x.astype('float32')")
    if array.size == 0:
        raise ValueError(f"{path}: {name} is empty, of shape {array.shape}; there is nothing to fit")
    if array.ndim < 2:
        shape = "a single number" if array.ndim == 0 else f"one-dimensional, of shape {array.shape}"
        raise ValueError(
            f"{path}: {name} is {shape}; rows come first: save x.reshape(-1, 1) for rows of one number, "
            "or x.reshape(1, -1) for a single row"
        )
    target = NUMPY_TYPES[dtype]
    if kind == "f":
        _require_finite(path, name, array)
        with np.errstate(over="ignore"):  # looked for in the next line
            converted = array.astype(target)
        bad = ~np.isfinite(converted)
        problem = "too large for"
    else:
        limit = 2**24 if dtype == torch.float32 else 2**53  # beyond these, neighbours fall together
        converted = array.astype(target)
        bad = (array > limit) | (array < -limit) if kind in "iu" else np.zeros(array.shape, bool)
        problem = "not exact in"
    if bad.any():
        row, value = _first_row(bad), array[bad][0]
        remedy = "load it with dtype=torch.float64" if dtype == torch.float32 else "rescale it before saving"
        raise ValueError(f"{path}: {name} has {value} in row {row} (counted from 0), {problem} {dtype}; {remedy}")
    return torch.from_numpy(np.ascontiguousarray(converted))


def _first_row(bad: npt.NDArray[np.bool_]) -> int:
    return int(bad.reshape(len(bad), -1).any(1).argmax())


def _require_finite(path: Path, name: str, array: Array) -> None:
    bad = ~np.isfinite(array)
    if bad.any():
        rows = int(bad.reshape(len(bad), -1).any(1).sum())
        raise ValueError(
            f"{path}: {name} has NaN or infinite entries in {rows} of {len(array)} rows, the first in row "
            f"{_first_row(bad)} (counted from 0); drop those rows or fill them in"
        )


def _named(path: Path, keys: Iterable[Any]) -> dict[str, Any]:
    """Which of the keys of a file is x and which the context."""
    found = list(keys)
    if len(found) == 1:
        return {"x": found[0]}
    if set(found) == {"x", "context"}:
        return {"x": "x", "context": "context"}
    raise ValueError(
        f"{path}: holds {', '.join(map(repr, found)) or 'no arrays'}; save one array, or two that are "
        "named 'x' and 'context'"
    )


def _read_numpy(path: Path, start: bytes) -> Named:
    if not start.startswith((b"\x93NUMPY", b"PK")):
        raise ValueError(f"{path}: is no NumPy file, it begins with {start!r}; write it with np.save or np.savez")
    with path.open("rb") as file:  # opened here, because NumPy leaves a damaged archive open
        content = _undamaged(path, lambda: np.load(file, allow_pickle=False))
        if not isinstance(content, np.lib.npyio.NpzFile):
            return {"x": content}
        names = _named(path, content.files).items()
        return {name: _undamaged(path, partial(content.__getitem__, key)) for name, key in names}


def _undamaged(path: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` gives; NumPy's complaints in our words."""
    try:
        return read()
    except Exception as error:  # NumPy parses the header of a damaged file as Python: there is no end of types
        if "allow_pickle" in str(error):
            raise TypeError(
                f"{path}: holds Python objects (dtype object), which only pickle reads, and a pickle can run code; "
                "save plain numbers, for example np.save(path, np.stack(rows).astype('float32'))"
            ) from error
        raise ValueError(
            f"{path}: cannot be read, it seems damaged or cut short ({_first_line(error)}); save it again"
        ) from error


def _read_torch(path: Path) -> Named:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(
            f"{path}: is no file of plain tensors, and another pickle can run code, so it is not opened; "
            "save tensors, for example torch.save({'x': x, 'context': context}, path)"
        ) from error
    except Exception as error:  # what a changed byte of a pickle leads to has no end of types
        raise ValueError(
            f"{path}: cannot be read, it seems damaged or cut short ({_first_line(error)}); save it again"
        ) from error
    if isinstance(content, Tensor):
        tensors = {"x": content}
    elif isinstance(content, dict):
        tensors = {name: content[key] for name, key in _named(path, content).items()}
    elif isinstance(content, list | tuple) and len(content) in (1, 2):
        tensors = dict(zip(("x", "context"), content, strict=False))
    else:
        size = f" of {len(content)}" if isinstance(content, list | tuple) else ""
        raise TypeError(
            f"{path}: holds a {type(content).__name__}{size}; save a tensor, (x, context), "
            "or {'x': x, 'context': context}"
        )
    return {name: _tensor_to_numpy(path, name, tensor) for name, tensor in tensors.items()}


def _tensor_to_numpy(path: Path, name: str, tensor: object) -> Array:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{path}: {name} is a {type(tensor).__name__}; save it as a tensor, torch.as_tensor(x)")
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise TypeError(f"{path}: {name} is {kind}; save x.dequantize() or x.to_dense()")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:  # NumPy has none
        tensor = tensor.float()
    array: Array = tensor.numpy()
    return array


def _read_csv(path: Path, header: bool, delimiter: str) -> Named:
    """Every line as numbers; the first that is not decides what the error says."""
    numbers, width = number_array("d"), 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, delimiter=delimiter)
            for cells in lines:
                if not cells:
                    continue
                place = f"{path}: line {lines.line_num}"
                if header:
                    header = False
                    if len(cells) > 1 and not cells[0].strip():
                        raise ValueError(
                            f"{place} has a header without a name for column 1, as pandas writes an index, "
                            "which is no data; write it with to_csv(path, index=False)"
                        )
                    width = len(cells)
                    continue
                if width and len(cells) != width:
                    raise ValueError(f"{place} has {len(cells)} cells, the lines above have {width}; make them equal")
                try:
                    numbers.extend(map(_number, cells))
                except ValueError:
                    raise ValueError(f"{place}{_explain(cells, first=not width)}") from None
                width = len(cells)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as such"
        ) from error
    except csv.Error as error:
        raise ValueError(f"{path}: is not a table of cells ({error}); save numbers separated by commas") from error
    return {"x": np.array(numbers, dtype=np.float64).reshape(-1, max(width, 1))}


def _number(cell: str) -> float:
    if "_" in cell:  # float() reads 1_000 as Python source does
        raise ValueError(cell)
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True


def _explain(cells: list[str], first: bool) -> str:
    """What is wrong with a line in which some cell is no number, and what to do."""
    column, cell = next((i, c) for i, c in enumerate(cells, 1) if not _is_number(c))
    other = next((d for d in ";\t| " if d in cell.strip() and all(map(_is_number, cell.split(d)))), None)
    if other is not None:
        return f", column {column} is {cell!r}: the cells seem to be separated by {other!r}; pass delimiter={other!r}"
    if first and not any(map(_is_number, cells)):
        shown = ", ".join(cells[:4]) + (", …" if len(cells) > 4 else "")
        return f" is a header ({shown}), not numbers; pass header=True to skip it"
    if not cell.strip():
        return f", column {column} is empty; drop the line or fill the cell in"
    hint = "; if the line is a header, pass header=True" if first else ""
    return f", column {column} is {cell!r}, not a number; drop the line or correct the cell{hint}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
