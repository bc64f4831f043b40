"""Small convolutional networks for images of any size: two halvings down, two doublings up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

__all__ = ["ConvDecoder", "ConvEncoder"]


class ConvEncoder(nn.Module):
    """Image to vector.

    Args:
        event_shape: ``(channels, height, width)``.
        outputs: size of the output vector.
        channels: feature maps after the first and the second halving.
        hidden: width of the layer before the output.
        context_features: size of the context vector, 0 for none.

    Shapes: ``(..., channels, height, width)`` and a context ``(..., context_features)`` to ``(..., outputs)``.
    """

    def __init__(
        self,
        event_shape: torch.Size,
        outputs: int,
        channels: tuple[int, int] = (32, 64),
        hidden: int = 128,
        *,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        c, h, w = event_shape
        first, second = channels
        self.down1 = nn.Conv2d(c, first, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.hidden = nn.Linear(second * _quarter(h) * _quarter(w) + context_features, hidden)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        lead = x.shape[:-3]
        h = silu(self.down2(silu(self.down1(x.reshape(-1, *x.shape[-3:])))))
        h = h.reshape(*lead, -1)
        if context is not None:
            h = torch.cat([h, context.expand(*lead, context.shape[-1])], -1)
        result: Tensor = self.out(silu(self.hidden(h)))
        return result


class ConvDecoder(nn.Module):
    """Vector to image.

    Args:
        features: size of the input vector.
        event_shape: ``(channels, height, width)`` of one datum.
        maps: outputs a pixel and channel.
        channels: feature maps at a quarter and at half the size.
        hidden: width of the layer after the input.
        context_features: size of the context vector, 0 for none.

    Shapes: ``(..., features)`` and a context ``(..., context_features)`` to ``(..., maps * channels, height, width)``.
    """

    def __init__(
        self,
        features: int,
        event_shape: torch.Size,
        maps: int,
        channels: tuple[int, int] = (64, 32),
        hidden: int = 128,
        *,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        c, h, w = event_shape
        self.sizes = (_quarter(h), _quarter(w)), (-(-h // 2), -(-w // 2)), (h, w)
        first, second = channels
        self.channels = first
        self.hidden = nn.Linear(features + context_features, hidden)
        self.grid = nn.Linear(hidden, first * self.sizes[0][0] * self.sizes[0][1])
        self.up1 = nn.Conv2d(first, second, 3, padding=1)
        self.up2 = nn.Conv2d(second, maps * c, 3, padding=1)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        lead = z.shape[:-1]
        if context is not None:
            z = torch.cat([z, context.expand(*lead, context.shape[-1])], -1)
        h = silu(self.grid(silu(self.hidden(z)))).reshape(-1, self.channels, *self.sizes[0])
        h = silu(self.up1(interpolate(h, self.sizes[1])))
        h = self.up2(interpolate(h, self.sizes[2]))
        result: Tensor = h.reshape(*lead, *h.shape[1:])
        return result


def _quarter(size: int) -> int:
    half = -(-size // 2)
    return -(-half // 2)
