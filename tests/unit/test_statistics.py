"""Weights: k̂ against ArviZ and against known tails, error and effective size against their definitions."""

import math
import warnings

import numpy as np
import pytest
import torch

from pyro_gen.statistics import effective_sample_size, log_mean_exp, pareto_k


def many_kinds_of_weights(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    z = rng.standard_normal((count, 6))
    zeros = np.where(rng.random((count, 6)) < 0.5, -np.inf, z)
    return {
        **{f"normal, sd {s:g}": s * rng.standard_normal((count, 6)) for s in (1e-6, 1e-3, 0.1, 1.0, 3.0, 20.0, 300.0)},
        "student": rng.standard_t(1.5, (count, 6)),
        "bounded": -rng.exponential(1.0, (count, 6)),
        "far from 0": z + 1e4,
        "narrow guide": 0.45 * z**2,
        "wide guide": -(z**2),
        "ties": np.round(z, 1),
        "half of them zero": zeros,
    }


@pytest.mark.parametrize("count", [21, 25, 26, 30, 50, 99, 100, 225, 226, 1000, 5000])
def test_pareto_k_agrees_with_arviz(count):
    arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "psislw"):
        pytest.skip("ArviZ 1.x has no psislw")
    finite = 0
    for name, log_weights in many_kinds_of_weights(count).items():
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            expected = np.asarray(arviz.psislw(log_weights.T.copy())[1])
        found = pareto_k(torch.from_numpy(log_weights)).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0, err_msg=name)
        finite += np.isfinite(found).sum()
    assert finite > 60  # the comparison is not of infinities with infinities


