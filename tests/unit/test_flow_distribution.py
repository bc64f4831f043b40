"""A flow as a Pyro distribution: stateless about weights, and at home wherever Pyro takes a distribution.

The defects of other libraries' flows that are listed in the comments are the reason for most of these tests.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.func import functional_call

import pyro_gen as pg
from pyro_gen.distributions.flow import FlowDistribution
from pyro_gen.transforms import Affine, Bijection, Coupling, MaskedAutoregressive, Spline

D = 3
NAMES = [
    "spline_autoregressive", "spline_coupling", "affine_autoregressive", "affine_coupling", "additive_coupling",
    "linear", "sylvester", "block_autoregressive", "continuous",
]  # fmt: skip
SMALL: dict[str, Any] = {"layers": 2, "hidden": (6,)}


@pytest.fixture(autouse=True)
def own_store() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def flow(name: str = "spline_coupling", **options: Any) -> pg.Flow:
    made = pg.Flow(D, name, **{**SMALL, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def normal(*shape: int) -> Any:
    return dist.Normal(torch.zeros(*shape), 1.0).to_event(1)


# ----------------------------------------------------------------------------------------------- draws and densities --
@pytest.mark.parametrize("name", NAMES)
def test_density_of_external_data_and_of_draws_agree(name: str) -> None:
    """Elsewhere six of fourteen transforms know the density of their own draws only."""
    d = flow(name).double().distribution()
    x, joint = d.rsample_and_log_prob((50,))
    assert x.shape == (50, D)
    assert torch.allclose(d.log_prob(x.detach().clone()), joint, atol=1e-4 if name == "continuous" else 1e-8)
    assert d.log_prob(torch.randn(4, D).double()).isfinite().all()


@pytest.mark.parametrize("context_features", [0, 2])
def test_one_pass_for_a_draw_and_its_density(context_features: int) -> None:
    """Drawn and scored at the cost of one pass over the networks; elsewhere it is two."""
    layer = MaskedAutoregressive(Affine(), D, (6,), context_features, direction="sampling")
    passes = []
    for parameter in layer.net.layers:
        parameter.register_forward_hook(lambda *_: passes.append(1))
    context = torch.randn(5, context_features) if context_features else None
    d = FlowDistribution(layer, normal(D), context)
    trace = poutine.trace(lambda: pyro.sample("x", d)).get_trace()
    trace.compute_log_prob()
    assert len(passes) == len(layer.net.layers)
    value = trace.nodes["x"]["value"]
    assert torch.allclose(trace.nodes["x"]["log_prob"], d.log_prob(value.clone()), atol=1e-5)


def test_the_kept_density_is_the_density_for_its_gradient_too() -> None:
    made = flow("affine_autoregressive", direction="sampling").double()
    weights = list(made.parameters())
    d = made.distribution()
    x = d()
    kept = torch.autograd.grad(d.log_prob(x).sum() + x.square().sum(), weights, retain_graph=True)
    with pytest.warns(UserWarning, match="feature by feature"):
        again = torch.autograd.grad(d.log_prob(x * 1).sum() + x.square().sum(), weights)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(kept, again, strict=True))


# ---------------------------------------------------------------------------------------------------- no stale value --
def change_in_place(made: pg.Flow) -> None:
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5)


def take_a_step(made: pg.Flow) -> None:
    optimizer = torch.optim.Adam(made.parameters(), lr=0.5)
    (-made.log_prob(torch.ones(1, D)).sum()).backward()
    optimizer.step()


@pytest.mark.parametrize("change", [change_in_place, take_a_step])
def test_density_follows_the_weights(change: Callable[[pg.Flow], None]) -> None:
    """Elsewhere the same tensor gets the answer of the weights it was first asked with (−31.24 for −138.89)."""
    made = flow()
    d, x = made.distribution(), torch.randn(2, D)
    draw = d()
    before, of_draw = d.log_prob(x).detach(), d.log_prob(draw).detach()
    change(made)
    assert not torch.allclose(d.log_prob(x), before)
    assert not torch.allclose(d.log_prob(draw), of_draw)
    fresh = made.distribution()
    assert torch.equal(d.log_prob(x), fresh.log_prob(x))
    assert torch.equal(d.log_prob(draw), fresh.log_prob(draw))


class Remembers(FlowDistribution):
    """What the others do: the answer is looked up by the identity of the tensor."""

    def log_prob(self, value: Tensor) -> Tensor:
        if not hasattr(self, "seen"):
            self.seen: dict[int, Tensor] = {}
        return self.seen.setdefault(id(value), super().log_prob(value))


def test_a_remembered_density_is_seen() -> None:
    layer = Coupling(Spline(), D, (6,))
    d, x = Remembers(layer, normal(D)), torch.randn(2, D)
    before = d.log_prob(x)
    with torch.no_grad():
        layer.net.layers[-1].bias.add_(1.0)
    assert torch.equal(d.log_prob(x), before)
    assert not torch.allclose(FlowDistribution(layer, normal(D)).log_prob(x), before)


def test_a_draw_that_was_written_to_is_scored_anew() -> None:
    d = flow().distribution()
    with torch.no_grad():
        x = d()
        d.log_prob(x)
        x.mul_(2)
    assert torch.allclose(d.log_prob(x), d.log_prob(x.clone()))
    with torch.no_grad():
        y = d()
    y.requires_grad_()  # the score of a draw made without a graph
    (score,) = torch.autograd.grad(d.log_prob(y).sum(), y)
    assert score.abs().sum() > 0


def test_nothing_is_kept_of_what_is_scored() -> None:
    d = flow().distribution()
    for _ in range(50):
        d.log_prob(d())
    assert sum(isinstance(value, (dict, list)) and len(value) > 20 for value in d.__dict__.values()) == 0


def with_priors(made: pg.Flow) -> nn.Module:
    """Every weight of the flow with a prior: elsewhere a metaclass conflict, or the same density at every draw."""
    to_pyro_module_(made.model)
    for module in list(made.model.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(torch.zeros_like(value), 0.3).to_event(value.dim())
            setattr(module, name, PyroSample(prior))
    return made.model


@pytest.mark.parametrize("name", [n for n in NAMES if n != "continuous"])
def test_weights_with_priors(name: str) -> None:
    model, x = with_priors(flow(name)), torch.randn(4, D)
    totals = []
    for _ in range(3):
        trace = poutine.trace(model).get_trace(x)
        trace.compute_log_prob()
        totals.append(float(trace.nodes["x"]["log_prob"].sum()))
    assert len(set(totals)) == 3
    # the density is that of the weights in the trace: the same when they are replayed
    again = poutine.trace(poutine.replay(model, trace)).get_trace(x)
    again.compute_log_prob()
    assert float(again.nodes["x"]["log_prob"].sum()) == totals[-1]


@pytest.mark.slow
def test_nuts_over_the_weights_of_a_linear_flow() -> None:
    """x ~ N(b, e^{−2s}) by a flow of one feature; the posterior mean of the location is that of the data, nearly."""
    made = pg.Flow(1, "linear", standardise=False)
    model = with_priors(made)
    x = 0.4 + 0.5 * torch.randn(60, 1)
    mcmc = MCMC(NUTS(model), num_samples=200, warmup_steps=150, disable_progbar=True)
    mcmc.run(x)
    draws = mcmc.get_samples()
    upper, scale = (draws[f"bijection.parts.{n}"] for n in ("0.log_diagonal", "1.log_scale"))
    loc, sd = -draws["bijection.parts.1.bias"] * (-upper).exp(), (-upper - scale).exp()
    assert float(loc.mean()) == pytest.approx(float(x.mean()), abs=0.1)
    assert float(sd.mean()) == pytest.approx(float(x.std()), abs=0.15)


def test_substituted_weights_outlive_the_call() -> None:
    """`functional_call` puts weights in place for the call; the trace is scored after it."""
    made, x = flow(), torch.randn(4, D)
    other = {name: p + 0.3 for name, p in made.model.named_parameters()}
    trace = poutine.trace(lambda: functional_call(made.model, other, (x,))).get_trace()
    total = trace.log_prob_sum()
    assert not torch.allclose(total, made.log_prob(x).sum())
    change = {f"model.{name}": value for name, value in other.items()}
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(change[name])
    assert torch.allclose(total, made.log_prob(x).sum(), rtol=1e-5)


def test_full_batch_svi_on_one_tensor() -> None:
    """Elsewhere the second step fails: "Trying to backward through the graph a second time"."""
    made, x = flow("spline_coupling"), torch.randn(20, D)

    def model(x: Tensor) -> None:
        pyro.module("flow", made)
        made.model(x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(10)]
    assert losses[-1] < losses[0]


# --------------------------------------------------------------------------------------------------- vmap and copies --
@pytest.mark.parametrize("name", [n for n in NAMES if n != "continuous"])
def test_vmap_over_weights_and_gradients_of_each_row(name: str) -> None:
    """Elsewhere boolean indexing stops `vmap`."""
    made, x = flow(name), torch.randn(5, D)
    weights = {n: p.detach() for n, p in made.named_parameters()}
    stacked = {n: torch.stack([p, p + 0.2]) for n, p in weights.items()}

    def density(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        class Call(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.flow = made

            def forward(self, x: Tensor) -> Tensor:
                return made.model.distribution().log_prob(x)

        value: Tensor = functional_call(Call(), {f"flow.{n}": w for n, w in weights.items()}, (x,))
        return value

    with pyro.validation_enabled(False):
        both = torch.func.vmap(density, in_dims=(0, None))(stacked, x)
        assert torch.allclose(both[0], made.log_prob(x), atol=1e-4)
        assert not torch.allclose(both[1], both[0])
        one = torch.func.vmap(torch.func.grad(lambda w, r: density(w, r[None]).sum()), in_dims=(None, 0))(weights, x)
        made.zero_grad()
        made.log_prob(x[:1]).sum().backward()
    for n, parameter in made.named_parameters():
        assert torch.allclose(one[n][0], parameter.grad, atol=1e-4 * max(1.0, float(parameter.grad.abs().max())))


@pytest.mark.parametrize("name", NAMES)
def test_copies_after_use(name: str) -> None:
    """Elsewhere a cached tensor stops `deepcopy`."""
    made, x = flow(name), torch.randn(4, D)
    made.log_prob(x).sum().backward()
    d = made.distribution()
    d()
    expected = made.log_prob(x)
    assert torch.equal(copy.deepcopy(made).log_prob(x), expected)
    assert torch.equal(copy.deepcopy(made.distribution()).log_prob(x), expected)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).log_prob(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(made.distribution())).log_prob(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_double_both_ways(name: str) -> None:
    """Elsewhere the inverse builds float32 zeros whatever it is given."""
    made = flow(name).double()
    x = made.sample(4, seed=0)
    assert x.dtype == torch.double
    assert made.log_prob(x).dtype == torch.double


# -------------------------------------------------------------------------------------------- batches, plates, masks --
def test_batch_shapes() -> None:
    made = pg.Flow(D, context_shape=(2, 2), **SMALL)
    d = made.distribution(torch.randn(7, 2, 2))
    assert (d.batch_shape, d.event_shape) == ((7,), (D,))
    assert d.rsample((4,)).shape == (4, 7, D)
    assert d.log_prob(torch.randn(4, 7, D)).shape == (4, 7)
    assert d.log_prob(torch.randn(D)).shape == (7,)
    assert d.expand((5, 7)).sample((2,)).shape == (2, 5, 7, D)
    assert d.to_event(1).log_prob(torch.randn(7, D)).shape == ()
    masked = d.mask(torch.tensor([True] * 3 + [False] * 4)).log_prob(torch.randn(7, D))
    assert bool((masked[3:] == 0).all())
    assert bool((masked[:3] != 0).all())


def test_context_reaches_draws_and_densities_row_by_row() -> None:
    made = pg.Flow(D, context_shape=2, **SMALL)
    context, x = torch.randn(5, 2), torch.randn(5, D)
    whole = made.log_prob(x, context)
    rows = torch.cat([made.log_prob(x[i : i + 1], context[i : i + 1]) for i in range(5)])
    assert torch.allclose(whole, rows, atol=1e-6)
    assert not torch.allclose(made.log_prob(x, context.flip(0)), whole)


def test_images_keep_their_shape() -> None:
    made = pg.Flow((1, 2, 3), **{**SMALL, "hidden": (8,)})
    d = made.distribution()
    assert d.event_shape == (1, 2, 3)
    assert d.sample((4,)).shape == (4, 1, 2, 3)
    assert d.support.event_dim == 3
    assert made.sample(2).shape == (2, 1, 2, 3)


def test_plates_masks_and_scales() -> None:
    made, x = flow(), torch.randn(8, D)
    rows = made.log_prob(x)
    keep = torch.arange(8) < 5

    def model(x: Tensor) -> None:
        with pyro.plate("data", 80, subsample_size=8), poutine.mask(mask=keep):
            pyro.sample("x", made.distribution(), obs=x)

    trace = poutine.trace(model).get_trace(x)
    assert torch.allclose(trace.log_prob_sum(), 10 * rows[:5].sum(), rtol=1e-5)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    """Elsewhere `.sample()` is not implemented, or `Predictive(parallel=True)` fails."""
    made = flow()

    def model() -> None:
        with pyro.plate("rows", 5):
            z = pyro.sample("z", made.distribution())
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0))

    drawn = Predictive(model, num_samples=4, parallel=parallel)()
    assert drawn["z"].shape == (4, 5, D)
    assert drawn["y"].shape == (4, 5)


# --------------------------------------------------------------------------------------- as a prior, under any guide --
def regression(made: pg.Flow) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", made.distribution())
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    return model


@pytest.mark.parametrize(
    "guide",
    [
        AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoDelta,
        AutoLaplaceApproximation, AutoIAFNormal,
    ],
)  # fmt: skip
@pytest.mark.parametrize("support", ["real", "positive", "simplex"])
def test_every_autoguide_takes_it(guide: Any, support: str) -> None:
    """Elsewhere `support` is not implemented, and neither NUTS nor AutoNormal run."""
    if (guide, support) == (AutoIAFNormal, "simplex"):
        pytest.skip("the guide's network of two features warns of its own size")
    model, y = regression(flow(support=support)), torch.randn(6) + 1
    made = guide(model)
    svi = SVI(model, made, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(y) for _ in range(5)]
    assert all(map(math.isfinite, losses))
    assert torch.isfinite(made(y)["z"]).all()


def test_mean_field_elbo_falls_back_to_draws() -> None:
    made = flow()
    model, y = regression(made), torch.randn(6)

    def guide(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))

    assert math.isfinite(TraceMeanField_ELBO().loss(model, guide, y))


@pytest.mark.slow
def test_nuts_samples_the_flow_itself() -> None:
    """A linear flow is N(μ, Σ): NUTS on it as a prior, with no data, gives back its moments."""
    x = torch.randn(400, 2) @ torch.tensor([[1.0, 0.6], [0.0, 0.5]]) + torch.tensor([1.0, -2.0])
    made = pg.Flow(2, "linear")
    pg.fit(pg.MaximumLikelihood()(made), x, steps=300, lr=0.05, schedule="cosine", seed=0, progress=False)

    def model() -> None:
        pyro.sample("z", made.distribution())

    mcmc = MCMC(NUTS(model), num_samples=400, warmup_steps=200, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["z"]
    import arviz as az

    for i in range(2):
        error = float(az.mcse(draws[None, :, i].numpy()))
        assert abs(float(draws[:, i].mean()) - float(x[:, i].mean())) < 4 * error + 0.01


# ---------------------------------------------------------------------------------------------------------- the rest --
def test_constructor_says_what_does_not_fit() -> None:
    layer = Coupling(Spline(), D, (6,), 2)
    with pytest.raises(TypeError, match="bijection must be a Bijection"):
        FlowDistribution(nn.Linear(3, 3), normal(D))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a context of 2 features"):
        FlowDistribution(layer, normal(D))
    with pytest.raises(ValueError, match=r"context must have shape \(\*batch_shape, 2\)"):
        FlowDistribution(layer, normal(D), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"base must have event shape \(3,\)"):
        FlowDistribution(layer, normal(D + 1), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"base must have event shape \(3,\)"):
        FlowDistribution(layer, dist.Normal(torch.zeros(D), 1.0), torch.randn(4, 2))
    with pytest.raises(ValueError, match="event_shape must be"):
        FlowDistribution(layer, normal(D), torch.randn(4, 2), event_shape=(2, 2))


def test_validation_is_not_touched_and_sees_values() -> None:
    """Elsewhere an import switches argument validation off for all of torch."""
    assert torch.distributions.Distribution._validate_args
    with pytest.raises(ValueError, match="within the support"):
        flow(support="unit").distribution().log_prob(torch.tensor([[0.5, 2.0, 0.1]]))
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -1.0)


def test_a_base_without_differentiable_draws_samples_all_the_same() -> None:
    d = flow(base="mixture", components=3).distribution()
    assert not d.has_rsample
    assert d.sample((4,)).shape == (4, D)
    with pytest.raises(NotImplementedError, match="use sample"):
        d.rsample()
    assert poutine.trace(lambda: pyro.sample("z", d)).get_trace().log_prob_sum().isfinite()


def test_every_transform_has_an_inverse_with_its_parameters() -> None:
    """Elsewhere an inverted flow has no parameters, and is trained by nobody."""
    for name in NAMES:
        made = flow(name, direction="sampling")
        names = {n for n, p in made.named_parameters() if p.requires_grad}
        with pyro.poutine.trace(param_only=True) as seen:
            pyro.module("flow", made)
        assert len(seen.trace.param_nodes) == len(names) > 0
        made.sample(2)


def test_two_flows_share_nothing() -> None:
    one, two = flow(), flow()
    assert {p.data_ptr() for p in one.parameters()}.isdisjoint({p.data_ptr() for p in two.parameters()})


def test_bijections_given_by_the_user() -> None:
    class Cube(Bijection):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            x, _ = self.broadcast(x, context)
            return x + x**3, (1 + 3 * x**2).log().sum(-1)

        def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            root = (y / 2 + (y**2 / 4 + 1 / 27).sqrt()).abs()
            x = root.pow(1 / 3) - (root.reciprocal() / 27).pow(1 / 3)
            return x, -(1 + 3 * x**2).log().sum(-1)

    made = pg.Flow(D, Cube(D), standardise=False).double()
    x, joint = made.distribution().rsample_and_log_prob((9,))
    assert torch.allclose(made.log_prob(x), joint, atol=1e-6)
    assert made.config is None
    with pytest.raises(ValueError, match="transform is of 2 features"):
        pg.Flow(D, Cube(2))
