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
from pyro_gen.cli.chains import Walk, is_unnormalized
from pyro_gen.cli.errors import BadInput, about
from pyro_gen.cli.families import Family, family_of
from pyro_gen.cli.families.diffusion import figures_of, is_noised
from pyro_gen.cli.runs import Run
from pyro_gen.cli.sources import Data, is_dequantized, is_whole, read_data, read_file

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_gen.base import Evidence, EvidenceMethod, Program
    from pyro_gen.fitting import FitResult

__all__ = ["evaluate", "report"]

SHOWN = 256  # draws of an energy in a figure, each the end of a chain


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
    log_z: Annotated[
        str | None,
        typer.Option(
            metavar="auto|annealed|quadrature|enumeration",
            help="How log Z of an energy-based model is had.",
            show_default="as in the run",
        ),
    ] = None,
    temperatures: Annotated[
        int | None, typer.Option(metavar="K", help="Of annealing, for log Z.", show_default="as in the run")
    ] = None,
    chains: Annotated[
        int | None, typer.Option(metavar="M", help="Of annealing, for log Z.", show_default="as in the run")
    ] = None,
    log_p: Annotated[
        str | None,
        typer.Option(metavar="ode|bound", help="How log p(x) of a diffusion is had.", show_default="as in the run"),
    ] = None,
    probes: Annotated[
        int | None,
        typer.Option(
            metavar="M", help="Of the ODE's trace, or draws of the bound's noise.", show_default="as in the run"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto takes CUDA where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")] = False,
) -> None:
    """State the evidence log p(x) of held-out rows, with its kind, its Monte Carlo and its sampling error.

    [bold]=[/bold] exact, [bold]≈[/bold] estimate, [bold]≥[/bold] lower bound: with a k̂ above 0.7 some row's weights
    have too heavy a tail for an estimate. The first error is that of the draws, the second that of having no more rows.
    An energy-based model has log p(x) = log f(x) − log Z, with one log Z for all rows: the error of log Z is theirs.
    Of a diffusion the density is that of its probability-flow ODE, the bound that of its chain: two models.
    Whole numbers, dequantised ones too, have bits per dimension beside it, −log₂ p(x) / D. A run that was fitted with
    --dequantize adds that noise to whole numbers of other data as well.
    """
    run = Run(folder)
    run.read("RUN")
    family = family_of(run.options)
    asked = {"importance_samples": importance_samples, "log_z": log_z, "temperatures": temperatures, "chains": chains,
             "log_p": log_p, "probes": probes}  # fmt: skip
    family = _with(family, {name: value for name, value in asked.items() if value is not None})
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
    method = family.evidence(seed, program)
    with about("RUN"):
        measured = measure(
            program, batch, method, dequantized=is_dequantized(run.options), contexts=getattr(family, "contexts", None)
        )
    if as_json:
        typer.echo(json.dumps({"run": str(folder), "rows_of": named, **measured.facts()}, indent=2))
    else:
        typer.echo(measured.sentence(named))


def _with(family: Family, asked: dict[str, Any]) -> Family:
    """The family with other options of its evidence than the run's."""
    for name in asked:
        if not hasattr(family, name):
            option = "--" + name.replace("_", "-")
            why = "is exact, with nothing to draw"
            if hasattr(family, "importance_samples"):
                why = "is estimated by draws of the guide (--importance-samples)"
            elif hasattr(family, "log_z"):
                why = "needs log Z (--log-z, --temperatures, --chains), and there is no guide"
            elif hasattr(family, "log_p"):
                why = "is that of its ODE, or bounded (--log-p, --probes)"
            raise BadInput(f"{option} has no use here: log p(x) of {family.name} {why}: leave it out")
    changed: Family = replace(family, **asked)
    return changed


def _digits_test(run: Run) -> tuple[Tensor, ...]:
    if run.options["data"] != "digits":
        raise BadInput(f"--data digits: the run was fitted to {run.data.get('source')}: name a file like that")
    return read_data(run.options).test


@dataclass(frozen=True)
class Measured:
    """An evidence, how it was had, and the seconds it took.

    ``dims`` is the number of values in a row where they are whole numbers, so that bits are their unit too; None where
    x is real. ``dequantized`` says that uniform noise was added to them. ``log_z`` is what all rows of an energy share;
    ``left_out`` are rows of contexts that were given no log Z.
    """

    evidence: Evidence
    method: str
    seconds: float
    dims: int | None = None
    dequantized: bool = False
    log_z: Evidence | None = None
    left_out: int = 0

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
        kind = {"estimate": "an estimate", "lower bound": "a lower bound", "upper bound": "an upper bound"}.get(
            mean.kind, mean.kind
        )
        bits = self.bits()
        nats = f"{mean} nats per datum"
        if bits is not None:
            nats += f", {SIGNS[bits.kind]} {float(bits.value):.3f} bits per dimension"
        noise = " + U[0, 1)" if self.dequantized else ""
        how = "" if mean.kind == "exact" and self.method == "log_prob" else f", by {self.method}"
        some = f" ({self.left_out} of other contexts left out)" if self.left_out else ""
        first = f"log p(x) {nats}: {kind} for {rows} {rows_of}{noise}{some}{how}"
        if self.log_z is not None:
            return f"{first}\n{self.shared()}"
        if (tail := self.tail()) is None:
            return first
        above, median, worst = tail
        return f"{first}\nk̂ above {PARETO_K_LIMIT} in {above} of {rows} rows (median {median:.2f}, worst {worst:.2f})"

    def shared(self) -> str:
        """log Z, whose error all rows share."""
        assert self.log_z is not None
        size, k = self.log_z.effective_sample_size, self.log_z.pareto_k
        text = f"log Z {self.log_z}, with one error for all rows"
        if size is not None:
            text += f"; effective sample size {float(size):.0f}"
        return text if k is None else f"{text}, k̂ {float(k):.2f}"

    def facts(self) -> dict[str, Any]:
        """What is measured, for JSON."""
        size, tail, bits = self.evidence.effective_sample_size, self.tail(), self.bits()
        own = self.log_z
        return {
            "rows": len(self.evidence),
            "rows_left_out": self.left_out,
            "log_normalizer": None
            if own is None
            else {
                "value": _finite(own.value),
                "kind": own.kind,
                "standard_error": _finite(own.standard_error),
                "effective_sample_size": _finite(own.effective_sample_size),
                "pareto_k": _finite(own.pareto_k),
            },
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
    program: Program,
    batch: tuple[Tensor, ...],
    method: EvidenceMethod | None,
    *,
    dequantized: bool,
    contexts: int | None = None,
) -> Measured:
    """The evidence of each row of a batch, on the device of the program; ``method`` None where it is exact.

    Args:
        contexts: of an energy: rows of the first so many contexts are taken, each of which needs a log Z.
    """
    from pyro_gen import log_evidence, log_normalizer
    from pyro_gen.base import Exact
    from pyro_gen.evidence.methods import exact_evidence
    from pyro_gen.evidence.normalizers import normalized

    begun = time.perf_counter()
    device, given = program.template().device, len(batch[0])
    batch = tuple(part.to(device) for part in batch)
    log_z = None
    if method is not None and is_unnormalized(program):
        known: Any = program
        asked: Any = method
        said = repr(method)
        if len(batch) > 1:
            batch = _of_few_contexts(batch, contexts)
            evidence = log_evidence(program, *batch, method=method)
        else:
            log_z = log_normalizer(known, method=asked)
            evidence = normalized(known, batch[0], log_z)
    elif method is not None:
        evidence, said = log_evidence(program, *batch, method=method), repr(method)
    else:
        assert isinstance(program, Exact)
        evidence, said = exact_evidence(program, *batch), "log_prob"
    dims = program.event_shape.numel() if dequantized or is_discrete(program, batch) else None
    seconds = time.perf_counter() - begun
    return Measured(evidence, said, seconds, dims, dequantized, log_z, given - len(batch[0]))


def _of_few_contexts(batch: tuple[Tensor, ...], contexts: int | None) -> tuple[Tensor, ...]:
    """The rows whose context is among the first so many that differ."""
    import torch

    _, index = torch.unique(batch[1].flatten(1), dim=0, return_inverse=True)
    first = list(dict.fromkeys(index.tolist()))[:contexts]
    kept = torch.isin(index, index.new_tensor(first))
    return tuple(part[kept] for part in batch)


def is_discrete(program: Program, batch: tuple[Tensor, ...]) -> bool:
    """Whether x has probabilities rather than a density: what the support of its site says."""
    if is_noised(program):  # the bound of a step is a factor, beside which x need not be a site
        return False
    import pyro.poutine as poutine
    import torch

    from pyro_gen import scopes

    few = tuple(part[:2] for part in batch)
    with torch.no_grad(), scopes.forked_generators(0), scopes.evaluation_mode(program):
        site: Any = poutine.trace(program.model).get_trace(*few).nodes["x"]
    return bool(site["fn"].support.is_discrete)


class _Known:
    """An evidence that is there already, as a method."""

    def __init__(self, measured: Measured, method: EvidenceMethod | None) -> None:
        self.evidence, self.said = measured.evidence, measured.method
        self.likelihood_kind = getattr(method, "likelihood_kind", "marginal_iwae")

    def __repr__(self) -> str:
        return self.said

    def log_evidence(self, program: Program, x: Tensor, context: Tensor | None = None) -> Evidence:
        return self.evidence


def report(run: Run, result: FitResult, content: Data, begun: float) -> None:
    """The end of a fit: evidence, posterior and figures into the folder, and what came out in a few lines."""
    from pyro_gen.inference_data import to_inference_data

    options = run.options
    program = result.program
    method = evidence_method(options, program)
    measured = measure(
        program, content.test, method, dequantized=is_dequantized(options),
        contexts=options.get("contexts"),
    )  # fmt: skip
    run.file("evidence.json").write_text(json.dumps(measured.facts(), indent=2) + "\n", encoding="utf-8")
    device = program.template().device
    test = tuple(part.to(device) for part in content.test)
    idata = to_inference_data(
        result, test if len(test) > 1 else test[0], seed=options["seed"], importance=_Known(measured, method)
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
    program: Any = result.program
    generated, rows = None, test
    if is_unnormalized(program):
        rows = tuple(part[:SHOWN] for part in test)
        context = rows[1] if len(rows) > 1 else None
        generated, _ = Walk(warmup=300, draws=1).rows(program, len(rows[0]), context, run.options["seed"])
    figures = {"loss": plots.loss(result)}
    if is_noised(program):
        figures |= figures_of(program, test, run.options["seed"])
    else:
        figures["samples"] = plots.samples(program, *rows, n=None, seed=run.options["seed"], generated=generated)
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

    if isinstance(program, Exact) or is_noised(program) or not isinstance(program, Bounded):
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
