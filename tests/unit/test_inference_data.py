"""To ArviZ: what the groups hold, under both majors. Where ArviZ 0.x is installed, tests show what `from_pyro` does."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import xarray as xr
from pyro.infer import HMC, MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.infer.mcmc.rwkernel import RandomWalkKernel
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_gen.base import Bounded, Exact, Implicit, Unnormalized
from pyro_gen.evidence import ImportanceSampling, log_evidence
from pyro_gen.fitting import fit
from pyro_gen.inference_data import containers, to_inference_data
from pyro_gen.inference_data import draws as drawing
from pyro_gen.inference_data.variables import plain
from pyro_gen.objectives import ELBO
from pyro_gen.programs import VAE

try:
    import arviz as az

    OLD = hasattr(az, "from_pyro")
except ImportError:
    import arviz_stats as az

    OLD = False

old_arviz = pytest.mark.skipif(not OLD, reason="shows what ArviZ 0.x does")

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SCHOOLS = list("ABCDEFGH")


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def eight_schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta_t = pyro.sample("theta_t", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_t)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def mcmc_of(model, samples, *args, **kwargs):
    """An MCMC as its run leaves it, with draws of our choice, (chain, draw, ...): no need to sample for that."""
    chains, draws = next(iter(samples.values())).shape[:2]
    mcmc = MCMC(NUTS(model), num_samples=draws, warmup_steps=7, disable_progbar=True)
    mcmc.num_chains = chains
    mcmc._samples, mcmc._args, mcmc._kwargs = samples, args, kwargs
    mcmc._diagnostics = [{"divergences": [min(c, draws - 1)], "acceptance rate": 0.9 - 0.1 * c} for c in range(chains)]
    return mcmc


def normal_draws(*shape):
    return torch.randn(*shape)


def groups_of(idata):
    return set(idata.groups()) if hasattr(idata, "_groups_all") else set(idata.children)


def train(svi, *args, steps=200):
    for _ in range(steps):
        svi.step(*args)
    return svi


def from_pyro(mcmc, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return az.from_pyro(mcmc, **options), [str(w.message) for w in caught]


def quiet(function, *args, **kwargs):
    """ArviZ warns of k̂ and of one chain; neither is what these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def elpd(result):
    return float(result["elpd_loo"] if OLD else result["elpd"])


@pytest.fixture(scope="module")
def schools():
    pyro.set_rng_seed(1)
    mcmc = MCMC(NUTS(eight_schools, max_tree_depth=6), num_samples=100, warmup_steps=100, disable_progbar=True)
    mcmc.run(SIGMA, Y)
    return mcmc


# ---------------------------------------------------------------------------------------------------------------- MCMC
def test_eight_schools_by_mcmc(schools):
    idata = to_inference_data(schools, (SIGMA, Y), coords={"school": SCHOOLS})
    posterior = idata["posterior"]
    assert dict(posterior.sizes) == {"chain": 1, "draw": 100, "school": 8}
    assert posterior["theta_t"].dims == ("chain", "draw", "school")
    assert list(posterior["theta"].coords["school"].values) == SCHOOLS
    assert posterior["theta"].attrs["deterministic"] == 1
    assert "deterministic" not in posterior["mu"].attrs
    assert set(idata["observed_data"].data_vars) == set(idata["log_likelihood"].data_vars) == {"y"}
    assert idata["constant_data"]["sigma"].dims == ("school",)
    assert set(idata["sample_stats"].data_vars) == {"lp", "diverging"}
    assert idata["sample_stats"]["diverging"].dtype == bool
    # closed forms, from the draws alone
    mu, tau, theta_t = (torch.as_tensor(posterior[n].values) for n in ("mu", "tau", "theta_t"))
    theta = mu[..., None] + tau[..., None] * theta_t
    pointwise = dist.Normal(theta, SIGMA).log_prob(Y)
    torch.testing.assert_close(torch.as_tensor(posterior["theta"].values), theta)
    torch.testing.assert_close(torch.as_tensor(idata["log_likelihood"]["y"].values), pointwise)
    lp = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau)
    lp = lp + dist.Normal(0.0, 1.0).log_prob(theta_t).sum(-1) + pointwise.sum(-1)
    torch.testing.assert_close(torch.as_tensor(idata["sample_stats"]["lp"].values).float(), lp)
    assert idata["log_likelihood"]["y"].attrs["likelihood_kind"] == "conditional"
    table = quiet(az.summary, idata)
    assert "theta[A]" in table.index
    assert -36 < elpd(quiet(az.loo, idata)) < -27  # reference -30.8, its standard error 1.4


def test_mcmc_knows_its_data(schools):
    given, known = to_inference_data(schools, (SIGMA, Y)), to_inference_data(schools)
    np.testing.assert_array_equal(given["log_likelihood"]["y"].values, known["log_likelihood"]["y"].values)
    by_name = to_inference_data(schools, {"sigma": SIGMA, "y": Y})
    np.testing.assert_array_equal(given["log_likelihood"]["y"].values, by_name["log_likelihood"]["y"].values)


@old_arviz
def test_from_pyro_loses_plates_and_takes_deterministics_for_data(schools):
    theirs, _ = from_pyro(schools)
    assert theirs.posterior["theta_t"].dims == ("chain", "draw", "theta_t_dim_0")
    assert "theta" not in theirs.posterior
    assert "theta" in theirs.observed_data
    assert set(theirs.sample_stats.data_vars) == {"diverging"}
    with pytest.raises(TypeError, match="several log likelihood"):
        az.loo(theirs)


