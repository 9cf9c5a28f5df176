"""The largest numbers of each vector, packed, and a bitmap of where they stand."""

import torch
from torch import Tensor

from ..errors import RecipeError
from .base import Format, Rows
from .packing import pack, packed_size, unpack


class Sparse(Format):
    """The ``kept`` numbers of each vector that are largest in magnitude, in the model's dtype; the others read as 0.

    Every vector keeps exactly as many, so that all rows have one size; of equal magnitudes any may stay.
    """

    def __init__(self, kept: int, size: int, dtype: torch.dtype):
        if size % 8:
            raise RecipeError(f"bitmaps need vectors of a multiple of 8 numbers; these have {size}")
        self.kept, self.size = kept, size
        self.name = f"sparse{kept}/{size}"
        self.layout = {"bitmap": ((packed_size(size, 1),), torch.uint8), "numbers": ((kept,), dtype)}

    def encode(self, x: Tensor) -> Rows:
        largest = x.abs().topk(self.kept, sorted=False).indices.sort(-1).values
        stays = torch.zeros_like(x, dtype=torch.uint8).scatter_(-1, largest, 1)
        return {"bitmap": pack(stays, 1), "numbers": x.gather(-1, largest)}

    def decode(self, rows: Rows) -> Tensor:
        stays = unpack(rows["bitmap"], 1)
        place = stays.cumsum(-1, dtype=torch.int32).sub_(1).clamp_(min=0).long()
        return rows["numbers"].gather(-1, place).mul_(stays)
