"""Families of generative models, one a file."""

from pyro_gen.programs.autoregressive import Autoregressive
from pyro_gen.programs.diffusion import Diffusion
from pyro_gen.programs.ebm import EBM
from pyro_gen.programs.flow import Flow
from pyro_gen.programs.gan import GAN
from pyro_gen.programs.vae import VAE

__all__ = ["EBM", "GAN", "VAE", "Autoregressive", "Diffusion", "Flow"]
