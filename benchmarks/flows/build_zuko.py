"""zuko: `NSF` for the autoregressive form, `NICE` with its spline for coupling (`passes=2` masks half of a network)."""

from __future__ import annotations

import torch
import zuko
from contract import Specification
from torch import Tensor, nn
from zuko.flows.coupling import NICE
from zuko.lazy import UnconditionalTransform
from zuko.transforms import LULinearTransform, MonotonicRQSTransform


def spline(*phi: Tensor, bound: float) -> MonotonicRQSTransform:
    return MonotonicRQSTransform(*phi, bound=bound)


class Flow(nn.Module):
    def __init__(self, flow: zuko.flows.Flow) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow().log_prob(x)

    def sample(self, n: int) -> Tensor:
        return self.flow().sample((n,))

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        return self.flow().rsample_and_log_prob((n,))


def build(s: Specification) -> nn.Module:
    if s.direction != "density":
        raise ValueError("zuko's flows are built in the direction of the density")
    activation = nn.SiLU if s.activation == "silu" else nn.ReLU
    if s.form == "autoregressive":
        if s.bound != 5.0:
            raise ValueError("zuko's NSF has its box at 5")
        flow = zuko.flows.NSF(
            s.features, bins=s.bins, transforms=s.layers, hidden_features=s.widths, activation=activation
        )
    else:
        flow = NICE(
            s.features,
            transforms=s.layers,
            univariate=lambda *phi: spline(*phi, bound=s.bound),
            shapes=[(s.bins,), (s.bins,), (s.bins - 1,)],
            hidden_features=s.widths,
            activation=activation,
        )
    if s.mixing == "lu":
        parts = []
        for layer in flow.transform.transforms:
            parts += [UnconditionalTransform(LULinearTransform, torch.eye(s.features)), layer]
        flow = zuko.flows.Flow(parts, flow.base)
    return Flow(flow)
