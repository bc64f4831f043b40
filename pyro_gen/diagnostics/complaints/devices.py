"""Complaints about devices, found without the device: the pair runs on ``meta``, where shapes are all there is.

Whatever a module registers, and the batch, go to ``meta``; a tensor that is made on the CPU inside, a table that is no
buffer, a mask, a literal as in ``dist.Normal(0., 1.).expand([3])`` stay behind. Torch lets some of them pass in
products and as indices, so a dispatch mode looks at every operation.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_gen import handlers
from pyro_gen.diagnostics.complaints.complaint import Complaint
from pyro_gen.diagnostics.complaints.runs import RAISED, Lenient, Pair

__all__ = ["left_behind"]


class _LeftBehind(RuntimeError):
    """A CPU tensor met one of the other device."""


class _OneDevice(TorchDispatchMode):
    """Stops where a CPU tensor of at least one dimension meets one on ``meta``; scalars may be anywhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func is torch.ops.aten._to_copy.default:  # moved on purpose
            moved = kwargs.get("device")
            if moved is None or moved.type != "cpu" or not args[0].is_meta:
                return func(*args, **kwargs)
            if args[0].dim():
                raise _LeftBehind(f"a tensor of shape {tuple(args[0].shape)} is brought back to the CPU")
            return torch.zeros((), dtype=kwargs.get("dtype") or args[0].dtype)
        if any(t.device.type != "cpu" for t in tensors):
            for tensor in tensors:
                if tensor.device.type == "cpu" and tensor.dim() and tensor.numel():
                    raise _LeftBehind(f"a CPU tensor of shape {tuple(tensor.shape)} meets them in {func.__name__}")
        return func(*args, **kwargs)


class _Draw(Messenger):
    """Draw on ``meta``; what has no way to, a Beta or a StudentT, gives an empty draw."""

    site: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.site = msg["name"]
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        try:
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
        except NotImplementedError:
            msg["value"] = torch.empty(msg["fn"].shape(), device="meta")
        msg["done"] = True


def left_behind(pair: Pair) -> Iterator[Complaint]:
    """CPU tensors that meet the batch on another device; changes the pair's modules, which are put back outside."""
    batch = pair.batch
    if pair.x is None or pair.x.device.type == "cpu":  # else they are there already
        batch = tuple(t.to("meta") if isinstance(t, Tensor) else t for t in batch)
        _move(pair.modules)
    watch = _Draw()
    try:
        # an empty store: parameters enter it anew, from where they are now
        with pyro.get_param_store().scope(), poutine.block(), torch.no_grad(), _OneDevice(), watch, Lenient():
            for trace in _runs(pair, batch):
                for name, site in handlers.sample_sites(trace).items():
                    watch.site = name
                    if handlers.site_kind(site) != "deterministic":
                        site["fn"].log_prob(site["value"])
    except _LeftBehind as error:
        line = _line_of(error)
        yield Complaint(
            "left-behind",
            watch.site,
            f"with data and weights on another device {error}, at or after site {watch.site!r}{line}",
            "make it from the batch (x.new_zeros, torch.zeros_like), or register it as a buffer",
            error=error,
        )
    except RAISED as error:
        what = f"{type(error).__name__}: {error}".split("\n")[0]
        text = f"the pair does not run on the meta device ({what}), so CPU constants were not looked for"
        yield Complaint("devices-not-checked", watch.site, text, "run a step on the device itself", error=error)


def _move(modules: list[nn.Module]) -> None:
    replaced: dict[int, Tensor] = {}
    for module in {m for root in modules for m in root.modules()}:
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = replaced.setdefault(id(tensor), _on_meta(tensor))  # type: ignore[assignment]


def _runs(pair: Pair, batch: tuple[Any, ...]) -> Iterator[Any]:
    guide_trace = poutine.Trace()
    if pair.guide is not None:
        guide_trace = poutine.trace(pair.guide).get_trace(*batch)
    yield guide_trace
    yield poutine.trace(poutine.replay(pair.model, trace=guide_trace)).get_trace(*batch)


def _on_meta(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to("meta")
    return nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _line_of(error: Exception) -> str:
    """The innermost line of the user's own code in a traceback."""
    ours = ("/torch/", "/pyro/", "/pyro_gen/diagnostics/", "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(o in f.filename for o in ours)]
    return f" (line {frames[-1].lineno} of {frames[-1].filename.rsplit('/', 1)[-1]})" if frames else ""
