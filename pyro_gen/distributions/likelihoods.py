r"""Observation models: from the numbers that a network gives to a distribution over one value, or one datum.

A likelihood says how many numbers a value needs (``maps``), what it does with them, and on what data it stands. A
decoder's output of ``maps * event_shape`` numbers a row is read as ``(maps, *event_shape)``: the first block holds the
locations or logits of all values, the second their scales, and so on, as images keep their channels. A network that
gives the numbers of one value after the other reads them off by :meth:`Likelihood.each`.
"""

from __future__ import annotations

from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_gen.checks import check_count
from pyro_gen.distributions.discretized import DiscretizedLogistic
from pyro_gen.distributions.mixtures import MixtureOfDiscretizedLogistics, MixtureOfLogistics

__all__ = ["Likelihood", "likelihood"]

Scale = float | Literal["shared", "feature", "predicted"]
LEAST_SCALE = 1e-3  # of a logistic in a mixture, in units of half the range: without it the likelihood has no maximum
SOFTPLUS_ONE = 0.5413248546129181  # softplus of it is 1


class Likelihood(nn.Module):
    """An observation model; ``forward(raw)`` takes ``(..., maps, *event_shape)`` to a distribution of that event.

    Attributes:
        maps: numbers the network gives for each value.
        levels: number of levels of whole numbers 0 … levels − 1, or None.
        support: the constraint a value must meet; expects: the same in words.
    """

    maps: int = 1
    levels: int | None = None
    support: Any = constraints.real
    expects: str = "real numbers"

    def __init__(self, event_shape: torch.Size) -> None:
        super().__init__()
        self.event_shape = event_shape

    def forward(self, raw: Tensor) -> Any:
        return self.each(raw.movedim(-len(self.event_shape) - 1, -1)).to_event(len(self.event_shape))

    def each(self, numbers: Tensor, index: int | None = None) -> Any:
        """The distribution of single values, from ``(..., *event_shape, maps)``.

        Args:
            numbers: what the network gives, the numbers of one value last.
            index: position of the one value (in the flattened event) that all ``numbers``, ``(..., maps)``, belong to.
        """
        raise TypeError("Likelihood is abstract: use likelihood(name, event_shape)")

    def centre(self, x: Tensor) -> Tensor:
        """Data brought to about [−1, 1] for the package's own networks."""
        return x if self.levels is None else 2 * x / (self.levels - 1) - 1

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

    levels = 2
    support = constraints.boolean
    expects = "0 or 1"

    def each(self, numbers: Tensor, index: int | None = None) -> Any:
        return dist.Bernoulli(logits=numbers.select(-1, 0))


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

    def each(self, numbers: Tensor, index: int | None = None) -> Any:
        loc = numbers.select(-1, 0)
        if self.scale == "predicted":
            noise: Tensor = numbers.select(-1, 1).exp()
        elif self.scale in ("shared", "feature"):
            noise = self.log_scale.exp()
        else:
            noise = self.fixed_scale
        if index is not None and self.scale == "feature":
            noise = noise.flatten()[index]
        return dist.Normal(loc, noise.expand(loc.shape))

    def check_training(self, x: Tensor) -> None:
        if self.scale not in ("shared", "feature", "predicted"):
            return
        if self.scale == "shared":
            if bool((x == x[:1]).all()):
                raise ValueError(
                    "all rows of x are equal: with a learnt noise scale the likelihood has no maximum. Use scale=1.0"
                )
            return
        refuse_constant(x, "use scale='shared', a number, or a discrete likelihood")


class Categorical(Likelihood):
    """Levels 0 … levels − 1 without an order; one logit for each level and value."""

    def __init__(self, event_shape: torch.Size, levels: int) -> None:
        super().__init__(event_shape)
        self.levels = self.maps = levels
        self.support = constraints.integer_interval(0, levels - 1)
        self.expects = f"whole numbers 0 … {levels - 1}"

    def each(self, numbers: Tensor, index: int | None = None) -> Any:
        return _FloatCategorical(logits=numbers)


class Logistic(Likelihood):
    """Ordered levels 0 … levels − 1: a logistic binned to whole numbers, its location and scale from the decoder."""

    maps = 2
    levels: int

    def __init__(self, event_shape: torch.Size, levels: int) -> None:
        super().__init__(event_shape)
        self.levels = levels
        self.support = constraints.integer_interval(0, levels - 1)
        self.expects = f"whole numbers 0 … {levels - 1}"

    def each(self, numbers: Tensor, index: int | None = None) -> Any:
        half = (self.levels - 1) / 2
        loc, scale = half * (1 + numbers.select(-1, 0)), half / 4 * numbers.select(-1, 1).exp()
        return DiscretizedLogistic(loc, scale, self.levels)


