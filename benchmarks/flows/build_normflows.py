"""normflows: its two spline layers, whose networks are residual (blocks of two linear maps: `depth` hidden layers
become depth − 1 blocks, which is one map more than asked at depth 2 and two at depth 3).

Its list of flows runs from noise to data. Its `Permute` shuffles, which in two dimensions may change nothing: it is
given the reverse order here, as the other libraries have it. (Its documented example mixes by `LULinearPermute`.)
"""

from __future__ import annotations

import normflows
import torch
from contract import Specification
from normflows import flows
from torch import Tensor, nn


class Flow(nn.Module):
    def __init__(self, flow: normflows.NormalizingFlow) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def sample(self, n: int) -> Tensor:
        return self.flow.sample(n)[0]

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        return self.flow.sample(n)


def reversal(features: int) -> nn.Module:
    permute = flows.Permute(features)
    backwards = torch.arange(features).flip(0)
    permute.perm.copy_(backwards)
    permute.inv_perm.copy_(backwards)
    return permute


def build(s: Specification) -> nn.Module:
    if s.direction != "density":
        raise ValueError("normflows' splines are built in the direction of the density")
    activation = nn.SiLU if s.activation == "silu" else nn.ReLU
    parts: list[nn.Module] = []
    for i, swap in enumerate(s.swaps):
        if i and s.mixing == "flip" and s.form == "autoregressive":
            parts.append(reversal(s.features))
        if s.form == "autoregressive":
            parts.append(
                flows.AutoregressiveRationalQuadraticSpline(
                    s.features,
                    s.depth - 1,
                    s.hidden,
                    num_bins=s.bins,
                    tail_bound=int(s.bound),
                    activation=activation,
                )
            )
        else:
            parts.append(
                flows.CoupledRationalQuadraticSpline(
                    s.features,
                    s.depth - 1,
                    s.hidden,
                    num_bins=s.bins,
                    tail_bound=s.bound,
                    reverse_mask=swap,
                    activation=activation,
                )
            )
        if s.mixing == "lu":
            parts.append(flows.LULinearPermute(s.features))  # after the layer in the list: before it for data
    return Flow(normflows.NormalizingFlow(normflows.distributions.DiagGaussian(s.features, trainable=False), parts))
