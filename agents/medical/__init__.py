"""Medical: general health information from documents and a graph, never a diagnosis."""

from llmos.agents.medical.program import Medical, MedicalConfig

__all__ = ["Medical", "MedicalConfig"]