def test_chains_of_one_run_and_of_several(monkeypatch):
    monkeypatch.setattr("torch.multiprocessing.cpu_count", lambda: 1)
    with pytest.warns(UserWarning, match="sequentially"):
        mcmc = MCMC(HMC(eight_schools, num_steps=2), num_samples=6, warmup_steps=4, num_chains=2, disable_progbar=True)
    mcmc.run(SIGMA, Y)
    idata = to_inference_data(mcmc)
    assert idata["posterior"].sizes["chain"] == idata["sample_stats"].sizes["chain"] == 2
    samples = mcmc.get_samples(group_by_chain=True)
    np.testing.assert_array_equal(idata["posterior"]["theta_t"].values, samples["theta_t"].numpy())
    assert len(idata["sample_stats"].attrs["acceptance_rate"]) == 2
    both = to_inference_data([mcmc, mcmc])
    assert both["log_likelihood"]["y"].shape == (4, 6, 8)


def test_divergences_stand_where_they_happened():
    mcmc = mcmc_of(
        eight_schools,
        {"mu": normal_draws(11, 20), "tau": torch.rand(11, 20), "theta_t": normal_draws(11, 20, 8)},
        SIGMA,
        Y,
    )
    diverging = to_inference_data(mcmc)["sample_stats"]["diverging"].values
    assert [list(np.flatnonzero(chain)) for chain in diverging] == [[c] for c in range(11)]


@old_arviz
def test_from_pyro_sorts_chains_as_words():
    mcmc = mcmc_of(
        eight_schools,
        {"mu": normal_draws(11, 20), "tau": torch.rand(11, 20), "theta_t": normal_draws(11, 20, 8)},
        SIGMA,
        Y,
    )
    diverging = from_pyro(mcmc, log_likelihood=False)[0].sample_stats["diverging"].values
    assert list(np.flatnonzero(diverging[2])) == [10]


def test_random_walk_has_no_divergences():
    mcmc = MCMC(RandomWalkKernel(eight_schools), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run(SIGMA, Y)
    stats = to_inference_data(mcmc)["sample_stats"]
    assert set(stats.data_vars) == {"lp"}
    assert len(np.atleast_1d(stats.attrs["acceptance_rate"])) == 1


def test_reparameterized_model_keeps_the_original_site():
    model = poutine.reparam(hierarchy, {"a": LocScaleReparam(0.0)})
    decentered = normal_draws(1, 6, 3)
    idata = to_inference_data(mcmc_of(model, {"mu": normal_draws(1, 6), "a_decentered": decentered}, torch.zeros(4, 3)))
    assert idata["posterior"]["a"].dims == idata["posterior"]["a_decentered"].dims == ("chain", "draw", "group")
    expected = torch.as_tensor(idata["posterior"]["mu"].values)[..., None] + 3.0 * decentered
    torch.testing.assert_close(torch.as_tensor(idata["posterior"]["a"].values), expected)


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", y.shape[1], dim=-1):
        a = pyro.sample("a", dist.Normal(mu, 3.0))
        with pyro.plate("repeat", y.shape[0], dim=-2):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)


# --------------------------------------------------------------------------------------------------- sites and plates
def test_factor_is_no_data():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("energy", -(mu**2))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    mu = normal_draws(1, 10)
    mcmc = mcmc_of(model, {"mu": mu}, torch.zeros(3))
    idata = to_inference_data(mcmc)
    assert set(idata["observed_data"].data_vars) == set(idata["log_likelihood"].data_vars) == {"y"}
    lp = dist.Normal(0.0, 1.0).log_prob(mu) * 1 + 3 * dist.Normal(mu, 1.0).log_prob(torch.zeros(())) - mu**2
    np.testing.assert_allclose(idata["sample_stats"]["lp"].values, lp, rtol=1e-5)  # but it counts in the log joint
    if OLD:
        assert from_pyro(mcmc)[0].observed_data["energy"].shape == (0,)


def test_masked_entries_are_left_out():
    seen = torch.tensor([True, False, True, True])
    y = torch.tensor([0.0, 50.0, 1.0, 2.0])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    mu = normal_draws(1, 40)
    mcmc = mcmc_of(model, {"mu": mu}, y)
    idata = to_inference_data(mcmc, coords={"data": list("abcd")})
    pointwise = idata["log_likelihood"]["y"]
    assert list(pointwise.coords["data"].values) == ["a", "c", "d"]
    np.testing.assert_allclose(pointwise.values, dist.Normal(mu[..., None], 1.0).log_prob(y[seen]), rtol=1e-5)
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, [0.0, np.nan, 1.0, 2.0])
    assert elpd(quiet(az.loo, idata)) > -20
    if OLD:  # the row that was not observed is scored
        theirs = from_pyro(mcmc)[0]
        assert theirs.log_likelihood["y"].shape[-1] == 4
        assert elpd(quiet(az.loo, theirs)) < -500


def test_masks_of_several_sites_and_plates():
    seen = torch.tensor([[True, True, False], [False, True, True]])
    counts = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("b", 3, dim=-1):
            pyro.sample("x", dist.Normal(mu, 1.0).mask(seen[0]), obs=x)
            pyro.sample("w", dist.Normal(mu, 1.0).expand([2]).to_event(1), obs=x[:, None].expand(3, 2))
            pyro.sample("none", dist.Normal(mu, 1.0).mask(False), obs=x)
            with pyro.plate("a", 2, dim=-2):
                pyro.sample("y", dist.Poisson(mu.exp()).mask(seen), obs=y)

    mu = normal_draws(2, 10)
    idata = to_inference_data(mcmc_of(model, {"mu": mu}, torch.zeros(3), counts), dims={"y": ["a", "b"]})
    pointwise = idata["log_likelihood"]
    assert {n: v.dims[2:] for n, v in pointwise.data_vars.items()} == {"x": ("x_b",), "w": ("b",), "y": ("y_observed",)}
    assert list(pointwise["x"].coords["x_b"].values) == [0, 1]
    expected = dist.Poisson(mu.exp()[..., None]).log_prob(counts[seen])
    np.testing.assert_allclose(pointwise["y"].values, expected, rtol=1e-5)
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, [[1, 2, np.nan], [np.nan, 5, 6]])


