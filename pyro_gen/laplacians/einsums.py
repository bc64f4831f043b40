r"""Einstein sums of lifted tensors and constants, and what is made of them.

A sum :math:`e(y, z, \dots)` is linear in each factor: its Jacobian is the sum over factors of e with that factor's
Jacobian in its place, its Laplacian the same with Laplacians, and :math:`2 \sum_k e(J_k^y, J_k^z, \dots)` for each
pair. The letter of the rows must stay in the output.
"""

from __future__ import annotations

import string
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_gen.laplacians.lifted import Lifted, common
from pyro_gen.laplacians.products import plus
from pyro_gen.laplacians.rules import refuse, rule

__all__: list[str] = []


@rule(F.bilinear, lifted=2)
def bilinear(a: Any, b: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    y = einsum("...i,oij,...j->...o", a, weight, b)
    return y if bias is None else y + bias


@rule(torch.linalg.vecdot, lifted=2)
def vecdot(a: Any, b: Any, *, dim: int = -1) -> Any:
    return (a * b).sum(dim)


def in_letters(equation: Any, dims: list[int]) -> tuple[list[str], str]:
    """The sides of an einsum equation, with letters for its ``...`` and the right side that torch would take."""
    if not isinstance(equation, str):
        refuse("without an equation as a string")
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    sides = inputs.split(",")
    more = [c for c in string.ascii_letters if c not in equation]
    counts = [count - len(side.replace("...", "")) for side, count in zip(sides, dims, strict=True) if "..." in side]
    dots = "".join(more[: max(counts, default=0)])
    if not arrow:
        known = inputs.replace("...", "").replace(",", "")
        output = "..." * bool(counts) + "".join(sorted(c for c in set(known) if known.count(c) == 1))

    def full(side: str, count: int) -> str:
        own = count - len(side.replace("...", ""))
        return side.replace("...", dots[len(dots) - own :])

    return [full(s, n) for s, n in zip(sides, dims, strict=True)], output.replace("...", dots)


@rule(torch.einsum, lifted=None)
def einsum(equation: Any, *operands: Any) -> Lifted:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    letters, output = in_letters(equation, [operand.dim() for operand in operands])
    equation = "".join((*letters, output))
    places = [i for i, x in enumerate(operands) if isinstance(x, Lifted)]
    row = {letters[i][operands[i].row] for i in places}
    if len(row) > 1 or output.count(next(iter(row))) != 1:
        refuse("that mixes rows")
    (r,) = row
    if any(letters[i].count(r) > 1 for i in places):
        refuse("that mixes rows")
    free = next(c for c in "zyxwvutsrqponmlkjihgfedcbaZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in equation)
    lifted = dict(zip(places, (x.densely() for x in common(*(operands[i] for i in places))), strict=True))
    values = [lifted[i].v if i in lifted else x for i, x in enumerate(operands)]

    def put(new: dict[int, Tensor], out: str, mark: bool) -> Tensor:
        sides = [free + s if mark and i in new else s for i, s in enumerate(letters)]
        return torch.einsum(f"{','.join(sides)}->{out}", *(new.get(i, x) for i, x in enumerate(values)))

    v = put({}, output, False)
    J: Tensor | None = None
    L: Tensor | None = None
    for n, i in enumerate(places):
        x = lifted[i]
        assert x.J is not None
        J = plus(J, put({i: x.J}, free + output, True))
        L = L if x.L is None else plus(L, put({i: x.L}, output, False))
        for j in places[:n]:
            other = lifted[j].J
            assert other is not None
            L = plus(L, 2 * put({i: x.basis.metric(x.J), j: other}, output, True))
    L = None if L is None else L.expand(v.shape)
    first = lifted[places[0]]
    return Lifted(v, first.basis, output.index(r) - len(output), J=J, L=L)
