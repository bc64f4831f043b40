"""Comparing scores: held-out evidence as ELPDData, kinds that may stand side by side, and those that may not."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import MCMC, NUTS

from pyro_gen.base import Evidence, Exact
from pyro_gen.comparison import compare, to_elpd
from pyro_gen.inference_data import to_inference_data

try:
    import arviz as az

    OLD = hasattr(az, "from_pyro")
except ImportError:
    import arviz_stats as az

    OLD = False

X = torch.linspace(-1.5, 1.5, 40)
ELPD = "elpd_loo" if OLD else "elpd"


def quiet(function, *args, **kwargs):
    """ArviZ warns of k̂, pandas of what ArviZ does with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def normal(scale, kind="exact", **more):
    return Evidence(dist.Normal(0.0, scale).log_prob(X).double(), kind, **more)


def pointwise(elpd):
    return np.asarray(elpd.loo_i if OLD else elpd.elpd_i)


def posterior(scale, y=X[:20], draws=200):
    """A run with exact draws of a conjugate posterior."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    precision = 1 + len(y) / scale**2
    torch.manual_seed(0)
    mu = y.sum() / scale**2 / precision + torch.randn(2, draws) / precision**0.5
    mcmc = MCMC(NUTS(model), num_samples=draws, warmup_steps=1, disable_progbar=True)
    mcmc.num_chains, mcmc._samples, mcmc._args, mcmc._kwargs = 2, {"mu": mu}, (y,), {}
    mcmc._diagnostics = [{}, {}]
    return to_inference_data(mcmc)


def exact_loo(scale, y):
    """log p(y_n | the others) of the conjugate normal, summed."""
    total = 0.0
    for n in range(len(y)):
        rest = torch.cat([y[:n], y[n + 1 :]])
        precision = 1 + len(rest) / scale**2
        mean = rest.sum() / scale**2 / precision
        total += float(dist.Normal(mean, (scale**2 + 1 / precision) ** 0.5).log_prob(y[n]))
    return total


def test_evidence_as_elpd():
    evidence = normal(1.0, "estimate", standard_error=torch.full((40,), 0.02), pareto_k=torch.linspace(-0.1, 0.75, 40))
    elpd = to_elpd(evidence)
    assert float(elpd[ELPD]) == pytest.approx(float(evidence.value.sum()))
    assert float(elpd["se"]) == pytest.approx(float(evidence.value.std(unbiased=False) * 40**0.5))
    assert elpd["n_data_points"] == 40
    assert bool(elpd["warning"])  # one k̂ above .7
    np.testing.assert_array_equal(pointwise(elpd), evidence.value.numpy())
    assert "elpd_loo" in str(elpd)
    assert not bool(to_elpd(normal(1.0))["warning"])
    table = quiet(az.compare, {"a": to_elpd(normal(1.0)), "b": elpd})  # ArviZ takes it as it is
    assert set(table.index) == {"a", "b"}


def test_table_of_held_out_rows():
    wide, narrow = normal(2.0), normal(1.0, "estimate", standard_error=torch.full((40,), 0.02))
    table = compare({"wide": wide, "narrow": narrow})
    assert list(table.index) == ["narrow", "wide"]
    assert list(table["kind"]) == ["estimate", "exact"]
    difference = (narrow.value - wide.value).numpy()
    assert abs(table["elpd_diff"].iloc[1]) == pytest.approx(difference.sum())
    assert table["dse"].iloc[1] == pytest.approx((40 * difference.var()) ** 0.5)  # paired over rows
    assert table["mc_se"].to_list() == pytest.approx([0.02 * 40**0.5, 0.0])


def test_program_results_are_compared_by_their_evidence():
    def program(scale):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(x.new_zeros(1), scale).to_event(1), obs=x)

        return to_inference_data(Exact(model, event_shape=1), X[:, None])

    results = {"a": program(1.0), "b": program(2.0)}
    table = compare(results)
    assert table[ELPD].to_list() == pytest.approx([float(normal(s).value.sum()) for s in (1.0, 2.0)], rel=1e-5)
    mixed = compare({"a": results["a"], "b": normal(2.0, "estimate")})
    assert mixed["elpd_diff"].abs().iloc[1] == pytest.approx(abs(table["elpd_diff"].iloc[1]), rel=1e-5)


def test_posteriors_are_compared_by_loo():
    results = {"right": posterior(1.0), "wide": posterior(4.0)}
    table = compare(results)
    assert list(table.index) == ["right", "wide"]
    for name, scale in (("right", 1.0), ("wide", 4.0)):
        assert table[ELPD][name] == pytest.approx(exact_loo(scale, X[:20]), abs=0.1)
    assert table["mc_se"].isna().all()
    ready = {name: az.loo(idata, pointwise=True) for name, idata in results.items()}
    assert compare(ready)[ELPD].to_list() == pytest.approx(table[ELPD].to_list())


@pytest.mark.parametrize("kind", ["lower bound", "upper bound"])
def test_bounds_on_demand(kind):
    results = {"exact": normal(1.0), "bound": normal(2.0, kind)}
    with pytest.raises(ValueError, match=rf"'bound' \({kind}\) is a bound on log p\(x\).*allow_bounds=True"):
        compare(results)
    assert set(compare(results, allow_bounds=True)["kind"]) == {"exact", kind}
    # ArviZ itself sees no difference
    assert len(quiet(az.compare, {n: to_elpd(e) for n, e in results.items()})) == 2


def test_densities_that_are_not_normalised():
    idata = posterior(1.0)
    idata["log_likelihood"]["y"].attrs["kind"] = "unnormalized"
    with pytest.raises(ValueError, match=r"'b' \(unnormalized\) is not a normalised log p"):
        compare({"a": posterior(1.0), "b": idata}, allow_bounds=True)


def test_loo_beside_held_out_rows():
    with pytest.raises(ValueError, match="'held' is scored on rows held out and 'left' by leaving out"):
        compare({"left": posterior(1.0, X), "held": normal(1.0)})


def test_rows_must_be_the_same():
    short = Evidence(normal(1.0).value[:30], "exact")
    with pytest.raises(ValueError, match=r"different numbers of rows \('a' 40, 'b' 30\)"):
        compare({"a": normal(1.0), "b": short})
    with pytest.raises(ValueError, match=r"'a' and 'b' were given different data.*log-Jacobian"):
        quiet(compare, {"a": posterior(1.0), "b": posterior(1.0, 10 * X[:20])})


def test_one_draw_says_so():
    def model(y):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    one = to_inference_data((model, lambda y: pyro.sample("mu", dist.Normal(0.0, 1.0))), X[:20], draws=1)
    with pytest.raises(TypeError, match="one draw"):
        compare({"a": posterior(1.0), "b": one})


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (lambda: to_elpd(normal(1.0).mean()), ValueError, "mean or a sum"),
        (lambda: to_elpd(normal(1.0)[:0]), ValueError, "no rows"),
        (lambda: to_elpd(torch.zeros(3)), TypeError, "to_elpd takes an Evidence"),
        (lambda: to_elpd(posterior(1.0)), TypeError, "group log_evidence"),
        (lambda: compare({"a": normal(1.0)}), ValueError, "at least two"),
        (lambda: compare([normal(1.0), normal(2.0)]), ValueError, "dict"),
        (lambda: compare({"a": normal(1.0), "b": 3}), TypeError, "'b' is 3"),
    ],
)
def test_what_cannot_be_compared(function, error, match):
    with pytest.raises(error, match=match):
        function()


def test_scores_survive_a_file(tmp_path):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1), obs=x)

    idata = to_inference_data(Exact(model, event_shape=1), X[:, None])
    idata.to_netcdf(str(tmp_path / "a.nc"))
    again = az.from_netcdf(str(tmp_path / "a.nc")) if OLD else xr.open_datatree(tmp_path / "a.nc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(compare({"a": idata, "b": again})["kind"]) == ["exact", "exact"]
