r"""Is a program right? One check for each promise that a program and its losses make.

`check_program` runs what applies to a program: a family of your own, or a Pyro pair held by ``pg.Bounded`` and its
kin. The promises, in the order in which they are checked:

==================== =================================================================================================
of a program         shapes and dtypes; its fast path is the density of its trace; its score is the gradient of its
                     density, by autograd and by finite differences; its state comes back from ``state_dict``; a
                     deepcopy is its own; one seed, one draw, and the global generators as they were; ``Predictive``
                     and ``pyro.render_model`` take it
of a loss on it      gradient reaches every parameter of its player, no other and none that is frozen; the mean over
                     mini-batches is the full batch; ``total`` scales rows and nothing else; ``pointwise`` adds up to
                     it; it stays on one device; its traced (and its compiled) step is the eager step; ``SVI``, a
                     plain torch loop and ``fit`` end at the same weights
==================== =================================================================================================

Every check works on a copy, with an empty parameter store and its own random numbers, and leaves nothing behind. What
is random is compared in the mean, within four standard errors (five where each row is looked at); what is not, to
rounding. A promise that is not kept is a `ContractError`, an ``AssertionError`` that names it.

Each check is a function of its own, for a test suite that wants them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from pyro_gen.base import Bounded, Objective, ObjectiveModule, Program, Samples, Unnormalized, known_objectives
from pyro_gen.compiled import why_not
from pyro_gen.testing.basis import ContractError, alone, fresh, is_discrete, structure
from pyro_gen.testing.losses import (
    OneDevice,
    check_batches,
    check_declared,
    check_gradients,
    check_one_device,
    check_pointwise,
    check_total,
    check_traced,
    check_trainers,
)
from pyro_gen.testing.programs import (
    check_deepcopy,
    check_density,
    check_predictive,
    check_render,
    check_score,
    check_seeds,
    check_shapes,
    check_state,
)

__all__ = [
    "ContractError",
    "OneDevice",
    "check_batches",
    "check_declared",
    "check_deepcopy",
    "check_density",
    "check_gradients",
    "check_one_device",
    "check_pointwise",
    "check_predictive",
    "check_program",
    "check_render",
    "check_score",
    "check_seeds",
    "check_shapes",
    "check_state",
    "check_total",
    "check_traced",
    "check_trainers",
]


def check_program(
    program: Program,
    x: Tensor,
    context: Tensor | None = None,
    objectives: Iterable[Objective[Any]] | None = None,
    *,
    inductor: bool = False,
) -> tuple[str, ...]:
    """Run every check that applies to a program and to the losses it is trained by.

    Args:
        program: a program of any kind. It is not changed.
        x: some rows of data, ``(rows, *event_shape)``, at least two; ``context`` likewise, for a conditional program.
        objectives: what it is to be trained by; None for likelihood and bounds where it has them, else for every
            objective of the package that takes its kind and data.
        inductor: also compile the step of every objective (seconds each), not only trace it.

    Returns:
        The names of the checks that ran: one that does not apply (the score of discrete data, tracing a program that
        reads the global parameter store, rows of a program without a plate over them) is not among them.

    Raises:
        ContractError: at the first promise that is not kept; an ``AssertionError`` that names it.

    Example:
        >>> import torch, pyro_gen as pg
        >>> vae = pg.VAE(3, latent_dim=2, hidden=(8,))
        >>> ran = check_program(vae, torch.randn(6, 3), objectives=[pg.ELBO()])
        >>> "ELBO: traced" in ran, "score" in ran  # a bound has no score
        (True, False)
    """
    if not isinstance(program, Program):
        raise TypeError(
            f"check_program takes a program, got {type(program).__name__}: hold a Pyro pair by "
            "pg.Bounded(model, guide, event_shape), pg.Exact(model, event_shape), …"
        )
    ran: list[str] = []

    def run(name: str, check: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            check(*args, **kwargs)
        except ContractError as error:
            raise ContractError(f"{type(program).__name__}, {name}: {error}") from error
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise ContractError(f"{type(program).__name__}, {name}: stopped by {what}") from error
        ran.append(name)

    run("shapes", check_shapes, program, x, context)
    with alone():
        batch = program.check(x, context)
        shape, discrete = structure(fresh(program), *batch), is_discrete(fresh(program), *batch)
    run("density", check_density, program, x, context)
    if isinstance(program, Unnormalized) and not discrete:
        run("score", check_score, program, x, context)
    run("state", check_state, program, x, context)
    run("deepcopy", check_deepcopy, program, x, context)
    if isinstance(program, Samples):
        run("seeds", check_seeds, program, context)
        run("predictive", check_predictive, program, x, context)
    run("render", check_render, program, x, context)

    if objectives is None:
        other = "continuous" if discrete else "discrete"
        makes = [make for make in known_objectives() if isinstance(program, make.needs) and make.takes != other]
        if isinstance(program, Bounded):  # likelihood or bound: other losses train it too, but ask more of its density
            makes = [make for make in makes if make.loss_is in ("log-likelihood", "lower bound")]
        objectives = [make() for make in makes]
    for objective in objectives:
        name = type(objective).__name__
        module = objective(program)
        run(f"{name}: declared", check_declared, module, *batch)
        run(f"{name}: gradients", check_gradients, module, *batch)
        summed = type(module).pointwise is not ObjectiveModule.pointwise and not shape.enumerated
        if summed and shape.data_plate and not shape.global_sites:  # whose share of the loss is no row's
            run(f"{name}: pointwise", check_pointwise, module, *batch)
        if shape.data_size == x.shape[0]:  # not where the program takes mini-batches of its own
            run(f"{name}: batches", check_batches, module, *batch)
        run(f"{name}: total", check_total, module, *batch)
        run(f"{name}: trainers", check_trainers, objective, program, x, context)
        with alone():
            prepared = fresh(module)
            prepared.prepare(*batch)
        if not prepared.__dict__["store_parameters"]:
            run(f"{name}: one device", check_one_device, module, *batch)
        if why_not(prepared) is None:
            run(f"{name}: traced", check_traced, module, *batch)
            if inductor:
                run(f"{name}: compiled", check_traced, module, *batch, inductor=True)
    return tuple(ran)
