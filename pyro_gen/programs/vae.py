r"""The variational autoencoder: Z is bounded from below.

.. math:: z \sim p(z), \qquad x \mid z \sim p_\theta(x \mid z), \qquad p_\theta(x) = \int p(z) p_\theta(x \mid z)\, dz .

With a network for the decoder the integral has no closed form, and neither has the posterior :math:`p(z \mid x)`. The
guide :math:`q_\phi(z \mid x)`, a second network amortised over all rows, stands in for it:

.. math:: \log p_\theta(x) = \underbrace{E_q[\log p_\theta(x \mid z)] - KL[q_\phi(z \mid x) \,\|\, p(z)]}_{\text{ELBO}}
          + KL[q_\phi(z \mid x) \,\|\, p_\theta(z \mid x)] .

The second term is not negative, so the first bounds the evidence; maximised over both networks it fits the model and
closes the gap at once. Sampling is ancestral: z from the prior, x from the decoder. A linear decoder with Gaussian
noise is probabilistic PCA, and there the bound can be tight (Tipping & Bishop 1999).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_gen.base import Bounded, event_names
from pyro_gen.checks import as_shape, check_count, describe
from pyro_gen.distributions.bases import base_of
from pyro_gen.distributions.likelihoods import Likelihood, Scale
from pyro_gen.distributions.likelihoods import likelihood as named_likelihood
from pyro_gen.nn import MLP, ConvDecoder, ConvEncoder

__all__ = ["VAE"]

_LATENT: Any = {"event_dims": ["latent"]}  # what ArviZ calls the dimension of z
Network = nn.Module | Literal["mlp", "conv"] | None


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


class Encoder(nn.Module):
    """The guide: q(z | x) from one pass of the encoder over x."""

    index: Tensor

    def __init__(
        self, network: nn.Module, latent_dim: int, full_rank: bool, centre: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        self.network, self.latent_dim, self.full_rank = network, latent_dim, full_rank
        self.own_network = centre is not None
        self.__dict__["centre"] = centre
        if full_rank:  # where each entry of the Cholesky factor stands among the network's outputs; the last is a zero
            d = latent_dim
            index = torch.full((d, d), d * (d + 1) // 2)
            index[tuple(torch.tril_indices(d, d))] = torch.arange(d * (d + 1) // 2)
            self.register_buffer("index", index, persistent=False)

    @property
    def outputs(self) -> int:
        """Numbers the network gives a row."""
        d = self.latent_dim
        return d + d * (d + 1) // 2 if self.full_rank else 2 * d

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with pyro.plate("data", x.shape[0]):
            return pyro.sample("z", self.posterior(x, context), infer=_LATENT)

    def posterior(self, x: Tensor, context: Tensor | None = None) -> Any:
        """q(z | x), of batch shape ``(rows,)`` and event shape ``(latent_dim,)``."""
        if self.own_network:
            x = self.__dict__["centre"](x)
        raw = _call(self.network, x, context, self.own_network)
        if raw.shape[-1] != self.outputs:
            raise ValueError(
                f"encoder must give {self.outputs} numbers a row for guide="
                f"{'full_rank' if self.full_rank else 'diagonal'!r} and latent_dim={self.latent_dim} (location, then "
                f"{'the lower triangle' if self.full_rank else 'log scale'}); got shape {tuple(raw.shape)}"
            )
        if not self.full_rank:
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
        prior: p(z): None for N(0, I), ``"mixture"`` for a learnt mixture of ``components`` Gaussians, any Pyro
            distribution of event shape ``(latent_dim,)``, or a module whose ``forward()`` gives one.
        guide: q(z | x): ``"diagonal"`` or ``"full_rank"`` normal.
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
        prior: nn.Module | Distribution | Literal["mixture"] | None = None,
        guide: Literal["diagonal", "full_rank"] = "diagonal",
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
        if not isinstance(hidden, Sequence) or isinstance(hidden, str):
            raise ValueError(f"hidden must be a sequence of sizes such as (128, 128), got {describe(hidden)}")
        hidden = tuple(check_count(h, "hidden") for h in hidden)
        if guide not in ("diagonal", "full_rank"):
            raise ValueError(f"guide must be 'diagonal' or 'full_rank', got {guide!r}")
        observe = _likelihood(likelihood, event, scale, levels)
        maps = observe.maps if isinstance(observe, Likelihood) else None
        centre = observe.centre if isinstance(observe, Likelihood) else _identity

        own_encoder = not isinstance(encoder, nn.Module)
        inference = Encoder(nn.Identity(), check_dim, guide == "full_rank", centre if own_encoder else None)
        inference.network = _encoder(encoder, event, inference.outputs, hidden, context_features)
        own_decoder = not isinstance(decoder, nn.Module)
        network = _decoder(decoder, latent_dim, event, maps, hidden, context_features)
        generator = Decoder(
            base_of("normal" if prior is None else prior, latent_dim, components=components, name="prior"),
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
        """q(z | x): a distribution of batch shape ``(rows,)`` and event shape ``(latent_dim,)``."""
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
        """Mean of p(x | z) at the guide's mean of z: ``(rows, *event_shape)``."""
        return cast(Tensor, self.decode(self.encode(x, context).mean, context).mean)


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
