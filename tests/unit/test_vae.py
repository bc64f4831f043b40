"""The VAE: its parts, its options, what it refuses."""

import copy
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

import pyro_gen as pg
from pyro_gen.guides import centre
from pyro_gen.nn import ConvDecoder, ConvEncoder


def test_shapes() -> None:
    vae = pg.VAE(6, latent_dim=3, hidden=(8,))
    x = torch.randn(5, 6)
    q = vae.encode(x)
    assert q.batch_shape == (5,)
    assert q.event_shape == (3,)
    assert vae.decode(torch.randn(2, 5, 3)).batch_shape == (2, 5)
    assert vae.decode(torch.randn(2, 5, 3)).event_shape == (6,)
    assert vae.reconstruct(x).shape == x.shape
    assert vae.sample(4).shape == (4, 6)
    assert vae.lower_bound(x, particles=7).shape == (5,)
    assert vae.prior().event_shape == (3,)


def test_the_program_is_what_it_says() -> None:
    """One draw of the guide: log weight = log p(z) + log p(x | z) - log q(z | x), with the parts of the public API."""
    pyro.set_rng_seed(0)
    vae = pg.VAE(6, 3, "bernoulli", prior="mixture", guide="full_rank", hidden=(8,))
    x = (torch.rand(5, 6) > 0.5).float()
    trace = poutine.trace(vae.guide).get_trace(x)
    z = trace.nodes["z"]["value"]
    replayed = poutine.trace(poutine.replay(vae.model, trace)).get_trace(x)
    joint = vae.prior().log_prob(z) + vae.decode(z).log_prob(x)
    torch.testing.assert_close(replayed.log_prob_sum(), joint.sum())
    torch.testing.assert_close(trace.log_prob_sum(), vae.encode(x).log_prob(z).sum())


def test_full_rank_is_a_normal_with_that_cholesky_factor() -> None:
    given = torch.tensor([[0.1, -0.2, 0.3, 0.7, -0.4]])  # location, then the lower triangle row by row
    vae = pg.VAE(5, 2, encoder=nn.Identity(), guide="full_rank", hidden=(4,))
    q = vae.encode(given)
    tril = torch.tensor([[[torch.tensor(0.3).exp(), 0.0], [0.7, torch.tensor(-0.4).exp()]]])
    torch.testing.assert_close(q.mean, given[:, :2])
    torch.testing.assert_close(q.covariance_matrix, tril @ tril.mT)


