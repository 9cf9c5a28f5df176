"""Numbers as their signs times a magnitude for each channel."""

import torch
from torch import Tensor

from ..errors import RecipeError
from .base import Format, Rows
from .integer import Int
from .packing import pack, packed_size, unpack


class Signs(Format):
    """Of each vector the first ``wide`` numbers as 2-bit codes, a scale for each channel of ``group`` consecutive
    tokens, and of the others a bit a number: its sign, times the mean magnitude of its channel over these tokens.
    """

    def __init__(self, wide: int, group: int, size: int, dtype: torch.dtype):
        others = size - wide
        if not wide or wide % 8 or others % 8:
            raise RecipeError(f"{wide} channels of 2 bits and {others} of 1: both must be multiples of 8 above 0")
        self.codes = Int(2, "channel", group, wide, dtype)
        self.unit, self.wide, self.size, self.dtype = group, wide, size, dtype
        self.name = f"signs{wide}/{size}"
        self.layout = {
            **self.codes.layout,
            "signs": ((group, packed_size(others, 1)), torch.uint8),
            "magnitude": ((others,), dtype),
        }

    def encode(self, x: Tensor) -> Rows:
        wide, others = x.split([self.wide, self.size - self.wide], -1)
        groups = others.unflatten(-2, (-1, self.unit)).float()
        signs = pack((groups >= 0).to(torch.uint8), 1)
        return self.codes.encode(wide) | {"signs": signs, "magnitude": groups.abs().mean(-2).to(self.dtype)}

    def decode(self, rows: Rows) -> Tensor:
        wide = self.codes.decode({name: rows[name] for name in self.codes.layout})
        signs = unpack(rows["signs"], 1).to(self.dtype).mul_(2).sub_(1)
        return torch.cat([wide, (signs * rows["magnitude"].unsqueeze(-2)).flatten(-3, -2)], -1)
