"""Contrastive divergence: what its gradient finds, what its chains remember, and what it refuses."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen.objectives.contrastive import ContrastiveDivergenceModule
from pyro_gen.testing.losses import check_one_device, check_traced

ContrastiveDivergence = pg.ContrastiveDivergence


class Quadratic(nn.Module):
    """½ (x − c)ᵀ P (x − c) + b, with an output bias that nothing determines."""

    def __init__(self, features: int = 2) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.eye(features))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x if context is None else x - context
        result: Tensor = (x @ self.precision * x).sum(-1) / 2 + self.bias
        return result


def gaussian(context_shape: int | None = None) -> tuple[pg.EBM, Quadratic]:
    net = Quadratic()
    return pg.EBM(2, energy=net, base=None, context_shape=context_shape), net


COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.8]])


def draws(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    result: Tensor = torch.randn(rows, 2, generator=generator) @ torch.linalg.cholesky(COVARIANCE).T
    return result


# ------------------------------------------------------------------------------------------------------- what it finds
class Flipped(ContrastiveDivergenceModule):
    """The wrong sign of the negatives."""

    def _of_rows(self, values: Tensor, rows: int) -> Tensor:
        return -super()._of_rows(values, rows)


@pytest.mark.slow
def test_precision_of_a_gaussian_within_its_standard_errors() -> None:
    r"""CD-k with a kernel T that leaves p invariant is consistent, and here as good as maximum likelihood.

    With g = ∂ log f and :math:`u = g - T^k g`, the estimate solves :math:`\sum_n u_\theta(x_n) = 0`. As
    :math:`p_\theta T_\theta^k = p_\theta`, the derivative of :math:`E_p[u_\theta]` at fixed p is Cov(g, u), so N times
    the covariance of the estimate tends to Cov(g, u)⁻¹ Var(u) Cov(g, u)⁻¹: where g is an eigenfunction of T that is
    Var(g)⁻¹, the covariance of maximum likelihood. For the precision P of a Gaussian, Var P̂_ij =
    (P_ii P_jj + P_ij²) / N. The noise of the chains is new at each of the averaged steps, and adds less than a tenth.
    """
    rows = 2000
    x, truth = draws(rows), torch.linalg.inv(COVARIANCE)
    error = ((truth.diag()[:, None] * truth.diag() + truth.square()) / rows).sqrt()

    def estimate(make: type[ContrastiveDivergenceModule]) -> Tensor:
        ebm, net = gaussian()
        objective = ContrastiveDivergence(pg.MALA(step_size=1.0), steps=10)
        module = make(ebm.model, ebm.guide, objective)
        module.__dict__["program"] = ebm
        pg.fit(module, x, steps=400, batch_size=rows, lr=0.02, average="tail", seed=0, compile=False, progress=False)
        found = net.precision.detach()
        return (found + found.T) / 2

    assert ((estimate(ContrastiveDivergenceModule) - truth).abs() < 4 * error).all()
    try:
        wrong = estimate(Flipped)
    except pg.Divergence:
        return
    assert not ((wrong - truth).abs() < 4 * error).all()


def test_plain_pyro_program_inside_svi() -> None:
    # Var of the precision of n normal rows: 2 P² / n; the noise of the last iterates is averaged away.
    rows, truth = 1000, 4.0
    x = torch.randn(rows, 1, generator=torch.Generator().manual_seed(1)) / math.sqrt(truth)

    def model(x: Tensor) -> None:
        precision = pyro.param("precision", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1).mask(False), obs=x)
            pyro.factor("energy", -precision * x.square().sum(-1) / 2)

    pyro.clear_param_store()
    objective = ContrastiveDivergence(steps=2, persistent=True, chains=500)
    svi = SVI(model, lambda x: None, PyroOptim(torch.optim.Adam, {"lr": 0.05}), loss=objective)
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in range(250):
            svi.step(x)
            if step >= 100:
                found.append(float(pyro.param("precision").detach()))
        (module,) = objective._bound.values()
        assert isinstance(module, ContrastiveDivergenceModule)
        assert module.chains is not None
        before = module.chains.clone()
        svi.evaluate_loss(x)
        assert torch.equal(module.chains, before)
    pyro.clear_param_store()
    assert abs(sum(found) / len(found) - truth) < 4 * truth * math.sqrt(2 / rows + 2 / (500 * 10))


def test_latent_units_are_summed_out() -> None:
    """A Gauss–Bernoulli machine with its hidden units as sites has the loss of its closed free energy."""
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    def joint(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=x)
            for j in range(3):
                h = pyro.sample(f"h{j}", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})
                pyro.factor(f"pair{j}", h * (x @ weight[:, j]))

    def closed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=x)
            pyro.factor("free", (nn.functional.softplus(x @ weight) - math.log(2)).sum(-1))

    x = draws(6)
    found = []
    for model in (joint, closed):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found.append(ContrastiveDivergence(pg.Langevin(step_size=0.3), steps=3)(model)(x))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)  # rounding of about 20 operations in float32


def test_chains_follow_their_contexts() -> None:
    ebm, _net = gaussian(context_shape=2)
    context = torch.tensor([[0.0, 0.0], [8.0, -8.0]]).repeat(4, 1)
    module = ContrastiveDivergence(pg.MALA(step_size=1.2), steps=50, chains=400)(ebm)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        negatives = module.negatives(context.clone(), context)  # type: ignore[operator]
        far = ContrastiveDivergence(pg.MALA(step_size=1.2), steps=50)(ebm.model)
        bare = far.negatives(context.clone(), context)  # type: ignore[operator]
    apart = negatives - context.repeat(50, 1)
    assert apart.abs().max() < 6  # standard normal about its own context; contexts are 11 apart
    assert (bare - context).abs().max() < 6
    assert abs(float(apart.mean())) < 4 / math.sqrt(800)
    assert module.pointwise(context.clone(), context).shape == (8,)


# ---------------------------------------------------------------------------------------------------- what it remembers
def test_persistent_chains_move_in_training_and_in_nothing_else() -> None:
    ebm, _ = gaussian()
    module: Any = ContrastiveDivergence(persistent=True, chains=20, steps=2)(ebm)
    x = draws(8)
    assert not list(module.chains or [])
    module(x)
    chains, size = module.chains.clone(), module.step_size.clone()
    assert chains.shape == (20, 2)
    with torch.no_grad():
        module(x)
    module.eval()
    module(x).backward()
    assert torch.equal(module.chains, chains)
    assert torch.equal(module.step_size, size)
    module.train()
    module(x)
    assert not torch.equal(module.chains, chains)
    assert not torch.equal(module.step_size, size)


def _note(net: Quadratic, seen: list[Tensor], step: int, values: dict[str, float]) -> None:
    seen.append(net.precision.detach().clone())


def test_validation_leaves_the_run_as_it_is() -> None:
    x, ends = draws(64), []
    for validation in (None, draws(16, seed=1)):
        ebm, net = gaussian()
        module = ContrastiveDivergence(pg.Langevin(step_size=0.3), persistent=True, chains=32)(ebm)
        seen: list[Tensor] = []
        pg.fit(
            module, x, steps=20, validation=validation, seed=0, compile=False, progress=False,
            callback=partial(_note, net, seen),
        )  # fmt: skip
        ends.append(seen[-1])
    assert torch.equal(*ends)


def test_state_goes_into_a_module_that_has_not_run() -> None:
    ebm, _ = gaussian()
    objective = ContrastiveDivergence(persistent=True, chains=50)
    module: Any = objective(ebm)
    x = draws(8)
    module(x)
    other: Any = objective(copy.deepcopy(ebm))
    other.load_state_dict(module.state_dict())
    other.prepare(x)
    assert torch.equal(other.chains, module.chains)
    assert torch.equal(other.step_size, module.step_size)
    copied = copy.deepcopy(module)
    copied.model.net.precision.data.mul_(4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = module.negatives(x)
        torch.manual_seed(0)
        two = copied.negatives(x)
    assert not torch.equal(one, two)  # a copy's chains move on the copy


def test_restarts() -> None:
    ebm, _ = gaussian()
    module: Any = ContrastiveDivergence(pg.Langevin(step_size=0.1), persistent=True, chains=1000, refresh=0.2)(ebm)
    x = draws(8)
    module.prepare(x)
    module.chains.fill_(1000.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module(x)
    near = int((module.chains.abs().amax(1) < 10).sum())
    assert abs(near - 200) < 4 * math.sqrt(1000 * 0.2 * 0.8)


def test_step_size_is_steered_to_the_acceptance() -> None:
    ebm, net = gaussian()
    net.precision.data.mul_(100.0)
    module: Any = ContrastiveDivergence(pg.MALA(), persistent=True, chains=200)(ebm)
    x = draws(8) / 10
    target = ebm.target()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(60):
            module.negatives(x)
        state = pg.MALA().init(target, module.chains, step_size=module.step_size)
        found = pg.MALA().step(target, state)[1].acceptance.mean()
    assert abs(float(found) - 0.574) < 0.1  # 200 chains: standard error .03


# ----------------------------------------------------------------------------------------------------- what the loss is
def test_loss_is_the_energy_gap_and_the_penalty_is_explicit() -> None:
    ebm, net = gaussian()
    x = draws(8)

    def at_seed(module: Any) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module.prepare(x)
            torch.manual_seed(1)
            loss = module(x)
            torch.manual_seed(1)
            return loss, module.negatives(x)

    sampler = pg.Langevin(step_size=0.5)
    loss, negatives = at_seed(ContrastiveDivergence(sampler, steps=3)(ebm))
    torch.testing.assert_close(loss, (net(x) - net(negatives)).sum())
    penalised, same = at_seed(ContrastiveDivergence(sampler, steps=3, energy_penalty=0.1)(ebm))
    assert torch.equal(negatives, same)
    torch.testing.assert_close(penalised - loss, 0.1 * (net(x).square() + net(negatives).square()).sum())
    assert not negatives.requires_grad
    loss.backward()
    assert net.bias.grad is not None
    assert abs(float(net.bias.grad)) < 1e-5


def test_temperature_is_the_samplers() -> None:
    ebm, _ = gaussian()
    sampler = pg.Langevin(step_size=0.5, temperature=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cold: Any = ContrastiveDivergence(sampler, steps=60)(ebm)
        negatives = cold.negatives(draws(500))
    # the stationary variance of a step: T σ² / (1 − ε² / 4σ²)
    want = 0.01 / (1 - 0.25 / 4)
    assert abs(float(negatives.var()) / want - 1) < 4 * math.sqrt(2 / 1000)


def test_negatives_that_are_not_finite_are_a_divergence() -> None:
    ebm, _ = gaussian()
    module = ContrastiveDivergence(pg.Langevin(step_size=50.0), steps=30, persistent=True)(ebm)
    with pytest.raises(pg.Divergence, match="loss is not finite"):
        pg.fit(module, draws(16), steps=5, seed=0, compile=False, progress=False)


@pytest.mark.parametrize("persistent", [False, True])
def test_the_step_traces_and_stays_on_its_device(persistent: bool) -> None:
    ebm, _ = gaussian()
    objective = ContrastiveDivergence(persistent=persistent, refresh=0.1 if persistent else 0.0, steps=2)
    check_traced(objective(ebm), draws(8))
    check_one_device(objective(ebm), draws(8))


def test_a_plate_of_fixed_size_takes_other_numbers_of_chains() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 100, subsample_size=8):
            pyro.sample("x", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=x)

    x = draws(8)
    module: Any = ContrastiveDivergence(steps=2, chains=11)(model)
    assert module.pointwise(x).shape == (8,)
    assert module.negatives(x).shape == (11, 2)


def test_chains_start_at_the_base_or_where_they_are_told() -> None:
    ebm = pg.EBM(2, energy=lambda x: 0 * x.sum(-1), base=dist.Normal(torch.full((2,), 50.0), 1.0).to_event(1))
    x = torch.full((4, 2), 50.0)
    for start, options in (("base", {}), (torch.full((2,), 49.0), {}), (torch.full((6, 2), 49.0), {})):
        module: Any = ContrastiveDivergence(pg.Langevin(step_size=1e-3), start=start, **options)(ebm)  # type: ignore[arg-type]
        negatives = module.negatives(x)
        assert negatives.shape == ((6, 2) if isinstance(start, Tensor) and start.dim() == 2 else (4, 2))
        assert (negatives - 50).abs().max() < 8


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"steps": 0}, ValueError, "steps must be"),
        ({"chains": 0}, ValueError, "chains must be"),
        ({"chains": 2.5}, ValueError, "chains must be"),
        ({"persistent": 1}, ValueError, "persistent must be"),
        ({"refresh": 0.1}, ValueError, "persistent=True"),
        ({"refresh": 1.5, "persistent": True}, ValueError, "refresh must be"),
        ({"energy_penalty": -1.0}, ValueError, "energy_penalty must be"),
        ({"start": "noise"}, ValueError, "start must be"),
        ({"sampler": "mala"}, TypeError, "sampler must be"),
        ({"sampler": pg.MALA}, TypeError, "sampler must be"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ContrastiveDivergence(**options)


def test_bad_temperature_is_refused_by_the_sampler() -> None:
    with pytest.raises(ValueError, match="temperature"):
        ContrastiveDivergence(pg.Langevin(temperature=0.0))


def test_what_does_not_fit_the_program() -> None:
    ebm, _ = gaussian()
    binary = pg.EBM(4, "rbm", "bernoulli", hidden=(2,))
    positive = pg.EBM(2, energy=lambda x: x.sum(-1), base=None, support="positive")
    conditional, _ = gaussian(context_shape=2)
    x = draws(8)
    with pytest.raises(TypeError, match="Gibbs draws discrete"):
        ContrastiveDivergence(pg.Gibbs())(ebm)(x)
    with pytest.raises(TypeError, match="gradient of log f"):
        ContrastiveDivergence(pg.MALA())(binary)(torch.ones(3, 4))
    with pytest.raises(ValueError, match="the support"):
        ContrastiveDivergence()(binary)(torch.full((3, 4), 0.5))
    with pytest.raises(ValueError, match="start lies outside the support"):
        ContrastiveDivergence(start=torch.tensor([-1.0, 1.0]))(positive)(x.abs())
    with pytest.raises(ValueError, match="start must be one datum"):
        ContrastiveDivergence(start=torch.zeros(3))(ebm)(x)
    with pytest.raises(ValueError, match="start must be one datum"):
        ContrastiveDivergence(start=torch.zeros(3, 2), chains=4)(ebm)(x)
    with pytest.raises(ValueError, match="base"):
        ContrastiveDivergence(start="base")(ebm)(x)
    with pytest.raises(ValueError, match="one for each context"):
        ContrastiveDivergence(persistent=True)(conditional)(x, x)
    with pytest.raises(ValueError, match="multiple of the rows"):
        ContrastiveDivergence(chains=12)(conditional)(x, x)
    with pytest.raises(TypeError, match="floating point"):
        ContrastiveDivergence()(ebm)(torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="needs a program of kind"):
        ContrastiveDivergence()(pg.VAE(2))  # type: ignore[call-overload]

    def latent(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="'z'"):
        ContrastiveDivergence()(latent, latent)(torch.zeros(3))