def test_scale_changes_lp_and_not_the_likelihood():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.scale(scale=10.0):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    mu, y = normal_draws(1, 10), torch.tensor([0.5, 1.0])
    idata = to_inference_data(mcmc_of(model, {"mu": mu}, y))
    pointwise = dist.Normal(mu[..., None], 1.0).log_prob(y)
    np.testing.assert_allclose(idata["log_likelihood"]["y"].values, pointwise, rtol=1e-5)
    lp = dist.Normal(0.0, 1.0).log_prob(mu) + 10 * pointwise.sum(-1)
    np.testing.assert_allclose(idata["sample_stats"]["lp"].values, lp, rtol=1e-5)


def test_sequential_plates_are_one_variable():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("time", len(y)):
            a = pyro.sample(f"a{i}_level", dist.Normal(mu, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(a, 1.0), obs=y[i])

    y = torch.arange(12.0)
    draws = {f"a{i}_level": normal_draws(1, 60) for i in range(12)}
    mcmc = mcmc_of(model, {"mu": normal_draws(1, 60), **draws}, y)
    idata = to_inference_data(mcmc, coords={"time": range(2000, 2012)})
    assert idata["posterior"]["a_level"].dims == ("chain", "draw", "time")
    np.testing.assert_array_equal(idata["posterior"]["a_level"].values[..., 11], draws["a11_level"].numpy())
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, y.numpy())
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "time")
    assert np.isfinite(elpd(quiet(az.loo, idata)))
    if OLD:
        theirs = from_pyro(mcmc)[0]
        assert {"y_0", "y_11"} <= set(theirs.observed_data.data_vars)
        assert theirs.observed_data["y_0"].shape == (1,)


def test_event_dims_and_dims_without_a_name():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2), infer={"event_dims": ["out", "in"]})
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        free = pyro.sample("free", dist.Normal(0.0, 1.0).expand([5]))
        with pyro.plate("data", len(x)):
            p = dist.Normal(w.sum() + v.sum() + free.sum(), 1.0).expand([3]).to_event(1)
            pyro.sample("x", p, obs=x, infer={"event_dims": ["feature"]})

    samples = {"w": normal_draws(1, 6, 2, 3), "v": normal_draws(1, 6, 4), "free": normal_draws(1, 6, 5)}
    idata = to_inference_data(mcmc_of(model, samples, torch.zeros(7, 3)), coords={"feature": ["r", "g", "b"]})
    dims = {n: v.dims[2:] for n, v in idata["posterior"].data_vars.items()}
    assert dims == {"w": ("out", "in"), "v": ("v_dim_0",), "free": ("free_dim_0",)}
    assert idata["log_likelihood"]["x"].dims == ("chain", "draw", "data")  # event dims are summed
    assert list(idata["observed_data"]["x"].coords["feature"].values) == ["r", "g", "b"]
    assert idata["log_prior"]["free"].dims[2:] == ("free_dim_0",)
    assert idata["log_prior"]["w"].dims == ("chain", "draw")


def test_event_dims_must_fit():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=x, infer={"event_dims": ["h", "w"]})

    with pytest.raises(ValueError, match=r"'x' names .* 1 event dims"):
        to_inference_data(mcmc_of(model, {"mu": normal_draws(1, 6)}, torch.zeros(7, 3)))


def test_sizes_of_one_stay():
    def model(y):
        with pyro.plate("outer", 1, dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 5, dim=-1):
                pyro.sample("y", dist.Normal(a.unsqueeze(-1), 1.0).to_event(1), obs=y)
        with pyro.plate("left", 3, dim=-2):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    samples = {"a": normal_draws(5, 1, 1, 1), "b": normal_draws(5, 1, 3, 1)}
    idata = to_inference_data(mcmc_of(model, samples, torch.zeros(1, 5, 1)), prior=1)
    assert {n: v.dims for n, v in idata["posterior"].data_vars.items()} == {
        "a": ("chain", "draw", "outer"),
        "b": ("chain", "draw", "left"),  # the size of 1 on its right is the place of the plate `inner`
    }
    assert dict(idata["log_likelihood"].sizes) == {"chain": 5, "draw": 1, "outer": 1, "inner": 5}
    assert dict(idata["observed_data"].sizes) == {"outer": 1, "inner": 5, "y_dim_2": 1}
    assert idata["prior"]["b"].shape == (1, 1, 3)
    assert idata["prior_predictive"]["y"].shape == (1, 1, 1, 5, 1)
    if OLD:
        theirs = az.from_pyro(prior={"mu": torch.zeros(5, 1, 1), "b": torch.zeros(5, 3)})
        assert theirs.prior["mu"].shape == (1, 5)  # both dims of size 1 are gone


def test_observed_value_is_spread_over_its_plate():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(2.0))

    idata = to_inference_data(mcmc_of(model, {"mu": normal_draws(1, 8)}))
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, [2.0] * 4)


# ---------------------------------------------------------------------------------------------- vectorised evaluation
class Network(PyroModule):
    """A Bayesian network: weights that do not broadcast over draws."""

    def __init__(self):
        super().__init__()
        self.l1, self.l2 = PyroModule[nn.Linear](2, 5), PyroModule[nn.Linear](5, 1)
        for layer in (self.l1, self.l2):
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(layer.weight.shape).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(layer.bias.shape).to_event(1))

    def forward(self, x, y):
        out = self.l2(torch.tanh(self.l1(x))).squeeze(-1)
        with pyro.plate("obs_id", len(x)):
            pyro.sample("y", dist.Normal(out, 0.5), obs=y)


def linear(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def mixing(x, y):  # broadcasts, and every draw sees the mean of all
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[:, 0] * w.mean(), 0.5), obs=y)


def branching(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[:, 0] * (w if w > 0 else w.exp()), 0.5), obs=y)


X2 = torch.randn(9, 2, generator=torch.Generator().manual_seed(3))
Y2 = torch.randn(9, generator=torch.Generator().manual_seed(4))
WEIGHTS = {"l1.weight": (5, 2), "l1.bias": (5,), "l2.weight": (1, 5), "l2.bias": (1,)}


