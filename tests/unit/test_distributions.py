"""Distributions of the package against closed forms."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_gen.distributions import DiscretizedLogistic, Held, likelihood


def direct(k: Tensor, loc: Tensor, scale: Tensor, levels: int, half: float = 0.5) -> Tensor:
    """Mass of a level as the difference of two distribution functions, in float64."""
    above = torch.where(k >= levels - 1, math.inf, (k + half - loc) / scale)
    below = torch.where(k <= 0, -math.inf, (k - half - loc) / scale)
    return torch.sigmoid(above) - torch.sigmoid(below)


def test_masses_are_differences_of_the_distribution_function() -> None:
    torch.manual_seed(0)
    loc, scale = 16 * torch.rand(50, 1).double(), 0.3 + 3 * torch.rand(50, 1).double()
    k = torch.arange(17.0).double()
    ours = DiscretizedLogistic(loc, scale, 17).log_prob(k.expand(50, 17)).exp()
    torch.testing.assert_close(ours, direct(k, loc, scale, 17), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(ours.sum(-1), torch.ones(50).double(), rtol=0, atol=1e-12)
    assert not torch.allclose(ours, direct(k, loc, scale, 17, half=0.4), rtol=1e-3)  # narrower bins are another thing


def test_no_digit_is_lost_far_from_the_location() -> None:
    loc = torch.tensor([-1e3, 1e3, 1e5], requires_grad=True)
    scale = torch.tensor([1.0, 0.01, 10.0], requires_grad=True)
    log_p = DiscretizedLogistic(loc, scale, 17).log_prob(torch.tensor([8.0, 8.0, 8.0]))
    # far out the mass is that of an exponential tail: -|k -+ 1/2 - loc| / s + log(1 - exp(-1/s))
    near = torch.tensor([-(7.5 + 1e3), -(1e3 - 8.5) / 0.01, -(1e5 - 8.5) / 10])
    width = torch.log(-torch.expm1(-1 / scale.detach()))
    torch.testing.assert_close(log_p.detach(), near + width, rtol=1e-5, atol=1e-4)
    log_p.sum().backward()
    assert torch.isfinite(loc.grad).all()
    assert torch.isfinite(scale.grad).all()


def test_moments_and_draws() -> None:
    loc, scale = torch.tensor([0.3, 5.0, 15.8]), torch.tensor([2.0, 0.4, 1.0])
    d = DiscretizedLogistic(loc, scale, 17)
    k = torch.arange(17.0)
    p = d.expand((17, 3)).log_prob(k[:, None].expand(17, 3)).exp()
    torch.testing.assert_close(d.mean, (p * k[:, None]).sum(0), rtol=1e-5, atol=1e-5)
    variance = (p * k[:, None].square()).sum(0) - (p * k[:, None]).sum(0).square()
    torch.testing.assert_close(d.variance, variance, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    n = 40_000
    x = d.sample((n,))
    assert x.shape == (n, 3)
    assert bool(d.support.check(x).all())
    counts = torch.stack([(x == level).sum(0) for level in k]).double()
    standard = (counts - n * p) / (n * p * (1 - p)).sqrt().clamp_min(1e-3)
    assert bool((standard[n * p > 5].abs() < 4.5).all())  # 51 cells: beyond 4.5 sigma once in 3000 runs
    wrong = DiscretizedLogistic(loc + 0.05, scale, 17).expand((17, 3)).log_prob(k[:, None].expand(17, 3)).exp()
    away = (counts - n * wrong) / (n * wrong * (1 - wrong)).sqrt().clamp_min(1e-3)
    assert not bool((away[n * wrong > 5].abs() < 4.5).all())


@pytest.mark.parametrize("levels", [1, 0, True, 2.5])
def test_levels_are_checked(levels: object) -> None:
    with pytest.raises(ValueError, match="levels must be an int of at least 2"):
        DiscretizedLogistic(torch.zeros(()), torch.ones(()), levels)  # type: ignore[arg-type]


def test_values_outside_are_refused_under_validation() -> None:
    with pytest.raises(ValueError, match="support"):
        DiscretizedLogistic(torch.zeros(()), torch.ones(()), 5, validate_args=True).log_prob(torch.tensor(5.0))


@pytest.mark.parametrize(
    "given",
    [
        dist.Normal(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 2.0])).to_event(1),
        dist.MultivariateNormal(torch.zeros(2), covariance_matrix=torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
        dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.randn(2, 2), 1.0).to_event(1)
        ),
        dist.StudentT(3.0, torch.zeros(2), torch.ones(2)).to_event(1),
    ],
    ids=lambda d: type(d).__name__,
)
def test_held_distributions_follow_their_module(given: dist.TorchDistribution) -> None:
    module = Held(given)
    x = torch.randn(7, 2)
    torch.testing.assert_close(module().log_prob(x), given.log_prob(x))
    assert module.double()().log_prob(x.double()).dtype == torch.float64
    again = copy.deepcopy(module)
    torch.testing.assert_close(again().log_prob(x.double()), given.log_prob(x).double(), rtol=1e-5, atol=1e-5)
    with pyro.validation_enabled(False):
        on_meta = copy.deepcopy(module).to("meta")()
        assert on_meta.log_prob(torch.empty(7, 2, dtype=torch.float64, device="meta")).device.type == "meta"
    assert given.log_prob(x).dtype == torch.float32  # the one given stays as it was


def test_held_tensors_are_saved_and_no_parameters() -> None:
    module = Held(dist.Normal(torch.tensor([0.5]), torch.tensor([2.0])).to_event(1))
    assert not list(module.parameters())
    other = Held(dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))
    other.load_state_dict(module.state_dict())
    assert float(other().mean) == 0.5


SHAPE = torch.Size((3, 4))


@pytest.mark.parametrize(
    ("name", "options", "maps"),
    [
        ("bernoulli", {}, 1),
        ("normal", {"scale": "shared"}, 1),
        ("normal", {"scale": 0.3}, 1),
        ("normal", {"scale": "predicted"}, 2),
        ("categorical", {"levels": 5}, 5),
        ("discretized_logistic", {"levels": 5}, 2),
    ],
)
def test_likelihoods_read_blocks_of_the_decoder(name: str, options: dict, maps: int) -> None:
    made = likelihood(name, SHAPE, **options)
    assert made.maps == maps
    raw = torch.randn(6, 2, maps, *SHAPE)
    d = made(raw)
    assert d.batch_shape == (6, 2)
    assert d.event_shape == SHAPE
    x = d.sample()
    made.check(x)
    assert d.log_prob(x).shape == (6, 2)
    assert d.mean.shape == (6, 2, *SHAPE)
    base = d.base_dist
    if name == "bernoulli":
        torch.testing.assert_close(base.logits, raw[:, :, 0])
    if name == "normal":
        torch.testing.assert_close(base.loc, raw[:, :, 0])
    if options.get("scale") == "predicted":
        torch.testing.assert_close(base.scale, raw[:, :, 1].exp())
    if name == "categorical":
        expected = torch.log_softmax(raw, -3).gather(-3, x.long().unsqueeze(-3)).squeeze(-3).sum((-1, -2))
        torch.testing.assert_close(d.log_prob(x), expected)


def test_support_errors_name_row_value_and_cure() -> None:
    made = likelihood("categorical", torch.Size((2,)), levels=17)
    x = torch.tensor([[0.0, 16.0], [3.0, 17.0], [1.5, 0.0]])
    with pytest.raises(ValueError, match=r"0 … 16\) in 2 of 3 rows, first x\[1, 1\] = 17.*levels="):
        made.check(x)


def test_constant_columns_have_no_maximum() -> None:
    x = torch.randn(10, 3)
    x[:, 1] = 2.0
    for scale in ("feature", "predicted"):
        with pytest.raises(ValueError, match=r"constant in column 1 .*scale='shared'"):
            likelihood("normal", torch.Size((3,)), scale=scale).check_training(x)
    likelihood("normal", torch.Size((3,)), scale="shared").check_training(x)
    likelihood("normal", torch.Size((3,)), scale=0.1).check_training(x)


def test_unknown_names_and_options() -> None:
    with pytest.raises(ValueError, match="'bernoulli', 'normal', 'categorical', 'discretized_logistic'"):
        likelihood("gauss", SHAPE)
    with pytest.raises(ValueError, match="levels="):
        likelihood("categorical", SHAPE)
    with pytest.raises(ValueError, match="levels= belongs to"):
        likelihood("normal", SHAPE, levels=3)
    with pytest.raises(ValueError, match="scale= belongs to"):
        likelihood("bernoulli", SHAPE, scale=0.1)
    with pytest.raises(ValueError, match="scale must be a positive number"):
        likelihood("normal", SHAPE, scale=-1.0)
    assert likelihood("normal", SHAPE).support is constraints.real
