"""From the options of ``pyro-gen fit`` to a program, its objective and the arguments of ``pg.fit``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyro_gen.cli.errors import BadInput
from pyro_gen.cli.sources import Data

if TYPE_CHECKING:
    from pyro_gen.base import ObjectiveModule
    from pyro_gen.evidence import ImportanceSampling

__all__ = ["BATCH_SIZE", "build", "evidence_method", "fit_options"]

BATCH_SIZE = 128


def build(options: dict[str, Any], content: Data) -> ObjectiveModule:
    """The objective module that the options describe, its weights drawn under their seed."""
    import pyro

    import pyro_gen as pg

    seed = options["seed"]
    if not 0 <= seed < 2**32:
        raise BadInput(f"--seed must be between 0 and 2**32 - 1, got {seed}")
    pyro.set_rng_seed(seed)
    name, particles = options["objective"], options["particles"]
    if name not in ("elbo", "iwae"):
        raise BadInput(f"--objective must be elbo or iwae, got {name!r}")
    if name == "elbo" and options["gradient"] is not None:
        raise BadInput("--gradient belongs to --objective iwae: leave it out")
    if name == "iwae" and options["analytic_kl"]:
        raise BadInput("--analytic-kl belongs to --objective elbo: leave it out")
    program = pg.VAE(**_program_options(options, content))
    if name == "elbo":
        many = particles is not None and particles > 1
        objective: Any = pg.ELBO(
            1 if particles is None else particles, analytic_kl=options["analytic_kl"], vectorize_particles=many
        )
    else:
        objective = pg.IWAE(16 if particles is None else particles, gradient=options["gradient"] or "iwae")
    module: ObjectiveModule = objective(program)
    return module


def _program_options(options: dict[str, Any], content: Data) -> dict[str, Any]:
    x, *context = content.train
    levels, likelihood = options["levels"], options["likelihood"]
    if options["data"] == "digits":
        levels = levels or (2 if likelihood == "bernoulli" else 17)
        if likelihood is None and not options["dequantize"]:
            likelihood = "bernoulli" if levels == 2 else "discretized_logistic"
        if likelihood not in ("categorical", "discretized_logistic"):
            levels = None
    if options["prior"] not in ("normal", "mixture"):
        raise BadInput(f"--prior must be normal or mixture, got {options['prior']!r}")
    if options["network"] not in ("mlp", "conv"):
        raise BadInput(f"--network must be mlp or conv, got {options['network']!r}")
    if options["network"] == "conv" and x.dim() != 4:
        raise BadInput(
            f"--network conv needs images, rows of shape (channels, height, width); a row is {tuple(x.shape[1:])}"
        )
    try:
        hidden = tuple(int(size) for size in options["hidden"].split(","))
    except ValueError as error:
        raise BadInput(f"--hidden must be sizes such as 128,128, got {options['hidden']!r}") from error
    return {
        "event_shape": tuple(x.shape[1:]),
        "latent_dim": options["latent_dim"],
        "likelihood": likelihood or "normal",
        "levels": levels,
        "scale": _number(options["scale"]),
        "hidden": hidden,
        "encoder": options["network"],
        "decoder": options["network"],
        "guide": options["guide"],
        "prior": None if options["prior"] == "normal" else "mixture",
        "components": options["components"],
        "context_shape": tuple(context[0].shape[1:]) if context else None,
    }


def fit_options(options: dict[str, Any], rows: int) -> dict[str, Any]:
    """The arguments of ``pg.fit``, for so many rows to train on."""
    if options["compile"] not in ("auto", "on", "off"):
        raise BadInput(f"--compile must be auto, on or off, got {options['compile']!r}")
    if options["schedule"] not in ("cosine", "constant"):
        raise BadInput(f"--schedule must be cosine or constant, got {options['schedule']!r}")
    steps, epochs = options["steps"], options["epochs"]
    return {
        "steps": 2000 if steps is None and epochs is None else steps,
        "epochs": epochs,
        "batch_size": min(BATCH_SIZE, rows) if options["batch_size"] is None else options["batch_size"],
        "lr": options["lr"],
        "schedule": "cosine" if options["schedule"] == "cosine" else None,
        "clip_norm": options["clip_norm"],
        "average": _number(options["average"]),
        "patience": options["patience"],
        "compile": {"auto": "auto", "on": True, "off": False}[options["compile"]],
        "device": options["device"],
        "seed": options["seed"],
        "checkpoint_every": options["checkpoint_every"],
    }


def evidence_method(options: dict[str, Any]) -> ImportanceSampling:
    """How the evidence of the test rows is had."""
    from pyro_gen import ImportanceSampling

    return ImportanceSampling(options["importance_samples"], seed=options["seed"])


def _number(text: str | None) -> Any:
    """A number where the text is one, else the text: the library says what it may be."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
