r"""A convolutional network of an image at a noise level: a small U, at a half and a quarter of the size.

What noise hides is large: the quarter-size maps see the whole of a small image, and what they say is added to the
half-size maps. Convolutions at full size cost most and say least, so there are none: each square of four pixels is
taken as four channels, and given back so (Shi et al. 2016), the image filled up with zeros where a size is odd. Each
residual block is normalised in groups of maps and then scaled and shifted by the level, ``(1 + scale) h + shift``: the
same convolutions serve every level (Perez et al. 2018). The result has the ends of
:class:`~pyro_gen.nn.time.LevelGate`.

References:
    O. Ronneberger, P. Fischer, T. Brox, "U-Net: convolutional networks for biomedical image segmentation", 2015,
    arXiv:1505.04597; W. Shi et al., "Real-time single image and video super-resolution using an efficient sub-pixel
    convolutional neural network", 2016, arXiv:1609.05158; E. Perez et al., "FiLM: visual reasoning with a general
    conditioning layer", 2018, arXiv:1709.07871.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle, silu

from pyro_gen.checks import check_count, describe
from pyro_gen.nn.time import LevelFeatures, LevelGate

__all__ = ["ConvTime"]


class _Block(nn.Module):
    """Two convolutions added to what they are given; scale and shift of the level between them."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(maps, maps, 3, padding=1)
        self.norm = nn.GroupNorm(
            math.gcd(8, maps, max(maps // 4, 1)), maps
        )  # of four maps at least: a map may be 1 × 1
        self.conv2 = nn.Conv2d(maps, maps, 3, padding=1)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.norm(self.conv1(silu(x)))
        h = torch.addcmul(h + shift[..., None, None], h, scale[..., None, None])
        result: Tensor = x + self.conv2(silu(h))
        return result


class ConvTime(nn.Module):
    """U-shaped convolutional network over an image, its noise level and a context vector.

    Args:
        event_shape: ``(channels, height, width)``, height and width 2 at least.
        outputs_per_channel: maps of the result for each channel of the image; the first is gated by the level.
        channels: maps at half and quarter size.
        embedding: size of the hidden layer between level and context and what they do.
        context_features: size of the context vector, 0 for none.
        gated: whether the result has the ends of :class:`~pyro_gen.nn.time.LevelGate`.
        linear: p and q of the gate: what F is for standard normal data.

    Shapes: y ``(..., c, h, w)``, level ``(...)``, context ``(..., context_features)``, to
    ``(..., outputs_per_channel * c, h, w)``.

    Raises:
        ValueError: for a shape that is no image, or is one pixel high or wide; for sizes that are no counts.

    Example:
        >>> import torch
        >>> net = ConvTime((1, 8, 8))
        >>> net(torch.zeros(3, 1, 8, 8), torch.zeros(3)).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        outputs_per_channel: int = 1,
        channels: tuple[int, int] = (32, 64),
        *,
        embedding: int = 64,
        context_features: int = 0,
        gated: bool = True,
        linear: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        if len(event_shape) != 3 or min(event_shape[1:]) < 2:
            raise ValueError(
                "event_shape must be (channels, height, width), 2 pixels high and wide at least, got "
                f"{describe(tuple(event_shape))}: for other shapes there is TimeMLP, network='mlp'"
            )
        if len(channels) != 2:
            raise ValueError(f"channels must be two counts, at half and at quarter size, got {describe(channels)}")
        c, maps = event_shape[0], check_count(outputs_per_channel, "outputs_per_channel")
        half, quarter = (check_count(size, "channels") for size in channels)
        self.features = LevelFeatures()
        self.hidden = nn.Linear(self.features.outputs + context_features, check_count(embedding, "embedding"))
        self.sizes = [half, half, quarter, quarter, half, half]
        self.film = nn.Linear(embedding, sum(self.sizes))
        self.stem = nn.Conv2d(4 * c, half, 3, padding=1)
        self.block1 = _Block(half)
        self.down = nn.Conv2d(half, quarter, 3, stride=2, padding=1)
        self.block2 = _Block(quarter)
        self.up = nn.Conv2d(quarter, 4 * half, 1)
        self.block3 = _Block(half)
        self.out = nn.Conv2d(half, 4 * maps * c, 3, padding=1)
        self.gate = LevelGate(linear) if gated else None

    def forward(self, y: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        lead, image = y.shape[:-3], y.shape[-3:]
        e = self.features(level.expand(lead))
        if context is not None:
            e = torch.cat([e, context.expand(*lead, context.shape[-1])], -1)
        given = self.film(silu(self.hidden(e))).reshape(-1, sum(self.sizes)).split(self.sizes, -1)
        height, width = image[1:]
        squares = pixel_unshuffle(pad(y.reshape(-1, *image), (0, width % 2, 0, height % 2)), 2)
        fine = self.block1(self.stem(squares), *given[:2])
        coarse = self.block2(self.down(silu(fine)), *given[2:4])
        raised = pixel_shuffle(self.up(silu(coarse)), 2)[..., : fine.shape[-2], : fine.shape[-1]]
        h = self.out(silu(self.block3(fine + raised, *given[4:])))
        result: Tensor = pixel_shuffle(h, 2)[..., :height, :width].reshape(*lead, -1, height, width)
        return result if self.gate is None else self.gate(result, y, level, dim=-3)
