"""Flows as guides: what stands in for the integral over latents, and what makes a posterior easy to sample."""

from pyro_gen.guides.amortized_flow import AmortizedFlow
from pyro_gen.guides.conditional import ConditionalFlow, Located, centre
from pyro_gen.guides.neutra import NeuTra, TorchTransform

__all__ = ["AmortizedFlow", "ConditionalFlow", "Located", "NeuTra", "TorchTransform", "centre"]
