r"""Continuous flows: a point carried by a vector field, with the divergence it meets added up.

.. math:: \frac{dz}{dt} = f(z, t, c), \quad z(0) = x, \quad y = z(1), \qquad
          \log|\det \partial y/\partial x| = \int_0^1 \operatorname{tr} \frac{\partial f}{\partial z}\, dt.

The second equation is the instantaneous change of variables: over a step dt the Jacobian is
:math:`I + dt\, \partial f/\partial z`, and :math:`\log\det(I + dt\, J) = dt \operatorname{tr} J + O(dt^2)`. Nothing is
asked of f but to be smooth, so that solutions do not cross; the inverse is the same equation run from 1 to 0. Value and
log-determinant are one state, :math:`(z, \ell)`, of one solve.

The trace of a D × D Jacobian costs D products of J with a vector: exact, and for small D cheap. Above, Hutchinson's
estimate :math:`\varepsilon^\top J \varepsilon` with :math:`\mathbb{E}\,\varepsilon \varepsilon^\top = I` takes a single
one. The noise is drawn once a solve: the solver sees a smooth right hand side, and :math:`\ell` is unbiased as z does
not depend on the noise. Its exponential is not: a density is then an estimate, and ``stochastic`` says so.

The field is a network of tanh layers, :math:`h_k = \tanh(W_k h_{k-1} + U_k (t, c) + b_k)`. Products of its Jacobian
with vectors are carried forward beside it, :math:`v_k = (1 - h_k^2) \odot W_k v_{k-1}`, by plain tensor operations:
they can be differentiated any number of times, and by the adjoint method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pyro_gen.checks import check_count, describe
from pyro_gen.transforms.bijections import Bijection

__all__ = ["ContinuousFlow"]

EXACT_UP_TO = 16  #: features, for which trace="auto" is exact
START = 0.1  # the last layer's weights start this much smaller: near the identity, yet every weight has a gradient

Trace = Literal["auto", "exact", "hutchinson"]
Noise = Literal["rademacher", "normal"]
Solver = Literal["dopri5", "dopri8", "bosh3", "adaptive_heun", "rk4"]
Field = Callable[[Tensor | float, Tensor], Tensor]


class ContinuousFlow(Bijection):
    r"""Continuous normalising flow (FFJORD), the flow of a vector field from time 0 to time 1.

    .. math:: \frac{dz}{dt} = f(z, t, c), \qquad \frac{d\ell}{dt} = \operatorname{tr} \frac{\partial f}{\partial z}

    The adaptive solvers of torchdiffeq choose their steps so that the row with the largest error keeps the tolerance;
    rows of a batch therefore share their steps and a row's result depends on the others, within the tolerance. Their
    steps depend on values, so ``torch.func`` transforms and tracing need ``solver="rk4"``, which takes ``steps`` equal
    steps and has no error control.

    Args:
        features: size D of the vectors.
        hidden: sizes of the hidden layers of the field's network; ``()`` is a linear field.
        context_features: size C of the context, 0 for none.
        trace: ``"exact"``, ``"hutchinson"`` or ``"auto"``: exact for D ≤ 16.
        noise: of Hutchinson's estimate; ``"rademacher"`` (±1) has the smaller variance.
        probes: how many noise vectors a row its estimate is the mean of.
        solver: ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"adaptive_heun"``, or ``"rk4"``.
        rtol: relative tolerance of the adaptive solvers.
        atol: absolute tolerance, in units of the data and in nats.
        steps: number of steps of ``"rk4"``.
        adjoint: gradients by a second equation run backwards instead of through the solver's steps: memory does not
            grow with the steps, first derivatives only, within the tolerance.

    Attributes:
        stochastic: whether the log-determinant is Hutchinson's estimate, random and unbiased.

    References:
        R. T. Q. Chen et al., "Neural ordinary differential equations", 2018, arXiv:1806.07366, eq. 8; W. Grathwohl et
        al., "FFJORD: Free-form continuous dynamics for scalable reversible generative models", 2019, arXiv:1810.01367,
        eqs. 4, 7 and 8.

    Example:
        >>> from pyro_gen.transforms import ContinuousFlow
        >>> flow = ContinuousFlow(2, (16,)).double()
        >>> x = torch.randn(5, 2, dtype=torch.double)
        >>> y, ladj = flow(x)
        >>> torch.allclose(flow.inverse(y)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        context_features: int = 0,
        *,
        trace: Trace = "auto",
        noise: Noise = "rademacher",
        probes: int = 1,
        solver: Solver = "dopri5",
        rtol: float = 1e-6,
        atol: float = 1e-6,
        steps: int = 20,
        adjoint: bool = False,
    ) -> None:
        super().__init__(features, context_features)
        for value, name, kind in ((trace, "trace", Trace), (noise, "noise", Noise), (solver, "solver", Solver)):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(kind)))}, got {describe(value)}")
        for tolerance, name in ((rtol, "rtol"), (atol, "atol")):
            if not tolerance > 0:
                raise ValueError(f"{name} must be positive, got {describe(tolerance)}")
        if adjoint and solver == "rk4":
            raise ValueError("adjoint needs a solver that controls its error: pass solver='dopri5', or adjoint=False")
        sizes = [features, *(check_count(size, "hidden") for size in hidden), features]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.conditions = nn.ModuleList(nn.Linear(1 + self.context_features, b, bias=False) for b in sizes[1:])
        with torch.no_grad():
            for parameter in (*self.layers[-1].parameters(), *self.conditions[-1].parameters()):
                parameter.mul_(START)
        self.trace: Trace = trace
        self.noise: Noise = noise
        self.probes = check_count(probes, "probes")
        self.solver: Solver = solver
        self.rtol, self.atol, self.steps, self.adjoint = rtol, atol, check_count(steps, "steps"), adjoint
        self.stochastic = trace == "hutchinson" or (trace == "auto" and features > EXACT_UP_TO)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and log|det dy/dx|, an unbiased estimate of it if ``stochastic``.

        Raises:
            ArithmeticError: if the solver cannot keep its tolerance.
        """
        return self._solve(x, context, (0.0, 1.0))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and log|det dx/dy|, likewise, with noise of its own."""
        return self._solve(y, context, (1.0, 0.0))

    def draw(self, z: Tensor) -> Tensor:
        """Noise of Hutchinson's estimate for points ``(..., D)``: ``(probes, ..., D)``, of mean 0 and covariance I."""
        shape = (self.probes, *z.shape)
        normal = torch.normal(z.new_zeros(shape), z.new_ones(shape))
        return normal.sign() if self.noise == "rademacher" else normal

    def _solve(self, z: Tensor, context: Tensor | None, times: tuple[float, float]) -> tuple[Tensor, Tensor]:
        z, context = self.broadcast(z, context)
        field, weights = self._field(z, context)
        z = z.to(weights[0].dtype)
        state = torch.cat([z, torch.zeros_like(z[..., :1])], -1)
        if self.solver == "rk4":
            state = self._fixed(field, state, times)
        else:
            state = self._adaptive(field, weights, state, times)
        return state[..., :-1], state[..., -1]

    def _field(self, z: Tensor, context: Tensor | None) -> tuple[Field, list[Tensor]]:
        """d(z, ℓ)/dt as a function of t and (z, ℓ), and all tensors with a gradient in it.

        The weights are read here, once, and held: backward runs the field again under the adjoint method, when
        ``functional_call`` has put others in the module.
        """
        weights, offsets, drifts = [], [], []
        for layer, condition in zip(_linears(self.layers), _linears(self.conditions), strict=True):
            weights.append(layer.weight)
            drifts.append(condition.weight[:, 0])
            offsets.append(layer.bias if context is None else layer.bias + context @ condition.weight[:, 1:].mT)
        dtype = torch.promote_types(z.dtype, weights[0].dtype)
        weights, offsets, drifts = ([t.to(dtype) for t in held] for held in (weights, offsets, drifts))
        if self.stochastic:
            probes = self.draw(z.to(dtype))
            scale = 1 / self.probes
        else:
            eye = torch.eye(self.features, dtype=dtype, device=z.device)
            probes, scale = eye.reshape(self.features, *[1] * (z.dim() - 1), self.features), 1.0

        def field(t: Tensor | float, state: Tensor) -> Tensor:
            h, v = state[..., :-1], probes
            for weight, offset, drift in zip(weights[:-1], offsets[:-1], drifts[:-1], strict=True):
                h = torch.tanh(h @ weight.mT + (offset + t * drift))
                v = (v @ weight.mT) * (1 - h * h)
            rate = h @ weights[-1].mT + (offsets[-1] + t * drifts[-1])
            divergence = scale * ((probes @ weights[-1]) * v).sum((0, -1))
            return torch.cat([rate, divergence.expand(rate.shape[:-1]).unsqueeze(-1)], -1)

        return field, [*weights, *offsets, *drifts]

    def _adaptive(self, field: Field, weights: list[Tensor], state: Tensor, times: tuple[float, float]) -> Tensor:
        import torchdiffeq  # brings scipy.integrate along, which few need

        start, end = state.new_tensor(times)
        options = {"norm": _worst_row, "step_t": end.reshape(1)}  # a step ends at the end: nothing is interpolated
        tolerances = {"rtol": self.rtol, "atol": self.atol, "method": self.solver}
        try:
            if self.adjoint:
                solution = torchdiffeq.odeint_adjoint(
                    field,
                    state,
                    torch.stack([start, end]),
                    options=options,
                    adjoint_options={"step_t": start.reshape(1)},
                    adjoint_params=[weight for weight in weights if weight.requires_grad],
                    **tolerances,
                )
            else:
                solution = torchdiffeq.odeint(field, state, torch.stack([start, end]), options=options, **tolerances)
        except AssertionError as error:  # the way torchdiffeq has of saying that its step became 0
            raise ArithmeticError(
                f"{self.solver} cannot keep rtol={self.rtol} and atol={self.atol} in {state.dtype} ({error}): the "
                "input or the weights are not finite, or the field is too steep; check them, allow larger tolerances "
                "or use float64"
            ) from error
        result: Tensor = solution[-1]
        return result

    def _fixed(self, field: Field, state: Tensor, times: tuple[float, float]) -> Tensor:
        """The classical Runge-Kutta method. (torchdiffeq's writes into a tensor made beforehand, and reads values to
        place its steps, which vmap and make_fx refuse.)"""
        step = (times[1] - times[0]) / self.steps
        for i in range(self.steps):
            first, middle, last = (times[0] + (i + part) * step for part in (0.0, 0.5, 1.0))
            a = field(first, state)
            b = field(middle, state + step / 2 * a)
            c = field(middle, state + step / 2 * b)
            d = field(last, state + step * c)
            state = state + step / 6 * (a + 2 * b + 2 * c + d)
        return state


def _linears(modules: nn.ModuleList) -> list[nn.Linear]:
    return [module for module in modules if isinstance(module, nn.Linear)]


def _worst_row(error: Tensor) -> Tensor:
    """Root mean square of a row's error in z, or its error in ℓ, of the row where it is largest.

    A mean over rows would let single rows of a large batch be off by far more than the tolerance.
    """
    error = error.detach()
    return torch.maximum(error[..., :-1].square().mean(-1).sqrt(), error[..., -1].abs()).max()
