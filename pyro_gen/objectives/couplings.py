r"""Couplings of data and noise: which noise goes with which datum.

Any joint distribution with the two right marginals will do for a flow from noise to data. *Independent* pairs make
paths that cross, and the flow that averages over them bends. *Optimal* pairs, those of least
:math:`\sum_i |u_i - \varepsilon_{\pi(i)}|^2`, make paths that do not cross: the flow is straighter, an ODE takes fewer
steps, and the regression has less noise (Pooladian et al. 2023; Tong et al. 2024). The optimum over one batch is not
that over the two distributions: with B rows the paths are longer than those of the full plan, and approach it as B
grows. The plan here is an exact permutation within blocks of rows. None of the data or noise is left out or comes twice
(drawing pairs from the plan with replacement does both), so both marginals are exact.

A permutation is found by the Hungarian method at a cost that grows with the cube of the rows, so four blocks of 64 are
some 16 times cheaper than one of 256. What a row or a column of the costs has in common moves no optimum: without the
least of each, many zeros are left, and the search is about twice as fast.
"""

from __future__ import annotations

from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

__all__ = ["Coupling", "optimal_pairs", "transport_cost"]

Coupling = Literal["independent", "optimal"]


def optimal_pairs(data: Tensor, noise: Tensor, block: int = 64) -> Tensor:
    r"""Which noise goes with which datum: ``noise[index]`` matches ``data`` at the least cost within each block.

    .. math:: \pi = \arg\min \sum_i |u_i - \varepsilon_{\pi(i)}|^2

    It runs on the CPU, wherever the tensors are, and is one operation of a traced or compiled loss.

    Args:
        data, noise: ``(rows, *event_shape)``, of one scale.
        block: rows within which pairs are exchanged; a last block may have fewer. Greater is closer to the full plan,
            at a cost that grows with its square for a given number of rows.

    Returns:
        Indices of rows, ``(rows,)``: each row once, and each within its own block.

    Raises:
        ValueError: for shapes that differ, or no rows.

    References:
        A.-A. Pooladian et al., "Multisample flow matching", 2023, arXiv:2304.14772; A. Tong et al., "Improving and
        generalizing flow-based generative models with minibatch optimal transport", 2024, arXiv:2302.00482, section
        3.3; H. W. Kuhn, "The Hungarian method for the assignment problem", 1955 (by `scipy`).

    Example:
        >>> optimal_pairs(torch.tensor([[0.0], [2.0], [1.0]]), torch.tensor([[5.0], [-5.0], [0.0]]))
        tensor([1, 0, 2])
    """
    if data.shape != noise.shape or not len(data):
        raise ValueError(f"data and noise must be rows of one shape, got {tuple(data.shape)} and {tuple(noise.shape)}")
    return cast(Tensor, _assign(data.detach().flatten(1), noise.detach().flatten(1), block))


def transport_cost(data: Tensor, noise: Tensor) -> Tensor:
    """Mean squared distance of pairs, a scalar: what `optimal_pairs` makes small."""
    return (data - noise).square().flatten(1).sum(1).mean()


def _pairs(data: Tensor, noise: Tensor, block: int) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    u, e = data.to("cpu", torch.float64).numpy(), noise.to("cpu", torch.float64).numpy()
    index = np.empty(len(u), dtype=np.int64)
    for start in range(0, len(u), block):
        part = slice(start, start + block)
        cost = (e[part] ** 2).sum(1) - 2 * u[part] @ e[part].T  # less |u|², which the whole row has
        cost -= cost.min(1, keepdims=True)
        cost -= cost.min(0)
        index[part] = start + linear_sum_assignment(cost)[1]
    return torch.from_numpy(index).to(data.device)


# an opaque operation, which tracers and compilers pass by: values decide its result, and it has no gradient
_assign = torch.library.custom_op("pyro_gen::optimal_pairs", _pairs, mutates_args=())


@_assign.register_fake
def _(data: Tensor, noise: Tensor, block: int) -> Tensor:
    return data.new_empty(len(data), dtype=torch.int64)
