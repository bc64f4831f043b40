r"""The generative adversarial network: Z is never written down.

.. math:: z \sim N(0, I), \qquad x = G_\theta(z) .

The model is a map of noise. Where z has fewer dimensions than x its draws fill a surface, and there is no density at
all; elsewhere the density is there, as an integral over all z that lead to x, and nobody can do it. No likelihood, no
bound, no score: what is left of Z is a ratio. A critic, which takes the place of the guide, learns from rows of data
and draws of the model

.. math:: \ell(x) \approx \log \frac{p_{data}(x)}{p_\theta(x)} ,

and the generator is moved to where ℓ is high (``objectives/adversarial.py``). Its observation is a point mass at
:math:`G_\theta(z)`, so that the program is a Pyro program like any other: traced, drawn from, and composed.

An encoder makes the guide a guide (BiGAN, ALI): it draws z given x, and the critic judges pairs (x, z). At the optimum
the encoder is the posterior of the model.

As nothing here is a density, two GANs are compared by their draws: by two-sample scores on rows that were not trained
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn.utils.parametrizations import spectral_norm as normalised

from pyro_gen.base import Implicit, Program, event_names
from pyro_gen.checks import as_shape, check_count, check_sizes, describe
from pyro_gen.distributions.bases import base_of
from pyro_gen.nn import MLP

__all__ = ["GAN"]

_LATENT: Any = {"event_dims": ["latent"]}  # what ArviZ calls the dimension of z
PRIORS = ("normal", "uniform", "student_t")
DENSITIES = ("log_prob", "log_density", "lower_bound", "score", "distribution", "target")


class NoDensity(AttributeError, TypeError):
    """A density was asked of a program that has none; an ``AttributeError`` too, so that ``hasattr`` says no."""


class Leaky(nn.LeakyReLU):
    """A rectifier of slope 0.2 below zero, so that a unit which is off still passes gradients to the generator."""

    def __init__(self) -> None:
        super().__init__(0.2)


class Standard(nn.Module):
    """Units in which the data have location 0 and scale 1, feature by feature; those of a context too."""

    location: Tensor
    scale: Tensor
    context_location: Tensor
    context_scale: Tensor

    def __init__(self, event_shape: torch.Size, context_shape: torch.Size | None) -> None:
        super().__init__()
        self.register_buffer("location", torch.zeros(event_shape))
        self.register_buffer("scale", torch.ones(event_shape))
        self.register_buffer("context_location", torch.zeros(context_shape or 0))
        self.register_buffer("context_scale", torch.ones(context_shape or 0))

    @torch.no_grad()
    def place(self, x: Tensor, context: Tensor | None = None) -> None:
        """Take location and scale from rows; a constant feature keeps a scale of 1."""
        for part, location, scale in (
            (x, self.location, self.scale),
            (context, self.context_location, self.context_scale),
        ):
            if part is not None:
                location.copy_(part.mean(0))
                spread = part.std(0, unbiased=False)
                scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def inputs(self, x: Tensor, context: Tensor | None) -> list[Tensor]:
        """x and the context as a network is to see them, flat."""
        seen = [((x - self.location) / self.scale).flatten(-self.location.dim())]
        return seen + self.contexts(context)

    def contexts(self, context: Tensor | None) -> list[Tensor]:
        if context is None:
            return []
        return [((context - self.context_location) / self.context_scale).flatten(-self.context_location.dim())]


class Generator(nn.Module):
    """The model: z from the prior, x where the network takes it."""

    started: Tensor

    def __init__(
        self, prior: nn.Module, network: nn.Module, own: bool, event_shape: torch.Size, context: torch.Size | None
    ) -> None:
        super().__init__()
        self.prior, self.network, self.own, self.event_shape = prior, network, own, event_shape
        if own:
            self.units = Standard(event_shape, context)
        self.register_buffer("started", torch.tensor(False))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        names: Any = {"event_dims": event_names(self.event_shape)}
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", self.prior(), infer=_LATENT)
            made = self.generate(z, context)
            pyro.sample("x", dist.Delta(made, event_dim=len(self.event_shape)), obs=x, infer=names)
        return made

    def generate(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """x of each z: ``(..., *event_shape)``."""
        if self.own:
            raw = self.network(_joined(z, *self.units.contexts(context)))
        else:
            raw = self.network(z) if context is None else self.network(z, context)
        want = (*z.shape[:-1], *self.event_shape)
        if not isinstance(raw, Tensor) or raw.numel() != torch.Size(want).numel():
            given = f"shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else describe(raw)
            raise ValueError(
                f"generator must give {self.event_shape.numel()} numbers a row, for event_shape "
                f"{tuple(self.event_shape)}; got {given} from z of shape {tuple(z.shape)}"
            )
        made: Tensor = raw.reshape(want)
        return self.units.location + self.units.scale * made if self.own else made


class Critic(nn.Module):
    """The guide: the critic's logit of each row; with an encoder, z given x as well, and the logit of both."""

    def __init__(
        self,
        network: nn.Module,
        own: bool,
        encoder: nn.Module | None,
        own_encoder: bool,
        latent_dim: int,
        event_shape: torch.Size,
        context: torch.Size | None,
    ) -> None:
        super().__init__()
        self.network, self.encoder, self.latent_dim = network, encoder, latent_dim
        self.own, self.own_encoder = own, own_encoder
        if own or own_encoder:
            self.units = Standard(event_shape, context)

    @property
    def scale(self) -> Tensor | None:
        """The unit in which the critic's own network sees x: that of its gradients, for penalties."""
        return self.units.scale if self.own else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with pyro.plate("data", x.shape[0]):
            z = None if self.encoder is None else pyro.sample("z", self.posterior(x, context), infer=_LATENT)
            return pyro.deterministic("logit", self.judge(x, z, context), event_dim=0)

    def judge(self, x: Tensor, z: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The logit of each row, beside its latents where there is an encoder: ``(rows,)``."""
        latents = [] if z is None else [z]
        if self.own:
            out = self.network(_joined(*self.units.inputs(x, context), *latents))
        else:
            out = self.network(x, *latents, *(() if context is None else (context,)))
        batch = x.shape[:1] if z is None else z.shape[:-1]
        if isinstance(out, Tensor) and tuple(out.shape) in (tuple(batch), (*batch, 1)):
            return out.reshape(batch)
        given = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else describe(out)
        raise ValueError(
            f"critic must give one logit a row, of shape {tuple(batch)} or {(*batch, 1)}; got {given}. Two outputs are "
            "logits of two classes: their difference is the logit"
        )

    def posterior(self, x: Tensor, context: Tensor | None = None) -> Any:
        """q(z | x): a normal where the encoder gives location and log scale, a point mass where it gives z alone."""
        assert self.encoder is not None
        if self.own_encoder:
            raw = self.encoder(_joined(*self.units.inputs(x, context)))
        else:
            raw = self.encoder(x) if context is None else self.encoder(x, context)
        d = self.latent_dim
        if isinstance(raw, Tensor) and tuple(raw.shape) == (len(x), d):
            return dist.Delta(raw, event_dim=1)
        if isinstance(raw, Tensor) and tuple(raw.shape) == (len(x), 2 * d):
            loc, log_scale = raw.chunk(2, -1)
            return dist.Normal(loc, log_scale.exp()).to_event(1)
        given = f"shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else describe(raw)
        raise ValueError(
            f"encoder must give z, of shape {(len(x), d)}, or location and log scale beside each other, of shape "
            f"{(len(x), 2 * d)}; got {given}"
        )


class GAN(Implicit):
    r"""Generative adversarial network: :math:`x = G(z)`; no density is ever written down, and draws are all there is.

    Args:
        event_shape: shape of one datum, an int or a tuple.
        latent_dim: size of z.
        generator: a module from z, ``(rows, latent_dim)`` (and the context), to data; None for a multilayer perceptron.
        critic: a module from x, ``(rows, *event_shape)`` (then z, where there is an encoder, and the context), to one
            logit a row; None for a multilayer perceptron. Networks built here work in units in which the training data
            have mean 0 and standard deviation 1; a module of yours takes and gives data as they are.
        context_shape: of what a row is conditioned on: draws of p(x | context).
        hidden: sizes of the hidden layers of networks built here.
        encoder: ``"mlp"`` or a module from x (and the context) to z, or to location and log scale of z; the critic then
            judges x and z together. None for none.
        spectral_norm: hold each layer of the critic built here to a largest singular value of 1.
        prior: of z: ``"normal"``, ``"uniform"``, ``"student_t"``, or a distribution of event shape ``(latent_dim,)``.

    Raises:
        ValueError: for sizes below 1, unknown names, and at the first call for a critic that gives no single logit.
        TypeError: for networks that are no modules. A density, a bound or a score of it is a ``TypeError`` too.

    References:
        I. Goodfellow et al., "Generative adversarial nets", 2014, arXiv:1406.2661.
        J. Donahue, P. Krähenbühl, T. Darrell, "Adversarial feature learning", 2017, arXiv:1605.09782, eq. 3.
        V. Dumoulin et al., "Adversarially learned inference", 2017, arXiv:1606.00704, eq. 2.
        T. Miyato et al., "Spectral normalization for generative adversarial networks", 2018, arXiv:1802.05957.

    Example:
        >>> import torch
        >>> gan = GAN(2, latent_dim=4, encoder="mlp")
        >>> x = gan.sample(5, seed=0)
        >>> x.shape, gan.encode(x).mean.shape, gan.log_ratio(x).shape
        (torch.Size([5, 2]), torch.Size([5, 4]), torch.Size([5]))
    """

    model: Generator
    guide: Critic

    def __init__(
        self,
        event_shape: int | tuple[int, ...],
        latent_dim: int = 8,
        generator: nn.Module | None = None,
        critic: nn.Module | None = None,
        context_shape: int | tuple[int, ...] | None = None,
        *,
        hidden: Sequence[int] = (128, 128, 128),
        encoder: nn.Module | Literal["mlp"] | None = None,
        spectral_norm: bool = False,
        prior: str | Distribution | nn.Module = "normal",
    ) -> None:
        event, dim = as_shape(event_shape), check_count(latent_dim, "latent_dim")
        context = None if context_shape is None else as_shape(context_shape, "context_shape")
        sizes, given = check_sizes(hidden), 0 if context is None else context.numel()
        for name, network in (("generator", generator), ("critic", critic)):
            if network is not None and (not isinstance(network, nn.Module) or isinstance(network, Program)):
                raise TypeError(f"{name} must be a torch module or None, got {describe(network)}")
        if encoder not in (None, "mlp") and (not isinstance(encoder, nn.Module) or isinstance(encoder, Program)):
            raise ValueError(f"encoder must be a module, 'mlp' or None, got {describe(encoder)}")
        if not isinstance(spectral_norm, bool):
            raise ValueError(f"spectral_norm must be True or False, got {describe(spectral_norm)}")
        if spectral_norm and critic is not None:
            raise ValueError(
                "spectral_norm=True is for the critic built here; in your own wrap the layers, by "
                "torch.nn.utils.parametrizations.spectral_norm"
            )
        if isinstance(prior, str) and prior not in PRIORS:  # a learnt mixture would need gradients through its draws
            raise ValueError(f"prior must be {', '.join(map(repr, PRIORS))} or a distribution, got {prior!r}")
        latents = base_of(prior, dim, name="prior")
        support = latents().support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        if encoder == "mlp" and support is not constraints.real:
            raise ValueError(
                f"encoder='mlp' gives z anywhere, and the prior lies on {support}: take a prior on the whole space"
            )
        own, features = encoder == "mlp", event.numel()
        inference = MLP(features + given, 2 * dim, sizes, activation=Leaky) if encoder == "mlp" else encoder
        seen = features + given + (0 if encoder is None else dim)
        judge = MLP(seen, 1, sizes, activation=Leaky, output_bias=False) if critic is None else critic
        if spectral_norm:
            for layer in judge.modules():
                if isinstance(layer, nn.Linear):
                    normalised(layer)
        network = MLP(dim + given, features, sizes, activation=Leaky) if generator is None else generator
        assert not isinstance(inference, str)
        super().__init__(
            Generator(latents, network, generator is None, event, context),
            Critic(judge, critic is None, inference, own, dim, event, context),
            tuple(event),
            None if context is None else tuple(context),
        )
        self.latent_dim = dim
        named: dict[str, Any] = {"generator": generator, "critic": critic, "encoder": encoder, "prior": prior}
        if all(value is None or isinstance(value, str) for value in named.values()):
            self.config = dict(
                named,
                event_shape=list(event),
                latent_dim=dim,
                context_shape=None if context is None else list(context),
                hidden=list(sizes),
                spectral_norm=spectral_norm,
            )

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name in DENSITIES:
            raise NoDensity(
                f"{type(self).__name__} has no {name}: its density is never written down, it can only be sampled. "
                "Compare its draws with data by two-sample scores (pg.diagnostics.mmd, energy_distance, "
                "c2st); log_ratio(x) has what its critic takes for the log density ratio"
            )
        return super().__getattr__(name)

    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Place the units of the networks built here by the data: once, before training begins."""
        batch = Program.check(self, x, context)
        if bool(self.model.started):
            return
        self.model.started.fill_(True)
        for part in (self.model, self.guide):
            if hasattr(part, "units"):
                part.units.place(*batch)

    def generate(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """x of each z, ``(..., latent_dim)``: ``(..., *event_shape)``."""
        if not isinstance(z, Tensor) or z.shape[-1:] != (self.latent_dim,):
            given = tuple(z.shape) if isinstance(z, Tensor) else repr(z)
            raise ValueError(f"z must be a tensor of shape (..., {self.latent_dim}), got {given}")
        return self.model.generate(z, context)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Any:
        """q(z | x), by the encoder: a distribution of batch shape ``(rows,)`` and event shape ``(latent_dim,)``."""
        batch = self.check(x, context)
        if self.guide.encoder is None:
            self._without_encoder()
        return self.guide.posterior(*batch)

    def log_ratio(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""The critic's logit of each row: ``(rows,)``.

        It estimates :math:`\log p_{data}(x) / p_\theta(x)`, in nats, if it was trained by a loss that makes it so: not
        by least squares, hinge or Wasserstein (the loss's own ``module.log_ratio`` knows). With an encoder the ratio is
        that of the joint densities, at z drawn for x.
        """
        batch = self.check(x, context)
        z = None if self.guide.encoder is None else self.guide.posterior(*batch).rsample()
        return self.guide.judge(batch[0], z, *batch[1:])

    def _without_encoder(self) -> NoReturn:
        raise ValueError("this GAN has no encoder, so there is no z of x: build it with encoder='mlp'")


def _joined(*parts: Tensor) -> Tensor:
    """Vectors beside each other, with the leading dimensions of all."""
    if len(parts) == 1:
        return parts[0]
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)
