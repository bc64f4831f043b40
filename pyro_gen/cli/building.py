"""From the options of ``pyro-gen fit`` to the objective of a program and the arguments of ``pg.fit``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyro_gen.cli.errors import BadInput
from pyro_gen.cli.families import family_of
from pyro_gen.cli.families.family import number
from pyro_gen.cli.sources import Data

if TYPE_CHECKING:
    from pyro_gen.base import EvidenceMethod, ObjectiveModule, Program

__all__ = ["BATCH_SIZE", "build", "evidence_method", "fit_options"]

BATCH_SIZE = 128


def build(options: dict[str, Any], content: Data) -> ObjectiveModule:
    """The objective module that the options describe, its weights drawn under their seed."""
    import pyro

    seed = options["seed"]
    if not 0 <= seed < 2**32:
        raise BadInput(f"--seed must be between 0 and 2**32 - 1, got {seed}")
    pyro.set_rng_seed(seed)
    return family_of(options).module(content, options)


def fit_options(options: dict[str, Any], content: Data) -> dict[str, Any]:
    """The arguments of ``pg.fit``, for the rows that there are to train on."""
    if options["compile"] not in ("auto", "on", "off"):
        raise BadInput(f"--compile must be auto, on or off, got {options['compile']!r}")
    if options["schedule"] not in ("cosine", "constant"):
        raise BadInput(f"--schedule must be cosine or constant, got {options['schedule']!r}")
    steps, epochs, rows = options["steps"], options["epochs"], len(content.train[0])
    size = min(BATCH_SIZE, rows) if options["batch_size"] is None else options["batch_size"]
    if content.copies > 1 and steps is None and epochs is not None and min(epochs, size) > 0:
        steps, epochs = max(1, epochs * (rows // content.copies) // size), None  # a pass is one over the rows given
    return {
        "steps": 2000 if steps is None and epochs is None else steps,
        "epochs": epochs,
        "batch_size": size,
        "lr": options["lr"],
        "schedule": "cosine" if options["schedule"] == "cosine" else None,
        "clip_norm": options["clip_norm"],
        "average": number(options["average"]),
        "patience": options["patience"],
        "compile": {"auto": "auto", "on": True, "off": False}[options["compile"]],
        "device": options["device"],
        "seed": options["seed"],
        "checkpoint_every": options["checkpoint_every"],
    }


def evidence_method(options: dict[str, Any], program: Program | None = None) -> EvidenceMethod | None:
    """How the evidence of the test rows is had; None where the program says it exactly."""
    return family_of(options).evidence(options["seed"], program)
