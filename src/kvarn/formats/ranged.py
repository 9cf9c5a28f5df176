"""Integers of one range for each channel of a head, whatever its tokens."""

from copy import copy

import torch
from torch import Tensor

from ..errors import RecipeError
from .base import Format, Rows
from .mapped import Mapped
from .packing import FIELDS, pack, packed_size, unpack


class Codes(Format):
    """Vectors of ``size`` whole numbers of ``bits`` bits, packed along the channels."""

    def __init__(self, bits: int, size: int):
        if bits not in FIELDS or bits == 1:
            raise RecipeError(f"bits={bits}: use 2, 3, 4 or 8")
        if size % 8:
            raise RecipeError(f"integer formats need vectors of a multiple of 8 numbers; these have {size}")
        self.bits, self.size, self.name = bits, size, f"codes{bits}"
        self.layout = {"codes": ((packed_size(size, bits),), torch.uint8)}

    def encode(self, x: Tensor) -> Rows:
        return {"codes": pack(x.to(torch.uint8), self.bits)}

    def decode(self, rows: Rows) -> Tensor:
        return unpack(rows["codes"], self.bits).float()


class Ranged(Mapped):
    """Codes of ``bits`` bits between the least and the largest number of each channel, over all tokens of the segment.

    Both are the head's state and grow with what comes; a range that grew encodes anew what it held. The channel-wise
    quantization of ZipCache (arXiv 2405.14256).
    """

    _least: Tensor  # fp32 [R, 1, size] of the heads that the format was given
    _step: Tensor
    grows = True

    def __init__(self, bits: int, size: int, dtype: torch.dtype):
        self.inner = Codes(bits, size)
        self.bits, self.dtype, self.layout, self.name = bits, dtype, self.inner.layout, f"int{bits}/head"
        self.state = {"least": ((size,), dtype), "largest": ((size,), dtype)}

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        nothing = torch.full_like(x[:, 0], torch.inf)
        return {"least": nothing, "largest": -nothing}

    def grown(self, state: Rows, x: Tensor, held: Tensor) -> Rows:
        beyond = ~held[..., None]
        return {
            "least": state["least"].minimum(x.masked_fill(beyond, torch.inf).amin(1)),
            "largest": state["largest"].maximum(x.masked_fill(beyond, -torch.inf).amax(1)),
        }

    def given(self, state: Rows) -> "Ranged":
        bound = copy(self)
        bound._least = state["least"].float()[:, None]
        bound._step = (state["largest"].float()[:, None] - bound._least) / (2**self.bits - 1)
        return bound

    def encode(self, x: Tensor) -> Rows:
        offset = x.float() - self._least
        codes = torch.where(self._step > 0, offset / self._step, 0).round_().clamp_(0, 2**self.bits - 1)
        return self.inner.encode(codes)

    def decode(self, rows: Rows) -> Tensor:
        return self.inner.decode(rows).mul_(self._step).add_(self._least).to(self.dtype)

    def asked(self, query: Tensor) -> Tensor:
        return query.float() * self._step

    def offset(self, query: Tensor) -> Tensor:
        return (query.float() * self._least).sum(-1)
