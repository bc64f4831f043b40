"""One training step as one graph: loss, gradients and gradient norm, traced once and compiled.

A loss of this package leaves nothing to Python while it runs: no ``.item()``, no branch on a value. So ``make_fx`` can
trace ``grad_and_value`` of a ``functional_call`` of it, Pyro's handlers and all, down to a graph of tensor operations,
which inductor compiles. What the graph has baked in is kept in the cache key (shapes, dtypes, devices, training flags,
which parameters are frozen, where tensors live); what changes in place is seen (parameters, buffers).

A new graph is trusted only after one same-seed check: loss and gradients must equal those of the eager loss, which was
run with validation on. Programs that the graph would silently get wrong are refused by name: ``pyro.param`` statements
and ``PyroParam`` in Pyro's global mode read their values from the store, so a graph in which the module's tensors are
swapped would give them a gradient of exactly zero.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.func import functional_call, grad_and_value
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gen.base import ObjectiveModule
from pyro_gen.scopes import preserved_state

__all__ = ["CannotCompile", "CompiledStep", "eager_step", "why_not"]

logger = logging.getLogger("pyro_gen")


class CannotCompile(RuntimeError):
    """A loss that does not compile, or whose graph does not agree with it; the message says why."""


def why_not(module: ObjectiveModule) -> str | None:
    """The reason why a (prepared) objective module cannot be compiled, or None."""
    if module.__dict__["store_parameters"]:
        return "the program has pyro.param statements outside of modules, which read from the global store"
    if not pyro.settings.get("module_local_params"):
        for name, sub in module.named_modules():
            if isinstance(sub, PyroModule) and getattr(sub, "_pyro_params", None):
                held = f"{name}.{next(iter(sub._pyro_params))}"
                return (
                    f"PyroParam {held!r} reads from the global store, so its gradient would be zero; build and fit it "
                    "under pyro.settings.context(module_local_params=True)"
                )
    if module.structure is not None and module.structure.enumerated:
        return "enumerated sites change the shape of the program"
    return None


def eager_step(module: ObjectiveModule, batch: tuple[Tensor, ...], total: int | None, divisor: int) -> Tensor:
    """One plain evaluation: gradients into ``.grad``; ``(losses of the players..., squared norm of the gradient)``.

    Losses are divided by ``divisor``, the number of rows they estimate a sum over.
    """
    losses = [loss / divisor for loss in module.losses(*batch, total=total)]
    parameters = [*module.parameters(), *module.__dict__["store_parameters"]]
    for parameter in parameters:  # frozen ones too: an optimizer would go on by the gradient they had
        parameter.grad = None
    whole = sum(losses[1:], start=losses[0])
    whole.backward()
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        raise ValueError("the loss reaches no parameter: is everything frozen, or the data taken for a parameter?")
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return torch.stack([*(loss.detach() for loss in losses), norm * norm])


class CompiledStep:
    """Compiled evaluation of a loss and its gradients; same call and result as :func:`eager_step`.

    Args:
        module: the objective module, prepared.
        inductor: compile the traced graph; False runs it as traced.

    Attributes:
        seconds: time spent tracing, compiling and checking so far.
        graphs: number of graphs in the cache.
    """

    def __init__(self, module: ObjectiveModule, *, inductor: bool = True) -> None:
        reason = why_not(module)
        if reason is not None:
            raise CannotCompile(reason)
        self.module, self.inductor = module, inductor
        self.seconds = 0.0
        self._cache: dict[Any, Callable[..., Tensor]] = {}

    @property
    def graphs(self) -> int:
        return len(self._cache)

    def __call__(self, batch: tuple[Tensor, ...], total: int | None, divisor: int) -> Tensor:
        # where tensors live is part of the key: the graph runs on detached views, which see in-place changes only
        state: list[Any] = []
        for part in self.module.modules():
            state.append(part.training)
            state += [(p.requires_grad, p.data_ptr()) for p in part._parameters.values() if p is not None]
            state += [b.data_ptr() for b in part._buffers.values() if b is not None]
        shapes = [(t.shape, t.dtype, t.device) for t in batch]
        key = (*shapes, *state, total, divisor)
        if key not in self._cache:
            start = time.perf_counter()
            self._cache[key] = self._build(batch, total, divisor)
            self.seconds += time.perf_counter() - start
        return self._cache[key](*batch)

    def _build(self, batch: tuple[Tensor, ...], total: int | None, divisor: int) -> Callable[..., Tensor]:
        module = self.module
        with preserved_state(module, seed=0):
            expected = eager_step(module, batch, total, divisor)
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        gradients = {n: p.grad for n, p in parameters.items()}
        used = {n: p for n, p in parameters.items() if gradients[n] is not None}
        fixed = {n: t for n, t in (*module.named_parameters(), *module.named_buffers()) if n not in used}
        names, fixed_names = list(used), list(fixed)
        inputs = [p.detach() for p in used.values()], [t.detach() for t in fixed.values()]
        count = len(names)

        def step(*tensors: Tensor) -> tuple[Tensor, ...]:
            train, rest, data = tensors[:count], tensors[count : count + len(fixed)], tensors[count + len(fixed) :]

            # buffers are arguments of the loss, not captured by it: torch.func refuses to write into what is captured
            def loss(train: tuple[Tensor, ...], rest: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
                swapped = dict(zip((*fixed_names, *names), (*rest, *train), strict=True))
                losses = functional_call(
                    _Losses(module), {f"module.{n}": t for n, t in swapped.items()}, (total, *data)
                )
                losses = tuple(value / divisor for value in losses)
                return sum(losses[1:], start=losses[0]), losses

            grads, (_, losses) = grad_and_value(loss, has_aux=True)(tuple(train), tuple(rest))
            norm = torch.stack([g.square().sum() for g in grads]).sum()
            return (*grads, torch.stack([*losses, norm]))

        try:
            with preserved_state(module), pyro.validation_enabled(False):
                flat: list[Any] = [*inputs[0], *inputs[1], *batch]
                graph = make_fx(step)(*flat)
                if self.inductor:
                    from torch._inductor import compile as inductor_compile

                    # eager's random numbers: the same seed gives the same weights, compiled or not
                    run = inductor_compile(graph, flat, options={"fallback_random": True})
                else:
                    run = graph
        except Exception as error:  # whatever tracing or the compiler meets: the eager loss above ran, so it is theirs
            raise CannotCompile(
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error

        live = list(used.values())
        idle = [p for n, p in module.named_parameters() if n not in used]
        views = [*inputs[0], *inputs[1]]

        @torch.no_grad()
        def compiled(*data: Tensor) -> Tensor:
            out = run(*views, *data)
            for parameter, gradient in zip(live, out[:-1], strict=True):
                parameter.grad = gradient
            for parameter in idle:
                parameter.grad = None
            return out[-1]  # type: ignore[no-any-return]

        with preserved_state(module, seed=0):
            found = compiled(*batch)
        self._compare(expected, found, {n: gradients[n] for n in names})
        return compiled

    def _compare(self, expected: Tensor, found: Tensor, gradients: dict[str, Tensor | None]) -> None:
        losses, again = expected[:-1].double(), found[:-1].double()
        if not torch.allclose(losses, again, rtol=1e-5, atol=1e-5 * max(1.0, float(losses.abs().max()))):
            raise CannotCompile(f"its loss {again.tolist()} differs from the eager {losses.tolist()} at one seed")
        size = max(float(expected[-1].double().sqrt()), 1e-12)
        live = dict(self.module.named_parameters())
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            compiled = live[name].grad
            assert compiled is not None
            apart = float((gradient - compiled).abs().max())
            if not apart <= 1e-4 * max(float(gradient.abs().max()), 1e-2 * size):
                raise CannotCompile(f"its gradient of {name!r} is {apart:.2g} off the eager one at one seed")


class _Losses(torch.nn.Module):
    def __init__(self, module: ObjectiveModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, total: int | None, *batch: Tensor) -> tuple[Tensor, ...]:
        return self.module.losses(*batch, total=total)
