r"""Stacks of layers by name: what ``transform="spline_autoregressive"`` means.

A layer of a flow maps features given others; so that all come to depend on all, layers alternate with a mixing of the
features. The stack goes from data to noise. Autoregressive layers are parallel in one direction and go feature by
feature in the other: ``direction="density"`` makes data to noise the parallel one, ``"sampling"`` noise to data. Of the
transforms whose inverse is a numerical one the same word picks the direction that needs no solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from torch import nn

from pyro_gen.checks import check_count, describe
from pyro_gen.transforms.affine import Affine, Shift
from pyro_gen.transforms.autoregressive import MaskedAutoregressive
from pyro_gen.transforms.bijections import Bijection, Compose, Flip, Inverse, Permute
from pyro_gen.transforms.block_autoregressive import BlockAutoregressive
from pyro_gen.transforms.continuous import ContinuousFlow
from pyro_gen.transforms.coupling import Coupling
from pyro_gen.transforms.elementwise import ElementwiseMap
from pyro_gen.transforms.linear import ActNorm, LUMixing, Rotation
from pyro_gen.transforms.spline import CircularSpline, Spline
from pyro_gen.transforms.sylvester import Sylvester

__all__ = ["TRANSFORMS", "Mixing", "TransformName", "check_transform", "stack"]

TransformName = Literal[
    "spline_autoregressive",
    "spline_coupling",
    "affine_autoregressive",
    "affine_coupling",
    "additive_coupling",
    "circular_autoregressive",
    "circular_coupling",
    "linear",
    "sylvester",
    "block_autoregressive",
    "continuous",
]
TRANSFORMS: tuple[str, ...] = get_args(TransformName)
ActivationName = Literal["silu", "relu", "tanh", "gelu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
Mixing = Literal["lu", "rotation", "permutation", "flip"]
MAPS: dict[str, Callable[[int, float], ElementwiseMap]] = {
    "spline": Spline,
    "affine": lambda bins, bound: Affine(),
    "additive": lambda bins, bound: Shift(),
    "circular": lambda bins, bound: CircularSpline(bins),
}


def check_transform(name: Any) -> str:
    """The name, or a ``ValueError`` that lists what there is."""
    if name not in TRANSFORMS:
        raise ValueError(f"transform must be a Bijection or one of {', '.join(TRANSFORMS)}; got {describe(name)}")
    return str(name)


def stack(
    transform: TransformName | str,
    features: int,
    layers: int = 3,
    hidden: Sequence[int] = (128, 128),
    context_features: int = 0,
    direction: Literal["density", "sampling"] = "density",
    *,
    bins: int = 8,
    bound: float = 5.0,
    mixing: Mixing | None = None,
    activation: ActivationName = "silu",
) -> Bijection:
    """A bijection from data to noise.

    Args:
        transform: one of `TRANSFORMS`.
        features: size of the vectors.
        layers: how many; ``"linear"`` and ``"continuous"`` are one layer, whatever it says.
        hidden: sizes of the hidden layers of each layer's network.
        context_features: size of the context, 0 for none.
        direction: what is to be fast, ``"density"`` or ``"sampling"``.
        bins, bound: of the splines.
        activation: of the networks of coupling and autoregressive layers: smooth ones make smooth log-densities, with a
            score everywhere; ``"relu"`` fits edges faster and leaves kinks.
        mixing: what stands between layers: ``"lu"`` (an invertible matrix, learnt), ``"rotation"`` (learnt),
            ``"permutation"`` (fixed, at random) or ``"flip"``. By default ``"lu"``, and ``"flip"`` on the torus.
    """
    name = check_transform(transform)
    if direction not in ("density", "sampling"):
        raise ValueError(f"direction must be 'density' or 'sampling', got {describe(direction)}")
    count = check_count(layers, "layers")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {describe(activation)}")
    between = ACTIVATIONS[activation]
    if name.split("_")[0] not in MAPS and (mixing is not None or activation != "silu"):
        given = f"mixing={mixing!r}" if mixing is not None else f"activation={activation!r}"
        raise ValueError(f"{given} belongs to spline, affine, additive and circular layers, not to {name}")
    circular = name.startswith("circular")
    mixing = mixing or ("flip" if circular else "lu")
    if circular and mixing in ("lu", "rotation"):
        raise ValueError(f"mixing={mixing!r} would leave the torus: use 'flip' or 'permutation' with {name}")
    if name == "linear":
        if context_features:
            raise ValueError(
                "transform='linear' takes no context: affine_autoregressive with hidden=() is linear in it"
            )
        return Compose([LUMixing(features), ActNorm(features)])
    if name == "continuous":
        return ContinuousFlow(features, hidden, context_features)
    if name == "sylvester":
        parts: list[Bijection] = [Sylvester(features, context_features=context_features) for _ in range(count)]
        return _directed(Compose(parts), direction)
    if name == "block_autoregressive":
        sizes = [max(2, size // features) for size in hidden]  # of the block of each feature
        blocks = [BlockAutoregressive(features, sizes, context_features) for _ in range(count)]
        return _directed(Compose(_between(blocks, "flip", features)), direction)
    kind, arrangement = name.split("_")
    parts = []
    for i in range(count):
        transformer = MAPS[kind](bins, bound)
        if arrangement == "coupling":
            parts.append(
                Coupling(transformer, features, hidden, context_features, activation=between, swap=bool(i % 2))
            )
        else:
            parts.append(
                MaskedAutoregressive(
                    transformer, features, hidden, context_features, direction=direction, activation=between()
                )
            )
    return Compose(_between(parts, mixing, features, turn=arrangement == "autoregressive"))


def _between(parts: Sequence[Bijection], mixing: Mixing, features: int, turn: bool = True) -> list[Bijection]:
    """The layers with their mixing; ``turn``: the order of features is reversed from layer to layer."""
    if mixing not in get_args(Mixing):
        raise ValueError(f"mixing must be one of {', '.join(get_args(Mixing))}, got {describe(mixing)}")
    result: list[Bijection] = []
    reverse = Permute(range(features)[::-1])
    for i, part in enumerate(parts):
        if mixing == "lu":
            result.append(LUMixing(features, reverse if turn and i else None))
        elif mixing == "rotation":
            result += [Rotation(features), *([Flip(features)] if turn and i else [])]
        elif i and mixing == "permutation":
            result.append(Permute.random(features, seed=i))
        elif i and turn:
            result.append(Flip(features))
        result.append(part)
    return result


def _directed(bijection: Bijection, direction: str) -> Bijection:
    return bijection if direction == "density" else Inverse(bijection)
