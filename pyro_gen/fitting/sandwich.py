r"""Standard errors of any estimate that minimises a sum over rows: the sandwich, :math:`A^{-1} B A^{-1} / N`.

An estimate that minimises :math:`\frac1N \sum_n \rho(x_n, \theta)` has, expanded to first order at the minimum θ* of
the expectation,

.. math:: \hat\theta - \theta^* \approx -A^{-1} \frac1N \sum_n \nabla \rho(x_n, \theta^*), \qquad
          A = E[\nabla^2 \rho], \quad B = \mathrm{Var}[\nabla \rho],

so that :math:`N \mathrm{Cov}(\hat\theta) \to A^{-1} B A^{-1}` (Huber 1967; Godambe 1960). For a log-likelihood of the
right model A = B, and it is the inverse Fisher information. For score matching, whose loss has the unit 1/x², A and B
differ, and :math:`A^{-1}` alone would be no covariance at all; for a wrong model the sandwich still holds, about θ*.

A and B are means over rows at the estimate. Parameters with a constraint are taken as they are optimised,
unconstrained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import ObjectiveModule
from pyro_gen.checks import describe

__all__ = ["StandardErrors", "sandwich"]

LIMIT = 2000  # parameters: A and B have the square of it, at 8 bytes 32 MB each
CHUNK = 128  # rows differentiated at once; the work grows with it, as each row's gradient takes a pass over all


@dataclass(frozen=True, repr=False)
class StandardErrors:
    """Covariance of an estimate, and its standard errors by parameter.

    Attributes:
        estimate: name to value, each parameter in its shape.
        standard_errors: name to standard error, in the same shape.
        covariance: ``(parameters, parameters)``, float64; parameters flat, in the order of ``names``.
        bread: A, the mean Hessian of a row's loss; meat: B, the covariance of a row's gradient; likewise.
        names: one a row of ``covariance``, as ``"model.weight[0, 2]"``.
        rows: number N of rows.
    """

    estimate: dict[str, Tensor]
    standard_errors: dict[str, Tensor]
    covariance: Tensor
    bread: Tensor
    meat: Tensor
    names: tuple[str, ...]
    rows: int

    def __getitem__(self, name: str) -> Tensor:
        return self.standard_errors[name]

    def interval(self, name: str, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Ends of the normal confidence interval of a parameter, in its shape."""
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {describe(level)}")
        half = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
        middle, error = self.estimate[name].double(), self.standard_errors[name]
        return middle - half * error, middle + half * error

    def __repr__(self) -> str:
        values = torch.cat([t.reshape(-1).double() for t in self.estimate.values()])
        pairs = list(zip(self.names, values, self.covariance.diagonal().sqrt(), strict=True))
        shown = [f"{name} = {float(v):.4g} ± {float(e):.2g}" for name, v, e in pairs[:6]]
        more = f", … {len(pairs) - 6} more" if len(pairs) > 6 else ""
        return f"StandardErrors({', '.join(shown)}{more}; {self.rows} rows)"


def sandwich(
    module: ObjectiveModule, data: Any, *, parameters: Sequence[str] | None = None, seed: int | None = 0
) -> StandardErrors:
    r"""Covariance of fitted parameters, :math:`A^{-1} B A^{-1} / N`, from the rows' losses; right for wrong models too.

    Args:
        module: a fitted objective whose loss is a sum over rows (it has ``pointwise``), at the minimum for ``data``.
        data: the rows it was fitted to: x, or a tuple ``(x, context)``.
        parameters: names of the parameters to take, the others held fixed; None for all that are trainable.
        seed: of the draws of a loss that has any (sliced score matching); None takes them as they come.

    Returns:
        StandardErrors: estimate, standard errors and covariance by name.

    Raises:
        TypeError: for an objective that is no sum over rows, or whose value means nothing.
        ValueError: for unknown names, too many parameters, a loss that does not determine them, or a point that is no
            minimum.

    References:
        P. J. Huber, "The behavior of maximum likelihood estimates under nonstandard conditions", 1967.
        V. P. Godambe, "An optimum property of regular maximum likelihood estimation", Ann. Math. Stat. 31, 1960.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_gen as pg
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.zeros(()))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 2.0), obs=x)
        >>> sandwich(pg.MaximumLikelihood()(model), torch.tensor([-3.0, 3.0, -1.0, 1.0]))   # √5 / √4
        StandardErrors(loc = 0 ± 1.1; 4 rows)
    """
    if not isinstance(module, ObjectiveModule):
        raise TypeError(
            f"module must be an objective bound to a program, pg.ScoreMatching()(ebm), got {describe(module)}"
        )
    objective = module.objective
    if objective.loss_is in ("game", "gradient only"):
        raise TypeError(
            f"{type(objective).__name__} has a loss that is {objective.loss_is!r}: no sum over rows is least at its "
            "solution, so there are no sandwich errors. Bootstrap the rows instead"
        )
    batch = tuple(data) if isinstance(data, (tuple, list)) else (data,)
    if not all(isinstance(part, Tensor) for part in batch):
        raise TypeError("data must be a tensor, or a tuple of tensors (x, context)")
    if len({len(part) for part in batch}) != 1:
        raise ValueError(f"the parts of data have {', '.join(str(len(part)) for part in batch)} rows: they must agree")
    with scopes.evaluation_mode(module), scopes.preserved_state(module, seed=seed):
        if module.structure is None:
            module.prepare(*batch)
        named = _named(module, parameters)
        names, tensors = _labels(named), list(named.values())
        bread, meat = _bread_and_meat(module, batch, tensors)
    covariance = _invert(bread, meat, names) / len(batch[0])
    sizes = [t.numel() for t in tensors]
    errors = covariance.diagonal().sqrt().split(sizes)
    return StandardErrors(
        estimate={n: t.detach().clone() for n, t in named.items()},
        standard_errors={n: e.reshape(t.shape) for (n, t), e in zip(named.items(), errors, strict=True)},
        covariance=covariance,
        bread=bread,
        meat=meat,
        names=names,
        rows=len(batch[0]),
    )


