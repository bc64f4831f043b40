"""pyro_gen: `ReverseDiffusion` on a `Diffusion` of 1000 steps with that network."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from diffusion.contract import FEATURES, TRAINED, Case
from pyro_gen.programs.diffusion import Diffusion
from pyro_gen.samplers.reverse import Method, ReverseDiffusion

METHODS: dict[Case, Method] = {"ddpm": "ancestral", "ddim": "ddim", "dpm++2m": "dpm++2m"}


def program(net: nn.Module) -> Diffusion:
    """With the posterior's variance, as the others have by default."""
    return Diffusion(FEATURES, network=net, schedule="linear", timesteps=TRAINED, standardise=False, variance="small")


def draws(case: Case, net: nn.Module, steps: int, rows: int) -> Callable[[], Tensor]:
    diffusion, sampler = program(net), ReverseDiffusion(METHODS[case], steps)
    return lambda: sampler.sample(diffusion, rows, progress=False)


def ends(case: Case, net: nn.Module, times: list[int], start: Tensor) -> Tensor:
    diffusion = program(net).to(start.dtype)
    grid = diffusion.model.grid[1:][times]
    return ReverseDiffusion(METHODS[case], grid=grid).sample(diffusion, len(start), start=start)
