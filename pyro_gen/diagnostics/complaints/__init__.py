r"""What is wrong with a Pyro pair, said before it trains.

Pyro trains much that it should not: a factor whose Z depends on the weights (its loss falls without end), a guide that
draws one z for all rows, a column that meets a vector and scores every row against every other, weights that no
optimizer finds. None of it is an error, all of it shows in a run or two. `check` runs a pair a few times, looks at the
sites and at what the graphs of their log-probabilities end in, and says what it finds in sentences.

One function a complaint, in the table `LOOKS`: each takes a `Pair`, what the runs showed, and yields complaints.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_gen import scopes
from pyro_gen.base import Implicit, Nothing, Objective, Program, known_objectives
from pyro_gen.checks import check_count, describe
from pyro_gen.diagnostics.complaints.complaint import Complaint, name_of_objective
from pyro_gen.diagnostics.complaints.devices import left_behind
from pyro_gen.diagnostics.complaints.factors import kinked_energy, unhandled_normalizer, unidentified_bias
from pyro_gen.diagnostics.complaints.runs import RAISED, Pair, examine, modules_of, untouched
from pyro_gen.diagnostics.complaints.sites import (
    batch_dims,
    data_sites,
    guide_sites,
    outside_support,
    plate_scale,
    plates_differ,
    raised,
    rough_draws,
    subsample_overridden,
    support_mismatch,
    value_shape,
)
from pyro_gen.diagnostics.complaints.training import not_finite, unreached_parameters, unseen_parameters

__all__ = ["Complaint", "check"]

LOOKS: tuple[Callable[[Pair], Iterator[Complaint]], ...] = (
    raised,
    unhandled_normalizer,
    kinked_energy,
    unidentified_bias,
    batch_dims,
    value_shape,
    plate_scale,
    subsample_overridden,
    data_sites,
    outside_support,
    guide_sites,
    plates_differ,
    support_mismatch,
    rough_draws,
    unseen_parameters,
    unreached_parameters,
    not_finite,
)

# of a program that is only drawn from: no density of its sites is ever asked for
DRAWN: tuple[Callable[[Pair], Iterator[Complaint]], ...] = (raised, batch_dims, value_shape, plate_scale)


def check(
    model: Callable[..., Any],
    guide: Any = None,
    *batch: Any,
    objective: Any = None,
    total: int | None = None,
    device: str | torch.device | None = None,
) -> list[Complaint]:
    """Find what is wrong with a model and guide before they are trained; an empty list is no proof that nothing is.

    Runs the pair a few times and puts back the weights, buffers, parameter store and random generators.

    Args:
        model, guide: a Pyro pair called as ``model(*batch)``, guide None where there is none; or a program alone, as
            ``check(program, x)``.
        batch: a first batch: ``x`` of shape ``(rows, ...)`` and what else the pair takes.
        objective: the loss it is meant for, as ``pg.ELBO()`` or its class; None for any, and each complaint names the
            losses for which it matters.
        total: number of rows of the full data set, where the batch is a part of it.
        device: where it is to be trained, if not where the batch is; CPU constants are looked for, without that device.

    Returns:
        A list of `Complaint`: ``str`` is a sentence, ``.code`` a name, ``.site`` the site or parameter it is about.

    Raises:
        TypeError: if model, guide or objective are none.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0), obs=x)          # no plate, no to_event
        >>> [complaint.code for complaint in check(model, None, torch.zeros(5, 3))]
        ['missing-plate']
    """
    pair, program = _pair(model, guide, batch, objective, total)
    complaints: list[Complaint] = []
    with untouched(pair.modules), scopes.forked_generators(0), torch.enable_grad():
        with pyro.validation_enabled(False):  # which would end the run at the first thing that it sees
            examine(pair)
            for look in DRAWN if isinstance(program, Implicit) else LOOKS:
                complaints += look(pair)
        complaints = [c for c in complaints if c.concerns(pair.objective)]
        if program is not None:  # whose kind refuses some losses by itself
            trains = {o.__name__ for o in known_objectives() if isinstance(program, o.needs)}
            complaints = [c for c in complaints if not c.objectives or trains.intersection(c.objectives)]
        if isinstance(objective, Objective) and not complaints:
            complaints += _refused(objective, program or pair.model, pair)
        where = pair.x.device if device is None and pair.x is not None else torch.device(device or "cpu")
        if where.type != "cpu" and pair.runs:
            with pyro.validation_enabled(False):
                complaints += left_behind(pair)
    return complaints


def _pair(
    model: Any, guide: Any, batch: tuple[Any, ...], objective: Any, total: int | None
) -> tuple[Pair, Program | None]:
    program = model if isinstance(model, Program) else None
    if program is not None:
        batch = program.check(guide, *batch)
        model, guide = program.model, program.guide
    if isinstance(model, type) or not callable(model):
        raise TypeError(f"check takes a program, or a model and a guide (callables); got {describe(model)}")
    if isinstance(guide, type) or not (guide is None or callable(guide)):
        raise TypeError(f"guide must be callable or None, got {describe(guide)}: write check(model, None, x)")
    if any(isinstance(part, Tensor) and part.is_meta for part in batch):
        raise TypeError("the batch is on the meta device and holds no numbers: give real rows, and device= beside them")
    guide = None if isinstance(guide, Nothing) else guide
    found = {id(m): m for part in (model, guide) for m in modules_of(part)}
    owned = {n: m for n, m in (("model", model), ("guide", guide)) if isinstance(m, nn.Module)}
    pair = Pair(
        model,
        guide,
        batch,
        name_of_objective(objective),
        getattr(objective, "check_smooth", True) is not False,
        None if total is None else check_count(total, "total"),
        list(found.values()),
        owned,
    )
    return pair, program


def _refused(objective: Objective[Any], model: Any, pair: Pair) -> list[Complaint]:
    """What the objective itself says at its first look, where nothing else was found."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slow guides; it says so again when it trains
            bound = objective(model) if isinstance(model, Program) else objective(model, pair.guide)
            bound.prepare(*pair.batch)
    except RAISED as error:
        name = type(objective).__name__
        return [Complaint("refused", None, f"{name} refuses the program", f"{error}", error=error)]
    return []