def _named(module: ObjectiveModule, wanted: Sequence[str] | None) -> dict[str, Tensor]:
    """The trainable parameters by name; those of ``pyro.param`` statements by theirs."""
    named: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad}
    store = {id(p): n for n, p in pyro.get_param_store().named_parameters()}
    for tensor in module.__dict__["store_parameters"]:
        named[store.get(id(tensor), f"pyro.param {len(named)}")] = tensor
    if wanted is not None:
        unknown = [n for n in wanted if n not in named]
        if isinstance(wanted, str) or unknown:
            raise ValueError(f"parameters must be a list of names among {', '.join(named)}; got {describe(wanted)}")
        named = {n: named[n] for n in wanted}
    if not named:
        raise ValueError("no parameter is trainable: nothing was estimated")
    count = sum(t.numel() for t in named.values())
    if count > LIMIT:
        raise ValueError(
            f"{count} parameters would need matrices of {count} × {count}, and few of them are determined by the data: "
            f"name at most {LIMIT} by parameters=[...]"
        )
    return named


def _labels(named: dict[str, Tensor]) -> tuple[str, ...]:
    labels: list[str] = []
    for name, tensor in named.items():
        if not tensor.dim():
            labels.append(name)
            continue
        for flat in range(tensor.numel()):
            index, left = [], flat
            for size in reversed(tensor.shape):
                index.append(str(left % size))
                left //= size
            labels.append(f"{name}[{', '.join(reversed(index))}]")
    return tuple(labels)


def _bread_and_meat(module: ObjectiveModule, batch: tuple[Tensor, ...], tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A and B over all rows, float64 on the CPU."""
    rows, count = len(batch[0]), sum(t.numel() for t in tensors)
    bread = torch.zeros(count, count, dtype=torch.float64)
    gradients = []
    for start in range(0, rows, CHUNK):
        part = tuple(t[start : start + CHUNK] for t in batch)
        with torch.enable_grad(), scopes.hide_bare_parameters():
            values = module.pointwise(*part)
            if tuple(values.shape) != (len(part[0]),) or not values.requires_grad:
                raise ValueError("the loss of these rows reaches none of the parameters")
            _refuse_non_finite(values.detach(), start)
            gradients.append(_flat(values, tensors, torch.eye(len(values)).to(values), len(values), False))
            total = torch.autograd.grad(
                values.sum(), tensors, create_graph=True, allow_unused=True, materialize_grads=True
            )
            flat = torch.cat([g.reshape(-1) for g in total])
            if flat.requires_grad:
                bread += _flat(flat, tensors, torch.eye(count).to(flat), count, False)
    every = torch.cat(gradients)
    if not bool(torch.isfinite(every).all()):  # one row makes all of a batched product so: it cannot be named here
        raise ArithmeticError("the gradient of a row's loss is not finite, where the losses themselves are")
    centred = every - every.mean(0)
    return bread / rows, centred.t() @ centred / rows


def _flat(outputs: Tensor, tensors: list[Tensor], vectors: Tensor, count: int, graph: bool) -> Tensor:
    """Products of vectors with the Jacobian of outputs in all tensors, ``(count, parameters)``, float64 on the CPU."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    try:
        found = torch.autograd.grad(outputs, tensors, vectors, is_grads_batched=True, **options)
        flat = torch.cat([g.reshape(count, -1) for g in found], 1)
    except RuntimeError:  # an operation that has no rule for batches: one vector at a time gives the same
        each = [torch.autograd.grad(outputs, tensors, v, **options) for v in vectors]
        flat = torch.stack([torch.cat([g.reshape(-1) for g in found]) for found in each])
    return flat.detach().to("cpu", torch.float64)


def _refuse_non_finite(values: Tensor, start: int) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise ArithmeticError(
            f"the loss is not finite in {int(bad.sum())} rows, first in row {start + int(bad.nonzero()[0])}: drop "
            "them, or see what the energy gives for them"
        )


def _invert(bread: Tensor, meat: Tensor, names: tuple[str, ...]) -> Tensor:
    """A⁻¹BA⁻¹, where A has an inverse."""
    size = float(bread.abs().max())
    if float((bread - bread.t()).abs().max()) > 1e-3 * size:
        raise ValueError(
            "the derivative of the loss's gradient is not symmetric: some parameters are trained by another loss than "
            "the rest (a guide beside a model). Name those of the model by parameters=[...]"
        )
    values, vectors = torch.linalg.eigh((bread + bread.t()) / 2)
    if not bool(values[-1] > 0) or float(values[0]) <= 1e-7 * float(values[-1]):
        worst = vectors[:, 0].abs().argsort(descending=True)[:3]
        among = ", ".join(names[int(i)] for i in worst if float(vectors[i, 0].abs()) > 0.1)
        what = (
            "is no minimum" if float(values[0]) < -1e-7 * abs(float(values[-1])) else "does not determine all of them"
        )
        raise ValueError(
            f"the loss at these parameters {what}: its second derivative is {float(values[0]):.2g} along {among} "
            f"(least) and {float(values[-1]):.2g} (most). Fit to the end, fix what the data do not determine, or name "
            "others by parameters=[...]"
        )
    inverse = (vectors / values) @ vectors.t()
    covariance: Tensor = inverse @ meat @ inverse
    symmetric: Tensor = (covariance + covariance.t()) / 2
    return symmetric
