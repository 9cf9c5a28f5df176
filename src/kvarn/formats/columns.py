"""Numbers kept beside each entry: its position, what has been observed of it, and the like."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Format, Rows

ColumnType = torch.dtype | tuple[tuple[int, ...], torch.dtype]  # a scalar, or a shape and its dtype


class Columns(Format):
    """Of each token one scalar, or a small tensor of a fixed shape, for each named column."""

    name = "columns"

    def __init__(self, columns: Mapping[str, ColumnType]):
        self.layout = {name: kind if isinstance(kind, tuple) else ((), kind) for name, kind in columns.items()}

    def encode(self, x: Tensor) -> Rows:
        raise TypeError("columns are stored as they are: append rows, not vectors")

    def decode(self, rows: Rows) -> Tensor:
        raise TypeError("columns are read by name, not decoded")
