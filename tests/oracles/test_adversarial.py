"""Adversarial games against closed forms: optimal logits, divergences, equilibria, stability, what training finds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen.diagnostics import mode_coverage
from pyro_gen.objectives.adversarial import Adversarial
from pyro_gen.objectives.adversarial_bayes import AdversarialELBO
from pyro_gen.objectives.divergences import GAMES, Game, game
from pyro_gen.programs.gan import GAN

AUXILIARY: Any = {"is_auxiliary": True}
P, Q = dist.Normal(0.5, 0.8), dist.Normal(torch.tensor(0.0).double(), 1.0)
GRID = torch.linspace(-12, 12, 4001, dtype=torch.float64)  # the trapezoid rule on it is exact to rounding
IN_P, IN_Q = (d.log_prob(GRID).exp() * (GRID[1] - GRID[0]) for d in (P, Q))
TRUE = P.log_prob(GRID) - Q.log_prob(GRID)
PAIRS = GRID[::40], 40 * IN_P[::40], 40 * IN_Q[::40]


def expected_critic_loss(play: Game, logit: Callable[[Tensor], Tensor]) -> Tensor:
    """The critic's loss in the mean over both normals, by quadrature."""
    if play.paired:
        x, p, q = PAIRS
        return (p.unsqueeze(1) * q * play.critic(logit(x).unsqueeze(1), logit(x))).sum()
    at = logit(GRID)
    return (IN_P * play.critic_real(at)).sum() + (IN_Q * play.critic_fake(at)).sum()


def best_logit(play: Game) -> Tensor:
    """The logit of least expected loss; quadratic in x, but for least squares, where σ of a quadratic holds it."""
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    shares = play is GAMES["least_squares"]

    def logit(x: Tensor) -> Tensor:
        value = weights[0] + weights[1] * x + weights[2] * x.square()
        return torch.sigmoid(value) if shares else value

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_critic_loss(play, logit)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logit(GRID).detach()


def ratio_error(play: Game) -> float:
    """How far log p/q, as the game says it, is from the true one where data are."""
    assert play.log_ratio is not None
    error = (play.log_ratio(best_logit(play)) - TRUE)[(GRID > -2.5) & (GRID < 2.5)]
    return float((error - error.mean() if play.paired else error).abs().max())


@pytest.mark.parametrize("name", [name for name, play in GAMES.items() if play.log_ratio is not None])
def test_the_best_logit_is_the_log_density_ratio(name: str) -> None:
    assert ratio_error(game(name)) < 1e-3  # type: ignore[arg-type]


def test_a_wrong_ratio_is_seen() -> None:
    right = game("kl")
    assert ratio_error(right._replace(critic_fake=lambda v: torch.exp(v) / 2)) > 0.5  # a conjugate off by a factor
    assert ratio_error(right._replace(log_ratio=lambda v: -v)) > 0.5
    assert ratio_error(game("least_squares")._replace(log_ratio=lambda v: v)) > 0.5


def kl(one: dist.Normal, two: dist.Normal) -> float:
    return float(torch.distributions.kl_divergence(one, two))


def closed_divergences() -> dict[str, float]:
    # E_q[(p/q)²] of N(m, s²) and N(0, 1): a Gaussian integral
    m, s = 0.5, 0.8
    second = math.exp(m * m / (2 - s * s)) / (s * math.sqrt(2 - s * s))
    mixture = (IN_P + IN_Q) / 2  # no closed form, but a number
    js = float((IN_P * (IN_P / mixture).log())[IN_P > 0].sum() + (IN_Q * (IN_Q / mixture).log())[IN_Q > 0].sum()) / 2
    return {"kl": kl(P, Q), "reverse_kl": kl(Q, P), "chi2": second - 1, "jensen_shannon": js}


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "chi2", "jensen_shannon"])
def test_the_critics_loss_is_minus_the_divergence(name: Any) -> None:
    play, exact = game(name), closed_divergences()
    bound = -float(expected_critic_loss(play, lambda x: P.log_prob(x) - Q.log_prob(x)))
    assert bound == pytest.approx(exact[name], rel=1e-6)
    for change in (lambda v: v + 0.2, lambda v: 0.9 * v, lambda v: 0 * v):
        assert -float(expected_critic_loss(play, lambda x, c=change: c(P.log_prob(x) - Q.log_prob(x)))) < bound
    others = [value for other, value in exact.items() if other != name]
    assert all(abs(bound - value) > 1e-2 for value in others)  # each is told from the other divergences


