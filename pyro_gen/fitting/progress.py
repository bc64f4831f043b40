"""The progress line of a fit."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Steps done, loss per datum and time left; shown on a terminal, silent elsewhere.

    Args:
        steps: steps of the run.
        shown: True or False; None shows it if standard error is a terminal.
        sign: what stands before the value: ``"≥"`` for a bound, ``"="`` for a likelihood, ``""`` for other losses.
    """

    def __init__(self, steps: int, shown: bool | None, sign: str) -> None:
        self.steps, self.sign = steps, sign
        self.shown = sys.stderr.isatty() if shown is None else shown
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("fit"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task("fit", total=self.steps, note="")
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: int, loss: float, validation: float | None) -> None:
        """Show the state after ``step`` steps; losses are per datum."""
        if self.bar is None:
            return
        note = f"{self.sign} {-loss:.2f} nats per datum" if self.sign else f"loss {loss:.4g} per datum"
        if validation is not None:
            note += f", validation {-validation:.2f}" if self.sign else f", validation {validation:.4g}"
        self.bar.update(self.task, completed=step, note=note)
