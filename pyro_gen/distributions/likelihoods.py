r"""Observation models p(x | z): from the numbers a decoder gives to a distribution over one datum.

A likelihood says how many numbers a value needs (``maps``), what it does with them, and on what data it stands. The
decoder's output of ``maps * event_shape`` numbers a row is read as ``(maps, *event_shape)``: the first block holds the
locations or logits of all values, the second their scales, and so on, as images keep their channels.
"""

from __future__ import annotations

from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_gen.distributions.discretized import DiscretizedLogistic

__all__ = ["Likelihood", "likelihood"]

Scale = float | Literal["shared", "feature", "predicted"]


class Likelihood(nn.Module):
    """An observation model; ``forward(raw)`` takes ``(..., maps, *event_shape)`` to a distribution of that event.

    Attributes:
        maps: numbers the decoder gives for each value.
        support: the constraint a value must meet; expects: the same in words.
    """

    maps: int = 1
    support: Any = constraints.real
    expects: str = "real numbers"

    def __init__(self, event_shape: torch.Size) -> None:
        super().__init__()
        self.event_shape = event_shape

    def forward(self, raw: Tensor) -> Any:
        raise TypeError("Likelihood is abstract: use likelihood(name, event_shape)")

    def centre(self, x: Tensor) -> Tensor:
        """Data brought to about [−1, 1] for the package's own encoders."""
        return x

    def _map(self, raw: Tensor, index: int) -> Tensor:
        return raw.select(-len(self.event_shape) - 1, index)

    def check(self, x: Tensor) -> None:
        """Raise a ``ValueError`` that names the first row with a value outside the support."""
        inside = self.support.check(x)
        if not bool(inside.all()):
            index = tuple((~inside).nonzero()[0].tolist())
            rows = int((~inside).reshape(x.shape[0], -1).any(1).sum())
            raise ValueError(
                f"x has values outside the support of this likelihood ({self.expects}) in {rows} of {x.shape[0]} rows, "
                f"first x{list(index)} = {float(x[index]):g}: choose another likelihood= or levels=, or recode x"
            )

    def check_training(self, x: Tensor) -> None:
        """Raise a ``ValueError`` for data on which this likelihood has no maximum."""


class Bernoulli(Likelihood):
    """Binary values; one logit each."""

    support = constraints.boolean
    expects = "0 or 1"

    def forward(self, raw: Tensor) -> Any:
        return dist.Bernoulli(logits=self._map(raw, 0)).to_event(len(self.event_shape))

    def centre(self, x: Tensor) -> Tensor:
        return 2 * x - 1


class Normal(Likelihood):
    """Real values with Gaussian noise.

    Args:
        scale: a number fixes the noise sd; ``"shared"`` learns one for all values (as probabilistic PCA), ``"feature"``
            one for each value (as factor analysis), ``"predicted"`` has the decoder give one for each value and z.
    """

    def __init__(self, event_shape: torch.Size, scale: Scale = "feature") -> None:
        super().__init__(event_shape)
        self.fixed_scale: Tensor
        self.scale = scale
        self.maps = 2 if scale == "predicted" else 1
        if scale in ("shared", "feature"):
            self.log_scale = nn.Parameter(torch.zeros(event_shape if scale == "feature" else ()))
        elif isinstance(scale, (int, float)) and not isinstance(scale, bool) and scale > 0:
            self.register_buffer("fixed_scale", torch.tensor(float(scale)))
        elif scale != "predicted":
            raise ValueError(f"scale must be a positive number, 'shared', 'feature' or 'predicted', got {scale!r}")

    def forward(self, raw: Tensor) -> Any:
        loc = self._map(raw, 0)
        if self.scale == "predicted":
            noise: Tensor = self._map(raw, 1).exp()
        elif self.scale in ("shared", "feature"):
            noise = self.log_scale.exp()
        else:
            noise = self.fixed_scale
        return dist.Normal(loc, noise.expand(loc.shape)).to_event(len(self.event_shape))

    def check_training(self, x: Tensor) -> None:
        if self.scale not in ("shared", "feature", "predicted"):
            return
        columns = x.reshape(x.shape[0], -1)
        constant = (columns == columns[:1]).all(0).nonzero().flatten().tolist()
        if self.scale == "shared":
            if len(constant) == columns.shape[1]:
                raise ValueError(
                    "all rows of x are equal: with a learnt noise scale the likelihood has no maximum. Use scale=1.0"
                )
            return
        if constant:
            shown = ", ".join(map(str, constant[:8])) + (", …" if len(constant) > 8 else "")
            raise ValueError(
                f"x is constant in column {shown} ({len(constant)} of {columns.shape[1]}): with a noise scale learnt "
                "for each value the likelihood has no maximum there. Drop those columns, or use scale='shared', "
                "a number, or a discrete likelihood"
            )


