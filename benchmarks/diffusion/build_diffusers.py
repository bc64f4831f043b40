"""diffusers: its schedulers in the loop of its documentation, nothing clipped.

What the network is told of each level is made beforehand, so that only the scheduler's own work is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

from diffusion.contract import FEATURES, TRAINED, Case


def scheduler(case: Case) -> Any:
    if case == "dpm++2m":
        return DPMSolverMultistepScheduler(num_train_timesteps=TRAINED)
    kind = DDPMScheduler if case == "ddpm" else DDIMScheduler
    return kind(num_train_timesteps=TRAINED, clip_sample=False)


@torch.no_grad()
def loop(scheduler: Any, net: nn.Module, levels: list[Tensor], y: Tensor) -> Tensor:
    for k, level in zip(scheduler.timesteps, levels, strict=True):
        y = scheduler.step(net(y, level), k, y, return_dict=False)[0]
    return y


def draws(case: Case, net: nn.Module, steps: int, rows: int) -> Callable[[], Tensor]:
    own = scheduler(case)
    own.set_timesteps(steps)
    levels = list(((own.timesteps + 1) / TRAINED).float().unsqueeze(1).repeat(1, rows).unbind())

    def run() -> Tensor:
        own.set_timesteps(steps)  # forgets the run before
        return loop(own, net, levels, torch.randn(rows, FEATURES) * own.init_noise_sigma)

    return run


def ends(case: Case, net: nn.Module, times: list[int], start: Tensor) -> Tensor:
    """DDIM's stride is fixed: its levels are set by hand, one step at a time."""
    own = scheduler(case)
    if case == "dpm++2m":
        own.set_timesteps(timesteps=times)
        return loop(own, net, [start[:, 0]] * len(times), start)
    y = start
    for k, after in zip(times, [*times[1:], -1], strict=True):
        own.num_inference_steps, own.config.num_train_timesteps = 1, k - after  # the stride it computes
        with torch.no_grad():
            y = own.step(net(y, start[:, 0]), k, y, eta=0.0, return_dict=False)[0]
    return y
