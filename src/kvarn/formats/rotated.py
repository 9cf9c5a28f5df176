"""Vectors turned so that no channel stands out before they are encoded."""

import math
from copy import copy

import torch
from torch import Tensor

from ..errors import RecipeError
from .base import Rows
from .integer import Int
from .mapped import Mapped
from .packing import places_dtype


class Rotated(Mapped):
    """Vectors of ``size`` numbers in the format ``inner``, after a Walsh-Hadamard transform of each ``block`` of
    consecutive channels, and turned back on reading.

    ``means`` ([layers, KV heads, size], of each layer's vectors): after the transform the channels are encoded in
    ascending order of theirs, so that those that share a scale are alike (RotateKV, arXiv 2501.16383, sections 4.1 and
    4.2). The rank of each channel is what the layer shares.
    """

    inner: Int
    _rank: Tensor  # int64 [R, size] of the heads that the format was given

    def __init__(self, inner: Int, block: int, size: int, means: Tensor | None = None):
        if block & (block - 1) or size % block:
            raise RecipeError(f"a Hadamard transform of {block} channels: needs a power of two that divides {size}")
        self.inner, self.block = inner, block
        self.unit, self.layout = inner.unit, inner.layout
        self.name = f"rotated{block}{'' if means is None else ' ordered'} {inner.name}"
        if means is not None:
            order = self._turned(means).argsort(dim=-1)
            self.shared = {"rank": order.argsort(dim=-1).to(places_dtype(size))}

    def given(self, state: Rows) -> "Rotated":
        bound = copy(self)
        if self.shared:
            bound._rank = state["rank"].long()
        return bound

    def encode(self, x: Tensor) -> Rows:
        return self.inner.encode(self._ordered(self._turned(x)))

    def decode(self, rows: Rows) -> Tensor:
        turned = self.inner.decode(rows)
        if self.shared:
            turned = turned.gather(-1, self._rank[:, None].expand_as(turned))
        return self._turned(turned)

    def asked(self, query: Tensor) -> Tensor:
        return self._ordered(self._turned(query.float()))

    def _ordered(self, turned: Tensor) -> Tensor:
        return turned.scatter(-1, self._rank[:, None].expand_as(turned), turned) if self.shared else turned

    def _turned(self, x: Tensor) -> Tensor:
        return hadamard(x.float().unflatten(-1, (-1, self.block))).flatten(-2).to(x.dtype)


def hadamard(x: Tensor) -> Tensor:
    """The normalized Walsh-Hadamard transform over the last dimension (a power of two): its own inverse."""
    size = x.shape[-1]
    # H of a * b is the Kronecker product of those of a and b: two small products in place of a large one.
    rows = 1 << (size.bit_length() // 2)
    left, right = (_matrix(n, x) for n in (rows, size // rows))
    return (left @ x.unflatten(-1, (rows, -1)) @ right).flatten(-2) / math.sqrt(size)


def _matrix(size: int, like: Tensor) -> Tensor:
    """Entry (i, j) is 1 where i and j have an even number of bits in common, else -1."""
    matrix = like.new_ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
