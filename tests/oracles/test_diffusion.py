r"""The bound of a diffusion where everything is known: Gaussian data, whose noised versions and reverse steps are too.

For data N(m, S) level i is N(α m, α² S + σ² I), and E[u | y] is linear in y. With the exact reverse chain the guide is
the posterior, so every one-particle ELBO is log q(x) whatever was drawn (zero variance); with other variances or
another last level the bound has a closed form, term by term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen import handlers
from pyro_gen.distributions.chains import normal_kl, steps_of
from pyro_gen.distributions.noise import NoiseSchedule, TableSchedule, make_schedule
from pyro_gen.distributions.noising import DiffusionGuide
from pyro_gen.programs.diffusion import Diffusion

T = 10
FEATURES = 3
ORDERS = ["forward", "posterior"]


# ------------------------------------------------------------------------------------ T1 to T3: the exact reverse chain
class Gaussian:
    """The reference's Gaussian in three dimensions, its noised versions and its exact reverse chain."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            r = torch.randn(FEATURES, FEATURES, dtype=torch.float64)
            self.m = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
            self.s = r @ r.T / 3 + 0.5 * torch.eye(FEATURES, dtype=torch.float64)
            self.x = torch.distributions.MultivariateNormal(self.m, self.s).sample((5,))
        self.betas = torch.linspace(0.01, 0.5, T, dtype=torch.float64)
        signal = torch.cat([torch.ones(1, dtype=torch.float64), (1 - self.betas).cumprod(0)])
        self.alpha, self.sigma = signal.sqrt(), (1 - signal).sqrt()
        self.exact = float(torch.distributions.MultivariateNormal(self.m, self.s).log_prob(self.x).sum())

    def level(self, i: int) -> tuple[Tensor, Tensor]:
        eye = torch.eye(FEATURES, dtype=torch.float64)
        return self.alpha[i] * self.m, self.alpha[i] ** 2 * self.s + self.sigma[i] ** 2 * eye

    def reverse(self, i: int) -> tuple[Tensor, Tensor]:
        """K and C of p(y_{i-1} | y_i) = N(m' + K (y − m), C)."""
        (_, here), (_, below) = self.level(i), self.level(i - 1)
        kept = (1 - self.betas[i - 1]).sqrt()
        k = below * kept @ torch.linalg.inv(here)
        c = below - k @ below * kept
        return k, (c + c.T) / 2

    def model(self, last: str = "exact", small: bool = False, extra: float = 0.0) -> Callable[[Tensor], None]:
        """The reverse chain as a Pyro program, written without the package.

        Args:
            last: p(y_T), of the noised data or standard normal. small: variance v but for the last step.
            extra: added to each mean, for a chain that is wrong.
        """

        def run(x: Tensor) -> None:
            eye = torch.eye(FEATURES, dtype=torch.float64)
            steps = steps_of(self.alpha, self.sigma)
            with pyro.plate("data", len(x)):
                mean, cov = self.level(T) if last == "exact" else (0 * self.m, eye)
                y = pyro.sample(f"y_{T}", dist.MultivariateNormal(mean, cov))
                for i in range(T, 0, -1):
                    k, c = self.reverse(i)
                    mean = self.level(i - 1)[0] + (y - self.level(i)[0]) @ k.T + extra
                    if small and i > 1:
                        fn: Any = dist.Normal(mean, steps.variance[i - 1].sqrt()).to_event(1)
                    else:
                        fn = dist.MultivariateNormal(mean, c)
                    y = pyro.sample(f"y_{i - 1}" if i > 1 else "x", fn, obs=x if i == 1 else None)

        return run

    def guide(self, order: Any) -> DiffusionGuide:
        """The noising of the package, in double and without standardisation."""
        schedule = TableSchedule(self.betas)
        chain = Diffusion(FEATURES, nn.Identity(), schedule, T, form="sites", guide=order, standardise=False)
        assert torch.allclose(chain.double().model.steps().alpha, self.alpha[1:], rtol=1e-13, atol=0)
        return chain.guide


def draws(gaussian: Gaussian, model: Any, order: str, count: int, elbo: Any = None) -> Tensor:
    guide, loss = gaussian.guide(order), elbo or Trace_ELBO()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        return -torch.tensor([loss.loss(model, guide, gaussian.x) for _ in range(count)], dtype=torch.float64)


def draws_at_once(gaussian: Gaussian, model: Any, order: str, count: int) -> Tensor:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        return handlers.log_weight(model, gaussian.guide(order), gaussian.x, particles=count).sum(1)


