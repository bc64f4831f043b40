"""Pictures of a diffusion: what their panels hold is what the program says, on a mixture whose denoiser is exact."""

import math

import pytest
import torch

import pyro_gen as pg
from pyro_gen import datasets, plots
from pyro_gen.distributions.noise import make_schedule
from pyro_gen.programs import Diffusion
from pyro_gen.samplers.reverse import ReverseDiffusion


class Exact(torch.nn.Module):
    """E[u | y] for a mixture of Gaussians."""

    def __init__(self, toy, schedule):
        super().__init__()
        self.means, self.scale, self.schedule = toy.means, toy.scale, schedule

    def forward(self, y, t):
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        variance = alpha**2 * self.scale**2 + sigma**2
        apart = y[:, None] - alpha[:, None] * self.means
        centre = torch.softmax(-apart.square().sum(-1) / (2 * variance), 1) @ self.means
        return centre + alpha * self.scale**2 / variance * (y - alpha * centre)


TOY = datasets.GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.2)


def exact(schedule="cosine", timesteps=None):
    levels = make_schedule(schedule)
    return Diffusion(2, Exact(TOY, levels), levels, timesteps, "x0", standardise=False).double()


@pytest.fixture(scope="module")
def x():
    return TOY.sample(500, seed=0).double()


def points(ax, which=0):
    return torch.as_tensor(ax.collections[which].get_offsets().data, dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["cosine", "karras", "rectified"])
def test_strips_show_both_ways_at_the_same_times(x, schedule):
    program = exact(schedule)
    method = ReverseDiffusion("dpm++2m", 30)
    figure = plots.strips(program, x, method=method, panels=5, n=200, seed=3)
    forward, reverse = figure.axes[:5], figure.axes[5:]
    titles = [ax.get_title() for ax in forward]
    assert titles[0] == "t = 0"
    assert [ax.get_title() for ax in reverse] == [""] * 5
    assert torch.equal(points(forward[0]), x[:200])
    path = method.sample(program, 200, seed=3, trajectory=True)
    torch.testing.assert_close(points(reverse[0]), path[-1])
    start = path[0] if program.schedule.variance_preserving else path[0] / math.hypot(
        float(program.schedule.alpha(method.times(program)[0])), float(program.schedule.sigma(method.times(program)[0]))
    )  # fmt: skip
    torch.testing.assert_close(points(reverse[4]), start)
    shares = []
    for ax, title in zip(forward, titles, strict=True):
        t = torch.tensor(float(title.removeprefix("t = ")))
        spread = points(ax).std(0)  # of noise of variance 1 and data alike: in one frame at all times
        assert bool((spread < 1.3).all())
        assert t >= 0
        shares.append(float(t))
    assert shares == sorted(shares)
    assert float((points(forward[4]).std(0) - 1).abs().max()) < 4 / math.sqrt(2 * 200)


def test_strips_take_a_trajectory_and_its_times(x):
    program = exact()
    path = torch.stack([torch.full((50, 2), float(i), dtype=torch.float64) for i in range(4)])
    figure = plots.strips(program, x, trajectory=path, times=[0.9, 0.5, 0.1], panels=4, n=50)
    assert [ax.get_title() for ax in figure.axes[:4]] == ["t = 0", "t = 0.1", "t = 0.5", "t = 0.9"]
    assert [float(points(ax).mean()) for ax in figure.axes[4:]] == [3.0, 2.0, 1.0, 0.0]
    assert len(plots.strips(program, x, trajectory=path, times=[0.9, 0.5, 0.1, 0.0], panels=3, n=50).axes) == 6
    with pytest.raises(ValueError, match="trajectory has 4 states and times has 2"):
        plots.strips(program, x, trajectory=path, times=[0.9, 0.5])
    with pytest.raises(ValueError, match="trajectory= needs the times"):
        plots.strips(program, x, trajectory=path)
    with pytest.raises(ValueError, match="times= belong to trajectory="):
        plots.strips(program, x, times=[0.9])
    with pytest.raises(ValueError, match=r"trajectory must have shape \(steps \+ 1, n, 2\)"):
        plots.strips(program, x, trajectory=path[..., :1], times=[0.9, 0.5, 0.1])


