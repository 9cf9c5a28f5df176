"""Two bits for the channels of a head that vary most, the signs of a spectrum for the others."""

from copy import copy

import torch
from torch import Tensor

from ..errors import RecipeError
from .base import Format, Rows
from .integer import Int
from .packing import pack, packed_size, unpack


class Spectral(Format):
    """Of each head, ``wide`` channels as 2-bit codes, and of the others' Fourier transform along the channels a bit a
    number (arXiv 2503.16257).

    The channels with the largest range in the head's first prompt are the wide ones: the head's state. The transform of
    a real vector of m numbers has m real numbers in it; each has a sign, and the mean magnitude over ``group``
    consecutive tokens.
    """

    _wide: Tensor  # int64 [R, wide] of the heads that the format was given, ascending, and the channels left over
    _others: Tensor

    def __init__(self, wide: int, group: int, size: int, dtype: torch.dtype):
        others = size - wide
        if not wide or wide % 8 or others % 8:
            raise RecipeError(f"{wide} channels of 2 bits and {others} of 1: both must be multiples of 8 above 0")
        self.codes = Int(2, "channel", group, wide, dtype)
        self.unit, self.size, self.others, self.dtype = group, size, others, dtype
        self.name = f"spectral{wide}/{size}"
        self.layout = {
            **self.codes.layout,
            "signs": ((group, packed_size(others, 1)), torch.uint8),
            "magnitude": ((others,), dtype),
        }
        self.state = {"wide": ((wide,), torch.int16)}

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        absent = ~held[..., None]
        ranges = x.masked_fill(absent, -torch.inf).amax(1) - x.masked_fill(absent, torch.inf).amin(1)
        widest = ranges.topk(self.codes.size, sorted=False).indices
        return {"wide": widest.sort(-1).values.to(torch.int16)}

    def given(self, state: Rows) -> "Spectral":
        bound = copy(self)
        bound._wide = state["wide"].long()
        taken = torch.zeros((bound._wide.shape[0], self.size), dtype=torch.uint8, device=bound._wide.device)
        bound._others = taken.scatter_(1, bound._wide, 1).argsort(dim=1, stable=True)[:, : self.others]
        return bound

    def encode(self, x: Tensor) -> Rows:
        rows = self.codes.encode(x.gather(-1, _places(self._wide, x.shape[1])))
        spectrum = _spectrum(x.gather(-1, _places(self._others, x.shape[1])).float()).unflatten(-2, (-1, self.unit))
        signs = pack((spectrum >= 0).to(torch.uint8), 1)
        return rows | {"signs": signs, "magnitude": spectrum.abs().mean(-2).to(self.dtype)}

    def decode(self, rows: Rows) -> Tensor:
        wide = self.codes.decode({name: rows[name] for name in self.codes.layout})
        signs = unpack(rows["signs"], 1).float().mul_(2).sub_(1)
        others = _vectors((signs * rows["magnitude"].float().unsqueeze(-2)).flatten(-3, -2)).to(self.dtype)
        x = wide.new_empty((*wide.shape[:-1], self.size))
        x.scatter_(-1, _places(self._wide, x.shape[1]), wide)
        return x.scatter_(-1, _places(self._others, x.shape[1]), others)


def _places(channels: Tensor, tokens: int) -> Tensor:
    return channels[:, None].expand(-1, tokens, -1)


def _spectrum(x: Tensor) -> Tensor:
    """[..., m] -> the m real numbers of its transform: real parts of bins 0 .. m/2, imaginary parts of 1 .. m/2 - 1
    (those of the first and the last are 0). The first and the last count once in a norm, the others twice."""
    if not x.numel():  # which not every library of transforms takes
        return x
    bins = torch.fft.rfft(x, norm="ortho")
    return torch.cat([bins.real, bins.imag[..., 1:-1]], -1)


def _vectors(spectrum: Tensor) -> Tensor:
    """The inverse of ``_spectrum``."""
    if not spectrum.numel():
        return spectrum
    m = spectrum.shape[-1]
    real, imaginary = spectrum.split([m // 2 + 1, m // 2 - 1], -1)
    return torch.fft.irfft(torch.complex(real, torch.nn.functional.pad(imaginary, (1, 1))), n=m, norm="ortho")
