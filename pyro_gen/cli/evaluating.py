"""``pyro-gen evaluate``, and what ``pyro-gen fit`` says at its end: the evidence, with its kind and its errors."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_gen.cli.building import evidence_method
from pyro_gen.cli.errors import BadInput, about
from pyro_gen.cli.families import family_of
from pyro_gen.cli.runs import Run
from pyro_gen.cli.sources import Data, is_dequantized, is_whole, read_data, read_file

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_gen.base import Evidence, EvidenceMethod, Program
    from pyro_gen.fitting import FitResult

__all__ = ["evaluate", "report"]


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder written by pyro-gen fit.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="digits|FILE", help="Other data, all rows of a file.", show_default="test rows of the run"
        ),
    ] = None,
    header: Annotated[bool, typer.Option("--header", help="Skip the first line of a .csv file.")] = False,
    delimiter: Annotated[
        str | None, typer.Option(help="Between the cells of a .csv file.", show_default="comma")
    ] = None,
    importance_samples: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Draws of the guide for each row, where there is one.", show_default="as in the run"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto takes CUDA where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")] = False,
) -> None:
    """State the evidence log p(x) of held-out rows, with its kind, its Monte Carlo and its sampling error.

    [bold]=[/bold] exact, [bold]≈[/bold] estimate, [bold]≥[/bold] lower bound: with a k̂ above 0.7 some row's weights
    have too heavy a tail for an estimate. The first error is that of the draws, the second that of having no more rows.
    Whole numbers, dequantised ones too, have bits per dimension beside it, −log₂ p(x) / D. A run that was fitted with
    --dequantize adds that noise to whole numbers of other data as well.
    """
    run = Run(folder)
    run.read("RUN")
    family = family_of(run.options)
    if importance_samples is not None:
        if "importance_samples" not in run.options:
            raise BadInput(
                f"--importance-samples has no use here: log p(x) of {run.options['family']} is exact, with nothing to "
                "draw: leave it out"
            )
        family = replace(family, importance_samples=importance_samples)  # type: ignore[call-arg]
    result = run.result()
    if data is None:
        if header or delimiter is not None:
            raise BadInput("--header and --delimiter go with --data FILE: leave them out")
        content = read_data(run.options)
        if content.facts["crc32"] != run.data.get("crc32"):
            raise BadInput(f"RUN: {run.data.get('source')} has changed since the run: name the rows by --data FILE")
        batch, named = content.test, f"test rows of {_short(run.data['source'])}"
    elif data == "digits":
        batch, named = _digits_test(run), "test rows of digits"
    else:
        named = f"rows of {_short(data)}"
        file = {**run.options, "data": data, "header": header, "delimiter": delimiter, "dequantize": False}
        batch = read_file(file)
        if is_dequantized(run.options) and is_whole(batch[0]):
            batch = read_file({**file, "dequantize": True})
    from pyro_gen.fitting.arguments import named_device

    program = result.program.to(named_device(device))
    with about("--data" if data is not None else "RUN"):
        program.check(*(part.to(program.template().device) for part in batch))
    measured = measure(program, batch, family.evidence(seed), dequantized=is_dequantized(run.options))
    if as_json:
        typer.echo(json.dumps({"run": str(folder), "rows_of": named, **measured.facts()}, indent=2))
    else:
        typer.echo(measured.sentence(named))


def _digits_test(run: Run) -> tuple[Tensor, ...]:
    if run.options["data"] != "digits":
        raise BadInput(f"--data digits: the run was fitted to {run.data.get('source')}: name a file like that")
    return read_data(run.options).test


@dataclass(frozen=True)
class Measured:
    """An evidence, how it was had, and the seconds it took.

    ``dims`` is the number of values in a row where they are whole numbers, so that bits are their unit too; None where
    x is real. ``dequantized`` says that uniform noise was added to them.
    """

    evidence: Evidence
    method: str
    seconds: float
    dims: int | None = None
    dequantized: bool = False

    def tail(self) -> tuple[int, float, float] | None:
        """How many k̂ are above the limit; the median; the worst."""
        from pyro_gen.base import PARETO_K_LIMIT

        k = self.evidence.pareto_k
        return None if k is None else (int((k > PARETO_K_LIMIT).sum()), float(k.median()), float(k.max()))

    def bits(self) -> Evidence | None:
        """Bits per dimension, their mean over rows."""
        return None if self.dims is None else self.evidence.mean().bits_per_dimension(self.dims)

    def sentence(self, rows_of: str) -> str:
        """The evidence with its sign and errors; what k̂ says, where weights have one."""
        from pyro_gen.base import PARETO_K_LIMIT, SIGNS

        mean, rows = self.evidence.mean(), len(self.evidence)
        kind = {"estimate": "an estimate", "lower bound": "a lower bound"}.get(mean.kind, mean.kind)
        bits = self.bits()
        nats = f"{mean} nats per datum"
        if bits is not None:
            nats += f", {SIGNS[bits.kind]} {float(bits.value):.3f} bits per dimension"
        noise = " + U[0, 1)" if self.dequantized else ""
        how = "" if mean.kind == "exact" else f", by {self.method}"
        first = f"log p(x) {nats}: {kind} for {rows} {rows_of}{noise}{how}"
        if (tail := self.tail()) is None:
            return first
        above, median, worst = tail
        return f"{first}\nk̂ above {PARETO_K_LIMIT} in {above} of {rows} rows (median {median:.2f}, worst {worst:.2f})"

    def facts(self) -> dict[str, Any]:
        """What is measured, for JSON."""
        size, tail, bits = self.evidence.effective_sample_size, self.tail(), self.bits()
        return {
            "rows": len(self.evidence),
            "dequantized": self.dequantized,
            "log_evidence": {**_facts_of(self.evidence.mean()), "unit": "nats per datum"},
            "bits_per_dimension": None if bits is None else {**_facts_of(bits), "dimensions": self.dims},
            "pareto_k": None
            if tail is None
            else {"above_0.7": tail[0], "median": _finite(tail[1]), "max": _finite(tail[2])},
            "effective_sample_size": None
            if size is None
            else {"min": _finite(size.min()), "median": _finite(size.median())},
            "method": self.method,
            "seconds": round(self.seconds, 3),
        }


def _facts_of(mean: Evidence) -> dict[str, Any]:
    return {
        "mean": _finite(mean.value),
        "kind": mean.kind,
        "standard_error": _finite(mean.standard_error),
        "sampling_error": _finite(mean.sampling_error),
    }


def measure(
    program: Program, batch: tuple[Tensor, ...], method: EvidenceMethod | None, *, dequantized: bool
) -> Measured:
    """The evidence of each row of a batch, on the device of the program; ``method`` None where it is exact."""
    from pyro_gen import log_evidence
    from pyro_gen.base import Exact
    from pyro_gen.evidence.methods import exact_evidence

    begun = time.perf_counter()
    device = program.template().device
    batch = tuple(part.to(device) for part in batch)
    if method is not None:
        evidence, said = log_evidence(program, *batch, method=method), repr(method)
    else:
        assert isinstance(program, Exact)
        evidence, said = exact_evidence(program, *batch), "log_prob"
    dims = program.event_shape.numel() if dequantized or is_discrete(program, batch) else None
    return Measured(evidence, said, time.perf_counter() - begun, dims, dequantized)


def is_discrete(program: Program, batch: tuple[Tensor, ...]) -> bool:
    """Whether x has probabilities rather than a density: what the support of its site says."""
    import pyro.poutine as poutine
    import torch

    from pyro_gen import scopes

    few = tuple(part[:2] for part in batch)
    with torch.no_grad(), scopes.forked_generators(0), scopes.evaluation_mode(program):
        site: Any = poutine.trace(program.model).get_trace(*few).nodes["x"]
    return bool(site["fn"].support.is_discrete)


class _Known:
    """An evidence that is there already, as a method."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence

    def log_evidence(self, program: Program, x: Tensor, context: Tensor | None = None) -> Evidence:
        return self.evidence


