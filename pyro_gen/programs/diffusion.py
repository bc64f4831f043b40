r"""Diffusion: data as what is left when noise is taken out, step by step; Z is bounded by the fixed noising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_gen.base import Coefficients, Noised, Nothing, Output, Program, Schedule
from pyro_gen.checks import as_shape, check_sizes
from pyro_gen.distributions.noise import NoiseSchedule, ScheduleName, make_schedule
from pyro_gen.distributions.parameterisations import Prediction, check_prediction, coefficients_of
from pyro_gen.nn import TimeMLP

__all__ = ["Diffusion"]


class DiffusionModel(nn.Module):
    """The model: the reverse chain."""

    location: Tensor
    scale: Tensor
    started: Tensor
    grid: Tensor

    def __init__(
        self, net: nn.Module, schedule: NoiseSchedule, event_shape: torch.Size, timesteps: int | None, own: bool
    ) -> None:
        super().__init__()
        self.net, self.schedule, self.event_shape, self.own = net, schedule, event_shape, own
        self.register_buffer("location", torch.zeros(event_shape))
        self.register_buffer("scale", torch.ones(event_shape))
        self.register_buffer("started", torch.tensor(False))
        grid = torch.empty(0) if timesteps is None else schedule.grid(timesteps)
        self.register_buffer("grid", grid.to(torch.get_default_dtype()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class _Flat(nn.Module):
    """The default network on data of any event shape."""

    def __init__(self, event_shape: torch.Size, context_features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        features = event_shape.numel()
        waves = 3 if features <= 4 else 0
        self.mlp = TimeMLP(features, features, hidden, context_features=context_features, waves=waves)

    def forward(self, y: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        flat = None if context is None else context.flatten(1)
        out: Tensor = self.mlp(y.flatten(1), level, flat)
        return out.reshape(y.shape)


class Diffusion(Noised):
    """Diffusion model."""

    model: DiffusionModel

    def __init__(
        self,
        event_shape: int | tuple[int, ...],
        network: nn.Module | None = None,
        schedule: ScheduleName | NoiseSchedule = "cosine",
        timesteps: int | None = 1000,
        prediction: Prediction = "epsilon",
        context_shape: int | tuple[int, ...] | None = None,
        *,
        form: Literal["collapsed", "sites"] = "collapsed",
        hidden: Sequence[int] = (128, 128, 128),
        standardise: bool = True,
    ) -> None:
        event = as_shape(event_shape)
        context = None if context_shape is None else as_shape(context_shape, "context_shape")
        levels = make_schedule(schedule)
        check_prediction(prediction, levels)
        own = network is None
        net = (
            _Flat(event, 0 if context is None else context.numel(), check_sizes(hidden)) if network is None else network
        )
        model = DiffusionModel(net, levels, event, timesteps, own)
        super().__init__(model, Nothing(), event, context, schedule=levels)
        self.prediction: Prediction = prediction
        self.timesteps, self.form, self.standardise = timesteps, form, standardise

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule

    @property
    def location(self) -> Tensor:
        return self.model.location

    @property
    def scale(self) -> Tensor:
        return self.model.scale

    @property
    def times(self) -> tuple[float, float]:
        if self.timesteps is None:
            return self.schedule.ends
        return float(self.model.grid[1]), float(self.model.grid[-1])

    def training_times(self, u: Tensor) -> Tensor:
        if self.timesteps is None:
            return super().training_times(u)
        return self.model.grid[1 + (u * self.timesteps).long().clamp(max=self.timesteps - 1)]

    def coefficients(self, t: Tensor) -> Coefficients:
        return coefficients_of(self.prediction, self.schedule, t, scaled=self.model.own or self.prediction == "edm")

    def levels(self, t: Tensor) -> Tensor:
        return -self.schedule.log_snr(t) / 2 if self.model.own else t

    def output(self, context: Tensor | None = None, guidance: float | None = None) -> Output:
        given: Any = () if context is None else (context,)
        net = self.model.net
        return lambda y, level: net(y, level, *given)

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        batch = Program.check(self, x, context)
        if bool(self.model.started):
            return
        self.model.started.fill_(True)
        if self.standardise:
            spread = batch[0].std(0, unbiased=False)
            self.model.location.copy_(batch[0].mean(0))
            self.model.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))
