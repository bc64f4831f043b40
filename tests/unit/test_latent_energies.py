"""Energies with latents: discrete ones summed out exactly, continuous ones by Fisher's identity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, config_enumerate
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyro_gen as pg
from pyro_gen.handlers import log_density
from pyro_gen.handlers.derivatives import laplacian, score
from pyro_gen.handlers.marginal import marginal_rows
from pyro_gen.objectives import FiniteDifferenceScoreMatching, ScoreMatching, SlicedScoreMatching
from pyro_gen.objectives.latent_scores import posterior_score, square_of_mean

SUM = {"enumerate": "parallel"}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        yield
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------------------------------- discrete latents
class Machine(nn.Module):
    """Gauss–Bernoulli restricted Boltzmann machine: hidden units as latents, or summed by hand."""

    def __init__(self, hidden: int = 6, by_hand: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, hidden))
        self.bias = nn.Parameter(torch.randn(hidden))
        self.loc = nn.Parameter(torch.randn(3))
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> None:
        if self.by_hand:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0).to_event(1).mask(False), obs=x)
                visible = -(x - self.loc).square().sum(-1) / 2
                pyro.factor("energy", visible + softplus(x @ self.weight + self.bias).sum(-1))
            return
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("x", dist.Normal(x.new_zeros(1, 3), 1.0).to_event(1).mask(False), obs=x.unsqueeze(1))
            pyro.factor("visible", -(x - self.loc).square().sum(-1, keepdim=True) / 2)
            with pyro.plate("units", self.bias.shape[0], dim=-1):
                h = pyro.sample("h", dist.Bernoulli(torch.full((), 0.5)), infer=SUM)
                pyro.factor("energy", h * (x @ self.weight + self.bias) + torch.full((), 2.0).log())


def machines(hidden: int = 6) -> tuple[Machine, Machine]:
    summed, closed = Machine(hidden), Machine(hidden, by_hand=True)
    closed.load_state_dict(summed.state_dict())
    return summed, closed


@pytest.mark.parametrize("objective", [ScoreMatching(), ScoreMatching("reverse"), SlicedScoreMatching(2)], ids=repr)
def test_enumerated_hidden_units_are_the_free_energy(objective: Any) -> None:
    summed, closed = machines()
    x = torch.randn(64, 3)
    found = []
    for model in (summed, closed):
        torch.manual_seed(1)
        loss = objective(model)(x)
        found.append((loss.detach(), torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-10)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_enumerated_hidden_units_by_differences() -> None:
    summed, closed = machines()
    x = torch.randn(16, 3)
    values = []
    for model in (summed, closed):
        torch.manual_seed(1)
        values.append(FiniteDifferenceScoreMatching(0.1)(model)(x, total=160).detach())
    torch.testing.assert_close(values[0], values[1], rtol=1e-8, atol=1e-8)


def test_marginal_density_and_its_derivatives() -> None:
    summed, closed = machines()
    for rows in (1, 5):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(marginal_rows(summed, x), log_density(closed, x))
        torch.testing.assert_close(score(summed, x), score(closed, x))
        torch.testing.assert_close(laplacian(summed, x), laplacian(closed, x))


def test_sixty_hidden_units_are_no_sum_over_their_states() -> None:
    summed, closed = machines(60)  # 2⁶⁰ states would not end
    x = torch.randn(8, 3)
    torch.testing.assert_close(ScoreMatching()(summed)(x), ScoreMatching()(closed)(x))


PROBABILITIES = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


@config_enumerate
def chain(x: Tensor) -> None:
    """Two latents a row, the second depending on the first."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
        j = pyro.sample("j", dist.Bernoulli(PROBABILITIES[k]))
        pyro.sample("x", dist.Normal((k + 3 * j).unsqueeze(-1), 1.0).to_event(1), obs=x)


def test_dependent_latents_are_a_mixture() -> None:
    x = torch.randn(7, 1)
    parts = [
        torch.log(p if j else 1 - p) - torch.tensor(3.0).log() + dist.Normal(k + 3.0 * j, 1.0).log_prob(x.squeeze(-1))
        for k, p in enumerate(PROBABILITIES)
        for j in (0, 1)
    ]
    torch.testing.assert_close(marginal_rows(chain, x), torch.stack(parts).logsumexp(0))


def test_one_run_with_a_known_structure_and_no_draws() -> None:
    before = torch.get_rng_state()
    x = torch.zeros(4, 1)
    torch.testing.assert_close(marginal_rows(chain, x, plate_nesting=1), marginal_rows(chain, x))
    assert torch.equal(before, torch.get_rng_state())