class Categorical(Likelihood):
    """Levels 0 … levels − 1 without an order; one logit for each level and value."""

    def __init__(self, event_shape: torch.Size, levels: int) -> None:
        super().__init__(event_shape)
        self.levels = self.maps = levels
        self.support = constraints.integer_interval(0, levels - 1)
        self.expects = f"whole numbers 0 … {levels - 1}"

    def forward(self, raw: Tensor) -> Any:
        logits = raw.movedim(-len(self.event_shape) - 1, -1)
        return _FloatCategorical(logits=logits).to_event(len(self.event_shape))

    def centre(self, x: Tensor) -> Tensor:
        return 2 * x / (self.levels - 1) - 1


class Logistic(Likelihood):
    """Ordered levels 0 … levels − 1: a logistic binned to whole numbers, its location and scale from the decoder."""

    maps = 2

    def __init__(self, event_shape: torch.Size, levels: int) -> None:
        super().__init__(event_shape)
        self.levels = levels
        self.support = constraints.integer_interval(0, levels - 1)
        self.expects = f"whole numbers 0 … {levels - 1}"

    def forward(self, raw: Tensor) -> Any:
        half = (self.levels - 1) / 2
        loc, scale = half * (1 + self._map(raw, 0)), half / 4 * self._map(raw, 1).exp()
        return DiscretizedLogistic(loc, scale, self.levels).to_event(len(self.event_shape))

    def centre(self, x: Tensor) -> Tensor:
        return 2 * x / (self.levels - 1) - 1


class _FloatCategorical(dist.Categorical):
    """Categorical whose draws are floats, as the data are, with mean and mode over the levels."""

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        levels: Tensor = super().sample(sample_shape)  # type: ignore[no-untyped-call]
        return levels.to(self.logits.dtype)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(_FloatCategorical, _instance)
        return super().expand(batch_shape, new)  # type: ignore[no-untyped-call]

    @property
    def mean(self) -> Tensor:
        levels = torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)
        return (self.probs * levels).sum(-1)


LIKELIHOODS: dict[str, type[Any]] = {
    "bernoulli": Bernoulli,
    "normal": Normal,
    "categorical": Categorical,
    "discretized_logistic": Logistic,
}


def likelihood(
    name: str, event_shape: torch.Size, *, scale: Scale | None = None, levels: int | None = None
) -> Likelihood:
    """The likelihood of a name.

    Args:
        name: ``"bernoulli"``, ``"normal"``, ``"categorical"`` or ``"discretized_logistic"``.
        event_shape: shape of one datum.
        scale: noise sd of ``"normal"``: a number, ``"shared"``, ``"feature"`` (default) or ``"predicted"``.
        levels: number of levels of the two discrete ones; required there.

    Raises:
        ValueError: for an unknown name, or options that the likelihood does not have or lacks.
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(map(repr, LIKELIHOODS))}, or a callable; got {name!r}")
    if scale is not None and name != "normal":
        raise ValueError(f"scale= belongs to likelihood='normal', not to {name!r}")
    if name in ("categorical", "discretized_logistic"):
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
            raise ValueError(
                f"likelihood={name!r} needs levels=, an int of at least 2 (17 for data 0 … 16), got {levels!r}"
            )
        return (Categorical if name == "categorical" else Logistic)(event_shape, levels)
    if levels is not None:
        raise ValueError(f"levels= belongs to 'categorical' and 'discretized_logistic', not to likelihood={name!r}")
    return Normal(event_shape, "feature" if scale is None else scale) if name == "normal" else Bernoulli(event_shape)
