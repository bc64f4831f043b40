r"""Handwritten digits, 8 by 8 pixels with 17 grey levels, and the noise that makes whole numbers continuous.

A density fitted to whole numbers has no upper bound: it can put ever sharper peaks on them. With uniform noise,
:math:`y = x + u`, :math:`u \sim U[0, 1)^d`, a density of y bounds the probability of x from below (Jensen),

.. math:: \mathbb{E}_u \log p(x + u) \le \log \int_{[0, 1)^d} p(x + u)\, du = \log P(x),

so that nats of continuous and of discrete models can be set side by side.

References:
    Theis, van den Oord, Bethge (2016), A note on the evaluation of generative models, arXiv:1511.01844, section 3.1.
"""

from __future__ import annotations

from typing import Generic, Literal, NamedTuple, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from pyro_gen.datasets.densities import CPU, make_generator

__all__ = ["Split", "dequantize", "digits"]

Part = TypeVar("Part")


class Split(NamedTuple, Generic[Part]):
    """A data set in three parts; each is a tensor, or a tuple ``(x, y)`` where labels were asked for."""

    train: Part
    validation: Part
    test: Part


def dequantize(x: Tensor, seed: int | None = None) -> Tensor:
    r"""Add uniform noise on [0, 1) to whole numbers: :math:`y = x + u`, with :math:`\lfloor y \rfloor = x` always.

    Args:
        x: whole numbers, any shape; integer and boolean tensors become float32.
        seed: the same seed gives the same noise; None gives new noise. The global generators are left alone.

    Returns:
        y, of the shape and device of x.

    Raises:
        ValueError: if an entry of x is not a whole number.

    Example:
        >>> x = torch.tensor([0.0, 16.0])
        >>> torch.equal(dequantize(x, seed=0).floor(), x)
        True
    """
    x = x if x.is_floating_point() else x.to(torch.float32)
    if not torch.equal(x, x.floor()):
        raise ValueError("dequantize takes whole numbers, and x holds others: it may be scaled or dequantized already")
    noise = torch.rand(x.shape, dtype=torch.float64, generator=make_generator(seed), device=CPU)
    # Rounding may carry 16 + 0.9999999 to 17, another pixel value.
    return torch.minimum(x + noise.to(x.device, x.dtype), torch.nextafter(x + 1, x))


@overload
def digits(
    levels: Literal[2, 17] = 17,
    flat: bool = True,
    dequantize: bool = False,
    labels: Literal[False] = False,
    seed: int = 0,
) -> Split[Tensor]: ...


@overload
def digits(
    levels: Literal[2, 17] = 17,
    flat: bool = True,
    dequantize: bool = False,
    *,
    labels: Literal[True],
    seed: int = 0,
) -> Split[tuple[Tensor, Tensor]]: ...


def digits(
    levels: Literal[2, 17] = 17,
    flat: bool = True,
    dequantize: bool = False,
    labels: bool = False,
    seed: int = 0,
) -> Split[Tensor] | Split[tuple[Tensor, Tensor]]:
    r"""The 1797 handwritten digits of scikit-learn, 8 by 8 pixels, split once and for all.

    1200 for training, 237 for validation, 360 for testing: ``numpy.random.default_rng(0).permutation(1797)``, cut in
    this order.

    Args:
        levels: 17 for whole numbers 0 to 16; 2 for :math:`x > 8`, as 0 and 1.
        flat: rows of shape (64,) if True, (1, 8, 8) if False.
        dequantize: add uniform noise on [0, 1) to every pixel, for continuous models.
        labels: give ``(x, y)`` for x, with y the digit shown (int64).
        seed: seed of that noise; the split does not depend on it.

    Returns:
        ``train, validation, test``: float32 tensors, or tuples of tensors.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if ``levels`` is neither 2 nor 17.

    References:
        Alpaydin, Kaynak (1998), Optical recognition of handwritten digits, UCI, doi:10.24432/C50P49 (its test part).

    Example:
        >>> train, validation, test = digits(levels=2)
        >>> train.shape, validation.shape, test.shape
        (torch.Size([1200, 64]), torch.Size([237, 64]), torch.Size([360, 64]))
    """
    if levels not in (2, 17):
        raise ValueError(f"levels must be 17 (grey, 0 to 16) or 2 (black and white), got {levels!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "datasets.digits reads the digits that come with scikit-learn, which is not installed: "
            "pip install pyro-gen[data]"
        ) from error
    pixels, shown = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).to(torch.float32)
    y = torch.from_numpy(shown).to(torch.int64)
    if levels == 2:
        x = (x > 8).to(torch.float32)
    if dequantize:
        x = _dequantize(x, seed)
    if not flat:
        x = x.reshape(-1, 1, 8, 8)
    order = torch.from_numpy(np.random.default_rng(0).permutation(1797))
    train, validation, test = order.split([1200, 237, 360])
    if labels:
        return Split((x[train], y[train]), (x[validation], y[validation]), (x[test], y[test]))
    return Split(x[train], x[validation], x[test])


_dequantize = dequantize  # the name of an argument in `digits`
