r"""Solving ordinary differential equations for batches of rows, with an error that each row can be held to.

Adaptive methods are torchdiffeq's. A batch shares its steps, and a step is taken when the row with the *largest* error
keeps the tolerance: a mean over rows would let single rows of a large batch be off by far more, and a row's accuracy
would depend on its company.

A method over steps fixed beforehand is an explicit Runge-Kutta tableau,

.. math:: k_i = f\big(t + c_i h,\; y + h \textstyle\sum_{j<i} a_{ij} k_j\big), \qquad
          y' = y + h \textstyle\sum_i b_i k_i, \qquad e = h \textstyle\sum_i e_i k_i ,

with e an estimate of the step's error where the tableau has a second set of weights (Dormand and Prince's: order 5, and
4 beside it). The times of all stages are known before the first is run, so whatever depends on time alone comes out of
one table; the result is a smooth function of the initial state, which an adaptive one is not (it takes a step more on
one side of a boundary than on the other); and e says at no cost whether these steps were good enough for this row.

References:
    J. Dormand, P. Prince, "A family of embedded Runge-Kutta formulae", 1980, Journal of Computational and Applied
    Mathematics 6(1), table 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DOPRI5",
    "HEUN",
    "RK4",
    "Tableau",
    "error_ratio",
    "one_step",
    "solve_adaptive",
    "solve_fixed",
    "solve_steps",
    "stage_times",
]

MOST_STEPS = 1000  #: of an adaptive solve; beyond, the tolerance is out of reach

Norm = Callable[[Tensor], Tensor]  # error of a state, scaled by the tolerance, (rows, S), to one number


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: nodes c, weights a of the stages, b of the step, e of its error (or None)."""

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    errors: tuple[float, ...] | None = None

    @property
    def reuses_last(self) -> bool:
        """Whether the last stage is the next step's first: it then costs nothing."""
        return len(self.stages) > 1 and self.nodes[-1] == 1.0 and (*self.stages[-1], 0.0) == self.weights


