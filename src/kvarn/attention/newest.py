"""One new token a sequence, and the pages that it goes to, as kernels take them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..formats import Dense, Float8, Int, Rows
from ..memory import Segment


@dataclass(frozen=True)
class Projected:
    """One token a sequence as its projections give it: ``states`` [B, (H + K) * D + K * V], the ``queries`` (H) before
    the ``keys`` (K) before values.

    ``turn``: cos and sin [1 or B, 1, D], by which queries and keys are still to be rotated, after an RMSNorm (weight
    [D] and epsilon) of queries and one of keys where there are ``norms``. None: there are no queries, and keys are
    rotated.
    """

    states: Tensor
    queries: int
    keys: int
    turn: tuple[Tensor, Tensor] | None = None
    norms: Sequence[tuple[Tensor, float]] = ()


@dataclass(frozen=True)
class Pages:
    """Tokens of heads in pages, as they lie on the device: ``tensors`` [pages, page size, *shape] of a ``format`` that
    is dense, or encoded as tokens come (``SideLayout.appends_codes``), ``table`` int32 [heads, width], ``spans`` int32
    [heads, 2]."""

    format: Dense | Float8 | Int
    tensors: Rows
    table: Tensor
    spans: Tensor

    @classmethod
    def of(cls, segment: Segment) -> "Pages":
        mirror = segment.mirror()
        assert isinstance(segment.format, Dense | Float8 | Int)
        return cls(segment.format, segment.pool.tensors, mirror.table, mirror.spans)
