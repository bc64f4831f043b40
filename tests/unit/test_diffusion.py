"""Diffusion: what it refuses, what it keeps through copies and files, its chain, its guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import RenyiELBO
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen import handlers
from pyro_gen.distributions.chains import steps_of
from pyro_gen.programs.diffusion import Diffusion

ROWS = 40


def small(event_shape: Any = 2, **options: Any) -> Diffusion:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Diffusion(event_shape, **{"hidden": (8,), "timesteps": 6, "prediction": "v", **options})


def rows(*event: int, seed: int = 0) -> Tensor:
    return torch.randn(ROWS, *event, generator=torch.Generator().manual_seed(seed))


def settled(**options: Any) -> Diffusion:
    diffusion = small(**options)
    diffusion.initialise(2 * rows(2) + 1, *([rows(3)] if "context_shape" in options else []))
    return diffusion


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"event_shape": ()}, "at least one dimension"),
        ({"schedule": "wavy"}, "schedule must be one of"),
        ({"prediction": "noise"}, "prediction must be one of"),
        ({"schedule": "karras", "prediction": "v"}, "prediction='edm'"),
        ({"timesteps": 0}, "timesteps must be an int of at least 1"),
        ({"timesteps": 2.5}, "timesteps must be an int"),
        ({"form": "chain"}, "form must be one of"),
        ({"variance": "tiny"}, "variance must be one of"),
        ({"guide": "backward"}, "guide must be one of"),
        ({"form": "sites", "timesteps": None}, "form='collapsed'"),
        ({"form": "sites", "timesteps": 1001}, "1000 at most"),
        ({"variance": "learned", "timesteps": 1}, "variance='optimal'"),
        ({"variance": "learned", "timesteps": None}, "variance='optimal'"),
        ({"unconditional": 0.1}, "context_shape="),
        ({"unconditional": 1.0, "context_shape": 3}, "share of rows"),
        ({"network": "resnet"}, "network must be a module"),
        ({"network": "conv"}, r"\(channels, height, width\)"),
        ({"schedule": "rectified", "prediction": "epsilon"}, "prediction='edm'"),
        ({"hidden": 8}, "hidden must be a sequence"),
    ],
)
def test_options_that_do_not_go(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**options)


def test_contexts_that_do_not_fit() -> None:
    diffusion = settled(context_shape=3)
    x = rows(2)
    for ask in (lambda: diffusion.lower_bound(x), lambda: diffusion.sample(4), lambda: diffusion.terms(x)):
        with pytest.raises(ValueError, match="context is missing"):
            ask()
    with pytest.raises(ValueError, match="context must have shape"):
        diffusion.sample(4, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="each draw needs its own"):
        diffusion.sample(4, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="without one"):
        settled().sample(4, torch.zeros(4, 3))
    assert diffusion.sample(4, torch.zeros(3), seed=0).shape == (4, 2)


def test_guidance_needs_unconditional_training() -> None:
    for diffusion, context in ((settled(context_shape=3), torch.zeros(4, 3)), (settled(), None)):
        with pytest.raises(ValueError, match="unconditional=0"):
            diffusion.sample(4, context, guidance=1.0)


def test_a_network_of_another_shape() -> None:
    class Wrong(nn.Module):
        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            return y[:, :1]

    with pytest.raises(ValueError, match=r"network must give shape \(40, 2\).*got \(40, 1\)"):
        Diffusion(2, Wrong(), standardise=False, timesteps=3).model(rows(2))


def test_sampling_before_fitting_warns() -> None:
    with pytest.warns(UserWarning, match="never been fitted"):
        small().sample(3)
    settled().sample(3)  # no warning, which would be an error here
    small(standardise=False).sample(3)


# ------------------------------------------------------------------------------------------------ factors and weights
@pytest.mark.parametrize("timesteps", [6, None])
def test_a_factor_in_expectation_is_no_weight(timesteps: int | None) -> None:
    diffusion, x = settled(timesteps=timesteps), rows(2)
    said = r"in expectation only.*diffusion\.chain\(timesteps\)"
    with pytest.raises(ValueError, match=said):
        pg.IWAE(4)(diffusion)(x)
    with pytest.raises(ValueError, match=said):
        pg.log_evidence(diffusion, x, method=pg.ImportanceSampling(10))
    shape, _ = handlers.structure(diffusion.model, diffusion.guide, x)
    assert shape.in_expectation == ("bound",)
    chain = diffusion.chain(4)
    assert handlers.structure(chain.model, chain.guide, x)[0].in_expectation == ()
    assert torch.isfinite(pg.IWAE(4)(chain)(x))
    assert torch.isfinite(pg.log_evidence(chain, x, method=pg.ImportanceSampling(30)).value).all()


def test_why_it_is_refused() -> None:
    """Pyro's own objective takes the factor for a weight, and its 'bound' leaves that of the chain far behind."""
    diffusion, x = settled(variance="large"), rows(2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrong = -RenyiELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1).loss(
            diffusion.model, diffusion.guide, x
        )
        chain = diffusion.chain()
        right = -float(pg.IWAE(200, vectorize_particles=True)(chain)(x).detach())
    assert wrong > right + 10


