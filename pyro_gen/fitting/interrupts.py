"""Ctrl-C, held back until the loop stands between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interrupts_held"]


@contextmanager
def interrupts_held() -> Iterator[list[bool]]:
    """Hold back the first Ctrl-C: the list fills, and the loop stops between two steps, where its state is whole.

    The second one interrupts at once, as does the first outside the main thread or where a handler is set already.
    """
    interrupted: list[bool] = []
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupted
        return

    def note(number: int, frame: Any) -> None:
        if interrupted:
            signal.default_int_handler(number, frame)
        interrupted.append(True)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
