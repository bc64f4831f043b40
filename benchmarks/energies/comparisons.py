r"""Do two libraries give the same numbers, and where torchebm's are not those of the mathematics.

Losses are compared at equal weights, rows and noise in float64: value and gradient, by the largest difference over the
largest entry of ours. So are the ends of Langevin chains. Chains that no seed makes equal are held against known
moments, with standard errors over independent chains.

Where torchebm differs, the truth is worked out beside: score matching of :math:`N(0, I / \lambda)` by
:math:`E = \lambda |x|^2 / 2` has :math:`J = \lambda^2 E|x|^2 / 2 - \lambda d`; the energy of the semicircle has
variance 1/4; the gradient of contrastive divergence at the truth is 0 in expectation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energies.contract import TRAINING, UNITS

__all__ = ["Moment", "agreement", "defects", "exact_quadratic", "moment", "relative"]

Array = NDArray[np.float64]
Worker = Any
NAMED = {"ours": "pyro_gen"}
NAMES = {"exact": "exact", "sliced": "sliced, 1 projection", "denoising": "denoising", "cd": "CD-10"}


@dataclass(frozen=True)
class Moment:
    """A mean over independent chains, with its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"

    def off(self, truth: float) -> float:
        """Standard errors from the truth."""
        return abs(self.value - truth) / self.error


def moment(values: Array) -> Moment:
    return Moment(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))


def relative(ours: Array, theirs: Array) -> float:
    """Largest difference over the largest entry of ours."""
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def exact_quadratic(x: Array, precision: float) -> float:
    """J of E = λ|x|²/2 on rows x."""
    return float(0.5 * precision**2 * (x**2).sum(1).mean() - precision * x.shape[1])


def agreement(workers: dict[str, Worker], folder: Path, features: tuple[int, ...] = (2, 32)) -> list[list[str]]:
    """Rows of a table: case, d, what is compared, difference."""
    rows = []
    for d in features:
        data = folder / f"rows-{d}.npy"
        np.save(data, np.random.default_rng(d).standard_normal((512, d)))
        for case in TRAINING:
            found = {}
            for library, worker in workers.items():
                worker("build", name="equal", kind="mlp", features=d, dtype="float64", seed=1)
                # torchebm's normal directions: after one seed both libraries draw the same
                more: dict[str, Any] = {}
                if case == "sliced":
                    more = {"noise": "normal"} if library == "ours" else {"projection_type": "gaussian"}
                output = folder / f"{library}.npy"
                answer = worker("evaluate", name="equal", case=case, data=str(data), output=str(output), seed=3, **more)
                unit = 1.0 if library == "ours" else UNITS.get(case, 1.0)
                found[library] = np.array([unit * answer["value"]]), unit * np.load(output)
            value, gradient = (relative(a, b) for a, b in zip(*(found[n] for n in ("ours", "torchebm")), strict=True))
            rows.append([NAMES[case], str(d), "value", f"{value:.0e}"])
            rows.append([NAMES[case], str(d), "gradient in the weights", f"{gradient:.0e}"])
        ends = {}
        for library, worker in workers.items():
            output = folder / f"{library}.npy"
            worker("draw", name="equal", case="langevin", start=str(data), output=str(output), seed=4)
            ends[library] = np.load(output)
        rows.append(["Langevin", str(d), "512 chains after 100 steps", f"{relative(*(ends[n] for n in workers)):.0e}"])
    return rows


def gaussian(workers: dict[str, Worker], folder: Path, chains: int = 20_000) -> list[list[str]]:
    """Moments of HMC on the correlated normal, from chains that start at 0: library, mean of x₁², x₂², x₁x₂."""
    start, rows = folder / "start.npy", []
    np.save(start, np.zeros((chains, 2)))
    for library, worker in workers.items():
        worker("build", name="normal", kind="correlated", features=2, dtype="float64")
        output = folder / f"{library}.npy"
        worker("draw", name="normal", case="hmc", start=str(start), output=str(output), step_size=0.4, steps=30)
        x = np.load(output)
        found = [moment(v) for v in (x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1])]
        rows.append(
            [
                NAMED.get(library, library),
                *map(str, found),
                f"{max(m.off(t) for m, t in zip(found, (1.0, 4.0, 1.6), strict=True)):.1f}",
            ]
        )
    return rows


def defects(workers: dict[str, Worker], folder: Path) -> list[list[str]]:
    """Rows of a table: what is asked, the truth, torchebm, pyro_gen."""
    return [
        *approximate(workers, folder),
        *penalty(workers, folder),
        *not_finite(workers, folder),
        *edge(workers, folder),
    ]


