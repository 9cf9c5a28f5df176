"""Codes of 1, 2, 3, 4 or 8 bits in bytes, little-endian: code j of a byte lies at bits [width * j, width * (j + 1))."""

import torch
from torch import Tensor

# Three bits are two fields, so that every field fills bytes exactly: the low two bits, then the high one.
FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take; ``count`` is a multiple of 8."""
    return count * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes of [..., n], each below 2**bits, n a multiple of 8 -> uint8 of [..., n * bits / 8]."""
    fields, low = [], 0
    for width in FIELDS[bits]:
        field = (codes >> low) & (2**width - 1)
        field = field.unflatten(-1, (-1, 8 // width)) << _shifts(width, codes.device)
        fields.append(field.sum(-1, dtype=torch.uint8))
        low += width
    return fields[0] if len(fields) == 1 else torch.cat(fields, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 of [..., n * bits / 8] -> uint8 codes of [..., n]."""
    count = packed.shape[-1] * 8 // bits
    codes, low = None, 0
    for field, width in zip(
        packed.split([count * width // 8 for width in FIELDS[bits]], -1), FIELDS[bits], strict=True
    ):
        part = field if width == 8 else ((field[..., None] >> _shifts(width, packed.device)) & (2**width - 1)).flatten(-2)
        codes = part if codes is None else codes | (part << low)
        low += width
    assert codes is not None
    return codes


def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)
