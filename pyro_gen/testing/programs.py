"""The promises of a program: shapes, densities, scores, state, copies, seeds, and Pyro's own tools on it."""

from __future__ import annotations

import copy
import importlib.util
import io
from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer import Predictive
from pyro.infer.inspect import generate_graph_specification, get_model_relations, render_graph
from torch import Tensor

from pyro_gen import handlers, scopes
from pyro_gen.base import Bounded, Nothing, Program, Samples, Unnormalized
from pyro_gen.testing.basis import (
    alone,
    answers,
    bound,
    differs,
    draws,
    expect,
    fresh,
    has_bound,
    relative_gap,
    stir,
    structure,
    through_json,
)

__all__ = [
    "check_deepcopy",
    "check_density",
    "check_predictive",
    "check_render",
    "check_score",
    "check_seeds",
    "check_shapes",
    "check_state",
]


def check_shapes(program: Program, x: Tensor, context: Tensor | None = None) -> None:
    """Every density has one finite value a row and draws have the data's shape, in float32 and in float64."""
    for dtype in (x.dtype, torch.float64):
        with alone():
            if dtype != x.dtype and not any(t.is_floating_point() for t in program.state_dict().values()):
                continue  # a program without tensors of its own has the dtype of its constants
            copied = fresh(program).to(dtype)
            batch = copied.check(*(t.to(dtype) for t in (x, context) if t is not None))
            rows, event = x.shape[0], copied.event_shape
            for name, found in answers(copied, *batch).items():
                want = {"sample": (rows, *event), "log weight": ()}.get(name, (rows,))
                expect(tuple(found.shape) == want, f"{name} has shape {tuple(found.shape)}, {want} was promised")
                expect(found.dtype == dtype, f"{name} of {dtype} data is {found.dtype}")
                expect(torch.isfinite(found).all(), f"{name} is not finite")
                if name == "sample":
                    copied.check(found, *batch[1:])  # a draw is data, so it lies in the support
            one = tuple(t[:1] for t in batch)
            for name, found in answers(copied, *one).items():
                expect(
                    name == "log weight" or found.shape[0] == 1,
                    f"{name} of a single row has shape {tuple(found.shape)}",
                )
            if isinstance(copied, Bounded) and has_bound(structure(copied, *batch)):
                with torch.no_grad(), scopes.evaluation_mode(copied):
                    found = bound(copied, batch, particles=3)
                expect(tuple(found.shape) == (rows,), f"lower_bound(x, particles=3) has shape {tuple(found.shape)}")


def check_density(program: Program, x: Tensor, context: Tensor | None = None) -> None:
    """What a family computes by a shorter way is what the trace of its model (and guide) gives."""
    with alone(), torch.no_grad():
        copied = fresh(program)
        batch = copied.check(x, context)
        with scopes.evaluation_mode(copied):
            if isinstance(copied, Unnormalized):
                traced = handlers.log_density(copied.model, *batch)
                for name, found in answers(copied, *batch).items():
                    if name == "sample":
                        continue
                    gap = relative_gap(found, traced)
                    expect(gap <= 1e-5, f"{name} is off the density of the trace by {gap:.2g} of its size")
            elif isinstance(copied, Bounded) and type(copied).lower_bound is not Bounded.lower_bound:
                own, error = draws(lambda: bound(copied, batch))
                plain, other = draws(lambda: handlers.log_weight(copied.model, copied.guide, *batch))
                tolerance = 5 * torch.hypot(error, other) + 1e-5 * plain.abs()
                row = int(((own - plain).abs() / tolerance).argmax())
                expect(
                    (own - plain).abs()[row] <= tolerance[row],
                    f"lower_bound of row {row} is {float(own[row]):.5g} in the mean, the weights of its traces give "
                    f"{float(plain[row]):.5g} (tolerance {float(tolerance[row]):.2g})",
                )


def check_score(program: Unnormalized, x: Tensor, context: Tensor | None = None) -> None:
    """The score is the gradient of log f: equal to autograd's, and to finite differences in float64.

    Central differences of step h along a direction v err by O(h²), which shows in the difference of steps h and 2h.
    """
    with alone():
        copied = fresh(program).double()
        batch = tuple(t.double() for t in (x, context) if t is not None)
        with scopes.evaluation_mode(copied):
            score = handlers.score(copied.model, *batch).detach()
            expect(score.shape == x.shape, f"the score has shape {tuple(score.shape)}, x has {tuple(x.shape)}")
            y = batch[0].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(copied.log_density(y, *batch[1:]).sum(), y)
            gap = relative_gap(score, gradient)
            expect(gap <= 1e-9, f"the score is off autograd's gradient of log_density by {gap:.2g} of its size")
            for seed in range(3):
                v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()

                def slope(h: float, v: Tensor = v) -> Tensor:
                    with torch.no_grad():
                        up, down = (copied.log_density(batch[0] + s * h * v, *batch[1:]) for s in (1, -1))
                    return (up - down) / (2 * h)

                fine, coarse, exact = slope(1e-5), slope(2e-5), (score * v).flatten(1).sum(1)
                tolerance = 4 * (fine - coarse).abs() + 1e-7 * (1 + exact.abs().max())
                row = int(((fine - exact).abs() / tolerance).argmax())
                expect(
                    (fine - exact).abs()[row] <= tolerance[row],
                    f"the score of row {row} along a direction is {float(exact[row]):.8g}, and finite differences of "
                    f"log_density give {float(fine[row]):.8g}",
                )


