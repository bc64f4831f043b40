"""Data of a run: the digits, or a file; split into training, validation and test rows, the same way each time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyro_gen.cli.errors import BadInput, about

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VALIDATION", "Data", "read_data"]

VALIDATION, TEST = 0.1, 0.2  # fractions of a file's rows


class Data(NamedTuple):
    """Batches ``(x,)`` or ``(x, context)``.

    ``facts`` is what identifies the data: source, checksum, rows of each part. ``rows`` says where the training rows
    stand in a file; ``labels`` are those of the test rows, where they are known.
    """

    train: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    facts: dict[str, Any]
    rows: Tensor | None = None
    labels: Tensor | None = None


def read_data(options: dict[str, Any]) -> Data:
    """The data that the options of ``pyro-gen fit`` name, split."""
    if options["data"] == "digits":
        return _digits(options)
    return _file(options)


def _digits(options: dict[str, Any]) -> Data:
    from pyro_gen.datasets import digits

    for name in ("validation", "test", "split_seed", "delimiter"):
        if options.get(name) is not None:
            option = "--" + name.replace("_", "-")
            raise BadInput(f"{option}: the digits are split once and for all (1200, 237, 360 rows): leave it out")
    if options.get("header"):
        raise BadInput("--header is for .csv files: leave it out with --data digits")
    levels: Any = options["levels"] or (2 if options["likelihood"] == "bernoulli" else 17)
    if levels not in (2, 17):
        raise BadInput(f"--levels must be 2 (black and white) or 17 (grey) for --data digits, got {levels}")
    flat = options["network"] != "conv"
    with about("--data digits"):
        parts = digits(levels=levels, flat=flat, dequantize=options["dequantize"], labels=True)
    train, validation, test = ((x,) for x, _ in parts)
    return Data(train, validation, test, _facts("digits", train, validation, test), labels=parts.test[1])


def _file(options: dict[str, Any]) -> Data:
    import numpy as np
    import torch

    x = read_file(options)
    n = len(x[0])
    fractions = {
        "--validation": VALIDATION if options["validation"] is None else options["validation"],
        "--test": TEST if options["test"] is None else options["test"],
    }
    for option, fraction in fractions.items():
        if not 0 < fraction < 1:
            raise BadInput(f"{option} must lie between 0 and 1, a fraction of the rows, got {fraction}")
    held, tested = (round(n * fraction) for fraction in fractions.values())
    if min(held, tested) < 1 or n - held - tested < 2:
        raise BadInput(
            f"--validation {fractions['--validation']} and --test {fractions['--test']} of {n} rows leave "
            f"{n - held - tested} to train, {held} to validate and {tested} to test on: give more rows or "
            "other fractions"
        )
    order = torch.from_numpy(np.random.default_rng(options["split_seed"] or 0).permutation(n))
    train, validation, test = (
        tuple(part[rows] for part in x) for rows in order.split([n - held - tested, held, tested])
    )
    source = str(Path(options["data"]).expanduser().resolve())
    return Data(train, validation, test, _facts(source, train, validation, test), rows=order[: n - held - tested])


def read_file(options: dict[str, Any]) -> tuple[Tensor, ...]:
    """All rows of the file that ``options["data"]`` names."""
    from pyro_gen.datasets import dequantize, load

    with about("--data"):
        path = Path(options["data"]).expanduser()
        if not path.exists() and not path.suffix:
            raise BadInput(f"--data: {path} is neither 'digits' nor a file: name a .npy, .npz, .csv or .pt file")
        given: dict[str, Any] = {"header": True} if options.get("header") else {}
        if options.get("delimiter") is not None:
            given["delimiter"] = options["delimiter"]
        content = load(path, **given)
        parts = content if isinstance(content, tuple) else (content,)
        if options.get("dequantize"):
            parts = (dequantize(parts[0], seed=options["split_seed"] or 0), *parts[1:])
        return parts


def _facts(source: str, *parts: tuple[Tensor, ...]) -> dict[str, Any]:
    from pyro_gen.fitting.checkpoints import checksum

    rows = dict(zip(("train", "validation", "test"), (len(part[0]) for part in parts), strict=True))
    return {"source": source, "crc32": checksum(tuple(tensor for part in parts for tensor in part)), "rows": rows}