@pytest.fixture(scope="module")
def gaussian() -> Gaussian:
    return Gaussian()


@pytest.mark.parametrize("order", ORDERS)
def test_exact_reverse_chain_has_a_bound_without_variance(gaussian: Gaussian, order: str) -> None:
    assert gaussian.exact == pytest.approx(-21.174571722669, abs=1e-11)
    found = draws(gaussian, gaussian.model(), order, 5)
    assert float((found - gaussian.exact).abs().max()) < 1e-10
    assert float((draws_at_once(gaussian, gaussian.model(), order, 20) - gaussian.exact).abs().max()) < 1e-10
    wrong = draws(gaussian, gaussian.model(extra=1e-6), order, 2)
    assert float((wrong - gaussian.exact).abs().max()) > 1e-8  # a mean that is off by 1e-6 is seen


def three_terms(gaussian: Gaussian) -> tuple[float, float]:
    """T2's bound, and T3's, in closed form."""
    x, eye = gaussian.x, torch.eye(FEATURES, dtype=torch.float64)
    mean, cov = gaussian.level(T)
    alpha, spread = gaussian.alpha[T], gaussian.sigma[T] ** 2
    at = alpha * x
    inverse = torch.linalg.inv(cov)

    def expected(gap: Tensor, precision: Tensor, q: Tensor) -> Tensor:
        """E of log N(y; ., precision) under a normal of covariance q whose mean is off by gap, but for 2 pi."""
        return -0.5 * ((gap @ precision * gap).sum(1) + torch.trace(precision @ q) - torch.logdet(precision))

    second = gaussian.exact + float(
        (expected(at, eye, spread * eye) - expected(at - mean, inverse, spread * eye)).sum()
    )
    steps = steps_of(gaussian.alpha, gaussian.sigma)
    third = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(at, spread * eye), torch.distributions.MultivariateNormal(0 * at, eye)
    ).sum()
    for i in range(T, 0, -1):
        k, c = gaussian.reverse(i)
        here = gaussian.level(i)[0]
        data, noisy, v = steps.data[i - 1], steps.noisy[i - 1], steps.variance[i - 1]
        # of the true step less the model's: a constant, and a matrix times y_i, whose mean and covariance are known
        matrix = noisy * eye - k
        centre = data * x + (gaussian.alpha[i] * x) @ matrix.T - gaussian.level(i - 1)[0] + here @ k.T
        moved = gaussian.sigma[i] ** 2 * matrix @ matrix.T
        if i > 1:
            third = third + 0.5 * (centre.square().sum() + len(x) * torch.trace(moved)) / v
        else:
            precision = torch.linalg.inv(c)
            third = third - (expected(centre, precision, moved) - FEATURES / 2 * math.log(2 * math.pi)).sum()
    return second, -float(third)


@pytest.mark.parametrize("order", ORDERS)
def test_standard_normal_end_costs_its_divergence(gaussian: Gaussian, order: str) -> None:
    closed = three_terms(gaussian)[0]
    assert closed == pytest.approx(-21.7644, abs=5e-5)
    found = draws_at_once(gaussian, gaussian.model(last="normal"), order, 4000)
    assert abs(float(found.mean()) - closed) < 4 * float(found.std()) / 4000**0.5
    assert abs(gaussian.exact - closed) > 10 * float(found.std()) / 4000**0.5  # the exact end would be seen


@pytest.mark.parametrize("order", [*ORDERS, "mean field"])
def test_small_variance_costs_what_it_costs(gaussian: Gaussian, order: str) -> None:
    closed = three_terms(gaussian)[1]
    assert closed == pytest.approx(-60.1916, abs=5e-5)
    model = gaussian.model(last="normal", small=True)
    if order == "mean field":
        elbo = TraceMeanField_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
        found = draws(gaussian, model, "posterior", 20, elbo)
    else:
        found = draws_at_once(gaussian, model, order, 4000)
    assert abs(float(found.mean()) - closed) < 4 * float(found.std()) / len(found) ** 0.5


# ---------------------------------------------------------------------------------- T4: the price of a reverse variance
MEAN, POWER, ENTROPY = 0.5, 0.25, 0.7257913526
TABLE = {
    ("linear", 100): (1.97593, 0.73675, 0.72579, 5.1e-6),
    ("linear", 1000): (1.18214, 0.72689, 0.72580, 1.0e-5),
    ("cosine", 20): (1.52826, 0.75537, 0.72579, 1.5e-6),
    ("cosine", 1000): (1.12802, 0.72640, 0.72579, 6.1e-10),
}


