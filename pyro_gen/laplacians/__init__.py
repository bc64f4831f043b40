"""Gradient and Laplacian of log-densities in x, row by row: the second derivatives of score matching.

`derivatives` gives both at once, by the forward Laplacian where every operation has a rule, else by reverse passes or
by `vmap` of forward over reverse; `choose` decides between them once. `kinks` names the piecewise-linear functions
that make such derivatives meaningless for score matching. `lift` is the tensor that carries them through torch code.
"""

from pyro_gen.laplacians import (  # noqa: F401  they enter their rules
    casts,
    constants,
    einsums,
    elementwise,
    normalise,
    products,
    views,
)
from pyro_gen.laplacians.kinks import kinks
from pyro_gen.laplacians.lifted import Lifted, lift
from pyro_gen.laplacians.methods import Derivatives, Method, choose, derivatives
from pyro_gen.laplacians.rules import NoRule

__all__ = ["Derivatives", "Lifted", "Method", "NoRule", "choose", "derivatives", "kinks", "lift"]
