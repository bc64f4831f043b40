"""log_evidence by importance sampling: chunks, seeds, state, kinds, and what is refused."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import nn

from pyro_gen.base import Bounded, Evidence, EvidenceMethod, Exact, Implicit, Unnormalized
from pyro_gen.evidence import ImportanceSampling, log_evidence
from pyro_gen.evidence.chunks import even_parts, measure_bytes, plan_chunks


class Model(nn.Module):
    """z ~ N(0, 1), x | z ~ N(z, 1) in each of its coordinates: log p(x) is a sum of log N(x; 0, 2)."""

    def __init__(self, features=2):
        super().__init__()
        self.register_buffer("one", torch.ones(features))
        self.runs, self.rows_seen = 0, []

    def forward(self, x, context=None):
        self.runs += 1
        self.rows_seen.append(len(x))
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.one), self.one).to_event(1))
            loc = z if context is None else z + context
            pyro.sample("x", dist.Normal(loc, self.one).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self, features=2, factor=1.2):
        super().__init__()
        self.register_buffer("scale", torch.full((features,), factor * 0.5**0.5))
        self.runs, self.draws = 0, 0

    def forward(self, x, context=None):
        self.runs += 1
        with pyro.plate("data", x.shape[0]):
            loc = (x if context is None else x - context) / 2
            z = pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))
        self.draws += z[..., 0].numel()


def exact(x):
    return dist.Normal(0.0, 2**0.5).log_prob(x.double()).sum(-1)


def make(features=2, factor=1.2, **options):
    return Bounded(Model(features), Guide(features, factor), features, **options)


def data(rows, features=2, seed=0):
    return 1.4 * torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("options", [{}, {"memory": 2**15}, {"vectorize_particles": False}])
def test_values_are_right_within_their_errors(options):
    x = data(60)
    evidence = log_evidence(make(), x, method=ImportanceSampling(700, seed=1, **options))
    assert evidence.kind == "estimate"
    assert evidence.value.shape == evidence.standard_error.shape == evidence.pareto_k.shape == (60,)
    assert evidence.value.dtype == evidence.effective_sample_size.dtype == torch.float64
    z = (evidence.value - exact(x)) / evidence.standard_error
    assert abs(float(z.mean())) < 4 / math.sqrt(60)
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / 60)


def test_an_exact_program_answers_by_log_prob_and_is_not_sampled():
    def model(x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=x)

    x = data(2000)
    evidence = log_evidence(Exact(model, 2), x, method=ImportanceSampling(10**9))
    assert evidence.kind == "exact"
    assert evidence.standard_error is None
    assert evidence.value.dtype == torch.float64
    torch.testing.assert_close(evidence.value, dist.Normal(0.0, 1.0).log_prob(x).sum(1).double())


def test_a_conditional_program_gets_its_context_row_by_row():
    x, context = data(40), data(40, seed=1)
    program = make(context_shape=2)
    for options in ({"memory": 2**14}, {"vectorize_particles": False}):
        evidence = log_evidence(program, x, context, method=ImportanceSampling(400, seed=2, **options))
        z = (evidence.value - exact(x - context)) / evidence.standard_error
        assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / 40)
    with pytest.raises(ValueError, match="context is missing"):
        log_evidence(program, x, method=ImportanceSampling(10))


def test_a_subsampling_plate_and_a_scale_leave_a_rows_evidence_alone():
    def model(x):
        with pyro.plate("data", 1000, subsample_size=len(x)), poutine.scale(scale=7.0):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 1000, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.2 * 0.5**0.5).to_event(1))

    x = data(50)
    scaled = log_evidence(Bounded(model, guide, 2), x, method=ImportanceSampling(500, seed=3))
    z = (scaled.value - exact(x)) / scaled.standard_error
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / 50)


def test_discrete_latents_are_sampled_too():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(3 * c.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=2 * x[:, 0] - 3.5))

    x = data(30, 1)
    evidence = log_evidence(Bounded(model, guide, 1), x, method=ImportanceSampling(3000, seed=4))
    parts = torch.stack([math.log(w) + dist.Normal(m, 1.0).log_prob(x[:, 0]) for w, m in ((0.7, 0.0), (0.3, 3.0))])
    error = float((evidence.value - parts.logsumexp(0)).abs().mean())
    assert error < 4 * float(evidence.standard_error.mean())


# ------------------------------------------------------------------------------------------------------------- chunks
@pytest.mark.parametrize("memory", [1, 2**12, 2**14, 2**16, 2**28])
@pytest.mark.parametrize("count", [1, 7, 29])
def test_every_row_gets_exactly_its_draws_at_any_memory(memory, count):
    program = make()
    method = ImportanceSampling(count, memory=memory, seed=0)
    x = data(13)
    log_weights = method.log_weights(program, x)
    assert log_weights.shape == (count, 13)
    assert log_weights.dtype == torch.float64
    program.guide.draws = 0
    with pyro.validation_enabled(False):  # no checked run over all rows
        method.log_evidence(program, x)
    drawn = program.guide.draws
    program.guide.draws = 0
    with pyro.validation_enabled(False):
        ImportanceSampling(2 * count, memory=2**28, seed=0).log_evidence(program, x)
    assert program.guide.draws - drawn == count * 13  # the runs that probe are the same, so the rest is count * rows


def test_the_guide_runs_once_for_many_draws():
    program = make()
    x = data(50)
    log_evidence(program, x, method=ImportanceSampling(2000, seed=0))
    assert program.guide.runs < 15  # what probes, and one chunk
    repeating = make()
    log_evidence(repeating, x, method=ImportanceSampling(50, seed=0, vectorize_particles=False))
    assert max(program.model.rows_seen) == 50
    assert max(repeating.model.rows_seen) == 50 * 50


def test_chunks_are_planned_to_the_memory():
    def plan(**changed):
        given = {"rows": 100, "draws": 1000, "row_bytes": 5000, "draw_bytes": 100, "memory": 10**7, "fast": 10**6}
        return plan_chunks(**{**given, **changed})

    assert plan() == (9, 1000)  # 9 * (1000 * 100 + 5000) <= 1e6 < 10 * (...)
    assert plan(rows=5) == (5, 1000)
    assert plan(draw_bytes=10**4) == (1, 99)  # 5000 + 99 * 1e4 <= 1e6
    assert plan(draw_bytes=2 * 10**5) == (1, 32)  # few would be fast, but the guide runs again for each chunk
    assert plan(draw_bytes=10**6) == (1, 9)  # and memory has room for that many
    assert plan(draw_bytes=10**9) == (1, 1)
    assert plan(draws=3, row_bytes=0, draw_bytes=10**9) == (1, 1)
    assert even_parts(10, 4) == [4, 3, 3]
    assert even_parts(8, 4) == [4, 4]
    assert even_parts(1, 4) == [1]


def test_measured_bytes_are_those_of_new_tensors():
    a = torch.ones(1000)
    assert measure_bytes(lambda: (a + 1) * 2) == 2 * 4000
    assert measure_bytes(lambda: a.view(10, 100).T.expand(5, 100, 10)) == 0
    assert measure_bytes(lambda: a.add_(1)) == 0


# -------------------------------------------------------------------------------------------------- seeds, and no trace
def test_the_same_seed_gives_the_same_numbers_and_leaves_the_generator_alone():
    program, x = make(), data(9)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = log_evidence(program, x, method=ImportanceSampling(100, seed=7))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again = log_evidence(program, x, method=ImportanceSampling(100, seed=7))
    other = log_evidence(program, x, method=ImportanceSampling(100, seed=8))
    assert torch.equal(first.value, again.value)
    assert not torch.equal(first.value, other.value)


def test_without_a_seed_the_global_generator_is_used():
    program, x, method = make(), data(9), ImportanceSampling(100)
    torch.manual_seed(5)
    first, second = log_evidence(program, x, method=method), log_evidence(program, x, method=method)
    torch.manual_seed(5)
    again = log_evidence(program, x, method=method)
    assert torch.equal(first.value, again.value)
    assert not torch.equal(first.value, second.value)


class Watching(Guide):
    """A guide with a layer that behaves otherwise in training, and a note of the switches it ran under."""

    def __init__(self):
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled(), torch.distributions.Distribution._validate_args))
        self.norm(x)
        super().forward(self.dropout(x))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("validation", [True, False])
def test_modes_switches_and_buffers_are_put_back(validation, fails):
    guide = Watching()
    program = Bounded(Model(), guide, 2)
    x = data(20)
    if fails:
        guide.scale.fill_(math.nan)
    statistics = guide.norm.running_mean.clone()
    torch_default = torch.distributions.Distribution._validate_args
    with pyro.validation_enabled(validation):
        try:
            log_evidence(program, x, method=ImportanceSampling(50, seed=0))
        except (ArithmeticError, ValueError):
            assert fails
        else:
            assert not fails
            assert guide.seen[-1] == (False, False, False)  # evaluation, no gradients, no validation in the loop
            assert guide.seen[0] == (False, False, validation)  # and the first run as the user has it
        assert pyro.distributions.is_validation_enabled() is validation
        assert torch.distributions.Distribution._validate_args is validation
    assert torch.distributions.Distribution._validate_args is torch_default
    assert torch.is_grad_enabled()
    assert program.training
    assert guide.dropout.training
    assert not guide.frozen.training
    torch.testing.assert_close(guide.norm.running_mean, statistics)


def test_torchs_own_validation_switch_is_put_back():
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(not before)
    try:
        log_evidence(make(), data(3), method=ImportanceSampling(5))
        assert torch.distributions.Distribution._validate_args is (not before)
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


def test_handlers_around_it_see_nothing():
    with poutine.trace() as trace:
        log_evidence(make(), data(3), method=ImportanceSampling(5))
    assert [n for n, s in trace.trace.nodes.items() if s["type"] == "sample"] == []


# ---------------------------------------------------------------------------------------------------- what is printed
def test_method_and_result_show_what_they_are():
    assert repr(ImportanceSampling()) == "ImportanceSampling(5000)"
    full = ImportanceSampling(10, memory=2**20, seed=3, vectorize_particles=False)
    assert repr(full) == "ImportanceSampling(10, memory=1048576, seed=3, vectorize_particles=False)"
    assert eval(repr(full)) == full
    assert isinstance(full, EvidenceMethod)
    assert isinstance(log_evidence(make(), data(3), method=full), Evidence)


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an int of at least 1, got 0"),
        ({"num_samples": 10.0}, "num_samples must be an int"),
        ({"memory": 0}, "memory must be an int of at least 1, got 0"),
        ({"seed": 1.5}, "seed must be an int or None, got 1.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImportanceSampling(**options)


def test_kinds_without_an_evidence_say_what_to_do():
    method, x = ImportanceSampling(10), data(3)

    def generator(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Delta(z, event_dim=1), obs=x)

    def energy(x):
        with pyro.plate("data", len(x)):
            pyro.factor("energy", -x.square().sum(-1))

    with pytest.raises(TypeError, match=r"Implicit can only be sampled.*pg\.Bounded"):
        log_evidence(Implicit(generator, event_shape=2), x, method=method)
    with pytest.raises(TypeError, match=r"Unnormalized has its density up to Z only.*log_density\(x\) less log Z"):
        log_evidence(Unnormalized(energy, 2), x, method=method)
    with pytest.raises(TypeError, match=r"takes a program, got function: pg\.Bounded\(model, guide, event_shape\)"):
        log_evidence(generator, x, method=method)
    with pytest.raises(TypeError, match=r"method must be a method of evidence.*got the class ImportanceSampling"):
        log_evidence(make(), x, method=ImportanceSampling)
    with pytest.raises(TypeError, match=r"method must be a method of evidence.*got 100"):
        log_evidence(make(), x, method=100)


def test_data_are_checked():
    with pytest.raises(ValueError, match=r"x must have shape \(rows, 2\), got \(3, 5\)"):
        log_evidence(make(), torch.zeros(3, 5), method=ImportanceSampling(10))
    with pytest.raises(ValueError, match="not finite in 1 of 3 rows, first in row 1"):
        log_evidence(make(), torch.tensor([[0, 0], [math.nan, 0], [0, 0]]), method=ImportanceSampling(10))


def run(model, guide, x, **options):
    return log_evidence(Bounded(model, guide, 2), x, method=ImportanceSampling(10, **options))


def test_pairs_that_have_no_weight_a_row_are_refused():
    def global_latent(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean * torch.ones(2), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"'mean' stands outside the plate 'data'"):
        run(global_latent, lambda x: pyro.sample("mean", dist.Normal(0.0, 1.0)), data(3))
    with pytest.raises(ValueError, match="latent site 'z' of the model is not in the guide"):
        run(Model(), None, data(3))

    def fixed_plate(x):
        with pyro.plate("data", 40):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def fixed_guide(x):
        with pyro.plate("data", 40):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    for rows in (40, 1):
        with pytest.raises(ValueError, match=r"as long as its batch, pyro\.plate\('data', x\.shape\[0\]\)"):
            run(fixed_plate, fixed_guide, data(rows))


def test_a_support_is_checked_in_all_rows_before_the_draws():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x)

    x = torch.zeros(500, 2)
    x[499, 1] = 2.0
    with pytest.raises(ValueError, match=r"boolean|support"):
        run(model, Guide(), x)


def test_a_weight_that_is_no_number_is_an_error_that_names_the_row():
    class Breaks(Guide):
        def forward(self, x):
            super().forward(torch.where(x > 90, math.nan, x))

    x = data(50)
    x[41] = 100.0
    with pytest.raises(ArithmeticError, match="nan or infinite, first in row 41"), pyro.validation_enabled(False):
        run(Model(), Breaks(), x, memory=2**12)
    with pytest.raises(ValueError, match="nan"):  # with validation it is Pyro's own error
        run(Model(), Breaks(), x)


class FixedRank(nn.Module):
    def forward(self, x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            _rows, _features = z.shape  # fails on (draws, rows, features)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Mixing(nn.Module):
    """Centres over dimension 0: over rows when it runs alone (already wrong), over draws under a plate of them."""

    def forward(self, x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z - z.mean(0), 1.0).to_event(1), obs=x)


def test_a_program_that_cannot_take_draws_on_the_left_says_so_and_runs_without():
    x = data(30)
    with pytest.raises(ValueError, match=r"not with a dimension of draws left of it.*vectorize_particles=False"):
        run(FixedRank(), Guide(), x)
    evidence = run(FixedRank(), Guide(), x, vectorize_particles=False)
    assert float((evidence.value - exact(x)).abs().max()) < 1
    with pytest.raises(ValueError, match=r"mixes up draws when several run at once: the log weight of row \d+"):
        run(Mixing(), Guide(), x)