def test_values_at_the_equilibrium() -> None:
    """Where data and model agree, at the best logit: log-ratio 0, or ½ under least squares."""
    zero = torch.zeros(1, dtype=torch.float64)
    log2 = math.log(2)
    expected = {
        "non_saturating": (2 * log2, log2),
        "minimax": (2 * log2, -log2),
        "least_squares": (0.25, 0.125),
        "hinge": (2.0, 0.0),
        "wasserstein": (0.0, 0.0),
        "relativistic": (log2, log2),
        "kl": (0.0, -1.0),
        "reverse_kl": (0.0, 1.0),
        "jensen_shannon": (0.0, 0.0),
        "chi2": (0.0, 0.0),
    }
    assert set(expected) == set(GAMES)
    for name, (critic, generator) in expected.items():
        play, at = GAMES[name], zero + (0.5 if name == "least_squares" else 0.0)
        assert float(play.critic(at, at)) == pytest.approx(critic, abs=1e-12), name
        assert float(play.generator(at, at)) == pytest.approx(generator, abs=1e-12), name
    assert float(GAMES["minimax"].generator(zero, zero, joint=True)) == pytest.approx(-math.log(4))
    for name in ("kl", "reverse_kl", "jensen_shannon", "chi2"):  # both halves are the divergence itself: 0
        assert float(GAMES[name].generator(zero, zero, joint=True)) == pytest.approx(0, abs=1e-12)


# ----------------------------------------------------------------------------------------------- games on rows of data
class Fixed(nn.Module):
    """Draws of N(0, I), of which nothing is learnt."""

    anchor: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(self.anchor, torch.ones_like(self.anchor)).to_event(1))


class Quadratic(nn.Module):
    """ℓ(x) = c + w · x + xᵀ A x: the log-ratio of any two Gaussians is one of them."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        self.square = nn.Parameter(torch.zeros(features, features))
        nn.init.zeros_(self.linear.weight)

    def forward(self, *parts: Tensor) -> Tensor:
        x = torch.cat(parts, -1)
        return self.linear(x).squeeze(-1) + torch.einsum("ni,ij,nj->n", x, self.square, x)


def play_critic(module: Any, x: Tensor, rounds: int = 40) -> None:
    """The critic's best answer to draws of one seed, by LBFGS."""
    module.prepare(x)
    optimizer = torch.optim.LBFGS(module.guide.parameters(), max_iter=rounds, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        torch.manual_seed(1)
        loss = module.losses(x)[1] / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)


def test_a_quadratic_critic_finds_the_log_ratio_of_two_gaussians() -> None:
    """With N rows its error is about √(k / N) of k weights, here √(3 · 4 / 4·10⁵) = .005 in the root mean square."""
    torch.manual_seed(0)
    x = 0.5 + 0.8 * torch.randn(400_000, 1, dtype=torch.float64)
    module = Adversarial()(Fixed(1), Quadratic(1).double())
    play_critic(module, x)
    at = GRID[(GRID.abs() < 2.5)].unsqueeze(-1)
    error = module.log_ratio(at) - TRUE[GRID.abs() < 2.5]
    assert float((error.square() * IN_Q[GRID.abs() < 2.5]).sum().sqrt()) < 1e-2


def test_a_wasserstein_critic_measures_the_distance_of_two_means() -> None:
    r"""W₁ of N(μ, I) and N(0, I) is |μ|. A linear critic under γ/2 (s − 1)² has slope s = 1 + |μ| / γ."""
    torch.manual_seed(0)
    mean = torch.tensor([1.5, -2.0], dtype=torch.float64)  # of norm 2.5
    x = torch.randn(20_000, 2, dtype=torch.float64) + mean
    for gamma in (20.0, 200.0):
        module = Adversarial("wasserstein", gradient_penalty=gamma)(Fixed(2), Quadratic(2).double())
        module.guide.square.requires_grad_(False)
        with torch.no_grad():
            module.guide.linear.weight.fill_(0.1)
        play_critic(module, x)
        slope = float(module.guide.linear.weight.detach().norm())
        assert slope == pytest.approx(1 + 2.5 / gamma, rel=4 * math.sqrt(2 / 20_000))
    torch.manual_seed(2)
    y = torch.randn(20_000, 2, dtype=torch.float64)
    with torch.no_grad():
        distance = float((module.guide(x) - module.guide(y)).mean())
    assert distance == pytest.approx(2.5, rel=0.05)


