"""Codes of 1, 2, 3, 4 or 8 bits in bytes.

With c codes a byte, code i of n lies in byte i % (n / c), at bits width * (i // (n / c)): unpacking then writes c
contiguous runs, each by one shift and one mask.
"""

import torch
from torch import Tensor

# Three bits are two fields, so that every field fills bytes exactly: the low two bits, then the high one.
FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def places_dtype(count: int) -> torch.dtype:
    """The smallest integers that number ``count`` places."""
    return torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take; ``count`` is a multiple of 8."""
    return count * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes of [..., n], each below 2**bits, n a multiple of 8 -> uint8 of [..., n * bits / 8]."""
    fields, low = [], 0
    for width in FIELDS[bits]:
        runs = ((codes >> low) & (2**width - 1)).unflatten(-1, (8 // width, -1))
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)[:, None]
        fields.append((runs << shifts).sum(-2, dtype=torch.uint8))
        low += width
    return torch.cat(fields, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 of [..., n * bits / 8] -> uint8 codes of [..., n]."""
    count = packed.shape[-1] * 8 // bits
    sizes = [packed_size(count, width) for width in FIELDS[bits]]
    codes, low = None, 0
    for field, width in zip(packed.split(sizes, -1), FIELDS[bits], strict=True):
        part = torch.cat([(field >> shift) & (2**width - 1) for shift in range(0, 8, width)], -1)
        codes = part if codes is None else codes | (part << low)
        low += width
    assert codes is not None
    return codes
