"""Mixtures of logistics, real and binned, against closed forms and torch's own mixture."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MixtureSameFamily, constraints

from pyro_gen.distributions import DiscretizedLogistic, likelihood
from pyro_gen.distributions.mixtures import MixtureOfDiscretizedLogistics, MixtureOfLogistics


def parts(batch: int, components: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, loc, scale = (torch.randn(batch, components, generator=generator, dtype=torch.float64) for _ in range(3))
    return logits.to(dtype), (3 * loc).to(dtype), scale.exp().to(dtype)


def test_real_mixture_is_torchs_mixture_of_pyros_logistic() -> None:
    logits, loc, scale = parts(6, 4)
    ours = MixtureOfLogistics(logits, loc, scale)
    theirs = MixtureSameFamily(dist.Categorical(logits=logits), dist.Logistic(loc, scale))
    x = torch.linspace(-30, 30, 41, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x.expand(41, 6)), rtol=1e-12, atol=1e-12)
    # of the same weights: moments in closed form
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)


def test_real_mixture_integrates_to_one_and_its_cdf_is_the_integral() -> None:
    ours = MixtureOfLogistics(*parts(5, 3))
    # analytic density on an even grid: the trapezoid rule errs by e^(-2 π² s / h), and 300 leaves tails of e^(-30)
    x = torch.linspace(-300, 300, 60_001, dtype=torch.float64)
    p = ours.log_prob(x.unsqueeze(1)).exp()
    step = float(x[1] - x[0])
    torch.testing.assert_close(p.sum(0) * step, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-9)
    half = p[:30_000].sum(0) * step + p[30_000] * step / 2  # up to 0; the half bin at the end errs by h² p' / 12
    torch.testing.assert_close(half, ours.cdf(torch.tensor(0.0, dtype=torch.float64)), rtol=0, atol=step**2)
    assert not torch.allclose(half, ours.cdf(torch.tensor(0.1, dtype=torch.float64)), rtol=0, atol=step**2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_masses_of_all_levels_sum_to_one(dtype: torch.dtype, tolerance: float, levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(200, 15, generator=generator, dtype=torch.float64).to(dtype)
    for size in (0.1, 1.0, 10.0, 100.0):  # up to a point mass, far outside, and nearly flat
        d = likelihood("discretized_logistic", torch.Size([1]), levels=levels, components=5).each(size * numbers)
        k = torch.arange(levels, dtype=dtype).unsqueeze(1).expand(levels, 200)
        total = d.log_prob(k).double().exp().sum(0)
        assert float((total - 1).abs().max()) <= tolerance


def test_masses_are_differences_of_the_distribution_function() -> None:
    logits, loc, scale = parts(6, 3)
    d = MixtureOfDiscretizedLogistics(logits, 4 + loc, scale, 9)
    k = torch.arange(9, dtype=torch.float64).unsqueeze(1)
    upper, lower = d.cdf(k), torch.cat([torch.zeros(1, 6, dtype=torch.float64), d.cdf(k)[:-1]])
    torch.testing.assert_close(d.log_prob(k).exp(), upper - lower, rtol=0, atol=1e-14)
    torch.testing.assert_close(d.mean, (k * (upper - lower)).sum(0))
    torch.testing.assert_close(d.variance, (k.square() * (upper - lower)).sum(0) - d.mean.square())
    one = MixtureOfDiscretizedLogistics(logits[:, :1], 4 + loc[:, :1], scale[:, :1], 9)
    single = DiscretizedLogistic(4 + loc[:, 0], scale[:, 0], 9)
    torch.testing.assert_close(one.log_prob(k), single.log_prob(k.expand(9, 6)))
    torch.testing.assert_close(one.variance, single.variance)


@pytest.mark.parametrize("name", ["discretized_logistic", "mixture_of_logistics"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_extreme_numbers(name: str, dtype: torch.dtype) -> None:
    levels = 17 if name == "discretized_logistic" else None
    made = likelihood(name, torch.Size([1]), levels=levels, components=3).to(dtype)
    extremes = torch.tensor([-1e6, -1e3, -30.0, 0.0, 30.0, 1e3, 1e6], dtype=dtype)
    numbers = torch.cartesian_prod(extremes, extremes, extremes).repeat_interleave(3, 1).requires_grad_()
    numbers = numbers + 0  # three equal components
    numbers.retain_grad()
    for value in (0.0, 8.0, 16.0):
        log_p = made.each(numbers).log_prob(torch.tensor(value, dtype=dtype))
        assert bool(torch.isfinite(log_p).all())
        numbers.grad = None
        log_p.sum().backward(retain_graph=True)
        assert numbers.grad is not None
        assert bool(torch.isfinite(numbers.grad).all())


def test_draws_follow_the_distribution() -> None:
    from scipy.stats import chisquare, kstest

    logits, loc, scale = (t[0] for t in parts(1, 3))
    torch.manual_seed(0)
    real = MixtureOfLogistics(logits, loc, scale)
    x = real.sample((5000,))
    other = MixtureOfLogistics(logits, loc + 0.3, scale)
    assert kstest(x.numpy(), lambda v: real.cdf(torch.from_numpy(v)).numpy()).pvalue > 1e-3
    assert kstest(x.numpy(), lambda v: other.cdf(torch.from_numpy(v)).numpy()).pvalue < 1e-6
    binned = MixtureOfDiscretizedLogistics(logits, 4 + loc, scale, 9)
    k = torch.arange(9, dtype=torch.float64)
    counts = torch.bincount(binned.sample((20_000,)).long(), minlength=9).numpy()
    assert chisquare(counts, 20_000 * binned.log_prob(k).exp().numpy()).pvalue > 1e-3
    shifted = MixtureOfDiscretizedLogistics(logits, 4.2 + loc, scale, 9).log_prob(k).exp()
    assert chisquare(counts, 20_000 * (shifted / shifted.sum()).numpy()).pvalue < 1e-6


@pytest.mark.parametrize("levels", [None, 9])
def test_shapes_expand_and_support(levels: int | None) -> None:
    logits, loc, scale = parts(6, 3)
    d = (
        MixtureOfLogistics(logits, loc, scale)
        if levels is None
        else MixtureOfDiscretizedLogistics(logits, loc, scale, 9)
    )
    wide = d.expand((2, 6))
    assert wide.batch_shape == (2, 6)
    assert wide.sample((4,)).shape == (4, 2, 6)
    assert type(wide) is type(d)
    x = d.sample((5, 2))
    assert x.shape == (5, 2, 6)
    assert x.dtype == torch.float64
    torch.testing.assert_close(wide.log_prob(x), d.log_prob(x))
    assert d.support.is_discrete == (levels is not None)
    assert bool(d.support.check(x).all())
    assert not d.has_rsample
    assert d.to_event(1).event_shape == (6,)
    assert d.mask(torch.ones(6, dtype=torch.bool)).log_prob(x).shape == (5, 2, 6)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="levels must be an int of at least 2"):
        MixtureOfDiscretizedLogistics(torch.zeros(1), torch.zeros(1), torch.ones(1), 1)
    with pytest.raises(ValueError, match="counts the components"):
        MixtureOfLogistics(torch.zeros(()), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match="scale"):
        MixtureOfLogistics(torch.zeros(1), torch.zeros(1), -torch.ones(1), validate_args=True)
    d = MixtureOfDiscretizedLogistics(torch.zeros(1), torch.zeros(1), torch.ones(1), 5, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.tensor(5.0))
    with pytest.raises(ValueError, match="components= belongs to"):
        likelihood("normal", torch.Size([1]), components=3)
    with pytest.raises(ValueError, match="components must be an int"):
        likelihood("mixture_of_logistics", torch.Size([1]), components=0)


def test_names_give_mixtures() -> None:
    shape = torch.Size((3, 4))
    for name, options, maps in (
        ("mixture_of_logistics", {}, 15),
        ("mixture_of_logistics", {"components": 2}, 6),
        ("discretized_logistic", {"levels": 5, "components": 2}, 6),
    ):
        made = likelihood(name, shape, **options)  # type: ignore[arg-type]
        assert made.maps == maps
        d = made(torch.randn(6, 2, maps, 3, 4))
        assert (d.batch_shape, d.event_shape) == ((6, 2), shape)
        made.check(d.sample())
    assert likelihood("mixture_of_logistics", shape).support is constraints.real
    constant = torch.randn(10, 2)
    constant[:, 1] = 2.0
    with pytest.raises(ValueError, match="constant in column 1"):
        likelihood("mixture_of_logistics", torch.Size([2])).check_training(constant)
    likelihood("discretized_logistic", torch.Size([2]), levels=5, components=2).check_training(constant)


def test_a_scale_never_vanishes() -> None:
    made = likelihood("mixture_of_logistics", torch.Size([1]), components=1)
    height = made.each(torch.tensor([0.0, 0.0, -1e4])).log_prob(torch.tensor(0.0))
    assert float(height) == pytest.approx(math.log(1 / (4 * 1e-3)), abs=1e-4)  # a logistic's peak is 1 / 4s
