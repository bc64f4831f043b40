r"""The variational autoencoder: Z is bounded from below.

.. math:: z \sim p(z), \qquad x \mid z \sim p_\theta(x \mid z), \qquad p_\theta(x) = \int p(z) p_\theta(x \mid z)\, dz .

With a network for the decoder the integral has no closed form, and neither has the posterior :math:`p(z \mid x)`. The
guide :math:`q_\phi(z \mid x)`, a second network amortised over all rows, stands in for it:

.. math:: \log p_\theta(x) = \underbrace{E_q[\log p_\theta(x \mid z)] - KL[q_\phi(z \mid x) \,\|\, p(z)]}_{\text{ELBO}}
          + KL[q_\phi(z \mid x) \,\|\, p_\theta(z \mid x)] .

The second term is not negative, so the first bounds the evidence; maximised over both networks it fits the model and
closes the gap at once. Sampling is ancestral: z from the prior, x from the decoder. A linear decoder with Gaussian
noise is probabilistic PCA, and there the bound can be tight (Tipping & Bishop 1999).

Two normals can be replaced by flows. A flow as prior is asked for the density of the guide's draws, and is trained with
the rest: p(z) then goes to where the codes of the data are, and draws from the prior decode to data. A flow as guide is
drawn from, each draw with its own density, and closes part of the gap that a normal leaves open where the posterior is
bent or has several modes. The KL between guide and prior has no closed form with either; the bound samples it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_gen.base import Bounded, Exact, Program, event_names
from pyro_gen.checks import as_shape, check_count, check_sizes, describe
from pyro_gen.distributions.bases import StandardNormal, base_of
from pyro_gen.distributions.flow import FlowDistribution
from pyro_gen.distributions.likelihoods import Likelihood, Scale
from pyro_gen.distributions.likelihoods import likelihood as named_likelihood
from pyro_gen.guides.conditional import ConditionalFlow, centre
from pyro_gen.nn import MLP, ConvDecoder, ConvEncoder
from pyro_gen.transforms.stacks import stack

__all__ = ["VAE"]

_LATENT: Any = {"event_dims": ["latent"]}  # what ArviZ calls the dimension of z
Network = nn.Module | Literal["mlp", "conv"] | None
GuideName = Literal["diagonal", "full_rank", "flow"]
FLOW_LAYERS = 2  # of prior="flow" and of guide="flow"


class Decoder(nn.Module):
    """The model: z from the prior, x from the likelihood of the decoded z."""

    def __init__(
        self,
        prior: nn.Module,
        network: nn.Module,
        observe: Callable[[Tensor], Any],
        event_shape: torch.Size,
        own_network: bool,
    ) -> None:
        super().__init__()
        self.prior, self.network, self.likelihood = prior, network, observe
        self.event_shape, self.own_network = event_shape, own_network
        self.event_names = event_names(event_shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", self.prior(), infer=_LATENT)
            names: Any = {"event_dims": self.event_names}
            return pyro.sample("x", self.observe(z, context), obs=x, infer=names)

    def observe(self, z: Tensor, context: Tensor | None = None) -> Any:
        """p(x | z), for z of shape ``(..., latent_dim)``."""
        raw = _call(self.network, z, context, self.own_network)
        if not isinstance(self.likelihood, Likelihood):
            return self.likelihood(raw)
        shape = (*z.shape[:-1], self.likelihood.maps, *self.event_shape)
        if raw.numel() != math.prod(shape):
            raise ValueError(
                f"decoder must give {self.likelihood.maps} x {tuple(self.event_shape)} numbers a row for this "
                f"likelihood, {self.likelihood.maps * self.event_shape.numel()} in all; got shape {tuple(raw.shape)} "
                f"from z of shape {tuple(z.shape)}"
            )
        return self.likelihood(raw.reshape(shape))


class FlowPrior(nn.Module):
    """p(z), a learnt flow; coupling layers, which are parallel in both directions: the bound scores, `sample` draws."""

    def __init__(self, latent_dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        transform = "spline_coupling" if latent_dim > 1 else "spline_autoregressive"  # one feature has no halves
        self.bijection = stack(transform, latent_dim, FLOW_LAYERS, hidden)
        self.base = StandardNormal(latent_dim)

    def forward(self) -> FlowDistribution:
        return FlowDistribution(self.bijection, self.base())


class ProgramPrior(nn.Module):
    """p(z), the density of another program, whose model is a part of this one: trained, moved and saved with it."""

    def __init__(self, program: Exact) -> None:
        super().__init__()
        self.model = program.model
        self.__dict__["program"] = program  # not as a submodule: its model is one already

    def forward(self) -> Any:
        return self.__dict__["program"].distribution()


class Encoder(nn.Module):
    """The guide: q(z | x) from one pass of the encoder over x."""

    index: Tensor

    def __init__(
        self,
        network: nn.Module,
        latent_dim: int,
        kind: GuideName,
        centre: Callable[[Tensor], Tensor] | None,
        hidden: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.network, self.latent_dim, self.kind = network, latent_dim, kind
        self.own_network = centre is not None
        self.__dict__["centre"] = centre
        if kind == "flow":
            seen = hidden[-1] if hidden else 2 * latent_dim
            self.flow = ConditionalFlow(latent_dim, layers=FLOW_LAYERS, hidden=hidden, context_features=seen)
        if (
            kind == "full_rank"
        ):  # where each entry of the Cholesky factor stands among the network's outputs; the last is a zero
            d = latent_dim
            index = torch.full((d, d), d * (d + 1) // 2)
            index[tuple(torch.tril_indices(d, d))] = torch.arange(d * (d + 1) // 2)
            self.register_buffer("index", index, persistent=False)

    @property
    def outputs(self) -> int:
        """Numbers the network gives a row."""
        d = self.latent_dim
        if self.kind == "flow":
            return self.flow.outputs
        return d + d * (d + 1) // 2 if self.kind == "full_rank" else 2 * d

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with pyro.plate("data", x.shape[0]):
            return pyro.sample("z", self.posterior(x, context), infer=_LATENT)

    def posterior(self, x: Tensor, context: Tensor | None = None) -> Any:
        """q(z | x), of batch shape ``(rows,)`` and event shape ``(latent_dim,)``."""
        if self.own_network:
            x = self.__dict__["centre"](x)
        raw = _call(self.network, x, context, self.own_network)
        if raw.shape[-1] != self.outputs:
            rest = {
                "diagonal": "log scale",
                "full_rank": "the lower triangle",
                "flow": f"log scale, then {self.outputs - 2 * self.latent_dim} numbers that the flow sees",
            }
            raise ValueError(
                f"encoder must give {self.outputs} numbers a row for guide={self.kind!r} and "
                f"latent_dim={self.latent_dim} (location, then {rest[self.kind]}); got shape {tuple(raw.shape)}"
            )
        if self.kind == "flow":
            return self.flow(raw)
        if self.kind == "diagonal":
            loc, log_scale = raw.chunk(2, -1)
            return dist.Normal(loc, log_scale.exp()).to_event(1)
        loc, lower = raw[..., : self.latent_dim], raw[..., self.latent_dim :]
        lower = torch.cat([lower, torch.zeros_like(lower[..., :1])], -1)[..., self.index]
        log_diagonal = lower.diagonal(dim1=-2, dim2=-1)
        scale_tril = lower.tril(-1) + torch.diag_embed(log_diagonal.exp())
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)


class VAE(Bounded):
    r"""Variational autoencoder: :math:`p(x) = \int p(z) p(x|z) dz`, its Z bounded by the encoder q(z | x).

    Args:
        event_shape: shape of one datum, an int or a tuple.
        latent_dim: size of z.
        likelihood: p(x | z): ``"normal"``, ``"bernoulli"``, ``"categorical"`` or ``"discretized_logistic"`` (whole
            numbers 0 … levels − 1), or a callable from the decoder's output to a distribution over one datum.
        encoder: a module from x (and context) to ``2 * latent_dim`` numbers a row, location then log scale
            (``latent_dim + latent_dim (latent_dim + 1) / 2`` for ``guide="full_rank"``); ``"mlp"`` or ``"conv"``
            (events of shape (channels, height, width)) build one. None is ``"mlp"``.
        decoder: a module from z (and context) to the likelihood's numbers, read as ``(maps, *event_shape)``; it must
            take leading dimensions. ``"mlp"``, ``"conv"`` or None build one.
        prior: p(z): None for N(0, I), ``"mixture"`` for a learnt mixture of ``components`` Gaussians, ``"flow"`` for a
            learnt flow (2 spline coupling layers), any Pyro distribution of event shape ``(latent_dim,)``, a program
            with an exact density of that shape (a `Flow`: trained along, unless its parameters ask for no gradient), or
            a module whose ``forward()`` gives a distribution.
        guide: q(z | x): ``"diagonal"`` or ``"full_rank"`` normal, or ``"flow"``: a normal that 2 inverse autoregressive
            spline layers bend, given x. Draws and their densities take one pass; the gradients ``"dreg"`` and ``"stl"``
            of `IWAE` ask for the density of a draw at weights held fixed, ``latent_dim`` small steps more.
        context_shape: shape of what a row is conditioned on; encoder and decoder then take it as second argument.
        hidden: hidden sizes of networks built here.
        scale: noise of ``"normal"``: a number, ``"shared"``, ``"feature"`` (default) or ``"predicted"``.
        levels: levels of the two discrete likelihoods of more than two values.
        components: of ``prior="mixture"``.

    Raises:
        ValueError: for unknown names, sizes below 1, or options that do not go together.

    References:
        D. P. Kingma, M. Welling, "Auto-encoding variational Bayes", 2014, arXiv:1312.6114, eqs. 3 and 10.
        D. J. Rezende, S. Mohamed, D. Wierstra, "Stochastic backpropagation", 2014, arXiv:1401.4082.

    Example:
        >>> import torch
        >>> vae = VAE(64, latent_dim=2, likelihood="bernoulli")
        >>> x = vae.sample(5, seed=0)
        >>> x.shape, vae.encode(x).event_shape, vae.lower_bound(x).shape
        (torch.Size([5, 64]), torch.Size([2]), torch.Size([5]))
    """

    model: Decoder
    guide: Encoder

    def __init__(
        self,
        event_shape: int | tuple[int, ...],
        latent_dim: int = 2,
        likelihood: str | Callable[[Tensor], Any] = "normal",
        encoder: Network = None,
        decoder: Network = None,
        prior: nn.Module | Distribution | Literal["mixture", "flow"] | None = None,
        guide: GuideName = "diagonal",
        *,
        context_shape: int | tuple[int, ...] | None = None,
        hidden: Sequence[int] = (128, 128),
        scale: Scale | None = None,
        levels: int | None = None,
        components: int = 10,
    ) -> None:
        event, check_dim = as_shape(event_shape), check_count(latent_dim, "latent_dim")
        context = None if context_shape is None else as_shape(context_shape, "context_shape")
        context_features = 0 if context is None else context.numel()
        hidden = check_sizes(hidden)
        if guide not in get_args(GuideName):
            raise ValueError(f"guide must be 'diagonal', 'full_rank' or 'flow', got {describe(guide)}")
        observe = _likelihood(likelihood, event, scale, levels)
        maps = observe.maps if isinstance(observe, Likelihood) else None
        centre = observe.centre if isinstance(observe, Likelihood) else _identity

        own_encoder = not isinstance(encoder, nn.Module)
        inference = Encoder(nn.Identity(), check_dim, guide, centre if own_encoder else None, hidden)
        inference.network = _encoder(encoder, event, inference.outputs, hidden, context_features)
        own_decoder = not isinstance(decoder, nn.Module)
        network = _decoder(decoder, latent_dim, event, maps, hidden, context_features)
        generator = Decoder(
            _prior(prior, latent_dim, hidden, components),
            network,
            observe,
            event,
            own_decoder,
        )
        super().__init__(generator, inference, tuple(event), None if context is None else tuple(context))
        self.latent_dim = latent_dim
        given: dict[str, Any] = {"encoder": encoder, "decoder": decoder, "prior": prior, "likelihood": likelihood}
        if all(value is None or isinstance(value, str) for value in given.values()):
            self.config = dict(
                given,
                event_shape=list(event),
                latent_dim=latent_dim,
                guide=guide,
                context_shape=None if context is None else list(context),
                hidden=list(hidden),
                scale=scale,
                levels=levels,
                components=components,
            )

    def check(self, x: Any, context: Any = None) -> tuple[Tensor, ...]:
        batch = super().check(x, context)
        if isinstance(self.model.likelihood, Likelihood) and torch.distributions.Distribution._validate_args:
            self.model.likelihood.check(batch[0])
        return batch

    def check_training(self, x: Tensor) -> None:
        if isinstance(self.model.likelihood, Likelihood):
            self.model.likelihood.check_training(x)

    def prior(self) -> Any:
        """p(z), a distribution of event shape ``(latent_dim,)``."""
        return self.model.prior()

    def encode(self, x: Tensor, context: Tensor | None = None) -> Any:
        """q(z | x): a distribution of batch shape ``(rows,)`` and event shape ``(latent_dim,)``.

        With ``guide="flow"`` it has no mean or variance in closed form; ``rsample_and_log_prob`` gives draws.
        """
        batch = self.check(x, context)
        return self.guide.posterior(*batch)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Any:
        """p(x | z) for z of shape ``(..., latent_dim)``: a distribution of event shape ``event_shape``."""
        if not isinstance(z, Tensor) or z.shape[-1:] != (self.latent_dim,):
            given = tuple(z.shape) if isinstance(z, Tensor) else repr(z)
            raise ValueError(f"z must be a tensor of shape (..., {self.latent_dim}), got {given}")
        return self.model.observe(z, context)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Mean of p(x | z) at the guide's mean of z: ``(rows, *event_shape)``.

        A flow has no mean in closed form: with ``guide="flow"`` z is the point to which the mean of its noise is taken,
        the mean of the normal that it bends.
        """
        q = self.encode(x, context)
        z = centre(q) if isinstance(q, FlowDistribution) else q.mean
        return cast(Tensor, self.decode(z, context).mean)


