"""Pictures: their panels, labels and units, and that what they show is what they were given."""

import io
import math
import subprocess
import sys

import pytest
import torch

import pyro_gen as pg
from pyro_gen import plots
from pyro_gen.fitting.results import FitResult, History
from pyro_gen.plots.data import TILE


def bars(ax):
    return {round(b.get_x() + b.get_width() / 2, 6): b.get_height() for b in ax.patches if b.get_height() > 0}


def points(collection):
    return torch.as_tensor(collection.get_offsets().data, dtype=torch.float64)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def result(columns, validation=(), best_step=None, stopped_at=None, objective=None):
    module = (objective or pg.ELBO())(pg.VAE(2))
    return FitResult(module, History(columns, list(validation)), {}, best_step, stopped_at)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return pg.VAE(64, latent_dim=3, likelihood="bernoulli", hidden=(16,))


@pytest.fixture(scope="module")
def digits():
    return (torch.rand(50, 64, generator=torch.Generator().manual_seed(0)) < 0.3).float()


# --------------------------------------------------------------------------------------------------------------- loss
def test_loss_shows_the_history_and_its_marks():
    falling = [10 * math.exp(-step / 50) + 3 for step in range(200)]
    ax = plots.loss(result({"loss": falling}, [(50, 8.0), (100, 5.0), (200, 4.0)], 100, 180)).axes[0]
    raw, mean, validation, *marks = ax.lines
    assert list(raw.get_ydata()) == pytest.approx(falling)
    assert list(raw.get_xdata()) == list(range(1, 201))
    assert mean.get_ydata()[0] == pytest.approx(sum(falling[:4]) / 4)  # of the 4 steps up to that one
    assert mean.get_xdata()[0] == 4
    assert mean.get_xdata()[-1] == 200
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([50, 100, 200], [8.0, 5.0, 4.0])
    assert [mark.get_xdata()[0] for mark in marks] == [180, 100]
    assert legend(ax) == ["training", "validation", "stopped, step 180", "best validation, step 100"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss, nats per datum")
    at_once = plots.loss(result({"loss": falling}, [(180, 4.0)], 180, 180)).axes[0]
    assert legend(at_once)[-1] == "best validation, stopped, step 180"


def test_loss_without_validation_and_with_values_off_the_scale():
    values = [1e6, 1e3, *[5.0 + 0.1 * (-1) ** i for i in range(98)]]
    ax = plots.loss(result({"loss": values})).axes[0]
    assert legend(ax) == ["training"]
    low, high = ax.get_ylim()
    assert 4 < low < 4.9
    assert 5.1 < high < 6  # the first steps run out at the top
    plots.loss(result({"loss": [math.nan, 2.0]}))
    plots.loss(result({"loss": [2.0]}, [(1, 2.0)], best_step=1))
    with pytest.raises(ValueError, match="no history of a loss"):
        plots.loss(result({}))


def test_loss_of_a_game_has_a_line_a_player_and_no_nats():
    class Game(pg.ELBO):
        loss_is = "game"

    ax = plots.loss(result({"loss.0": [1.0, 2.0], "loss.1": [3.0, 4.0]}, objective=Game())).axes[0]
    assert legend(ax) == ["player 0", "player 1"]
    assert ax.get_ylabel() == "loss per datum"


# ------------------------------------------------------------------------------------------------------------ samples
def tiles(ax, side, columns, rows):
    """The grey values that a sheet of square images shows, one image a row."""
    sheet = torch.as_tensor(ax.images[0].get_array())[..., 0]
    enlarged = math.ceil(TILE / side)
    step, line = side * enlarged, TILE // 16
    assert sheet.shape == (rows * (step + line) - line, columns * (step + line) - line)
    cut = [sheet[r * (step + line) :, c * (step + line) :][:step, :step] for r in range(rows) for c in range(columns)]
    return torch.stack([image[enlarged // 2 :: enlarged, enlarged // 2 :: enlarged].flatten() for image in cut])


def test_samples_tiles_images_in_the_places_of_their_originals(vae, digits):
    figure = plots.samples(vae, digits, n=12, seed=3)
    assert [ax.get_title() for ax in figure.axes] == ["data", "reconstructed", "generated"]
    data, reconstructed, generated = (tiles(ax, 8, 4, 3) for ax in figure.axes)
    torch.testing.assert_close(data, 1 - digits[:12].double())  # ink on paper: most values are low
    torch.testing.assert_close(reconstructed, 1 - vae.reconstruct(digits[:12]).double())
    torch.testing.assert_close(generated, 1 - vae.sample(12, seed=3).double())
    assert not torch.equal(generated, tiles(plots.samples(vae, digits, n=12, seed=4).axes[2], 8, 4, 3))
    bright = plots.samples(vae, 1 - digits, n=12)
    torch.testing.assert_close(tiles(bright.axes[0], 8, 4, 3), 1 - digits[:12].double())
    assert len(plots.samples(vae, digits).axes[0].images[0].get_array()) > 6 * TILE  # 36 of them


def test_samples_of_colours_and_of_channels_first_images():
    torch.manual_seed(1)
    program = pg.VAE((3, 8, 6), latent_dim=2, encoder="conv", decoder="conv")
    x = torch.rand(4, 3, 8, 6)
    sheet = torch.as_tensor(plots.samples(program, x).axes[0].images[0].get_array())
    enlarged = math.ceil(TILE / 6)
    first = sheet[: 8 * enlarged : enlarged, : 6 * enlarged : enlarged].permute(2, 0, 1)
    torch.testing.assert_close(first, (x[0].double() - x.min()) / (x.max() - x.min()))
    one = pg.VAE((1, 8, 8), latent_dim=2, likelihood="bernoulli", encoder="conv", decoder="conv")
    assert tiles(plots.samples(one, torch.ones(2, 1, 8, 8)).axes[0], 8, 2, 1).shape == (2, 64)


def test_samples_of_points():
    torch.manual_seed(2)
    program, x = pg.VAE(2, hidden=(8,)), torch.randn(40, 2)
    figure = plots.samples(program, x, seed=5)
    data, reconstructed, generated = (points(ax.collections[0]) for ax in figure.axes)
    torch.testing.assert_close(data, x.double())
    torch.testing.assert_close(reconstructed, program.reconstruct(x).double())
    torch.testing.assert_close(generated, program.sample(40, seed=5).double())
    assert figure.axes[0].get_xlabel() == "$x_1$"
    assert figure.axes[0].get_ylabel() == "$x_2$"
    assert len({ax.get_xlim() for ax in figure.axes}) == 1  # one scale for all three


def test_samples_of_more_features_are_seen_along_the_principal_components_of_the_data():
    torch.manual_seed(3)
    program = pg.VAE(5, hidden=(8,))
    x = torch.randn(200, 5) * torch.tensor([5.0, 3.0, 0.1, 0.1, 0.1])
    figure = plots.samples(program, x)
    shown, share = points(figure.axes[0].collections[0]), (x[:, 0].var() / x.var(0).sum()).item()
    principal = torch.pca_lowrank(x.double(), q=5, niter=10)
    torch.testing.assert_close(
        shown.abs(), ((x - x.mean(0)).double() @ principal[2][:, :2]).abs(), atol=1e-4, rtol=1e-4
    )
    assert figure.axes[0].get_xlabel() == f"component 1 ({100 * share:.0f} % of variance)"


def test_samples_of_one_feature_are_counted():
    torch.manual_seed(4)
    figure = plots.samples(pg.VAE(1, latent_dim=1, hidden=(4,)), torch.randn(300, 1))
    assert figure.axes[0].get_ylabel() == "density"
    width = figure.axes[0].patches[0].get_width()
    assert sum(bars(figure.axes[0]).values()) * width == pytest.approx(1)


def test_samples_of_programs_without_reconstruction_and_with_context(digits):
    class Tossing(pg.Exact):
        def __init__(self):
            super().__init__(self.toss, 64)

        def toss(self, x):
            import pyro
            import pyro.distributions as dist

            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Bernoulli(torch.full((64,), 0.3)).to_event(1), obs=x)

    assert [ax.get_title() for ax in plots.samples(Tossing(), digits).axes] == ["data", "generated"]
    conditional = pg.VAE(4, context_shape=2, hidden=(8,))
    x, context = torch.randn(30, 4), torch.randn(30, 2)
    figure = plots.samples(conditional, x, context, n=7, seed=1)
    assert all(len(points(ax.collections[0])) == 7 for ax in figure.axes)
    assert plots.latent(conditional, x, context).axes


def test_image_shape_says_what_an_image_is(digits):
    torch.manual_seed(5)
    wide = pg.VAE(64, likelihood="bernoulli", hidden=(8,))
    sheet = plots.samples(wide, digits, n=1, image_shape=(4, 16)).axes[0].images[0].get_array()
    assert sheet.shape == (TILE, 4 * TILE, 3)
    with pytest.raises(ValueError, match=r"image_shape must be \(height, width\).*with 64 values, got \(9, 9\)"):
        plots.samples(wide, digits, image_shape=(9, 9))
    assert plots.samples(pg.VAE(25, hidden=(8,)), torch.randn(30, 25)).axes[0].collections  # a small square is no image


def test_reconstructions_stand_below_their_originals(vae, digits):
    figure = plots.reconstructions(vae, digits, n=5)
    assert [ax.get_ylabel() for ax in figure.axes] == ["data", "reconstructed"]
    torch.testing.assert_close(tiles(figure.axes[0], 8, 5, 1), 1 - digits[:5].double())
    torch.testing.assert_close(tiles(figure.axes[1], 8, 5, 1), 1 - vae.reconstruct(digits[:5]).double())
    table, x = pg.VAE(3, hidden=(8,)), torch.randn(20, 3)
    ax = plots.reconstructions(table, x).axes[0]
    torch.testing.assert_close(points(ax.collections[0])[:, 0], x.double().flatten())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("data, all features", "reconstructed")


# ------------------------------------------------------------------------------------------------------------- latent
def test_latent_shows_posterior_means_over_the_prior():
    torch.manual_seed(6)
    program, x = pg.VAE(4, latent_dim=2, hidden=(8,)), torch.randn(25, 4)
    ax = plots.latent(program, x).axes[0]
    prior, means = ax.collections
    assert prior.get_label() == "prior"
    torch.testing.assert_close(points(means), program.encode(x).mean.detach().double())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z_1$", "$z_2$")
    again = plots.latent(program, x).axes[0].collections[0]
    assert torch.equal(points(again), points(prior))
    assert not torch.equal(points(plots.latent(program, x, seed=1).axes[0].collections[0]), points(prior))


def test_latent_of_more_dimensions_and_of_one(vae, digits):
    ax = plots.latent(vae, digits).axes[0]
    assert ax.get_xlabel().startswith("component 1 of the means (")
    shown = points(ax.collections[1])
    means = vae.encode(digits).mean.detach().double()
    assert float(shown.var(0).sum()) <= float(means.var(0).sum()) * (1 + 1e-9)
    assert float(shown.mean(0).abs().max()) < 1e-9
    flat = pg.VAE(4, latent_dim=1, hidden=(8,))
    ax = plots.latent(flat, torch.randn(25, 4)).axes[0]
    assert ax.get_ylabel() == "rows"
    assert sum(b.get_height() for b in ax.patches) == pytest.approx(50)  # 25 means, the prior on their scale
    ax = plots.latent(flat, torch.randn(6, 4), labels=torch.rand(6)).axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z$", "label")


def test_latent_tells_classes_by_colour_and_numbers_by_scale():
    torch.manual_seed(7)
    program, x = pg.VAE(4, latent_dim=2, hidden=(8,)), torch.randn(6, 4)
    means = program.encode(x).mean.detach().double()
    ax = plots.latent(program, x, labels=torch.tensor([1, 0, 1, 1, 0, 1])).axes[0]
    assert legend(ax) == ["prior", "0", "1"]
    torch.testing.assert_close(points(ax.collections[1]), means[[1, 4]])
    torch.testing.assert_close(points(ax.collections[2]), means[[0, 2, 3, 5]])
    assert legend(plots.latent(program, x, labels=list("abcabc")).axes[0]) == ["prior", "a", "b", "c"]
    scale = plots.latent(program, x, labels=torch.linspace(0, 1, 6))
    assert scale.axes[0].collections[1].get_array().tolist() == pytest.approx(torch.linspace(0, 1, 6).tolist())
    assert scale.axes[1].get_ylabel() == "label"
    with pytest.raises(ValueError, match="labels must be one a row: got 2 for 6 rows"):
        plots.latent(program, x, labels=[0, 1])
    with pytest.raises(ValueError, match="labels name 11 classes, and colours tell 10 apart"):
        plots.latent(program, torch.randn(11, 4), labels=list("abcdefghijk"))


# ----------------------------------------------------------------------------------------------------------- pareto k
def test_pareto_k_counts_rows_on_both_sides_of_the_limit():
    values = torch.tensor([0.12, 0.13, 0.68, 0.69, 0.71, 0.93, -math.inf, math.inf, math.nan])
    ax = plots.pareto_k(values).axes[0]
    assert sum(bars(ax).values()) == 6
    red = [b for b in ax.patches if b.get_facecolor()[0] > 0.5 and b.get_height()]
    assert sum(b.get_height() for b in red) == 2
    assert all(b.get_x() > 0.699 for b in red)
    assert ax.get_title(loc="left") == "3 of 9 rows above 0.7; 1 at −∞ (equal weights); 1 at ∞; 1 at nan"
    assert ax.lines[0].get_xdata()[0] == 0.7
    assert "tail index" in ax.get_xlabel()
    assert ax.get_ylabel() == "rows"


def test_pareto_k_of_an_evidence(vae, digits):
    evidence = pg.log_evidence(vae, digits[:20], method=pg.ImportanceSampling(100, seed=0))
    ax = plots.pareto_k(evidence).axes[0]
    assert sum(bars(ax).values()) == int(evidence.pareto_k.isfinite().sum())
    wide = plots.pareto_k(torch.linspace(-3, 8, 50)).axes[0]
    assert sum(bars(wide).values()) == 50
    assert plots.pareto_k(torch.full((4,), -math.inf)).axes[0].get_title(loc="left").startswith("0 of 4 rows above 0.7")
    with pytest.raises(TypeError, match="an Evidence of importance weights or a tensor"):
        plots.pareto_k(pg.Evidence(torch.zeros(3), "exact"))


# ------------------------------------------------------------------------------------------------------------- figures
def test_axes_of_ones_own_are_drawn_into():
    from matplotlib.figure import Figure

    mine = Figure()
    left, right = mine.subplots(1, 2)
    assert plots.loss(result({"loss": [2.0, 1.0]}), ax=left) is mine
    assert plots.pareto_k(torch.tensor([0.1]), ax=right) is mine
    assert left.lines
    assert right.patches
    assert plots.latent(pg.VAE(4), torch.randn(5, 4), ax=Figure().add_subplot()).axes


def test_figures_leave_pyplot_and_generators_alone_and_can_be_shown(vae, digits):
    import matplotlib.pyplot as plt

    before, state = plt.get_fignums(), torch.random.get_rng_state()
    figures = [plots.samples(vae, digits), plots.reconstructions(vae, digits), plots.latent(vae, digits)]
    assert plt.get_fignums() == before
    assert torch.equal(torch.random.get_rng_state(), state)
    buffer = io.BytesIO()
    figures[0].savefig(buffer)
    assert buffer.getvalue()[:4] == b"\x89PNG"
    assert figures[0]._repr_html_().startswith("<img width=")
    assert vae.training


def test_what_cannot_be_drawn_is_refused():
    energy = pg.Unnormalized(lambda x: None, 2)
    with pytest.raises(TypeError, match="cannot be sampled"):
        plots.samples(energy, torch.zeros(3, 2))
    with pytest.raises(TypeError, match=r"has no reconstruct\(x\)"):
        plots.reconstructions(energy, torch.zeros(3, 2))
    with pytest.raises(TypeError, match="is not Bounded"):
        plots.latent(energy, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="n must be an int of at least 1, got 0"):
        plots.samples(pg.VAE(2), torch.zeros(3, 2), n=0)
    with pytest.raises(ValueError, match=r"x must have shape \(rows, 2\)"):
        plots.samples(pg.VAE(2), torch.zeros(3, 5))


def test_importing_plots_does_not_import_matplotlib():
    code = "import sys, pyro_gen.plots; sys.exit(any(m.split('.')[0] == 'matplotlib' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------ density
class Square(pg.Exact):
    """Uniform on a unit square beside the origin."""

    def __init__(self):
        import pyro
        import pyro.distributions as dist

        def model(x):
            with pyro.plate("data", len(x)):
                return pyro.sample(
                    "x", dist.Uniform(torch.tensor([1.0, -2.0]), torch.tensor([2.0, -1.0])).to_event(1), obs=x
                )

        super().__init__(model, 2)


def test_density_is_drawn_where_it_is():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 2, generator=generator) + torch.tensor([1.0, -2.0])
    x[:2] = torch.tensor([[1.0, -2.0], [2.0, -1.0]])  # the range is the square, with a tenth around it
    figure = plots.density(Square(), x, n=50, cells=120)
    data, picture, _ = figure.axes
    assert len(points(data.collections[0])) == 50
    image = picture.images[0]
    assert image.get_extent() == pytest.approx([0.9, 2.1, -2.1, -0.9], abs=1e-6)
    seen = torch.as_tensor(image.get_array().data)
    wanted = torch.zeros(120, 120, dtype=torch.float64)
    wanted[10:110, 10:110] = 1.0
    assert torch.allclose(seen, wanted)
    assert "100.0% of its mass" in picture.get_title()


def test_density_has_x1_across_and_x2_up():
    torch.manual_seed(0)
    flow = pg.Flow(2, transform="linear")
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0]) + 3.0
    flow.initialise(x)
    image = plots.density(flow, x, cells=40).axes[1].images[0]
    left, right, bottom, top = image.get_extent()
    across = left + (right - left) * (torch.arange(40) + 0.5) / 40
    up = bottom + (top - bottom) * (torch.arange(40) + 0.5) / 40
    seen = torch.as_tensor(image.get_array().data)
    for row, column in ((5, 30), (30, 5), (20, 20)):
        here = float(flow.log_prob(torch.tensor([[across[column], up[row]]])).detach().exp())
        assert float(seen[row, column]) == pytest.approx(here, rel=1e-4)


