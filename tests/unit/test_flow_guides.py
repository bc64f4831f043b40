"""Guides of flows for any Pyro program: what they draw, its density row by row, and what they refuse."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

import pyro_gen as pg
from pyro_gen import handlers
from pyro_gen.guides import AmortizedFlow, ConditionalFlow, Located, centre
from pyro_gen.transforms import Compose, LUMixing
from pyro_gen.transforms.stacks import stack

SMALL: dict[str, Any] = {"layers": 1, "hidden": (6,)}
ROWS = 5


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=[False, True], ids=["global", "local"])
def local(request: pytest.FixtureRequest) -> Iterator[bool]:
    with pyro.settings.context(module_local_params=request.param):
        yield request.param


# ------------------------------------------------------------------------------------------------------------- programs
def supports(x: Tensor) -> None:
    """Latents of a row on the line, the half-line, the unit interval, an interval and the simplex."""
    one = x.new_ones(())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0 * one, one).expand([2]).to_event(1))
        rate = pyro.sample("rate", dist.Gamma(2 * one, one))
        share = pyro.sample("share", dist.Beta(2 * one, one))
        wide = pyro.sample("wide", dist.Uniform(-2 * one, 3 * one))
        parts = pyro.sample("parts", dist.Dirichlet(x.new_ones(3)))
        loc = z.sum(-1) + rate.log() + share + wide + parts[..., 0]
        pyro.sample("x", dist.Normal(loc.unsqueeze(-1), one).expand([*loc.shape, 3]).to_event(1), obs=x)


def nested(x: Tensor) -> None:
    """Plates in front of and behind the data plate, and latents of all rows, one of them in a plate of its own."""
    one = x.new_ones(())
    loc = pyro.sample("loc", dist.Normal(0 * one, one))
    parts = pyro.plate("parts", 4, dim=-1)
    with parts:
        scale = pyro.sample("scale", dist.LogNormal(0 * one, one))
    with pyro.plate("data", len(x), dim=-2):
        a = pyro.sample("a", dist.Normal(loc, one))
        with parts:
            b = pyro.sample("b", dist.Normal(a, scale))
        with pyro.plate("copies", 2, dim=-3):
            c = pyro.sample("c", dist.Normal(a, one))
        mean = (a + b.mean(-1, keepdim=True) + c.sum(-3, keepdim=True)).unsqueeze(-1)
        pyro.sample("x", dist.Normal(mean, one).expand([*mean.shape[:-1], 3]).to_event(1), obs=x[:, None])


def hierarchy(x: Tensor) -> None:
    one = x.new_ones(())
    loc = pyro.sample("loc", dist.Normal(0 * one, one).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, one).to_event(1))
        pyro.sample("x", dist.Normal(z, one).to_event(1), obs=x)


def simple(x: Tensor) -> None:
    one = x.new_ones(())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0 * one, one).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(z, one).to_event(1), obs=x)


PROGRAMS: dict[str, Callable[[Tensor], None]] = {
    "supports": supports, "nested": nested, "hierarchy": hierarchy, "simple": simple
}  # fmt: skip
LOCAL = ("supports", "simple")


def data(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))


# ------------------------------------------------------------------------------------------------------ the flow itself
def test_located_flow_against_autograd() -> None:
    f = Located(stack("spline_autoregressive", 3, 2, (8,), 4, "sampling")).double()
    x, context = torch.randn(5, 3).double(), torch.randn(5, 10).double()
    y, ladj = f(x, context)
    back, back_ladj = f.inverse(y, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(back_ladj, -ladj)
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v, r=row: f(v, context[r])[0], x[row])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, ladj[row])


def test_a_linear_flow_is_the_normal_it_says() -> None:
    flow = ConditionalFlow(2, "linear").double()
    raw = torch.tensor([[1.0, -2.0, 0.3, -0.4]]).double()
    core: Any = flow.bijection.core
    assert isinstance(core, Compose)
    assert isinstance(core.parts[0], LUMixing)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    q = flow(raw)
    noise = torch.eye(2).double()
    origin = core.inverse(torch.zeros(2).double())[0]
    matrix = (core.inverse(noise)[0] - origin).T  # columns: the images of the unit vectors
    spread = torch.diag(raw[0, 2:].exp()) @ matrix
    loc = raw[0, :2] + raw[0, 2:].exp() * origin
    normal = dist.MultivariateNormal(loc, spread @ spread.T)
    z = torch.randn(7, 1, 2).double()
    torch.testing.assert_close(q.log_prob(z), normal.log_prob(z))
    torch.testing.assert_close(centre(q)[0], loc)


def test_a_draw_and_its_density_take_one_pass() -> None:
    """No layer goes feature by feature, in either pass of the bound; a replayed draw has the same density."""
    flow = ConditionalFlow(4, hidden=(8,), context_features=3).double()
    raw = torch.randn(6, flow.outputs).double()

    def refuse(*args: Any) -> None:
        raise AssertionError("feature by feature")

    q = flow(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_gen.transforms.autoregressive.MaskedAutoregressive._stepwise", refuse)
        z = pyro.sample("z", q)
        kept = q.log_prob(z)
        with pytest.raises(AssertionError, match="feature by feature"):
            q.log_prob(z.clone())
    torch.testing.assert_close(q.log_prob(z.clone()), kept)


# -------------------------------------------------------------------------------------------------------- what is drawn
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("particles", [None, 4])
def test_sites_and_densities(name: str, particles: int | None) -> None:
    """Values on the support and of the model's shape; each row's density is that of u over the Jacobian of T."""
    model, x = PROGRAMS[name], data().double()
    guide = AmortizedFlow(model, **SMALL)
    guide(x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    shape, _ = handlers.structure(model, guide, x)
    handlers.check_pair(shape)
    assert shape.reparameterized
    pair: list[Any] = [model, guide]
    if particles:
        pair = handlers.with_particles(particles, shape.plate_nesting, *pair)
    q, p = handlers.pair_traces(*pair, x)
    latents = [n for n, s in p.nodes.items() if s["type"] == "sample" and handlers.site_kind(s) == "latent"]
    free = handlers.sample_sites(poutine.trace(pair[0]).get_trace(x))
    total, jacobian = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for site in latents:
        fn, value = p.nodes[site]["fn"], q.nodes[site]["value"]
        event = free[site]["fn"].event_shape
        assert value.shape[value.dim() - len(event) :] == event
        assert value.expand(free[site]["value"].shape).shape == free[site]["value"].shape
        assert bool(fn.support.check(value).all())
        total = total + q.nodes[site]["fn"].log_prob(value).sum()
        transform = biject_to(constraints.independent(fn.support, 0) if fn.event_dim == 0 else fn.support)
        u = transform.inv(value)
        flat = u.reshape(-1).detach().requires_grad_()
        if u.numel() == value.numel():  # elementwise: the derivative of each number
            (slope,) = torch.autograd.grad(transform(flat.reshape(u.shape)).sum(), flat)
            jacobian = jacobian + slope.abs().log().sum()
        else:
            jacobian = jacobian + transform.log_abs_det_jacobian(u, value).sum()
    torch.testing.assert_close(total, -jacobian)
    torch.testing.assert_close(
        handlers.sample_sites(q)["_flow_rows"]["fn"].batch_shape.numel(), ROWS * (particles or 1)
    )
    if name in LOCAL:
        weight = handlers.log_weight(model, guide, x, particles=particles)
        assert weight.shape == ((ROWS,) if particles is None else (particles, ROWS))


@pytest.mark.parametrize("name", PROGRAMS)
def test_rows_keep_to_themselves(name: str) -> None:
    """The draw of a row moves with that row's data alone, in the row's own place of every site."""
    model, x = PROGRAMS[name], data().double()
    guide = AmortizedFlow(model, **SMALL)
    guide(x)
    other = x.clone()
    other[2] += 1
    torch.manual_seed(1)
    before = guide(x)
    torch.manual_seed(1)
    after = guide(other)
    where = {"nested": -2}.get(name, -1)
    sites = poutine.trace(guide).get_trace(x).nodes
    for site, value in before.items():
        moved = (value != after[site]).double()
        plates = {f.name for f in sites[site]["cond_indep_stack"]}
        if "data" not in plates:
            assert not moved.any()
            continue
        dim = where - sites[site]["fn"].event_dim
        moved = moved.movedim(dim, 0).reshape(ROWS, -1).any(1)
        assert moved.tolist() == [i == 2 for i in range(ROWS)]


def test_the_latents_of_all_rows_reach_the_flow_of_a_row() -> None:
    x = data()
    guide = AmortizedFlow(hierarchy, **SMALL)
    guide(x)
    assert guide.network is not None
    given = guide._raw(x, torch.zeros(3), -1), guide._raw(x, torch.ones(3), -1)
    assert (given[0] != given[1]).any(-1).all()
    assert guide._raw(x, torch.zeros(4, 1, 3), -1).shape[:2] == (4, ROWS)


# ---------------------------------------------------------------------------------------------------- how it is trained
@pytest.mark.parametrize("name", PROGRAMS)
def test_stock_svi_trains_it(name: str, local: bool) -> None:
    model, x = PROGRAMS[name], data(16)
    guide = AmortizedFlow(model, **SMALL)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x)
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    for _ in range(3):
        svi.step(x)
    still = [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]
    assert not still
    assert len(before) > 5


OBJECTIVES: dict[str, Any] = {
    "elbo": pg.ELBO(),
    "elbo kl": pg.ELBO(analytic_kl=True),
    "elbo at once": pg.ELBO(3, vectorize_particles=True),
    "iwae": pg.IWAE(3, vectorize_particles=False),
    "dreg": pg.IWAE(3, gradient="dreg", vectorize_particles=False),
    "stl": pg.IWAE(3, gradient="stl", vectorize_particles=False),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_bound_trains_it(name: str, objective: str, local: bool) -> None:
    model, x = PROGRAMS[name], data()
    module = OBJECTIVES[objective](model, AmortizedFlow(model, **SMALL))
    module.prepare(x)
    assert module.trainable()
    module(x).backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("gradient", ["iwae", "dreg", "stl"])
def test_vectorised_importance_weights(gradient: Any) -> None:
    module = pg.IWAE(3, gradient=gradient)(supports, AmortizedFlow(supports, **SMALL))
    x = data()
    module(x).backward()
    assert module.pointwise(x).shape == (ROWS,)


def test_the_bound_is_pyros() -> None:
    """At one seed, the value and gradients of Pyro's own loss."""
    x = data()
    guide = AmortizedFlow(nested, **SMALL)
    module = pg.ELBO()(nested, guide)
    module.prepare(x)
    found = []
    for loss in (module, lambda *batch: Trace_ELBO().differentiable_loss(nested, guide, *batch)):
        torch.manual_seed(5)
        value = loss(x)
        grads = torch.autograd.grad(value, list(guide.parameters()), allow_unused=True)
        found.append([value, *(torch.zeros(()) if g is None else g for g in grads)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", ["dreg", "stl"])
def test_path_gradients_vanish_at_the_posterior(gradient: Any) -> None:
    """At q = p(z | x) the path gradients are 0 for every draw, those of the plain bound are not."""
    x = data().double()
    guide = AmortizedFlow(simple, "linear", hidden=())
    guide(x)
    network: Any = guide.network
    flow: Any = guide.rows
    with torch.no_grad():  # z | x ~ N(x / 2, I / 2)
        for parameter in flow.parameters():
            parameter.zero_()
        layer = network.layers[-1]
        layer.weight.zero_()
        layer.weight[:3] = 0.5 * torch.eye(3)
        layer.bias.zero_()
        layer.bias[3:] = math.log(0.5) / 2
    assert torch.allclose(centre(flow(network(x))), x / 2)
    weights = list(network.parameters())
    quiet = torch.autograd.grad(pg.IWAE(4, gradient=gradient)(simple, guide)(x), weights)
    assert max(float(g.abs().max()) for g in quiet) < 1e-10
    loud = torch.autograd.grad(pg.IWAE(4)(simple, guide)(x), weights)
    assert max(float(g.abs().max()) for g in loud) > 1e-3


def test_every_number_of_rows(local: bool) -> None:
    guide = AmortizedFlow(hierarchy, **SMALL)
    module = pg.ELBO()(hierarchy, guide)
    for rows in (ROWS, 1, 7, ROWS):
        assert torch.isfinite(module(data(rows), total=70))
    pg.fit(module, data(70), steps=3, batch_size=16, seed=0, progress=False)


def subsampled(rows: int, draw: bool) -> Callable[..., None]:
    """A model of 40 rows: its plate takes ``rows`` of them from the data, or stands for a batch of so many."""

    def model(x: Tensor) -> None:
        one = x.new_ones(())
        with pyro.plate("data", 40, subsample_size=rows if draw else len(x)) as index:
            given = x[index] if draw else x
            z = pyro.sample("z", dist.Normal(0 * one, one).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(z, one).to_event(1), obs=given)

    return model


@pytest.mark.parametrize("draw", [True, False], ids=["the plate draws rows", "the batch is the sample"])
def test_subsampling_plates(draw: bool, local: bool) -> None:
    """The row of the guide is the row of the model, and both count 40 / rows."""
    model, x = subsampled(8, draw), data(40)
    guide = AmortizedFlow(model, **SMALL)
    given = x if draw else x[:8]
    q, p = handlers.pair_traces(model, guide, given)
    for name in ("_flow_rows", "z"):
        assert q.nodes[name]["scale"] == 5
    assert p.nodes["z"]["scale"] == 5
    q.compute_log_prob()
    p.compute_log_prob()
    seen = p.nodes["x"]["value"]
    assert seen.shape == (8, 3)
    assert guide.rows is not None
    expected = guide.rows(guide._raw(seen, None, -1)).log_prob(q.nodes["_flow_rows"]["value"])
    torch.testing.assert_close(q.nodes["_flow_rows"]["fn"].log_prob(q.nodes["_flow_rows"]["value"]), expected)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(given)
    assert ("data" in q.nodes) is draw
    if not draw:
        whole = pg.ELBO()(model, guide)
        assert torch.isfinite(whole(x))
        trace = poutine.trace(guide).get_trace(x)
        assert trace.nodes["z"]["scale"] == 1


def test_predictive_and_evidence() -> None:
    x = data()
    guide = AmortizedFlow(hierarchy, **SMALL)
    guide(x)
    for parallel in (False, True):
        found = Predictive(hierarchy, guide=guide, num_samples=6, parallel=parallel)(x)
        assert found["z"].reshape(6, ROWS, 3).shape == (6, ROWS, 3)
    program = pg.Bounded(supports, AmortizedFlow(supports, **SMALL), 3)
    assert program.lower_bound(x, particles=3).shape == (ROWS,)
    assert torch.isfinite(pg.log_evidence(program, x, method=pg.ImportanceSampling(20, seed=0)).value).all()
    assert "parts" in pg.to_inference_data(program, x, draws=7)["latent"]


# ----------------------------------------------------------------------------------------------- copies, dtype, batches
def test_copies_and_state(local: bool) -> None:
    x = data()
    guide = AmortizedFlow(nested, **SMALL)
    pg.ELBO()(nested, guide)(x).backward()
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    again = AmortizedFlow(nested, **SMALL)
    again(x)
    again.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    for other in (copy.deepcopy(guide), again):
        torch.manual_seed(3)
        first = guide(x)
        torch.manual_seed(3)
        second = other(x)
        torch.testing.assert_close(first, second)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in guide.parameters()}
    assert not list(AmortizedFlow(nested, **SMALL).parameters())
    early = copy.deepcopy(AmortizedFlow(nested, **SMALL))
    assert set(early(x)) == set(guide(x))


def test_dtype_and_generators() -> None:
    guide = AmortizedFlow(supports, **SMALL)
    guide(data().double())
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    guide.float()
    assert {v.dtype for v in guide(data()).values()} == {torch.float32}
    torch.manual_seed(2)
    first = guide(data(6))  # looks at the model, as it has not seen six rows
    torch.manual_seed(2)
    torch.testing.assert_close(first, guide(data(6)), rtol=0, atol=0)


def test_what_is_read_of_a_batch() -> None:
    def model(x: Tensor, c: Tensor, label: Tensor, steps: int = 3, *, extra: Tensor) -> None:
        simple(x)

    x, c, label = data(), torch.randn(ROWS, 2, 2), torch.arange(ROWS)
    guide = AmortizedFlow(model, **SMALL)
    guide(x, c, label, extra=torch.ones(ROWS))
    assert guide._reads == ((0, 3), (1, 4), ("extra", 1))
    with pytest.raises(ValueError, match="argument 1 of the batch had one entry a row"):
        guide(x, c[:2], label, extra=torch.ones(ROWS))
    with pytest.raises(ValueError, match="argument 1 of the batch has 6 numbers a row, and had 4"):
        guide(x, torch.ones(ROWS, 6), label, extra=torch.ones(ROWS))
    net = nn.Linear(1, 4)

    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, c: Tensor, label: Tensor, **rest: Any) -> Tensor:
            return torch.cat([x, net(label.float()[:, None])], -1)

    guide = AmortizedFlow(model, embedding=Labels(), **SMALL)
    guide(x, c, label, extra=torch.ones(ROWS))["z"].sum().backward()
    assert net.weight.grad is not None
    assert "embedding.net.weight" in guide.state_dict()
    with pytest.raises(ValueError, match=r"embedding must give a tensor of shape \(5, features\), got \(5,\)"):
        AmortizedFlow(model, embedding=lambda *_, **__: torch.ones(ROWS))(x, c, label, extra=x)


