r"""Value, gradient and Laplacian of a function row by row, and the choice of how to get them.

For :math:`f` with independent rows the Laplacian of row n is :math:`\sum_k \partial^2 f_n / \partial x_{nk}^2`, the
trace of one of ``rows`` Hessians of d × d. Three exact ways:

- *forward*: one pass with the Jacobian alongside (:mod:`pyro_gen.laplacians.lifted`); d times the memory of a pass,
  which chunks of directions bound: for directions in a set K the pass gives that part of the gradient and of the sum.
  Directions, not rows, because f may hold constants with rows of its own (a context, a plate's size);
- *reverse*: the gradient, then d reverse passes through it, one a direction;
- *vmap*: d forward passes through the gradient, vectorised; needs forward-mode derivatives of every operation (not of
  a custom ``autograd.Function`` without ``jvp``). Control flow may look at values: only tangents are batched.

Measured, forward wins at every d (1.4 to 8 times), reverse is the better of the others up to d = 3, and vmap above. So
*auto* is: forward if every operation has a rule; else reverse for d ≤ 3; else vmap; else (it does not run) reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_gen.checks import describe
from pyro_gen.laplacians.lifted import Conversions, Lifted, lift
from pyro_gen.laplacians.rules import NoRule

__all__ = ["MEMORY", "Derivatives", "Method", "choose", "derivatives"]

Name = Literal["forward", "reverse", "vmap"]
Rows = Callable[[Tensor], Tensor]
MEMORY = 2**30  # bytes
FEW = 3  # up to so many directions, d reverse passes are cheaper than vmap
COPIES = 3  # of a Jacobian that live at once: itself, its square, its product with f'
WIDTH = 1024  # a Jacobian smaller than this times x needs no measuring
GRAPH = 64  # tensors of x's size that one direction of vmap holds


class Derivatives(NamedTuple):
    """What `derivatives` returns.

    Attributes:
        value: ``(rows,)``.
        gradient: of x's shape.
        laplacian: ``(rows,)``.
    """

    value: Tensor
    gradient: Tensor
    laplacian: Tensor


@dataclass(frozen=True)
class Method:
    """How to take second derivatives: decided once by `choose`, for calls of the same shapes.

    Attributes:
        name: ``"forward"``, ``"reverse"`` or ``"vmap"``.
        chunk: directions taken at once; None for all.
    """

    name: Name
    chunk: int | None = None


def derivatives(
    f: Rows, x: Tensor, method: Method | Literal["auto", "forward", "reverse", "vmap"] = "auto", *, memory: int = MEMORY
) -> Derivatives:
    r"""Value, gradient and Laplacian of f, row by row.

    .. math:: f_n, \qquad \nabla f_n, \qquad \sum_k \partial^2 f_n / \partial x_{nk}^2

    Works on log f as on log p: Z does not depend on x, and drops out. Differentiable in what f is made of (weights)
    where gradients are recorded, also under ``torch.func.grad`` and in a trace of ``make_fx``.

    Args:
        f: ``(rows, *event_shape)`` to ``(rows,)``, each value depending on its own row only. Under "forward" this is
            checked, operation by operation.
        x: ``(rows, *event_shape)``, floating point.
        method: a name, or what `choose` returned; "auto" decides anew at each call.
        memory: bytes that the second derivatives may take, about; chunks of directions keep to it. Where gradients are
            recorded, chunks are computed again in the backward pass; under ``torch.func`` transforms they are kept.

    Returns:
        Derivatives: of shapes ``(rows,)``, x's and ``(rows,)``.

    Raises:
        NoRule: under "forward", if an operation of f has no rule.
        TypeError: if x is no floating point tensor or f returns none.
        ValueError: for another method, or if f returns another shape.

    Under "forward" ``F.layer_norm`` is taken apart into smooth operations. Torch's own (2.13) has right first and
    second derivatives and a wrong third one, which the gradient in weights under "reverse" and "vmap" would meet: there
    an energy with ``nn.LayerNorm`` trains on a wrong gradient.

    References:
        Li et al. (2024), arXiv 2307.08214 (forward Laplacian).

    Example:
        >>> value, gradient, laplacian = derivatives(lambda x: -0.5 * (x**2).sum(-1), torch.ones(2, 3))
        >>> gradient[0], laplacian
        (tensor([-1., -1., -1.]), tensor([-3., -3.]))
    """
    _check(x, memory)
    if isinstance(method, Method):
        return _run(f, x, method, memory)
    if method in get_args(Name):
        chosen = Method(method, _chunk(f, x, memory) if method == "forward" else None)  # type: ignore[arg-type]
        return _run(f, x, chosen, memory)
    if method != "auto":
        names = ", ".join(map(repr, get_args(Name)))
        raise ValueError(f"method must be 'auto', {names} or what choose() returned, got {describe(method)}")
    if _small(x, memory):  # without a trial: the first operation without a rule ends it
        try:
            return _forward(f, x, Method("forward"))
        except NoRule:
            return _run(f, x, _without_rules(f, x), memory)
    return _run(f, x, choose(f, x, memory=memory), memory)


def choose(f: Rows, x: Tensor, *, memory: int = MEMORY) -> Method:
    """Decide how to take second derivatives of f at tensors like x: the rule of "auto", by a trial in one direction.

    Args:
        f: as for `derivatives`.
        x: ``(rows, *event_shape)``, floating point.
        memory: as for `derivatives`.

    Returns:
        Method: to be handed to `derivatives`, which then decides nothing: what a traced loss needs.

    Example:
        >>> choose(lambda x: torch.tanh(x).sum(-1), torch.zeros(2, 3))
        Method(name='forward', chunk=None)
        >>> choose(lambda x: x.sort(-1).values.sum(-1), torch.zeros(2, 3)).name
        'reverse'
    """
    _check(x, memory)
    try:
        return Method("forward", _trial(f, x, memory))
    except NoRule:
        return _without_rules(f, x)


def _check(x: Tensor, memory: int) -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating point tensor, got {kind}: derivatives need real numbers, pass x.float()")
    if x.dim() == 0:
        raise ValueError("x must have shape (rows, *event_shape), got a single number: pass x.reshape(1)")
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory must be a number of bytes, an int of at least 1, got {describe(memory)}")


def _directions(x: Tensor) -> int:
    return x.shape[1:].numel()


def _run(f: Rows, x: Tensor, method: Method, memory: int) -> Derivatives:
    if method.name == "forward":
        return _forward(f, x, method)
    result = _reverse(f, x) if method.name == "reverse" else _vmap(f, x, memory)
    return result if torch.is_grad_enabled() else Derivatives(*(t.detach() for t in result))


def _checked(value: object, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"f must return a tensor with one value a row, got {type(value).__name__}")
    if value.shape != x.shape[:1]:
        hint = "drop the last dimension, as by .squeeze(-1)" if value.shape == (len(x), 1) else "sum over features only"
        raise ValueError(f"f must return one value a row, shape ({len(x)},), got {tuple(value.shape)}: {hint}")
    return value


# -------------------------------------------------------------------------------------------------------------- forward
def _part(f: Rows, x: Tensor, start: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Value, that part of the gradient ``(rows, size)`` and that part of the Laplacian."""
    value = _lifted(f, x, lift(x, (start, size)))
    if not isinstance(value, Lifted):  # f does not depend on x
        return value, x.new_zeros(len(x), size), torch.zeros_like(value)
    return value.v, value.gradient(), value.zero()


