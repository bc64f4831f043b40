"""What the command line asks of a family: its options, and how they become a program and its objective.

A family is a dataclass whose fields are its options, each declared once, with its help; its methods read them. Options
of data, training and run folder are those of all families, in `pyro_gen.cli.options`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_type_hints

from pyro_gen.cli.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_gen.base import EvidenceMethod, ObjectiveModule, Program
    from pyro_gen.cli.sources import Data

__all__ = ["PANELS", "DigitsForm", "Family", "interval", "number", "parameters", "refuse_counts", "sizes"]

PANELS = ("Data", "Model", "Objective", "Training", "Run folder and evidence")  # of the help, in this order


class DigitsForm(NamedTuple):
    """How a model takes the digits: 2 or 17 levels, as rows or as images, with uniform noise on [0, 1) or without."""

    levels: Literal[2, 17] = 17
    flat: bool = True
    dequantize: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of ``pyro-gen fit``; fields are options.

    Attributes:
        name: as in ``pyro-gen fit NAME``.
        about: the line in the list of families: what it is, and what it does about Z.
        text: what its help says before it comes to the run folder.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    text: ClassVar[str]

    def digits(self, dequantize: bool) -> DigitsForm:
        """The form in which these options take the digits, if ``--dequantize`` was given or not."""
        return DigitsForm(dequantize=dequantize)

    def module(self, content: Data, options: dict[str, Any]) -> ObjectiveModule:
        """The objective of the program that these options describe; ``options`` are those of all families."""
        raise NotImplementedError

    def evidence(self, seed: int, program: Program | None = None) -> EvidenceMethod | None:
        """How the evidence of rows is had; None for a program that has its density exactly.

        Without a program, before there is one, it is asked only to refuse wrong options.
        """
        return None


def parameters(options: type[Any]) -> list[inspect.Parameter]:
    """Fields of a dataclass as parameters of a command."""
    hints = get_type_hints(options, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(options)
    ]


def sizes(text: str) -> tuple[int, ...]:
    """Hidden sizes, as 128,128."""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise BadInput(f"--hidden must be sizes such as 128,128, got {text!r}") from error


def number(text: str | None) -> Any:
    """A number where the text is one, else the text: the library says what it may be."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def interval(text: str, supports: tuple[str, ...]) -> Any:
    """The name of a support, or a pair of numbers."""
    if text in supports:
        return text
    try:
        low, high = (float(end) for end in text.split(","))
    except ValueError:
        raise BadInput(f"--support must be {', '.join(supports)} or LOW,HIGH such as 0,17, got {text!r}") from None
    if not low < high:
        raise BadInput(f"--support must be LOW,HIGH with LOW below HIGH, such as 0,17, got {text!r}")
    return low, high


def refuse_counts(x: Tensor, instead: str) -> None:
    """Refuse whole numbers for a density on the reals: it can grow without bound at them, and its nats mean nothing."""
    if bool((x == x.floor()).all()):
        raise BadInput(
            f"--data: x holds whole numbers only, at which a density can grow without bound: add --dequantize{instead}"
        )
