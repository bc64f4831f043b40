"""Scopes: what is run inside them leaves no trace outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_gen import scopes


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))


def test_preserved_state_puts_buffers_and_generators_back() -> None:
    net, x = Norm(), torch.randn(8, 2)
    before = {n: b.clone() for n, b in net.named_buffers()}
    addresses = {n: b.data_ptr() for n, b in net.named_buffers()}
    noise = torch.get_rng_state()
    with scopes.preserved_state(net, lambda: None, seed=3):
        one = net.inner(x)
        assert net.inner[0].num_batches_tracked == 1
    assert all(torch.equal(before[n], b) and b.data_ptr() == addresses[n] for n, b in net.named_buffers())
    assert torch.equal(noise, torch.get_rng_state())
    with scopes.preserved_state(net, seed=3):
        torch.testing.assert_close(net.inner(x), one)
    net.inner(x)
    assert net.inner[0].num_batches_tracked == 1


def test_evaluation_mode_gives_every_part_its_mode_back() -> None:
    net = Norm()
    net.inner[0].eval()
    flags = [m.training for m in net.modules()]
    assert flags == [True, True, False, True]

    def failing() -> None:
        with scopes.evaluation_mode(net):
            assert not any(m.training for m in net.modules())
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert [m.training for m in net.modules()] == flags


def test_forked_generators() -> None:
    noise = torch.get_rng_state()
    with scopes.forked_generators(5):
        one = torch.randn(3)
    with scopes.forked_generators():
        torch.randn(3)
    assert torch.equal(noise, torch.get_rng_state())
    with scopes.forked_generators(5):
        assert torch.equal(one, torch.randn(3))


def test_bare_parameters_are_hidden_in_local_mode_only() -> None:
    def build() -> Any:
        net = PyroModule[nn.Linear](2, 1)
        net.scale = PyroParam(torch.ones(()), constraint=dist.constraints.positive)
        return net

    def sites(net: Any) -> set[str]:
        with poutine.trace(param_only=True) as seen, scopes.hide_bare_parameters():
            net(torch.zeros(1, 2))
            assert net.scale.requires_grad
        return set(seen.trace.nodes)

    assert {"weight", "bias"} <= sites(build())
    with pyro.settings.context(module_local_params=True):
        net = build()
        with poutine.trace(param_only=True) as seen:
            net(torch.zeros(1, 2))
        assert {"weight", "bias"} <= set(seen.trace.nodes)
        assert not hasattr(seen.trace.nodes["weight"]["value"], "unconstrained")  # SVI would stop here
        assert not {"weight", "bias"} & sites(net)
