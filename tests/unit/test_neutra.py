"""Bijections as transforms of torch.distributions, and neural transport with them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

import pyro_gen as pg
from pyro_gen.guides import NeuTra, TorchTransform
from pyro_gen.transforms import Bijection, Inverse
from pyro_gen.transforms.stacks import stack

SPREAD = 2.0  # standard deviation of the funnel's v
WIDTH = 3  # numbers whose scale is exp(v / 2)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        pyro.set_rng_seed(0)
        yield


def flow(features: int = 3, context: int = 0) -> Bijection:
    return Inverse(stack("spline_autoregressive", features, 2, (8,), context, "sampling")).double()


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, SPREAD))
    pyro.sample("x", dist.Normal(torch.zeros(WIDTH), (v / 2).exp().unsqueeze(-1)).to_event(1))


# ------------------------------------------------------------------------------------------------------- the transform
def test_transform_is_the_bijection() -> None:
    f = flow()
    transform, x = TorchTransform(f), torch.randn(5, 3).double()
    y = transform(x)
    torch.testing.assert_close(y, f(x)[0])
    torch.testing.assert_close(transform.inv(y.clone()), x)
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v: f(v)[0], x[row])
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, y)[row], expected)
        torch.testing.assert_close(transform.inv.log_abs_det_jacobian(y, x)[row], -expected)
    assert transform.domain.event_dim == transform.codomain.event_dim == 1
    assert transform.forward_shape((5, 3)) == transform.inverse_shape((5, 3)) == (5, 3)


def test_value_and_determinant_take_one_pass() -> None:
    f = flow()
    transform, x = TorchTransform(f), torch.randn(5, 3).double()
    calls: list[str] = []
    f.register_forward_hook(lambda *_: calls.append("forward"))
    y = transform(x)
    transform.log_abs_det_jacobian(x, y)
    assert transform.inv(y) is x
    assert calls == ["forward"]
    transform.log_abs_det_jacobian(x.clone(), y)
    assert len(calls) == 2


def updated(f: Any, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        f.bijection.parts[0].log_diagonal.add_(0.5)


def replaced(f: Any, x: Tensor, y: Tensor) -> None:
    part = f.bijection.parts[0]
    part.log_diagonal = torch.nn.Parameter(part.log_diagonal.detach() + 0.5)


def written(f: Any, x: Tensor, y: Tensor) -> None:
    x.add_(0.5)


@pytest.mark.parametrize("change", [updated, replaced, written])
def test_nothing_stale(change: Callable[[Any, Tensor, Tensor], None]) -> None:
    """After a change the answer is that of now: what a cache by the identity of x and y would not give."""
    f = flow()
    transform, x = TorchTransform(f), torch.randn(5, 3).double()
    y = transform(x)
    before = transform.log_abs_det_jacobian(x, y)
    change(f, x, y)
    after = transform.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(after, f(x)[1])
    assert not torch.allclose(after, before)
    if change is not written:
        torch.testing.assert_close(transform.inv(y), f.inverse(y)[0])
        assert not torch.allclose(transform.inv(y), x)


def test_a_gradient_is_not_lost() -> None:
    f = flow()
    transform, x = TorchTransform(f), torch.randn(5, 3).double()
    with torch.no_grad():
        y = transform(x)
    assert not y.requires_grad
    assert transform.log_abs_det_jacobian(x, y).requires_grad


def test_copies_of_a_transform_in_use() -> None:
    transform, x = TorchTransform(flow()), torch.randn(5, 3).double()
    y = transform(x)
    transform.log_abs_det_jacobian(x, y)
    for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        torch.testing.assert_close(other(x), y)
        assert len(list(other.parameters())) == len(list(transform.parameters()))


def test_transformed_distribution_is_the_flow_distribution() -> None:
    f = flow()
    base = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    d = dist.TransformedDistribution(base, [TorchTransform(f)])
    own = pg.distributions.flow.FlowDistribution(Inverse(f), base)
    x = d.rsample((6,))
    torch.testing.assert_close(d.log_prob(x), own.log_prob(x))
    torch.testing.assert_close(d.log_prob(x.clone()), own.log_prob(x))
    assert d.expand((2,)).rsample().shape == (2, 3)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [(torch.nn.Linear(2, 2), TypeError, "must be a Bijection"), (flow(3, 2), ValueError, "takes a context of 2")],
)
def test_what_is_no_transform(given: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        TorchTransform(given)


# ----------------------------------------------------------------------------------------------------------- the guide
def plated(x: Tensor) -> None:
    one = x.new_ones(())
    scale = pyro.sample("scale", dist.Gamma(2 * one, one))
    with pyro.plate("groups", 4):
        share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(share.sum(), scale), obs=x)


@pytest.mark.parametrize("transform", ["affine_autoregressive", "spline_coupling", "linear"])
@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_guides_of_pyro_take_it(transform: Any, local: bool) -> None:
    x = torch.randn(6).double() if local else torch.randn(6)
    with pyro.settings.context(module_local_params=local):
        guide = NeuTra(plated, transform, hidden=(8,))
        module = pg.ELBO()(plated, guide)
        module.prepare(x)
        module(x).backward()
        assert all(p.grad is not None for p in guide.parameters())
        svi = SVI(plated, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        before = [p.detach().clone() for p in guide.parameters()]
        svi.step(x)
        moved = [not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True)]
        assert all(moved)
    found = guide.transport(torch.zeros(5, 2, guide.latent_dim, dtype=x.dtype))
    assert found["scale"].shape == (5, 2)
    assert found["share"].shape == (5, 2, 4, 3)
    assert bool((found["scale"] > 0).all())
    torch.testing.assert_close(found["share"].sum(-1), torch.ones(5, 2, 4, dtype=x.dtype))
    assert Predictive(plated, guide=guide, num_samples=3)(x)["share"].shape[0] == 3


def test_the_new_coordinates_change_no_density() -> None:
    """log p~(z) = log p(T(z)) + log|det dT/dz|, by autograd; with a guide through the adapter alone as well."""

    def build(features: int) -> TorchTransform:
        return TorchTransform(Inverse(stack("affine_autoregressive", features, 2, (8,), direction="sampling")))

    for guide in (NeuTra(funnel, "spline_autoregressive", hidden=(8,)), AutoNormalizingFlow(funnel, build)):
        guide()
        model = NeuTraReparam(guide).reparam(funnel)
        z = torch.randn(WIDTH + 1)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        trace = pyro.poutine.trace(pyro.poutine.condition(model, {"v_shared_latent": z})).get_trace()
        theta = guide.transform(z)
        names = list(guide.prototype_trace.nodes)
        v, x = (theta[0], theta[1:]) if names.index("v") < names.index("x") else (theta[-1], theta[:-1])
        jacobian = torch.autograd.functional.jacobian(guide.transform, z)
        direct = dist.Normal(0.0, SPREAD).log_prob(v) + dist.Normal(0.0, (v / 2).exp()).log_prob(x).sum()
        torch.testing.assert_close(trace.log_prob_sum(), direct + torch.linalg.slogdet(jacobian).logabsdet)


def test_what_is_refused() -> None:
    guide = NeuTra(funnel, hidden=(8,))
    with pytest.raises(ValueError, match="has not been fitted"):
        guide.reparam(funnel)
    with pytest.raises(ValueError, match="has not been fitted"):
        guide.transport(torch.zeros(4))
    guide()
    with pytest.raises(ValueError, match=r"z must be a tensor of shape \(..., 4\)"):
        guide.transport(torch.zeros(3))
    for arguments, error, said in (
        ({"model": pg.VAE(3)}, TypeError, "model must be a Pyro callable"),
        ({"transform": "glow"}, ValueError, "transform must be"),
        ({"layers": 0}, ValueError, "layers must be an int"),
        ({"hidden": 8}, ValueError, "hidden must be a sequence"),
    ):
        with pytest.raises(error, match=said):
            NeuTra(**{"model": funnel, **arguments})


def test_a_single_latent_and_copies() -> None:
    def one() -> None:
        pyro.sample("v", dist.Normal(0.0, 1.0))

    guide = NeuTra(one, "spline_coupling", hidden=(8,))
    assert guide()["v"].shape == ()
    again = copy.deepcopy(guide)
    z = torch.randn(5, 1)
    torch.testing.assert_close(again.transport(z)["v"], guide.transport(z)["v"])
    assert isinstance(pickle.loads(pickle.dumps(again)), NeuTra)


# --------------------------------------------------------------------------------------------------------- the funnel
def sampled(model: Callable[..., Any]) -> tuple[dict[str, Tensor], int]:
    """Draws of NUTS, and how many trajectories diverged."""
    pyro.set_rng_seed(1)
    chain = MCMC(NUTS(model, max_tree_depth=6), num_samples=300, warmup_steps=150, disable_progbar=True)
    chain.run()
    return chain.get_samples(), len(chain.diagnostics()["divergences"]["chain 0"])


def fitted() -> NeuTra:
    guide = NeuTra(funnel, hidden=(16,))
    loss = pg.ELBO(64, vectorize_particles=True)(funnel, guide)
    loss.prepare()
    steps = 600
    optimizer = torch.optim.Adam(guide.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return guide.requires_grad_(False)


@pytest.mark.slow
def test_the_funnel() -> None:
    """Along the flow, moments of v within 4 standard errors; without it, divergences and a chain that hardly moves."""
    guide = fitted()
    draws, diverged = sampled(guide.reparam(funnel))
    (z,) = draws.values()
    v = guide.transport(z)["v"].double().numpy()[None]
    size = float(az.ess(v))
    assert size > 100
    assert abs(v.mean()) < 4 * float(az.mcse(v))
    assert abs((v**2).mean() - SPREAD**2) < 4 * float(az.mcse(v**2))
    assert np.abs(v).max() > 2 * SPREAD  # 300 draws of a normal that stay inside have probability 1e-6
    plain, plainly = sampled(funnel)
    assert diverged < plainly
    assert size > 3 * float(az.ess(plain["v"].double().numpy()[None]))
