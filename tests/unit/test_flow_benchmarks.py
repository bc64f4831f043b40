"""The benchmarks of flows: that their targets are the densities they say, and that their statistics and budget are."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from pyro_gen.transforms import Compose, MaskedAutoregressive, Spline

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import flow_kl
from flows import training
from flows.summaries import Estimate, paired_over_rows, paired_over_seeds, summarise
from flows.targets import TARGETS, Funnel, StudentTMixture, write_rows

N = 200_000


def near(values: Tensor, expected: float) -> bool:
    """The mean is within 4 standard errors of the expected value."""
    return abs(float(values.mean()) - expected) <= 4 * float(values.std()) / math.sqrt(len(values))


def grid(low: float, high: float, steps: int) -> tuple[Tensor, float]:
    ticks = torch.linspace(low, high, steps, dtype=torch.float64)
    return torch.cartesian_prod(ticks, ticks), float(ticks[1] - ticks[0]) ** 2


# ---------------------------------------------------------------------------------------------------------- targets --
def test_funnel_is_a_product_of_normals() -> None:
    x = Funnel().sample(50, seed=0)
    v, rest = x[:, 0].numpy(), x[:, 1:].numpy()
    expected = stats.norm.logpdf(v) + stats.norm.logpdf(rest, scale=np.exp(v / 2)[:, None]).sum(-1)
    np.testing.assert_allclose(Funnel().log_prob(x).numpy(), expected, rtol=1e-12)


def test_funnel_draws_have_its_entropy() -> None:
    """E log p = -5 log(2πe) - 4.5 E v, with E v = 0; with sd e^v for variance e^v the draws do not fit the density."""
    funnel, x = Funnel(), Funnel().sample(N, seed=1)
    entropy = 5 * math.log(2 * math.pi * math.e)
    assert near(funnel.log_prob(x), -entropy)
    wrong = torch.cat([x[:, :1], x[:, 1:] * (x[:, :1] / 2).exp()], -1)
    assert not near(funnel.log_prob(wrong), -entropy)
    assert near(x[:, 3].square(), math.exp(0.5))  # E e^v


def test_student_t_mixture_against_scipy() -> None:
    target = StudentTMixture()
    q = target.rotation
    torch.testing.assert_close(q @ q.mT, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-13)
    assert float(torch.linalg.det(q)) == pytest.approx(1)
    x = target.sample(50, seed=0)
    u = (x @ q).numpy()
    parts = [
        stats.t.logpdf(u, 8, loc=m, scale=s).sum(-1)
        for m, s in zip(target.means.numpy(), target.scales.numpy(), strict=True)
    ]
    np.testing.assert_allclose(target.log_prob(x).numpy(), np.logaddexp(*parts) - math.log(2), rtol=1e-12)
    assert (target.means[0] == -target.means[1]).all()
    assert (target.scales[0] != target.scales[1]).all()


def test_student_t_mixture_integrates_to_one() -> None:
    """On ± 60 the tails left out have P(|t| > 59) < 1e-10; the trapezoidal rule's own error is far below."""
    points, cell = grid(-60, 60, 1201)
    assert float(StudentTMixture(dim=2).log_prob(points).exp().sum() * cell) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("target", "inner"),
    [(Funnel(), Funnel(scale=0.7)), (StudentTMixture(), StudentTMixture(nu=12.0))],
    ids=["funnel", "student_t"],
)
def test_draws_and_density_agree(target: Any, inner: Any) -> None:
    """E_p[g(x) / p(x)] = 1 for a density g with lighter tails than p, if the draws are p's and p is normalised."""
    x = target.sample(N, seed=2)
    assert near((inner.log_prob(x) - target.log_prob(x)).exp(), 1)
    assert not near((inner.log_prob(x) - (target.log_prob(x) + 0.1)).exp(), 1)
    assert not near((inner.log_prob(x.flip(-1)) - target.log_prob(x.flip(-1))).exp(), 1)  # not the draws of p


@pytest.mark.parametrize("name", TARGETS)
def test_rows_come_with_their_density(name: str, tmp_path: Path) -> None:
    write_rows(name, tmp_path, {"train": 300, "validation": 200, "test": 400})
    rows = {part: np.load(tmp_path / f"{part}.npy") for part in ("train", "validation", "test", "log_p")}
    assert [len(rows[part]) for part in ("train", "validation", "test", "log_p")] == [300, 200, 400, 400]
    assert rows["train"].dtype == np.float32
    assert rows["train"].shape[1] == TARGETS[name].dim
    assert np.isfinite(rows["log_p"]).all()
    again = TARGETS[name].make().log_prob(torch.from_numpy(rows["test"]).double())
    np.testing.assert_allclose(rows["log_p"], again.numpy(), rtol=1e-12)
    assert not (rows["train"][:200] == rows["validation"]).any()


