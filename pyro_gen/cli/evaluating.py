"""``pyro-gen evaluate``, and what ``pyro-gen fit`` says at its end: the evidence, with its kind and its errors."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_gen.cli.building import evidence_method
from pyro_gen.cli.errors import BadInput, about
from pyro_gen.cli.runs import Run
from pyro_gen.cli.sources import Data, read_data, read_file

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_gen.base import Evidence, Program
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
        int | None, typer.Option(metavar="K", help="Draws of the guide for each row.", show_default="as in the run")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto takes CUDA where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")] = False,
) -> None:
    """State the evidence log p(x) of held-out rows, with its kind, its Monte Carlo and its sampling error.

    [bold]=[/bold] exact, [bold]≈[/bold] estimate, [bold]≥[/bold] lower bound: with a k̂ above 0.7 some row's weights
    have too heavy a tail for an estimate. The first error is that of the draws, the second that of having no more rows.
    """
    from pyro_gen import ImportanceSampling

    run = Run(folder)
    run.read("RUN")
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
        batch, named = read_file({"data": data, "header": header, "delimiter": delimiter}), f"rows of {_short(data)}"
    count = run.options["importance_samples"] if importance_samples is None else importance_samples
    from pyro_gen.fitting.arguments import named_device

    program = result.program.to(named_device(device))
    with about("--data" if data is not None else "RUN"):
        program.check(*(part.to(program.template().device) for part in batch))
    measured = measure(program, batch, ImportanceSampling(count, seed=seed))
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
    """An evidence, how it was had, and the seconds it took."""

    evidence: Evidence
    method: str
    seconds: float

    def tail(self) -> tuple[int, float, float] | None:
        """How many k̂ are above the limit; the median; the worst."""
        from pyro_gen.base import PARETO_K_LIMIT

        k = self.evidence.pareto_k
        return None if k is None else (int((k > PARETO_K_LIMIT).sum()), float(k.median()), float(k.max()))

    def sentence(self, rows_of: str) -> str:
        """Two lines: the evidence with its sign and errors, and what k̂ says."""
        from pyro_gen.base import PARETO_K_LIMIT

        mean, rows = self.evidence.mean(), len(self.evidence)
        kind = {"exact": "exact", "estimate": "an estimate", "lower bound": "a lower bound"}.get(mean.kind, mean.kind)
        first = f"log p(x) {mean} nats per datum: {kind} for {rows} {rows_of}, by {self.method}"
        if (tail := self.tail()) is None:
            return first
        above, median, worst = tail
        return f"{first}\nk̂ above {PARETO_K_LIMIT} in {above} of {rows} rows (median {median:.2f}, worst {worst:.2f})"

    def facts(self) -> dict[str, Any]:
        """What is measured, for JSON."""
        mean, size, tail = self.evidence.mean(), self.evidence.effective_sample_size, self.tail()
        return {
            "rows": len(self.evidence),
            "log_evidence": {
                "mean": _finite(mean.value),
                "kind": mean.kind,
                "standard_error": _finite(mean.standard_error),
                "sampling_error": _finite(mean.sampling_error),
                "unit": "nats per datum",
            },
            "pareto_k": None
            if tail is None
            else {"above_0.7": tail[0], "median": _finite(tail[1]), "max": _finite(tail[2])},
            "effective_sample_size": None
            if size is None
            else {"min": _finite(size.min()), "median": _finite(size.median())},
            "method": self.method,
            "seconds": round(self.seconds, 3),
        }


def measure(program: Program, batch: tuple[Tensor, ...], method: Any) -> Measured:
    """The evidence of each row of a batch, on the device of the program."""
    from pyro_gen import log_evidence

    begun = time.perf_counter()
    device = program.template().device
    evidence = log_evidence(program, *(part.to(device) for part in batch), method=method)
    return Measured(evidence, repr(method), time.perf_counter() - begun)


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
    measured = measure(result.program, content.test, evidence_method(options))
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

    run.figures.mkdir(exist_ok=True)
    program = result.program
    figures = {
        "loss": plots.loss(result),
        "samples": plots.samples(program, *test, seed=run.options["seed"]),
        "latent": plots.latent(program, *test, labels=labels),
        "pareto_k": plots.pareto_k(evidence),
    }
    for name, figure in figures.items():
        figure.savefig(run.figures / f"{name}.png", dpi=120)


def _written(run: Run) -> list[str]:
    return [str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()]


def _short(source: str) -> str:
    return Path(source).name


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None
