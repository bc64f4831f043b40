r"""Neural transport: sample a posterior where a flow has made it simple.

A guide :math:`\theta = T(z)`, :math:`z \sim N(0, I)`, fitted to a posterior, is a map under which the posterior looks
like the guide's noise. A sampler in z has the density

.. math:: \log \tilde\pi(z) = \log p(x, T(z)) + \log|\det \partial T / \partial z| ,

which is N(0, I) where T is exact; where it is not, the draws :math:`T(z)` are still those of the posterior, for this is
a change of variables and no approximation: the guide decides how well the chain mixes, never what it converges to.
Funnels and other geometries that no step size suits become ones that any does.

Pyro has the reparameterization (``NeuTraReparam``) and the guide (``AutoNormalizingFlow``); both ask for a transform in
the sense of ``torch.distributions``. `TorchTransform` makes one of a bijection. Such a transform is asked for a value
and then for the log-determinant at it, in two calls; the second is answered from the first while it is still true: for
the same two tensors, neither written to since, by weights that are the same tensors and as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions.torch_transform import TransformModule
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor
from torch.distributions import biject_to

from pyro_gen.base import Program, announce
from pyro_gen.checks import check_count, check_sizes, describe
from pyro_gen.transforms.bijections import Bijection, Inverse
from pyro_gen.transforms.stacks import TransformName, check_transform, stack

__all__ = ["NeuTra", "TorchTransform"]


class TorchTransform(TransformModule):  # type: ignore[misc, unused-ignore]
    r"""A bijection as a transform of ``torch.distributions``: for ``TransformedDistribution`` and Pyro's guides.

    .. math:: \text{transform}(x) = f(x), \qquad \text{transform.log\_abs\_det\_jacobian}(x, y) = \log|\det \partial f /
              \partial x|

    Args:
        bijection: f, without a context; `Inverse` of one that maps data to noise maps noise to data.

    References:
        M. Hoffman et al., "NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport", 2019,
        arXiv:1903.03704, eq. 5.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> from pyro_gen.transforms import ActNorm
        >>> d = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), TorchTransform(ActNorm(2)))
        >>> d.event_shape, d.log_prob(d.rsample((3,))).shape
        (torch.Size([2]), torch.Size([3]))
    """

    bijective = True

    def __init__(self, bijection: Bijection) -> None:
        if not isinstance(bijection, Bijection):
            raise TypeError(f"bijection must be a Bijection, got {describe(bijection)}")
        if bijection.context_features:
            raise ValueError(
                f"bijection takes a context of {bijection.context_features} numbers, and a transform is given none: "
                "build it with context_features=0"
            )
        super().__init__()  # type: ignore[no-untyped-call]
        self.bijection = bijection
        self._pair: tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, int]]] | None = None

    @property
    def domain(self) -> Any:  # type: ignore[override]
        return self.bijection.domain

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        return self.bijection.codomain

    def forward_shape(self, shape: Any) -> Any:
        return torch.Size((*shape[:-1], self.bijection.out_features))

    def inverse_shape(self, shape: Any) -> Any:
        return torch.Size((*shape[:-1], self.bijection.features))

    def with_cache(self, cache_size: int = 1) -> TorchTransform:
        return self  # it remembers one pair as it is

    def _call(self, x: Tensor) -> Tensor:
        y, ladj = self.bijection(x)
        self._remember(x, y, ladj)
        return cast(Tensor, y)

    def _inverse(self, y: Tensor) -> Tensor:
        if self._pair is not None and self._pair[1] is y and self._holds():
            return self._pair[0]
        x, ladj = self.bijection.inverse(y)
        self._remember(x, y, -ladj)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self._pair is not None and self._pair[0] is x and self._pair[1] is y and self._holds():
            return self._pair[2]
        return cast(Tensor, self.bijection(x)[1])

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor) -> None:
        held = [x, y, *self.bijection.parameters(), *self.bijection.buffers()]
        self._pair = x, y, ladj, [(t, _version(t)) for t in held]

    def _holds(self) -> bool:
        """Whether what is remembered would come out again: of the same tensors, unchanged, with a gradient if due."""
        assert self._pair is not None
        x, y, ladj, held = self._pair
        now = [x, y, *self.bijection.parameters(), *self.bijection.buffers()]
        same = len(now) == len(held) and all(
            t is kept and _version(t) == version for t, (kept, version) in zip(now, held, strict=True)
        )
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in now)
        return same and (ladj.requires_grad or not wanted)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pair": None, "_inv": None}  # tensors of a graph are neither copied nor saved


class NeuTra(AutoNormalizingFlow):  # type: ignore[misc, unused-ignore]
    r"""A flow over all latents of a program as one vector, and the program in the flow's coordinates.

    .. math:: \theta = T(z), \quad z \sim N(0, I); \qquad \log \tilde\pi(z) = \log p(x, T(z)) + \log|\det \partial T /
              \partial z|

    It is one of Pyro's autoguides: fit it by ``SVI`` or ``pg.fit``, then sample ``guide.reparam(model)`` by NUTS. The
    draws are of z; ``guide.transport(z)`` takes them to the latents. For programs whose latents belong to all rows
    together; the latents of single rows are for `AmortizedFlow`.

    Args:
        model: the Pyro program, of static structure and continuous latents.
        transform: a name as of `Flow`, built so that noise to latents is one pass.
        layers, hidden: number of layers and sizes of the hidden layers of each layer's network.
        bins: of splines.

    References:
        M. Hoffman et al., "NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport", 2019,
        arXiv:1903.03704, algorithm 1 and eq. 5.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def funnel():
        ...     v = pyro.sample("v", dist.Normal(0.0, 3.0))
        ...     pyro.sample("x", dist.Normal(torch.zeros(2), (v / 2).exp()).to_event(1))
        >>> guide = NeuTra(funnel, hidden=(16,))
        >>> sorted(guide())
        ['v', 'x']
    """

    def __init__(
        self,
        model: Callable[..., Any],
        transform: TransformName = "affine_autoregressive",
        layers: int = 2,
        hidden: Sequence[int] = (64, 64),
        *,
        bins: int = 8,
    ) -> None:
        if isinstance(model, Program) or not callable(model):
            raise TypeError(f"model must be a Pyro callable (of a program, program.model), got {describe(model)}")
        name = check_transform(transform)
        options: dict[str, Any] = {
            "layers": check_count(layers, "layers"),
            "hidden": check_sizes(hidden),
            "bins": check_count(bins, "bins"),
        }
        super().__init__(model, partial(_from_noise, name, options))  # type: ignore[no-untyped-call]

    # Pyro's own reads `self.transform`, which states its parameters to the global store, or under module_local_params
    # in a form that SVI cannot read. Here they are stated as those of every module of the package.
    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The guide's distribution of all latents as one unconstrained vector."""
        if self._modules.get("transform") is None:
            first = next(site["value"] for _, site in self._latents())
            self.transform = self._init_transform_fn(self.latent_dim).to(first)
        announce("NeuTra", self.get_transform())
        return dist.TransformedDistribution(self.get_base_dist(), [self.get_transform()])

    def get_base_dist(self) -> Any:
        """N(0, I), of the flow's dtype and device."""
        like = next(self.get_transform().parameters())
        zero = like.detach().new_zeros(self.latent_dim)
        return dist.Normal(zero, torch.ones_like(zero)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> TorchTransform:
        """T, from noise to the unconstrained latents."""
        flow = self._modules.get("transform")
        if flow is None:
            raise ValueError("the guide has not been fitted: fit it to the model before you sample along it")
        return cast(TorchTransform, flow)

    def _latents(self) -> list[tuple[str, Any]]:
        trace: Any = self.prototype_trace
        return list(trace.iter_stochastic_nodes())

    def reparam(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The program with z in place of its latents, for any sampler; the fitted flow is part of it."""
        self.get_transform()  # says so where there is none
        result: Callable[..., Any] = NeuTraReparam(self).reparam(model)
        return result

    @torch.no_grad()
    def transport(self, z: Tensor) -> dict[str, Tensor]:
        """Latents of the program from draws of z, ``(..., D)``: ``{name: (..., *shape)}``.

        Args:
            z: the one site of the chain, ``next(iter(mcmc.get_samples().values()))``.
        """
        flow = self.get_transform()
        if not isinstance(z, Tensor) or z.shape[-1:] != (self.latent_dim,):
            given = tuple(z.shape) if isinstance(z, Tensor) else describe(z)
            raise ValueError(f"z must be a tensor of shape (..., {self.latent_dim}), got {given}")
        u, values, position = flow(z), {}, 0
        for name, site in self._latents():
            shape = self._unconstrained_shapes[name]
            part = u[..., position : position + shape.numel()].reshape(*z.shape[:-1], *shape)
            values[name] = biject_to(site["fn"].support)(part)
            position += shape.numel()
        return values


def _from_noise(name: str, options: dict[str, Any], features: int) -> TorchTransform:
    if features == 1:  # which has no half to map given the other
        name = name.replace("coupling", "autoregressive")
    return TorchTransform(Inverse(stack(name, features, direction="sampling", **options)))


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version
