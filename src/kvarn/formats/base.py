"""What a format is: how the keys or the values of a head are encoded as rows of small tensors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Rows = dict[str, Tensor]


class Format(ABC):
    """An encoding of vectors of one size, in units of ``unit`` consecutive tokens.

    A unit is the least that can be encoded or decoded alone: one token for most formats, a group of tokens where they
    share scales. ``layout`` names the tensors of one unit with shape and dtype; the memory stores exactly these.
    """

    unit: int = 1
    name: str
    layout: Layout

    @abstractmethod
    def encode(self, x: Tensor) -> Rows:
        """``x`` of [..., tokens, size], tokens a multiple of ``unit`` -> tensors of [..., tokens / unit, *shape]."""

    @abstractmethod
    def decode(self, rows: Rows) -> Tensor:
        """The inverse of ``encode``, up to the format's loss, in the dtype of the model."""

    @property
    def unit_bytes(self) -> int:
        """Exact bytes of one unit, scales and other metadata included."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.layout.values())

    @property
    def key(self) -> tuple:
        """Formats with equal keys can share a pool."""
        return (self.name, self.unit, tuple(sorted((k, s, str(d)) for k, (s, d) in self.layout.items())))