@pytest.mark.parametrize(
    ("model", "shapes", "method"),
    [
        (Network(), WEIGHTS, "vmap"),
        (linear, {"w": (2,)}, "plate"),
        (mixing, {"w": ()}, "vmap"),
        (branching, {"w": ()}, "loop"),
    ],
)
def test_log_likelihood_is_that_of_each_draw(model, shapes, method):
    samples = {n: normal_draws(2, 15, *s) for n, s in shapes.items()}
    mcmc = mcmc_of(model, samples, X2, Y2)
    idata = to_inference_data(mcmc)
    assert idata["log_likelihood"].attrs["method"] == method
    for chain, draw in ((0, 0), (0, 7), (1, 14)):
        at = {n: v[chain, draw] for n, v in samples.items()}
        trace = poutine.trace(poutine.condition(model, at)).get_trace(X2, Y2)
        site = trace.nodes["y"]
        expected = site["fn"].log_prob(site["value"]).detach().numpy()
        np.testing.assert_allclose(idata["log_likelihood"]["y"].values[chain, draw], expected, rtol=1e-4, atol=1e-4)
        assert idata["sample_stats"]["lp"].values[chain, draw] == pytest.approx(float(trace.log_prob_sum()), rel=1e-5)
    if OLD and method == "plate":  # a vector beside a plate: the group is left out, with a warning
        theirs, said = from_pyro(mcmc)
        assert "log_likelihood" not in theirs.groups()
        assert any("Could not get vectorized trace" in s for s in said)


def test_names_of_weights():
    samples = {n: normal_draws(1, 5, *s) for n, s in WEIGHTS.items()}
    posterior = to_inference_data(mcmc_of(Network(), samples, X2, Y2))["posterior"]
    assert posterior["l1.weight"].dims[2:] == ("l1.weight_dim_0", "l1.weight_dim_1")


def test_an_error_in_the_model_is_raised():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        if w > 100:
            raise ZeroDivisionError("at this draw")
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    draws = torch.zeros(1, 10)
    draws[0, 5] = 200.0
    with pytest.raises(ZeroDivisionError, match="at this draw"):
        to_inference_data(mcmc_of(model, {"w": draws}, torch.zeros(3)))


def test_many_draws_are_cut_into_chunks(monkeypatch):
    samples = {"w": normal_draws(2, 15, 2)}
    whole = to_inference_data(mcmc_of(linear, samples, X2, Y2))
    monkeypatch.setattr(drawing, "NUMBERS", 40)
    cut = to_inference_data(mcmc_of(linear, samples, X2, Y2))
    np.testing.assert_allclose(whole["log_likelihood"]["y"].values, cut["log_likelihood"]["y"].values, rtol=1e-6)


# -------------------------------------------------------------------------------------------------------------- guides
def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def exact_guide(y):
    n = len(y)
    pyro.sample("mu", dist.Normal(y.sum() / (n + 1), (1 / (n + 1)) ** 0.5))


def test_exact_guide_has_constant_weights():
    y = torch.tensor([1.0, 2.0, 4.0])
    idata = to_inference_data((conjugate, exact_guide), y, draws=400, seed=0)
    evidence = float(dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0).log_prob(y))
    np.testing.assert_allclose(idata["sample_stats"]["log_weight"].values, evidence, atol=1e-4)
    assert float(idata["fit"]["elbo"].values[0]) == pytest.approx(evidence, abs=1e-4)
    assert float(idata["fit"]["pareto_k"].values[0]) < 0.5
    mean, sd = 7 / 4, 0.5  # of 400 independent draws: 4 standard errors
    assert abs(float(idata["posterior"]["mu"].values.mean()) - mean) < 4 * sd / 20
    assert idata["log_likelihood"]["y"].attrs["likelihood_kind"] == "exact"


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoIAFNormal])
def test_auto_guides(auto):
    svi = train(
        SVI(eight_schools, auto(eight_schools), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()), SIGMA, Y, steps=30
    )
    idata = to_inference_data(svi, (SIGMA, Y), draws=50, seed=0)
    assert set(idata["posterior"].data_vars) == {"mu", "tau", "theta_t", "theta"}  # nothing unconstrained
    assert float(idata["posterior"]["tau"].values.min()) > 0
    assert dict(idata["posterior"].sizes) == {"chain": 1, "draw": 50, "school": 8}
    assert len(np.unique(idata["posterior"]["mu"].values)) == 50
    stats = idata["sample_stats"]
    np.testing.assert_allclose(stats["log_weight"].values, stats["lp"].values - stats["log_q"].values)
    # the weights average to Pyro's own bound, each an estimate of 2000 draws here, 4 standard errors apart at most
    more = to_inference_data(svi, (SIGMA, Y), draws=2000, seed=1)["fit"]
    theirs = -Trace_ELBO(num_particles=300, vectorize_particles=True, max_plate_nesting=1).loss(
        svi.model, svi.guide, SIGMA, Y
    )
    spread = float(more["elbo_se"].values[0])
    assert abs(float(more["elbo"].values[0]) - theirs) < 4 * spread * (1 + 2000 / 300) ** 0.5


def test_loo_runs_on_eight_schools_by_svi():
    svi = train(
        SVI(eight_schools, AutoNormal(eight_schools), pyro.optim.ClippedAdam({"lr": 0.02}), Trace_ELBO()), SIGMA, Y
    )
    idata = to_inference_data(svi, (SIGMA, Y), coords={"school": SCHOOLS}, seed=0, predictive=True)
    assert -37 < elpd(quiet(az.loo, idata)) < -27
    assert len(quiet(az.summary, idata, var_names=["theta"])) == 8
    assert idata["posterior_predictive"]["y"].shape == (1, 500, 8)
    spread = idata["posterior_predictive"]["y"].values.std((0, 1))
    assert (spread > SIGMA.numpy() * 0.8).all()  # noise is drawn anew, not the data repeated
    if OLD:
        with pytest.raises(AttributeError, match="kernel"):
            az.from_pyro(svi)


