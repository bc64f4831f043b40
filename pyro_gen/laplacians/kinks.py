r"""Find where a function of x has kinks: piecewise-linear activations, whose second derivative torch does not see.

Integration by parts, on which score matching stands, counts :math:`\Delta E` as a distribution: at a kink of the
gradient of E it has a mass on a surface, of the size of the jump. Automatic differentiation sees 0 there. A network
with ReLU has :math:`\Delta E = 0` almost everywhere, so :math:`E[½|∇E|^2 - \Delta E]` is smallest for a constant
energy, whatever the data. A jump in the second derivative alone does no harm: elu with alpha = 1, celu and softsign
have a continuous gradient, hardswish (its slope jumps by ½ at ±3), selu and elu with another alpha have not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_gen.laplacians.rules import name_of

__all__ = ["kinks"]

NAMES = (
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_", "hardtanh", "hardtanh_"),
    *("hardswish", "hardsigmoid", "hardshrink", "softshrink", "threshold", "threshold_", "selu", "selu_"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "_max_pool1d", "_max_pool2d", "_max_pool3d"),
    *("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "l1_loss", "hinge_embedding_loss"),
    *("maximum", "minimum", "fmax", "fmin", "max", "min", "amax", "amin", "aminmax", "abs", "abs_", "absolute"),
    *("clamp", "clamp_", "clamp_min", "clamp_max", "clamp_min_", "clamp_max_", "clip", "clip_"),
    *("sort", "topk", "kthvalue", "median", "nanmedian", "quantile", "cummax", "cummin", "__abs__"),
    *("floor", "ceil", "round", "trunc", "frac", "fmod", "remainder", "sign", "dist", "cdist"),
)


def _functions() -> frozenset[Any]:
    found = set()
    for home in (torch, F, Tensor, torch._C._nn):
        found |= {getattr(home, name) for name in NAMES if hasattr(home, name)}
    return frozenset(found)


ALWAYS = _functions()
CLAMPS = frozenset(f for f in ALWAYS if "cl" in getattr(f, "__name__", "") and "clos" not in f.__name__)
ELU = frozenset(getattr(home, n) for home in (F, torch._C._nn) for n in ("elu", "elu_") if hasattr(home, n))
NORMS = (torch.norm, Tensor.norm, torch.functional.norm, torch.linalg.norm, torch.linalg.vector_norm)


def _at_the_edge_of_floats(x: Tensor, bounds: tuple[Any, ...]) -> bool:
    """Clamps at the limits of the dtype, as in `SigmoidTransform`, touch no data."""
    limits = torch.finfo(x.dtype)
    near = {None, limits.tiny, limits.eps, 1 - limits.eps, limits.max, limits.min}
    return all(not isinstance(b, Tensor) and b in near for b in bounds)


def _has_kink(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if function in ELU:
        return bool((kwargs.get("alpha", args[1] if len(args) > 1 else 1.0)) != 1.0)
    if function in NORMS:
        order = kwargs.get("p", kwargs.get("ord", args[1] if len(args) > 1 else 2))
        return order in (0, 1, float("inf"), float("-inf"))
    if function in CLAMPS and isinstance(args[0], Tensor):
        return not _at_the_edge_of_floats(args[0], (*args[1:], *kwargs.values()))
    return function in ALWAYS


class _Watch(TorchFunctionMode):
    """Follow what depends on x through a run, and note the kinks that it meets."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.following = {id(x): x}  # the tensors themselves, so that no id is used twice
        self.found: dict[str, None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(id(t) in self.following for t in inputs):
            if _has_kink(func, args, kwargs):
                self.found[name_of(func).rsplit(".", 1)[-1].lstrip("_")] = None
            if func not in (Tensor.detach, torch.detach):
                for t in tree_leaves(result):
                    if isinstance(t, Tensor) and t.dtype.is_floating_point:
                        self.following[id(t)] = t
                if getattr(func, "__name__", "").rstrip("_") != getattr(func, "__name__", "") and inputs:
                    self.following[id(inputs[0])] = inputs[0]  # written in place, as by __setitem__ and add_
        return result


def kinks(f: Callable[[Tensor], Tensor], x: Tensor) -> list[str]:
    r"""Name the functions with kinks that act on what depends on x, in one plain run of f.

    Args:
        f: ``(rows, *event_shape)`` to ``(rows,)``.
        x: ``(rows, *event_shape)``, floating point.

    Returns:
        Names such as ``"relu"``, each once, in the order met; empty where the gradient of f is continuous as far as
        can be seen. What is compiled (``torch.jit``) or chosen by ``torch.where`` is not seen.

    Example:
        >>> kinks(lambda x: torch.relu(x).sum(-1) + torch.tanh(x).sum(-1), torch.zeros(2, 3))
        ['relu']
    """
    y = x.detach().view(x.shape)  # a tensor of its own: x may be held by f as a constant
    with torch.no_grad(), _Watch(y) as watch:
        f(y)
    return list(watch.found)