# ------------------------------------------------------------------------------------------------------- statistics --
def test_summary_of_a_fit() -> None:
    """log p - log q = 0, 1, …, 1000 in thousandths: mean and median .5, and the 99.9 % quantile .999."""
    log_q = -np.arange(1001) / 1000
    fit = summarise(np.zeros(1001), log_q)
    assert fit.kl.value == pytest.approx(0.5)
    assert fit.kl.standard_error == pytest.approx(math.sqrt((1001**2 - 1) / 12 / 1e6 * 1001 / 1000 / 1001))
    assert (fit.median, fit.quantile) == (pytest.approx(0.5), pytest.approx(0.999))


def test_pairs_take_out_what_is_shared() -> None:
    """Two libraries .01 apart on rows that differ by 1: visible in pairs, not in two separate means."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=4000)
    ours, theirs = (np.stack([shared + gain + rng.normal(0, 0.05, 4000) for _ in range(3)]) for gain in (0.01, 0.0))
    paired = paired_over_rows(ours, theirs)
    assert abs(paired.value + 0.01) <= 4 * paired.standard_error  # a higher log q is a lower KL
    assert paired.standard_error == pytest.approx(0.05 * math.sqrt(2 / 3 / 4000), rel=0.1)  # s.e. of an s.e.: 1 %
    apart = math.hypot(ours.mean(0).std() / math.sqrt(4000), theirs.mean(0).std() / math.sqrt(4000))
    assert apart > 10 * paired.standard_error
    by_seed = paired_over_seeds(np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.0, 4.0]))
    assert by_seed == Estimate(pytest.approx(-0.5), pytest.approx(0.5 / math.sqrt(3)))
    with pytest.raises(ValueError, match="same seeds"):
        paired_over_seeds(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="same rows"):
        paired_over_rows(np.zeros((2, 3)), np.zeros((2, 4)))


@pytest.mark.parametrize(("difference", "says"), [(-0.01, "ahead"), (0.02, "within"), (0.0201, "behind")])
def test_verdict(difference: float, says: str) -> None:
    assert says in flow_kl.verdict(difference, 0.01)


# ---------------------------------------------------------------------------------------------------- training loop --
class Normal(nn.Module):
    """N(loc, 1) on the line; log p is not a number once loc passes `breaks_at`."""

    def __init__(self, breaks_at: float = math.inf) -> None:
        super().__init__()
        self.loc, self.breaks_at = nn.Parameter(torch.zeros(())), breaks_at

    def log_prob(self, x: Tensor) -> Tensor:
        broken = torch.where(self.loc.detach() > self.breaks_at, math.nan, 0.0)
        return -0.5 * (x - self.loc - broken).square().sum(-1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that moves by a hundredth whenever it is read."""
    now = [0.0]

    def cpu() -> float:
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr(training, "cpu", cpu)
    return now


def test_training_keeps_to_its_budget(clock: list[float]) -> None:
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)) + 1
    model, report = training.train(Normal, x, x[:500], seconds=10.0, lr=0.01, batch=100)
    # the budget is 1000 readings: one a step or check, two an evaluation; after the last step the clock is read thrice,
    # for the last evaluation and the report, of which the reserve of 1.2 times what an evaluation takes covers one
    assert 9.9 < report["cpu"] <= 10.0 + 2 * 0.01 + 1e-9
    assert report["evaluations"] == len(training.CHECKS) + 2
    assert 900 < report["steps"] < 1000 - 2 * report["evaluations"]
    assert float(model.loc.detach()) == pytest.approx(float(x.mean()), abs=0.05)
    again = float(training.log_prob(model, x[:500]).double().mean())
    assert again == report["validation"]  # the best weights are the ones that come back


def test_training_returns_the_weights_before_a_divergence(clock: list[float]) -> None:
    x = torch.zeros(200, 1) + 3
    model, report = training.train(lambda: Normal(breaks_at=0.5), x, x, seconds=10.0, lr=0.01, batch=100)
    assert report["diverged"]
    assert math.isfinite(report["validation"])
    assert float(model.loc.detach()) <= 0.5


