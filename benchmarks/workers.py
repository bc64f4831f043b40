"""One worker process per library, each in an environment of its own, driven in turn.

Other libraries change torch's global settings when they are imported, and want different dependencies: none of them is
imported here. `prepare` makes the environments that are missing (`requirements-<library>.txt` of a benchmark's folder,
with torch from `constraints.txt`); ours is the one that the script runs in. A worker answers one command before the
next is sent to any, so that no two ever compete for a core. `serving.py` is what answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".benchmark-environments"


def python_of(library: str, environments: Path) -> Path:
    if library == "ours":
        return Path(sys.executable)
    return environments.resolve() / library / "bin" / "python"  # not resolved further: a link names its environment


def prepare(environments: Path, libraries: tuple[str, ...], folder: Path) -> None:
    """Make the environments that are missing, by the requirements in a benchmark's folder."""
    for library in libraries:
        python = python_of(library, environments)
        if library == "ours" or python.exists():
            continue
        print(f"making {python.parent.parent}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        requirements = folder / f"requirements-{library}.txt"
        install = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*install, "-r", str(requirements), "setuptools"], check=True)


class Worker:
    """A library's process. ``worker("build", name=…)`` sends a command and waits for its answer."""

    def __init__(self, library: str, script: Path, environments: Path = ENVIRONMENTS) -> None:
        python = python_of(library, environments)
        if not python.exists():
            raise SystemExit(f"no environment for {library} at {python}: run this script with --prepare first")
        self.library = library
        self.folder = tempfile.TemporaryDirectory(prefix=f"{library}-")
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            # compilers run in this process and its children alone, and find nothing compiled before
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": self.folder.name,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "PYTHONWARNINGS": "ignore",
        }
        if library == "ours":
            environment["PYTHONPATH"] = str(ROOT)
        command = [str(python), str(script), library]
        self.log = (Path(self.folder.name) / "stderr.txt").open("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.poll() is None:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            if reply := self.process.stdout.readline():
                answer: dict[str, Any] = json.loads(reply)
                return answer
        self.log.seek(0)
        tail = "".join(self.log.readlines()[-25:])
        raise RuntimeError(f"the worker of {self.library} ended at {do!r}, {arguments}:\n{tail}")

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        self.log.close()
        self.folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