def report(run: Run, result: FitResult, content: Data, begun: float) -> None:
    """The end of a fit: evidence, posterior and figures into the folder, and what came out in a few lines."""
    from pyro_gen.inference_data import to_inference_data

    options = run.options
    measured = measure(result.program, content.test, evidence_method(options), dequantized=is_dequantized(options))
    run.file("evidence.json").write_text(json.dumps(measured.facts(), indent=2) + "\n", encoding="utf-8")
    device = result.program.template().device
    test = tuple(part.to(device) for part in content.test)
    idata = to_inference_data(
        result, test if len(test) > 1 else test[0], seed=options["seed"], importance=_Known(measured.evidence)
    )
    idata.to_netcdf(run.file("inference_data.nc"))
    if options["plots"]:
        draw(run, result, test, measured.evidence, content.labels)
    whole = time.perf_counter() - begun
    rows_of = f"test rows of {_short(content.facts['source'])}"
    typer.echo(str(result).removeprefix("FitResult(").removesuffix(")"))
    typer.echo(measured.sentence(rows_of))
    typer.echo(f"{whole:.1f} s in all: fit {result.seconds:.1f} s, evidence {measured.seconds:.1f} s")
    typer.echo(f"run folder: {run.folder} ({', '.join(sorted(_written(run)))})")


def draw(run: Run, result: FitResult, test: tuple[Tensor, ...], evidence: Evidence, labels: Any) -> None:
    """The figures of a run."""
    from pyro_gen import plots
    from pyro_gen.base import Exact

    run.figures.mkdir(exist_ok=True)
    program = result.program
    figures = {"loss": plots.loss(result), "samples": plots.samples(program, *test, seed=run.options["seed"])}
    if _has_latent_means(program, test):
        figures["latent"] = plots.latent(program, *test, labels=labels)
    if evidence.pareto_k is not None:
        figures["pareto_k"] = plots.pareto_k(evidence)
    plane = program.event_shape.numel() == 2 and program.context_shape is None
    if isinstance(program, Exact) and plane and not is_discrete(program, test):
        figures["density"] = plots.density(program, *test)
    for name, figure in figures.items():
        figure.savefig(run.figures / f"{name}.png", dpi=120)


def _has_latent_means(program: Program, test: tuple[Tensor, ...]) -> bool:
    """Whether there are latents, and a guide whose mean has a closed form: a flow's has none."""
    from pyro_gen.base import Bounded, Exact
    from pyro_gen.diagnostics.latents import latent_distributions

    if isinstance(program, Exact) or not isinstance(program, Bounded):
        return False
    context = test[1][:2] if len(test) > 1 else None
    try:
        return all(q.mean is not None for q, _ in latent_distributions(program, test[0][:2], context, None))
    except NotImplementedError:
        return False


def _written(run: Run) -> list[str]:
    return [str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()]


def _short(source: str) -> str:
    return Path(source).name


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None
