"""Second derivatives row by row: every rule against plain autograd in float64, and what must be refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gen.handlers import log_density
from pyro_gen.laplacians import Derivatives, Lifted, Method, NoRule, choose, derivatives, kinks, lift, rules
from pyro_gen.laplacians.elementwise import apply

Rows = Callable[[Tensor], Tensor]
ROUNDING = {"rtol": 1e-9, "atol": 1e-10}  # float64: some hundred operations of condition below 1e4
N, D, H = 5, 3, 4


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1)


def by_autograd(f: Rows, x: Tensor) -> Derivatives:
    """The definition, by d double backward passes, with nothing of the package in it."""
    y = x.detach().requires_grad_()
    value = f(y)
    (gradient,) = torch.autograd.grad(value.sum(), y, create_graph=True)
    laplacian = torch.zeros_like(value)
    for k in range(x[0].numel()):
        column = gradient.reshape(len(x), -1)[:, k].sum()
        if column.requires_grad:
            second = torch.autograd.grad(column, y, create_graph=True, materialize_grads=True)[0]
            laplacian = laplacian + second.reshape(len(x), -1)[:, k]
    return Derivatives(value, gradient, laplacian)


def objective(result: Derivatives) -> Tensor:
    return (0.5 * result.gradient.reshape(len(result.value), -1).square().sum(1) + result.laplacian).mean()


def agrees(f: Rows, x: Tensor, parameters: list[Tensor], method: Any = "forward", **options: Any) -> None:
    got, expected = derivatives(f, x, method, **options), by_autograd(f, x)
    for name in Derivatives._fields:
        a, b = getattr(got, name), getattr(expected, name)
        assert a.shape == b.shape, name
        torch.testing.assert_close(a, b, **ROUNDING, msg=lambda m, name=name: f"{name}: {m}")
    if parameters:
        a = torch.autograd.grad(objective(got), parameters, materialize_grads=True)
        b = torch.autograd.grad(objective(expected), parameters, materialize_grads=True)
        torch.testing.assert_close(a, b, **ROUNDING)


def parameter(*shape: int) -> Tensor:
    return (0.7 * torch.randn(shape, dtype=torch.float64)).requires_grad_()


REAL = {
    "softplus": F.softplus,
    "softplus, beta and threshold": lambda a: F.softplus(a, beta=3.0, threshold=1.5),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "logsigmoid": F.logsigmoid,
    "gelu": F.gelu,
    "gelu, tanh": lambda a: F.gelu(a, approximate="tanh"),
    "mish": F.mish,
    "tanhshrink": F.tanhshrink,
    "softsign": F.softsign,
    "elu": lambda a: F.elu(a, alpha=0.5),  # exact in float32, to which torch rounds it
    "celu": lambda a: F.celu(a, alpha=0.5),
    "selu": F.selu,
    "relu": lambda a: F.relu(a) * a,
    "leaky_relu": lambda a: F.leaky_relu(a, 0.2) ** 2,
    "relu6": lambda a: F.relu6(a) * a,
    "hardtanh": lambda a: F.hardtanh(a) * a,
    "hardswish": F.hardswish,
    "threshold": lambda a: F.threshold(a, 0.1, 0.3) * a,
    "abs": lambda a: abs(a) ** 3,
    "clamp": lambda a: a.clamp(-0.5, 0.5) * a + torch.clamp(a, min=0.2) ** 2 + a.clamp_max(0.3) * a.clamp_min(-0.1),
    "exp": torch.exp,
    "expm1": torch.expm1,
    "exp2": torch.exp2,
    "square": torch.square,
    "power 0, 1, 2, 3": lambda a: a**0 + a**1 + a.pow(2) + torch.pow(a, 3) * 0.5,
    "power of each feature": lambda a: a ** torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=a.dtype),
    "power of a number": lambda a: 1.7**a + torch.pow(torch.full((H,), 0.4, dtype=a.dtype), a),
    "sin": torch.sin,
    "cos": torch.cos,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "tan": lambda a: torch.tan(0.3 * torch.tanh(a)),
    "asin": lambda a: torch.asin(0.5 * torch.tanh(a)),
    "acos": lambda a: torch.acos(0.5 * torch.tanh(a)),
    "atanh": lambda a: torch.atanh(0.5 * torch.tanh(a)),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "erfinv": lambda a: torch.erfinv(0.5 * torch.tanh(a)),
    "ndtr": torch.special.ndtr,
    "log_ndtr": torch.special.log_ndtr,
}
POSITIVE = {
    "log": torch.log,
    "log2": torch.log2,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "fractional power": lambda a: a**1.5 + a**-0.3,
    "power of lifted": lambda a: a ** (0.3 * a),
    "logit": lambda a: torch.logit(a / (1 + a)),
    "lgamma": torch.lgamma,
    "digamma": torch.digamma,
    "xlogy": lambda a: torch.xlogy(1.5, a) + torch.xlogy(torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=a.dtype), a),
    "xlogy of lifted": lambda a: torch.xlogy(a, 1 + a),
}
C = torch.linspace(-1, 1, H, dtype=torch.float64)
ROW = torch.linspace(-1, 2, N, dtype=torch.float64)
MATRIX = torch.linspace(-1, 1, H * H, dtype=torch.float64).reshape(H, H).sin()
ARRANGED = {  # of a (N, H), itself bent, to anything with rows that can be summed
    "+ − with constants": lambda a: (a + C - 2.0 + (3 - a) * a - torch.sub(a, C, alpha=2)) * a,
    "with a column of constants": lambda a: (a * ROW[:, None] + ROW[:, None]) ** 2,
    "× /": lambda a: a * C / 2.5 * a + 1 / (2 + a * a) + C / (1 + a**2) + a / (1 + C**2) * a,
    "enlarging": lambda a: (a.unsqueeze(1) - MATRIX) ** 2 * a.unsqueeze(-1),
    "lifted against its sum": lambda a: a * a.sum(-1, keepdim=True) - a / (1 + (a * a).mean(1, keepdim=True)),
    "neg, addcmul, addcdiv, lerp": lambda a: torch.addcmul(-a, a, a, value=0.5) + torch.lerp(a, a * a, 0.3) * C,
    "addcdiv": lambda a: torch.addcdiv(C, a, 1 + a * a, value=2),
    "matmul": lambda a: (a @ MATRIX) * a + torch.mm(a, MATRIX),
    "matmul with a vector": lambda a: (a @ C) ** 2 + torch.mv(a, C),
    "constant @ lifted": lambda a: (MATRIX @ a.unsqueeze(-1)).squeeze(-1) * a,
    "transposed": lambda a: (MATRIX @ a.t()).t() * a,
    "lifted @ lifted": lambda a: (a.unsqueeze(1) @ torch.exp(a).unsqueeze(2)).reshape(-1),
    "outer @": lambda a: torch.bmm(a.unsqueeze(2), a.unsqueeze(1)) @ MATRIX,
    "addmm": lambda a: torch.addmm(C, a, MATRIX, beta=0.5, alpha=2.0) * a,
    "bilinear": lambda a: F.bilinear(a, torch.tanh(a), MATRIX.expand(2, H, H), C[:2]),
    "einsum": lambda a: torch.einsum("ni,ij,nj->n", a, MATRIX, torch.sin(a)) * torch.einsum("ni,i->n", a, C),
    "einsum with dots": lambda a: (
        torch.einsum("...i,ij,...j->...", a, MATRIX, torch.sin(a)) * torch.einsum("...i,i->...", a, C)
    ),
    "einsum without a right side": lambda a: torch.einsum("ai,ij", a, MATRIX) ** 2 + torch.einsum("...i,ij", a, MATRIX),
    "bilinear of images": lambda a: F.bilinear(a[:, None], torch.tanh(a)[:, None], MATRIX.expand(2, H, H)),
    "prod": lambda a: a.prod(-1) + (torch.prod(a * a, 1, keepdim=True) * a).sum(1),
    "axis": lambda a: (a * a).sum(axis=-1) * torch.mean(a, axis=1) + (a.sum(axis=1, keepdims=True) * a).sum(-1),
    "squared error": lambda a: F.mse_loss(a * a, C.expand(N, H), reduction="none"),
    "einsum of three": lambda a: torch.einsum("ni,ni,ni->n", a, torch.sin(a), a),
    "vecdot": lambda a: torch.linalg.vecdot(a, torch.exp(a)),
    "solve_triangular": lambda a: (
        torch.linalg.solve_triangular(MATRIX.tril(-1) + torch.eye(H, dtype=a.dtype), a.t(), upper=False).pow(2).sum(0)
    ),
    "sums": lambda a: (a * a).sum(1) + (a.sum(-1) ** 2) + (a.view(N, 2, 2).sum((1, 2))) ** 3 + a.sum([-1]),
    "mean": lambda a: torch.mean(a, dim=(1,)) ** 2 + (a * a).mean(-1),
    "logsumexp": lambda a: torch.logsumexp(a * C, 1) + a.logsumexp((-1,), keepdim=True).squeeze(1) ** 2,
    "softmax": lambda a: torch.softmax(a, -1) * a + F.log_softmax(a * 2, dim=1) * C,
    "logaddexp": lambda a: torch.logaddexp(a, a * a) + torch.logaddexp(a, C),
    "cumsum, flip": lambda a: a.cumsum(1) * a.flip(1) * torch.flip(a, [-1]),
    "cat, stack": lambda a: torch.cat([a, a * a, C.expand(N, H)], -1).cumsum(-1) ** 2,
    "index": lambda a: a[:, 0] * a[..., 1] + (a[:, 1:3] ** 2).sum(-1) * a[:, [0, 2]].sum(1) + a[:, None, -1].sum(1),
    "reversed index": lambda a: a[:, torch.tensor([3, 0])] * a[:, ::2],
    "select, narrow, unbind": lambda a: a.select(1, 2) * a.narrow(1, 0, 2).sum(1) * a.unbind(-1)[3],
    "split, chunk": lambda a: a.split([1, 3], 1)[1].sum(1) * a.chunk(2, -1)[0].sum(-1),
    "index_select, gather": lambda a: (
        a.index_select(1, torch.tensor([0, 0, 1])).sum(1) * a.gather(1, torch.arange(N)[:, None] % H).squeeze(1)
    ),
    "shapes": lambda a: a.reshape(N, 2, 2).transpose(1, 2).flatten(1).unflatten(1, (2, 2)).permute(0, 2, 1) ** 2,
    "rows in the middle": lambda a: (a.t().unsqueeze(0) ** 2 * ROW).movedim(2, 0).squeeze(1) * a,
    "expand, repeat": lambda a: (a[:, None].expand(-1, 3, -1) * a.repeat(1, 3).reshape(N, 3, H)) ** 2,
    "broadcast": lambda a: torch.broadcast_tensors(a.unsqueeze(1), MATRIX)[0] ** 2 * a.unsqueeze(-1).expand(N, H, H),
    "pad": lambda a: F.pad(a, (1, 2), value=3.0) ** 2,
    "where": lambda a: torch.where(a > 0, a * a, torch.sin(a)) * torch.where(a < 0.2, 1.0, a).where(a > -1, a),
    "masked_fill": lambda a: a.masked_fill(a > 0.3, 2.0) ** 2,
    "maximum, minimum": lambda a: torch.maximum(a, a * a) * torch.minimum(a, C) * torch.maximum(C, a),
    "clone, contiguous, dropout": lambda a: F.dropout(a.clone().contiguous(), 0.5, training=False) * +a,
    "to and back": lambda a: a.to(torch.float64).double().type_as(a).type(torch.float64) * a,
    "constants moved to it": lambda a: a * a * C.to(a) + C.type_as(a) * a.new_tensor([1.0]) + C.to(a.device, a.dtype),
    "as_tensor": lambda a: torch.as_tensor(a) * torch.as_tensor(data=a * a),
    "detach": lambda a: a.detach() * a * a,
    "constants of its shape": lambda a: (a + torch.zeros_like(a) + a.new_ones(H)) * torch.isfinite(a) * a.sign(),
    "rms_norm": lambda a: F.rms_norm(a, (H,), C, 1e-3),
    "group_norm": lambda a: F.group_norm(a, 2, C, C, 1e-2),
    "batch_norm with fixed moments": lambda a: F.batch_norm(a, C, C**2 + 1, C, C) ** 2,
    "norm": lambda a: a.norm(dim=-1) + torch.linalg.vector_norm(a, dim=1) ** 3 + torch.linalg.norm(a, dim=1),
    "normalize": lambda a: F.normalize(a, dim=-1) * C,
    "var, std": lambda a: a.var(-1) + torch.std(a, 1, correction=0) + a.var(dim=1, unbiased=False),
    "triangles": lambda a: (a.unsqueeze(-1) * MATRIX * a.unsqueeze(1)).tril() @ C,
    "binary cross entropy": lambda a: F.binary_cross_entropy_with_logits(
        a, torch.sigmoid(C).expand(N, H), reduction="none"
    ),
    "avg_pool": lambda a: F.avg_pool1d(a.unsqueeze(1), 2).squeeze(1) ** 2,
    "branch on values": lambda a: a * a if bool((a > 0).any()) and len(a) == N else a,
}
ARRANGED["stack"] = lambda a: (torch.stack([a, a * a], 1).sum(1) ** 2) * torch.stack([a, C.expand(N, H)], -1).sum(-1)


def head(y: Tensor) -> Tensor:
    """One value a row of anything with rows first, with different weights for its features."""
    flat = y.reshape(N, -1)
    return (flat * torch.linspace(0.5, 1.5, flat.shape[1], dtype=torch.float64)).sum(-1)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("bent", [True, False], ids=["dense", "diagonal"])
def test_elementwise(name: str, bent: bool) -> None:
    """After a linear map of x, where the Jacobian is dense, and on x itself, where it is diagonal."""
    x, W, w = torch.randn(N, H, dtype=torch.float64), parameter(H, H), parameter(H)
    agrees(lambda x: head(REAL[name](F.linear(torch.sin(x), W) if bent else x * w)), x, [W, w])


@pytest.mark.parametrize("name", POSITIVE)
def test_elementwise_of_positive(name: str) -> None:
    x, W = torch.randn(N, D, dtype=torch.float64), parameter(H, D)
    agrees(lambda x: head(POSITIVE[name](0.3 + F.softplus(F.linear(torch.sin(x), W)))), x, [W])


@pytest.mark.parametrize("name", ARRANGED)
@pytest.mark.parametrize("kind", ["dense", "shared", "diagonal", "other basis"])
def test_arranged(name: str, kind: str) -> None:
    """Products, sums and shapes, for each representation of the Jacobian, with L zero and not."""
    d = {"dense": D, "shared": H, "diagonal": H, "other basis": 2 * H}[kind]
    x, W, w = torch.randn(N, d, dtype=torch.float64), parameter(H, d), parameter(H)
    start: Callable[[Tensor], Tensor] = {
        "dense": lambda x: F.linear(torch.sin(x), W),
        "shared": lambda x: F.linear(x, W),
        "diagonal": lambda x: x * w,
        "other basis": lambda x: F.linear(x, W),
    }[kind]
    agrees(lambda x: head(torch.tanh(ARRANGED[name](start(x)))), x, [W, w])


def test_two_bases_meet() -> None:
    """Two linear maps of many features to few have bases of their own; together they are in coordinates of x."""
    x, W, V = torch.randn(N, 20, dtype=torch.float64), parameter(H, 20), parameter(H, 20)

    def f(x: Tensor) -> Tensor:
        a, b = torch.tanh(F.linear(x, W)), torch.sin(F.linear(x * 2 + 1, V))
        return (a * b).sum(-1) + (a @ MATRIX).exp().sum(-1) * (x**2).sum(-1) + torch.cat([a, b, x], 1).pow(3).sum(1)

    agrees(f, x, [W, V])


@pytest.mark.parametrize("convolution", ["conv1d", "conv2d", "conv_transpose2d"])
def test_images(convolution: str) -> None:
    shape = (2, 6) if convolution == "conv1d" else (2, 4, 4)
    kernel = {"conv1d": (3, 2, 3), "conv2d": (3, 2, 2, 2), "conv_transpose2d": (2, 3, 2, 2)}[convolution]
    x, W, b = torch.randn(N, *shape, dtype=torch.float64), parameter(*kernel), parameter(3)
    function = getattr(F, convolution)

    def f(x: Tensor) -> Tensor:
        y = torch.tanh(function(x, W, b, stride=2, padding=1))
        return head(y * y) + head(torch.tanh(function(torch.sin(x), W, b)))

    agrees(f, x, [W, b])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("method", ["forward", "reverse", "vmap", "auto"])
def test_event_shapes_and_methods(shape: tuple[int, ...], method: str) -> None:
    x, w = torch.randn((N, *shape), dtype=torch.float64), parameter(*shape)

    def f(x: Tensor) -> Tensor:
        y = torch.sin(x * w) * x
        return y.reshape(N, -1).sum(-1) + torch.exp(-y.reshape(N, -1)).mean(1) if shape else y

    agrees(f, x, [w], method)


def network(d: int, activation: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    a = nn.Softplus() if activation is None else activation
    return nn.Sequential(nn.Linear(d, 8), a, nn.Linear(8, 6), a, nn.Linear(6, 1), nn.Flatten(0)).to(dtype)


@pytest.mark.parametrize("d", [1, 2, 7, 30])
@pytest.mark.parametrize("method", ["forward", "reverse", "vmap"])
def test_networks(d: int, method: str) -> None:
    net = network(d, nn.Softplus(beta=3.0, threshold=1.0))
    agrees(net, torch.randn(N, d, dtype=torch.float64), list(net.parameters()), method)


@pytest.mark.parametrize("d", [7, 30])
def test_chunks_equal_the_whole(d: int) -> None:
    """The budget makes chunks of directions, also where the basis changes; values and parameter gradients hold."""
    net = network(d)
    x = torch.randn(N, d, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return net(x) + torch.sin(net[0](torch.tanh(x))).sum(-1)

    assert choose(f, x, memory=20_000).chunk in range(1, d)
    assert choose(f, x).chunk is None
    for chunk in (1, 3, d):
        agrees(f, x, list(net.parameters()), Method("forward", chunk))
    agrees(f, x, list(net.parameters()), "forward", memory=20_000)
    with torch.no_grad():
        torch.testing.assert_close(derivatives(f, x, Method("forward", 2)), by_no_graph(f, x), **ROUNDING)


def by_no_graph(f: Rows, x: Tensor) -> Derivatives:
    with torch.enable_grad():
        return Derivatives(*(t.detach() for t in by_autograd(f, x)))


def test_the_identity_is_never_made() -> None:
    """x keeps a diagonal of its own size, a linear map shares its weight, few hidden units change the basis."""
    x = torch.randn(64, 500)
    y = lift(x)
    assert y.J is None
    assert y.g is not None
    assert y.g.untyped_storage().nbytes() == x.element_size()
    bent = torch.tanh(2 * y - 1)
    assert bent.J is None
    assert bent.g is not None
    assert bent.g.shape == x.shape
    assert (bent**2).sum(-1).J.shape == (500, 64)
    W = torch.randn(400, 500)
    wide = F.linear(y, W)
    assert wide.J.shape == (500, 1, 400)
    assert torch.tanh(wide).J.shape == (500, 64, 400)
    narrow = F.linear(torch.tanh(F.linear(y, W[:100])), W[:7, :100])
    assert narrow.J.shape == (100, 64, 7)
    assert y.basis.bytes == 4 * 500 * (64 + 400 + 64 * 400)  # all dense Jacobians in coordinates of x


def test_float32() -> None:
    """Single precision is as good as its rounding: 2^-24 relative, grown by some hundred sums of d = 30 terms."""
    net = network(30)
    x = torch.randn(N, 30, dtype=torch.float64)
    fine = derivatives(net, x)
    for method in ("forward", "reverse", "vmap"):
        coarse = derivatives(net.float(), x.float(), method)
        for a, b in zip(coarse, fine, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_a_rule_that_ignores_beta_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(3, nn.Softplus(beta=3.0))
    x = torch.randn(N, 3, dtype=torch.float64)

    def wrong(x: Lifted, beta: float = 1.0, threshold: float = 20.0) -> Lifted:
        s = torch.sigmoid(x.v)
        return apply(x, F.softplus(x.v, beta, threshold), s, s * (1 - s))

    monkeypatch.setitem(rules.TABLE, F.softplus, rules.Rule(wrong, frozenset({"beta", "threshold"}), 3, 1))
    with pytest.raises(AssertionError, match="gradient"):
        agrees(net, x, list(net.parameters()))


def test_a_product_without_its_cross_term_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_gen.laplacians import products

    monkeypatch.setattr(products, "contract", lambda a, b: torch.zeros_like(a.v))
    W = parameter(H, D)
    with pytest.raises(AssertionError, match="laplacian"):
        agrees(lambda x: (torch.sin(F.linear(x, W)) * x[:, :1]).sum(-1), torch.randn(N, D, dtype=torch.float64), [W])


def test_layer_norm() -> None:
    """Against its formula: the third derivative of torch's own layer_norm, and so its reverse pass here, is wrong."""
    x, W, w, b = torch.randn(N, D, dtype=torch.float64), parameter(H, D), parameter(H), parameter(H)

    def f(x: Tensor) -> Tensor:
        return torch.tanh(F.layer_norm(F.linear(torch.sin(x), W), (H,), w, b, 1e-3)).sum(-1)

    def formula(x: Tensor) -> Tensor:
        a = F.linear(torch.sin(x), W)
        c = a - a.mean(-1, keepdim=True)
        return torch.tanh(c / ((c * c).mean(-1, keepdim=True) + 1e-3).sqrt() * w + b).sum(-1)

    got, expected = derivatives(f, x, "forward"), by_autograd(formula, x)
    torch.testing.assert_close(got, expected, **ROUNDING)
    slopes = [torch.autograd.grad(objective(r), [W, w, b]) for r in (got, expected)]
    torch.testing.assert_close(*slopes, **ROUNDING)


