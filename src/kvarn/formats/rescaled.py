"""Vectors whose channels are multiplied by factors before they are encoded, and divided by these on reading."""

from copy import copy
from typing import Self

import torch
from torch import Tensor

from .base import Format, Rows
from .mapped import Mapped

_ALL = 1 << 40  # queries: those of the whole prompt


class Rescaled(Mapped):
    """Vectors of ``size`` numbers in the format ``inner``; the factors follow from the head's state."""

    factors: Tensor  # [R, 1, size] of the heads that the format was given

    def __init__(self, inner: Format, name: str):
        self.inner = inner
        self.unit, self.layout, self.name = inner.unit, inner.layout, f"{name} {inner.name}"

    def bound(self, factors: Tensor) -> Self:
        """This format for heads of ``factors``, [R, 1, size]."""
        bound = copy(self)
        bound.factors = factors
        return bound

    def encode(self, x: Tensor) -> Rows:
        return self.inner.encode(x * self.factors)

    def decode(self, rows: Rows) -> Tensor:
        return self.inner.decode(rows) / self.factors

    def asked(self, query: Tensor) -> Tensor:
        return query.float() / self.factors


class Balanced(Rescaled):
    """Keys whose outlier channels meet those of the queries in the middle.

    The factor is sqrt(max |q| / max |k|) of each channel, over all queries of the prompt and all query heads of the KV
    head, and over the tokens that the prompt leaves; 1 where either is all zeros (MiKV, arXiv 2402.18096, equation 2).
    """

    watched = _ALL

    def __init__(self, inner: Format, size: int, dtype: torch.dtype):
        super().__init__(inner, "balanced")
        self.state = {"balance": ((size,), dtype)}
        self._dtype = dtype

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        keys = x.abs().masked_fill(~held[..., None], 0).amax(1).float()
        most = queries.abs().amax((1, 2)).float()
        return {"balance": torch.where((keys > 0) & (most > 0), (most / keys).sqrt(), 1).to(self._dtype)}

    def given(self, state: Rows) -> Self:
        return self.bound(state["balance"][:, None])


class Separable(Rescaled):
    """Values whose channels are divided by the square root of their largest magnitude, so that a token's numbers can
    share one scale (ZipCache, arXiv 2405.14256, algorithm 1).

    The magnitudes are those of all tokens that the first prompt leaves, and with ``grows`` of those that came to the
    segment later; a channel of zeros is left as it is.
    """

    def __init__(self, inner: Format, size: int, dtype: torch.dtype, grows: bool):
        super().__init__(inner, "separable")
        self.state = {"peak": ((size,), dtype)}
        self.grows = grows

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        return {"peak": x.abs().masked_fill(~held[..., None], 0).amax(1)}

    def grown(self, state: Rows, x: Tensor, held: Tensor) -> Rows:
        return {"peak": state["peak"].maximum(self.observe(x, held, x)["peak"])}

    def given(self, state: Rows) -> Self:
        peak = state["peak"][:, None]
        return self.bound(torch.where(peak > 0, peak, 1).rsqrt())
