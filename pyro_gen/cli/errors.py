"""From an exception to one line and an exit status; bugs keep their traceback."""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["BAD_INPUT", "DIVERGED", "INTERRUPTED", "BadInput", "about", "deliberate", "one_line"]

BAD_INPUT, DIVERGED, INTERRUPTED = 2, 3, 130

# Arguments of the Python functions that the command line has as options, and two that it calls otherwise.
SAME = (
    "activation average base batch_size bins bound chains checkpoint_every clip_norm compile components coupling "
    "delimiter device direction energy epochs eps gradient guide header hidden latent_dim layers levels likelihood lr "
    "network noise orders patience prediction prior projections ratio sampler scale schedule seed steps step_size "
    "support temperatures timesteps transform unconditional validate_every validation variance warmup weighting"
)
OPTIONS = {
    "num_particles": "particles",
    "num_samples": "importance-samples",
    **{name: name.replace("_", "-") for name in SAME.split()},
}


class BadInput(Exception):
    """What was asked cannot be done as asked; the message names the argument and the fix."""


def deliberate(error: BaseException) -> bool:
    """Whether a ``raise`` of this package raised it: its word on bad input, and no bug that it ran into."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    frame = place.tb_frame
    ours = frame.f_globals.get("__name__", "").partition(".")[0] == "pyro_gen"
    return ours and dis.opname[frame.f_code.co_code[place.tb_lasti]] == "RAISE_VARARGS"


def one_line(error: BaseException | str) -> str:
    """The message on one line, with Python's arguments spelt as options: ``batch_size=9`` as ``--batch-size=9``."""
    text = " ".join(str(error).split())
    for name, option in OPTIONS.items():
        text = re.sub(rf"\b{name}=True\b", f"--{option}", text)
        text = re.sub(rf"(?<![\w-]){name}=(?=[\s,.:;)]|$)", f"--{option}", text)
        text = re.sub(rf"(?<![\w-]){name}=", f"--{option}=", text)
        text = re.sub(rf"^{name}(?= (must|as a fraction)\b)", f"--{option}", text)
    return text


@contextmanager
def about(option: str) -> Iterator[None]:
    """What is wrong inside is wrong with this option."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{option}: {describe(error)}") from error
    except (ValueError, TypeError, ImportError) as error:
        if not deliberate(error):
            raise
        raise BadInput(f"{option}: {one_line(error)}") from error


def describe(error: OSError) -> str:
    """An OSError in words: the file, then what the system said."""
    if error.strerror is None:
        return one_line(error)
    return one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