class Point(nn.Module):
    """The generator of the Dirac-GAN: all mass at θ."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        return self.place + 0 * z


def abscissa(objective: Adversarial) -> tuple[float, Tensor]:
    """Largest real part, and all eigenvalues, of the players' joint gradient descent at the equilibrium θ = ψ = 0.

    Each player's gradient is that of its own loss; the field they make is linearised by central differences, which err
    by O(h²), here 1e-8. (A derivative of the losses would see what they hold still, and not the field.)
    """
    module = objective(Point(), nn.Linear(1, 1, bias=False).double())
    x = torch.zeros(4, 1, dtype=torch.float64)
    module.prepare(x)
    own = [next(player.parameters()) for player in module.players]

    def field(place: Tensor) -> Tensor:
        for parameter, value in zip(own, place, strict=True):
            parameter.data.fill_(float(value))
        slopes = [torch.autograd.grad(loss / 4, p)[0] for loss, p in zip(module.losses(x), own, strict=True)]
        return -torch.stack([slope.flatten()[0] for slope in slopes])

    steps = 1e-4 * torch.eye(2, dtype=torch.float64)
    values = torch.linalg.eigvals(torch.stack([(field(h) - field(-h)) / 2e-4 for h in steps], 1))
    return float(values.real.max()), values


@pytest.mark.parametrize("loss", ["minimax", "non_saturating"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 3.0])
def test_the_dirac_gan_circles_without_a_penalty_and_settles_with_one(loss: Any, gamma: float) -> None:
    """Mescheder et al. 2018, section 2 and theorem 4.1: −γ/2 ± √(γ²/4 − f'(0)²), f'(0) = ½."""
    found, values = abscissa(Adversarial(loss, r1=gamma))
    root = torch.sqrt(torch.tensor(gamma**2 / 4 - 1 / 4, dtype=torch.complex128))
    expected = torch.stack([-gamma / 2 + root, -gamma / 2 - root])
    assert torch.allclose(torch.sort(values.imag).values, torch.sort(expected.imag).values, atol=1e-7)
    assert torch.allclose(torch.sort(values.real).values, torch.sort(expected.real).values, atol=1e-7)
    assert (found < -1e-3) == (gamma > 0)  # without: never converges
    if gamma:  # a penalty of another weight would not pass
        assert found != pytest.approx(abscissa(Adversarial(loss, r1=2 * gamma))[0], abs=1e-3)


def fitted(module: Any, x: Tensor, **options: Any) -> None:
    """A fit whose optimizer has no memory of the gradient, which is what circling players need."""
    adam = functools.partial(torch.optim.Adam, betas=(0.0, 0.99))
    pg.fit(module, x, optimizer=adam, seed=0, progress=False, compile=False, **options)


def gaussian_kl(b: Tensor, w: Tensor, x: Tensor) -> float:
    """KL of N(b, W Wᵀ) from the normal of the rows' mean and covariance."""
    one, two = ((b, w @ w.T), (x.mean(0), torch.cov(x.T)))
    normal = torch.distributions.MultivariateNormal
    return float(torch.distributions.kl_divergence(normal(*one), normal(*two)))


@pytest.mark.slow
def test_a_linear_generator_with_a_quadratic_critic_finds_a_gaussian() -> None:
    torch.manual_seed(0)
    root = torch.randn(3, 3) / math.sqrt(3) + 0.5 * torch.eye(3)
    x = torch.randn(10_000, 3) @ root.T + torch.tensor([1.0, -0.5, 2.0])
    generator = nn.Linear(3, 3)
    gan = GAN(3, latent_dim=3, generator=generator, critic=Quadratic(3))
    start = gaussian_kl(generator.bias.detach(), generator.weight.detach(), x)
    fitted(Adversarial(r1=1.0, r2=1.0)(gan), x, steps=1500, batch_size=512, lr=5e-3, schedule="cosine")
    found = gaussian_kl(generator.bias.detach(), generator.weight.detach(), x)
    assert found < 0.02
    assert start > 0.5  # what it started from is rejected


class NoisyCopy(nn.Module):
    """x = z + ¾ e: the posterior of z is N(.64 x, .36)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        normal = dist.Normal(torch.zeros_like(self.weight), torch.ones_like(self.weight)).to_event(1)
        with pyro.plate("data", len(x)):
            z, noise = pyro.sample("z", normal), pyro.sample("noise", normal)
        return self.weight * z + 0.75 * noise


class Judge(nn.Module):
    """A guide that draws z by its encoder, and judges it beside x."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, 2)
        self.critic = Quadratic(2)

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
        return self.critic(x, z)


@pytest.mark.slow
def test_an_encoder_finds_the_posterior_of_the_generator() -> None:
    """Of joint densities that agree, conditionals do: the encoder's mean is .64 x, its standard deviation .6."""
    torch.manual_seed(0)
    model, guide = NoisyCopy(), Judge()
    x = 1.25 * torch.randn(8000, 1)
    module = Adversarial(r1=0.3, r2=0.3)(model, guide)
    fitted(module, x, steps=1200, batch_size=512, lr=1e-2, schedule="cosine")
    assert float(model.weight.detach()) == pytest.approx(1, abs=0.1)
    weight, bias = guide.encoder.weight.detach(), guide.encoder.bias.detach()
    assert float(weight[0]) == pytest.approx(0.64, abs=0.064)
    assert float(bias[1].exp()) == pytest.approx(0.6, rel=0.1)
    assert abs(float(bias[0])) < 0.064


# ------------------------------------------------------------------------------------------------------- lost modes --
MODES = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)])


