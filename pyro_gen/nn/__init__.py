"""Networks, no probability: every one takes any leading batch dimensions."""

from pyro_gen.nn.conv import ConvDecoder, ConvEncoder
from pyro_gen.nn.energies import RBM, EnergyMLP
from pyro_gen.nn.masked import MaskedMLP
from pyro_gen.nn.mlp import MLP
from pyro_gen.nn.time import TimeMLP
from pyro_gen.nn.unet import ConvTime

__all__ = ["MLP", "RBM", "ConvDecoder", "ConvEncoder", "ConvTime", "EnergyMLP", "MaskedMLP", "TimeMLP"]
