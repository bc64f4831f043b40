"""Log-determinants against autograd, in units of what rounding may do to them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from pyro_gen.transforms import Bijection


def worst(found: Tensor, expected: Tensor, tolerance: Tensor) -> float:
    """The largest error in units of what is allowed; not finite counts as wrong."""
    ratio = ((found - expected).abs() / tolerance).detach()
    return float(torch.nan_to_num(ratio, nan=math.inf).max())


def jacobians(bijection: Bijection, x: Tensor, context: Tensor | None) -> Tensor:
    """dy/dx of every row, ``(rows, D, D)``."""

    def one(row: Tensor, given: Tensor | None) -> Tensor:
        result: Tensor = bijection(row, given)[0]
        return result

    found: Tensor = vmap(jacrev(one), in_dims=(0, None if context is None else 0))(x, context)
    return found


def jacobian_gap(bijection: Bijection, x: Tensor, context: Tensor | None) -> float:
    """Error of ``forward``'s log-determinant against autograd, in units of its rounding.

    log|det| changes by tr(J⁻¹E) ≤ D ‖J⁻¹‖ ‖E‖ under the rounding E of J and of its factorisation, ‖E‖ ≤ c D ε ‖J‖, so
    c D² ε cond(J) is allowed; c = 100 covers the depth of the networks behind J's entries.
    """
    _, ladj = bijection(x, context)
    assert ladj.shape == x.shape[:-1]
    jacobian = jacobians(bijection, x, context)
    allowed = 100 * x.shape[-1] ** 2 * torch.finfo(x.dtype).eps * (torch.linalg.cond(jacobian) + ladj.abs())
    return worst(ladj, torch.linalg.slogdet(jacobian).logabsdet, allowed)
