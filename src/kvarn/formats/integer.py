"""Asymmetric round-to-nearest integers with a scale and a minimum for each group of numbers."""

from typing import Literal

import torch
from torch import Tensor

from ..errors import RecipeError
from .base import Format, Rows
from .packing import FIELDS, pack, packed_size, unpack

Axis = Literal["channel", "token"]


class Int(Format):
    """Codes of ``bits`` bits; ``code * scale + minimum`` gives the number back, within half a scale.

    ``axis="token"``: the numbers of one token in ``group`` consecutive channels share a scale (unit: one token).
    ``axis="channel"``: one channel of ``group`` consecutive tokens shares a scale (unit: ``group`` tokens).
    Scales and minima are kept side by side (``range``), so that a kernel loads both at once: in the model's dtype, but
    for bf16 in fp16, which is as wide, more exact, and what kernels multiply codes with. Codes are packed along the
    channels. The largest and the smallest of the numbers that share a scale are multiplied
    by ``clip`` first; what lies beyond then is read as they are.
    """

    def __init__(self, bits: int, axis: Axis, group: int, size: int, dtype: torch.dtype, clip: float = 1.0):
        if bits not in FIELDS or bits == 1:
            raise RecipeError(f"bits={bits}: use 2, 3, 4 or 8")
        if size % 8:
            raise RecipeError(f"integer formats need vectors of a multiple of 8 numbers; these have {size}")
        self.bits, self.axis, self.size, self.dtype, self.clip = bits, axis, size, dtype, clip
        self.name = f"int{bits}/{axis}"
        number = torch.float16 if dtype == torch.bfloat16 else dtype
        packed = packed_size(size, bits)
        if axis == "channel":
            self.unit = self.group = group
            self.layout = {
                "codes": ((group, packed), torch.uint8),
                "range": ((size, 2), number),
            }
        else:
            self.group = min(group, size)
            if size % self.group:
                raise RecipeError(f"group={group} does not divide the head size {size}: use a divisor of it")
            self.layout = {
                "codes": ((packed,), torch.uint8),
                "range": ((size // self.group, 2), number),
            }

    @property
    def key(self) -> tuple:
        return (*super().key, str(self.dtype))

    def encode(self, x: Tensor) -> Rows:
        groups = self._grouped(x).float()
        dim = self._group_dim
        minimum, maximum = groups.amin(dim) * self.clip, groups.amax(dim) * self.clip
        # A tensor there: by a number torch multiplies with its inverse on CUDA, which rounds otherwise than a division.
        levels = torch.full((), 2**self.bits - 1, dtype=torch.float32, device=x.device)
        scale, minimum = self._numbers((maximum - minimum) / levels), self._numbers(minimum)
        # The stored (rounded) scale decides the codes; a constant group has scale 0 and codes 0.
        step = scale.float().unsqueeze(dim)
        offset = groups - minimum.float().unsqueeze(dim)
        codes = torch.where(step > 0, offset / step, 0).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)
        return {"codes": pack(self._ungrouped(codes), self.bits), "range": torch.stack([scale, minimum], -1)}

    def decode(self, rows: Rows) -> Tensor:
        dim = self._group_dim
        # fp32, so that the product and the sum are rounded to the model's dtype once.
        x = self._regrouped(unpack(rows["codes"], self.bits)).float()
        scale, minimum = (numbers.unsqueeze(dim) for numbers in rows["range"].unbind(-1))
        x = x.mul_(scale).add_(minimum).to(self.dtype)
        return x.flatten(-3, -2) if self.axis == "channel" else x.flatten(-2)

    def _numbers(self, x: Tensor) -> Tensor:
        """As they are stored, the largest there is in place of what is beyond."""
        _, number = self.layout["range"]
        most = min(torch.finfo(number).max, torch.finfo(x.dtype).max)  # a model may be in fp64
        return x.clamp(-most, most).to(number)

    @property
    def _group_dim(self) -> int:
        return -2 if self.axis == "channel" else -1

    def _grouped(self, x: Tensor) -> Tensor:
        """[..., n, size] -> [..., n / group, group, size] or [..., n, size / group, group]."""
        return x.unflatten(-2, (-1, self.group)) if self.axis == "channel" else x.unflatten(-1, (-1, self.group))

    def _ungrouped(self, codes: Tensor) -> Tensor:
        return codes if self.axis == "channel" else codes.flatten(-2)

    def _regrouped(self, codes: Tensor) -> Tensor:
        return codes if self.axis == "channel" else codes.unflatten(-1, (-1, self.group))
