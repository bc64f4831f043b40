"""Standardising data: the statistics, what they leave alone, and the density in the user's own units."""

from __future__ import annotations

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gen.testing.losses import OneDevice
from pyro_gen.transforms import Compose, Interval, Inverse, Standardise


def started(x: Tensor) -> Standardise:
    unit = Standardise(x.shape[-1]).to(x.dtype)
    unit.initialise(x)
    return unit


def test_data_leave_with_mean_zero_and_deviation_one_and_it_is_no_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 50, 3, dtype=torch.double) * torch.tensor([0.1, 1.0, 1e4]) + torch.tensor([5.0, 0.0, -1e6])
    unit = Standardise(3).double()
    assert not unit.initialised
    assert torch.equal(unit(x)[0], x)
    unit.initialise(x)
    assert unit.initialised
    y = unit(x)[0].reshape(-1, 3)
    assert float(y.mean(0).abs().max()) < 1e-9  # 1e6 / 1e4 ε and some
    assert torch.allclose(y.std(0, correction=0), torch.ones(3, dtype=torch.double), atol=1e-12)
    assert not list(unit.parameters())

    one = unit(x[0, :1])[0]
    assert torch.equal(one, unit(x)[0][0, :1])  # its batch does not matter
    unit.initialise(2 * x)  # every call sets anew
    assert torch.allclose(unit(2 * x)[0], y.reshape(4, 50, 3))

    other = Standardise(3).double()
    other.load_state_dict(unit.state_dict())
    assert other.initialised
    assert torch.equal(other(x)[0], unit(x)[0])


def test_both_log_determinants_against_autograd_vmap_traces_and_copies() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.double) * torch.tensor([1e-3, 1.0, 7.0, 1e3]) + 2
    unit = started(x)
    y, ladj = unit(x)
    back, back_ladj = unit.inverse(y)
    assert torch.allclose(back, x, rtol=1e-13, atol=1e-13)
    for function, at, found in ((unit, x, ladj), (Inverse(unit), y, back_ladj)):
        jacobian = vmap(jacrev(lambda row, f=function: f(row)[0]))(at)
        want = torch.linalg.slogdet(jacobian).logabsdet
        assert torch.allclose(found, want, atol=1e-12)
        # The variant to reject: nats of the standardised data.
        assert not torch.allclose(torch.zeros_like(found), want, atol=1e-3)
        copied = copy.deepcopy(function)
        for a, b, c in zip(vmap(copied)(at), make_fx(copied)(at)(at), function(at), strict=True):
            assert torch.allclose(a, c, rtol=1e-14)
            assert torch.equal(b, c)
    with OneDevice():
        meta = unit.to("meta")
        meta.initialise(x.to("meta"))
        assert meta(x.to("meta"))[1].device.type == "meta"


def test_density_in_the_units_of_the_user() -> None:
    """A normal fitted by its moments has its own log-density, whatever the units; bits likewise, −log₂ per feature."""
    torch.manual_seed(0)
    z = torch.randn(500, 2, dtype=torch.double)
    reference = None
    for unit in (1.0, 1e-12, 1e12):
        x = z * unit + 3 * unit
        flow = started(x)
        y, ladj = flow(x)
        log_p = dist.Normal(0.0, 1.0).log_prob(y).sum(-1) + ladj
        want = dist.Normal(x.mean(0), x.std(0, correction=0)).log_prob(x).sum(-1)
        assert torch.allclose(log_p, want, atol=1e-9)
        nats = log_p.mean() + 2 * math.log(unit)  # a density has the inverse units of its volume
        assert reference is None or torch.allclose(nats, reference, atol=1e-9)
        reference = nats


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_constant_features_are_only_centred(dtype: torch.dtype) -> None:
    """0.1 is rounded, and so is a mean of many: deviations from the mean would be some 1e-9, not 0."""
    torch.manual_seed(0)
    x = torch.stack([torch.full((1000,), 0.1), torch.randn(1000), torch.full((1000,), 1e12)], -1).to(dtype)
    unit = started(x)
    assert unit.scale[0] == unit.scale[2] == 1
    y, ladj = unit(x)
    assert torch.equal(y[:, [0, 2]], torch.zeros(1000, 2, dtype=dtype))
    assert bool(torch.isfinite(ladj).all())
    assert torch.equal(unit.inverse(y)[0][:, [0, 2]], x[:, [0, 2]])
    if dtype == torch.float:  # what the float64 sums of deviations are there for
        assert float(x[:, 0].std(correction=0)) > 0


def test_statistics_in_single_precision_do_not_lose_a_small_deviation() -> None:
    """float32 sums of 10⁵ values near 10⁴ are off by more than their deviation of 0.01; float64 sums are not."""
    torch.manual_seed(0)
    x = (1e4 + 0.01 * torch.randn(100_000, 1, dtype=torch.double)).float()
    unit = started(x)
    truth = x.double().std(0, correction=0)
    assert torch.allclose(unit.scale.double(), truth, rtol=1e-6)
    naive = (x.square().mean(0) - x.mean(0).square()).clamp(min=0).sqrt()
    assert not torch.allclose(naive.double(), truth, rtol=0.1)
    # y loses the rounding of m, at most ε/2 · 10⁴ in x.
    assert float(unit(x)[0].mean().abs()) <= 0.5 * torch.finfo(torch.float).eps * 1e4 / float(truth) * 1.01
    back = unit.inverse(unit(x)[0])[0]
    assert float((back - x).abs().max()) <= torch.finfo(torch.float).eps * 1e4


@pytest.mark.parametrize("size", [1e-300, 1e-12, 1e12, 1e300])
def test_sizes_whose_squares_leave_the_numbers(size: float) -> None:
    x = size * torch.tensor([[1.0], [2.0], [4.0], [5.0]], dtype=torch.double)
    unit = started(x)
    want = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=torch.double) / math.sqrt(2.5)
    y, ladj = unit(x)
    assert torch.allclose(y, want, rtol=1e-12)
    assert torch.allclose(ladj, torch.full((4,), -math.log(size) - 0.5 * math.log(2.5), dtype=torch.double), rtol=1e-12)


def test_in_a_composition_it_starts_from_what_reaches_it() -> None:
    torch.manual_seed(0)
    x = 17 * torch.rand(200, 3)
    flow = Compose([Interval(0.0, 17.0, 3), Standardise(3)])
    flow.initialise(x)
    y = flow(x)[0]
    assert float(y.detach().mean(0).abs().max()) < 1e-5
    assert torch.allclose(y.std(0, correction=0), torch.ones(3), atol=1e-5)
    assert torch.allclose(flow.inverse(y)[0], x, atol=1e-4)
    assert flow.double()(x.double())[0].dtype == torch.double


def test_bad_data_are_named() -> None:
    unit = Standardise(2)
    with pytest.raises(ValueError, match="at least two rows"):
        unit.initialise(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="finite"):
        unit.initialise(torch.tensor([[0.0, 1.0], [math.nan, 1.0]]))
    with pytest.raises(ValueError, match="takes vectors of 2"):
        unit.initialise(torch.zeros(4, 3))
    with pytest.raises(TypeError, match="part that starts from data"):
        Inverse(unit).initialise(torch.zeros(4, 2))
    assert not unit.initialised
