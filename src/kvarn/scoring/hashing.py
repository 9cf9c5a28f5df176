"""Numbers that look random and are the same in every run, alone or in a batch."""

from torch import Tensor


def mixed(x: Tensor) -> Tensor:
    """A hash of 32-bit integers (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16 & 0xFFFF)) * -0x7A143595
    x = (x ^ (x >> 13 & 0x7FFFF)) * -0x3D4D51CB
    return x ^ (x >> 16 & 0xFFFF)
