"""Evidence: log p(x) of each row, with its kind (exact, bound, estimate) and its error, by the method of one's choice."""

from pyro_gen.evidence.importance import ImportanceSampling, log_evidence

__all__ = ["ImportanceSampling", "log_evidence"]
