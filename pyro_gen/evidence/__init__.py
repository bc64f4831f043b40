"""Evidence: log p(x) of each row, with its kind (exact, bound, estimate) and its error, by a method of one's choice."""

from pyro_gen.evidence.importance import ImportanceSampling
from pyro_gen.evidence.methods import log_evidence

__all__ = ["ImportanceSampling", "log_evidence"]