def _lifted(f: Rows, x: Tensor, y: Lifted) -> Tensor:
    try:
        with torch.enable_grad(), Conversions():  # what f disables is then seen; rules record as the caller does
            return _checked(f(y), x)
    except RuntimeError as error:  # of compiled code
        if y.basis.refusal is not None and not isinstance(error, NoRule):
            raise y.basis.refusal from error
        raise


def _forward(f: Rows, x: Tensor, method: Method) -> Derivatives:
    d = _directions(x)
    step = d if method.chunk is None else max(1, min(method.chunk, d))
    if step >= d:
        value, gradient, laplacian = _part(f, x, 0, d)
        return Derivatives(value, gradient.reshape(x.shape), laplacian)
    again = torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None
    parts = []
    for start in range(0, d, step):
        arguments = (f, x, start, min(step, d - start))
        if again:
            parts.append(checkpoint(_part, *arguments, use_reentrant=False))
        else:
            parts.append(_part(*arguments))
    values, gradients, laplacians = zip(*parts, strict=True)
    gradient = torch.cat(gradients, 1).reshape(x.shape)
    return Derivatives(values[0], gradient, torch.stack(laplacians).sum(0))


def _small(x: Tensor, memory: int) -> bool:
    """True where no network of usual width comes near the budget."""
    return COPIES * WIDTH * x.numel() * x.element_size() <= memory