def test_draws_in_a_plate_and_in_a_loop_have_one_distribution(monkeypatch):
    y = torch.tensor([1.0, 2.0, 4.0])
    monkeypatch.setattr(drawing, "FEW", 10**6)
    looped = to_inference_data((conjugate, exact_guide), y, draws=300, seed=0)
    assert looped["log_likelihood"].attrs["method"] == "loop"
    values = looped["posterior"]["mu"].values
    assert abs(values.mean() - 7 / 4) < 4 * 0.5 / 300**0.5
    assert abs(values.std() - 0.5) < 4 * 0.5 / 600**0.5


def test_guide_that_shares_its_noise_is_looped_over():
    def guide(y):
        shift = torch.randn(())  # not a site: in a plate all draws would share it
        pyro.sample("mu", dist.Normal(shift, 1e-3))

    idata = to_inference_data((conjugate, guide), torch.zeros(3), draws=50, seed=0)
    assert idata["posterior"]["mu"].values.std() > 0.5


def test_point_mass_is_one_draw_and_loo_says_so():
    guide = AutoDelta(linear)
    train(SVI(linear, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()), X2, Y2, steps=50)
    idata = to_inference_data(guide, (X2, Y2))
    assert dict(idata["posterior"].sizes) == {"chain": 1, "draw": 1, "w_dim_0": 2}
    assert idata.attrs["inference_view"] == "frequentist"
    assert "log_likelihood" not in groups_of(idata)
    assert idata["log_evidence"]["y"].attrs["kind"] == "exact"
    with pytest.raises(TypeError, match="one draw"):
        az.loo(idata)
    if OLD:  # what it would have been
        alone = az.InferenceData(posterior=idata["posterior"], log_likelihood=idata["log_evidence"])
        with pytest.raises(IndexError):
            quiet(az.loo, alone)


def test_one_draw_is_no_posterior():
    idata = to_inference_data((conjugate, exact_guide), torch.zeros(3), draws=1)
    with pytest.raises(TypeError, match="one draw"):
        az.loo(idata)


def amortised(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5).expand([len(x)]).to_event(0), obs=x)


def amortised_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 1.25, 0.2**0.5))


def test_conditional_likelihood_is_refused():
    x = torch.linspace(-2, 2, 12)
    idata = to_inference_data((amortised, amortised_guide), x, draws=400, seed=0)
    assert "log_likelihood" not in groups_of(idata)
    assert idata["conditional_log_likelihood"]["x"].shape == (1, 400, 12)
    assert idata["conditional_log_likelihood"].attrs["likelihood_kind"] == "conditional"
    with pytest.raises(TypeError, match=r"log p\(x \| z\) given a latent of each row's own .* harmonic mean"):
        az.loo(idata)
    if OLD:  # and it would have been wrong
        alone = az.InferenceData(posterior=idata["posterior"], log_likelihood=idata["conditional_log_likelihood"])
        exact = float(dist.Normal(0.0, 1.25**0.5).log_prob(x).sum())
        assert abs(elpd(quiet(az.loo, alone)) - exact) > 0.5


def test_restarts_are_chains_with_their_own_parameters():
    guides = []
    for _ in range(2):
        pyro.clear_param_store()
        guide = AutoNormal(eight_schools)
        train(SVI(eight_schools, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO()), SIGMA, Y, steps=5)
        guides.append(guide)
    means = [g.locs.mu.item() for g in guides]
    with torch.no_grad():
        guides[1].locs.mu.add_(100.0)
    idata = to_inference_data(guides, (SIGMA, Y), draws=30, seed=0)
    assert dict(idata["posterior"].sizes) == {"chain": 2, "draw": 30, "school": 8}
    assert idata["fit"]["pareto_k"].dims == ("chain",)
    found = idata["posterior"]["mu"].values.mean(1)
    assert abs(found[0] - means[0]) < 5  # not those the store holds under its names
    assert found[1] > 50
    assert guides[0].locs.mu.item() == pytest.approx(means[0])


def test_restarts_that_share_parameters_are_refused():
    guides = [AutoNormal(eight_schools) for _ in range(2)]  # and no pyro.clear_param_store() between them
    for guide in guides:
        train(SVI(eight_schools, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO()), SIGMA, Y, steps=2)
    with pytest.raises(ValueError, match="clear_param_store"):
        to_inference_data(guides, (SIGMA, Y))
    with pytest.raises(ValueError, match="must be modules"):
        to_inference_data([(conjugate, exact_guide), (conjugate, exact_guide)], torch.zeros(3))


def test_seed_repeats_and_leaves_the_generators():
    y = torch.tensor([1.0, 2.0])
    before = torch.get_rng_state()
    one, two = (to_inference_data((conjugate, exact_guide), y, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(one["posterior"]["mu"].values, two["posterior"]["mu"].values)
    assert one.attrs["seed"] == 3


def test_modules_are_scored_in_evaluation_mode():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=self.drop(y))

    model = Model().train()
    idata = to_inference_data((model, exact_guide), torch.ones(50), draws=10)
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, 1.0)
    assert model.drop.training


def test_fit_of_a_pair_brings_its_history():
    y = torch.tensor([1.0, 2.0, 4.0]).repeat(4)
    result = fit(ELBO()(conjugate, AutoNormal(conjugate)), y, steps=12, seed=0, validation=None)
    idata = to_inference_data(result, y, draws=20)
    assert idata["fit"]["loss"].dims == ("step",)
    assert idata["fit"].sizes["step"] == 12
    assert {"elbo", "pareto_k", "grad_norm", "lr", "seconds"} <= set(idata["fit"].data_vars)
    assert json.loads(idata.attrs["config_json"])["seed"] == 0
    assert idata.attrs["objective"].startswith("ELBO(")
    assert dict(idata["posterior"].sizes) == {"chain": 1, "draw": 20}
    module = to_inference_data(result.module, y, draws=20)
    assert "loss" not in module["fit"].data_vars


