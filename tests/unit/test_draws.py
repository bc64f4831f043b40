"""Draws of chains: their R-hat and effective sizes as ArviZ has them, their summary, and their way to ArviZ."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from pyro_gen.inference_data import to_inference_data
from pyro_gen.programs.ebm import EBM
from pyro_gen.samplers import MALA, Draws, Gibbs, Langevin
from pyro_gen.statistics import chain_ess, r_hat
from pyro_gen.targets import Target

try:
    import arviz as az
except ImportError:
    import arviz_stats as az

F64 = torch.float64


def autoregressive(chains, draws, phi, seed=0):
    """Chains x_t = φ x_{t−1} + noise, whose autocorrelation time is (1 + φ) / (1 − φ)."""
    noise = torch.randn(chains, draws, generator=torch.Generator().manual_seed(seed), dtype=F64)
    x = noise.clone()
    for t in range(1, draws):
        x[:, t] = phi * x[:, t - 1] + noise[:, t]
    return x


# ---------------------------------------------------------------------------------------------------- R-hat, ESS
@pytest.mark.parametrize(
    ("chains", "draws", "phi"),
    [(4, 100, 0.5), (4, 101, 0.9), (100, 20, 0.9), (3, 9, 0.0), (2, 7, 0.5), (4, 200, -0.6), (5, 1000, 0.99)],
)
def test_r_hat_and_effective_sizes_are_those_of_arviz(chains, draws, phi):
    x = autoregressive(chains, draws, phi)
    for values in (x, x**3, (x > 0.3).double(), (3 * x).round(), x + torch.arange(chains).unsqueeze(1)):
        for kind in ("bulk", "tail", "mean"):
            quantiles = {"prob": (0.05, 0.95)} if kind == "tail" else {}
            expected = float(az.ess(values.numpy(), method=kind, **quantiles))
            assert float(chain_ess(values, kind)) == pytest.approx(expected, rel=1e-9)
        assert float(r_hat(values)) == pytest.approx(float(az.rhat(values.numpy())), rel=1e-9)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_the_effective_size_is_that_of_the_autocorrelation_time(phi):
    x = autoregressive(50, 2000, phi, seed=3)
    expected = x.numel() * (1 - phi) / (1 + phi)
    assert float(chain_ess(x, "mean")) == pytest.approx(expected, rel=0.15)  # of an estimate of the time itself
    assert abs(float(r_hat(x)) - 1) < 0.01


def test_each_number_of_a_draw_is_judged_by_itself():
    x = torch.stack([autoregressive(4, 50, phi, seed=i) for i, phi in enumerate((0.0, 0.5, 0.9, -0.5))], -1)
    whole = chain_ess(x.reshape(4, 50, 2, 2))
    assert whole.shape == (2, 2)
    single = torch.stack([chain_ess(x[..., i]) for i in range(4)])
    torch.testing.assert_close(whole.flatten(), single)


def test_constants_and_what_is_not_finite():
    x = torch.ones(4, 20, 3, dtype=F64)
    x[:, :, 1] = torch.randn(4, 20, generator=torch.Generator().manual_seed(0), dtype=F64)
    x[2, 3, 2] = torch.nan
    ess, hat = chain_ess(x), r_hat(x)
    assert float(ess[0]) == 80
    assert ess.isnan().tolist() == [False, False, True]
    assert hat.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("draws", "error", "message"),
    [
        ([1.0], TypeError, "draws must be a real tensor, got list"),
        (torch.zeros(4, 9, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.zeros(4, 3), ValueError, r"at least 4 draws, got \(4, 3\)"),
        (torch.zeros(9), ValueError, "at least 4 draws"),
    ],
)
def test_bad_draws(draws, error, message):
    for function in (chain_ess, r_hat):
        with pytest.raises(error, match=message):
            function(draws)
    with pytest.raises(ValueError, match="kind must be 'bulk', 'tail' or 'mean'"):
        chain_ess(torch.zeros(4, 9), "all")


# --------------------------------------------------------------------------------------------------------- the draws
@pytest.fixture(scope="module")
def draws():
    ebm = EBM((2, 3), energy=lambda x: x.square().flatten(1).sum(1) / 2)
    return MALA(20).run(ebm, draws=60, warmup=100, seed=0)


def test_draws_say_how_good_they_are(draws):
    text = repr(draws)
    assert text.startswith("Draws(20 chains × 60 draws of x (2, 3) by MALA(chains=20")
    assert f"worst R-hat {float(draws.r_hat.max()):.3f}, least ESS {float(draws.ess.min()):.0f}" in text
    assert f"acceptance {float(draws.acceptance.mean()):.2f} at step size" in text
    assert (len(draws), draws.flat.shape) == (60, (1200, 2, 3))
    assert draws.warmup == 100


def test_the_summary_holds_moments_and_their_errors(draws):
    summary = draws.summary()
    x = draws.x.double()
    torch.testing.assert_close(summary.mean, x.flatten(0, 1).mean(0))
    torch.testing.assert_close(summary.mcse_mean, x.flatten(0, 1).std(0) / chain_ess(x, "mean").sqrt())
    torch.testing.assert_close(summary.r_hat, r_hat(draws.x))
    assert summary.ess_tail.shape == (2, 3)
    assert len(repr(summary).split("\n")) == 7
    assert "ess_bulk" in repr(summary)


def test_draws_can_be_copied_and_kept(draws):
    for again in (copy.deepcopy(draws), pickle.loads(pickle.dumps(draws))):
        assert isinstance(again, Draws)
        assert torch.equal(again.x, draws.x)
        assert again.sampler == draws.sampler


def test_few_draws_have_no_r_hat():
    short = Langevin(5).run(EBM(1, energy=lambda x: x.square().sum(1)), draws=2, warmup=0, seed=0)
    assert "R-hat" not in repr(short)
    assert "ess" not in to_inference_data(short)["sample_stats"]


# ---------------------------------------------------------------------------------------------------------- to ArviZ
def test_the_groups_of_a_run(draws):
    data = to_inference_data(draws)
    x = data["posterior"]["x"]
    assert x.dims == ("chain", "draw", "height", "width")
    np.testing.assert_array_equal(x.values, draws.x.numpy())
    stats = data["sample_stats"]
    np.testing.assert_array_equal(stats["lp"].values, draws.log_density.numpy())
    np.testing.assert_array_equal(stats["acceptance_rate"].values, draws.acceptance.numpy())
    assert stats["diverging"].dtype == bool
    assert stats["step_size"].values == pytest.approx(draws.step_size)
    expected = [float(chain_ess(draws.x[c : c + 1]).min()) for c in range(20)]
    np.testing.assert_allclose(stats["ess"].values, expected)
    for attrs in (data.attrs, data["posterior"].attrs, stats.attrs):
        assert attrs["draws_of"] == "the draws are of x, the model's data"
        assert attrs["sampler"] == repr(draws.sampler)
    assert data["posterior"].attrs["tuning_steps"] == 100
    assert (data.attrs["inference_library"], data.attrs["inference_method"]) == ("pyro_gen", "MALA")


def test_arviz_reads_a_run(draws):
    data = to_inference_data(draws, coords={"width": ["a", "b", "c"]})
    np.testing.assert_allclose(az.ess(data)["x"].values, draws.ess.numpy())
    hats = az.rhat(data)["x"].values  # in float32 distances from the median tie, and their ranks with them
    np.testing.assert_allclose(hats, draws.r_hat.numpy(), atol=1e-3)
    summary = az.summary(data)
    assert len(summary) == 6
    assert any("a" in str(name) for name in summary.index)


def test_loo_of_draws_of_data_is_refused(draws):
    with pytest.raises(TypeError, match="draws are of x, the model's data: there are no parameters"):
        az.loo(to_inference_data(draws))


def test_options_of_models_are_refused(draws):
    for options in ({"data": torch.zeros(3, 1)}, {"draws": 3}, {"predictive": True}, {"prior": 5}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}= is for models and guides"):
            to_inference_data(draws, **options)


def test_discrete_draws_convert_too():
    draws = Gibbs(4).run(EBM(3, "rbm", "bernoulli", hidden=(2,)), draws=10, warmup=5, seed=0)
    assert to_inference_data(draws)["posterior"]["x"].shape == (4, 10, 3)


def test_coordinates_that_never_change_are_counted_not_shown_as_nan():
    target = Target(lambda x: -x.square().sum(-1) / 2, torch.Size([2]), torch.empty(0))
    draws = MALA(20, step_size=1.0).run(target, draws=50, warmup=20, start=torch.zeros(2), seed=0)
    assert "never change" not in repr(draws)
    x = draws.x.clone()
    x[..., 1] = 3.0
    still = repr(replace(draws, x=x))
    assert "1 of 2 coordinates never change" in still
    assert "nan" not in still
