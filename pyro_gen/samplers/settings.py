"""Samplers as names and numbers, so that what holds one can be written down and made again without running code."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pyro_gen.base import Sampler
from pyro_gen.samplers.gibbs import Gibbs
from pyro_gen.samplers.hmc import HMC
from pyro_gen.samplers.langevin import MALA, Langevin

__all__ = ["described", "rebuilt"]

SAMPLERS: dict[str, Any] = {s.__name__: s for s in (Langevin, MALA, HMC, Gibbs)}


def described(sampler: Sampler) -> Any:
    """A sampler of the package as its name and settings; any other in words."""
    if SAMPLERS.get(type(sampler).__name__) is not type(sampler):
        return repr(sampler)
    found = {f.name: getattr(sampler, f.name) for f in fields(sampler)}  # type: ignore[arg-type]
    return {"name": type(sampler).__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}}


def rebuilt(settings: dict[str, Any]) -> Sampler:
    """The sampler of these :func:`described` settings; a ``KeyError`` for a name that is none."""
    sampler: Sampler = SAMPLERS[settings["name"]](**{k: v for k, v in settings.items() if k != "name"})
    return sampler