def test_closed_form() -> None:
    """log N(μ, Σ): gradient −Σ⁻¹(x − μ), Laplacian −tr Σ⁻¹."""
    A = torch.randn(4, 4, dtype=torch.float64)
    normal = dist.MultivariateNormal(torch.ones(4, dtype=torch.float64), A @ A.T + torch.eye(4, dtype=torch.float64))
    x = torch.randn(N, 4, dtype=torch.float64)
    value, gradient, laplacian = derivatives(normal.log_prob, x, "forward")
    torch.testing.assert_close(value, normal.log_prob(x))
    torch.testing.assert_close(gradient, -(x - 1) @ normal.precision_matrix)
    torch.testing.assert_close(laplacian, -normal.precision_matrix.trace().expand(N))


ONE = torch.ones((), dtype=torch.float64)
LOCS = torch.linspace(-1, 1, 2 * D, dtype=torch.float64).reshape(2, D)
DISTRIBUTIONS = {
    "Normal": lambda: dist.Normal(LOCS[0], 2.0 * ONE).to_event(1),
    "StudentT": lambda: dist.StudentT(4.0 * ONE, LOCS[0], ONE).to_event(1),
    "Logistic": lambda: dist.Logistic(LOCS[0], ONE).to_event(1),
    "MultivariateNormal": lambda: dist.MultivariateNormal(LOCS[0], torch.eye(D, dtype=ONE.dtype) + 0.3 * ONE),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(LOCS[0], LOCS.T, torch.ones(D).double()),
    "mixture of Normals": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7], dtype=ONE.dtype)), dist.Normal(LOCS, ONE).to_event(1)
    ),
    "Normals of mixtures": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(D, 2, dtype=ONE.dtype)), dist.Normal(LOCS.T, ONE)
    ).to_event(1),
    "Gumbel": lambda: dist.Gumbel(LOCS[0], ONE).to_event(1),
}
POSITIVE_DISTRIBUTIONS = {
    "Gamma": lambda: dist.Gamma(2.5 * ONE, 1.5 * ONE).expand([D]).to_event(1),
    "LogNormal": lambda: dist.LogNormal(0.3 * ONE, ONE).expand([D]).to_event(1),
    "InverseGamma": lambda: dist.InverseGamma(2.5 * ONE, ONE).expand([D]).to_event(1),
    "HalfNormal": lambda: dist.HalfNormal(ONE).expand([D]).to_event(1),
}