def _prior(prior: Any, latent_dim: int, hidden: tuple[int, ...], components: int) -> nn.Module:
    if prior == "flow":
        return FlowPrior(latent_dim, hidden)
    if isinstance(prior, Program):
        if not isinstance(prior, Exact):
            raise ValueError(
                f"prior must have a density that is known: a program of kind Exact, such as pg.Flow({latent_dim}); "
                f"got {describe(prior)}"
            )
        if tuple(prior.event_shape) != (latent_dim,) or prior.context_shape is not None:
            raise ValueError(
                f"prior must have event shape ({latent_dim},) and no context, got a {describe(prior)} of event shape "
                f"{tuple(prior.event_shape)}"
                + ("" if prior.context_shape is None else f" and context_shape {tuple(prior.context_shape)}")
            )
        return ProgramPrior(prior)
    if isinstance(prior, str) and prior not in ("normal", "student_t", "mixture", "uniform"):
        raise ValueError(
            "prior must be 'normal', 'student_t', 'mixture', 'uniform', 'flow', a distribution, a program with an exact"
            f" density, or a module that gives a distribution; got {prior!r}"
        )
    return base_of("normal" if prior is None else prior, latent_dim, components=components, name="prior")


def _identity(x: Tensor) -> Tensor:
    return x


def _call(network: nn.Module, x: Tensor, context: Tensor | None, own: bool) -> Tensor:
    """A network of ours takes the context flattened, one given by the user as it comes."""
    if context is None:
        return cast(Tensor, network(x))
    return cast(Tensor, network(x, context.flatten(1) if own and context.dim() > 2 else context))


