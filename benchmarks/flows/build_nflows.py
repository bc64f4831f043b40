"""nflows: its spline transforms, `ReversePermutation` (autoregressive) or alternating halves (coupling), `LULinear`."""

from __future__ import annotations

import torch
from contract import Specification
from nflows import transforms
from nflows.distributions.normal import StandardNormal
from nflows.flows.base import Flow as Base
from nflows.nn.nets import MLP
from torch import Tensor, nn
from torch.nn.functional import relu, silu


class Network(MLP):
    """The library's multilayer perceptron; its coupling layers pass a context, which the perceptron does not take."""

    def forward(self, inputs: Tensor, context: None = None) -> Tensor:
        return super().forward(inputs)


class Flow(nn.Module):
    def __init__(self, flow: Base) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def sample(self, n: int) -> Tensor:
        return self.flow.sample(n)

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        return self.flow.sample_and_log_prob(n)


def build(s: Specification) -> nn.Module:
    if s.direction != "density":
        raise ValueError("nflows' splines are built in the direction of the density")
    activation = silu if s.activation == "silu" else relu
    parts: list[nn.Module] = []
    for i, swap in enumerate(s.swaps):
        if s.mixing == "lu":
            parts.append(transforms.LULinear(s.features, identity_init=True))
        if i and s.form == "autoregressive":
            parts.append(transforms.ReversePermutation(s.features))
        if s.form == "autoregressive":
            parts.append(
                transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                    s.features,
                    s.hidden,
                    num_bins=s.bins,
                    tails="linear",
                    tail_bound=s.bound,
                    num_blocks=s.depth - 1,
                    use_residual_blocks=False,
                    activation=activation,
                )
            )
        else:
            half = torch.arange(s.features) < s.features // 2
            parts.append(
                transforms.PiecewiseRationalQuadraticCouplingTransform(
                    (half if swap else ~half).int(),
                    lambda given, out: Network((given,), (out,), list(s.widths), activation),
                    num_bins=s.bins,
                    tails="linear",
                    tail_bound=s.bound,
                )
            )
    return Flow(Base(transforms.CompositeTransform(parts), StandardNormal([s.features])))