def test_scales_are_left_out_and_masks_are_not() -> None:
    def model(x: Tensor) -> None:
        index = torch.arange(len(x))
        with pyro.plate("data", 100, subsample=index), pyro.poutine.mask(mask=index > 0):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer=SUM)
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    x = torch.randn(4)
    expected = torch.stack([dist.Normal(k, 1.0).log_prob(x) for k in (0.0, 1.0)]).logsumexp(0) - torch.log(
        torch.tensor(2.0)
    )
    found = marginal_rows(model, x)
    torch.testing.assert_close(found[1:], expected[1:])
    assert float(found[0]) == pytest.approx(0.6931471805599453)  # two states of weight one


def test_latents_that_cannot_be_summed() -> None:
    def outside(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer=SUM)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def free(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer=SUM)
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'k'.*outside the plate"):
        marginal_rows(outside, torch.zeros(3))
    with pytest.raises(ValueError, match="'z' is left free"):
        marginal_rows(free, torch.zeros(3))


# -------------------------------------------------------------------------------------------------- continuous latents
class Factors(nn.Module):
    """x = W z + σε with z ~ N(0, I): p(x) = N(0, WWᵀ + σ²I)."""

    def __init__(self, noise: float = 0.7) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.noise = noise

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("likelihood", -(x - z @ self.weight.T).square().sum(-1) / (2 * self.noise**2))

    def precision(self) -> Tensor:
        return torch.linalg.inv(self.weight @ self.weight.T + self.noise**2 * torch.eye(3))

    def loss(self, x: Tensor) -> Tensor:
        """Score matching of the marginal, in closed form."""
        precision = self.precision()
        return -precision.trace() + 0.5 * (x @ precision).square().sum(-1).mean()


class Guide(nn.Module):
    """The exact posterior of `Factors`, its scale times ``widen``."""

    def __init__(self, model: Factors, widen: float = 1.0) -> None:
        super().__init__()
        with torch.no_grad():
            w = model.weight
            covariance = torch.linalg.inv(torch.eye(2) + w.T @ w / model.noise**2)
            self.encode = nn.Parameter((covariance @ w.T / model.noise**2).clone())
            self.root = nn.Parameter(widen * torch.linalg.cholesky(covariance))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ self.encode.T, scale_tril=self.root.tril()))


def mean_and_error(draw: Any, repeats: int) -> tuple[Tensor, Tensor]:
    values = torch.stack([draw() for _ in range(repeats)])
    return values.mean(0), values.std(0) / repeats**0.5


def test_fisher_identity_is_unbiased_for_the_exact_posterior() -> None:
    """At any K; the square of the plain mean is off by half its variance, and seen to be."""
    model = Factors()
    guide, x = Guide(model), torch.randn(200, 3)
    truth = float(model.loss(x).detach())
    for particles in (2, 10):
        module = ScoreMatching(particles=particles)(model, guide)
        mean, error = mean_and_error(lambda m=module: m(x).detach() / len(x), 60)
        assert abs(float(mean) - truth) < 4 * float(error)
    posterior = torch.linalg.inv(torch.eye(2) + model.weight.T @ model.weight / model.noise**2)
    spread = model.weight @ posterior @ model.weight.T / model.noise**4
    bias = 0.5 * float(spread.trace().detach()) / 10
    assert bias > 8 * float(error)  # what leaving the pairs k = l in would add, at K = 10


def test_fisher_identity_converges_from_a_wide_guide() -> None:
    """The bias of normalised weights is there at K = 4, and of order 1/K."""
    model = Factors()
    guide, x = Guide(model, 1.5), torch.randn(200, 3)
    truth = float(model.loss(x).detach())
    off, error = {}, {}
    for particles, repeats in ((4, 200), (64, 40), (1000, 6)):
        module = ScoreMatching(particles=particles)(model, guide)
        values = torch.stack([module.pointwise(x).detach() for _ in range(repeats)])
        off[particles] = abs(float(values.mean()) - truth)
        error[particles] = float(values.var(0).sum() / repeats) ** 0.5 / len(x)  # rows have draws of their own
    assert off[4] > 4 * error[4]
    assert off[64] + 4 * error[64] < off[4] - 4 * error[4]
    assert off[1000] < 4 * error[1000] + (off[64] + 4 * error[64]) * 64 / 1000
    assert off[4] * 4 / 1000 + 4 * error[1000] < off[4]  # what a bias that stays would be seen against


