"""Distances between samples: closed forms, their errors, their floors, and what they refuse."""

import math
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import erf

from pyro_gen import datasets, diagnostics
from pyro_gen.diagnostics import (
    c2st,
    energy_distance,
    mmd,
    mode_coverage,
    sampling_floor,
    sliced_wasserstein,
    wasserstein,
)

DISTANCES = [sliced_wasserstein, wasserstein, energy_distance, mmd]


def normal(rows, features=2, seed=0):
    return torch.randn(rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quantiles(rows):
    """Middle quantiles of N(0, 1), one feature a row."""
    u = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    return torch.special.ndtri(u).unsqueeze(1)


def within(value, expected, error, errors=4.0):
    return abs(float(value) - expected) <= errors * error


# ---------------------------------------------------------------------------------------------------------- transport
@pytest.mark.parametrize("metric", [wasserstein, sliced_wasserstein])
def test_gaussians_on_a_line(metric):
    q = quantiles(4001)
    shuffled = q[torch.randperm(len(q), generator=torch.Generator().manual_seed(0))]
    for mean, sd in [(0.7, 1.0), (0.0, 2.5), (-1.0, 0.5)]:
        y = mean + sd * shuffled
        second = float(q.square().mean())  # 1 up to the width of the outer intervals
        assert float(metric(q, y, order=2)) == pytest.approx(math.sqrt(mean**2 + (sd - 1) ** 2 * second), rel=1e-12)
        assert abs(second - 1) < 1e-3
    assert float(metric(q, shuffled + 0.7, order=1)) == pytest.approx(0.7, rel=1e-12)
    assert float(metric(q, 2.5 * shuffled, order=1)) == pytest.approx(1.5 * math.sqrt(2 / math.pi), rel=1e-3)
    unsorted = float((q - shuffled).abs().mean())  # the plan that keeps the order is the best, not any
    assert unsorted > 1
    assert float(metric(q, shuffled, order=1)) == 0
    assert metric(q, shuffled).kind == "exact"  # there is one direction only


@pytest.mark.parametrize("rows", [(7, 3), (6, 4), (100, 37), (5, 5)])
def test_line_of_unequal_rows_is_that_of_scipy(rows):
    x, y = normal(rows[0], 1, 1), 0.5 * normal(rows[1], 1, 2) + 1
    expected = scipy.stats.wasserstein_distance(x.flatten().numpy(), y.flatten().numpy())
    assert float(wasserstein(x, y, order=1)) == pytest.approx(expected, rel=1e-12)
    n, m = rows  # order 2, against the definition on n m equal parts of each row
    whole = (x.sort(0).values.repeat_interleave(m, 0) - y.sort(0).values.repeat_interleave(n, 0)).square().mean().sqrt()
    assert float(wasserstein(x, y, order=2)) == pytest.approx(float(whole), rel=1e-12)
    assert float(wasserstein(x, x.repeat(2, 1))) == 0


@pytest.mark.parametrize("order", [1, 2])
def test_a_shift_moves_every_row_alike(order):
    x, shift = normal(200, 3), torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    y = (x + shift)[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    assert float(wasserstein(x, y, order)) == pytest.approx(3.0, rel=1e-12)
    sliced = sliced_wasserstein(x, y, 2000, order)
    # E|mu . theta| = |mu| / 2 and E(mu . theta)^2 = |mu|^2 / 3 in three dimensions
    expected = {1: 1.5, 2: math.sqrt(3)}[order]
    assert within(sliced, expected, sliced.standard_error)
    assert sliced.standard_error < 0.04
    assert not within(sliced, 3.0, sliced.standard_error)  # unlike the whole distance
    assert not within(sliced, {1: math.sqrt(3), 2: 1.5}[order], sliced.standard_error)  # nor the other order


def test_error_of_a_sliced_distance_is_that_of_its_directions():
    x, y = normal(50, 4), normal(50, 4, 1) * torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    for order in (1, 2):
        runs = [sliced_wasserstein(x, y, 30, order, seed, permutations=0) for seed in range(300)]
        spread = np.std([float(run) for run in runs], ddof=1)
        # sd of an sd over 300 runs is 4 %, and that of the mean of their errors (30 directions) 1 %
        assert np.mean([run.standard_error for run in runs]) == pytest.approx(spread, rel=4 * 0.045)


def test_assignment_is_the_best_of_all():
    import itertools

    x, y = normal(6, 2), normal(6, 2, 1)
    cost = torch.cdist(x, y)
    for order in (1, 2):
        every = [
            float((cost[range(6), list(p)] ** order).mean() ** (1 / order)) for p in itertools.permutations(range(6))
        ]
        assert float(wasserstein(x, y, order)) == pytest.approx(min(every), rel=1e-12)
        assert min(every) < float((cost.diagonal() ** order).mean() ** (1 / order))


def test_floor_of_eight_gaussians():
    floor = sampling_floor(wasserstein, datasets.eight_gaussians(), 1024, 10)
    assert within(floor, 0.71, 0.02 / 4 + floor.standard_error)  # .69 to .73 between 1024 rows, measured elsewhere
    assert (floor.rows, floor.repeats) == (1024, 10)


# ------------------------------------------------------------------------------------------------------------ kernels
def naive(kernel, x, y, biased=False):
    a, b, c = (
        torch.stack([torch.stack([kernel(p, q) for q in right]) for p in left])
        for left, right in ((x, x), (y, y), (x, y))
    )
    if biased:
        return float(a.mean() + b.mean() - 2 * c.mean())
    n, m = len(x), len(y)
    return float((a.sum() - a.trace()) / (n * (n - 1)) + (b.sum() - b.trace()) / (m * (m - 1)) - 2 * c.mean())


def test_kernels_are_means_over_pairs(monkeypatch):
    x, y = normal(9, 3), normal(7, 3, 1) + 0.5
    gaussian, distance = (lambda p, q: torch.exp(-(p - q).square().sum() / 2 / 0.8**2)), (lambda p, q: -(p - q).norm())
    for blocks in (2**22, 40):  # in one part, and in parts of two rows
        monkeypatch.setattr(diagnostics.kernels, "BLOCK", blocks)
        found, energy = mmd(x, y, 0.8, permutations=20), energy_distance(x, y, permutations=20)
        assert float(found) == pytest.approx(naive(gaussian, x, y), abs=1e-13)
        assert float(energy) == pytest.approx(naive(distance, x, y), abs=1e-12)
        assert abs(float(found) - naive(gaussian, x, y, biased=True)) > 0.1
    # the jackknife, from its definition
    left = [naive(gaussian, torch.cat([x[:i], x[i + 1 :]]), y) for i in range(9)]
    right = [naive(gaussian, x, torch.cat([y[:i], y[i + 1 :]])) for i in range(7)]
    variance = 8 * np.var(left) + 6 * np.var(right)
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-10)


def test_relabelled_values_are_those_of_relabelled_rows():
    from pyro_gen.diagnostics.two_samples import relabellings

    x, y = normal(9, 2), normal(6, 2, 1)
    pooled, labels = torch.cat([x, y]), relabellings((9, 6), 30, 5)
    assert torch.equal(labels[0], torch.arange(15) < 9)
    assert bool((labels.sum(1) == 9).all())
    for metric in (sliced_wasserstein, energy_distance, mmd):
        settings = {"bandwidth": 1.0} if metric is mmd else {}
        found = metric(x, y, permutations=30, seed=5, **settings)
        each = [float(metric(pooled[s], pooled[~s], permutations=0, seed=5, **settings)) for s in labels]
        assert found.floor == pytest.approx(np.mean(each[1:]), abs=1e-12)
        assert found.floor_spread == pytest.approx(np.std(each[1:], ddof=1), rel=1e-9)
        assert found.p_value == (1 + sum(v >= each[0] - 1e-12 for v in each[1:])) / 31


def test_relabelling_is_uniform():
    from pyro_gen.diagnostics.two_samples import relabellings

    labels = relabellings((2, 3), 20_000, 0)[1:]
    code = (labels * 2 ** torch.arange(5)).sum(1)
    counts = torch.unique(code, return_counts=True)[1].numpy()
    assert len(counts) == 10  # 5 over 2
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("metric", [mmd, energy_distance])
def test_no_bias_under_equality(metric):
    kernel = (lambda d: -d) if metric is energy_distance else (lambda d: torch.exp(-d.square() / 2))
    settings = {"permutations": 0} | ({} if metric is energy_distance else {"bandwidth": 1.0})
    values, biased, errors = [], [], []
    for seed in range(400):
        x, y = normal(15, 2, 2 * seed), normal(20, 2, 2 * seed + 1)
        found = metric(x, y, **settings)
        values.append(float(found))
        errors.append(found.standard_error)
        biased.append(
            float(kernel(torch.cdist(x, x)).mean() + kernel(torch.cdist(y, y)).mean())
            - 2 * float(kernel(torch.cdist(x, y)).mean())
        )
    spread = np.std(values, ddof=1)
    assert within(np.mean(values), 0.0, spread / 20)
    assert not within(np.mean(biased), 0.0, np.std(biased) / 20)
    assert np.mean(np.square(errors)) > 0.8 * spread**2  # the jackknife's variance is too large rather than too small


def test_gaussians_a_shift_apart():
    shift, h = 1.5, 0.7

    def absolute(mean):  # E|N(mean, 2)|
        return 2 / math.sqrt(math.pi) * math.exp(-(mean**2) / 4) + mean * erf(mean / 2)

    expected = {
        mmd: 2 * math.sqrt(h**2 / (h**2 + 2)) * (1 - math.exp(-(shift**2) / 2 / (h**2 + 2))),
        energy_distance: 2 * absolute(shift) - 2 * absolute(0.0),
    }
    for metric, value in expected.items():
        settings = {"permutations": 0} | ({"bandwidth": h} if metric is mmd else {})
        found = [metric(normal(40, 1, 2 * s), normal(60, 1, 2 * s + 1) + shift, **settings) for s in range(200)]
        spread = np.std([float(f) for f in found], ddof=1)
        assert within(np.mean([float(f) for f in found]), value, spread / math.sqrt(200))
        # sd of an sd over 200 runs is 5 %; the jackknife is consistent, and a few per cent too large at 40 rows
        assert np.mean([f.standard_error for f in found]) == pytest.approx(spread, rel=0.25)
        assert not within(np.mean([float(f) for f in found]), 0.5 * value, spread / math.sqrt(200))


def test_bandwidth_is_the_median_distance():
    x, y = normal(30), normal(30, seed=1)
    median = float(torch.nn.functional.pdist(torch.cat([x, y])).median())
    assert float(mmd(x, y, permutations=0)) == pytest.approx(float(mmd(x, y, median, permutations=0)), rel=1e-12)
    far, shift = normal(300), 1e6  # what all rows have in common rounds nothing away
    assert float(energy_distance(far + shift, far[:200] + 1 + shift)) == pytest.approx(
        float(energy_distance(far, far[:200] + 1)), rel=1e-6
    )


@pytest.mark.parametrize("metric", [sliced_wasserstein, mmd, energy_distance])
def test_p_values_are_uniform_under_equality_and_small_under_a_shift(metric):
    settings = {"projections": 10} if metric is sliced_wasserstein else {}
    equal, shifted = [], []
    for seed in range(200):
        x, y = normal(12, 2, 2 * seed), normal(18, 2, 2 * seed + 1)
        equal.append(metric(x, y, permutations=99, seed=seed, **settings).p_value)
        shifted.append(metric(x, y + 0.5, permutations=99, seed=seed, **settings).p_value)
    jitter = np.random.default_rng(0).random(200) / 100  # a p of 1/100, ..., 1 is uniform with the rest of its step
    assert scipy.stats.kstest(np.array(equal) - jitter, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(np.array(shifted) - jitter, "uniform").pvalue < 1e-6
    assert np.mean(np.array(shifted) <= 0.05) > 3 * 0.05
    assert min(equal) >= 0.01


# --------------------------------------------------------------------------------------------------------- classifier
def test_classifier_is_right_as_often_as_it_can_be():
    x = normal(2000, 1)
    for shift in (1.0, 3.0):
        found = c2st(x, normal(2000, 1, 1) + shift, classifier="logistic")  # the best one: a threshold
        assert within(found, float(torch.special.ndtr(torch.tensor(shift / 2))), found.standard_error)
        assert found.p_value < 1e-6
    assert float(c2st(x[:400], normal(400, 1, 1) + 10.0)) > 0.99


def test_classifier_finds_nothing_under_equality():
    from sklearn.neighbors import KNeighborsClassifier

    nearest = KNeighborsClassifier(1)  # right on every row that it has seen
    scores = []
    for seed in range(60):
        found = c2st(normal(100, 2, 2 * seed), normal(130, 2, 2 * seed + 1), classifier=nearest, seed=seed)
        assert found.floor_spread == pytest.approx(0.5 / math.sqrt(200))
        scores.append((float(found) - 0.5) / found.standard_error)
    assert within(np.mean(scores), 0.0, 1 / math.sqrt(60))
    assert np.std(scores, ddof=1) == pytest.approx(1.0, abs=4 / math.sqrt(120))  # the error is that of the accuracy
    assert not hasattr(nearest, "classes_")  # copies are trained


@pytest.mark.slow
def test_mlp_finds_nothing_under_equality_and_a_lost_mode():
    truth = datasets.eight_gaussians()
    scores = []
    for seed in range(8):
        found = c2st(truth.sample(400, seed=2 * seed), truth.sample(400, seed=2 * seed + 1), seed=seed)
        scores.append((float(found) - 0.5) / found.standard_error)
    assert within(np.mean(scores), 0.0, 1 / math.sqrt(8))
    x = truth.sample(1200, seed=99)
    seven = x[(x - truth.means[0]).norm(dim=1) > 2]
    found = c2st(seven, truth.sample(len(seven), seed=98))
    # the best classifier calls rows of the lost mode the truth's, and guesses: 1/2 + TV/2 with TV = 1/8
    assert found.p_value < 1e-3
    assert float(found) < 0.5 + 1 / 16 + 4 * found.standard_error
    assert float(c2st(x, truth.sample(1200, seed=97) + 3)) > 0.9


def test_classifier_repeats_by_seed():
    x, y = normal(60), normal(60, seed=1) + 0.5
    assert c2st(x, y, seed=3) == c2st(x, y, seed=3)
    assert float(c2st(x, y, seed=3, classifier="forest")) > 0.5


def test_classifier_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(ImportError, match=r"pip install pyro-gen\[data\]"):
        c2st(normal(20), normal(20))


# -------------------------------------------------------------------------------------------------------------- modes
def test_modes_by_hand():
    means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    # near the first: three good and one beyond three sd; the second: one good; the third: one, not good; the last: none
    x = torch.tensor([[0.0, 0.0], [0.0, 0.25], [0.1, 0.1], [1.0, 1.0], [10.0, 0.1], [2.0, 9.0]])
    found = mode_coverage(x, means, 0.1)
    assert (found.hit, found.modes) == (2, 4)
    assert found.counts.tolist() == [4, 1, 1, 0]
    assert found.good.tolist() == [3, 1, 0, 0]
    assert found.quality == pytest.approx(4 / 6)
    shares = np.array([4, 1, 1]) / 6
    assert found.reverse_kl == pytest.approx(float((shares * np.log(4 * shares)).sum()))
    assert mode_coverage(x, means, 0.1, radius=25.0).hit == 3
    weighted = mode_coverage(x, means, 0.1, weights=[4, 1, 1, 2])
    assert weighted.reverse_kl == pytest.approx(float((shares * np.log(shares / (np.array([4, 1, 1]) / 8))).sum()))
    assert float(found) == 2.0


def test_modes_of_the_truth():
    truth = datasets.grid_gaussians()
    runs = [mode_coverage(truth.sample(2500, seed=seed), truth) for seed in range(40)]
    assert all(run.hit == 25 for run in runs)
    good = 1 - math.exp(-4.5)
    assert within(np.mean([run.quality for run in runs]), good, runs[0].quality_error / math.sqrt(40))
    # 2 N KL is chi-square of 24 degrees of freedom: mean 24, variance 48
    statistic = np.array([2 * 2500 * run.reverse_kl for run in runs])
    assert within(statistic.mean(), 24.0, math.sqrt(48 / 40))
    assert runs[0].reverse_kl_floor == pytest.approx(24 / 5000)
    lost = truth.sample(2500, seed=0)
    lost = lost[lost[:, 0] > -1]  # 15 of 25 modes
    found = mode_coverage(lost, truth.means, truth.scale)
    assert found.hit == 15
    assert found.reverse_kl == pytest.approx(math.log(25 / 15), abs=0.02)


# ------------------------------------------------------------------------------------------------------- what all share
@pytest.mark.parametrize("metric", DISTANCES)
def test_order_of_rows_event_shape_units_and_dtype(metric):
    x, y = normal(40, 6), normal(40, 6, 1) + 0.3
    value = float(metric(x, y, permutations=0))
    shuffled = metric(x.flip(0), y[torch.randperm(40, generator=torch.Generator().manual_seed(0))], permutations=0)
    assert float(shuffled) == pytest.approx(value, rel=1e-12)
    assert float(metric(y, x, permutations=0)) == pytest.approx(value, rel=1e-12)
    assert float(metric(x.reshape(40, 1, 2, 3), y.reshape(40, 1, 2, 3), permutations=0)) == value
    power = 0 if metric is mmd else 1  # in units of x, but for the kernel whose bandwidth follows
    assert float(metric(10 * x, 10 * y, permutations=0)) == pytest.approx(10**power * value, rel=1e-9)
    assert float(metric(x.float(), y.float(), permutations=0)) == pytest.approx(value, rel=1e-5)
    whole = (10 * x).long()
    assert float(metric(whole, whole + 3, permutations=0)) == float(
        metric(whole.double(), whole.double() + 3, permutations=0)
    )


@pytest.mark.parametrize("metric", DISTANCES)
def test_seeds_and_the_global_generators(metric):
    x, y = normal(20, 3), normal(20, 3, 1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (metric(x, y, permutations=15, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.floor != other.floor
    c2st(x, y, classifier="forest")
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002


def test_results_print_with_kind_error_and_floor():
    data = datasets.eight_gaussians()
    shown = str(sliced_wasserstein(data.sample(500, seed=0), data.sample(500, seed=1)))
    assert shown.startswith("≈ ")
    assert "± " in shown
    assert "(floor " in shown
    assert "p = " in shown
    assert len(shown) < 60
    found = wasserstein(normal(5), normal(5) + 3.0)
    assert str(found) == "= 4.243"
    assert repr(found) == "Discrepancy(Wasserstein-2 = 4.243)"
    assert found.rows == (5, 5)
    assert float(found) == found.value
    assert str(c2st(normal(200), normal(200) + 99, classifier="logistic")).endswith("p < 1e-16)")
    floor = sampling_floor(mmd, normal(100), 20, 3, permutations=0)
    assert "between 3 pairs of 20 rows" in str(floor)
    assert float(floor) == floor.value


def test_floors_take_rows_or_what_samples():
    rows = normal(64)
    assert sampling_floor(energy_distance, rows, 32, 4, seed=1, permutations=0) == sampling_floor(
        energy_distance, rows, 32, 4, seed=1, permutations=0
    )
    pairs = []

    def seen(x, y):
        pairs.append(torch.cat([x, y]))
        return 0.0

    sampling_floor(seen, rows, 32, 3)
    for pair in pairs:  # no row twice
        assert torch.equal(pair.sort(0).values, rows.sort(0).values)
    assert not torch.equal(pairs[0], pairs[1])


BAD = [
    (lambda f: f([1.0], normal(3)), TypeError, r"x must be a tensor of rows, got list: use torch.as_tensor\(x\)"),
    (lambda f: f(normal(5), normal(5, 3)), ValueError, r"events of one shape, got \(2,\) and \(3,\)"),
    (lambda f: f(normal(5), normal(1)), ValueError, "y has 1 rows, and a distance between samples needs"),
    (lambda f: f(torch.zeros(5), normal(5)), ValueError, r"x must have shape \(rows, \*event_shape\), got \(5,\)"),
    (lambda f: f(normal(5), normal(5).cfloat()), TypeError, "y must be real"),
    (lambda f: f(normal(5).index_fill(0, torch.tensor([3]), math.nan), normal(5)), ValueError, "first in row 3"),
]


@pytest.mark.parametrize("metric", [*DISTANCES, c2st])
@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_samples_are_refused(metric, call, error, message):
    with pytest.raises(error, match=message):
        call(metric)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sliced_wasserstein(normal(5), normal(5), order=3), ValueError, "order must be 1 or 2, got 3"),
        (lambda: sliced_wasserstein(normal(5), normal(5), 0), ValueError, "projections must be an int of at least 1"),
        (lambda: mmd(normal(5), normal(5), permutations=-1), ValueError, "permutations must be an int of at least 0"),
        (
            lambda: wasserstein(normal(5), normal(6)),
            ValueError,
            r"pass x\[:5\] and y\[:5\], or take sliced_wasserstein",
        ),
        (lambda: wasserstein(*[torch.zeros(10_001, 2)] * 2), ValueError, "10000 is the most that is tried"),
        (lambda: mmd(normal(5), normal(5), 0.0), ValueError, "bandwidth must be a positive number or None, got 0.0"),
        (lambda: mmd(torch.zeros(5, 2), torch.zeros(5, 2)), ValueError, "median distance of rows is zero"),
        (lambda: mmd(normal(2), normal(5)), ValueError, "x has 2 rows, and a distance between samples needs 3"),
        (lambda: c2st(normal(9), normal(9), 1), ValueError, "folds must be at least 2"),
        (lambda: c2st(normal(9), normal(4)), ValueError, "y has 4 rows, and a distance between samples needs 5"),
        (lambda: c2st(normal(9), normal(9), classifier="svm"), ValueError, "classifier must be 'mlp', 'logistic'"),
        (lambda: sampling_floor(mmd, normal(9), 5), ValueError, "has 9 rows and two samples of n = 5 need 10"),
        (lambda: sampling_floor(mmd, 3, 5), TypeError, r"truth must be rows, or have sample\(n, seed=\)"),
        (lambda: sampling_floor(mmd, normal(9), 4, 1), ValueError, "repeats must be at least 2"),
        (lambda: mode_coverage(normal(9), normal(2)), ValueError, "scale must be a positive number, got None: the"),
        (lambda: mode_coverage(normal(9), normal(2), 1.0, radius=0), ValueError, "radius must be a positive number"),
        (lambda: mode_coverage(normal(9), normal(2), 1.0, weights=[1.0]), ValueError, "weights must be 2 positive"),
        (lambda: mode_coverage(normal(9), normal(2, 3), 1.0), ValueError, "events of one shape"),
        (lambda: mode_coverage(normal(9), datasets.grid_gaussians(), 1.0), ValueError, "brings its own scale"),
    ],
)
def test_bad_settings_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
