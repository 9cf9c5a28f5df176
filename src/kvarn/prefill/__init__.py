"""What a prompt computes: which tokens go on to later layers."""

from .propagation import Carried, Propagation

__all__ = ["Carried", "Propagation"]