def test_density_of_a_context_and_what_it_refuses(vae):
    torch.manual_seed(0)
    flow = pg.Flow(2, transform="affine_coupling", layers=1, hidden=(8,), context_shape=3)
    x = torch.randn(30, 2)
    assert len(plots.density(flow, x, torch.zeros(1, 3), cells=10).axes) == 3
    with pytest.raises(ValueError, match="context must be a single row"):
        plots.density(flow, x, torch.zeros(30, 3))
    with pytest.raises(ValueError, match="context is missing"):
        plots.density(flow, x)
    with pytest.raises(TypeError, match=r"VAE does not have exactly.*plots\.samples"):
        plots.density(vae, torch.zeros(3, 64))
    with pytest.raises(ValueError, match="one of 3 features"):
        plots.density(pg.Flow(3, transform="linear"), torch.zeros(3, 3))


# ------------------------------------------------------------------------------------------------------------- energy
def hill(x):
    """E = x1²/2 + 2 (x2 - 1)², so that the score is (-x1, -4 (x2 - 1))."""
    return x[:, 0].square() / 2 + 2 * (x[:, 1] - 1).square()


def test_energy_shows_the_surface_from_its_least_value_with_x1_across():
    ebm = pg.EBM(2, energy=hill, base=None)
    x = torch.tensor([[-2.0, 0.0], [2.0, 3.0]])
    draws = torch.tensor([[0.5, 1.0], [1.0, 1.5], [0.0, 0.5]])
    figure = plots.energy(ebm, x, draws=draws, n=2, cells=40, arrows=6)
    data, picture, third, bar = figure.axes
    left, right, bottom, top = picture.images[0].get_extent()
    assert (left, right, bottom, top) == pytest.approx((-2.4, 2.4, -0.3, 3.3))
    across = left + (right - left) * (torch.arange(40) + 0.5) / 40
    up = bottom + (top - bottom) * (torch.arange(40) + 0.5) / 40
    surface = hill(torch.cartesian_prod(across, up)).reshape(40, 40).T
    seen = torch.as_tensor(picture.images[0].get_array().data)
    torch.testing.assert_close(seen, (surface - surface.min()).double(), rtol=1e-4, atol=1e-5)
    low, high = picture.images[0].get_clim()
    assert low == 0
    assert high == pytest.approx(1.5 * (10.0 - float(surface.min())), rel=1e-4)  # the second datum has the energy 10
    assert points(data.collections[0]).shape == points(third.collections[0]).shape == (2, 2)  # n of each
    assert [ax.get_title() for ax in (data, picture, third)] == ["data", "energy and score", "draws"]
    assert "nats" in bar.get_ylabel()


