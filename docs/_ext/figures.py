"""Draw the figures of the pages into docs/figures/, with the numbers that the pages state."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sphinx.application import Sphinx


def one_integral(path: Path) -> None:
    """Z is an area; the score does not see it; a guide bounds it."""
    x = np.linspace(-4.0, 4.0, 801)
    f = 0.6 * np.exp(-((x + 1.3) ** 2) / 0.8) + np.exp(-((x - 1.2) ** 2) / 1.6)
    fig, (area, score, bound) = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
    for scale, colour in ((2.0, "tab:orange"), (1.0, "tab:blue")):
        z = np.trapezoid(scale * f, x)
        area.fill_between(x, scale * f, color=colour, alpha=0.25)
        area.plot(x, scale * f, color=colour, label=f"$f$ with $Z$ = {z:.2f}")
    area.plot(x, f / np.trapezoid(f, x), "k--", lw=1.2, label="both: $p = f/Z$")
    area.set(title="two $f$, one $p$", xlabel="$x$", ylim=(0, 2.9))
    area.legend(fontsize=8, loc="upper left")

    score.plot(x, np.gradient(np.log(2.0 * f), x), color="tab:orange", lw=4, alpha=0.6)
    score.plot(x, np.gradient(np.log(f), x), color="tab:blue", lw=1.5)
    score.axhline(0, color="0.8", lw=0.8, zorder=0)
    score.set(title=r"$\nabla_x \log f$: the same score", xlabel="$x$")

    exact = -0.5 * np.log(4 * np.pi) - 0.25  # log N(1; 0, 2); the posterior of z is N(1/2, 1/2)
    mean = np.linspace(-1.0, 2.0, 301)
    bound.axhline(exact, color="k", lw=1.2, label=r"$\log p(x)$")
    for sd, style in ((np.sqrt(0.5), "-"), (1.0, "--")):
        gap = 0.5 * (sd**2 / 0.5 + (mean - 0.5) ** 2 / 0.5 - 1 - np.log(sd**2 / 0.5))
        bound.plot(mean, exact - gap, style, color="tab:green", label=f"ELBO, guide sd {sd:.2f}")
    bound.set(title="a bound, tight at the posterior", xlabel=r"mean of the guide $q(z \mid x = 1)$", ylabel="nats")
    bound.legend(fontsize=8, loc="lower center")
    fig.savefig(path, facecolor="white")
    plt.close(fig)


def setup(app: Sphinx) -> dict[str, bool]:
    folder = Path(app.srcdir) / "figures"
    folder.mkdir(exist_ok=True)
    one_integral(folder / "one_integral.svg")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
