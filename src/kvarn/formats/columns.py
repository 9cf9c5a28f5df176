"""Numbers kept beside each entry: its position, the attention mass it has received, and the like."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Format, Rows


class Columns(Format):
    """One scalar a token for each named column."""

    name = "columns"

    def __init__(self, dtypes: Mapping[str, torch.dtype]):
        self.layout = {name: ((), dtype) for name, dtype in dtypes.items()}

    def encode(self, x: Tensor) -> Rows:
        raise TypeError("columns are stored as they are: append rows, not vectors")

    def decode(self, rows: Rows) -> Tensor:
        raise TypeError("columns are read by name, not decoded")