def ring(loss: Any, **penalties: float) -> pg.diagnostics.ModeCoverage:
    """Eight modes of standard deviation .05 on a circle, learnt from rows alone; the same settings for any loss.

    The critic takes ten steps for each of the generator, so that it is near its best answer: theory is about that game.
    """
    generator = torch.Generator().manual_seed(0)
    x = MODES[torch.randint(8, (5000,), generator=generator)] + 0.05 * torch.randn(5000, 2, generator=generator)
    torch.manual_seed(0)
    gan = GAN(2, latent_dim=4, hidden=(64, 64))
    fitted(Adversarial(loss, critic_steps=10, **penalties)(gan), x, steps=2000, batch_size=128, lr=3e-3)  # type: ignore[arg-type]
    return mode_coverage(gan.sample(2500, seed=1), MODES, 0.05)


def covers(found: pg.diagnostics.ModeCoverage) -> bool:
    """At least seven of eight modes, and served evenly: one mode lost altogether is a reverse KL of log 8/7 = .13."""
    return found.hit >= 7 and found.reverse_kl < 0.05


@pytest.mark.slow
def test_a_penalised_game_keeps_the_modes() -> None:
    assert covers(ring("relativistic", r1=0.1, r2=0.1))


@pytest.mark.slow
def test_plain_minimax_does_not() -> None:
    assert not covers(ring("minimax"))


# ------------------------------------------------------------------------------------ posteriors by density ratios --
class Copies(nn.Module):
    """z ~ N(0, 1), x ~ N(z, ½²) row by row: the posterior is N(.8 x, .2)."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


class OneMean(nn.Module):
    """A mean of all rows: N(0, I) before, N(Σ x / (N + 1), 1 / (N + 1)) after."""

    def forward(self, x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


class OfNoise(nn.Module):
    """A guide without a density: a network of noise (and of the row)."""

    def __init__(self, features: int, latents: int, noise: int, site: str) -> None:
        super().__init__()
        self.noise, self.site, self.local = noise, site, bool(features)
        self.net = nn.Sequential(nn.Linear(features + noise, 32), nn.SiLU(), nn.Linear(32, latents))

    def forward(self, x: Tensor) -> None:
        if self.local:
            with pyro.plate("data", len(x)):
                self.draw(x)
        else:
            self.draw(x)

    def draw(self, x: Tensor) -> None:
        noise = pyro.sample("noise", dist.Normal(x.new_zeros(self.noise), 1.0).to_event(1), infer=AUXILIARY)
        given = torch.cat([x.expand(*noise.shape[:-1], x.shape[-1]), noise], -1) if self.local else noise
        pyro.sample(self.site, dist.Delta(self.net(given), event_dim=1))


@pytest.mark.slow
def test_an_implicit_guide_finds_conjugate_posteriors_row_by_row() -> None:
    torch.manual_seed(0)
    x = math.sqrt(1.25) * torch.randn(2000, 1)
    guide = OfNoise(1, 1, 2, "z")
    module = AdversarialELBO()(Copies(), guide)
    fitted(module, x, steps=1200, batch_size=256, lr=5e-3, schedule="cosine")
    at = torch.linspace(-1.5, 1.5, 5)
    torch.manual_seed(1)
    with torch.no_grad():
        trace = pyro.poutine.trace(guide).get_trace(at.repeat_interleave(4000).unsqueeze(-1))
    z = trace.nodes["z"]["value"].reshape(5, 4000)
    deviation = math.sqrt(0.2)
    assert float((z.mean(1) - 0.8 * at).abs().max()) < 0.1 * deviation + 4 * deviation / math.sqrt(4000)
    assert torch.allclose(z.std(1), torch.tensor(deviation), rtol=0.1)
    assert not torch.allclose(z.std(1), torch.tensor(1.0), rtol=0.1)  # the prior's would not pass


@pytest.mark.slow
def test_an_implicit_guide_finds_the_posterior_of_what_all_rows_share() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 2) + torch.tensor([1.0, -0.5])
    guide = OfNoise(0, 2, 4, "mean")
    module = AdversarialELBO(num_particles=256)(OneMean(), guide)
    fitted(module, x, steps=1500, lr=3e-3, schedule="cosine")
    torch.manual_seed(1)
    with torch.no_grad():
        draws = torch.stack([pyro.poutine.trace(guide).get_trace(x).nodes["mean"]["value"] for _ in range(4000)])
    deviation = 1 / math.sqrt(21)
    tolerance = 0.1 * deviation + 4 * deviation / math.sqrt(4000)
    assert float((draws.mean(0) - x.sum(0) / 21).abs().max()) < tolerance
    assert torch.allclose(draws.std(0), torch.tensor(deviation), rtol=0.1 + 4 / math.sqrt(8000))
