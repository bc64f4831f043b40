"""Cache-free bijections: the value and log|det| in one pass, both ways.

Elementwise maps (`Shift`, `Affine`, `Spline`, `CircularSpline`) say how one number is mapped; layers (`Elementwise`,
`Coupling`, `MaskedAutoregressive`) say where the parameters come from; linear layers (`ActNorm`, `LUMixing`,
`Rotation`, `Permute`, `Flip`) mix features; `Sylvester`, `BlockAutoregressive` (and what is derived from `Triangular`)
are inverted numerically, `ContinuousFlow` by its differential equation; `Interval`, `StickBreaking`, `Rescale` and
`Standardise` are where data begin; `Compose` and `Inverse` put them together.
"""

from pyro_gen.transforms.affine import Affine, Shift
from pyro_gen.transforms.autoregressive import MaskedAutoregressive
from pyro_gen.transforms.bijections import Bijection, Compose, Flip, Inverse, Permute
from pyro_gen.transforms.block_autoregressive import BlockAutoregressive
from pyro_gen.transforms.continuous import ContinuousFlow
from pyro_gen.transforms.coupling import Coupling
from pyro_gen.transforms.elementwise import Elementwise, ElementwiseMap
from pyro_gen.transforms.linear import ActNorm, LUMixing, Rotation
from pyro_gen.transforms.numerical import Triangular
from pyro_gen.transforms.rescale import Rescale
from pyro_gen.transforms.simplex import StickBreaking
from pyro_gen.transforms.spline import CircularSpline, Spline
from pyro_gen.transforms.standardise import Standardise
from pyro_gen.transforms.supports import Interval
from pyro_gen.transforms.sylvester import Sylvester

__all__ = [
    "ActNorm",
    "Affine",
    "Bijection",
    "BlockAutoregressive",
    "CircularSpline",
    "Compose",
    "ContinuousFlow",
    "Coupling",
    "Elementwise",
    "ElementwiseMap",
    "Flip",
    "Interval",
    "Inverse",
    "LUMixing",
    "MaskedAutoregressive",
    "Permute",
    "Rescale",
    "Rotation",
    "Shift",
    "Spline",
    "Standardise",
    "StickBreaking",
    "Sylvester",
    "Triangular",
]