# ------------------------------------------------------------------------------------------------------------ programs
@pytest.fixture(scope="module")
def fitted():
    x = (torch.rand(120, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    torch.manual_seed(0)
    vae = VAE(6, latent_dim=3, likelihood="bernoulli", hidden=(8,))
    return fit(ELBO()(vae), x[:80], steps=30, batch_size=40, validation=x[80:100], seed=0), x[100:]


def test_vae_groups(fitted):
    result, x = fitted
    idata = to_inference_data(result, x, coords={"latent": ["z0", "z1", "z2"]}, draws=200, max_rows=5, seed=0)
    latent = idata["latent"]["z"]
    assert latent.dims == ("chain", "draw", "data", "latent")
    assert latent.shape == (1, 200, 5, 3)
    assert list(latent.coords["latent"].values) == ["z0", "z1", "z2"]
    assert idata["latent"].attrs["rows_given"] == 20
    assert idata["observed_data"]["x"].dims == ("data", "feature")
    assert idata["observed_data"]["x"].shape == (20, 6)
    q = result.program.encode(x[:5])
    np.testing.assert_allclose(idata["latent_stats"]["z_mean"].values, q.mean.detach(), rtol=1e-5)
    np.testing.assert_allclose(idata["latent_stats"]["z_sd"].values, q.stddev.detach(), rtol=1e-5)
    error = np.abs(latent.values.mean((0, 1)) - q.mean.detach().numpy())
    assert (error < 5 * q.stddev.detach().numpy() / 200**0.5).all()
    evidence = idata["log_evidence"]
    assert evidence["x"].dims == ("chain", "draw", "data")
    assert evidence["x"].shape == (1, 1, 20)
    assert evidence["x"].attrs["likelihood_kind"] == "marginal_iwae"
    assert evidence["x"].attrs["n_importance"] == 1000
    reference = log_evidence(result.program, x, method=ImportanceSampling(4000, seed=1))
    gap = np.abs(evidence["x"].values[0, 0] - reference.value.numpy())
    assert (gap < 5 * (evidence["standard_error"].values + reference.standard_error.numpy())).all()
    bound, spread = idata["latent_stats"]["elbo"], idata["latent_stats"]["elbo_se"]
    assert (bound.values < reference.value.numpy()[:5] + 5 * spread.values).all()
    particles = result.program.lower_bound(x[:5], particles=4000).detach().numpy()
    np.testing.assert_array_less(np.abs(bound.values - particles), 5 * spread.values * (1 + 200 / 4000) ** 0.5)
    assert idata.attrs["inference_view"] == "frequentist"
    assert idata.attrs["family"] == "VAE"
    assert {"loss", "validation"} <= set(idata["fit"].data_vars)
    assert idata["fit"]["validation"].coords["validation_step"].values[-1] <= 30


def test_vae_in_arviz(fitted, monkeypatch):
    result, x = fitted
    idata = to_inference_data(result, x, draws=50, max_rows=4, coords={"data": [f"row{i}" for i in range(20)]})
    table = quiet(az.summary, idata, group="latent")
    assert len(table) == 12
    assert table.index[0].startswith("z[row0")
    with pytest.raises(TypeError, match=r"point estimate, one draw.*log_evidence"):
        az.loo(idata)
    with pytest.raises(TypeError, match="conditional"):
        az.loo(idata)
    if OLD:
        plt = pytest.importorskip("matplotlib.pyplot")
        plt.switch_backend("Agg")
        axes = quiet(az.plot_trace, idata["latent"], coords={"data": ["row0"]})
        assert axes.shape[1] == 2
        plt.close("all")


def test_data_of_a_program_from_a_loader(fitted):
    result, x = fitted
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)
    idata = to_inference_data(result.program, loader, draws=5, importance=None)
    np.testing.assert_array_equal(idata["observed_data"]["x"].values, x)


def test_conditional_vae_with_images():
    vae = VAE((1, 8, 8), latent_dim=2, encoder="conv", decoder="conv", scale="shared", context_shape=2)
    x, context = torch.randn(6, 1, 8, 8), torch.randn(6, 2)
    idata = to_inference_data(vae, (x.numpy(), context.numpy()), draws=10, importance=None, max_rows=3, predictive=True)
    assert idata["observed_data"]["x"].dims == ("data", "channel", "height", "width")
    assert idata["constant_data"]["context"].dims == ("data", "context_dim_1")
    assert idata["posterior_predictive"]["x"].shape == (1, 10, 3, 1, 8, 8)
    assert dict(idata["posterior"].sizes) == {"chain": 1, "draw": 1}  # the one scale of the noise
    assert "log_evidence" not in groups_of(idata)


@pytest.mark.parametrize("broadcasts", [True, False])
def test_bounded_program_with_an_exact_guide(broadcasts):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            mean = z if broadcasts else z.reshape(len(x))  # a dimension of draws does not fit in there
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x.squeeze(-1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.squeeze(-1) / 2, 0.5**0.5))

    x = torch.linspace(-2, 2, 5).unsqueeze(-1)
    idata = to_inference_data(Bounded(model, guide, 1), x, draws=30)
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(x.squeeze(-1))
    np.testing.assert_allclose(idata["latent_stats"]["elbo"].values, exact, atol=1e-5)
    np.testing.assert_allclose(idata["log_evidence"]["x"].values[0, 0], exact, atol=1e-5)
    assert idata["latent"]["z"].dims == ("chain", "draw", "data")


def test_program_with_global_latents_is_a_posterior():
    program = Bounded(lambda x: conjugate(x.squeeze(-1)), lambda x: exact_guide(x.squeeze(-1)), 1)
    idata = to_inference_data(program, torch.zeros(4, 1), draws=20)
    assert dict(idata["posterior"].sizes) == {"chain": 1, "draw": 20}
    assert idata["log_likelihood"]["y"].shape == (1, 20, 4)


