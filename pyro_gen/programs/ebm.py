r"""The energy-based model: Z is left open, because what is asked of the model does not need it.

.. math:: p_\theta(x) = \frac{b(x)\, e^{-E_\theta(x)}}{Z(\theta)}, \qquad
          Z(\theta) = \int b(x)\, e^{-E_\theta(x)}\, dx .

Any network is an energy: nothing has to be invertible, ordered or normalised. In exchange Z is an integral over all x
that depends on θ, so the likelihood cannot be maximised as it stands, and an ELBO, which takes the factor for a
likelihood, would drive Z up for ever. There are four ways round it, each an objective of its own:

- the score :math:`\nabla_x \log p = \nabla_x \log b - \nabla_x E` has no Z: `ScoreMatching` and its kin;
- the gradient of log Z is an expectation, over draws of a chain: `ContrastiveDivergence`;
- log Z is one more parameter of a classifier against known noise: `NoiseContrastive`;
- conditionals of discrete x have small sums for a Z: `PseudoLikelihood`.

Afterwards ``log_normalizer`` estimates Z with an error, and with it log p(x). Samples come from Markov chains over
:math:`\log f`. The base b starts the chains and keeps the model proper; a flat one is the pure energy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_gen.base import Exact, Program, Sampler, Unnormalized, event_names
from pyro_gen.checks import as_shape, check_count, check_sizes, describe
from pyro_gen.distributions.held import Held
from pyro_gen.distributions.unnormalized import BaseMeasure, support_named
from pyro_gen.handlers import energy, unmasked
from pyro_gen.nn import RBM, EnergyMLP
from pyro_gen.samplers import HMC, Gibbs
from pyro_gen.targets import BoltzmannTarget, Target

__all__ = ["EBM"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


class EnergyModel(nn.Module):
    """The model: x under the base measure, times exp(−E(x))."""

    started: Tensor

    def __init__(self, net: nn.Module, base: nn.Module, event_shape: torch.Size) -> None:
        super().__init__()
        self.net, self.base, self.event_shape = net, base, event_shape
        self.register_buffer("started", torch.tensor(False))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        given = () if context is None else (context,)
        with pyro.plate("data", x.shape[0]):
            names: Any = {"event_dims": event_names(self.event_shape)}
            x = pyro.sample("x", self.base(), obs=x, infer=names)
            energy("energy", self.net, x, *given)
        return x


class EBM(Unnormalized):
    r"""Energy-based model: :math:`p(x) \propto b(x) \exp(-E(x))`; Z is left open, and estimated where it is wanted.

    Args:
        event_shape: shape of one datum, an int or a tuple.
        energy: a module or function from x, ``(rows, *event_shape)`` (and the context), to energies, ``(rows,)`` or
            ``(rows, 1)``; None for a multilayer perceptron on standardised data; ``"rbm"`` for the free energy of a
            restricted Boltzmann machine with ``hidden[0]`` hidden units, on binary data.
        base: what the energy tilts: ``"normal"`` (mean and scale of the training data), ``"uniform"`` (their box),
            ``"bernoulli"`` (fair coins, for binary data), a distribution of event shape ``event_shape``, a program of
            kind `Exact` (a flow), or None for the flat measure of ``support``.
        context_shape: of what a row is conditioned on: p(x | context), with a Z for each context.
        hidden: sizes of the hidden layers. activation: ``"silu"``, ``"softplus"``, ``"tanh"``, ``"gelu"``, or
            ``"relu"``, which score matching refuses.
        support: of a flat base: ``"real"``, ``"positive"``, ``"unit"``, ``"binary"`` or ``(low, high)``.

    Raises:
        ValueError, TypeError: for unknown names, or a base that does not fit.

    References:
        Y. LeCun et al., "A tutorial on energy-based learning", 2006; Y. Song, D. Kingma, "How to train your
        energy-based models", 2021, arXiv:2101.03288.

    Example:
        >>> import torch
        >>> ebm = EBM(2, energy=lambda x: (x**4).sum(-1) / 4, base=None)
        >>> ebm.log_density(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor([-0.0000, -0.5000])
    """

    model: EnergyModel

    def __init__(
        self,
        event_shape: int | tuple[int, ...],
        energy: Any = None,
        base: Literal["normal", "uniform", "bernoulli"] | Distribution | Exact | None = "normal",
        context_shape: int | tuple[int, ...] | None = None,
        *,
        hidden: Sequence[int] = (128, 128),
        activation: Literal["silu", "softplus", "tanh", "gelu", "relu"] = "silu",
        support: Any = "real",
    ) -> None:
        shape = as_shape(event_shape)
        context = None if context_shape is None else as_shape(context_shape, "context_shape")
        hidden = check_sizes(hidden)
        net = _network(energy, shape, context, hidden, activation)
        super().__init__(EnergyModel(net, _base(base, shape, support), shape), shape, context)
        if (energy is None or energy == "rbm") and (base is None or isinstance(base, str)):
            self.config = {
                "event_shape": list(shape),
                "energy": energy,
                "base": base,
                "context_shape": None if context is None else list(context),
                "hidden": list(hidden),
                "activation": activation,
                "support": list(support) if isinstance(support, (tuple, list)) else support,
            }

    def check(self, x: Any, context: Any = None) -> tuple[Tensor, ...]:
        batch = super().check(x, context)
        if is_validation_enabled() and not batch[0].is_meta:
            support = unmasked(self.model.base()).support
            inside = support.check(batch[0]).reshape(len(batch[0]), -1).all(1)
            if not bool(inside.all()):
                row = int((~inside).nonzero()[0])
                raise ValueError(
                    f"x lies outside the support of the base ({support}) in {int((~inside).sum())} of {len(inside)} "
                    f"rows, first in row {row}: rescale the data or choose another base"
                )
        return batch

    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Place the base, and what standardises the network's input, by the data: once, before training begins."""
        batch = Program.check(self, x, context)
        if bool(self.model.started):
            return
        self.model.started.fill_(True)
        if isinstance(self.model.base, BaseMeasure):
            self.model.base.place(batch[0])
        if isinstance(self.model.net, _Flat):
            self.model.net.mlp.standardise(*(part.flatten(1) for part in batch))

    def log_density_rows(self, *batch: Tensor) -> Tensor:
        """log b(x) − E(x) of each row: what the trace of the model has, without one."""
        x = batch[0]
        e = self.model.net(*batch)
        if not isinstance(e, Tensor) or not e.dtype.is_floating_point or tuple(e.shape) not in ((len(x),), (len(x), 1)):
            return super().log_density_rows(*batch)  # which says what is wrong
        e = e.reshape(len(x)) if e.dim() == 2 else e
        base = self.model.base
        if isinstance(base, BaseMeasure) and base.name is None:
            return -e
        log_base: Tensor = base().log_prob(x)
        return log_base - e

    def _base(self, rows: int, *contexts: Tensor) -> Any:
        return unmasked(self.model.base()).expand((rows,))

    def _machine(self, rows: int, *contexts: Tensor) -> tuple[Any, bool] | None:
        base = self.model.base
        if isinstance(self.model.net, RBM) and isinstance(base, BaseMeasure):  # no values have to be looked at
            return self.model.net, base.name is None
        return super()._machine(rows, *contexts)

    def target(self, context: Tensor | None = None) -> Target:
        """The density as samplers and methods of log Z see it; a flat base has no draws to start from."""
        target, base = super().target(context), self.model.base
        flat = isinstance(base, BaseMeasure) and base.name is None
        return target.without_base() if flat and not isinstance(target, BoltzmannTarget) else target

    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        sampler: Sampler | None = None,
        warmup: int = 1000,
        start: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """The last states of n chains: draws of the model as far as the chains have mixed.

        Args:
            n: number of rows. context: ``(n, *context_shape)`` or ``context_shape``, for a conditional program.
            sampler: how; default `HMC` with adapted steps, `Gibbs` for discrete data. Its ``chains`` are n here.
            warmup: steps of each chain.
            start: where the chains start, ``(n, *event_shape)``; default draws of the base.
            seed: makes the draws repeatable and leaves the global generators as they were.

        Returns:
            Tensor of shape ``(n, *event_shape)``. For R-hat and effective sizes run a sampler: ``pg.HMC().run(ebm)``.
        """
        check_count(n, "n")
        if sampler is None:
            sampler = Gibbs() if self.target(context).support.is_discrete else HMC()
        chains: Any = replace(sampler, chains=n)  # type: ignore[type-var]
        draws = chains.run(self, draws=1, warmup=warmup, start=start, context=context, seed=seed)
        result: Tensor = draws.x[:, -1]
        return result


class _Flat(nn.Module):
    """The default network on data of any event shape."""

    def __init__(self, mlp: EnergyMLP) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        result: Tensor = self.mlp(x.flatten(1), None if context is None else context.flatten(1))
        return result


class _Calls(nn.Module):
    """A function as the energy."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class _ProgramBase(nn.Module):
    """An exact program as the base; its weights stay as they are."""

    def __init__(self, program: Exact) -> None:
        super().__init__()
        self.program = program.requires_grad_(False)

    def forward(self) -> Any:
        return self.program.distribution()


def _network(
    energy: Any, shape: torch.Size, context: torch.Size | None, hidden: tuple[int, ...], activation: str
) -> nn.Module:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {describe(activation)}")
    if energy is None:
        given = 0 if context is None else context.numel()
        return _Flat(EnergyMLP(shape.numel(), hidden, context_features=given, activation=ACTIVATIONS[activation]))
    if isinstance(energy, str) and energy == "rbm":
        if len(shape) != 1 or context is not None or len(hidden) != 1:
            raise ValueError(
                "energy='rbm' takes vectors of binary values, no context and one hidden layer, as EBM(784, 'rbm', "
                f"'bernoulli', hidden=(64,)); got event_shape {tuple(shape)}, hidden {hidden}"
            )
        return RBM(shape.numel(), hidden[0])
    if isinstance(energy, nn.Module) and not isinstance(energy, Program):
        return energy
    if isinstance(energy, (str, type, Program)) or not callable(energy):
        raise TypeError(f"energy must be a network, a function of x, 'rbm' or None, got {describe(energy)}")
    return _Calls(energy)


def _base(base: Any, shape: torch.Size, support: Any) -> nn.Module:
    if base is not None and support != "real":
        raise ValueError("support belongs to a flat base (base=None): other bases bring their own")
    if base is None or (isinstance(base, str) and base in ("normal", "uniform", "bernoulli")):
        return BaseMeasure(base, shape, support_named(support))
    if isinstance(base, Distribution):
        if tuple(base.event_shape) != tuple(shape) or tuple(base.batch_shape):
            raise ValueError(
                f"base must have event shape {tuple(shape)} and no batch shape, got event {tuple(base.event_shape)}, "
                f"batch {tuple(base.batch_shape)}: .to_event({len(shape)}) makes a batch of scalars one datum"
            )
        return Held(base)
    if isinstance(base, Exact):
        if tuple(base.event_shape) != tuple(shape) or base.context_shape is not None:
            raise ValueError(
                f"base must have event shape {tuple(shape)} and no context, got a {describe(base)} of event shape "
                f"{tuple(base.event_shape)}"
            )
        return _ProgramBase(base)
    raise ValueError(
        "base must be 'normal', 'uniform', 'bernoulli', a distribution, a program of kind Exact, or None; got "
        f"{describe(base)}"
    )