def test_analytic_kl_and_sampled_bound_agree() -> None:
    pyro.set_rng_seed(1)
    vae = pg.VAE(6, 2, scale=0.5, hidden=(8,))
    x = torch.randn(4, 6)
    exact = kl_divergence(vae.encode(x), vae.prior().expand((4,)))
    n = 4000
    z = vae.encode(x).sample((n,))
    rows = vae.decode(z).log_prob(x)
    expected, error = (rows.mean(0) - exact).sum(), (rows.var(0) / n).sum().sqrt()
    bound = torch.stack([-pg.ELBO(50, analytic_kl=True, vectorize_particles=True)(vae)(x) for _ in range(20)])
    spread = torch.hypot(error, bound.std() / 20**0.5)
    assert abs(bound.mean() - expected) < 4 * spread
    assert abs(bound.mean() - (expected + exact.sum())) > 4 * spread  # without the KL it would not


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (2, 4, 9)])
def test_conv_networks_take_any_size_and_leading_dimensions(shape: tuple[int, int, int]) -> None:
    event = torch.Size(shape)
    assert ConvEncoder(event, 5)(torch.randn(2, 3, *shape)).shape == (2, 3, 5)
    assert ConvDecoder(4, event, 2)(torch.randn(2, 3, 4)).shape == (2, 3, 2 * shape[0], *shape[1:])
    vae = pg.VAE(shape, 4, encoder="conv", decoder="conv", scale="predicted")
    x = torch.randn(3, *shape)
    assert pg.IWAE(4)(vae)(x).shape == ()
    torch.manual_seed(0)
    together = vae.decode(torch.randn(2, 3, 4)).mean
    torch.manual_seed(0)
    apart = torch.stack([vae.decode(z).mean for z in torch.randn(2, 3, 4)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context_shape", [3, (2, 2)])
def test_context_reaches_both_networks(context_shape: int | tuple[int, ...]) -> None:
    pyro.set_rng_seed(0)
    vae = pg.VAE(6, 2, hidden=(8,), context_shape=context_shape)
    x, c = torch.randn(5, 6), torch.randn(5, *vae.context_shape)
    assert not torch.allclose(vae.encode(x, c).mean, vae.encode(x, c + 1).mean)
    z = torch.randn(5, 2)
    assert not torch.allclose(vae.decode(z, c).mean, vae.decode(z, c + 1).mean)
    assert vae.sample(5, c).shape == (5, 6)
    assert pg.IWAE(3)(vae)(x, c).shape == ()
    pg.fit(pg.ELBO()(vae), (x, c), steps=2, seed=0)
    with pytest.raises(ValueError, match="context is missing"):
        vae.lower_bound(x)
    with pytest.raises(ValueError, match="context must have shape"):
        vae.lower_bound(x, c[..., :1])


def test_context_under_particles_belongs_to_its_row() -> None:
    pyro.set_rng_seed(0)
    vae = pg.VAE(6, 2, hidden=(8,), context_shape=3)
    z, c = torch.randn(4, 5, 2), torch.randn(5, 3)
    for row in range(5):
        torch.testing.assert_close(vae.decode(z, c).mean[:, row], vae.decode(z[:, row], c[row].expand(4, 3)).mean)


@pytest.mark.parametrize(
    "prior",
    [
        dist.StudentT(4.0, torch.zeros(2), torch.ones(2)).to_event(1),
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        "mixture",
    ],
    ids=["student", "full", "mixture"],
)
def test_priors(prior: object) -> None:
    pyro.set_rng_seed(0)
    vae = pg.VAE(6, 2, prior=prior, hidden=(8,))  # type: ignore[arg-type]
    x = torch.randn(50, 6)
    assert vae.prior().log_prob(torch.zeros(3, 2)).shape == (3,)
    pg.fit(pg.ELBO()(vae), x, steps=3, seed=0)
    assert torch.isfinite(vae.lower_bound(x)).all()


FLOWS = {
    "prior": {"prior": "flow"},
    "guide": {"guide": "flow"},
    "both": {"prior": "flow", "guide": "flow"},
    "one latent": {"prior": "flow", "guide": "flow", "latent_dim": 1},
}


@pytest.mark.parametrize("name", FLOWS)
def test_flows_as_prior_and_as_guide(name: str, tmp_path: Path) -> None:
    """The bound is made of their densities, every weight is trained, and JSON and tensors bring it back."""
    pyro.set_rng_seed(0)
    vae = pg.VAE(6, **{"latent_dim": 3, "hidden": (8,), **FLOWS[name]})  # type: ignore[arg-type]
    x = torch.randn(5, 6)
    trace = poutine.trace(vae.guide).get_trace(x)
    z = trace.nodes["z"]["value"]
    replayed = poutine.trace(poutine.replay(vae.model, trace)).get_trace(x)
    torch.testing.assert_close(replayed.log_prob_sum(), (vae.prior().log_prob(z) + vae.decode(z).log_prob(x)).sum())
    torch.testing.assert_close(trace.log_prob_sum(), vae.encode(x).log_prob(z).sum(), rtol=1e-4, atol=1e-4)
    objectives = [pg.ELBO(), pg.ELBO(analytic_kl=True), *(pg.IWAE(3, gradient=g) for g in ("iwae", "dreg", "stl"))]
    for objective in objectives:  # type: ignore[assignment]
        vae.zero_grad()
        objective(vae)(x).backward()
        assert [n for n, p in vae.named_parameters() if p.grad is None] == []
    result = pg.fit(pg.ELBO()(vae), x, steps=2, seed=0, progress=False)
    result.save(tmp_path)
    again = pg.load(tmp_path).program
    assert isinstance(again, pg.VAE)
    torch.manual_seed(1)
    first = vae.lower_bound(x)
    torch.manual_seed(1)
    torch.testing.assert_close(again.lower_bound(x), first)
    assert vae.sample(4).shape == vae.reconstruct(x)[:4].shape == (4, 6)
    torch.testing.assert_close(vae.reconstruct(x), again.reconstruct(x))
    assert torch.isfinite(pg.log_evidence(vae, x, method=pg.ImportanceSampling(10, seed=0)).value).all()
    assert pg.to_inference_data(vae, x, draws=5)["latent"]["z"].shape[1:] == (5, 5, vae.latent_dim)


def test_the_path_gradient_of_a_flow_guide_is_unbiased() -> None:
    """STL at one particle and DReG at three have the mean of the plain gradient, for the weights of the flow too."""
    pyro.set_rng_seed(0)
    vae = pg.VAE(3, 2, guide="flow", hidden=(4,), scale=0.5).double()
    x = torch.randn(1, 3).double().expand(4000, 3)  # so many draws at once, each a row
    weights = list(vae.guide.parameters())

    def gradient(particles: int, kind: str) -> torch.Tensor:
        loss = pg.IWAE(particles, gradient=kind)(vae)  # type: ignore[arg-type]
        rows = [torch.autograd.grad(loss(part), weights) for part in x.split(200)]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]) / 200

    for particles, kind in ((1, "stl"), (3, "dreg")):
        a, b = gradient(particles, "iwae"), gradient(particles, kind)
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt() + 1e-12
        distance = (a.mean(0) - b.mean(0)).abs() / error
        # Student t of 19 degrees of freedom or more: beyond 6 with probability 1e-5, some 500 weights
        assert distance.max() < 6
        assert (a.mean(0).abs() / error).max() > 12  # there is a gradient to be right about