# ------------------------------------------------------------------------------------------------------------ the chain
def test_chain_shares_what_is_learnt() -> None:
    diffusion = settled()
    chain = diffusion.chain()
    assert chain.form == "sites"
    assert chain.timesteps == 6
    assert chain.model.net is diffusion.model.net
    assert chain.location is diffusion.location
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        one = diffusion.lower_bound(rows(2))
        torch.manual_seed(0)
        assert torch.equal(chain.lower_bound(rows(2)), one)
    assert diffusion.chain(3).timesteps == 3
    assert diffusion.chain(variance="small").model.variance == "small"
    assert settled(timesteps=None).chain().timesteps == 100
    with pytest.raises(ValueError, match="1000 at most"):
        diffusion.chain(2000)
    with pytest.raises(ValueError, match="cannot be changed"):
        diffusion.chain(variance="learned")


def test_chain_of_another_length_reads_the_errors_off() -> None:
    diffusion = settled(timesteps=40)
    table = diffusion.model.steps()
    log_ratio = (table.sigma / table.alpha).log()
    diffusion.model.ratio.copy_((-0.3 * log_ratio - 1).exp().unsqueeze(1).expand(40, 2))  # a line, which lines keep
    chain = diffusion.chain(15)
    there = chain.model.steps()
    wanted = (-0.3 * (there.sigma / there.alpha).log().clamp(log_ratio[0], log_ratio[-1]) - 1).exp()
    assert torch.allclose(chain.model.ratio, wanted.unsqueeze(1).expand(15, 2), rtol=1e-5)


def test_variances_between_levels() -> None:
    diffusion = settled().double()
    grid = diffusion.grid
    assert grid is not None
    diffusion.model.ratio.uniform_(0.5, 2)
    table = diffusion.model.steps()
    found = diffusion.reverse_variance(grid[2:], grid[1:-1])
    error = diffusion.model.error(table, diffusion.model.ratio)
    wanted = table.variance.unsqueeze(1) + table.weight.unsqueeze(1) * error
    assert torch.allclose(found, wanted[1:], rtol=1e-10)
    kernels = steps_of(
        torch.cat([table.alpha.new_ones(1), table.alpha]), torch.cat([table.sigma.new_zeros(1), table.sigma])
    )
    own = settled(variance="small").double().reverse_variance(grid[2:], grid[1:-1])
    assert torch.allclose(own, kernels.variance[1:].unsqueeze(1).expand(5, 2), rtol=1e-10)


# ------------------------------------------------------------------------------------------------- dtypes and tables
def test_tables_are_made_from_numbers() -> None:
    diffusion = small(timesteps=1000, schedule="linear").double()
    exact = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    table = diffusion.model.steps()
    assert torch.allclose(table.alpha.square(), exact, rtol=1e-11, atol=0)
    assert torch.allclose(1 - table.alpha.square() - table.sigma.square(), torch.zeros(()).double(), atol=1e-15)
    assert not torch.allclose(table.alpha.float().double().square(), exact, rtol=1e-11, atol=0)
    assert diffusion.float().model.table.dtype == torch.float32


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_single_precision_keeps_the_bound(variance: Any) -> None:
    """Differences of large numbers would cost digits: at a thousand steps the sum of terms still has five of them."""
    diffusion = settled(timesteps=1000, variance=variance)
    u, noise = rows(2), rows(2, seed=1)

    def total(program: Diffusion, dtype: torch.dtype) -> Tensor:
        model, table = program.model, program.model.steps()
        step = type(table)(*(column.unsqueeze(1) for column in table))
        with torch.no_grad():
            return model.step_loss(
                u.to(dtype), noise.to(dtype).expand(1000, -1, -1), step, model.ratio.unsqueeze(1), None
            )

    single = total(diffusion, torch.float32).double()
    double = total(diffusion.double(), torch.float64)
    assert float((single - double).abs().sum() / double.abs().sum()) < 1e-4


# ----------------------------------------------------------------------------------------------------------- guidance
def test_guidance_is_the_line_through_two_outputs() -> None:
    diffusion, context = settled(context_shape=3, unconditional=0.2), rows(3)
    y, level = rows(2, seed=2), torch.linspace(-3, 3, ROWS)
    null = diffusion.model.null
    assert null is not None
    with torch.no_grad():
        plain = diffusion.output(context)(y, level)
        without = diffusion.output(null.expand(ROWS, 3))(y, level)
        guided = diffusion.output(context, 1.5)(y, level)
        assert torch.allclose(guided, 2.5 * plain - 1.5 * without, atol=1e-5)
        assert torch.allclose(diffusion.output(context, 0.0)(y, level), plain, atol=1e-6)
    assert not torch.allclose(plain, without, atol=1e-4)


