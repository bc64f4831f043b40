"""Cache-free bijections: the value and log|det| in one pass, both ways.

Elementwise maps (`Shift`, `Affine`, `Spline`, `CircularSpline`) say how one number is mapped; layers (`Elementwise`,
`Coupling`, `MaskedAutoregressive`) say where the parameters come from; linear layers (`ActNorm`, `LUMixing`,
`Rotation`, `Permute`, `Flip`) mix features; `Compose` and `Inverse` put them together.
"""

from pyro_gen.transforms.affine import Affine, Shift
from pyro_gen.transforms.autoregressive import MaskedAutoregressive
from pyro_gen.transforms.bijections import Bijection, Compose, Flip, Inverse, Permute
from pyro_gen.transforms.coupling import Coupling
from pyro_gen.transforms.elementwise import Elementwise, ElementwiseMap
from pyro_gen.transforms.linear import ActNorm, LUMixing, Rotation
from pyro_gen.transforms.spline import CircularSpline, Spline

__all__ = [
    "ActNorm",
    "Affine",
    "Bijection",
    "CircularSpline",
    "Compose",
    "Coupling",
    "Elementwise",
    "ElementwiseMap",
    "Flip",
    "Inverse",
    "LUMixing",
    "MaskedAutoregressive",
    "Permute",
    "Rotation",
    "Shift",
    "Spline",
]
