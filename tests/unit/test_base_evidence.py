"""Evidence: how errors add up, and how a number is printed with its kind."""

import math

import pytest
import torch

from pyro_gen.base import Evidence


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_independent_errors_add_in_quadrature():
    evidence = Evidence(double(-1.0, -2.0, -6.0), "estimate", double(0.3, 0.0, 0.4))
    assert float(evidence.sum().value) == -9
    assert float(evidence.sum().standard_error) == pytest.approx(0.5)
    assert float(evidence.mean().value) == -3
    assert float(evidence.mean().standard_error) == pytest.approx(0.5 / 3)
    assert evidence.mean().kind == "estimate"
    assert evidence.mean().rows == 3


def test_the_shared_error_adds_linearly_and_does_not_average_out():
    evidence = Evidence(double(-1.0, -3.0), "estimate", double(0.3, 0.4), shared_error=0.5)
    assert float(evidence.sum().standard_error) == pytest.approx(math.hypot(0.5, 2 * 0.5))
    assert float(evidence.mean().standard_error) == pytest.approx(math.hypot(0.25, 0.5))
    assert evidence.mean().shared_error == 0.5
    assert evidence.sum().shared_error == 1.0
    alone = Evidence(double(-1.0, -3.0), "estimate", shared_error=0.5)
    assert float(alone.sum().standard_error) == 1.0
    # what a Monte Carlo of such errors says: 2 rows of one common and one own error
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(200_000, 2, generator=generator, dtype=torch.float64) * double(0.3, 0.4)
    common = 0.5 * torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    spread = float((own + common).sum(1).std())
    within = 4 / math.sqrt(2 * 200_000)
    assert abs(spread / float(evidence.sum().standard_error) - 1) < within
    assert abs(spread / math.sqrt(0.3**2 + 0.4**2 + 2 * 0.5**2) - 1) > within  # as if it were independent


def test_sampling_error_is_that_of_the_mean_over_rows():
    evidence = Evidence(double(1.0, 2.0, 3.0, 4.0), "exact")
    assert evidence.sum().standard_error is None
    assert float(evidence.mean().sampling_error) == pytest.approx(double(1, 2, 3, 4).std() / 2)
    assert float(evidence.sum().sampling_error) == pytest.approx(double(1, 2, 3, 4).std() * 2)
    assert math.isnan(Evidence(double(1.0), "exact").mean().sampling_error)


def test_a_part_keeps_its_diagnostics_and_a_total_names_the_worst():
    evidence = Evidence(
        double(-1, -2, -3),
        "lower bound",
        double(1, 2, 3),
        effective_sample_size=double(9, 8, 7),
        pareto_k=double(0, 2, 1),
    )
    part = evidence[1:]
    assert len(part) == 2
    assert part.kind == "lower bound"
    assert part.pareto_k.tolist() == [2, 1]
    assert part.standard_error.tolist() == [2, 3]
    assert float(evidence[evidence.pareto_k < 0.7].sum().value) == -1
    assert float(evidence.mean().pareto_k) == 2
    assert float(evidence.sum().effective_sample_size) == 7


@pytest.mark.parametrize(
    ("kind", "sign"), [("exact", "="), ("lower bound", "≥"), ("upper bound", "≤"), ("estimate", "≈")]
)
def test_printed_with_the_sign_of_its_kind(kind, sign):
    scalar = Evidence(double(-81.2346)[0], kind, double(0.0123)[0])
    assert str(scalar) == f"{sign} -81.235 ± 0.012"
    assert repr(scalar) == f"Evidence({sign} -81.235 ± 0.012)"
    assert f"({kind})" in str(Evidence(double(-1, -2), kind))
    assert f"mean {sign} -1.50" in str(Evidence(double(-1, -2), kind))


def test_printed_with_what_is_known_of_its_error():
    assert str(Evidence(double(-552.938244)[0], "exact")) == "= -552.94"
    assert str(Evidence(double(-552.9)[0], "estimate", double(math.nan)[0])) == "≈ -552.90"
    assert str(Evidence(double(-552.938244)[0], "estimate", double(3e-14)[0])) == "≈ -552.938244 ± 3e-14"
    assert str(Evidence(double(-5.0)[0], "estimate", double(0.0)[0])) == "≈ -5.00 ± 0.00"
    assert str(Evidence(double(0.00123)[0], "exact")) == "= 0.00123"
    mean = Evidence(double(-1.0, -3.0), "estimate", double(0.3, 0.4)).mean()
    assert str(mean) == "≈ -2.00 ± 0.25 (± 1.00 over 2 rows)"


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of 'exact', 'lower bound', 'upper bound', 'estimate'"):
        Evidence(double(1.0), "approximate")


def test_bits_per_dimension_scale_value_and_errors_and_turn_bounds_round():
    evidence = Evidence(
        double(-64 * math.log(2), -128 * math.log(2)), "lower bound", double(0.64, 0.0), shared_error=0.32
    )
    bits = evidence.bits_per_dimension(64)
    assert bits.value.tolist() == pytest.approx([1.0, 2.0])  # a uniform bit in each of 64 dimensions is one bit
    assert bits.kind == "upper bound"
    assert bits.label == "bits per dimension"
    assert bits.standard_error.tolist() == pytest.approx([0.01 / math.log(2), 0.0])
    assert bits.shared_error == pytest.approx(0.005 / math.log(2))
    # of the mean, or the mean of it: the same
    one, other = bits.mean(), evidence.mean().bits_per_dimension(64)
    for name in ("value", "standard_error", "sampling_error"):
        assert float(getattr(one, name)) == pytest.approx(float(getattr(other, name)))
    assert one.kind == other.kind == "upper bound"
    assert str(one).startswith("≤ 1.5")
    for kind, turned in (("exact", "exact"), ("estimate", "estimate"), ("upper bound", "lower bound")):
        assert Evidence(double(-1.0), kind).bits_per_dimension(1).kind == turned
    with pytest.raises(ValueError, match="dims must be an int of at least 1, got 0"):
        evidence.bits_per_dimension(0)
