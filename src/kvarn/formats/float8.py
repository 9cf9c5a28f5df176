"""Eight-bit floating point with one scale for each vector."""

import torch
from torch import Tensor

from .base import Format, Rows

LARGEST = 448.0  # of e4m3


class Float8(Format):
    """Vectors of ``size`` numbers as e4m3 (four bits of exponent, three of mantissa) times a scale of their own, which
    brings the largest of them to the largest that e4m3 has: within a sixteenth of each number."""

    name = "float8"

    def __init__(self, size: int, dtype: torch.dtype):
        self.size, self.dtype = size, dtype
        # Bytes, because torch indexes few tensors of float8. A scale of four bytes can be loaded in the background.
        self.layout = {"codes": ((size,), torch.uint8), "scale": ((), torch.float32)}

    def encode(self, x: Tensor) -> Rows:
        # A tensor there: by a number torch multiplies with its inverse on CUDA, which rounds otherwise than a division.
        scale = x.abs().amax(-1).float() / torch.full((), LARGEST, dtype=torch.float32, device=x.device)
        codes = torch.where(scale[..., None] > 0, x.float() / scale[..., None], 0).to(torch.float8_e4m3fn)
        return {"codes": codes.view(torch.uint8), "scale": scale}

    def decode(self, rows: Rows) -> Tensor:
        return (rows["codes"].view(torch.float8_e4m3fn).float() * rows["scale"][..., None]).to(self.dtype)
