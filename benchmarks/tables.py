"""What the benchmark scripts share: versions, and tables written into the documentation between markers."""

from __future__ import annotations

import datetime
import platform
import re
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def stamp() -> str:
    """Versions and date, to stand under every table."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "pyro-ppl", "numpy"))
    return f"{datetime.date.today()}, Python {platform.python_version()}, {packages}, one CPU thread"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def publish(name: str, text: str, write: bool) -> None:
    """Print a table and, if asked, put it into docs/benchmarks.md between its markers."""
    print(text, flush=True)
    if not write:
        return
    page = PAGE.read_text()
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in page or end not in page:
        raise SystemExit(f"{PAGE} has no markers {begin} … {end}")
    page = re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.S)
    PAGE.write_text(page)
