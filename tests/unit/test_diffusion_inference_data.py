"""A diffusion for ArviZ: its bound by row with kind and error, the price of each level, paths of the chain."""

import math

import numpy as np
import pytest
import torch

import pyro_gen as pg
from pyro_gen.programs import Diffusion


class Linear(torch.nn.Module):
    """The mean of standard normal data given y, whose bound in closed form is log N(x; 0, I) less the gap at T."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, y, t):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return (alpha / (alpha**2 + sigma**2)).unsqueeze(1) * y


def groups(idata):
    """Names of groups, in ArviZ 0.x and 1.x."""
    return set(idata.groups() if callable(idata.groups) else idata.children)


def normal_diffusion(timesteps=20, form="collapsed"):
    from pyro_gen.distributions.noise import CosineSchedule

    schedule = CosineSchedule()
    program = Diffusion(2, Linear(schedule), schedule, timesteps, "x0", form=form, standardise=False).double()
    program.initialise(torch.zeros(2, 2, dtype=torch.float64))
    return program


@pytest.fixture(scope="module")
def x():
    return torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("timesteps", [20, None])
def test_bound_and_its_terms(x, timesteps):
    program = normal_diffusion(timesteps)
    idata = pg.to_inference_data(program, x, seed=0)
    assert groups(idata) >= {"observed_data", "log_evidence"}
    evidence = idata["log_evidence"]
    assert dict(evidence["x"].sizes) == {"chain": 1, "draw": 1, "data": 400}
    for attrs in (evidence.attrs, evidence["x"].attrs):
        assert (attrs["kind"], attrs["likelihood_kind"], attrs["units"]) == ("lower bound", "elbo", "nats")
    log_p = -x.square().sum(1) / 2 - math.log(2 * math.pi)
    # the reverse chain is exact, so the bound is log p up to the KL at the last level, which is far below its error
    gap = (torch.as_tensor(evidence["x"].values.copy()).flatten() - log_p).numpy()
    error = evidence["standard_error"].values
    assert abs(gap.mean()) < 4 * evidence.attrs["mc_se"]
    assert evidence.attrs["mc_se"] == pytest.approx(np.sqrt((error**2).sum()) / 400)
    levels = idata["noise_levels"]
    steps = 20 if timesteps else 129
    assert dict(levels["step_loss"].sizes) == {"time": steps}
    total = float(levels["step_loss"].sum() + levels["prior_loss"])
    assert total == pytest.approx(-float(evidence["x"].mean()), abs=1e-10)
    times = torch.as_tensor(levels["time"].values.copy())
    assert times[0] == pytest.approx(program.times[0])
    torch.testing.assert_close(program.schedule.log_snr(times), torch.as_tensor(levels["log_snr"].values.copy()))
    assert bool((times.diff() > 0).all())
    if timesteps:
        last = program.schedule.alpha(times[-1:]) ** 2  # KL of N(αu, 1 - α²) from N(0, 1)
        prior_loss = (last * (x.square() - 1) - torch.log1p(-last)).sum(1).mean() / 2
        assert float(levels["prior_loss"]) == pytest.approx(float(prior_loss), rel=1e-6)
    assert not {"latent", "latent_stats", "posterior", "log_likelihood"} & groups(idata)


def test_a_wrong_network_costs_more_at_its_levels(x):
    program = normal_diffusion()
    right = pg.to_inference_data(program, x, seed=0)["noise_levels"]["step_loss"].values

    class Wrong(Linear):
        def forward(self, y, t):
            return super().forward(y, t) * torch.where(t < 0.5, 1.0, 1.5).unsqueeze(1)

    program.model.net = Wrong(program.schedule)
    found = pg.to_inference_data(program, x, seed=0)["noise_levels"]
    worse = found["step_loss"].values - right
    late = found["time"].values >= 0.5
    assert np.abs(worse[~late]).max() == 0  # the same draws
    # û times 1.5 adds (û / 2)² to the square it misses by, E û² = α² a feature; a KL counts c0² / (2 variance) of it
    step = program.model.steps()
    added = (step.weight * 0.25 * step.alpha**2 / (step.variance + step.weight * step.error)).numpy()
    errors = found["step_loss_se"].values
    assert worse[late].sum() == pytest.approx(added[late].sum(), abs=4 * np.sqrt((errors[late] ** 2).sum()))
    assert worse[late].sum() > 4 * np.sqrt((errors[late] ** 2).sum())


def test_chain_of_sites_has_its_paths_or_not(x):
    program = normal_diffusion(5, "sites")
    idata = pg.to_inference_data(program, x, draws=200, importance=50, max_rows=30, seed=0)
    latent = idata["latent"]
    assert sorted(latent.data_vars) == [f"y_{i}" for i in range(1, 6)]
    assert dict(latent["y_3"].sizes) == {"chain": 1, "draw": 200, "data": 30, "feature": 2}
    # moments are of the paths: y_i given x alone is N(alpha x, sigma^2), not what one step given the last would say
    times = program.model.grid[1:]
    for i in (1, 3):
        alpha, sigma = (
            float(part) for part in (program.schedule.alpha(times[i - 1]), program.schedule.sigma(times[i - 1]))
        )
        miss = (idata["latent_stats"][f"y_{i}_mean"].values - alpha * x[:30].numpy()) / (sigma / math.sqrt(200))
        assert np.abs(miss).max() < 5  # of 60 numbers
        assert idata["latent_stats"][f"y_{i}_mean"].attrs["of"] == "draws"
        assert idata["latent_stats"][f"y_{i}_sd"].values.mean() == pytest.approx(sigma, rel=0.05)
    assert idata["log_evidence"].attrs["likelihood_kind"] == "marginal_iwae"
    assert "noise_levels" in groups(idata)
    without = pg.to_inference_data(program, x, draws=200, importance=None, latents=False, seed=0)
    assert not {"latent", "latent_stats", "log_evidence", "noise_levels"} & groups(without)


def test_predictive_draws_are_draws_of_the_chain(x):
    idata = pg.to_inference_data(normal_diffusion(50), x, predictive=True, max_rows=400, importance=None, seed=0)
    drawn = idata["posterior_predictive"]["x"]
    assert dict(drawn.sizes) == {"chain": 1, "draw": 1, "data": 400, "feature": 2}
    assert abs(float(drawn.mean())) < 4 / math.sqrt(800)
    assert abs(float(drawn.var()) - 1) < 4 * math.sqrt(2 / 800)


def test_files_keep_the_levels(x, tmp_path):
    import xarray as xr

    idata = pg.to_inference_data(normal_diffusion(5), x, seed=0)
    idata.to_netcdf(str(tmp_path / "d.nc"))
    again = xr.open_dataset(tmp_path / "d.nc", group="noise_levels")
    assert again["step_loss"].values == pytest.approx(idata["noise_levels"]["step_loss"].values)
    again.close()