def test_priors_that_are_improper_and_matrices() -> None:
    def model(x: Tensor) -> None:
        tril = pyro.sample("tril", dist.LKJCholesky(3, x.new_ones(())))
        with pyro.plate("data", len(x)):
            shift = pyro.sample("shift", dist.ImproperUniform(constraints.real, torch.Size(), torch.Size()))
            z = pyro.sample("z", dist.MultivariateNormal(x.new_zeros(3), scale_tril=tril))
            pyro.sample("x", dist.Normal(z + shift[..., None], x.new_ones(3)).to_event(1), obs=x)

    x, guide = data(), AmortizedFlow(model, **SMALL)
    loss = Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1)
    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss).step(x))
    found = guide(x)
    assert found["shift"].shape == (ROWS,)
    torch.testing.assert_close((found["tril"] @ found["tril"].T).diagonal(), torch.ones(3))


# ------------------------------------------------------------------------------------------------------ what is refused
def discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(x.new_ones(2)))
        pyro.sample("x", dist.Normal(k.to(x.dtype)[..., None], x.new_ones(3)).to_event(1), obs=x)


def own_interval(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Uniform(x[:, 0], x[:, 0] + 1))
        pyro.sample("x", dist.Normal(u[..., None], x.new_ones(3)).to_event(1), obs=x)


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.mask(mask=x[:, 0] > 0):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))