def quadratic(worker: Worker, precision: float, case: str, data: Path, **options: Any) -> float:
    worker("build", name="quadratic", kind="quadratic", features=1, precision=precision)
    value: float = worker("evaluate", name="quadratic", case=case, data=str(data), **options)["value"]
    return value


def approximate(workers: dict[str, Worker], folder: Path, d: int = 5) -> list[list[str]]:
    """The λ at which score matching is least, on N(0, I/2): 2; J is a parabola through three values of λ."""
    data = folder / "half.npy"
    x = np.random.default_rng(0).normal(0, math.sqrt(0.5), (20_000, d))
    np.save(data, x.astype(np.float32))
    at = (0.25, 0.5, 1.0)

    def least(values: list[float]) -> str:
        square, slope, _ = np.polyfit(at, values, 2)
        return f"{-slope / (2 * square):.2f}"

    truth = least([exact_quadratic(x, p) for p in at])
    ours = least([quadratic(workers["ours"], p, "exact", data) for p in at])
    exact, rough = (
        least([quadratic(workers["torchebm"], p, "exact", data, hessian_method=m) for p in at])
        for m in ("exact", "approx")
    )
    what = f"argmin of score matching for the precision of N(0, I/2), d = {d}"
    return [[what, truth, f'{exact} (`hessian_method="exact"`)', ours], [what, truth, f'{rough} (`"approx"`)', "—"]]


def penalty(workers: dict[str, Worker], folder: Path, rows: int = 20_000) -> list[list[str]]:
    """The gradient of CD at the truth, with the libraries' own defaults.

    With E = λx²/2, data of precision λ and a step that is small beside it the gap is 0 in expectation; a penalty
    α(E² + E'²) has the derivative 3α/λ.
    """
    data, output = folder / "wide.npy", folder / "gradient.npy"
    x = np.random.default_rng(1).normal(0, 1, (rows, 1))
    np.save(data, x / np.sqrt((x**2).mean()))  # the truth of these rows, not only of their distribution
    found = {}
    for library, options in (("ours", {}), ("torchebm", {"energy_reg_weight": 0.001})):
        worker, values = workers[library], []
        worker("build", name="truth", kind="quadratic", features=1, precision=1.0, dtype="float64")
        for seed in range(20):
            worker("evaluate", name="truth", case="cd", data=str(data), output=str(output), seed=seed, **options)
            values.append(float(np.load(output)[0]))
        found[library] = moment(np.array(values))
    what = "gradient of CD-10 at the true precision, N(0, 1), defaults"
    return [[what, "0", str(found["torchebm"]), str(found["ours"])]]


def not_finite(workers: dict[str, Worker], folder: Path) -> list[list[str]]:
    """Loss and gradient of CD where an energy of the batch is infinite."""
    data, found = folder / "far.npy", {}
    x = np.zeros((8, 1), dtype=np.float32)
    x[3] = 200.0
    np.save(data, x)
    for library, worker in workers.items():
        output = folder / f"{library}.npy"
        worker("build", name="overflow", kind="overflow", features=1)
        answer = worker("evaluate", name="overflow", case="cd", data=str(data), output=str(output))
        if "refused" in answer:
            found[library] = f"refused: “{answer['refused'].split(':')[0]}”"
        else:
            found[library] = f"loss {answer['value']:g}, gradient {float(np.load(output)[0]):g}"
    return [["CD-10 where one row has an infinite energy", "not finite", found["torchebm"], found["ours"]]]


def edge(workers: dict[str, Worker], folder: Path, chains: int = 20_000) -> list[list[str]]:
    """HMC on the semicircle, whose energy is not a number outside (−1, 1): proposals from there must be rejected."""
    start, found = folder / "middle.npy", {}
    np.save(start, np.random.default_rng(2).uniform(-0.5, 0.5, (chains, 1)))
    for library, worker in workers.items():
        output = folder / f"{library}.npy"
        worker("build", name="edge", kind="semicircle", features=1, dtype="float64")
        worker(
            "draw", name="edge", case="hmc", start=str(start), output=str(output), step_size=0.3, steps=50, leapfrog=5
        )
        found[library] = moment(np.load(output)[:, 0] ** 2)
    what = "HMC on √(1 − x²), −1 < x < 1: E x²"
    return [[what, "0.2500", *(f"{found[n]} ({found[n].off(0.25):.0f} s.e.)" for n in ("torchebm", "ours"))]]
