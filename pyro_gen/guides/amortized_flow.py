r"""A guide for any Pyro program, amortised over rows: a conditional flow inside the data plate, another flow outside.

A program with latents :math:`g` of all rows and :math:`z_n` of row n has the posterior
:math:`p(g \mid x_{1:N}) \prod_n p(z_n \mid g, x_n)`. The guide has that shape,

.. math:: q(g) \prod_n q(z_n \mid g, x_n), \qquad
          z_n = T(u_n), \quad u_n = \mu_n + \sigma_n \odot f^{-1}(\epsilon_n; h_n), \quad
          (\mu_n, \log\sigma_n, h_n) = \mathrm{net}(x_n, g),

so a batch of rows has the same weights as all of them, and new rows have a posterior at once. All latents of a row are
one vector u of unconstrained numbers, so what depends on each other in the posterior can do so in the guide; T takes
each to the support of its site. The density of the values is that of u over the Jacobian of T,

.. math:: \log q(z_n) = \log q(u_n) - \log|\det \partial T / \partial u| .

In a trace, u is an auxiliary site inside the data plate, one density a row, and each latent a ``Delta`` at its value
whose ``log_density`` is minus its share of the Jacobian, as in Pyro's autoguides. There, though, u is one vector for
all rows outside of every plate: such a guide grows with the data, and mini-batches or a bound row by row have no
meaning for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn

from pyro_gen.base import Program, announce
from pyro_gen.checks import check_count, check_sizes, describe
from pyro_gen.guides.conditional import ConditionalFlow, quiet_start
from pyro_gen.guides.latents import Latent, Layout, read_layout
from pyro_gen.nn import MLP
from pyro_gen.transforms.stacks import TransformName, check_transform

__all__ = ["AmortizedFlow"]


class AmortizedFlow(nn.Module):
    r"""Guide of any Pyro program: for each row a flow given the row, for latents of all rows a flow of their own.

    .. math:: q(g) \prod_n q(z_n \mid g, x_n)

    Its parameters are made at the first call, as those of Pyro's autoguides: ``pg.fit`` and the first call of an
    objective see to that; before an optimizer of your own, call it once with a batch. A copy of a guide, its
    ``state_dict`` and ``.to()`` are those of any module.

    Args:
        model: the Pyro program, called as ``model(*batch)``. Its structure must be static: the same latents, on the
            same supports, in every run.
        transform: of both flows, a name as of `Flow`; ``"linear"`` gives a normal for comparison.
        layers, hidden: number of layers, and sizes of the hidden layers of every network.
        embedding: what the guide reads of a batch: a callable, ``embedding(*batch)`` of shape ``(rows, features)``; a
            module is trained along. None for the first tensor and all further floating point or boolean tensors of as
            many rows, flattened, as they are (labels and missing values want an embedding, and so do data far from
            unit scale).
        context_features: how many numbers of a row the layers of its flow see; the last of ``hidden`` unless given.
        init_scale: scale of the guide to begin with, in unconstrained space, around the prior's median.
        bins: of splines.

    Raises:
        TypeError, ValueError: at once for wrong arguments; at the first call for latents that are discrete, or that
            lie on a support of their own in each row.

    References:
        D. P. Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016, arXiv:1606.04934,
        eqs. 8-10; A. Kucukelbir et al., "Automatic differentiation variational inference", 2017, arXiv:1603.00788,
        eq. 5.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), x.new_tensor(1.0)))
        ...         pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> guide = AmortizedFlow(model, hidden=(8,))
        >>> guide(torch.tensor([0.0, 3.0, 1.0]))["rate"].shape
        torch.Size([3])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        transform: TransformName = "spline_autoregressive",
        layers: int = 2,
        hidden: Sequence[int] = (64, 64),
        *,
        embedding: Callable[..., Tensor] | None = None,
        context_features: int | None = None,
        init_scale: float = 0.5,
        bins: int = 8,
    ) -> None:
        super().__init__()
        if isinstance(model, Program):
            raise TypeError(f"model is a Pyro callable; of a program pass program.model, not {describe(model)}")
        if not callable(model):
            raise TypeError(f"model must be a callable Pyro program, got {describe(model)}")
        if not (embedding is None or callable(embedding)):
            raise TypeError(f"embedding must be a callable that gives (rows, features), got {describe(embedding)}")
        if isinstance(init_scale, bool) or not isinstance(init_scale, (int, float)) or not init_scale > 0:
            raise ValueError(f"init_scale must be a positive number, got {describe(init_scale)}")
        check_transform(transform)
        self.hidden = check_sizes(hidden)
        if context_features is None:
            context_features = self.hidden[-1] if self.hidden else 8
        self.options: dict[str, Any] = {
            "transform": transform,
            "layers": check_count(layers, "layers"),
            "hidden": self.hidden,
            "bins": check_count(bins, "bins"),
        }
        self.context_features = check_count(context_features, "context_features")
        self.init_scale = float(init_scale)
        self.embedding: Any = embedding  # a module registers itself
        self._model = (model,)  # in a tuple, so that it is no submodule
        self._layouts: dict[int, Layout] = {}  # by number of rows
        self._reads: tuple[tuple[int | str, int], ...] = ()  # which tensors of a batch, of how many numbers a row
        self.shared: ConditionalFlow | None = None
        self.rows: ConditionalFlow | None = None
        self.network: MLP | None = None

    # ------------------------------------------------------------------------------------------------------ the guide
    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent: ``{name: value}``, as sites of the guide."""
        layout = self._layout(batch, kwargs)
        announce("AmortizedFlow", self)  # to SVI with a loss of Pyro's own
        around = {plate.name: plate for latent in (*layout.shared, *layout.local) for plate in latent.plates}
        plates = {name: plate.make() for name, plate in around.items()}
        values: dict[str, Tensor] = {}
        drawn: Tensor | None = None
        if self.shared is not None:
            drawn = pyro.sample("_flow_shared", self.shared(self.raw_shared), infer={"is_auxiliary": True})
            for latent, part in layout.split(drawn, layout.shared, None):
                values[latent.name] = _sample(latent, part, plates)
        if self.rows is not None:
            assert layout.plate is not None
            plate = plates[layout.plate.name]
            features = self._features(batch, kwargs, layout)
            if layout.subsamples:  # the model takes these rows: it is replayed on the index drawn here
                features = features[plate.indices]
            with plate:
                q = self.rows(self._raw(features, drawn, layout.plate.dim))
                u = pyro.sample("_flow_rows", q, infer={"is_auxiliary": True})
            for latent, part in layout.split(u, layout.local, layout.plate.dim):
                values[latent.name] = _sample(latent, part, plates)
        return values

    def _raw(self, features: Tensor, drawn: Tensor | None, dim: int) -> Tensor:
        """What the network says of each row: of batch shape ``(..., rows, 1, ...)``, rows at ``dim``."""
        assert self.network is not None
        features = features.reshape(features.shape[0], *(1,) * (-dim - 1), features.shape[-1])
        if drawn is None:
            return self.network(features)  # type: ignore[no-any-return]
        batch = torch.broadcast_shapes(features.shape[:-1], drawn.shape[:-1])
        return self.network(features.expand(*batch, -1), drawn)  # type: ignore[no-any-return]

    def _features(self, batch: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout) -> Tensor:
        """What is read of each row: ``(rows, features)``."""
        like = next(iter(self.network.parameters())) if self.network is not None else torch.empty(0)
        if self.embedding is not None:
            found = self.embedding(*batch, **kwargs)
            if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[0] != layout.rows:
                given = tuple(found.shape) if isinstance(found, Tensor) else describe(found)
                raise ValueError(f"embedding must give a tensor of shape ({layout.rows}, features), got {given}")
            return found
        parts = []
        for key, size in self._reads or _readable(batch, kwargs, layout.rows):
            part = _entry(batch, kwargs, key)
            if not isinstance(part, Tensor) or not part.dim() or part.shape[0] != layout.rows:
                given = tuple(part.shape) if isinstance(part, Tensor) else describe(part)
                raise ValueError(
                    f"argument {key!r} of the batch had one entry a row when the guide was made, and now is {given} "
                    f"beside {layout.rows} rows: pass what belongs to the rows, or give the guide an embedding="
                )
            if part[0].numel() != size:
                raise ValueError(
                    f"argument {key!r} of the batch has {part[0].numel()} numbers a row, and had {size} when the "
                    "guide was made"
                )
            parts.append(part.reshape(layout.rows, -1).to(like.dtype))
        return torch.cat(parts, -1)

    # ------------------------------------------------------------------------------------------------- the first call
    def _layout(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
        """Where the latents of this batch stand; looked up in a run of the model for each number of rows."""
        rows = _count_rows(batch, kwargs)
        if rows not in self._layouts:
            layout = read_layout(self._model[0], batch, kwargs, rows)
            if self._layouts:
                layout.require_same(next(iter(self._layouts.values())))
            else:
                self._build(layout, batch, kwargs)
            self._layouts[rows] = layout
        return self._layouts[rows]

    def _build(self, layout: Layout, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad(), poutine.block():
            shared = sum(latent.size for latent in layout.shared)
            local = sum(latent.size for latent in layout.local)
            like = layout.like
            log_scale = torch.tensor(self.init_scale).log().item()
            if shared:
                flow = ConditionalFlow(shared, context_features=0, **self._fitting(shared))
                raw = torch.cat([latent.start for latent in layout.shared]).to(like)
                self.shared = flow.to(like)
                self.raw_shared = nn.Parameter(torch.cat([raw, torch.full_like(raw, log_scale)]))
            if local:
                if self.embedding is None:
                    self._reads = _readable(batch, kwargs, layout.rows)
                features = self._features(batch, kwargs, layout).shape[-1]
                self.rows = ConditionalFlow(local, context_features=self.context_features, **self._fitting(local))
                self.rows = self.rows.to(like)
                network = MLP(features, self.rows.outputs, self.hidden, context_features=shared)
                head: Any = network.layers[-1]
                quiet_start(head, local, torch.cat([latent.start for latent in layout.local]), log_scale)
                self.network = network.to(like)

    def _fitting(self, features: int) -> dict[str, Any]:
        """The options of a stack; of a single feature no half can be mapped given the other."""
        transform = self.options["transform"]
        if features == 1 and transform.endswith("coupling"):
            return {**self.options, "transform": transform.replace("coupling", "autoregressive")}
        return self.options

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


def _sample(latent: Latent, u: Tensor, plates: dict[str, Any]) -> Tensor:
    """The site of a latent at the image of u."""
    transform = latent.transform(u)
    value = transform(u)
    ladj = transform.log_abs_det_jacobian(u, value)
    ladj = sum_rightmost(ladj, ladj.dim() - value.dim() + latent.event_dim)
    with ExitStack() as stack:
        for plate in latent.plates:
            stack.enter_context(plates[plate.name])
        fn = dist.Delta(value, log_density=-ladj, event_dim=latent.event_dim)
        result: Tensor = pyro.sample(latent.name, fn)
    return result


def _count_rows(batch: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    for part in (*batch, *kwargs.values()):
        if isinstance(part, Tensor) and part.dim():
            return part.shape[0]
    return 0


def _entry(batch: tuple[Any, ...], kwargs: dict[str, Any], key: int | str) -> Any:
    if isinstance(key, int):
        return batch[key] if key < len(batch) else None
    return kwargs.get(key)


def _readable(batch: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> tuple[tuple[int | str, int], ...]:
    """The tensors of a batch that have one entry a row: positions or names, and numbers a row."""
    found: list[tuple[int | str, int]] = []
    items: list[tuple[int | str, Any]] = [*enumerate(batch), *kwargs.items()]
    for key, part in items:
        if not isinstance(part, Tensor) or not part.dim() or part.shape[0] != rows:
            continue
        if not found or part.dtype.is_floating_point or part.dtype == torch.bool:
            found.append((key, part[0].numel()))
    return tuple(found)
