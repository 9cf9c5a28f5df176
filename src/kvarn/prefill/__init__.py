"""What a prompt computes: which tokens are read at once, and which go on to later layers."""

from .blocks import Reader, cuts, read_in_blocks
from .propagation import Carried, Propagation

__all__ = ["Carried", "Propagation", "Reader", "cuts", "read_in_blocks"]