class Exact(nn.Module):
    """The best network for data N(MEAN, POWER) in each feature: what it predicts is linear in y."""

    def __init__(self, schedule: NoiseSchedule, prediction: str = "epsilon") -> None:
        super().__init__()
        self.schedule, self.prediction = schedule, prediction

    def forward(self, y: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        alpha, sigma = (part.unsqueeze(1) for part in (self.schedule.alpha(t), self.schedule.sigma(t)))
        noise = sigma * (y - alpha * MEAN) / (alpha.square() * POWER + sigma.square())
        return noise if self.prediction == "epsilon" else (y - sigma * noise) / alpha


def exact_diffusion(schedule: str, timesteps: int | None, features: int = 1, **options: Any) -> Diffusion:
    levels = make_schedule(schedule)  # type: ignore[arg-type]
    net = Exact(levels, options.get("prediction", "epsilon"))
    return Diffusion(features, net, levels, timesteps, standardise=False, **options).double()


def best_ratio(diffusion: Diffusion) -> Tensor:
    """The error of the exact network, in units of that for standard normal data."""
    ladder = diffusion.model.ladder()
    alpha, sigma = ladder.alpha.square(), ladder.sigma.square()
    return (POWER * (alpha + sigma) / (alpha * POWER + sigma)).unsqueeze(1)


def expected_cost(diffusion: Diffusion, wrong: bool = False) -> tuple[float, float]:
    """-VLB for Gaussian data from the package's own tables, with the mean squares put in for the squares; and L_T."""
    model, table = diffusion.model, diffusion.model.steps()
    error = POWER * table.sigma.square() / (table.alpha.square() * POWER + table.sigma.square())
    used = model.error(table, model.ratio)[:, 0]
    steps = normal_kl(error, used, table.weight, table.variance, table.precision)
    size = torch.tensor([[(MEAN**2 + POWER) ** 0.5]], dtype=torch.float64)
    last = float(model.prior_loss(size, table))
    total = float(steps[1:].sum()) if wrong else float(steps.sum())
    return total + float(model.reconstruction(table)) + last, last


@pytest.mark.parametrize("row", TABLE)
def test_table_of_reverse_variances(row: tuple[str, int]) -> None:
    small, large, optimal, last = TABLE[row]
    for variance, wanted in (("small", small), ("large", large), ("optimal", optimal)):
        diffusion = exact_diffusion(*row, variance=variance)
        if variance == "optimal":
            diffusion.model.ratio.copy_(best_ratio(diffusion))
        cost, end = expected_cost(diffusion)
        assert cost == pytest.approx(wanted, abs=5.1e-6)
        assert end == pytest.approx(last, rel=0.06)
        if variance == "optimal":  # the gap is the KL of the last level, which is below L_T
            assert 0 < cost - ENTROPY < last
        if variance == "small":  # a chain that leaves out its last step, p(x | y_1), is another
            assert abs(expected_cost(diffusion, wrong=True)[0] - wanted) > 2e-5


def test_unconverted_tables_would_be_seen() -> None:
    """Tables that went through single precision miss the closed form by more than those made in double."""
    diffusion = exact_diffusion("linear", 1000)
    diffusion.model.ratio.copy_(best_ratio(diffusion))
    right = expected_cost(diffusion)[0]
    table = diffusion.model.table
    alpha, sigma = diffusion.model.steps()[:2]
    assert float((alpha.square() + sigma.square() - 1).abs().max()) < 1e-14
    diffusion.model.table = table.float().double()
    assert 1e-9 < abs(expected_cost(diffusion)[0] - right) < 1e-2


def gaussian_rows(rows: int, features: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, unbiased=False)  # so that the rows' own mean and variance are those of the table
    return MEAN + POWER**0.5 * x


@pytest.mark.parametrize("variance", ["small", "large", "optimal"])
def test_bound_of_rows_is_that_of_the_table(variance: Any) -> None:
    diffusion = exact_diffusion("cosine", 20, variance=variance)
    x = gaussian_rows(2000)
    if variance == "optimal":
        diffusion.model.ratio.copy_(best_ratio(diffusion))
    wanted = dict(zip(("small", "large", "optimal"), TABLE["cosine", 20], strict=False))[variance]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        found = torch.stack([diffusion.lower_bound(x).mean() for _ in range(30)])
        # the same from traces: another program, one step a row
        traced = torch.stack([-pg.ELBO()(diffusion)(x) / len(x) for _ in range(50)])
    for values in (found, traced):
        error = 4 * float(values.std()) / len(values) ** 0.5
        assert abs(float(values.mean()) + wanted) < error + 5e-6


def test_each_step_counts_as_many_times_as_there_are() -> None:
    """The factor, meant over its steps, is the sum over them: to rounding, at the same noise."""
    diffusion = exact_diffusion("cosine", 20)
    model, table = diffusion.model, diffusion.model.steps()
    u, generator = gaussian_rows(7), torch.Generator().manual_seed(0)
    noise = torch.randn(u.shape, generator=generator, dtype=u.dtype)
    steps = [type(table)(*(column[i] for column in table)) for i in range(20)]
    total = torch.stack([model.step_loss(u, noise, s, r, None) for s, r in zip(steps, model.ratio, strict=True)]).sum(0)
    times = [torch.full((7,), (i + 0.5) / 20, dtype=u.dtype) for i in range(20)]
    drawn = torch.stack([model.drawn_loss(u, t, noise, table, None) for t in times])
    assert torch.allclose(drawn.mean(0), total, rtol=1e-12, atol=0)
    assert not torch.allclose(drawn.mean(0) * 19 / 20, total, rtol=1e-3, atol=0)  # n_t = T − 1
    assert not torch.allclose(drawn[1:].mean(0), total, rtol=1e-3, atol=0)  # t from 2 to T


def test_conclude_finds_the_error_of_the_network() -> None:
    diffusion = exact_diffusion("cosine", 20)
    x = gaussian_rows(2000)
    diffusion.conclude(x)
    # the squares of normal errors: a mean of n has relative standard error (2 / n)^½, n is 1000 at least here
    apart = diffusion.model.ratio / best_ratio(diffusion) - 1
    assert float(apart.abs().max()) < 5 * (2 / 1000) ** 0.5
    assert expected_cost(diffusion)[0] < 0.7268


# ---------------------------------------------------------------------------------------------------------- T5 and T6
def test_floor_of_the_noise_error() -> None:
    """E (ε − E[ε | y])² = α² POWER / (α² POWER + σ²): the network's error in ε, from what u − û is."""
    diffusion = exact_diffusion("linear", 100, features=2)
    table = diffusion.model.steps()
    alpha, sigma = table.alpha.square(), table.sigma.square()
    floor = alpha * POWER / (alpha * POWER + sigma)
    x, index = gaussian_rows(2000, 2), torch.tensor([0, 10, 50, 99])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for i in index.tolist():
            step = type(table)(*(column[i] for column in table))
            squares = diffusion.model.misses(x, torch.randn_like(x), step, None)[0] * alpha[i] / sigma[i]
            error = 4 * float(squares.std()) / squares.numel() ** 0.5
            assert abs(float(squares.mean() - floor[i])) < error
            assert abs(float(squares.mean() - 2 * floor[i])) > error


def test_continuous_bound_does_not_depend_on_the_way() -> None:
    r"""½ ∫ SNR V d(-λ) = ½ log[(1 + s² SNR_max) / (1 + s² SNR_min)] between ends that both schedules share."""
    x, rows, found = gaussian_rows(200), gaussian_rows(5000), {}
    for schedule in ("cosine", "linear"):
        diffusion = exact_diffusion(schedule, None, prediction="epsilon")
        model = diffusion.model
        ends = torch.tensor(model.ends, dtype=torch.float64)
        high, low = model.schedule.log_snr(ends).exp().tolist()
        closed = 0.5 * math.log((1 + POWER * high) / (1 + POWER * low))
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            part = torch.stack([diffusion.terms(x)[:, 1:-1].sum(1).mean() for _ in range(20)])
            model.ratio.copy_(best_ratio(diffusion))
            drawn = torch.stack([-pg.ELBO()(diffusion)(rows) / len(rows) for _ in range(40)])
            bound = torch.stack([diffusion.lower_bound(x).mean() for _ in range(20)])
        assert abs(float(part.mean()) - closed) < 4 * float(part.std()) / 20**0.5
        assert abs(float(part.mean()) * 2 - closed) > 1
        for values in (drawn, bound):  # the whole: of normal data nothing is lost but the last level
            assert abs(float(values.mean()) + ENTROPY) < 4 * float(values.std()) / len(values) ** 0.5 + 1e-5
        found[schedule] = part - closed  # the ends of the two differ a little
    apart = found["cosine"].mean() - found["linear"].mean()
    assert abs(float(apart)) < 4 * float(torch.hypot(found["cosine"].std(), found["linear"].std())) / 20**0.5


# ---------------------------------------------------------------------------------- bound ≤ importance weighted ≤ exact
def linear_chain(timesteps: int = 8) -> tuple[Diffusion, Callable[[Tensor], Tensor]]:
    """A chain with a linear network that is not the best one, and log p of it, by recursion over its normals."""
    net = Exact(make_schedule("cosine"))
    diffusion = Diffusion(2, net, "cosine", timesteps, form="sites", standardise=False, variance="large").double()
    diffusion.model.location.copy_(torch.tensor([0.1, -0.2]))
    diffusion.model.scale.copy_(torch.tensor([1.5, 0.7]))
    table = diffusion.model.steps()
    mean, power = torch.zeros(2, dtype=torch.float64), diffusion.model.prior_scale(table).square().expand(2)
    zero, one = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    for i in range(timesteps - 1, -1, -1):
        step = type(table)(*(column[i] for column in table))
        at_zero, spread = diffusion.model.reverse(zero, step, diffusion.model.ratio[i], None)
        slope = diffusion.model.reverse(one, step, diffusion.model.ratio[i], None)[0] - at_zero
        mean, power = (slope * mean + at_zero)[0], (slope.square() * power + spread.square())[0]
    location, scale = diffusion.location, diffusion.scale
    normal = dist.Normal(location + scale * mean, scale * power.sqrt()).to_event(1)
    return diffusion, normal.log_prob


def test_bounds_in_their_order() -> None:
    diffusion, log_p = linear_chain()
    x = gaussian_rows(5, 2)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        plain = torch.stack([diffusion.lower_bound(x, particles=20).sum() for _ in range(100)])
        traced = torch.stack([-pg.ELBO()(diffusion)(x) for _ in range(50)])
        closed = torch.stack([-pg.ELBO(analytic_kl=True)(diffusion)(x) for _ in range(50)])
        weights = handlers.log_weight(diffusion.model, diffusion.guide, x, particles=100 * 64)
        few, many = ((weights[: 100 * k].reshape(100, k, -1).logsumexp(1) - math.log(k)).sum(1) for k in (8, 64))
        iwae = torch.stack([-pg.IWAE(64, vectorize_particles=True)(diffusion)(x) for _ in range(20)])
    exact = float(log_p(x).sum())

    def mean(values: Tensor) -> tuple[float, float]:
        return float(values.mean()), float(values.std()) / len(values) ** 0.5

    order = [mean(plain), mean(few), mean(many)]
    for (low, a), (high, b) in pairwise(order):
        assert low < high + 4 * math.hypot(a, b)
    assert order[0][0] + 4 * math.hypot(order[0][1], order[2][1]) < order[2][0]  # and here by more than noise
    assert order[-1][0] < exact + 4 * order[-1][1]
    for values, place in ((traced, 0), (closed, 0), (iwae, 2)):
        assert abs(mean(values)[0] - order[place][0]) < 4 * math.hypot(mean(values)[1], order[place][1])


def test_importance_weights_of_paths_find_the_evidence() -> None:
    diffusion, log_p = linear_chain(4)
    x = gaussian_rows(5, 2)
    found = pg.log_evidence(diffusion, x, method=pg.ImportanceSampling(20_000, seed=0))
    assert found.effective_sample_size is not None
    assert found.standard_error is not None
    assert float(found.effective_sample_size.min()) > 100
    assert bool(((found.value - log_p(x)).abs() < 4 * found.standard_error + 1e-3).all())


def test_elbo_is_the_same_as_that_of_pyro() -> None:
    diffusion, _ = linear_chain()
    x = gaussian_rows(5, 2)
    for ours, theirs in ((pg.ELBO(), Trace_ELBO()), (pg.ELBO(analytic_kl=True), TraceMeanField_ELBO())):
        values = []
        for loss in (ours, theirs):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                values.append(loss.loss(diffusion.model, diffusion.guide, x))
        assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_sites_and_factor_agree() -> None:
    """The collapsed form of the same chain, in expectation."""
    chain, _ = linear_chain()
    x = gaussian_rows(200, 2)
    factor = Diffusion(2, chain.model.net, "cosine", 8, standardise=False, variance="large").double()
    factor.load_state_dict(chain.state_dict())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        one = torch.stack([pg.ELBO()(factor)(x) for _ in range(100)])
        two = torch.stack([pg.ELBO()(chain)(x) for _ in range(50)])
    error = 4 * math.hypot(float(one.std()) / 10, float(two.std()) / 50**0.5)
    assert abs(float(one.mean() - two.mean())) < error
