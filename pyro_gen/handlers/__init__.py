r"""What can be asked of any Pyro program: its density row by row, its score, its prior, its structure.

A Pyro program is a joint density written as a sampler. Run under ``poutine.trace`` with its data observed, the sum of
the log-probabilities of its sites is :math:`\log f(x)`; sites inside the plate over rows (the *data plate*) give one
value a row, sites outside belong to all rows at once and are the program's prior. With a guide,
:math:`\log w = \log f(x, z) - \log q(z \mid x)` is the log importance weight on which every bound and estimate of
:math:`\log p(x)` stands.

Conventions: the program is called as ``model(*batch)``, the first tensor of the batch is ``x``, its first dimension
counts the rows. The data plate is the plate named ``"data"``; where a program has none, the one plate that every
observed site shares and that is as long as ``x``. Masks (``poutine.mask``) are applied, scales (``poutine.scale``,
subsampling plates) are not: a row's log-density does not depend on how many other rows there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from pyro_gen.handlers.densities import (
    log_prior,
    log_weight,
    row_log_prob,
    row_total,
    weigh,
    with_particles,
)
from pyro_gen.handlers.derivatives import laplacian, score
from pyro_gen.handlers.energies import Factor, boltzmann_machine, energy
from pyro_gen.handlers.marginal import log_density, marginal_rows
from pyro_gen.handlers.sites import (
    PARTICLE_PLATE,
    Site,
    SiteKind,
    Unobserve,
    count_rows,
    find_data_plate,
    free_latents,
    innermost,
    plates_of,
    sample_sites,
    site_kind,
    unmasked,
    without_subsampling,
)
from pyro_gen.handlers.structure import Structure, check_pair, pair_sites, pair_traces, require_local, structure

__all__ = [
    "PARTICLE_PLATE",
    "Callable",
    "Factor",
    "Iterable",
    "Site",
    "SiteKind",
    "Structure",
    "Unobserve",
    "annotations",
    "boltzmann_machine",
    "check_pair",
    "count_rows",
    "energy",
    "find_data_plate",
    "free_latents",
    "innermost",
    "laplacian",
    "log_density",
    "log_prior",
    "log_weight",
    "marginal_rows",
    "math",
    "pair_sites",
    "pair_traces",
    "plates_of",
    "require_local",
    "row_log_prob",
    "row_total",
    "sample_sites",
    "score",
    "site_kind",
    "structure",
    "unmasked",
    "weigh",
    "with_particles",
    "without_subsampling",
]