def test_energy_has_arrows_along_the_score():
    ebm = pg.EBM(2, energy=hill, base=None)
    (arrows,) = plots.energy(ebm, torch.tensor([[-2.0, 0.0], [2.0, 2.0]]), cells=10, arrows=6).axes[1].collections
    feet = torch.as_tensor(arrows.XY)
    assert len(feet) == 36
    seen = torch.stack([torch.as_tensor(arrows.U), torch.as_tensor(arrows.V)], 1)
    score = torch.stack([-feet[:, 0], -4 * (feet[:, 1] - 1)], 1)
    length = score.norm(dim=1, keepdim=True)
    torch.testing.assert_close(seen, score / (length + length.median()), rtol=1e-4, atol=1e-5)


def test_energy_leaves_out_what_lies_outside_the_support():
    ebm = pg.EBM(2, energy=lambda x: x.sum(-1), base=None, support="positive")
    x = torch.tensor([[0.0, 0.0], [10.0, 10.0]]) + 0.01  # a tenth of room on each side, the lower half of it negative
    picture = plots.energy(ebm, x, cells=12, arrows=12).axes[1]
    surface = torch.as_tensor(picture.images[0].get_array().filled(math.nan))
    assert bool(surface[0].isnan().all())
    assert bool(surface[:, 0].isnan().all())
    assert bool(torch.isfinite(surface[1:, 1:]).all())
    assert len(picture.collections[0].XY) == 11 * 11


def test_energy_of_a_context_of_an_exact_program_and_what_it_refuses(vae):
    conditional = pg.EBM(2, hidden=(8,), context_shape=3)
    x = torch.randn(30, 2)
    assert len(plots.energy(conditional, x, torch.zeros(1, 3), cells=10, arrows=4).axes) == 3
    assert len(plots.energy(pg.Flow(2, transform="linear"), x, cells=10, arrows=4).axes) == 3
    with pytest.raises(ValueError, match="context must be a single row"):
        plots.energy(conditional, x, torch.zeros(30, 3))
    with pytest.raises(ValueError, match="context is missing"):
        plots.energy(conditional, x)
    with pytest.raises(TypeError, match="kind Unnormalized or Exact, got VAE"):
        plots.energy(vae, torch.zeros(3, 64))
    with pytest.raises(TypeError, match="no program"):
        plots.energy(hill, x)
    with pytest.raises(ValueError, match="one of 3 features"):
        plots.energy(pg.EBM(3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="discrete x"):
        plots.energy(pg.EBM(2, "rbm", base="bernoulli", hidden=(2,)), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"draws\.flat"):
        plots.energy(conditional, x, torch.zeros(1, 3), draws=torch.zeros(4, 5, 2))
