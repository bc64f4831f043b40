"""How many rows and draws fit into memory at once, and whether a program can take many draws at once at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_gen import handlers
from pyro_gen.handlers import Structure

__all__ = ["check_broadcasting", "even_parts", "measure_bytes", "plan_chunks"]

FEWEST_DRAWS = 32  # at once, where memory has room for them: every chunk runs the guide's network again


def plan_chunks(rows: int, draws: int, row_bytes: int, draw_bytes: int, memory: int, fast: int) -> tuple[int, int]:
    """Rows and draws of one chunk.

    Args:
        rows, draws: in all.
        row_bytes, draw_bytes: what a row takes, and each draw of it.
        memory: bytes that may be taken.
        fast: bytes that are best taken; no more than ``memory``.

    Returns:
        As many rows as fit with all their draws; else one row, with as many of its draws as fit.
    """
    at_once = fast // (draws * draw_bytes + row_bytes)
    if at_once:
        return min(rows, at_once), draws
    most = max((fast - row_bytes) // draw_bytes, min(FEWEST_DRAWS, (memory - row_bytes) // draw_bytes), 1)
    return 1, min(draws, most)


def even_parts(total: int, most: int) -> list[int]:
    """``total`` in the fewest parts of at most ``most``, as even as can be."""
    parts = math.ceil(total / most)
    return [total // parts + (i < total % parts) for i in range(parts)]


class _Allocations(TorchDispatchMode):
    """Adds up the bytes of every tensor that is made: no less than what is in use at any one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in known:
                self.bytes += made.untyped_storage().nbytes()
        return out


def measure_bytes(run: Callable[..., Tensor], *args: Any, **kwargs: Any) -> int:
    """Bytes of all tensors that a run makes, without gradients: an upper bound of the memory it takes."""
    with torch.no_grad(), _Allocations() as seen:
        run(*args, **kwargs)
    total: int = seen.bytes
    return total


def check_broadcasting(
    model: Callable[..., Any], guide: Callable[..., Any], batch: tuple[Any, ...], shape: Structure, advice: str
) -> None:
    """Check that two draws at once weigh what each weighs alone.

    Raises:
        ValueError: if the program fails or disagrees with itself under a dimension of draws; ends with ``advice``.
    """
    plated_model, plated_guide = handlers.with_particles(2, shape.plate_nesting, model, guide)
    try:
        drawn, scored = handlers.pair_traces(plated_model, plated_guide, *batch)
        together = handlers.weigh(drawn, scored, shape)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"the program runs on a batch, but not with a dimension of draws left of it: {advice}"
        ) from error
    for index in range(2):
        replayed = poutine.replay(guide, trace=_one_draw(drawn, index, shape))
        alone = handlers.weigh(*handlers.pair_traces(model, replayed, *batch), shape)
        tolerance = math.sqrt(torch.finfo(alone.dtype).eps)
        if not torch.allclose(together[index], alone, rtol=tolerance, atol=tolerance, equal_nan=True):
            row = int((together[index] - alone).abs().argmax())
            raise ValueError(
                f"the program mixes up draws when several run at once: the log weight of row {row} is "
                f"{float(together[index, row]):.6g} among others, {float(alone[row]):.6g} alone: {advice}"
            )


def _one_draw(trace: Trace, index: int, shape: Structure) -> Trace:
    """The sites of one draw out of a plate of them."""
    one = Trace()
    for name, site in handlers.sample_sites(trace).items():
        dim = site["value"].dim() - site["fn"].event_dim - shape.plate_nesting - 1
        one.add_node(name, **{**site, "value": site["value"].select(dim, index) if dim >= 0 else site["value"]})
    return one
