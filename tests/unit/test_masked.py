"""The masked network: what depends on what, and that the unrolled run gives the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from pyro_gen.nn import MaskedMLP


@pytest.mark.parametrize("hidden", [(), (3,), (17, 9), (5, 8, 4)])
@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("inputs", [1, 2])
def test_block_i_sees_exactly_the_inputs_before_i(hidden: tuple[int, ...], context_features: int, inputs: int) -> None:
    torch.manual_seed(0)
    features = 4
    net = MaskedMLP(features, 3, hidden, context_features=context_features, inputs=inputs).double()
    x = torch.randn(features * inputs, dtype=torch.double)
    context = torch.randn(context_features, dtype=torch.double) if context_features else None
    slopes = jacrev(lambda v: net(v, context))(x).reshape(features, 3, features, inputs)
    seen = (slopes != 0).any(-1).any(1)
    strict = torch.ones(features, features).tril(-1).bool()
    assert not bool((seen & ~strict).any())
    if not hidden or min(hidden) >= features:  # enough units to carry every dependence
        assert torch.equal(seen, strict)


@pytest.mark.parametrize("hidden", [(), (3,), (17, 9), (5, 8, 4)])
@pytest.mark.parametrize("context_features", [0, 2])
def test_unrolled_run_gives_every_block_of_the_one_pass(hidden: tuple[int, ...], context_features: int) -> None:
    torch.manual_seed(0)
    net = MaskedMLP(5, 3, hidden, context_features=context_features, inputs=2).double()
    x = torch.randn(6, 5, 2, dtype=torch.double)
    context = torch.randn(6, context_features, dtype=torch.double) if context_features else None
    blocks: list[Tensor] = []

    def step(i: int, block: Tensor) -> Tensor:
        assert i == len(blocks)
        blocks.append(block)
        return x[:, i]

    net.unroll(step, 6, context)
    assert torch.allclose(torch.stack(blocks, 1), net(x.flatten(1), context), atol=1e-13)


@pytest.mark.parametrize("hidden", [(), (17, 9)])
@pytest.mark.parametrize("context_features", [0, 2])
def test_an_order_permutes_what_comes_before(hidden: tuple[int, ...], context_features: int) -> None:
    torch.manual_seed(0)
    features, order = 5, torch.tensor([3, 0, 4, 2, 1])
    net = MaskedMLP(features, 3, hidden, context_features=context_features, inputs=2).double()
    x = torch.randn(6, features, 2, dtype=torch.double)
    context = torch.randn(6, context_features, dtype=torch.double) if context_features else None
    one = None if context is None else context[0]
    slopes = jacrev(lambda v: net(v, one, order))(x[0].flatten()).reshape(features, 3, features, 2)
    seen = (slopes != 0).any(-1).any(1)[order][:, order]
    assert torch.equal(seen, torch.ones(features, features).tril(-1).bool())
    natural = torch.arange(features)
    assert torch.equal(net(x.flatten(1), context, natural), net(x.flatten(1), context))

    blocks: list[Tensor] = []

    def step(i: int, block: Tensor) -> Tensor:
        blocks.append(block)
        return x[:, order[i]]

    net.unroll(step, 6, context, order)
    expected = net(x.flatten(1), context, order)[:, order]
    assert torch.allclose(torch.stack(blocks, 1), expected, atol=1e-13)


def test_a_mask_that_lets_a_block_see_its_own_input_is_seen() -> None:
    net = MaskedMLP(3, 1, (8,))
    net.layers[-1].mask.fill_(1.0)
    slopes = jacrev(net)(torch.randn(3)).squeeze(1)
    assert bool((slopes.triu() != 0).any())


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="hidden must be an int"):
        MaskedMLP(3, 1, (0,))
    with pytest.raises(ValueError, match="features must be an int"):
        MaskedMLP(0, 1)
