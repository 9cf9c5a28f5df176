"""Entries as they come: one vector a token, in the model's dtype."""

import torch
from torch import Tensor

from .base import Format, Rows


class Dense(Format):
    """One vector of ``size`` numbers a token."""

    name = "dense"

    def __init__(self, size: int, dtype: torch.dtype):
        self.size = size
        self.layout = {"x": ((size,), dtype)}

    def encode(self, x: Tensor) -> Rows:
        return {"x": x}

    def decode(self, rows: Rows) -> Tensor:
        return rows["x"]
