"""Entries of two precisions: a head's important entries in one store, the others in a second."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .pool import Arena
from .segment import EVERY, Segment, joined, pick
from .store import Layout, Store, StoreLayout


@dataclass(frozen=True)
class TieredLayout(Layout):
    """Of the entries of a head, the share ``share`` is kept as ``high`` says, the others as ``low`` says."""

    high: StoreLayout
    low: StoreLayout
    share: float

    @property
    def before_rope(self) -> bool:
        return self.high.before_rope

    def count_high(self, tokens: Tensor) -> Tensor:
        """How many of so many entries are high ones."""
        return (tokens.double() * self.share + 1e-9).long()  # 0.29 * 100 is 28.999…

    def bytes(self, tokens: Tensor) -> Tensor:
        high = self.count_high(tokens)
        return self.high.bytes(high) + self.low.bytes(tokens - high)

    def most_bytes(self, tokens: Tensor) -> Tensor:
        high = self.count_high(tokens)
        return self.high.most_bytes(high) + self.low.most_bytes(tokens - high)

    @property
    def shared_bytes(self) -> int:
        return self.high.shared_bytes + self.low.shared_bytes

    @property
    def open_bytes(self) -> int:
        return self.high.open_bytes + self.low.open_bytes


class TieredStore(Store):
    """A ``Store`` whose entries are in either of two. New ones come to ``high``; ``demote`` moves them to ``low``.

    What is read has a head's low entries first.
    """

    def __init__(self, layout: TieredLayout, arena: Arena, heads: int, layers: Sequence[int] = (0,)):
        self.layout: Layout = layout
        self.arena = arena
        self.high, self.low = (Store(tier, arena, heads, layers) for tier in (layout.high, layout.low))

    @property
    def lengths(self) -> Tensor:
        """Entries of each head, int64 [heads] on the host."""
        return self.low.lengths + self.high.lengths

    @property
    def segments(self) -> Iterator[Segment]:
        yield from self.low.segments
        yield from self.high.segments

    # -- growing ------------------------------------------------------------------------------------------------

    def append(
        self, heads: slice | Tensor, keys: Tensor, values: Tensor, columns: Mapping[str, Tensor], counts: Tensor
    ) -> None:
        """As ``Store.append``: new entries are high ones."""
        self.high.append(heads, keys, values, columns, counts)

    @property
    def watched(self) -> int | None:
        """As ``Store.watched``, of both."""
        return max((store.watched for store in (self.low, self.high) if store.watched is not None), default=None)

    def observe(
        self, heads: slice | Tensor, keys: Tensor, values: Tensor, counts: Tensor, queries: Tensor, marked: Tensor
    ) -> None:
        """As ``Store.observe``, for both."""
        self.low.observe(heads, keys, values, counts, queries, marked)
        self.high.observe(heads, keys, values, counts, queries, marked)

    def reserve_like(self, heads: slice, times: int) -> None:
        self.low.reserve_like(heads, times)
        self.high.reserve_like(heads, times)

    def pages_to_open(self, heads: slice | Tensor) -> list[tuple[Segment, int]]:
        return self.high.pages_to_open(heads)

    def open_token(self, columns: Mapping[str, Tensor], heads: slice | Tensor | None = None) -> None:
        self.high.open_token(columns, heads)

    def put_token(
        self, heads: slice, keys: Tensor, values: Tensor, channels: tuple[slice, slice] = (EVERY, EVERY)
    ) -> None:
        self.high.put_token(heads, keys, values, channels)

    def wait(self, waits: bool) -> None:
        self.low.wait(waits)
        self.high.wait(waits)

    def settle(self, heads: slice | Tensor) -> None:
        self.low.settle(heads)
        self.high.settle(heads)

    # -- reading ------------------------------------------------------------------------------------------------

    def read(self, heads: slice | Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``Store.read``."""
        return self.read_keys(heads, index), self._either(heads, index, lambda store, at: store.values.read(heads, at))

    def read_keys(self, heads: slice | Tensor, index: Tensor | None = None) -> Tensor:
        return self._either(heads, index, lambda store, at: store.read_keys(heads, at))

    def read_channels(self, heads: slice | Tensor, keys: slice, values: slice) -> tuple[Tensor, Tensor]:
        """As ``read``, but of each key only the numbers ``keys``, of each value the numbers ``values``."""
        return (
            self._either(heads, None, lambda store, at: store.keys.read(heads, at, keys)),
            self._either(heads, None, lambda store, at: store.values.read(heads, at, values)),
        )

    def read_columns(self, heads: slice | Tensor) -> dict[str, Tensor]:
        low, high = self.low.read_columns(heads), self.high.read_columns(heads)
        return {name: self._joined(heads, low[name], high[name]) for name in high}

    def read_column(self, heads: slice | Tensor, name: str, index: Tensor | None = None) -> Tensor:
        return self._either(heads, index, lambda store, at: store.read_column(heads, name, at))

    def set_columns(self, heads: slice | Tensor, columns: Mapping[str, Tensor]) -> None:
        split = {name: self._split(heads, column) for name, column in columns.items()}
        self.low.set_columns(heads, {name: low for name, (low, _) in split.items()})
        self.high.set_columns(heads, {name: high for name, (_, high) in split.items()})

    # -- shrinking and changing ---------------------------------------------------------------------------------

    def demote(self, heads: Tensor, index: Tensor, counts: Tensor) -> None:
        """Moves high entries to ``low``: the first ``counts`` (int64 [R] on the host) of ``index`` (int64 [R, m], their
        places among a head's high entries)."""
        keys, values = (pick(side, index) for side in self.high.read(heads))
        columns = {name: pick(column, index) for name, column in self.high.read_columns(heads).items()}
        self.low.append(heads, keys, values, columns, counts)
        stays = _held(self.high, heads, index)
        moved = torch.arange(index.shape[1], device=index.device) < counts.to(index.device)[:, None]
        gone = stays.new_zeros((stays.shape[0], stays.shape[1] + 1))  # the last place takes what is not moved
        gone.scatter_(1, torch.where(moved, index, stays.shape[1]), True)
        self.high.keep(heads, stays & ~gone[:, :-1], self.high.lengths[heads] - counts)

    def keep(self, heads: slice | Tensor, mask: Tensor, counts: Tensor | None = None) -> None:
        """As ``Store.keep``, of the entries as they are read."""
        low, high = self._split(heads, mask)
        self.low.keep(heads, low & _held(self.low, heads, mask))
        self.high.keep(heads, high & _held(self.high, heads, mask))

    def drop(self, heads: slice | Tensor, victims: Tensor, counts: Tensor | None = None) -> None:
        """As ``Store.drop``, of the entries as they are read."""
        stays = victims.new_zeros(victims.shape, dtype=torch.bool)
        if counts is not None:
            stays = (torch.arange(victims.shape[1]) >= counts[:, None]).to(victims.device)
        everything = victims.new_ones((victims.shape[0], int(self.lengths[heads].max())), dtype=torch.bool)
        self.keep(heads, everything.scatter(1, victims, stays))

    def share(self, heads: slice | Tensor, source: Store, source_heads: slice | Tensor) -> None:
        assert isinstance(source, TieredStore)
        self.low.share(heads, source.low, source_heads)
        self.high.share(heads, source.high, source_heads)

    def free(self, heads: slice | Tensor) -> None:
        self.low.free(heads)
        self.high.free(heads)

    def note_spans(self) -> None:
        self.low.note_spans()
        self.high.note_spans()

    @property
    def bookkeeping_bytes(self) -> int:
        return self.low.bookkeeping_bytes + self.high.bookkeeping_bytes

    @property
    def reserved_bookkeeping_bytes(self) -> int:
        return self.low.reserved_bookkeeping_bytes + self.high.reserved_bookkeeping_bytes

    def _either(
        self, heads: slice | Tensor, index: Tensor | None, read: Callable[[Store, Tensor | None], Tensor]
    ) -> Tensor:
        """What ``read`` gives of both stores, as the entries are read."""
        low, high = self.low.lengths[heads], self.high.lengths[heads]
        if index is None:
            return self._joined(heads, read(self.low, None), read(self.high, None))
        if not int(low.max()) or not int(high.max()):
            return read(self.low if int(low.max()) else self.high, index)
        before = low.to(index.device)[:, None]
        of_low = read(self.low, index)
        of_high = read(self.high, (index - before).clamp(min=0))
        return torch.where((index < before).view(*index.shape, *[1] * (of_low.dim() - 2)), of_low, of_high)

    def _joined(self, heads: slice | Tensor, low: Tensor, high: Tensor) -> Tensor:
        return joined(low, high, self.low.lengths[heads], int(self.lengths[heads].max()))

    def _split(self, heads: slice | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """[R, longest, …] as read -> what belongs to low and to high entries."""
        low, high = self.low.lengths[heads], self.high.lengths[heads]
        place = low[:, None] + torch.arange(int(high.max()))
        return x[:, : int(low.max())], pick(x, place.to(x.device))


def _held(store: Store, heads: slice | Tensor, like: Tensor) -> Tensor:
    """Which of the entries that are read exist, bool [R, longest]."""
    lengths = store.lengths[heads]
    return (torch.arange(int(lengths.max())) < lengths[:, None]).to(like.device)
