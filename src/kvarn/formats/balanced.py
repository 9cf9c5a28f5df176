"""Keys whose outlier channels meet those of the queries in the middle before they are encoded."""

from copy import copy

import torch
from torch import Tensor

from .base import Format, Rows

_ALL = 1 << 40  # queries: those of the whole prompt


class Balanced(Format):
    """Vectors of ``size`` numbers in the format ``inner``, multiplied by a balance of their channels and divided by it
    on reading.

    The balance is sqrt(max |q| / max |k|) of each channel, over all queries of the prompt and all query heads of the KV
    head, and over the tokens that the prompt leaves; 1 where either is all zeros. The head's state (MiKV, arXiv
    2402.18096, equation 2).
    """

    _balance: Tensor  # [R, 1, size] of the heads that the format was given
    watched = _ALL

    def __init__(self, inner: Format, size: int, dtype: torch.dtype):
        self.inner = inner
        self.unit, self.layout, self.name = inner.unit, inner.layout, f"balanced {inner.name}"
        self.state = {"balance": ((size,), dtype)}
        self._dtype = dtype

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        keys = x.abs().masked_fill(~held[..., None], 0).amax(1).float()
        most = queries.abs().amax((1, 2)).float()
        return {"balance": torch.where((keys > 0) & (most > 0), (most / keys).sqrt(), 1).to(self._dtype)}

    def given(self, state: Rows) -> "Balanced":
        bound = copy(self)
        bound._balance = state["balance"][:, None]
        return bound

    def encode(self, x: Tensor) -> Rows:
        return self.inner.encode(x * self._balance)

    def decode(self, rows: Rows) -> Tensor:
        return self.inner.decode(rows) / self._balance
