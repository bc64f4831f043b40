"""Evidence: log p(x) of each row, and log Z, with their kind (exact, bound, estimate) and their error."""

from pyro_gen.evidence.annealed import AnnealedImportanceSampling
from pyro_gen.evidence.bounds import LowerBound
from pyro_gen.evidence.enumeration import Enumeration
from pyro_gen.evidence.importance import ImportanceSampling
from pyro_gen.evidence.methods import log_evidence
from pyro_gen.evidence.normalizers import log_normalizer, normalized
from pyro_gen.evidence.quadrature import Quadrature

__all__ = [
    "AnnealedImportanceSampling",
    "Enumeration",
    "ImportanceSampling",
    "LowerBound",
    "Quadrature",
    "log_evidence",
    "log_normalizer",
    "normalized",
]
