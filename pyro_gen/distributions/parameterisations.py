r"""What a denoising network may predict, and how each prediction splits a noisy datum into datum and noise.

At one level :math:`y = \alpha u + \sigma \varepsilon`. A network that knows y and one of

.. math:: \varepsilon, \qquad u\ (x_0), \qquad v = \alpha\varepsilon - \sigma u, \qquad
          \nabla \log p_t(y) = -\varepsilon / \sigma, \qquad \dot y = \alpha' u + \sigma' \varepsilon

knows all the others: each is one linear equation beside the first, so :math:`\hat u = a y + b F` and
:math:`\hat\varepsilon = c y + d F` with numbers of the level alone. They differ in what an error of F weighs at which
level, and in where they break: ε says nothing of u where α = 0, and u nothing of ε where σ = 0. v breaks nowhere, but
belongs to :math:`\alpha^2 + \sigma^2 = 1`. Karras et al.'s preconditioning is v for any schedule,

.. math:: \hat u = \frac{\alpha}{r^2} y + \frac{\sigma}{r} F, \qquad
          \hat\varepsilon = \frac{\sigma}{r^2} y - \frac{\alpha}{r} F, \qquad r^2 = \alpha^2 + \sigma^2,

whose first terms are the exact answers for standard normal data, and whose F has variance 1 at every level.

References:
    T. Salimans, J. Ho, "Progressive distillation for fast sampling of diffusion models", 2022, arXiv:2202.00512,
    appendix D (v); T. Karras et al., "Elucidating the design space of diffusion-based generative models", 2022,
    arXiv:2206.00364, table 1 (c_skip, c_out, c_in with the data's standard deviation 1).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from pyro_gen.base import Coefficients, Schedule
from pyro_gen.checks import describe

__all__ = ["Prediction", "check_prediction", "coefficients_of", "linear_answer", "target_of"]

Prediction = Literal["epsilon", "x0", "v", "score", "velocity", "edm"]


def check_prediction(prediction: str, schedule: Schedule) -> None:
    """Refuse a name that is none, or v where α² + σ² is not 1.

    Raises:
        ValueError: naming what goes with the schedule.
    """
    if prediction not in get_args(Prediction):
        raise ValueError(
            f"prediction must be one of {', '.join(map(repr, get_args(Prediction)))}, got {describe(prediction)}"
        )
    if prediction == "v" and not schedule.variance_preserving:
        raise ValueError(
            "prediction='v' is defined where α² + σ² = 1, and this schedule has another sum: use prediction='edm', "
            "which is v for any schedule, or 'velocity', or a schedule that preserves the variance ('cosine')"
        )


def coefficients_of(prediction: Prediction, schedule: Schedule, t: Tensor, *, scaled: bool = True) -> Coefficients:
    r"""The linear map from (y, F) to :math:`(\hat u, \hat\varepsilon)` at times t, of the shape of t.

    Args:
        prediction: what F is. schedule: of the noise. t: times, of any shape.
        scaled: whether the network sees :math:`y / \sqrt{\alpha^2 + \sigma^2}`, of variance 1 for data of variance 1;
            else it sees y.
    """
    check_prediction(prediction, schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    norm = (alpha.square() + sigma.square()).sqrt()
    if prediction == "epsilon":
        data, noise = (1 / alpha, -sigma / alpha), (zero, one)
    elif prediction == "x0":
        data, noise = (zero, one), (1 / sigma, -alpha / sigma)
    elif prediction == "v":
        data, noise = (alpha, -sigma), (sigma, alpha)
    elif prediction == "score":
        data, noise = (1 / alpha, sigma.square() / alpha), (zero, -sigma)
    elif prediction == "velocity":
        d_alpha, d_sigma = schedule.derivatives(t)
        det = alpha * d_sigma - sigma * d_alpha
        data, noise = (d_sigma / det, -sigma / det), (-d_alpha / det, alpha / det)
    else:
        data = (alpha / norm.square(), sigma / norm)
        noise = (sigma / norm.square(), -alpha / norm)
    return Coefficients(1 / norm if scaled else one, data, noise)


def target_of(prediction: Prediction, schedule: Schedule, t: Tensor, u: Tensor, eps: Tensor) -> Tensor:
    r"""What F is to be for a datum u under noise ε: what `coefficients_of` turns back into both.

    Args:
        prediction: what F is. schedule: of the noise.
        t: times, ``(rows,)``; u, eps: datum and noise in standard units, ``(rows, *event_shape)``.

    Returns:
        Tensor of the shape of u.

    Example:
        >>> import torch
        >>> from pyro_gen.distributions.noise import make_schedule
        >>> u, eps, t = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.0, 1.0])
        >>> target_of("v", make_schedule("cosine"), t, u, eps)[:, 0]  # α ε − σ u
        tensor([1., 0.])
    """
    check_prediction(prediction, schedule)

    def rows(value: Tensor) -> Tensor:
        return value.reshape(*value.shape, *[1] * (u.dim() - value.dim()))

    if prediction == "epsilon":
        return eps
    if prediction == "x0":
        return u
    if prediction == "velocity":
        d_alpha, d_sigma = schedule.derivatives(t)
        return rows(d_alpha) * u + rows(d_sigma) * eps
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if prediction == "score":
        return -eps / rows(sigma)
    if prediction == "v":
        return rows(alpha) * eps - rows(sigma) * u
    norm = (alpha.square() + sigma.square()).sqrt()
    return rows(sigma / norm) * u - rows(alpha / norm) * eps


def linear_answer(prediction: Prediction, schedule: Schedule) -> tuple[float, float] | None:
    r"""What F is for standard normal data: (p, q) of :math:`F = (p\, \bar\sigma + q\, \bar\alpha)\, \bar y`.

    With y scaled to variance 1, :math:`\bar y = y/r` and :math:`\bar\sigma = \sigma/r, \bar\alpha = \alpha/r`: the
    ``linear`` of a gated network (`pyro_gen.nn.time.LevelGate`). None where F has no such form and does not vanish
    beside it at both ends, so that the network is to go without a gate: for the score, and for the velocity of a
    schedule that is no straight line.
    """
    check_prediction(prediction, schedule)
    if prediction == "velocity":
        times = torch.tensor([0.25, 0.75], dtype=torch.float64, device="cpu")
        straight = bool(
            torch.allclose(schedule.alpha(times), 1 - times) and torch.allclose(schedule.sigma(times), times)
        )
        return (1.0, -1.0) if straight else None
    return {"epsilon": (1.0, 0.0), "x0": (0.0, 1.0), "v": (0.0, 0.0), "edm": (0.0, 0.0)}.get(prediction)
