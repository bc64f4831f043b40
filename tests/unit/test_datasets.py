"""Toy densities against integrals, independent references and their own draws; digits; the user's files."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats
from torch import Tensor

from pyro_gen import datasets
from pyro_gen.datasets import GaussianMixture, Toy

# The toys, with a box that holds all but 1e-15 of the mass, and the length on which the density varies.
TOYS: dict[str, tuple[Callable[[], Toy], tuple[float, float, float, float], float]] = {
    "eight_gaussians": (datasets.eight_gaussians, (-8, 8, -8, 8), math.sqrt(0.1)),
    "grid_gaussians": (datasets.grid_gaussians, (-4.5, 4.5, -4.5, 4.5), 0.05),
    "ring": (datasets.ring, (-1.1, 1.1, -1.1, 1.1), 0.01),
    "rings": (datasets.rings, (-4, 4, -4, 4), 0.1),
    "moons": (datasets.moons, (-2, 3, -1.5, 2), 0.1),
    "pinwheel": (datasets.pinwheel, (-7.6, 7.6, -7.6, 7.6), 0.08),  # its twist makes the arms thinner than 0.2
    "swiss_roll": (datasets.swiss_roll, (-3.8, 3.8, -3.8, 3.8), 0.1),
    "mixture": (lambda: datasets.gaussian_mixture(2, 5, separation=2.0, seed=3), (-15, 15, -15, 15), 1.0),
}
SMOOTH = sorted(TOYS)
ALL = [*SMOOTH, "checkerboard"]


def make(name: str) -> Toy:
    return datasets.checkerboard() if name == "checkerboard" else TOYS[name][0]()


def grid(box: tuple[float, float, float, float], step: float) -> tuple[Tensor, tuple[int, int]]:
    first = torch.arange(round((box[1] - box[0]) / step), dtype=torch.float64) * step + box[0] + step / 2
    second = torch.arange(round((box[3] - box[2]) / step), dtype=torch.float64) * step + box[2] + step / 2
    return torch.cartesian_prod(first, second), (len(first), len(second))


# ------------------------------------------------------------------------------------------------------- densities --


@pytest.mark.parametrize("name", SMOOTH)
def test_density_integrates_to_one_and_gives_the_entropy(name: str) -> None:
    # With two points to a scale the trapezoidal sum of a smoothed density errs by 2 exp(-8 pi^2) = 1e-34; what is left
    # are the tails (1e-15) and the rounding of 1e5 terms. The entropy's integrand is singular off the real axis, so
    # only the sum of four points to a scale is good to 1e-8.
    toy, box, scale = make(name), *TOYS[name][1:]
    x, _ = grid(box, scale / 2)
    assert torch.exp(toy.log_prob(x)).sum().item() * scale**2 / 4 == pytest.approx(1, abs=1e-11)
    if name != "swiss_roll":  # slow, and the code is that of the moons
        x, _ = grid(box, scale / 4)
        log_p = toy.log_prob(x)
        assert -(log_p.exp() * log_p).sum().item() * scale**2 / 16 == pytest.approx(toy.entropy, abs=1e-8)


def test_checkerboard_is_uniform_on_half_the_board() -> None:
    toy = datasets.checkerboard()
    x, _ = grid((-5, 5, -5, 5), 0.25)  # cells that no edge of a square cuts: the sum is the integral
    density = toy.log_prob(x).exp()
    assert set(density.tolist()) == {0.0, density.max().item()}
    assert density.sum().item() / 16 == pytest.approx(1, abs=1e-12)
    edges = torch.tensor([[-4.0, -4.0], [-2.0, -4.0], [-2.0, -2.0], [4.0, 4.0], [0.0, 0.0], [-4.0, 4.0]])
    assert toy.log_prob(edges).isfinite().tolist() == [True, False, True, False, True, False]
    assert toy.entropy == math.log(32)


def around(toy: Toy) -> Tensor:
    """Draws, draws pushed outwards, and points where log p is about minus a thousand."""
    x = toy.sample(8, seed=5).double()
    far = torch.tensor([[0.0, 0.0], [5.0, 1.0], [-3.0, 4.0], [0.3, -5.5]], dtype=torch.float64)
    return torch.cat([x, 1.3 * x, far])


def curve_reference(x: np.ndarray, curves: list[Callable[[float], tuple[float, float]]], ends: tuple[float, float]):
    """log p of a curve with noise .1, by adaptive quadrature on pieces shorter than the noise."""
    pieces = np.linspace(*ends, 300)
    log_terms = []
    for curve in curves:

        def exponent(t: float, curve: Callable[[float], tuple[float, float]] = curve) -> float:
            a, b = curve(t)
            return -((x[0] - a) ** 2 + (x[1] - b) ** 2) / 0.02

        peak = max(exponent(t) for t in pieces)
        total = 0.0
        for low, high in itertools.pairwise(pieces):
            if max(exponent(low), exponent(high)) > peak - 60:
                total += integrate.quad(lambda t: math.exp(exponent(t) - peak), low, high, epsabs=0, epsrel=1e-12)[0]  # noqa: B023
        log_terms.append(peak + math.log(total / (ends[1] - ends[0]) / len(curves)) - math.log(2 * math.pi * 0.01))
    return special.logsumexp(log_terms)


@pytest.mark.parametrize(
    ("name", "curves", "ends"),
    [
        (
            "moons",
            [lambda t: (math.cos(t), math.sin(t)), lambda t: (1 - math.cos(t), 0.5 - math.sin(t))],
            (0, math.pi),
        ),
        ("swiss_roll", [lambda t: (t / 5 * math.cos(t), t / 5 * math.sin(t))], (1.5 * math.pi, 4.5 * math.pi)),
    ],
)
def test_curves_agree_with_adaptive_quadrature(name: str, curves: list, ends: tuple[float, float]) -> None:
    toy = make(name)
    angle = torch.arange(5, dtype=torch.float64)
    edge = 8 * torch.stack([angle.cos(), angle.sin()], -1)  # as far out as the docstring promises
    x = torch.cat([around(toy), edge])
    expected = [curve_reference(row, curves, ends) for row in x.numpy()]
    assert min(expected) < -900  # the far points are among them
    # quad's relative 1e-12 of p is 1e-12 of log p; float64 holds a log p of -1e3 to 1e-13
    np.testing.assert_allclose(toy.log_prob(x).numpy(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["ring", "rings"])
def test_rings_agree_with_adaptive_quadrature(name: str) -> None:
    toy = make(name)
    radii, scale = ([1.0], 0.01) if name == "ring" else ([1.0, 2.0, 3.0], 0.1)
    for x in around(toy):
        r, terms = float(x.norm()), []
        for radius in radii:
            kappa = r * radius / scale**2
            width = min(math.pi, 12 / math.sqrt(max(kappa, 1e-6)))
            # exp(kappa (cos t - 1)) about the nearest point of the circle
            inner, _ = integrate.quad(
                lambda t: math.exp(-2 * kappa * math.sin(t / 2) ** 2),  # noqa: B023
                0,
                width,
                epsabs=0,
                epsrel=1e-12,
                limit=200,
            )
            terms.append(-((r - radius) ** 2) / (2 * scale**2) + math.log(inner / math.pi))
        expected = special.logsumexp(terms) - math.log(2 * math.pi * scale**2 * len(radii))
        assert toy.log_prob(x).item() == pytest.approx(expected, abs=1e-8, rel=1e-12)


def test_pinwheel_agrees_with_a_numerical_inverse_and_jacobian() -> None:
    toy = datasets.pinwheel(arms=3, radius=1.5, radial_scale=0.5, tangential_scale=0.3, twist=0.8)

    def forward(u: np.ndarray, arm: int) -> np.ndarray:
        angle = 2 * math.pi * arm / 3 + 0.8 * (u @ u) / 1.5**2
        return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ u

    def solve(x: np.ndarray, arm: int) -> np.ndarray:
        # the preimage has the norm of x, so its direction is the one unknown
        r = math.hypot(*x)

        def miss(angle: float) -> float:
            y = forward(r * np.array([math.cos(angle), math.sin(angle)]), arm)
            return math.remainder(math.atan2(y[1], y[0]) - math.atan2(x[1], x[0]), 2 * math.pi)

        angles = np.linspace(0, 2 * math.pi, 50)
        values = [miss(a) for a in angles]
        i = next(i for i in range(49) if values[i] <= 0 < values[i + 1] and values[i + 1] - values[i] < 1)
        angle = optimize.brentq(miss, angles[i], angles[i + 1], xtol=1e-14)
        return r * np.array([math.cos(angle), math.sin(angle)])

    for x in toy.sample(10, seed=1).double().numpy():
        density = 0.0
        for arm in range(3):
            u = solve(x, arm)
            np.testing.assert_allclose(forward(u, arm), x, atol=1e-12)
            columns = [(forward(u + h, arm) - forward(u - h, arm)) / 2e-5 for h in 1e-5 * np.eye(2)]
            normal = stats.norm.pdf(u[0], 1.5, 0.5) * stats.norm.pdf(u[1], 0, 0.3)
            density += normal / abs(np.linalg.det(np.array(columns))) / 3
        # central differences with h = 1e-5 err by h^2 times third derivatives of order ten
        assert toy.log_prob(torch.from_numpy(x)).item() == pytest.approx(math.log(density), abs=1e-8)


def test_gaussian_mixture_agrees_with_torch_distributions() -> None:
    toy = datasets.gaussian_mixture(5, components=4, separation=3.0, seed=2, scale=0.7)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for mixture in (toy, GaussianMixture(toy.means, 0.7, weights)):
        reference = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(mixture.weights),
            torch.distributions.Independent(torch.distributions.Normal(mixture.means, 0.7), 1),
        )
        x = mixture.sample(50, seed=0).double()
        torch.testing.assert_close(mixture.log_prob(x), reference.log_prob(x), rtol=1e-12, atol=1e-12)
    assert torch.pdist(toy.means).min().item() == pytest.approx(3.0 * 0.7)
    torch.testing.assert_close(toy.means.mean(0), torch.zeros(5, dtype=torch.float64))


def test_narrow_and_distant_components_keep_their_digits() -> None:
    # |x|^2 - 2xm + |m|^2 would lose every digit here
    toy = GaussianMixture(torch.tensor([[1e6, 0.0]], dtype=torch.float64), scale=1e-3)
    x = torch.tensor([1e6 + 0.0009765625, 0.0], dtype=torch.float64)
    expected = -(0.9765625**2) / 2 - math.log(2 * math.pi * 1e-6)
    assert toy.log_prob(x).item() == pytest.approx(expected, abs=1e-6)  # rounding of 1e6 / 1e-3 is 1e-7


def test_large_batches_are_taken_in_parts() -> None:
    toy = datasets.swiss_roll()
    x = toy.sample(300, seed=0).double()  # a few parts
    torch.testing.assert_close(toy.log_prob(x), torch.stack([toy.log_prob(row) for row in x]), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- entropy --


def test_entropy_of_eight_gaussians_is_that_of_one_plus_log_eight() -> None:
    exact = math.log(8) + math.log(2 * math.pi * math.e * 0.1)
    toy = datasets.eight_gaussians()
    # Neighbours stand 12.1 standard deviations apart: the overlap is below 8 times the tail at 6.05, 1e-8.
    assert toy.entropy == pytest.approx(exact, abs=1e-7)
    assert toy.entropy < exact
    assert round(toy.entropy, 4) == 2.6147


def test_entropy_of_mixtures_against_one_dimensional_quadrature() -> None:
    def reference(separation: float, weight: float) -> float:
        def integrand(x: float) -> float:
            p = weight * stats.norm.pdf(x) + (1 - weight) * stats.norm.pdf(x, separation)
            return float(special.entr(p))

        points = np.arange(-12, separation + 13)
        return sum(integrate.quad(integrand, a, a + 1, epsabs=1e-13)[0] for a in points)

    noise = math.log(2 * math.pi * math.e) / 2
    for separation in (0.5, 2.0, 4.0, 8.6, 30.0):
        for dim in (1, 2, 5):
            direction = torch.ones(dim, dtype=torch.float64) / math.sqrt(dim)
            means = torch.stack([direction, (1 + separation) * direction])
            toy = GaussianMixture(means, 1.0, [0.3, 0.7])
            assert toy.entropy == pytest.approx(reference(separation, 0.3) + (dim - 1) * noise, abs=1e-9)
            scaled = GaussianMixture(0.01 * means, 0.01, [0.3, 0.7])
            assert scaled.entropy == pytest.approx(toy.entropy + dim * math.log(0.01), abs=1e-9)
    one = datasets.gaussian_mixture(7, components=1, scale=2.0)
    assert one.entropy == pytest.approx(7 * (noise + math.log(2)), abs=1e-11)


def test_entropy_of_a_ring_against_one_dimensional_quadrature() -> None:
    def integrand(r: float) -> float:
        p = math.exp(-((r - 1) ** 2) / 2e-4) * special.ive(0, r / 1e-4) / (2 * math.pi * 1e-4)
        return 2 * math.pi * r * float(special.entr(p))

    expected = sum(integrate.quad(integrand, a, a + 0.01, epsabs=1e-13)[0] for a in np.arange(0.9, 1.1, 0.01))
    assert datasets.ring().entropy == pytest.approx(expected, abs=1e-9)


def test_entropy_without_a_closed_form_is_an_error_that_names_the_estimate() -> None:
    toy = datasets.gaussian_mixture(6, components=5)
    with pytest.raises(NotImplementedError, match=r"span 4 dimensions.*entropy_estimate"):
        _ = toy.entropy
    value, error = toy.entropy_estimate(20_000)
    # far components: the bounds are those of one component, and of components that never meet
    noise = 3 * math.log(2 * math.pi * math.e)
    assert noise + math.log(5) - 0.1 < value < noise + math.log(5) + 4 * error
    assert error == pytest.approx(math.sqrt(3 / 20_000), rel=0.1)  # log p has the variance of chi2_6 / 2
    assert datasets.gaussian_mixture(6, components=3).entropy == pytest.approx(noise + math.log(3), abs=0.02)
    with pytest.raises(ValueError, match="at least 2"):
        toy.entropy_estimate(1)


# ----------------------------------------------------------------------------------------------------------- draws --


def departure(samples: Tensor, toy: Toy, entropy: float) -> Tensor:
    """How many standard errors the mean of -log p over the samples lies from the entropy, and from 0.05 more."""
    surprise = -toy.log_prob(samples.double())
    error = max(surprise.std().item() / math.sqrt(len(samples)), 1e-9)
    return (surprise.mean() - torch.tensor([entropy, entropy + 0.05])).abs() / error


@pytest.mark.parametrize("name", ALL)
def test_draws_have_the_entropy_of_the_density(name: str) -> None:
    toy = make(name)
    right, wrong = departure(toy.sample(40_000, seed=11), toy, toy.entropy)
    assert right < 4
    assert wrong > 4  # the test sees one twentieth of a nat


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (datasets.moons(), datasets.moons(scale=0.107)),
        (datasets.ring(), datasets.ring(scale=0.0107)),
        (datasets.rings(), datasets.rings(radii=(1.0, 2.0, 3.04))),
        (datasets.swiss_roll(), datasets.swiss_roll(scale=0.107)),
        (datasets.pinwheel(), datasets.pinwheel(twist=0.55)),
        (datasets.eight_gaussians(), datasets.eight_gaussians(radius=5.15)),
    ],
    ids=lambda toy: toy.name,
)
def test_draws_of_another_toy_do_not_pass(right: Toy, wrong: Toy) -> None:
    assert departure(wrong.sample(40_000, seed=11), right, right.entropy)[0] > 4


def chi_square(toy: Toy, samples: Tensor, box: tuple[float, float, float, float], step: float, bins: int) -> float:
    """p-value of the counts in bins x bins cells of a box, and outside it, against the integral of the density."""
    x, (rows, columns) = grid(box, step)
    mass = toy.log_prob(x).exp().reshape(bins, rows // bins, bins, columns // bins).sum((1, 3)) * step**2
    low, high = torch.tensor(box[::2]), torch.tensor(box[1::2])
    cell = torch.floor((samples - low) / (high - low) * bins).long()
    inside = ((cell >= 0) & (cell < bins)).all(-1)
    counts = torch.bincount(cell[inside] @ torch.tensor([bins, 1]), minlength=bins * bins).double()
    expected = len(samples) * mass.flatten()
    keep = expected >= 10
    observed, rest = counts[keep], len(samples) - expected[keep].sum()
    expected = expected[keep]
    observed[-1] += len(samples) - observed.sum()  # the sparse cells and the outside are counted with the last
    expected[-1] += rest
    return float(stats.chisquare(observed.numpy(), expected.numpy()).pvalue)


CELLS: dict[str, tuple[tuple[float, float, float, float], float, int]] = {
    "eight_gaussians": ((-6.4, 6.4, -6.4, 6.4), 0.05, 32),
    "grid_gaussians": ((-4.48, 4.48, -4.48, 4.48), 0.01, 64),
    "ring": ((-1.08, 1.08, -1.08, 1.08), 0.0025, 24),
    "rings": ((-3.6, 3.6, -3.6, 3.6), 0.025, 36),
    "moons": ((-1.6, 2.6, -1.05, 1.55), 0.02, 10),
    "pinwheel": ((-4.8, 4.8, -4.8, 4.8), 0.025, 32),
    "swiss_roll": ((-3.2, 3.2, -3.2, 3.2), 0.05, 32),
    "mixture": ((-8, 8, -8, 8), 0.125, 32),
    "checkerboard": ((-5, 5, -5, 5), 0.125, 20),
}


@pytest.mark.parametrize("name", ALL)
def test_counts_of_draws_follow_the_density(name: str) -> None:
    toy, x = make(name), make(name).sample(40_000, seed=12)
    assert chi_square(toy, x, *CELLS[name]) > 1e-4
    x = x + torch.tensor([0.05, 0.0]) * x.std()  # the test sees a shift by a twentieth of the spread
    assert chi_square(toy, x, *CELLS[name]) < 1e-6


def test_two_thirds_of_weighted_draws() -> None:
    toy = GaussianMixture(torch.tensor([[-10.0], [10.0]]), 1.0, [1.0, 2.0])
    x = toy.sample(9000, seed=0)
    assert abs((x > 0).float().mean().item() - 2 / 3) < 4 * math.sqrt(2 / 9 / 9000)
    torch.testing.assert_close(toy.weights, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))


def test_checkerboard_draws_never_round_into_the_next_square(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 1 - 2**-24  # the largest float32 below one, which corner + 2u rounds up
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, largest))
    toy = datasets.checkerboard()
    assert toy.log_prob(toy.sample(200, seed=0)).isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_seeds(name: str) -> None:
    toy = make(name)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    a, b, c = toy.sample(100, seed=0), toy.sample(100, seed=0), toy.sample(100, seed=1)
    d, e = toy.sample(100), toy.sample(100)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(d, e)
    assert toy.entropy_estimate(100) == toy.entropy_estimate(100)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert a.dtype == torch.float32
    assert a.shape == (100, *toy.event_shape)
    assert toy.sample(0).shape == (0, *toy.event_shape)


@pytest.mark.parametrize("name", ALL)
def test_draws_do_not_depend_on_the_defaults_of_torch(name: str) -> None:
    expected, entropy = make(name).sample(20, seed=0), make(name).entropy
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # a tensor made on the default device would hold nothing
            toy = make(name)
            x = toy.sample(20, seed=0)
            assert torch.equal(x, expected)
            assert x.dtype == torch.float32
            assert toy.entropy == entropy
            assert toy.entropy_estimate(20, seed=0).value == pytest.approx(-toy.log_prob(x).mean().item(), abs=0.01)
    finally:
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------------- interface --


@pytest.mark.parametrize("name", ALL)
def test_shapes_dtypes_and_devices(name: str) -> None:
    toy = make(name)
    x = toy.sample(6, seed=0)
    log_p = toy.log_prob(x)
    assert log_p.dtype == torch.float32
    double = toy.log_prob(x.double())
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), log_p)  # float64 inside, whatever comes in
    assert torch.equal(toy.log_prob(x.reshape(2, 3, 2)), log_p.reshape(2, 3))
    torch.testing.assert_close(toy.log_prob(x[0]), log_p[0])
    assert toy.log_prob(x[0]).shape == ()
    assert toy.log_prob(x[:0]).shape == (0,)
    meta = toy.log_prob(x.to("meta"))
    assert (meta.device.type, meta.shape) == ("meta", (6,))
    if torch.cuda.is_available():
        torch.testing.assert_close(toy.log_prob(x.cuda()).cpu(), log_p)
    special_rows = torch.tensor([[math.inf, 0.0], [0.0, -math.inf], [math.nan, 0.0], [math.inf, math.nan]])
    values = toy.log_prob(special_rows)
    assert values[:2].tolist() == [-math.inf] * 2
    assert values[2:].isnan().all()
    assert toy.log_prob(torch.tensor([1e30, -1e30])).item() == -math.inf
    twin = pickle.loads(pickle.dumps(copy.deepcopy(toy)))
    assert torch.equal(twin.log_prob(x), log_p)
    assert torch.equal(twin.sample(6, seed=0), x)


@pytest.mark.parametrize("name", SMOOTH)
def test_score_and_curvature_are_those_of_finite_differences(name: str) -> None:
    toy = make(name)
    x = toy.sample(5, seed=3).double().requires_grad_()
    assert torch.autograd.gradcheck(toy.log_prob, (x,), eps=1e-6 * TOYS[name][2], rtol=1e-4)
    step = TOYS[name][2]

    def scaled(y: Tensor) -> Tensor:  # derivatives of order one, so that gradgradcheck's tolerances mean something
        return toy.log_prob(y * step)

    assert torch.autograd.gradgradcheck(scaled, ((x / step).detach().requires_grad_(),), rtol=1e-3, atol=1e-4)


def test_score_of_the_checkerboard_is_zero() -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0]], requires_grad=True)
    (score,) = torch.autograd.grad(datasets.checkerboard().log_prob(x).sum(), x)
    assert torch.equal(score, torch.zeros(2, 2))


def test_score_at_the_centre_of_the_rings_is_zero() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(datasets.rings().log_prob(x), x)
    assert torch.equal(score, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("toy", "shown"),
    [
        (datasets.eight_gaussians(), "eight_gaussians(radius=5, scale=0.316228)"),
        (datasets.rings((1.0, 2.5)), "rings(radii=(1, 2.5), scale=0.1)"),
        (datasets.moons(scale=0.05), "moons(scale=0.05)"),
        (datasets.checkerboard(), "checkerboard()"),
        (
            datasets.gaussian_mixture(3),
            "gaussian_mixture(dim=3, components=8, separation=6, seed=0, scale=1)",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Toy) else "",
)
def test_repr_is_the_call(toy: Toy, shown: str) -> None:
    assert repr(toy) == shown
    assert toy.name == shown.partition("(")[0]
    again = eval(shown, vars(datasets))
    torch.testing.assert_close(again.sample(3, seed=0), toy.sample(3, seed=0), rtol=1e-5, atol=1e-5)


def test_eight_gaussians_is_also_the_ring_of_modes() -> None:
    toy = datasets.eight_gaussians(radius=1.0, scale=0.01)
    torch.testing.assert_close(toy.means.norm(dim=-1), torch.ones(8, dtype=torch.float64))
    assert datasets.grid_gaussians().means.unique().tolist() == [-4, -2, 0, 2, 4]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: datasets.moons(scale=0.0), ValueError, "scale must be a positive number, got 0.0"),
        (lambda: datasets.eight_gaussians(radius=-1.0), ValueError, "radius must be a positive"),
        (lambda: datasets.ring(scale=math.nan), ValueError, "scale must be a positive"),
        (lambda: datasets.rings(radii=()), ValueError, "at least one radius"),
        (lambda: datasets.pinwheel(arms=0), ValueError, "arms must be at least 1"),
        (lambda: datasets.gaussian_mixture(0), ValueError, "dim must be at least 1"),
        (lambda: datasets.gaussian_mixture(2, components=0), ValueError, "components must be at least 1"),
        (lambda: datasets.gaussian_mixture(2, separation=0.0), ValueError, "separation must be a positive"),
        (lambda: GaussianMixture(torch.zeros(3), 1.0), ValueError, r"\(components, dim\), got \(3,\)"),
        (lambda: GaussianMixture(torch.zeros(3, 2), 1.0, [1.0, 1.0]), ValueError, r"shape \(3,\).*got \(2,\)"),
        (lambda: GaussianMixture(torch.zeros(2, 2), 1.0, [1.0, 0.0]), ValueError, "weights must be positive"),
        (lambda: datasets.moons().sample(-1), ValueError, "must not be negative, got -1"),
        (lambda: datasets.moons().log_prob(torch.zeros(4, 3)), ValueError, r"\(\.\.\., 2\), got \(4, 3\)"),
        (lambda: datasets.moons().log_prob(torch.tensor(1.0)), ValueError, r"got \(\)"),
        (
            lambda: datasets.moons().log_prob(torch.zeros(4, 2).long()),
            TypeError,
            "floating-point tensor, got",
        ),
        (lambda: datasets.moons().log_prob(np.zeros((4, 2))), TypeError, "got ndarray"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------------------------------------------------- digits --


def test_digits_are_split_once_and_for_all() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    everything, shown = sklearn_datasets.load_digits(return_X_y=True)
    split = datasets.digits(labels=True)
    train, validation, test = split
    assert [len(x) for x, _ in split] == [1200, 237, 360]
    assert split.train is train
    order = np.random.default_rng(0).permutation(1797)
    for (x, y), rows in zip((train, validation, test), np.split(order, [1200, 1437]), strict=True):
        assert (x.dtype, y.dtype, x.shape[1:], y.shape[1:]) == (torch.float32, torch.int64, (64,), ())
        assert (x.numpy() == everything[rows]).all()
        assert (y.numpy() == shown[rows]).all()
    torch.testing.assert_close(torch.cat([train[0], validation[0], test[0]]).unique(), torch.arange(17.0))


def test_digits_options() -> None:
    pytest.importorskip("sklearn")
    grey, black = datasets.digits(), datasets.digits(levels=2)
    pictures, noisy = datasets.digits(flat=False), datasets.digits(dequantize=True)
    for x, b, p, n in zip(grey, black, pictures, noisy, strict=True):
        assert torch.equal(b, (x > 8).float())
        assert p.shape[1:] == (1, 8, 8)
        assert torch.equal(p.flatten(1), x)
        assert torch.equal(n.floor(), x)
        assert 0.45 < (n - x).mean() < 0.55
    assert torch.equal(noisy.test, datasets.digits(dequantize=True).test)
    assert not torch.equal(noisy.test, datasets.digits(dequantize=True, seed=1).test)
    assert not torch.equal(noisy.train[:200] % 1, noisy.validation[:200] % 1)  # no noise is used twice
    with pytest.raises(ValueError, match=r"levels must be 17 .* or 2 .*got 16"):
        datasets.digits(levels=16)  # type: ignore[call-overload]


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install pyro-gen\[data\]"):
        datasets.digits()


def test_dequantize() -> None:
    state = torch.get_rng_state()
    x = torch.arange(17.0).repeat(1000, 1)
    noise = datasets.dequantize(x, seed=0) - x
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(datasets.dequantize(x, seed=0), datasets.dequantize(x, seed=0))
    assert not torch.equal(datasets.dequantize(x), datasets.dequantize(x))
    assert stats.kstest(noise.flatten().numpy(), "uniform").pvalue > 1e-4
    assert datasets.dequantize(torch.tensor([3], dtype=torch.uint8)).dtype == torch.float32
    assert datasets.dequantize(torch.tensor([3.0], dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="whole numbers"):
        datasets.dequantize(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="whole numbers"):
        datasets.dequantize(torch.tensor([math.nan]))


def test_dequantized_values_never_round_up_to_the_next_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.full(size, 1 - 2**-53, dtype=torch.float64))
    x = torch.arange(17.0)
    assert torch.equal(datasets.dequantize(x, seed=0).floor(), x)


# ----------------------------------------------------------------------------------------------------------- files --


def test_numbers_come_back_from_every_format(tmp_path: Path) -> None:
    x = np.arange(12.0).reshape(4, 3) / 8
    expected = torch.tensor(x, dtype=torch.float32)
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "order.npy", np.asfortranarray(x.astype(">f4")))  # big-endian, column by column
    np.savez(tmp_path / "b.npz", anything=x)
    np.savez_compressed(tmp_path / "B.npz", x=x)
    (tmp_path / "B.npz").rename(tmp_path / "B.NPZ")
    np.savetxt(tmp_path / "c.csv", x, delimiter=",")
    torch.save(torch.tensor(x), tmp_path / "d.pt")
    torch.save({"x": torch.tensor(x, requires_grad=True)}, tmp_path / "e.pt")
    torch.save(torch.tensor(x, dtype=torch.bfloat16), tmp_path / "f.pt")
    names = ["a.npy", "order.npy", "b.npz", "B.NPZ", "c.csv", "d.pt", "e.pt", "f.pt"]
    for name in names:
        loaded = datasets.load(tmp_path / name)
        assert isinstance(loaded, Tensor)
        assert (loaded.dtype, loaded.requires_grad, loaded.is_contiguous()) == (torch.float32, False, True), name
        assert torch.equal(loaded, expected), name
        assert torch.equal(datasets.load(str(tmp_path / name), dtype=torch.float64), expected.double()), name


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint32", "int64", "float16"])
def test_whole_numbers_become_floats_unscaled(tmp_path: Path, dtype: str) -> None:
    x = np.array([[0, 1], [100, 255]]).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    loaded = datasets.load(tmp_path / "x.npy")
    assert isinstance(loaded, Tensor)
    assert loaded.dtype == torch.float32
    assert (loaded.numpy() == x).all()


def test_pictures_keep_their_shape(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((5, 1, 8, 8), "uint8"))
    loaded = datasets.load(tmp_path / "x.npy")
    assert isinstance(loaded, Tensor)
    assert loaded.shape == (5, 1, 8, 8)


def test_context_comes_along(tmp_path: Path) -> None:
    x, context = torch.arange(6.0).reshape(3, 2), torch.arange(3).reshape(3, 1)
    np.savez(tmp_path / "a.npz", context=context.numpy(), x=x.numpy())
    torch.save({"context": context, "x": x}, tmp_path / "b.pt")
    torch.save((x, context), tmp_path / "c.pt")
    for name in ("a.npz", "b.pt", "c.pt"):
        first, second = datasets.load(tmp_path / name)
        assert torch.equal(first, x)
        assert torch.equal(second, context.float())


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("1,2\n3,4\n", {}),
        ("1,2\r\n\r\n3,4", {}),
        ('\ufeff"1", 2\n 3 ,"4"\n', {}),
        ("a,b\n1,2\n3,4\n", {"header": True}),
        ("0,1\n1,2\n3,4\n", {"header": True}),  # skipped because asked for, whatever it says
        ("1;2\n3;4\n", {"delimiter": ";"}),
        ("1e0,2.\n+3,4E0\n", {}),
    ],
)
def test_csv_dialects(tmp_path: Path, text: str, options: dict) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    loaded = datasets.load(path, **options)
    assert isinstance(loaded, Tensor)
    assert torch.equal(loaded, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n", {}, r"line 1 is a header \(a, b\), not numbers; pass header=True"),
        ("x,2\n1,2\n", {}, r"line 1, column 1 is 'x', not a number; .*header=True"),
        ("1,2\n3,x\n", {}, r"line 2, column 2 is 'x', not a number; drop the line or correct the cell$"),
        ("1,2\n\n3,1_0\n", {}, r"line 3, column 2 is '1_0'"),
        ("1,2\n3,\n", {}, r"line 2, column 2 is empty"),
        ("1,2\n,\n", {}, r"line 2, column 1 is empty"),
        ("1,2\n3,4,5\n", {}, r"line 2 has 3 cells, the lines above have 2"),
        ("a,b,c\n3,4\n", {"header": True}, r"line 2 has 2 cells, the lines above have 3"),
        (",a,b\n0,3,4\n", {"header": True}, r"without a name for column 1.*index=False"),
        ("1;2\n3;4\n", {}, r"separated by ';'; pass delimiter=';'"),
        ("1\t2\n3\t4\n", {}, r"separated by '\\t'; pass delimiter='\\t'"),
        ("1 2\n3 4\n", {}, r"separated by ' '"),
        ("1,2\n3,nan\n5,inf\n", {}, r"NaN or infinite entries in 2 of 3 rows, the first in row 1 \(counted from 0\)"),
        ("a,b\n", {"header": True}, r"x is empty, of shape \(0, 2\)"),
        ("\n\n", {}, "x is empty"),
        ("", {}, r"is empty \(0 bytes\)"),
    ],
)
def test_csv_errors_name_the_place(tmp_path: Path, text: str, options: dict, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        datasets.load(path, **options)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def save_npy(x: object, **options: object) -> Callable[[Path], None]:
    return lambda path: np.save(path, x, **options)


def save_pt(x: object) -> Callable[[Path], None]:
    return lambda path: torch.save(x, path)


def truncated(save: Callable[[Path], None], keep: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return write


def rewritten(save: Callable[[Path], None], old: bytes, new: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save(path)
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))

    return write


class Foreign:
    """A class of the user's, which a pickle would import."""