class Logistics(Likelihood):
    """Real values of size about 1, each from a mixture of logistics: its logits, locations and scales.

    Components start side by side. A scale is a softplus, linear far out so that no gradient runs away, above a least
    one, so that the likelihood has a maximum on data with repeated values.
    """

    centres: Tensor

    def __init__(self, event_shape: torch.Size, components: int) -> None:
        super().__init__(event_shape)
        self.components, self.maps = components, 3 * components
        start = torch.linspace(-1, 1, components) if components > 1 else torch.zeros(1)
        self.register_buffer("centres", start, persistent=False)

    def each(self, numbers: Tensor, index: int | None = None) -> Any:
        return MixtureOfLogistics(*self._components(numbers))

    def _components(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, loc, width = numbers.unflatten(-1, (3, self.components)).unbind(-2)
        scale = 2 / (self.components + 3) * softplus(width + SOFTPLUS_ONE) + LEAST_SCALE
        return logits, loc + self.centres, scale

    def check_training(self, x: Tensor) -> None:
        refuse_constant(x, "use a discrete likelihood")


class DiscretizedLogistics(Logistics):
    """Ordered levels 0 … levels − 1: a mixture of logistics binned to whole numbers."""

    levels: int

    def __init__(self, event_shape: torch.Size, levels: int, components: int) -> None:
        super().__init__(event_shape, components)
        self.levels = levels
        self.support = constraints.integer_interval(0, levels - 1)
        self.expects = f"whole numbers 0 … {levels - 1}"

    def each(self, numbers: Tensor, index: int | None = None) -> Any:
        logits, loc, scale = self._components(numbers)
        half = (self.levels - 1) / 2
        return MixtureOfDiscretizedLogistics(logits, half * (1 + loc), half * scale, self.levels)

    def check_training(self, x: Tensor) -> None:
        """A mass is at most 1: the likelihood has a maximum on any data."""


def refuse_constant(x: Tensor, instead: str, because: str = "with a noise scale learnt for each value") -> None:
    """Raise a ``ValueError`` that names the columns of x in which all rows are equal."""
    columns = x.reshape(x.shape[0], -1)
    constant = (columns == columns[:1]).all(0).nonzero().flatten().tolist()
    if constant:
        shown = ", ".join(map(str, constant[:8])) + (", …" if len(constant) > 8 else "")
        raise ValueError(
            f"x is constant in column {shown} ({len(constant)} of {columns.shape[1]}): {because} the likelihood has no "
            f"maximum there. Drop those columns, or {instead}"
        )


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
    "mixture_of_logistics": Logistics,
}


def likelihood(
    name: str,
    event_shape: torch.Size,
    *,
    scale: Scale | None = None,
    levels: int | None = None,
    components: int | None = None,
) -> Likelihood:
    """The likelihood of a name.

    Args:
        name: ``"bernoulli"``, ``"normal"``, ``"categorical"``, ``"discretized_logistic"`` or
            ``"mixture_of_logistics"``.
        event_shape: shape of one datum.
        scale: noise sd of ``"normal"``: a number, ``"shared"``, ``"feature"`` (default) or ``"predicted"``.
        levels: number of levels of ``"categorical"`` and ``"discretized_logistic"``; required there.
        components: size of the mixture of ``"mixture_of_logistics"`` (default 5); given to ``"discretized_logistic"``
            it makes that a mixture too.

    Raises:
        ValueError: for an unknown name, or options that the likelihood does not have or lacks.
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(map(repr, LIKELIHOODS))}, or a callable; got {name!r}")
    if scale is not None and name != "normal":
        raise ValueError(f"scale= belongs to likelihood='normal', not to {name!r}")
    if components is not None:
        check_count(components, "components")
        if name not in ("discretized_logistic", "mixture_of_logistics"):
            raise ValueError(
                f"components= belongs to 'mixture_of_logistics' and 'discretized_logistic', not to likelihood={name!r}"
            )
    if name in ("categorical", "discretized_logistic"):
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
            raise ValueError(
                f"likelihood={name!r} needs levels=, an int of at least 2 (17 for data 0 … 16), got {levels!r}"
            )
        if components is not None:
            return DiscretizedLogistics(event_shape, levels, components)
        return (Categorical if name == "categorical" else Logistic)(event_shape, levels)
    if levels is not None:
        raise ValueError(f"levels= belongs to 'categorical' and 'discretized_logistic', not to likelihood={name!r}")
    if name == "mixture_of_logistics":
        return Logistics(event_shape, 5 if components is None else components)
    return Normal(event_shape, "feature" if scale is None else scale) if name == "normal" else Bernoulli(event_shape)