@pytest.mark.parametrize("name", [*DISTRIBUTIONS, *POSITIVE_DISTRIBUTIONS])
def test_programs(name: str) -> None:
    """A site, a factor with a network, a plate, a mask: a Pyro program as it stands, validation on."""
    net = network(D, nn.SiLU())
    fn = {**DISTRIBUTIONS, **POSITIVE_DISTRIBUTIONS}[name]()
    seen = torch.arange(N) != 2

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", fn, obs=x)
            with pyro.poutine.mask(mask=seen):
                pyro.factor("tilt", -net(x))

    x = torch.randn(N, D, dtype=torch.float64)
    x = x.exp() if name in POSITIVE_DISTRIBUTIONS else x
    with pyro.validation_enabled():
        agrees(lambda y: log_density(model, y), x, list(net.parameters()))


def test_energies_of_images_with_a_context() -> None:
    """Chunks leave rows together, so what f holds for each row stays in place."""
    net, context = network(4), torch.randn(N, 4, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            base = dist.Normal(x.new_zeros(2, 2), 1.0).to_event(2).mask(False)
            pyro.sample("x", base, obs=x)
            pyro.factor("energy", -net(x.flatten(1) * context))

    x = torch.randn(N, 2, 2, dtype=torch.float64)
    agrees(lambda y: log_density(model, y), x, list(net.parameters())[:-1], Method("forward", 3))


@pytest.mark.parametrize("name", ["forward", "reverse", "vmap"])
def test_functional_gradients_and_traces(name: Any) -> None:
    """Under torch.func.grad over functional_call, and in a trace of make_fx, run on new numbers."""
    net = network(D)
    names = [n for n, _ in net.named_parameters()]
    x = torch.randn(N, D, dtype=torch.float64)

    def step(weights: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            f = lambda y: torch.func.functional_call(net, weights, (y,))  # noqa: E731
            return objective(derivatives(f, x, Method(name)))

        return torch.func.grad(loss)(weights)

    weights = {n: p.detach() for n, p in net.named_parameters()}
    traced = make_fx(step)(weights, x)
    y = torch.randn(N, D, dtype=torch.float64)
    other = {n: p + 0.1 for n, p in weights.items()}
    for p, new in zip(net.parameters(), other.values(), strict=True):
        p.data = new
    expected = torch.autograd.grad(objective(by_autograd(net, y)), list(net.parameters()), materialize_grads=True)
    for got in (step(other, y), traced(other, y)):
        torch.testing.assert_close([got[n] for n in names], list(expected), **ROUNDING)


@pytest.mark.parametrize("traced", [False, True])
def test_conversions_inside_a_program_under_functional_gradients(traced: bool) -> None:
    """``pyro.factor`` calls ``torch.as_tensor``, which wraps a tensor subclass under ``torch.func``."""
    x, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.factor("energy", -torch.cosh(x * weight).sum(-1))

        return derivatives(lambda y: log_density(model, y), x, "forward").laplacian.mean()

    expected = (-(2 * weight * torch.cosh(x * weight) + weight**2 * x * torch.sinh(x * weight))).mean(0)
    step: Any = torch.func.grad(loss)
    with pyro.validation_enabled(False):
        step = make_fx(step)(weight + 1, x + 1) if traced else step
        torch.testing.assert_close(step(weight, x), expected, **ROUNDING)


def test_another_dtype_keeps_the_derivatives() -> None:
    x = torch.randn(N, D)
    for change in (Tensor.double, lambda y: y.to(torch.float64), lambda y: y.type(torch.float64),
                   lambda y: torch.as_tensor(y, dtype=torch.float64),
        lambda y: torch.asarray(y, dtype=torch.float64)):  # fmt: skip
        found = derivatives(lambda y, change=change: change(y).square().sum(-1).float(), x, "forward")
        torch.testing.assert_close(found.gradient, 2 * x)
        torch.testing.assert_close(found.laplacian, torch.full((N,), 2.0 * D))


def test_chunks_under_functional_gradients() -> None:
    net, x = network(D), torch.randn(N, D, dtype=torch.float64)
    weights = {n: p.detach() for n, p in net.named_parameters()}

    def loss(weights: dict[str, Tensor], method: Method) -> Tensor:
        return objective(derivatives(lambda y: torch.func.functional_call(net, weights, (y,)), x, method))

    whole, parts = (torch.func.grad(loss)(weights, Method("forward", c)) for c in (None, 2))
    torch.testing.assert_close(whole, parts, **ROUNDING)


def test_meta() -> None:
    net = network(D).to("meta")
    result = derivatives(net, torch.empty(N, D, dtype=torch.float64, device="meta"))
    assert [t.device.type for t in result] == ["meta"] * 3
    assert [t.shape for t in result] == [(N,), (N, D), (N,)]


def test_no_gradients_recorded() -> None:
    net, x = network(D), torch.randn(N, D, dtype=torch.float64)
    with torch.no_grad():
        for method in ("forward", "reverse", "vmap"):
            assert not any(t.requires_grad for t in derivatives(net, x, method))


def test_a_constant_has_no_derivatives() -> None:
    x = torch.randn(N, D)
    value, gradient, laplacian = derivatives(lambda x: torch.ones(N), x, "forward")
    assert value.tolist() == [1.0] * N
    assert not gradient.any()
    assert not laplacian.any()


def _without_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.sum(-1)


class Reverse(torch.autograd.Function):
    """Gradient reversal: a forward pass that says nothing of its backward pass."""

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Straight(Reverse):
    """A straight-through estimator: constant to first order, with a slope of its own."""

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return (y > 0).to(y.dtype)


REFUSED = {
    "sort": (lambda x: x.sort(-1).values.sum(-1), "torch.Tensor.sort"),
    "dropout": (lambda x: F.dropout(x).sum(-1), "torch.nn.functional.dropout.*random"),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True).sum(-1), "batch_norm.*rows are not indep"),
    "in place": (lambda x: F.silu(x, inplace=True).sum(-1), "silu.*inplace=True"),
    "in place by method": (lambda x: x.mul(2).add_(1).sum(-1), "torch.Tensor.add_"),
    "unknown argument": (lambda x: torch.sum(x, -1, dtype=torch.float64), "torch.sum.*dtype"),
    "norm of order 1": (lambda x: x.norm(1, dim=-1), "norm.*order 1"),
    "rounded division": (lambda x: torch.div(x, 2, rounding_mode="floor").sum(-1), "rounding"),
    "sum over rows": (lambda x: (x - x.mean(0)).sum(-1), "mean.*mixes rows"),
    "sum of all": (lambda x: x[:, 0] - x.sum(), "mixes rows"),
    "other rows": (lambda x: x[torch.tensor([1, 0, 2, 3, 4])].sum(-1), "__getitem__.*picks rows"),
    "rows shifted": (lambda x: x.roll(1, 0).sum(-1), "roll"),
    "pairs of rows": (lambda x: ((x[:, None] - x[None]) ** 2).sum((1, 2)), "pairs rows"),
    "kernel of rows": (lambda x: (x @ x.T).sum(-1), "matmul.*rows"),
    "matrix over rows": (lambda x: (torch.ones(N, N) @ x).sum(-1), "matmul.*rows"),
    "einsum over rows": (lambda x: torch.einsum("ni,mi->n", x, x), "einsum.*mixes rows"),
    "softmax over rows": (lambda x: torch.softmax(x, 0).sum(-1), "mixes rows"),
    "cumsum over rows": (lambda x: x.cumsum(0).sum(-1), "cumsum.*mixes rows"),
    "rows merged": (lambda x: x.reshape(-1).reshape(N, -1).sum(-1), "merges rows"),
    "rows stacked": (lambda x: torch.cat([x, x]).sum(-1)[:N], "cat.*mixes rows"),
    "repeated": (lambda x: x.repeat(2, 1).sum(-1)[:N], "repeats rows"),
    "weights that depend on x": (lambda x: F.linear(torch.ones(N, D), x).sum(-1), "depends on x"),
    "written into": (lambda x: torch.zeros(N, D).copy_(x).sum(-1), "copy_"),
    "gradient inside": (lambda x: torch.autograd.grad(x.sum(-1), x)[0].sum(-1), "grad"),
    "copied as a constant": (lambda x: torch.tensor(x).sum(-1), "torch.tensor"),
    "number taken out": (lambda x: x.sum(-1) * x[0, 0].item(), "picks rows|__getitem__"),
    "under no_grad": (lambda x: _without_graph(x) * x.sum(-1), "torch.sum.*no_grad|no_grad"),
    "reversed by a custom function": (lambda x: Reverse.apply(torch.sin(x)).sum(-1), "view_as"),
    "straight through": (lambda x: Straight.apply(torch.sin(x)).sum(-1), "Tensor.gt.*its own backward"),
    "compiled below Python": (torch.jit.trace(lambda x: torch.sin(x).sum(-1), torch.ones(N, D)), "below Python"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name: str) -> None:
    f, message = REFUSED[name]
    with pytest.raises(NoRule, match=message):
        derivatives(f, torch.randn(N, D), "forward")


def test_a_refusal_inside_a_program_is_said_once() -> None:
    """Pyro raises errors of a log-density anew, with the shapes of its sites."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Beta(torch.tensor(2.0), torch.tensor(3.0)).expand([D]).to_event(1), obs=x)
            pyro.factor("tilt", x.sort(-1).values.sum(-1))

    with pytest.raises(NoRule, match="sort") as caught:
        derivatives(lambda y: log_density(model, y), torch.rand(N, D), "forward")
    assert str(caught.value).count("has no rule") == 1
    assert NoRule(str(caught.value)).args == (str(caught.value),)


def test_auto() -> None:
    """Forward with rules; else reverse up to d = 3, else vmap, but reverse where vmap does not run."""

    def sorted_sum(x: Tensor) -> Tensor:
        return (x.sort(-1).values ** 3).sum(-1)

    class Cube(torch.autograd.Function):
        """Without a rule for forward mode."""

        @staticmethod
        def forward(y: Tensor) -> Tensor:
            return y**3

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return 3 * y**2 * gradient

    def custom(x: Tensor) -> Tensor:
        return Cube.apply(torch.sin(x)).sum(-1)

    for d, f, name in (
        (2, torch.tanh, "forward"),
        (3, sorted_sum, "reverse"),
        (4, sorted_sum, "vmap"),
        (4, custom, "reverse"),
    ):
        x = torch.randn(N, d, dtype=torch.float64)
        g = (lambda x: torch.tanh(x).sum(-1)) if name == "forward" else f
        assert choose(g, x).name == name
        agrees(g, x, [], "auto")
        agrees(g, x, [], "auto", memory=1)
        agrees(g, x, [], choose(g, x))


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0)), ["relu"]),
        (nn.Sequential(nn.Linear(D, 4), nn.ReLU(inplace=True), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)), ["relu"]),
        (nn.Sequential(nn.Linear(D, 4), nn.PReLU(), nn.Linear(4, 1), nn.Flatten(0)), ["prelu"]),
        (lambda x: F.leaky_relu(x).sum(-1) + F.hardtanh(x).sum(-1), ["leaky_relu", "hardtanh"]),
        (lambda x: F.hardswish(x).sum(-1) + F.relu6(x).sum(-1), ["hardswish", "relu6"]),
        (lambda x: F.max_pool1d(x.unsqueeze(1), 3).flatten(), ["max_pool1d"]),
        (lambda x: torch.maximum(x, 2 * x).sum(-1) + x.max(-1).values + x.abs().sum(-1), ["maximum", "max", "abs"]),
        (lambda x: abs(x).clamp(max=2).sum(-1), ["abs", "clamp"]),
        (lambda x: F.selu(x).sum(-1) + F.elu(x, 2.0).sum(-1), ["selu", "elu"]),
        (lambda x: x.norm(p=1, dim=-1), ["norm"]),
        (dist.Laplace(torch.zeros(D), 1.0).to_event(1).log_prob, ["abs"]),
        (lambda x: F.elu(x).sum(-1) + F.celu(x, 2.0).sum(-1) + F.softsign(x).sum(-1), []),
        (lambda x: torch.relu(torch.ones(D)).sum() * x.sum(-1), []),  # of a constant
        (lambda x: torch.relu(x.detach()).sum(-1) * x.sum(-1), []),
        (lambda x: F.softplus(x).sum(-1) + x.norm(dim=-1) + (x.abs() > 1).sum(-1) * 0, ["abs"]),
        (dist.Normal(torch.zeros(D), 1.0).to_event(1).log_prob, []),
    ],
)
def test_kinks(f: Rows, found: list[str]) -> None:
    x = torch.randn(N, D)
    before = x.clone()
    assert kinks(f, x) == found
    assert torch.equal(x, before)


def test_kinks_of_a_program() -> None:
    net = network(D, nn.ReLU(), torch.float32)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(D), 1.0).to_event(1), obs=x)
            pyro.factor("energy", -net(x))

    assert kinks(lambda y: log_density(model, y), torch.randn(N, D)) == ["relu"]


def test_slopes_that_jump() -> None:
    """What counts as a kink: hardswish and selu have a jump in f', elu with alpha = 1, celu and softsign have none."""
    e = torch.tensor([-1e-9, 1e-9], dtype=torch.float64)

    def jump(f: Callable[[Tensor], Tensor], at: float) -> float:
        (slope,) = torch.autograd.grad(f(y := (at + e).requires_grad_()).sum(), y)
        return float(slope[1] - slope[0])

    assert jump(F.hardswish, -3.0) == pytest.approx(-0.5, abs=1e-6)
    assert abs(jump(F.selu, 0.0)) > 0.5
    for smooth in (F.elu, lambda a: F.celu(a, 2.0), F.softsign):
        assert abs(jump(smooth, 0.0)) < 1e-6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, x: derivatives(f, x.long()), TypeError, "x must be a floating point tensor, got torch.int64"),
        (lambda f, x: derivatives(f, x.tolist()), TypeError, "x must be a floating point tensor, got list"),
        (lambda f, x: derivatives(f, x[0, 0]), ValueError, "x must have shape"),
        (lambda f, x: derivatives(f, x, "fast"), ValueError, "method must be 'auto', 'forward', 'reverse', 'vmap'"),
        (lambda f, x: derivatives(f, x, memory=0), ValueError, "memory must be"),
        (lambda f, x: choose(f, x, memory=1.5), ValueError, "memory must be"),
        (lambda f, x: derivatives(lambda x: f(x)[:, None], x), ValueError, r"got \(5, 1\): drop the last dimension"),
        (lambda f, x: derivatives(lambda x: x, x, "reverse"), ValueError, r"got \(5, 3\)"),
        (lambda f, x: derivatives(lambda x: None, x), TypeError, "f must return a tensor"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(lambda x: torch.tanh(x).sum(-1), torch.randn(N, D))


def test_softplus_is_linear_beyond_its_threshold() -> None:
    """f = softplus with beta 2 and threshold 1: second derivative 2·s(1 − s) below x = ½, zero above."""
    x = torch.tensor([0.2, 0.6], dtype=torch.float64)
    _, gradient, laplacian = derivatives(lambda x: F.softplus(x, 2.0, 1.0), x, "forward")
    s = 1 / (1 + math.exp(-0.4))
    torch.testing.assert_close(gradient, torch.tensor([s, 1.0], dtype=torch.float64))
    torch.testing.assert_close(laplacian, torch.tensor([2 * s * (1 - s), 0.0], dtype=torch.float64))