@pytest.mark.parametrize(
    ("name", "save", "error", "message"),
    [
        ("x.npy", save_npy(np.array([{}, None]), allow_pickle=True), TypeError, "Python objects.*pickle"),
        ("x.npz", lambda p: np.savez(p, x=np.array([[{}]])), TypeError, "Python objects.*pickle"),
        ("x.npy", lambda p: p.write_bytes(pickle.dumps([1])), ValueError, "is no NumPy file, it begins with"),
        ("x.npy", truncated(save_npy(np.ones((50, 4))), 0.7), ValueError, "damaged or cut short"),
        ("x.npy", truncated(save_npy(np.ones((50, 4))), 0.03), ValueError, "damaged or cut short"),
        ("x.npz", truncated(lambda p: np.savez(p, x=np.ones((50, 4))), 0.7), ValueError, "damaged or cut short"),
        ("x.npy", rewritten(save_npy(np.ones((5, 4))), b"{'descr'", b"('descr'"), ValueError, "damaged or cut short"),
        ("x.npz", lambda p: np.savez(p, a=np.ones((2, 2)), b=np.ones((2, 2))), ValueError, "holds 'a', 'b'.*context"),
        ("x.npz", lambda p: np.savez(p), ValueError, "holds no arrays"),
        ("x.npy", save_npy(np.ones((3, 2)) * 1j), TypeError, "complex"),
        ("x.npy", save_npy(np.array([["a", "b"]])), TypeError, "entries; save numbers"),
        ("x.npy", save_npy(np.zeros(3, dtype=[("a", float), ("b", int)])), TypeError, "columns a, b"),
        ("x.npy", save_npy(np.ones(7)), ValueError, r"one-dimensional, of shape \(7,\).*reshape\(-1, 1\)"),
        ("x.npy", save_npy(np.float64(1)), ValueError, "a single number"),
        ("x.npy", save_npy(np.ones((0, 4))), ValueError, r"empty, of shape \(0, 4\)"),
        ("x.npy", save_npy(np.array([[1.0], [np.nan], [np.inf]])), ValueError, "2 of 3 rows, the first in row 1 "),
        (
            "x.npy",
            save_npy(np.array([[1.0], [1e39]])),
            ValueError,
            "1e.39 in row 1 .*too large for.*dtype=torch.float64",
        ),
        ("x.npy", save_npy(np.array([[1], [2**24 + 1]])), ValueError, "16777217 in row 1 .*not exact in torch.float32"),
        ("x.npy", save_npy(np.array([[-(2**63)]])), ValueError, "not exact"),
        ("x.pt", save_pt(Foreign()), TypeError, "no file of plain tensors.*pickle can run code"),
        ("x.pt", save_pt({"x": np.ones((2, 2))}), TypeError, "no file of plain tensors|save it as a tensor"),
        ("x.pt", save_pt({"x": [[1.0]]}), TypeError, "x is a list; save it as a tensor"),
        ("x.pt", save_pt("text"), TypeError, "holds a str"),
        ("x.pt", save_pt([torch.ones(1, 1)] * 3), TypeError, "holds a list of 3"),
        ("x.pt", save_pt({"a": torch.ones(1, 1), "b": torch.ones(1, 1)}), ValueError, "holds 'a', 'b'"),
        ("x.pt", save_pt((torch.ones(3, 1), torch.ones(2, 1))), ValueError, "x has 3 rows and context 2"),
        ("x.pt", save_pt((torch.ones(3, 1), torch.ones(3))), ValueError, "context is one-dimensional"),
        ("x.pt", save_pt(torch.ones(3, 1).to_sparse()), TypeError, "torch.sparse_coo.*to_dense"),
        ("x.pt", truncated(save_pt(torch.ones(500, 4)), 0.7), ValueError, "damaged or cut short"),
        ("x.pt", lambda p: p.write_bytes(b"\x00garbage"), TypeError, "no file of plain tensors"),
        ("x.csv", lambda p: p.write_bytes(b"1,2\n\xff\xfe,3\n"), ValueError, "not UTF-8"),
        ("x.csv", lambda p: p.write_bytes(b'1,2\n"' + b"3" * 200_000 + b'",3\n'), ValueError, "not a table of cells"),
        ("x.parquet", lambda p: p.write_text("1"), ValueError, r"cannot read \.parquet.*\.npy, \.npz, \.csv, \.pt"),
        ("x", lambda p: p.write_text("1"), ValueError, "without a suffix"),
        ("x.npy", lambda p: p.touch(), ValueError, "empty"),
        ("x.npy", lambda p: p.mkdir(), ValueError, "is a folder"),
        ("x.npy", lambda p: None, FileNotFoundError, "no such file"),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, name: str, save: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    path = tmp_path / name
    save(path)
    with pytest.raises(error, match=message) as caught:
        datasets.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"for \.csv files"):
        datasets.load(tmp_path / "x.npy", header=True)
    with pytest.raises(TypeError, match=r"torch.float32 or torch.float64, got torch.int64"):
        datasets.load(tmp_path / "x.npy", dtype=torch.int64)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"x": torch.ones(2, 2), "trap": Trap()}, tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    for name in ("x.pt", "x.npy"):
        with pytest.raises(TypeError, match="run code"):
            datasets.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "sprung").exists()  # it was a trap
