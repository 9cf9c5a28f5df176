"""Two bits for the channels of a head that vary most, the signs of a spectrum for the others."""

from copy import copy
from functools import cache

import torch
from torch import Tensor

from .base import Rows
from .mapped import Mapped
from .signs import Signs


class Spectral(Mapped):
    """Of each head, ``wide`` channels as 2-bit codes, and of the others' Fourier transform along the channels a bit a
    number (arXiv 2503.16257).

    The channels with the largest range in the head's first prompt are the wide ones; the head's state are all channels,
    these first. The transform of a real vector of m numbers has m real numbers in it; each has a sign, and the mean
    magnitude over ``group`` consecutive tokens.
    """

    inner: Signs
    _order: Tensor  # int64 [R, size] of the heads that the format was given

    def __init__(self, wide: int, group: int, size: int, dtype: torch.dtype):
        self.inner = Signs(wide, group, size, dtype)
        self.unit, self.layout = self.inner.unit, self.inner.layout
        self.name = f"spectral{wide}/{size}"
        self.state = {"order": ((size,), torch.int16)}

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        absent = ~held[..., None]
        ranges = x.masked_fill(absent, -torch.inf).amax(1) - x.masked_fill(absent, torch.inf).amin(1)
        widest = ranges.topk(self.inner.wide, sorted=False).indices
        others = torch.ones_like(ranges, dtype=torch.uint8).scatter_(1, widest, 0)
        return {"order": others.argsort(dim=1, stable=True).to(torch.int16)}

    def given(self, state: Rows) -> "Spectral":
        bound = copy(self)
        bound._order = state["order"].long()
        return bound

    def encode(self, x: Tensor) -> Rows:
        wide, others = self._parted(x.gather(-1, self._places(x.shape[1])))
        return self.inner.encode(torch.cat([wide, _spectrum(others)], -1))

    def decode(self, rows: Rows) -> Tensor:
        numbers = self.inner.decode(rows)
        wide, spectrum = self._parted(numbers)
        x = torch.cat([wide, _vectors(spectrum)], -1).to(numbers.dtype)
        return x.scatter(-1, self._places(x.shape[1]), x)

    def asked(self, query: Tensor) -> Tensor:
        wide, others = self._parted(query.gather(-1, self._places(query.shape[1])))
        return torch.cat([wide, others @ _products(others.shape[-1], others.device)], -1)

    def _parted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first numbers of vectors, and the others, in fp32."""
        wide, others = x.float().split([self.inner.wide, self.inner.size - self.inner.wide], -1)
        return wide, others

    def _places(self, tokens: int) -> Tensor:
        return self._order[:, None].expand(-1, tokens, -1)


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


@cache
def _products(m: int, device: torch.device) -> Tensor:
    """The matrix [m, m] that makes of a vector of m numbers what spectra are multiplied with in its place. Made once,
    before a pass is captured: its transform could not be."""
    return _vectors(torch.eye(m, device=device)).T.contiguous()