def _likelihood(
    likelihood: str | Callable[[Tensor], Any], event: torch.Size, scale: Scale | None, levels: int | None
) -> Any:
    if isinstance(likelihood, str):
        return named_likelihood(likelihood, event, scale=scale, levels=levels)
    if not callable(likelihood):
        raise ValueError(f"likelihood must be a name or a callable, got {likelihood!r}")
    if scale is not None or levels is not None:
        raise ValueError("scale= and levels= belong to likelihoods given by name")
    return likelihood


def _image(event: torch.Size, name: str) -> None:
    if len(event) != 3:
        raise ValueError(f"{name}='conv' needs event_shape (channels, height, width), got {tuple(event)}")


def _encoder(
    encoder: Network, event: torch.Size, outputs: int, hidden: tuple[int, ...], context_features: int
) -> nn.Module:
    if isinstance(encoder, nn.Module):
        return encoder
    if encoder == "conv":
        _image(event, "encoder")
        return ConvEncoder(event, outputs, context_features=context_features)
    if encoder not in (None, "mlp"):
        raise ValueError(f"encoder must be a module, 'mlp', 'conv' or None, got {encoder!r}")
    mlp = MLP(event.numel(), outputs, hidden, context_features=context_features)
    return mlp if len(event) == 1 else Flat(mlp, len(event))


def _decoder(
    decoder: Network,
    latent_dim: int,
    event: torch.Size,
    maps: int | None,
    hidden: tuple[int, ...],
    context_features: int,
) -> nn.Module:
    if isinstance(decoder, nn.Module):
        return decoder
    if maps is None:
        raise ValueError("a likelihood given as a callable needs a decoder= that gives what it takes")
    if decoder == "conv":
        _image(event, "decoder")
        return ConvDecoder(latent_dim, event, maps, context_features=context_features)
    if decoder not in (None, "mlp"):
        raise ValueError(f"decoder must be a module, 'mlp', 'conv' or None, got {decoder!r}")
    return MLP(latent_dim, maps * event.numel(), tuple(reversed(hidden)), context_features=context_features)


class Flat(nn.Module):
    """A network of vectors, given events of any shape."""

    def __init__(self, network: nn.Module, event_dim: int) -> None:
        super().__init__()
        self.network, self.event_dim = network, event_dim

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.network(x.flatten(-self.event_dim), context))