HEUN = Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5))
RK4 = Tableau((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
_FIFTH = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
_FOURTH = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
DOPRI5 = Tableau(
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _FIFTH[:-1],
    ),
    _FIFTH,
    tuple(fifth - fourth for fifth, fourth in zip(_FIFTH, _FOURTH, strict=True)),
)


def solve_fixed(
    field: Callable[[int, Tensor], Tensor],
    state: Tensor,
    grid: Tensor,
    tableau: Tableau,
    *,
    path: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Solve over the steps of a grid.

    Args:
        field: the derivative as a function of the *stage*, counted over all steps (those of step i begin at i times
            the number of nodes; see :func:`stage_times`), and of the state ``(rows, S)``.
        state: at the grid's first time. grid: times, ``(steps + 1,)`` on the CPU, in either direction.
        tableau: the method.
        path: a list that is given the state at each time of the grid.

    Returns:
        The state at the last time; estimates of the error of each step ``(steps, rows, S)``, or None where the method
        has none; and the greatest absolute state of each step, of that shape.
    """
    stages, sizes = len(tableau.nodes), (grid[1:] - grid[:-1]).tolist()
    weights: list[Tensor | None] = [state.new_tensor(row) if row else None for row in tableau.stages]
    ahead = state.new_tensor(tableau.weights)
    wrong = None if tableau.errors is None else state.new_tensor(tableau.errors)
    errors, greatest, known = [], [], None
    if path is not None:
        path.append(state)
    for i, h in enumerate(sizes):
        slopes = [field(i * stages, state) if known is None else known]
        reached = state
        for j in range(1, stages):
            row = weights[j]
            assert row is not None
            reached = torch.add(state, _combine(row, slopes), alpha=h)
            slopes.append(field(i * stages + j, reached))
        if tableau.reuses_last:
            after, known = reached, slopes[-1]
        else:
            after = torch.add(state, _combine(ahead, slopes), alpha=h)
        if wrong is not None:
            errors.append(h * _combine(wrong, [slope.detach() for slope in slopes]))
        greatest.append(torch.maximum(state.detach().abs(), after.detach().abs()))
        state = after
        if path is not None:
            path.append(state)
    return state, torch.stack(errors) if errors else None, torch.stack(greatest)


def one_step(
    field: Callable[[int, Tensor], Tensor], state: Tensor, first: Tensor, h: Tensor, tableau: Tableau
) -> tuple[Tensor, ...]:
    """One step of a tableau that reuses its last stage, in operations that trace.

    Returns:
        The state after it, its slope there, the error and the greatest absolute state, all ``(rows, S)``.
    """
    assert tableau.reuses_last
    assert tableau.errors is not None
    slopes, reached = [first], state
    for j in range(1, len(tableau.nodes)):
        reached = state + h * sum(a * k for a, k in zip(tableau.stages[j], slopes, strict=False) if a)
        slopes.append(field(j, reached))
    error = h * sum(e * k for e, k in zip(tableau.errors, slopes, strict=True) if e)
    return reached, slopes[-1], error, torch.maximum(state.abs(), reached.abs())


def solve_steps(
    step: Callable[..., Any], first: Tensor, state: Tensor, grid: Tensor, table: Tensor, tableau: Tableau
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`solve_fixed` gives, by a :func:`one_step` that has been compiled.

    Args:
        step: of (state, its slope, h, the part of the table that belongs to the step). first: slope of the state.
        table: what the field reads at each stage of each step, ``(stages, ...)``.
    """
    errors, greatest, stages = [], [], len(tableau.nodes)
    for i, h in enumerate((grid[1:] - grid[:-1]).unbind()):
        state, first, error, most = step(state, first, h, table[i * stages : (i + 1) * stages])
        errors.append(error)
        greatest.append(most)
    return state, torch.stack(errors), torch.stack(greatest)


def _combine(weights: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    combined: Tensor = torch.tensordot(weights, torch.stack(list(slopes)), 1)
    return combined


def stage_times(grid: Tensor, tableau: Tableau) -> Tensor:
    """The times of all stages of all steps, in the order in which :func:`solve_fixed` counts them."""
    nodes = torch.tensor(tableau.nodes, dtype=grid.dtype)
    return (grid[:-1, None] + (grid[1:] - grid[:-1])[:, None] * nodes).flatten()


def error_ratio(errors: Tensor, greatest: Tensor, rtol: float, atol: float, norm: Norm) -> float:
    """The largest error of a step, as a multiple of the tolerance; not finite where an error is not."""
    scaled = errors / (atol + rtol * greatest)
    return float(norm(scaled.flatten(0, 1)))


def solve_adaptive(
    field: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    start: float,
    end: float,
    *,
    solver: str,
    rtol: float,
    atol: float,
    norm: Norm,
    times: Tensor | None = None,
    taken: list[float] | None = None,
    most: int = MOST_STEPS,
) -> Tensor:
    """Solve by one of torchdiffeq's adaptive methods.

    Args:
        field: the derivative as a function of time, a tensor, and the state ``(rows, S)``.
        state: at ``start``. solver: its name. rtol, atol: tolerances of a step's error. norm: of that error.
        times: where the state is wanted, from ``start`` to ``end``; by default at both.
        taken: a list that is given the time at which each step begins.
        most: number of steps.

    Returns:
        States at these times, ``(times, rows, S)``.

    Raises:
        ArithmeticError: where the tolerance cannot be kept.
    """
    import torchdiffeq  # brings scipy.integrate along, which few need

    class Derivative(torch.nn.Module):  # the form in which torchdiffeq takes callbacks
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return field(t, y)

        def callback_accept_step(self, t: Any, y: Any, dt: Any) -> None:
            if taken is not None:
                taken.append(float(t))

    ends = torch.tensor([start, end], dtype=torch.float64)
    asked = ends if times is None else times
    asked = asked.to(state.device)
    options = {"norm": lambda error: norm(error.detach()), "step_t": asked[1:], "max_num_steps": most}
    try:
        solution: Tensor = torchdiffeq.odeint(
            Derivative(), state, asked, rtol=rtol, atol=atol, method=solver, options=options
        )
    except AssertionError as error:  # the way torchdiffeq has of saying that its step became 0, or that it gave up
        raise ArithmeticError(
            f"{solver} cannot keep rtol={rtol:g} and atol={atol:g} in {state.dtype} ({error}): the input or the "
            "weights are not finite, or the field is too steep; check them, allow larger tolerances or use float64"
        ) from error
    return solution