def test_strips_of_images_of_one_feature_and_of_many():
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    program = Diffusion((1, 8, 8), hidden=(8,), timesteps=10, standardise=False)
    path = torch.rand(11, 9, 1, 8, 8)
    times = torch.linspace(1, 0, 11)
    figure = plots.strips(program, images, trajectory=path, times=times, panels=4)
    assert len(figure.axes) == 8
    assert all(len(ax.images) == 1 for ax in figure.axes)
    assert figure.axes[0].get_ylabel() == "noising  →"
    assert figure.axes[4].get_ylabel() == "←  drawing"
    one = Diffusion(1, hidden=(8,), timesteps=10, standardise=False)
    figure = plots.strips(one, torch.randn(50, 1), trajectory=torch.randn(11, 50, 1), times=times, panels=3)
    assert figure.axes[0].get_ylabel().endswith("density")
    many = Diffusion(5, hidden=(8,), timesteps=10, standardise=False)
    figure = plots.strips(many, torch.randn(50, 5), trajectory=torch.randn(11, 50, 5), times=times, panels=3)
    assert "component 1" in figure.axes[-1].get_xlabel()


def test_trajectories_are_the_states_of_the_method(x):
    program = exact()
    method = ReverseDiffusion("ddim", 12)
    ax = plots.trajectories(program, x, method=method, n=7, seed=2).axes[0]
    path = method.sample(program, 7, seed=2, trajectory=True)
    assert len(ax.lines) == 7
    for k, line in enumerate(ax.lines):
        torch.testing.assert_close(torch.as_tensor(line.get_xydata()), path[:, k])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["data", "noise", "draws"]
    torch.testing.assert_close(points(ax, 1), path[0])
    torch.testing.assert_close(points(ax, 2), path[-1])
    one = Diffusion(1, hidden=(8,), timesteps=10, standardise=False)
    ax = plots.trajectories(one, torch.randn(50, 1), n=3).axes[0]
    assert (ax.get_xlabel(), len(ax.lines), len(ax.patches)) == ("t", 3, 40)
    with pytest.raises(ValueError, match="draws in a plane"):
        plots.trajectories(Diffusion(3, hidden=(8,)))


def test_score_field_points_where_the_score_does(x):
    program = exact()
    figure = plots.score_field(program, x, t=0.3, arrows=6, n=100)
    (ax,) = figure.axes
    assert ax.get_title() == "t = 0.3"
    (quiver,) = [c for c in ax.collections if hasattr(c, "U")]
    feet = torch.as_tensor(quiver.XY)
    score = program.score(feet, 0.3)
    arrows = torch.stack([torch.as_tensor(quiver.U), torch.as_tensor(quiver.V)], 1)
    norm = score.norm(dim=1, keepdim=True)
    torch.testing.assert_close(arrows, score / (norm + norm.median()))
    flipped = torch.nn.functional.cosine_similarity(arrows, -score)
    assert bool((flipped < -0.999).all())  # arrows of the other sign would fail
    # by finite differences of the noised mixture's density: a mixture again
    alpha, sigma = (
        getattr(program.schedule, name)(torch.tensor(0.3, dtype=torch.float64)) for name in ("alpha", "sigma")
    )
    noised = datasets.GaussianMixture(TOY.means * alpha, float((alpha**2 * TOY.scale**2 + sigma**2).sqrt()))
    at = feet.clone().requires_grad_()
    (expected,) = torch.autograd.grad(noised.log_prob(at).sum(), at)
    torch.testing.assert_close(score, expected)
    assert len(plots.score_field(program, x, arrows=4).axes) == 4
    assert len(plots.score_field(exact(timesteps=1), x, arrows=4).axes) == 1
    assert len(plots.score_field(program, x, t=[0.2, 0.6], arrows=4).axes) == 2