def test_kinds_without_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=x, infer={"event_dims": ["feature"]})

    x = torch.randn(5, 2)
    exact = to_inference_data(Exact(model, event_shape=2), x)
    assert exact["log_evidence"]["x"].attrs["kind"] == "exact"
    np.testing.assert_allclose(
        exact["log_evidence"]["x"].values[0, 0], dist.Normal(0.0, 1.0).log_prob(x).sum(-1), rtol=1e-5
    )
    energy = to_inference_data(Unnormalized(model, event_shape=2), x)
    assert energy["energy"]["x"].attrs["kind"] == "unnormalized"
    assert not {"log_evidence", "log_likelihood"} & groups_of(energy)
    implicit = to_inference_data(Implicit(model, None, 2), x)
    assert implicit.attrs["likelihood_kind"] == "implicit"
    assert not {"log_evidence", "log_likelihood", "energy"} & groups_of(implicit)


# ---------------------------------------------------------------------------------------------------- coords and dims
def draws_of(model=linear, **samples):
    return mcmc_of(model, samples or {"w": normal_draws(1, 8, 2)}, X2, Y2)


def test_names_and_labels_of_the_user_win():
    idata = to_inference_data(
        draws_of(),
        dims={"w": ["coef"], "y": ["row"]},
        coords={"coef": ["slope", "other"], "row": range(9), "draw": range(5, 13)},
    )
    assert idata["posterior"]["w"].dims == ("chain", "draw", "coef")
    assert list(idata["posterior"].coords["coef"].values) == ["slope", "other"]
    assert list(idata["posterior"].coords["draw"].values) == list(range(5, 13))
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "row")
    assert idata["observed_data"]["y"].dims == ("row",)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"coords": {"data": list("ab")}}, r"coords\['data'\] has 2 labels, and dim 'data' has size 9"),
        ({"coords": {"shcool": list("ab")}}, r"'shcool', and no variable has that dim: .*'data'"),
        ({"dims": {"v": ["a"]}}, r"dims= names 'v'; the variables are .*'w'"),
        ({"dims": {"w": ["a", "b"]}}, r"'w': .* names 2 dims, and 'w' has 1"),
        ({"dims": {"w": "ab"}}, r"names 1 dims"),
        ({"dims": {"w": ["y"]}}, r"calls a dim 'y'"),
        ({"dims": {"w": ["draw"]}}, r"calls a dim 'draw'"),
        ({"coords": {"data": [[1, 2]] * 9}}, r"coords\['data'\]"),
        ({"draws": 10}, "MCMC brings its own draws"),
        ({"draws": 0}, "draws must be"),
        ({"max_rows": 0}, "max_rows must be"),
        ({"importance": 0}, "importance must be"),
        ({"prior": -1}, "prior must be"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        to_inference_data(draws_of(), **options)


def test_two_sizes_of_one_dim_are_refused():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1), infer={"event_dims": ["feature"]})
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([4]).to_event(1), infer={"event_dims": ["feature"]})
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a.sum() + b.sum(), 1.0), obs=x)

    samples = {"a": normal_draws(1, 10, 3), "b": normal_draws(1, 10, 4)}
    mcmc = mcmc_of(model, samples, torch.zeros(2))
    with pytest.raises(ValueError, match="dim 'feature' has size 3 in 'a' and 4 in 'b'"):
        to_inference_data(mcmc)
    assert dict(to_inference_data(mcmc, dims={"b": ["other"]})["posterior"].sizes)["other"] == 4
    if OLD:  # padded without a word
        arrays = {n: v.numpy() for n, v in samples.items()}
        theirs = az.from_dict(posterior=arrays, dims={"a": ["feature"], "b": ["feature"]})
        assert np.isnan(theirs.posterior["a"].values).sum() == 10


def test_a_dim_named_like_a_variable_is_renamed():
    def model(x):
        latent = pyro.sample("latent", dist.Normal(0.0, 1.0).expand([3]).to_event(1), infer={"event_dims": ["latent"]})
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(latent.sum(), 1.0), obs=x)

    samples = {"latent": normal_draws(1, 10, 3)}
    idata = to_inference_data(mcmc_of(model, samples, torch.zeros(2)), coords={"latent": list("abc")})
    assert idata["posterior"]["latent"].dims == ("chain", "draw", "latent_id")
    assert list(idata["posterior"].coords["latent_id"].values) == ["a", "b", "c"]
    if OLD:  # the variable is gone, and the group with it
        theirs = az.from_dict(posterior={"latent": samples["latent"].numpy()}, dims={"latent": ["latent"]})
        assert "posterior" not in theirs.groups()


def test_names_that_are_not_allowed():
    def model(y):
        with pyro.plate("chain", 3), pyro.plate("a/b", 2):
            a = pyro.sample("part/a", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)
        pyro.sample("draw", dist.Normal(0.0, 1.0))

    samples = {"part/a": normal_draws(1, 10, 2, 3), "draw": normal_draws(1, 10)}
    idata = to_inference_data(mcmc_of(model, samples, torch.zeros(2, 3)))
    assert idata["posterior"]["part.a"].dims == ("chain", "draw", "a.b", "chain_id")
    assert idata["posterior"]["part.a"].attrs["site"] == "part/a"
    assert idata["posterior"]["draw_site"].dims == ("chain", "draw")


# --------------------------------------------------------------------------------------------------------- containers
def test_netcdf_round_trip(tmp_path, schools, fitted):
    result, x = fitted
    for name, idata in {
        "mcmc": to_inference_data(schools, coords={"school": SCHOOLS}, predictive=True, prior=3),
        "vae": to_inference_data(result, x, draws=10, importance=30, seed=0),
    }.items():
        path = tmp_path / f"{name}.nc"
        idata.to_netcdf(str(path))
        again = az.from_netcdf(str(path)) if OLD else xr.open_datatree(path)
        assert groups_of(again) == groups_of(idata)
        for group in groups_of(idata):
            for variable, values in idata[group].data_vars.items():
                kept = again[group][variable]
                assert kept.dims == values.dims
                assert kept.dtype == values.dtype
                np.testing.assert_array_equal(kept.values, values.values)
            for attribute, value in idata[group].attrs.items():  # a list of one comes back as its entry
                np.testing.assert_array_equal(np.atleast_1d(again[group].attrs[attribute]), np.atleast_1d(value))
        assert again.attrs["creation_library"] == "pyro_gen"
        assert again.attrs["inference_method"] == idata.attrs["inference_method"]


