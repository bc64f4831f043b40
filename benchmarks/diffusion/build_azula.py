"""azula: its samplers on its own schedule, with the lighter of its two denoisers, which predicts the datum.

The network is the same, its output only stands for another thing. DPM-Solver++(2M) is called ``xEABSampler(order=2)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from azula.denoise import SimpleDenoiser
from azula.noise import VPSchedule
from azula.sample import DDIMSampler, DDPMSampler, xEABSampler
from torch import Tensor, nn

from diffusion.contract import FEATURES, Case


class Rows(nn.Module):
    """azula tells the network one level for all rows."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(y, t.expand(len(y)))
        return out


def draws(case: Case, net: nn.Module, steps: int, rows: int) -> Callable[[], Tensor]:
    kinds: dict[Case, Any] = {"ddpm": DDPMSampler, "ddim": DDIMSampler, "dpm++2m": xEABSampler}
    sampler = kinds[case](SimpleDenoiser(Rows(net), VPSchedule()), steps=steps, silent=True)
    return lambda: sampler(sampler.init((rows, FEATURES)))
