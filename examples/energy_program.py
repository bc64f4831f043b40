"""
An energy in a Pyro program, trained in plain SVI
=================================================

An energy is a factor: it multiplies the density of a program and leaves the normalizer open. Five lines are such a
program. Pyro's own ``SVI`` trains it once its loss is one in which Z has dropped out; then Z is estimated with an
error, chains draw from the program, and ArviZ judges the chains.
"""

# %%
# The program
# -----------
#
# x has a base, a wide normal, from which chains can start and under which everything is integrable. ``pg.energy`` is
# ``pyro.factor(name, -net(x))`` with its shape held against the plate; ``pyro.factor`` itself would do too.
import os

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import nn

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        smooth = nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()
        self.net = nn.Sequential(*smooth, nn.Linear(64, 1, bias=False))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            x = pyro.sample("x", dist.Normal(x.new_zeros(2), 2.0).to_event(1), obs=x)
            pg.energy("energy", self.net, x)


# %%
# What an ELBO would do
# ---------------------
#
# An ELBO takes the log of the factor for a log-likelihood. It can always be raised, by making the factor larger
# everywhere: the loss falls without end, and nothing warns. ``pg.check`` does.
def guide(x):
    pass


def data(n):
    """Points along a parabola, and their log-density: known here, so that the result can be held against it."""
    first = torch.randn(n)
    x = torch.stack([first, first**2 / 2 - 1 + 0.7 * torch.randn(n)], -1)
    return x, dist.Normal(0.0, 1.0).log_prob(x[:, 0]) + dist.Normal(first**2 / 2 - 1, 0.7).log_prob(x[:, 1])


pyro.set_rng_seed(0)
x, _ = data(500 if quick else 5000)
wrong = Energy()
for complaint in pg.check(wrong, guide, x):
    print(complaint)

svi = SVI(wrong, guide, pyro.optim.Adam({"lr": 3e-3}), loss=pg.ELBO())
falling = [svi.step(x[:256]) / 256 for _ in range(20 if quick else 200)]
print("ELBO loss, nats per row:", ", ".join(f"{loss:.1f}" for loss in falling[:: len(falling) // 4]), "…")

# %%
# Score matching instead
# ----------------------
#
# The score ∇ₓ log f has no Z in it. One argument of ``SVI`` changes.
pyro.clear_param_store()
model = Energy()
svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), loss=pg.ScoreMatching())
losses = [svi.step(x[torch.randint(len(x), (256,))]) / 256 for _ in range(20 if quick else 1500)]

figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.2), layout="constrained")
left.plot(falling, color="#d55e00")
left.set(title="ELBO: falls without end", xlabel="step", ylabel="loss, nats per row")
right.plot(losses, color="0.8", lw=0.6, label="a batch")
window = min(50, len(losses))
smooth = torch.tensor(losses).unfold(0, window, 1).mean(1)
right.plot(range(window - 1, len(losses)), smooth, color="#0072b2", label=f"mean of {window}")
low, high = torch.tensor(losses).quantile(torch.tensor([0.005, 0.98])).tolist()
right.set(title="score matching: has a minimum", xlabel="step", ylabel="loss, 1 / (unit of x)²")
right.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
right.legend(frameon=False)
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)

# %%
# log Z, with its error
# ---------------------
#
# ``pg.Unnormalized`` says what kind of program it is. Annealing leads chains from the base to the program, and gives
# log Z with a standard error. In two dimensions a grid gives it too.
ebm = pg.Unnormalized(model, event_shape=2)
temperatures = 20 if quick else 500
annealed = pg.log_normalizer(ebm, method=pg.AnnealedImportanceSampling(temperatures, chains=100, seed=0))
print("by annealing:", annealed)
print("on a grid:   ", pg.log_normalizer(ebm, method=pg.Quadrature()))

# %%
# With it log p(x) of any row. All rows have the same log Ẑ, so its error does not average out: the result carries it
# as ``shared_error``. The density of the data is known here, so the distance from the truth can be estimated on new
# rows.
fresh, truth = data(500 if quick else 5000)
with torch.no_grad():
    gap = truth.double() - (ebm.log_density(fresh).double() - annealed.value)
error = (gap.var() / len(gap) + annealed.standard_error**2).sqrt()
print(f"KL(truth ‖ program) = {float(gap.mean()):.3f} ± {float(error):.3f} nats")

# %%
# Chains
# ------
#
# Draws of the program by MALA, fifty chains at once; step size and scale are found in warm-up. R-hat near 1 says that
# the chains agree: to ask for less than 1.01 is to ask for draws that have forgotten their start.
mala = pg.MALA(chains=20 if quick else 50)
draws = mala.run(ebm, draws=20 if quick else 2000, warmup=50 if quick else 1000, seed=0)
print(draws)
figure = pg.plots.energy(ebm, x, draws=draws.flat[torch.randperm(len(draws.flat))])
figure

# %%
# The same in ArviZ
# -----------------
idata = pg.to_inference_data(draws)
print(az.summary(idata, var_names="x").to_string())

# %%
# Four chains as ArviZ shows them: marginals left, histories right; both coordinates of x in one panel.
panels = az.plot_trace(idata.isel(chain=slice(0, 4)), var_names="x", compact=True, figsize=(9, 2.8))
((left, right),) = panels
left.set(title="marginals: $x_1$ blue, $x_2$ orange", xlabel="value", ylabel="density")
right.set(title="histories", xlabel="draw", ylabel="value")
left.figure.tight_layout()