def check_state(program: Program, x: Tensor, context: Tensor | None = None) -> None:
    """``state_dict`` (through a file), and ``config`` where a program has one, bring the same program back."""
    with alone():
        copied = fresh(program)
        batch = copied.check(x, context)
        expected = answers(copied, *batch)
        buffer = io.BytesIO()
        torch.save(copied.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        others = {"a copy with other weights": fresh(copied)}
        if copied.config is not None:
            config: dict[str, Any] = {
                n: tuple(v) if isinstance(v, list) else v for n, v in through_json(copied.config).items()
            }
            others["the program built from its config"] = _class(copied)(**config).to(copied.template().dtype)
    for what, other in others.items():
        with alone():  # in Pyro's global mode a PyroParam of equal name is the same tensor
            stir(other)
            if any(t.is_floating_point() for t in state.values()):
                moved = differs(answers(other, *batch), expected)
                expect(moved, "other weights in state_dict change no answer: the program computes with something else")
            other.load_state_dict(state)
            changed = differs(answers(other, *batch), expected)
            expect(changed is None, f"{what} does not give the same {changed} after load_state_dict: state is missing")


def _class(program: Program) -> Callable[..., Program]:
    return type(program)


def check_deepcopy(program: Program, x: Tensor, context: Tensor | None = None) -> None:
    """A deepcopy, taken after use, says the same at the same seed, shares nothing and moves alone."""
    with alone():
        used = fresh(program)
        batch = used.check(x, context)
        expected = answers(used, *batch)
        copied = copy.deepcopy(used)
    with alone():  # a store of its own: in Pyro's global mode equal names of PyroParams are one tensor
        apart = differs(answers(copied, *batch), expected)
        expect(apart is None, f"a deepcopy does not give the same {apart} at the same seed")
        own = {t.data_ptr(): n for n, t in used.state_dict().items() if t.numel()}
        shared = [own[t.data_ptr()] for t in copied.state_dict().values() if t.numel() and t.data_ptr() in own]
        expect(not shared, f"a deepcopy shares the tensor {shared[:1]} with the original")
        stir(copied)
    with alone():
        apart = differs(answers(used, *batch), expected)
        expect(apart is None, f"moving the weights of a deepcopy changes {apart} of the original")


def check_seeds(program: Samples, context: Tensor | None = None, n: int = 8) -> None:
    """One seed, one draw; another seed, another draw; and ``seed=`` leaves torch's global generator where it was."""
    with alone():
        copied = fresh(program)
        context = None if context is None else context[:n]
        n = n if context is None else context.shape[0]
        before = torch.get_rng_state()
        one, two, three = (copied.sample(n, context, seed=seed) for seed in (0, 0, 1))
        expect(torch.equal(before, torch.get_rng_state()), "sample(n, seed=0) moves the global generator")
        expect(torch.equal(one, two), "sample(n, seed=0) differs between two calls: it draws from elsewhere")
        expect(not torch.equal(one, three), "sample(n, seed=0) and sample(n, seed=1) are the same draws")
        expect(not torch.equal(copied.sample(n, context), copied.sample(n, context)), "two draws without a seed agree")


def check_predictive(program: Samples, x: Tensor, context: Tensor | None = None, *, parallel: bool = False) -> None:
    """``pyro.infer.Predictive`` draws latents from the guide and new data from the model.

    Args:
        program: of a kind that has ``sample``; x, context: some rows of data.
        parallel: all draws at once, which asks of a program that it broadcasts over leading dimensions.
    """
    with alone():
        copied = fresh(program)
        batch = copied.check(x, context)
        shape = structure(copied, *batch)
        guide = None if isinstance(copied.guide, Nothing) else copied.guide
        model = poutine.uncondition(copied.model)
        drawn = Predictive(model, guide=guide, num_samples=3, parallel=parallel)(*batch)
        missing = [n for n in shape.model_latents if n not in drawn]
        expect(not missing, f"Predictive does not draw the latent {missing}")
        for name, value in drawn.items():
            expect(value.shape[0] == 3, f"Predictive draws {name!r} of shape {tuple(value.shape)}, 3 draws asked")
        events = [v for n, v in drawn.items() if n not in shape.guide_latents and v.numel() == 3 * x.numel()]
        expect(events, f"Predictive draws no new data of shape {tuple(x.shape)}, only {sorted(drawn)}")


def check_render(program: Program, x: Tensor, context: Tensor | None = None) -> None:
    """``pyro.render_model`` draws model and guide (without graphviz installed: all of it but the picture)."""
    with alone():
        copied = fresh(program)
        batch = copied.check(x, context)
        for part in (copied.model, copied.guide):
            if isinstance(part, Nothing):
                continue
            relations = get_model_relations(part, batch)
            graph = generate_graph_specification(relations, render_params=True)
            expect(graph["node_data"], "pyro.render_model finds no site")
            if importlib.util.find_spec("graphviz") is not None:
                source = render_graph(graph, render_distributions=True).source
                expect(all(name in source for name in relations["sample_sample"]), "pyro.render_model leaves sites out")