def test_training_order_is_the_same_for_everybody() -> None:
    x = torch.arange(10.0)
    streams = [training.batches(x, 4, torch.Generator().manual_seed(5)) for _ in range(2)]
    drawn = [[next(stream) for _ in range(6)] for stream in streams]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert len(torch.cat(drawn[0][:2]).unique()) == 8  # an epoch has whole batches, no row twice


def test_standardised_density_is_of_the_rows_as_given() -> None:
    x = torch.randn(5000, 3) * torch.tensor([0.1, 2.0, 30.0]) + 7
    location, scale, log_jacobian = training.standardise(x)
    z = (x - location) / scale
    given = torch.distributions.Normal(location, scale).log_prob(x).double().sum(-1)
    own = torch.distributions.Normal(0.0, 1.0).log_prob(z).double().sum(-1) + log_jacobian
    torch.testing.assert_close(own, given, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- results --
def test_parameters_wanted_are_those_of_the_flow() -> None:
    layers = [MaskedAutoregressive(Spline(bins=8), 10, (128, 128)) for _ in range(3)]
    assert flow_kl.wanted("funnel") == sum(p.numel() for p in Compose(layers).parameters())


def record(stage: str, library: str, *rest: Any, **values: Any) -> flow_kl.Record:
    return {"key": [stage, "moons", library, *rest], **values}


def test_results_resume_and_repeat(tmp_path: Path) -> None:
    results = flow_kl.Results(tmp_path)
    longer = flow_kl.LONGER * 10.0
    for form, mixing, early, late in (("coupling", "flip", -0.9, -0.8), ("autoregressive", "lu", -1.0, -0.7)):
        for activation, lead in (("relu", 0.0), ("silu", -0.05)):
            setting = {"form": form, "mixing": mixing, "activation": activation, "depth": 2}
            results.add(
                record("search", "ours", *setting.values(), 10.0, configuration=setting, validation=early + lead)
            )
            for depth, gain in ((2, 0.0), (3, 0.1)):
                deep = setting | {"depth": depth}
                nats = 5.0 if activation == "silu" else late + gain  # those that are no finalists do not count
                results.add(record("search", "ours", *deep.values(), longer, configuration=deep, validation=nats))
    results.add(record("search", "zuko", *setting.values(), longer, configuration=setting, validation=0.0))
    again = flow_kl.Results(tmp_path)
    assert again.records == results.records
    assert [c["form"] for c in flow_kl.ranked("moons", "ours", again, 10.0)][:2] == ["coupling", "coupling"]
    finalists = flow_kl.finalists("moons", "ours", again, 10.0)  # the best of each form, at each depth
    assert {c["form"] for c in finalists} == {"coupling", "autoregressive"}
    assert {c["activation"] for c in finalists} == {"relu"}
    chosen = flow_kl.chosen("moons", "ours", again, 10.0)  # by the fits that had more time
    assert (chosen["form"], chosen["depth"]) == ("autoregressive", 3)
    again.forget(["moons"], ["ours"])
    assert {key[2] for key in flow_kl.Results(tmp_path).records} == {"zuko"}


def test_table_says_who_is_ahead(tmp_path: Path) -> None:
    results = flow_kl.Results(tmp_path)
    (tmp_path / "moons").mkdir()
    setting = {"form": "coupling", "mixing": "lu", "activation": "relu", "depth": 2}
    layout, chosen, longer = setting | {"parameters": 100}, list(setting.values()), flow_kl.LONGER * 10.0
    for library, kl in (("ours", 0.1), ("zuko", 0.2), ("nflows", 0.05)):
        for seconds in (10.0, longer):
            results.add(record("search", library, *chosen, seconds, configuration=setting, validation=-1.0))
        for seed in (1, 2):
            value = kl + 0.001 * seed
            numbers = {"kl": value, "kl_error": 0.01, "median": 0.0, "quantile": 1.0, "steps": 10}
            results.add(record("final", library, *chosen, seed, 60.0, configuration=setting, layout=layout, **numbers))
            np.save(results.log_q("moons", library, setting, seed), np.full(5, -value))
    text = flow_kl.table("moons", ["ours", "zuko", "nflows", "normflows"], results, 60.0, 10.0, seeds=2)
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.count("|") > 3}
    assert "0.1015 ± 0.0005" in lines["pyro_gen"]
    assert ", ahead" in lines["zuko"]
    assert ", behind" in lines["nflows"]
    assert "normflows" not in lines  # nothing was run for it
    assert json.loads(results.path.read_text().splitlines()[0])["key"][0] == "search"