def annealed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=0.5):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)


def told(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample=torch.tensor([1, 3])) as index:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z[..., None], x.new_ones(3)).to_event(1), obs=x[index])


def too_long(x: Tensor) -> None:
    with pyro.plate("data", 9):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))


def nothing(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (discrete, "'k' is discrete .* have it summed out, infer=.*enumerate.* marginalised"),
        (own_interval, "'u' has a support of its own in each row"),
        (masked, "'z' is masked inside the model"),
        (annealed, "'z' is scaled by 0.5 inside the model"),
        (told, "'data' is told which rows to take"),
        (too_long, "'data' has 9 entries and the first tensor of the batch 5 rows"),
        (nothing, "no latent site"),
    ],
)
def test_models_it_cannot_guide(model: Callable[[Tensor], None], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AmortizedFlow(model, **SMALL)(data())


def test_a_model_that_changes_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            if len(x) > ROWS:
                pyro.sample("more", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)

    guide = AmortizedFlow(model, **SMALL)
    guide(data())
    with pytest.raises(ValueError, match="static structure"):
        guide(data(7))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"model": 3}, TypeError, "model must be a callable Pyro program"),
        ({"model": pg.VAE(3)}, TypeError, "pass program.model"),
        ({"transform": "glow"}, ValueError, "transform must be"),
        ({"layers": 0}, ValueError, "layers must be an int"),
        ({"hidden": 6}, ValueError, "hidden must be a sequence"),
        ({"embedding": 3}, TypeError, "embedding must be a callable"),
        ({"init_scale": 0.0}, ValueError, "init_scale must be a positive number"),
        ({"context_features": 0}, ValueError, "context_features must be an int"),
        ({"bins": 0}, ValueError, "bins must be an int"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        AmortizedFlow(**{"model": simple, **arguments})


def test_enumerated_sites_are_left_to_the_objective() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            k = pyro.sample("k", dist.Categorical(x.new_ones(2)), infer={"enumerate": "parallel"})
            loc = z + 2 * k.to(x.dtype)
            pyro.sample("x", dist.Normal(loc[..., None], x.new_ones(3)).to_event(1), obs=x)

    module = pg.ELBO()(model, AmortizedFlow(model, **SMALL))
    module(data()).backward()
    assert all(p.grad is not None for p in module.guide.parameters())