def _chunk(f: Rows, x: Tensor, memory: int) -> int | None:
    return None if _small(x, memory) else _trial(f, x, memory)


def _trial(f: Rows, x: Tensor, memory: int) -> int | None:
    """Run f in one direction: how many fit into the memory, None for all of them."""
    d = _directions(x)
    with torch.no_grad():
        start = lift(x.detach(), (0, min(1, d)))
        _lifted(f, x, start)
    each = max(1, COPIES * start.basis.bytes)
    return None if each * d <= memory else max(1, memory // each)


# ------------------------------------------------------------------------------------------------- reverse and vmap
def _without_rules(f: Rows, x: Tensor) -> Method:
    d = _directions(x)
    if d <= FEW:
        return Method("reverse")
    try:
        with torch.no_grad():
            _second(f, x.detach(), torch.eye(d, dtype=x.dtype, device=x.device)[:2], None)
    except RuntimeError:  # control flow that looks at values, or an operation that vmap does not know
        return Method("reverse")
    return Method("vmap")


def _gradient(f: Rows, x: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The function y to (gradient, value) of f at y."""

    def total(y: Tensor) -> tuple[Tensor, Tensor]:
        value = _checked(f(y), x)
        return value.sum(), value

    return torch.func.grad(total, has_aux=True)


def _reverse(f: Rows, x: Tensor) -> Derivatives:
    if torch._C._functorch.peek_interpreter_stack() is None:
        return _reverse_by_autograd(f, x)
    gradient, pull, value = torch.func.vjp(_gradient(f, x), x, has_aux=True)  # type: ignore[misc]
    laplacian = torch.zeros_like(value)
    flat = x.shape[0], _directions(x)
    for k in range(flat[1]):
        direction = torch.zeros(flat, dtype=x.dtype, device=x.device)
        direction[:, k] = 1
        (column,) = pull(direction.reshape(x.shape))
        laplacian = laplacian + column.reshape(flat)[:, k]
    return Derivatives(value, gradient, laplacian)


def _reverse_by_autograd(f: Rows, x: Tensor) -> Derivatives:
    """Outside torch.func, whose transforms refuse old custom functions, such as the adjoint of an ODE solver."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        value = _checked(f(y), x)
        laplacian = torch.zeros_like(value)
        if not value.requires_grad:  # f depends neither on x nor on weights
            return Derivatives(value, torch.zeros_like(x), laplacian)
        (gradient,) = torch.autograd.grad(value.sum(), y, create_graph=True, materialize_grads=True)
        columns = gradient.reshape(x.shape[0], -1).unbind(1)
        for k, column in enumerate(columns if gradient.requires_grad else ()):
            (second,) = torch.autograd.grad(
                column.sum(), y, create_graph=recorded, retain_graph=True, materialize_grads=True
            )
            laplacian = laplacian + second.reshape(x.shape[0], -1)[:, k]
    return Derivatives(value, gradient, laplacian)


def _second(f: Rows, x: Tensor, directions: Tensor, chunk: int | None) -> Tensor:
    """Second derivatives in some directions, ``(directions, rows)``."""
    gradient = _gradient(f, x)

    def one(direction: Tensor) -> Tensor:
        v = direction.reshape(1, *x.shape[1:]).expand(x.shape)
        _, column, _ = torch.func.jvp(gradient, (x,), (v,), has_aux=True)  # type: ignore[misc]
        second: Tensor = column * v
        return second.flatten(1).sum(1) if x.dim() > 1 else second

    result: Tensor = torch.func.vmap(one, chunk_size=chunk, randomness="same")(directions)
    return result


def _vmap(f: Rows, x: Tensor, memory: int) -> Derivatives:
    gradient, value = _gradient(f, x)(x)
    d = _directions(x)
    chunk = max(1, min(d, memory // max(1, GRAPH * x.numel() * x.element_size())))
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    return Derivatives(value, gradient, _second(f, x, eye, chunk if chunk < d else None).sum(0))
