"""Numbers as the nearest of a few levels that a calibration has placed, beside the numbers that stretch the ranges."""

import math
from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor

from ..errors import RecipeError
from .base import Format, Rows
from .packing import FIELDS, pack, packed_size, places_dtype, unpack


class NonUniform(Format):
    """A code a number for the level nearest to it once its range is brought to [-1, 1], and ``exact`` numbers of each
    vector as they are (KVQuant, arXiv 2401.18079, sections 3.1 to 3.4).

    ``shared`` names what a layer shares, [layers, KV heads, …] each: ``levels`` (fp32 [2**bits], ascending), perhaps
    ``read`` (fp32 [2**bits]: what the levels are read as, where that differs), and perhaps ``center`` and ``half``
    ([size]): the range of each channel, fixed beforehand. Without these a vector has a range of its own, that of what
    is left of it when ``exact / 2`` numbers go at either end. With them, the exact numbers are those farthest from
    their channel's center, and what lies beyond a range is read as its end.
    """

    _shared: Rows  # of the heads that the format was given, [R, *shape]

    def __init__(self, bits: int, exact: int, shared: Mapping[str, Tensor], size: int, dtype: torch.dtype):
        if bits not in FIELDS:
            raise RecipeError(f"bits={bits}: use {', '.join(map(str, FIELDS))}")
        if size % 8:
            raise RecipeError(f"packed codes need vectors of a multiple of 8 numbers; these have {size}")
        self.bits, self.exact, self.shared, self.size, self.dtype = bits, exact, shared, size, dtype
        self.fixed = "center" in shared
        self.name = f"nonuniform{bits}/{'channel' if self.fixed else 'token'}+exact{exact}"
        self.layout = {
            "codes": ((packed_size(size, bits),), torch.uint8),
            "exact": ((exact,), dtype),
            "places": ((exact,), places_dtype(size)),
        }
        if not self.fixed:
            self.layout |= {"center": ((), dtype), "half": ((), dtype)}

    def given(self, state: Rows) -> "NonUniform":
        bound = copy(self)
        bound._shared = {name: state[name] for name in self.shared}
        return bound

    def encode(self, x: Tensor) -> Rows:
        numbers = x.float()
        if self.fixed:
            rows = {}
            scaled = self._scaled(numbers, self._ranges({}))
            places = scaled.abs().topk(self.exact, sorted=False).indices
        else:
            each = self.exact // 2
            order = numbers.argsort(-1)
            places = torch.cat([order[..., :each], order[..., self.size - each :]], -1)
            inner = numbers.gather(-1, order[..., each : self.size - each])
            # Where every number is exact there is no range; any will do.
            low, high = (inner[..., 0], inner[..., -1]) if inner.shape[-1] else (numbers.amin(-1), numbers.amax(-1))
            rows = {"center": ((high + low) / 2).to(self.dtype), "half": ((high - low) / 2).to(self.dtype)}
            scaled = self._scaled(numbers, self._ranges(rows))
        codes = torch.searchsorted(self._borders, scaled.flatten(1)).view_as(scaled)
        packed = pack(codes.to(torch.uint8), self.bits)
        exact = x.gather(-1, places)
        return rows | {"codes": packed, "exact": exact, "places": places.to(self.layout["places"][1])}

    def decode(self, rows: Rows) -> Tensor:
        codes = unpack(rows["codes"], self.bits)
        read = self._shared.get("read", self._shared["levels"])
        center, half = self._ranges(rows)
        numbers = read.gather(-1, codes.flatten(1).long()).view(codes.shape) * half + center
        return numbers.to(self.dtype).scatter(-1, rows["places"].long(), rows["exact"])

    @property
    def _borders(self) -> Tensor:
        """What lies between two levels goes to the nearer one: [R, 2**bits - 1]."""
        levels = self._shared["levels"]
        return ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()

    def _ranges(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Centers and half widths in fp32: [R, 1, size] or [R, tokens, 1]."""
        if self.fixed:
            return self._shared["center"].float()[:, None], self._shared["half"].float()[:, None]
        return rows["center"].float()[..., None], rows["half"].float()[..., None]

    def _scaled(self, numbers: Tensor, ranges: tuple[Tensor, Tensor]) -> Tensor:
        """``numbers`` with their ranges at [-1, 1]; those of a range of one point are at 0."""
        center, half = ranges
        return torch.where(half > 0, (numbers - center) / half, 0)


def exact_numbers(share: float, size: int) -> int:
    """How many of ``size`` numbers lie at or beyond the quantiles ``share / 2`` and ``1 - share / 2``; 0 for no
    share."""
    each = math.floor(share / 2 * (size - 1)) + 1 if share else 0
    return 2 * min(each, size // 2)