@pytest.mark.parametrize("timesteps", [50, None])
def test_area_under_the_loss_is_the_bound(x, timesteps):
    program = exact(timesteps=timesteps)
    program.initialise(x)
    ax = plots.loss_by_level(program, x, seed=4).axes[0]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        terms = program.terms(x)
    level, height = (torch.as_tensor(part) for part in (ax.lines[-1].get_xdata(), ax.lines[-1].get_ydata()))
    if timesteps:
        knots = program.schedule.log_snr(program.model.grid[1:].double())
        width = knots[:-1] - knots[1:]
        torch.testing.assert_close(level, (knots[:-1] + knots[1:]) / 2)
    else:
        ends = program.schedule.log_snr(torch.tensor(program.times, dtype=torch.float64))
        width = (ends[0] - ends[1]) / 128
    assert float((height * width).sum()) == pytest.approx(float(terms[:, 1:-1].sum(1).mean()), rel=1e-10)
    assert f"bound ≥ {float(-terms.sum(1).mean()):.2f} nats" in ax.get_title()
    assert ax.xaxis_inverted()
    band = ax.collections[0].get_paths()[0].vertices
    error = (terms[:, 1:-1] / width).std(0) / len(x) ** 0.5
    assert band[:, 1].max() == pytest.approx(float((height + 2 * error).max()), rel=1e-9)


def test_errors_beside_those_of_normal_data():
    # on standard normal data, with the best network, the curve is the dashed line
    levels = make_schedule("cosine")

    class Normal(torch.nn.Module):
        def forward(self, y, t):
            return levels.alpha(t)[:, None] * y

    program = Diffusion(2, Normal(), levels, None, "x0", standardise=False).double()
    x = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for measure in ("noise", "data"):
        ax = plots.loss_by_level(program, x, measure=measure, seed=1).axes[0]
        best, found = (torch.as_tensor(line.get_ydata()) for line in ax.lines)
        # |e|^2 / 2 has standard deviation best · 1, a mean of 2000 rows; 64 levels
        assert bool(((found - best).abs() <= 5 * best / math.sqrt(2000)).all())
        assert not bool(((found - 1.3 * best).abs() <= 5 * best / math.sqrt(2000)).all())
        assert ax.get_ylabel() == f"mean square error of the {measure}, a feature"
    chain = exact(timesteps=10)
    level = plots.loss_by_level(chain, x, measure="data").axes[0].lines[0].get_xdata()
    trained = chain.schedule.log_snr(chain.model.grid[1:].double())
    assert bool((torch.as_tensor(level)[:, None] - trained).abs().amin(1).max() < 1e-9)  # where it is trained, only


def test_global_generators_and_bad_input(x):
    program = exact(timesteps=10)
    state = torch.get_rng_state()
    plots.strips(program, x, panels=3, n=20)
    plots.trajectories(program, n=3)
    plots.score_field(program, x, t=0.5, arrows=3)
    plots.loss_by_level(program, x)
    assert torch.equal(state, torch.get_rng_state())
    vae = pg.VAE(2)
    for call in (plots.strips, plots.score_field, plots.loss_by_level, plots.trajectories):
        with pytest.raises(TypeError, match="needs a program of kind Noised"):
            call(vae, x)
    with pytest.raises(ValueError, match="panels must be at least 2"):
        plots.strips(program, x, panels=1)
    with pytest.raises(ValueError, match="measure must be 'bound', 'noise' or 'data'"):
        plots.loss_by_level(program, x, measure="loss")
    with pytest.raises(ValueError, match="at least two rows"):
        plots.loss_by_level(program, x[:1])
    with pytest.raises(ValueError, match="draws a plane"):
        plots.score_field(Diffusion(3, hidden=(8,)), torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"t must lie in \(0, 1\]"):
        plots.score_field(program, x, t=1.5)
    with pytest.raises(ValueError, match="context was given"):
        plots.strips(program, x, torch.zeros(1, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="context must be a single row"):
        plots.trajectories(program, x, torch.zeros(2, 2))


def test_one_context_for_all_draws():
    program = Diffusion(2, hidden=(8,), timesteps=10, context_shape=3, standardise=False)
    x, context = torch.randn(30, 2), torch.randn(1, 3)
    assert len(plots.strips(program, x, context, panels=3).axes) == 6
    assert len(plots.trajectories(program, x, context, n=4).axes[0].lines) == 4
    assert len(plots.score_field(program, x, 0.5, context, arrows=3).axes) == 1
    plots.loss_by_level(program, x, context.expand(30, 3))
