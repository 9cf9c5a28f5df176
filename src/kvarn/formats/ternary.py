"""Numbers as minus one, zero or one times a scale for each channel, five to a byte."""

import torch
from torch import Tensor

from .base import Format, Rows

_DIGITS = 5  # 3**5 codes fit a byte
_PLACES = torch.tensor([3**i for i in range(_DIGITS)], dtype=torch.uint8)


class Ternary(Format):
    """Each channel of ``group`` consecutive tokens has a scale: numbers above ``threshold`` times their mean magnitude
    in the channel are it, numbers below the negative minus it, the others 0.

    The scale is the mean magnitude of the numbers that are not 0, which is the best for these codes.
    """

    def __init__(self, group: int, threshold: float, size: int, dtype: torch.dtype):
        self.unit, self.threshold, self.size, self.dtype = group, threshold, size, dtype
        self.name = "ternary/channel"
        self.layout = {
            "codes": ((group, -(-size // _DIGITS)), torch.uint8),
            "scale": ((size,), dtype),
        }

    def encode(self, x: Tensor) -> Rows:
        groups = x.unflatten(-2, (-1, self.unit)).float()
        magnitude = groups.abs()
        counts = magnitude > self.threshold * magnitude.mean(-2, keepdim=True)
        scale = (magnitude * counts).sum(-2) / counts.sum(-2).clamp(min=1)
        codes = (groups.sign() * counts + 1).to(torch.uint8)
        padded = torch.nn.functional.pad(codes, (0, -self.size % _DIGITS)).unflatten(-1, (-1, _DIGITS))
        packed = (padded * _PLACES.to(x.device)).sum(-1, dtype=torch.uint8)
        return {"codes": packed, "scale": scale.to(self.dtype)}

    def decode(self, rows: Rows) -> Tensor:
        digits = rows["codes"][..., None] // _PLACES.to(rows["codes"].device) % 3
        signs = digits.flatten(-2)[..., : self.size].to(self.dtype) - 1
        return (signs * rows["scale"].unsqueeze(-2)).flatten(-3, -2)