@pytest.mark.parametrize("k", [-0.5, 0.0, 0.3, 0.7, 1.2])
def test_pareto_k_finds_the_shape_of_a_pareto_tail(k):
    # w = ((1 - u)^-k - 1) / k is generalized Pareto of shape k, and so is its tail above any threshold. The estimate
    # from M tail draws has standard error (1 + k) / sqrt(M) for k > -1/2, and a prior worth 10 draws at 1/2.
    count, rows = 20_000, 24
    u = torch.rand(count, rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = -torch.log1p(-u) if k == 0 else torch.expm1(-k * torch.log1p(-u)) / k
    tail = 3 * math.sqrt(count)
    expected = (tail * k + 10 * 0.5) / (tail + 10)
    error = (1 + k) / math.sqrt(tail * rows)
    assert (
        abs(float(pareto_k(weights.log()).mean()) - expected) < 4 * error + 0.01
    )  # .01: bias of the estimator at M = 424


def test_pareto_k_does_not_depend_on_scale_order_dimension_or_company():
    log_weights = torch.randn(500, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    k = pareto_k(log_weights)
    torch.testing.assert_close(pareto_k(log_weights + 100), k, rtol=0, atol=1e-9)
    torch.testing.assert_close(pareto_k(log_weights.flip(0)), k)
    torch.testing.assert_close(pareto_k(log_weights.T, dim=1), k)
    torch.testing.assert_close(pareto_k(log_weights.T.reshape(2, 2, 500), dim=-1), k.reshape(2, 2))
    torch.testing.assert_close(pareto_k(log_weights[:, 2]), k[2])
    many = log_weights.repeat(1, 300)  # more rows than one block of the fit takes
    torch.testing.assert_close(pareto_k(many), k.repeat(300))


def test_pareto_k_where_there_is_no_tail_to_fit():
    random = torch.randn(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert pareto_k(torch.zeros(100)) == -math.inf  # an exact guide
    assert pareto_k(torch.zeros(2)) == -math.inf
    assert pareto_k(torch.cat([torch.zeros(60), -torch.rand(60)])) == -math.inf  # the largest are all equal
    assert pareto_k(random) == math.inf  # 20 draws make a tail of four
    assert pareto_k(torch.zeros(1)) == math.inf
    assert pareto_k(torch.cat([torch.ones(3), torch.zeros(97)])) == math.inf  # ties: three weights above the rest
    assert pareto_k(torch.full((100,), -math.inf)) == math.inf
    assert pareto_k(torch.tensor([math.nan] + [0.0] * 99)).isnan()
    assert pareto_k(torch.tensor([math.inf] + [0.0] * 99)).isnan()
    assert pareto_k(torch.zeros(100, 0)).shape == (0,)


def test_pareto_k_takes_rounding_for_no_tail():
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rounding = -90 + 1e-5 * noise  # what float32 makes of equal weights near -90: epsilon 1.2e-7, times 90
    assert pareto_k(rounding, dtype=torch.float32) == -math.inf
    assert torch.isfinite(pareto_k(rounding))  # in float64 the same spread is no rounding
    assert torch.isfinite(pareto_k(-90 + 0.1 * noise, dtype=torch.float32))


def test_log_mean_exp_and_effective_sample_size_are_what_they_are_defined_as():
    log_weights = (
        torch.randn(40, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 700
    )  # exp overflows
    normalized = torch.softmax(log_weights, 0)
    value, error = log_mean_exp(log_weights)
    torch.testing.assert_close(value, torch.logsumexp(log_weights, 0) - math.log(40))
    torch.testing.assert_close(error, ((40 * normalized.square().sum(0) - 1) / 39).sqrt())
    torch.testing.assert_close(effective_sample_size(log_weights), 1 / normalized.square().sum(0))
    single = log_mean_exp(log_weights[:, :1].float())[0]
    assert single.dtype == torch.float64
    torch.testing.assert_close(log_mean_exp(log_weights.T, dim=1)[1], error)


def test_log_mean_exp_at_its_edges():
    value, error = log_mean_exp(torch.tensor([[0.0], [-math.inf]]))
    assert float(value) == pytest.approx(-math.log(2))
    assert float(error) == pytest.approx(1.0)  # weights 1, 0: sd of the mean 1/2, mean 1/2
    assert log_mean_exp(torch.tensor([3.0]))[0] == 3
    assert log_mean_exp(torch.tensor([3.0]))[1].isnan()  # one draw says nothing of its error
    assert log_mean_exp(torch.full((5,), -math.inf))[0] == -math.inf
    assert effective_sample_size(torch.full((5,), -math.inf)) == 0
    value, error = log_mean_exp(torch.full((1000,), -50.0))
    assert (float(value), float(error)) == (-50.0, 0.0)  # equal weights: no cancellation
    assert effective_sample_size(torch.full((7,), -50.0)) == pytest.approx(7)


def test_standard_error_is_that_of_repeats():
    # log w = s z: the relative variance of a mean of K lognormals is (exp(s^2) - 1) / K
    s, count, repeats = 0.7, 400, 2000
    log_weights = s * torch.randn(count, repeats, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    value, error = log_mean_exp(log_weights)
    spread = 4 / math.sqrt(2 * repeats) + 1 / count  # of an sd from that many repeats; the delta method's own rest
    assert abs(float(value.std() / error.mean()) - 1) < spread
    fourth = 4 * math.sqrt(20.8 / (count * repeats)) + 4 / count  # 20.8: kurtosis of this lognormal
    assert abs(float(error.square().mean()) * count / math.expm1(s**2) - 1) < fourth
    wrong = log_weights.std(0) / math.sqrt(count)  # the error of the mean log weight is not that of the log mean
    assert abs(float(value.std() / wrong.mean()) - 1) > spread


@pytest.mark.parametrize("function", [pareto_k, effective_sample_size, log_mean_exp])
@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "log_weights must be a tensor, got list"),
        (torch.arange(3), TypeError, "floating point, got torch.int64"),
        (torch.zeros(0, 2), ValueError, "no draws"),
        (torch.zeros(()), ValueError, "not a dimension"),
    ],
)
def test_what_is_no_weights_is_refused(function, argument, error, message):
    with pytest.raises(error, match=message):
        function(argument)