def test_a_share_of_contexts_is_dropped_in_training_only() -> None:
    diffusion = settled(context_shape=3, unconditional=0.25)
    context = torch.zeros(4000, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = (diffusion.dropped(context) != context).any(1).double().mean()
    assert abs(float(out) - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert diffusion.dropped(context).requires_grad
    assert settled(context_shape=3).dropped(context) is context


# -------------------------------------------------------------------------------------------------------- fit and keep
def test_fit_concludes_and_is_read_back(tmp_path: Path) -> None:
    diffusion, x = small(), 2 * rows(2) + 1
    result = pg.fit(
        pg.ELBO()(diffusion), x, steps=5, batch_size=20, seed=0, compile=False, progress=False, validation=False
    )
    assert bool(diffusion.model.started)
    assert bool((diffusion.model.ratio != 1).all())
    result.save(tmp_path)
    again: Any = pg.load(tmp_path).program
    assert torch.equal(again.sample(5, seed=0), diffusion.sample(5, seed=0))
    assert again.config == diffusion.config


def test_conclude_leaves_generators_and_other_variances_alone() -> None:
    x = rows(2)
    for variance in ("small", "large"):
        diffusion = settled(variance=variance)
        diffusion.conclude(x)
        assert torch.equal(diffusion.model.ratio, torch.ones(6, 2))
    diffusion, before = settled(), torch.get_rng_state()
    diffusion.conclude(x)
    found = diffusion.model.ratio.clone()
    diffusion.conclude(x)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found, diffusion.model.ratio)


def test_terms_add_up_and_cost_no_memory() -> None:
    diffusion, x = settled(timesteps=50), rows(2)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        terms = diffusion.terms(x, particles=3)
        torch.manual_seed(0)
        bound = diffusion.lower_bound(x, particles=3)
    assert terms.shape == (ROWS, 51)
    assert torch.allclose(-terms.sum(1), bound)
    assert bool((terms[:, 1:] > -1e-5).any())
    with pytest.raises(ValueError, match="particles"):
        diffusion.terms(x, particles=0)


def test_trajectories_end_in_the_draws() -> None:
    diffusion = settled()
    path = diffusion.sample(5, seed=0, trajectory=True)
    assert path.shape == (7, 5, 2)
    assert torch.equal(path[-1], diffusion.sample(5, seed=0))
    with pytest.raises(TypeError, match="ReverseDiffusion"):
        diffusion.sample(5, method="ddim")
    with pytest.raises(TypeError, match="ProbabilityFlow"):
        diffusion.distribution(method="ode")


def test_images_and_contexts_of_any_shape() -> None:
    image = small((1, 4, 4), network="conv", context_shape=(2, 2), variance="learned", standardise=False)
    x, context = rows(1, 4, 4), rows(2, 2)
    assert image.lower_bound(x, context).shape == (ROWS,)
    assert image.sample(3, context[:3], seed=0).shape == (3, 1, 4, 4)


def test_a_learnt_way_follows_the_variance_and_its_ends_the_bound():
    program = Diffusion(2, schedule="learned", timesteps=None, standardise=False, hidden=(8,), prediction="v").double()
    model, schedule = program.model, program.model.schedule
    generator = torch.Generator().manual_seed(0)
    u, noise = (torch.randn(50, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    way = torch.rand(50, generator=generator, dtype=torch.float64)

    def values() -> torch.Tensor:
        """The integrand, by the schedule as it is."""
        rate = -schedule.log_snr_rate(way)
        return model.integrand(u, way, noise, None, schedule.log_snr(way), rate)[0].detach()

    def slope(parameter: torch.nn.Parameter, of: Any, step: float = 1e-5) -> float:
        """Central difference in the first entry."""
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.view(-1)[0].add_(sign * step)
                ends.append(float(of(values()).sum()))
                parameter.view(-1)[0].sub_(sign * step)
        return (ends[0] - ends[1]) / (2 * step)

    found, _ = model.learning(u, way, noise, None)
    assert torch.allclose(found, values(), rtol=1e-12)
    found.sum().backward()
    for parameter in (schedule.gamma_0, schedule.raw_span):
        assert float(parameter.grad.view(-1)[0]) == pytest.approx(slope(parameter, lambda v: v), rel=1e-5)
    for parameter in (schedule.raw_weights, schedule.raw_slopes, schedule.centres):
        gradient = float(parameter.grad.view(-1)[0])
        assert gradient == pytest.approx(slope(parameter, torch.square), rel=1e-5)
        assert gradient != pytest.approx(slope(parameter, lambda v: v), rel=1e-2)  # the plain gradient is another
    plain = Diffusion(2, schedule="learned", timesteps=None, standardise=False, hidden=(8,), prediction="v").double()
    plain.load_state_dict(program.state_dict())
    rate = -plain.model.schedule.log_snr_rate(way).detach()
    level = plain.model.schedule.log_snr(way).detach()
    plain.model.integrand(u, way.detach(), noise, None, level, rate)[0].sum().backward()
    for (name, mine), theirs in zip(model.net.named_parameters(), plain.model.net.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(mine.grad, theirs.grad, rtol=1e-8, atol=1e-10), name  # held in the second part
