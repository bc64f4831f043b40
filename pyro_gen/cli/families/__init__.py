"""The families of ``pyro-gen fit``, one a file: its options, and what they build.

A new family is a file here, with a `Family` in it, and its class in `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pyro_gen.cli.errors import BadInput
from pyro_gen.cli.families.autoregressive import AutoregressiveFamily
from pyro_gen.cli.families.diffusion import DiffusionFamily
from pyro_gen.cli.families.ebm import EBMFamily
from pyro_gen.cli.families.family import PANELS, DigitsForm, Family, parameters
from pyro_gen.cli.families.flow import FlowFamily
from pyro_gen.cli.families.vae import VAEFamily

__all__ = ["FAMILIES", "PANELS", "DigitsForm", "Family", "family_of", "named", "parameters"]

FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (VAEFamily, FlowFamily, AutoregressiveFamily, EBMFamily, DiffusionFamily)
}  # in the order of the help


def named(families: list[str]) -> str:
    """Names in a sentence: vae, flow, autoregressive, ebm or diffusion."""
    return " or ".join([", ".join(families[:-1]), families[-1]] if len(families) > 1 else families)


def family_of(options: dict[str, Any]) -> Family:
    """The family of a run, with its options."""
    name = options.get("family")
    if name not in FAMILIES:
        raise BadInput(f"RUN: config.json holds a run of {name!r}, and this version fits {named(list(FAMILIES))}")
    kind = FAMILIES[name]
    missing = [field.name for field in fields(kind) if field.name not in options]
    if missing:
        raise BadInput(f"RUN: config.json lacks {', '.join(missing)}: it was not written by this pyro-gen fit {name}")
    return kind(**{field.name: options[field.name] for field in fields(kind)})