def extrapolated(draw: Any, particles: int, repeats: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of twice the estimate at 2K less that at K: without the bias of order 1/K."""
    (near, its_error), (far, error) = (mean_and_error(lambda k=k: draw(k), repeats) for k in (2 * particles, particles))
    return 2 * near - far, (4 * its_error**2 + error**2).sqrt()


def test_gradient_goes_through_the_weights() -> None:
    model = Factors()
    guide, x = Guide(model).requires_grad_(False), torch.randn(100, 3)
    (exact,) = torch.autograd.grad(model.loss(x), model.weight)

    def gradient(particles: int) -> Tensor:
        module = ScoreMatching(particles=particles)(model, guide)
        return torch.autograd.grad(module(x) / len(x), model.weight)[0]

    mean, error = extrapolated(gradient, 25, 100)
    assert bool(((mean - exact).abs() < 4 * error).all())
    assert bool((exact.abs() > 10 * error).any())


def test_the_guide_gets_the_gradient_of_its_bound() -> None:
    model, x = Factors(), torch.randn(20, 3)
    guide = Guide(model, 1.3)
    guide.encode.data += 0.2
    module, bound = ScoreMatching(particles=8)(model, guide), pg.ELBO(8, vectorize_particles=True)(model, guide)

    def gradient(loss: Any) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(x), [guide.encode, guide.root])])

    one, its_error = mean_and_error(lambda: gradient(module), 150)
    two, error = mean_and_error(lambda: gradient(bound), 150)
    assert bool(((one - two).abs() <= 4 * (its_error**2 + error**2).sqrt()).all())
    assert bool((two.abs() > 8 * error).any())


def test_svi_trains_model_and_guide() -> None:
    truth = Factors(0.5)
    with torch.no_grad():
        x = torch.randn(200, 2) @ truth.weight.T + 0.5 * torch.randn(200, 3)
    model = Factors(0.5)
    guide = Guide(model, 1.2)
    start = float(model.loss(x).detach())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), loss=ScoreMatching(particles=8))
    for _ in range(200):
        svi.step(x)
    best, found = float(truth.loss(x).detach()), float(model.loss(x).detach())
    assert found - best < 0.1 * (start - best)
    exact = Guide(model)
    apart = float((guide.encode - exact.encode).abs().max().detach())
    assert apart < 0.15  # it has followed the model


def test_posterior_score() -> None:
    model = Factors()
    x = torch.randn(10, 3)
    exact = -(x @ model.precision()).detach()
    guide = Guide(model)  # the posterior itself: no bias at any K
    mean, error = mean_and_error(lambda: posterior_score(model, guide, x, particles=4).detach(), 200)
    assert bool(((mean - exact).abs() < 4 * error).all())
    wide = Guide(model, 1.5)
    mean, error = extrapolated(lambda k: posterior_score(model, wide, x, particles=k).detach(), 50, 200)
    assert bool(((mean - exact).abs() < 4 * error).all())
    assert bool((exact.abs() > 8 * error).any())
    assert posterior_score(model, Guide(model), x, particles=2).requires_grad
    with pytest.raises(ValueError, match="particles"):
        posterior_score(model, Guide(model), x, particles=0)


def test_square_of_mean_leaves_out_equal_pairs() -> None:
    log_w, g = torch.randn(6, 4), torch.randn(6, 4, 3)
    w = log_w.softmax(0)
    pairs = torch.einsum("kn,ln,kni,lni->kln", w, w, g, g)
    weights = torch.einsum("kn,ln->kln", w, w)
    off = (1 - torch.eye(6)).unsqueeze(-1)
    expected = (pairs * off).sum((0, 1)) / (weights * off).sum((0, 1))
    torch.testing.assert_close(square_of_mean(log_w, g), expected)
    log_w[0] += 1e4  # all weight on one draw: pairs of it with the next
    found = square_of_mean(log_w.requires_grad_(), g)
    v = log_w[1:].softmax(0)
    torch.testing.assert_close(found, (g[0] * (v.unsqueeze(-1) * g[1:]).sum(0)).sum(-1))
    found.sum().backward()
    assert log_w.grad is not None
    assert bool(torch.isfinite(log_w.grad).all())


def test_discrete_and_continuous_latents_together() -> None:
    """A mixture of two factor analysers at ±3: z is drawn, k is summed."""
    loading = torch.tensor([1.0, 0.5])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer=SUM)
            loc = 6 * k.unsqueeze(-1) - 3 + z.unsqueeze(-1) * loading
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.5))

    x = torch.randn(30, 2)
    marginal = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + loading.outer(loading))

    def log_f(y: Tensor) -> Tensor:
        return torch.logaddexp(marginal.log_prob(y - 3), marginal.log_prob(y + 3))

    one = torch.func.vmap(torch.func.grad(log_f))(x)
    second = torch.func.vmap(torch.func.hessian(log_f))(x).diagonal(dim1=1, dim2=2).sum(1)
    truth = float((0.5 * one.square().sum(1) + second).mean())
    mean, error = extrapolated(lambda k: ScoreMatching(particles=k)(model, guide)(x).detach() / len(x), 100, 60)
    assert abs(float(mean) - truth) < 4 * float(error)
    assert abs(truth) > 8 * float(error)


def test_a_guide_has_to_fit() -> None:
    model, x = Factors(), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"'z'.*not in the guide"):
        ScoreMatching(particles=4)(model)(x)
    with pytest.raises(ValueError, match="particles=16"):
        ScoreMatching()(model, Guide(model))(x)