@pytest.mark.parametrize("frozen", [False, True])
def test_a_program_as_prior(frozen: bool) -> None:
    pyro.set_rng_seed(0)
    flow = pg.Flow(2, layers=1, hidden=(5,)).requires_grad_(not frozen)
    vae = pg.VAE(3, 2, prior=flow, hidden=(6,))
    x, z = torch.randn(20, 3), torch.randn(5, 2)
    torch.testing.assert_close(vae.prior().log_prob(z), flow.log_prob(z))
    before = {n: p.detach().clone() for n, p in flow.model.named_parameters()}
    assert {f"model.prior.model.{n}" for n in before} <= set(dict(vae.named_parameters()))
    other = copy.deepcopy(vae)
    pg.fit(pg.ELBO()(vae), x, steps=3, seed=0, progress=False)
    moved = [not torch.equal(p, before[n]) for n, p in flow.model.named_parameters()]
    assert not any(moved) if frozen else all(moved)
    torch.testing.assert_close(vae.prior().log_prob(z), flow.log_prob(z))
    weights = torch.cat([p.flatten() for p in other.model.prior.parameters()])
    torch.testing.assert_close(weights, torch.cat([p.flatten() for p in before.values()]))  # a copy has its own
    assert vae.double().sample(3).dtype == torch.float64
    assert vae.config is None


def test_reconstruction_by_a_flow_is_at_the_centre_of_its_noise() -> None:
    pyro.set_rng_seed(0)
    vae = pg.VAE(3, 1, guide="flow", hidden=(6,))
    x = torch.randn(4, 3)
    # of one feature it is the median, which increasing maps keep; 0.04 is 5 standard errors of a rank
    low, high = vae.encode(x).sample((4001,)).quantile(torch.tensor([0.46, 0.54]), 0)
    shown = centre(vae.encode(x))
    assert bool(((low < shown) & (shown < high)).all())
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(shown).mean)


def test_a_likelihood_of_ones_own() -> None:
    def counts(raw: torch.Tensor) -> dist.TorchDistribution:
        return dist.Poisson(raw.exp()).to_event(1)

    vae = pg.VAE(6, 2, counts, decoder=nn.Linear(2, 6), hidden=(8,))
    x = torch.poisson(torch.full((20, 6), 2.0))
    assert torch.isfinite(pg.IWAE(3)(vae)(x))
    with pytest.raises(ValueError, match="needs a decoder="):
        pg.VAE(6, 2, counts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"event_shape": 0}, "event_shape must be a positive int"),
        ({"event_shape": (2, -1)}, "event_shape must be a positive int"),
        ({"latent_dim": 0}, "latent_dim must be an int of at least 1"),
        ({"likelihood": "poisson"}, "likelihood must be one of"),
        ({"likelihood": 3}, "likelihood must be a name or a callable"),
        ({"guide": "IAF"}, "guide must be 'diagonal', 'full_rank' or 'flow'"),
        ({"prior": "flow", "hidden": (0,)}, "hidden must be an int of at least 1"),
        ({"prior": pg.VAE(2)}, "prior must have a density that is known"),
        ({"prior": pg.Flow(3, layers=1)}, r"prior must have event shape \(2,\) and no context, got a Flow"),
        ({"prior": pg.Flow(2, layers=1, context_shape=1)}, r"and context_shape \(1,\)"),
        ({"prior": "vamp"}, "prior must be 'normal'"),
        ({"prior": dist.Normal(0.0, 1.0)}, "prior must have event shape"),
        ({"prior": dist.Normal(torch.zeros(3), 1.0).to_event(1)}, "prior must have event shape"),
        ({"encoder": "resnet"}, "encoder must be a module"),
        ({"decoder": "conv"}, "needs event_shape"),
        ({"hidden": (0,)}, "hidden must be an int of at least 1"),
        ({"components": 0, "prior": "mixture"}, "components must be an int of at least 1"),
        ({"levels": 17}, "levels= belongs to"),
    ],
)
def test_arguments_are_checked(arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pg.VAE(**{"event_shape": 6, "latent_dim": 2, **arguments})


def test_networks_of_the_wrong_size_are_named() -> None:
    x = torch.randn(5, 6)
    with pytest.raises(ValueError, match="encoder must give 4 numbers a row"):
        pg.ELBO()(pg.VAE(6, 2, encoder=nn.Linear(6, 3)))(x)
    with pytest.raises(ValueError, match="decoder must give 1 x"):
        pg.ELBO()(pg.VAE(6, 2, decoder=nn.Linear(2, 5)))(x)


def test_a_program_is_not_called() -> None:
    with pytest.raises(TypeError, match="VAE is not called itself"):
        pg.VAE(6)(torch.randn(5, 6))  # type: ignore[misc]
