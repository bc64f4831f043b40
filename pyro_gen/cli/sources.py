"""Data of a run: the digits, or a file; split into training, validation and test rows, the same way each time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyro_gen.cli.errors import BadInput, about
from pyro_gen.cli.families import family_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TEST", "VALIDATION", "Data", "is_dequantized", "is_whole", "read_data", "read_file"]

VALIDATION, TEST = 0.1, 0.2  # fractions of a file's rows
NOISES, MANY = 20, 50_000  # draws of noise for each training row, and how many rows they make at the most


class Data(NamedTuple):
    """Batches ``(x,)`` or ``(x, context)``.

    ``facts`` is what identifies the data: source, checksum, rows of each part. ``rows`` says where the training rows
    stand in a file; ``labels`` are those of the test rows, where they are known. Dequantised training rows come
    ``copies`` times, each time with noise of its own.
    """

    train: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    facts: dict[str, Any]
    rows: Tensor | None = None
    labels: Tensor | None = None
    copies: int = 1


def read_data(options: dict[str, Any]) -> Data:
    """The data that the options of ``pyro-gen fit`` name, split."""
    content = _digits(options) if options["data"] == "digits" else _file(options)
    return _with_noises(content, options["split_seed"] or 0) if is_dequantized(options) else content


def _with_noises(content: Data, seed: int) -> Data:
    """The training rows with several draws of the noise: of a single one, a flexible density learns the values."""
    import torch

    from pyro_gen.datasets import dequantize

    x, *context = content.train
    copies = max(1, min(NOISES, MANY // len(x)))
    whole = x.floor()  # what it was before the noise
    noisy = torch.cat([x, *(dequantize(whole, seed=seed + k) for k in range(1, copies))])
    train = (noisy, *(torch.cat([part] * copies) for part in context))
    rows = None if content.rows is None else content.rows.repeat(copies)
    return content._replace(train=train, rows=rows, copies=copies)


def is_dequantized(options: dict[str, Any]) -> bool:
    """Whether the data of a run are whole numbers with uniform noise on [0, 1) added."""
    digits = options["data"] == "digits" and family_of(options).digits(options["dequantize"]).dequantize
    return bool(digits or options["dequantize"])


def is_whole(x: Tensor) -> bool:
    """Whether all of x are whole numbers."""
    return bool((x == x.floor()).all())


def _digits(options: dict[str, Any]) -> Data:
    from pyro_gen.datasets import digits

    for name in ("validation", "test", "split_seed", "delimiter"):
        if options.get(name) is not None:
            option = "--" + name.replace("_", "-")
            raise BadInput(f"{option}: the digits are split once and for all (1200, 237, 360 rows): leave it out")
    if options.get("header"):
        raise BadInput("--header is for .csv files: leave it out with --data digits")
    form = family_of(options).digits(options["dequantize"])
    with about("--data digits"):
        parts = digits(levels=form.levels, flat=form.flat, dequantize=form.dequantize, labels=True)
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
            parts = (dequantize(parts[0], seed=options.get("split_seed") or 0), *parts[1:])
        return parts


def _facts(source: str, *parts: tuple[Tensor, ...]) -> dict[str, Any]:
    from pyro_gen.fitting.checkpoints import checksum

    rows = dict(zip(("train", "validation", "test"), (len(part[0]) for part in parts), strict=True))
    return {"source": source, "crc32": checksum(tuple(tensor for part in parts for tensor in part)), "rows": rows}
