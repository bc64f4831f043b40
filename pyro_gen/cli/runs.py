"""The run folder: what was asked, and the files that say what came of it."""

from __future__ import annotations

import json
import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_gen.cli.errors import BadInput, about, describe

if TYPE_CHECKING:
    from pyro_gen.fitting import FitResult

__all__ = ["Run"]

FORMAT = 1


class Run:
    """A run folder.

    Args:
        folder: where it is, or will be.

    Attributes:
        options: the options of ``pyro-gen fit``, by name; with those of a run that were left out filled in.
        data: what identifies the data: source, checksum, rows of each part.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options: dict[str, Any] = {}
        self.data: dict[str, Any] = {}

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    def file(self, name: str) -> Path:
        return self.folder / name

    def command(self) -> str:
        """The command that makes this run again, every option spelt out."""
        words = ["pyro-gen", "fit", self.options["family"]]
        for name, value in self.options.items():
            option = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words += [option] if value else [f"--no-{option[2:]}"] if name in ("plots", "progress") else []
            elif value is not None and name != "family":
                words += [option, shlex.quote(str(value))]
        return " ".join([*words, "--out", shlex.quote(str(self.folder))])

    def require_new(self) -> None:
        """Refuse a folder that exists."""
        try:
            taken = self.folder.exists() or self.folder.is_symlink()
        except OSError as error:  # a name that is too long, a parent that may not be read
            raise BadInput(f"--out: {describe(error)}; name a folder that can be written") from error
        if taken:
            raise BadInput(f"--out: {self.folder} exists: name a new folder, or go on with that run by --resume")

    def create(self) -> None:
        """Make the folder; it must not exist yet."""
        self.require_new()
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise BadInput(f"--out: cannot make the folder {describe(error)}; name one that can be written") from error

    def write(self) -> None:
        """Write ``config.json``."""
        import pyro
        import torch

        from pyro_gen import __version__

        content = {
            "format": FORMAT,
            "command": self.command(),
            "options": self.options,
            "data": self.data,
            "versions": {
                "pyro_gen": __version__,
                "torch": torch.__version__,
                "pyro": pyro.__version__,
                "python": platform.python_version(),
            },
        }
        self.config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def discard(self) -> None:
        """Take back a folder in which nothing was kept yet."""
        if not self.checkpoint.exists():
            self.config.unlink(missing_ok=True)
            self.checkpoint.with_name(self.checkpoint.name + ".part").unlink(missing_ok=True)
            self.folder.rmdir()

    def read(self, argument: str) -> None:
        """Read ``config.json``; ``argument`` is what the folder was called on the command line."""
        if not self.folder.is_dir():
            problem = "is no folder" if self.folder.exists() else "does not exist"
            raise BadInput(f"{argument}: {self.folder} {problem}: name a folder written by pyro-gen fit")
        if not self.config.is_file():
            raise BadInput(f"{argument}: {self.folder} has no config.json: name a folder written by pyro-gen fit")
        try:
            content = json.loads(self.config.read_text(encoding="utf-8"))
            format_, self.options, self.data = content["format"], dict(content["options"]), dict(content["data"])
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"{argument}: {self.config} is cut short, or was not written by pyro-gen fit") from error
        if format_ != FORMAT:
            raise BadInput(f"{argument}: {self.config} has format {format_!r}, and this version reads {FORMAT}")

    def result(self) -> FitResult:
        """The fit, weights and all."""
        from pyro_gen import load

        if not self.file("program.json").exists():
            hint = f"pyro-gen fit {self.options.get('family')} --out {self.folder} --resume"
            raise BadInput(f"RUN: {self.folder} holds an unfinished run: go on with it by {hint}")
        with about("RUN"):
            return load(self.folder)
