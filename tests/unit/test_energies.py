"""EBMs through the roads that all programs share: fit, settings, ArviZ, log p(x)."""

from __future__ import annotations

from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_gen as pg
from pyro_gen.handlers import log_density


def half_square(x: Tensor) -> Tensor:
    return x.square().sum(-1) / 2


@pytest.fixture
def x() -> Tensor:
    return torch.randn(60, 2, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------- energy
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda x: x, "one value a row"),  # (n, 2)
        (lambda x: x.sum(), "one value a row"),
        (lambda x: x[:-1].sum(-1), "one value a row"),
        (lambda x: x.sum(-1).to(torch.complex64), "real floating point"),
        (lambda x: x.sum(-1).long(), "real floating point"),
        (lambda x: 0.0, "real floating point"),
    ],
)
def test_an_energy_has_one_real_value_a_row(x: Tensor, given: object, said: str) -> None:
    ebm = pg.EBM(2, energy=given)
    with pytest.raises((TypeError, ValueError), match=said):
        ebm.log_density(x)
    with pytest.raises((TypeError, ValueError), match=said):
        log_density(ebm.model, x)


def test_a_column_of_energies_is_one_value_a_row(x: Tensor) -> None:
    column, plain = pg.EBM(2, energy=lambda x: half_square(x).unsqueeze(-1)), pg.EBM(2, energy=half_square)
    assert torch.equal(column.log_density(x), plain.log_density(x))
    assert torch.equal(log_density(column.model, x), log_density(plain.model, x))


def test_a_tilted_base_is_the_product(x: Tensor) -> None:
    flow = pg.Flow(2, layers=1, hidden=(4,))
    for base, log_base in (
        (None, torch.zeros(60)),
        (dist.Normal(torch.zeros(2), 3.0).to_event(1), dist.Normal(0.0, 3.0).log_prob(x).sum(-1)),
        (flow, flow.log_prob(x)),
    ):
        ebm = pg.EBM(2, energy=half_square, base=base)
        assert torch.allclose(ebm.log_density(x), log_base - half_square(x))
        assert torch.allclose(log_density(ebm.model, x), ebm.log_density(x))
    assert not any(p.requires_grad for p in flow.parameters())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"base": "cauchy"}, ValueError),
        ({"base": dist.Normal(torch.zeros(3), 1.0).to_event(1)}, ValueError),
        ({"base": dist.Normal(torch.zeros(2), 1.0)}, ValueError),
        ({"base": pg.Flow(3)}, ValueError),
        ({"base": "normal", "support": "positive"}, ValueError),
        ({"base": None, "support": (1.0, 0.0)}, ValueError),
        ({"energy": "mlp"}, TypeError),
        ({"energy": torch.nn.Linear}, TypeError),
        ({"energy": "rbm", "hidden": (3, 3)}, ValueError),
        ({"activation": "swish"}, ValueError),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        pg.EBM(2, **arguments)  # type: ignore[arg-type]


def test_data_outside_the_base_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="outside the support"):
        pg.EBM(2, base=None, support="positive").log_density(x)


def test_a_flat_base_asks_for_a_start() -> None:
    with pytest.raises(ValueError, match="start"):
        pg.EBM(2, energy=half_square, base=None).sample(5)
    assert pg.EBM(2, energy=half_square, base=None).sample(5, start=torch.zeros(2), seed=0, warmup=50).shape == (5, 2)


# ---------------------------------------------------------------------------------------------------------------- fit
def test_score_matching_keeps_a_validation_split_by_itself(x: Tensor) -> None:
    def fitted(objective: object, **options: object) -> pg.FitResult:
        torch.manual_seed(0)
        module = objective(pg.EBM(2, hidden=(4,)))  # type: ignore[operator]
        return pg.fit(module, x, steps=4, seed=0, progress=False, **options)  # type: ignore[arg-type]

    assert fitted(pg.ScoreMatching()).config["validation_rows"] == 6
    assert fitted(pg.SlicedScoreMatching()).validation
    assert not fitted(pg.ScoreMatching(), validation=False).validation
    assert not fitted(pg.NoiseContrastive()).validation


def test_a_loss_without_a_value_ranks_no_weights(x: Tensor) -> None:
    module = pg.ContrastiveDivergence(pg.MALA(step_size=0.1))(pg.EBM(2, hidden=(4,)))
    result = pg.fit(module, x, steps=4, validation=0.2, seed=0, progress=False)
    assert result.validation
    assert result.best_step is None
    with pytest.raises(ValueError, match="patience"):
        pg.fit(module, x, steps=4, validation=0.2, patience=3)


def test_a_sampler_comes_back_with_its_loss(tmp_path: Path, x: Tensor) -> None:
    objective = pg.ContrastiveDivergence(pg.HMC(20, leapfrog=3), 2, persistent=True)
    pg.fit(objective(pg.EBM(2, hidden=(4,))), x, steps=3, seed=0, progress=False).save(tmp_path)
    again = pg.load(tmp_path).module
    assert repr(again.objective) == repr(objective)
    assert "HMC(chains=20" in repr(objective)
    assert again.chains is not None
    assert again.chains.shape == (20, 2)


# -------------------------------------------------------------------------------------------------------------- ArviZ
def test_log_p_of_an_energy_goes_to_arviz_with_the_error_of_log_z(x: Tensor) -> None:
    ebm = pg.EBM(2, energy=half_square, base=None)
    idata = pg.to_inference_data(ebm, x, importance=pg.Quadrature())
    truth = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
    found = torch.as_tensor(idata["log_evidence"]["x"].values[0, 0])
    assert torch.allclose(found, truth.double(), atol=1e-4)
    assert idata["log_evidence"].attrs["shared_error"] < 1e-4
    assert idata["log_evidence"].attrs["likelihood_kind"] == "normalized"
    assert "log_evidence" not in pg.to_inference_data(ebm, x).groups()
