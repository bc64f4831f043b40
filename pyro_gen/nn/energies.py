r"""Networks whose output is an energy: one number a row, smooth in x, without an output bias.

An output bias would shift E by a constant, which Z takes back: nothing in the data determines it, and a parameter that
no loss reaches stalls distributed training. Activations are smooth, because score matching sees ΔE: a piecewise-linear
network has ΔE = 0 almost everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_gen.nn.mlp import MLP

__all__ = ["RBM", "EnergyMLP"]


class EnergyMLP(nn.Module):
    """A multilayer perceptron from x (and a context) to its energy, with x centred and scaled by the training data.

    Args:
        features: size of x, flat.
        hidden: sizes of the hidden layers.
        context_features: size of the context, flat, 0 for none.
        activation: class of the smooth activation.

    Shapes: ``(..., features)`` and a context ``(..., context_features)`` to ``(...)``.
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (128, 128),
        *,
        context_features: int = 0,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        inputs = features + context_features
        self.mlp = MLP(inputs, 1, hidden, activation=activation, output_bias=False)
        self.register_buffer("loc", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))

    @torch.no_grad()
    def standardise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Take location and scale from rows of x, ``(rows, features)``, and of the context."""
        both = x if context is None else torch.cat([x, context], -1)
        self.loc.copy_(both.mean(0))
        spread = both.std(0, unbiased=False)
        self.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = torch.cat([x, context], -1)
        result: Tensor = self.mlp((x - self.loc) / self.scale).squeeze(-1)
        return result


class RBM(nn.Module):
    r"""Free energy of a restricted Boltzmann machine over binary x, hidden units summed out.

    .. math:: E(v) = -b^\top v - \sum_j \log\big(1 + e^{c_j + (v W)_j}\big), \qquad
              e^{-E(v)} = \sum_{h \in \{0,1\}^H} e^{b^\top v + c^\top h + v^\top W h} .

    Args:
        visible: number of binary values in a row; hidden: number H of hidden units.
        std: standard deviation of the initial weights.

    Shapes: ``(..., visible)`` to ``(...)``.

    References:
        P. Smolensky, "Information processing in dynamical systems", 1986; G. Hinton, "Training products of experts by
        minimizing contrastive divergence", Neural Computation 14, 2002.
    """

    def __init__(self, visible: int, hidden: int, std: float = 0.01) -> None:
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(visible, hidden))
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, v: Tensor) -> Tensor:
        return -self.log_sum(v, 1.0)

    def log_sum(self, v: Tensor, beta: Tensor | float) -> Tensor:
        r"""Sum over h at coupling β, :math:`\log \sum_h e^{b^\top v + c^\top h + \beta v^\top W h}`, of each row."""
        hidden = nn.functional.softplus(self.hidden_bias + _column(beta, v) * (v @ self.weight)).sum(-1)
        return v @ self.visible_bias + hidden

    def log_uncoupled(self) -> Tensor:
        """log Σ_v Σ_h of the same at β = 0, where all units are independent: a scalar."""
        return nn.functional.softplus(self.visible_bias).sum() + nn.functional.softplus(self.hidden_bias).sum()

    @torch.no_grad()
    def sweep(self, v: Tensor, beta: Tensor | float = 1.0) -> Tensor:
        """One sweep of block Gibbs at coupling β: all hidden units given v, then all of v given those."""
        column = _column(beta, v)
        h = torch.bernoulli(torch.sigmoid(self.hidden_bias + column * (v @ self.weight)))
        return torch.bernoulli(torch.sigmoid(self.visible_bias + column * (h @ self.weight.T)))


def _column(beta: Tensor | float, v: Tensor) -> Tensor:
    """β as a tensor that multiplies the rows of v: one for all, or one for each."""
    beta = torch.as_tensor(beta, dtype=v.dtype, device=v.device)
    return beta.unsqueeze(-1) if beta.dim() else beta