def test_attributes_are_what_netcdf_can_keep():
    kept = plain({
        "flag": True, "none": None, "table": {"a": [1]}, "numbers": (1, 2.5), "words": ["a", "b"], "count": np.int64(3),
        "tensor": torch.tensor([1.0, 2.0]), "version": torch.__version__, "path": torch.Size([2]), "empty": [],
    })  # fmt: skip
    assert kept["flag"] == 1
    assert type(kept["flag"]) is int
    assert "none" not in kept
    assert json.loads(kept["table"]) == {"a": [1]}
    assert kept["numbers"] == [1, 2.5]
    assert kept["words"] == "a, b"
    assert all(type(v) in (str, int, float, list) for v in kept.values())


def test_reason_survives_and_gives_way(tmp_path, fitted):
    result, x = fitted
    idata = to_inference_data(result, x, draws=10, importance=None, seed=0)
    for same in (copy.deepcopy(idata), pickle.loads(pickle.dumps(idata))):
        assert groups_of(same) == groups_of(idata)
        with pytest.raises(TypeError, match="point estimate"):
            _ = same.log_likelihood
    assert containers.REASON in idata.attrs
    assert "log_likelihood" not in idata
    values = xr.Dataset({"x": (("chain", "draw", "data"), np.random.default_rng(0).normal(size=(2, 50, 4)))})
    if OLD:
        idata.add_groups({"log_likelihood": values, "posterior": values})
    else:
        idata["log_likelihood"], idata["posterior"] = xr.DataTree(values), xr.DataTree(values)
    assert np.isfinite(elpd(quiet(az.loo, idata)))


def test_a_result_without_a_reason_is_plain_arviz(schools):
    idata = to_inference_data(schools)
    assert type(idata) is (az.InferenceData if OLD else xr.DataTree)


def test_arviz_is_imported_when_needed():
    code = (
        "import sys, pyro_gen.inference_data, pyro_gen.comparison; heavy = 'arviz', 'arviz_base', 'arviz_stats', "
        "'xarray', 'pandas', 'matplotlib'; print([m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------------------------------- errors
def subsampled(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=3) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


def test_subsampled_plates_are_refused():
    def guide(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'data' of the model subsamples 3 of 10 rows"):
        to_inference_data((subsampled, guide), torch.zeros(10))


def mixture(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y)


def test_discrete_latents_that_were_summed_out():
    mcmc = mcmc_of(mixture, {"loc": normal_draws(1, 10, 2)}, torch.zeros(3))
    with pytest.raises(ValueError, match=r"'k' is discrete and was summed out.*log_likelihood=False"):
        to_inference_data(mcmc)
    idata = to_inference_data(mcmc, log_likelihood=False)
    assert dict(idata["posterior"].sizes) == {"chain": 1, "draw": 10, "loc_dim_0": 2}
    assert idata["observed_data"]["y"].dims == ("data",)
    assert set(idata["sample_stats"].data_vars) == {"diverging"}
    with pytest.raises(TypeError, match="log_likelihood=False"):
        az.loo(idata)


def test_latents_that_were_not_saved():
    mcmc = mcmc_of(eight_schools, {"mu": normal_draws(1, 10)}, SIGMA, Y)
    with pytest.raises(ValueError, match=r"'tau', 'theta_t' has no draws.*save_params"):
        to_inference_data(mcmc)


def potential(values):
    return 0.5 * values["mu"] ** 2


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        (lambda: MCMC(NUTS(conjugate), 3), ValueError, "call mcmc.run"),
        (lambda: StreamingMCMC(NUTS(conjugate), 3), TypeError, "keeps statistics and no draws"),
        (list, ValueError, "empty list"),
        (lambda: 3, TypeError, "to_inference_data takes pyro.infer.MCMC"),
        (lambda: NUTS, TypeError, "make an instance"),
        (lambda: exact_guide, TypeError, "model is missing"),
        (lambda: (conjugate, exact_guide, 1), TypeError, "a pair"),
        (lambda: (conjugate, 3), TypeError, "two callables"),
        (lambda: AutoNormal(conjugate), ValueError, "never run"),
        (lambda: (conjugate, lambda y: None), ValueError, "'mu' of the model is not in the guide"),
        (lambda: (lambda y: None, exact_guide), ValueError, "'mu' is not a latent site of the model"),
        (lambda: [mcmc_of(conjugate, {"mu": normal_draws(1, 5)}), (conjugate, exact_guide)], TypeError, "mixed"),
        (lambda: (VAE(2), exact_guide), TypeError, "pass the program itself"),
    ],
)
def test_sources_that_do_not_convert(source, error, match):
    with pytest.raises(error, match=match):
        to_inference_data(source(), torch.zeros(3))


def test_kernel_of_a_potential_function():
    kernel = NUTS(potential_fn=potential)
    mcmc = MCMC(kernel, 3, warmup_steps=1, initial_params={"mu": torch.zeros(())}, disable_progbar=True)
    mcmc.run()
    with pytest.raises(TypeError, match="potential function"):
        to_inference_data(mcmc)


@pytest.mark.parametrize("source", [(conjugate, exact_guide), VAE(2)], ids=["pair", "program"])
def test_data_is_needed(source):
    with pytest.raises(ValueError, match="data is missing"):
        to_inference_data(source)


def test_model_without_arguments_needs_no_data():
    y = torch.tensor([1.0, 2.0])
    idata = to_inference_data(lambda: exact_guide(y), model=lambda: conjugate(y), draws=6)
    assert idata["log_likelihood"]["y"].shape == (1, 6, 2)


def test_bad_rows_of_a_program():
    with pytest.raises(ValueError, match="x must have shape"):
        to_inference_data(VAE(2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="prior= belongs"):
        to_inference_data(VAE(2), torch.zeros(3, 2), prior=3)
