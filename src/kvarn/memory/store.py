"""All entries of the heads of one group of layers: keys, values and columns, each in segments."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .layout import Layout, StoreLayout
from .pool import Arena, Pool
from .segment import EVERY, Parked, Segment, refills, within
from .side import Side
from .transfer import sent


class Store:
    """Entries of ``heads`` heads. Key i, value i and column i of a head belong to the same token.

    Heads are numbered (layer, sequence, KV head), of the model's ``layers``; operations take a slice or an int64 tensor
    of heads.
    """

    def __init__(self, layout: StoreLayout, arena: Arena, heads: int, layers: Sequence[int] = (0,)):
        self.layout: Layout = layout
        self.arena = arena
        self.keys = Side(layout.keys, arena, heads, layers)
        self.values = Side(layout.values, arena, heads, layers)
        self.columns = Segment(arena.pool(layout.columns), heads) if layout.columns else None
        self.beside = {name: Segment(arena.pool(beside.format), heads) for name, beside in layout.beside.items()}
        self._token_slots: tuple[Tensor, Tensor] | None = None  # of every head's opened key, and value, once asked for

    @property
    def stores(self) -> "list[Store]":
        """The stores that have the entries, in the order of reading; the last is where new ones come."""
        return [self]

    @property
    def lengths(self) -> Tensor:
        """Entries of each head, int64 [heads] on the host."""
        return self.keys.lengths

    @property
    def segments(self) -> Iterator[Segment]:
        yield from self.keys.segments
        yield from self.values.segments
        if self.columns:
            yield self.columns
        yield from self.beside.values()

    @cached_property
    def away(self) -> bool:
        """Whether some of it is in the host's memory."""
        return any(segment.pool.tier == "host" for segment in self.segments)

    # -- growing ------------------------------------------------------------------------------------------------

    @property
    def watched(self) -> int | None:
        """How many of a prompt's last queries ``observe`` needs; None: no format has a state."""
        return max((segment.format.watched for segment in self.segments if segment.state), default=None)

    def observe(
        self, heads: slice | Tensor, keys: Tensor, values: Tensor, counts: Tensor, queries: Tensor, marked: Tensor
    ) -> None:
        """Before ``append`` of a prompt's keys and values: makes the states of formats that have one, in heads where
        nothing has settled. ``queries`` are the last of the prompt, [R, G, watched, size]; tokens in ``marked`` (bool
        [R, n]) are to stay exact."""
        for side, x in ((self.keys, keys), (self.values, values)):
            if side.settled and side.settled.state:
                side.settled.observe(heads, x, counts, queries, marked)

    def append(
        self, heads: slice | Tensor, keys: Tensor, values: Tensor, columns: Mapping[str, Tensor], counts: Tensor
    ) -> None:
        """Appends ``counts`` entries (int64 [R]) to each head: [R, n, size] keys and values, [R, n] columns."""
        self._require(self.pages_to_append(heads, counts))
        self.keys.append(heads, keys, counts)
        self.values.append(heads, values, counts)
        if self.columns:
            self.columns.append(heads, dict(columns), counts)

    def pages_to_append(self, heads: slice | Tensor, counts: Tensor) -> list[tuple[Segment, int]]:
        """Pages that ``append`` would allocate in each segment."""
        needed = self.keys.pages_to_append(heads, counts) + self.values.pages_to_append(heads, counts)
        return [*needed, (self.columns, self.columns.pages_to_extend(heads, counts))] if self.columns else needed

    def reserve_like(self, heads: slice, times: int) -> None:
        """Makes room for ``times`` as many pages as ``heads`` hold, so that growing layer by layer moves nothing."""
        needed = by_pool([(segment, times * segment.pages_held(heads)) for segment in self.segments])
        for pool, count in needed.items():
            pool.reserve(count)

    def pages_to_open(self, heads: slice | Tensor) -> list[tuple[Segment, int]]:
        """Pages that ``open_token`` would allocate in each segment."""
        one = torch.ones_like(self.lengths[heads])
        return [(segment, segment.pages_to_extend(heads, one)) for segment in self._open_segments()]

    def open_token(self, columns: Mapping[str, Tensor], heads: slice | Tensor | None = None) -> None:
        """Makes room for one more entry in each of ``heads`` (None: all) at once, with its ``columns`` ([R] each);
        ``put_token`` then brings keys and values layer by layer."""
        targets, everyone = self._open_segments(), slice(0, self.lengths.numel())
        heads = everyone if heads is None else heads
        one = torch.ones_like(self.lengths[heads])
        self._require(self.pages_to_open(heads))
        for segment in targets:
            segment.extend(heads, one)
            segment.settle_span()
        self.moved_token()
        if self.columns:
            self.columns.put(self.columns.next_slots(heads), dict(columns))

    def retract_token(self, heads: slice | Tensor) -> None:
        """Takes back what ``open_token`` did, before ``put_token``."""
        for segment in self._open_segments():
            segment.retract(heads)
        self.note_spans()

    def moved_token(self) -> None:
        """Heads have moved since ``open_token``: ``put_token`` is to find its places anew."""
        self._token_slots = None

    def put_token(
        self, heads: slice, keys: Tensor, values: Tensor, channels: tuple[slice, slice] = (EVERY, EVERY)
    ) -> None:
        """Writes the keys and values ([R, size]) of the entry that ``open_token`` made room for, or of either these
        ``channels``."""
        if self._token_slots is None:
            self._token_slots = self.keys.newest.next_slots(EVERY), self.values.newest.next_slots(EVERY)
        key_slots, value_slots = self._token_slots
        self.keys.put(key_slots[heads], keys, channels[0])
        self.values.put(value_slots[heads], values, channels[1])

    def wait(self, waits: bool) -> None:
        """While it waits, what is new stays dense and nothing settles, since it will be cut or merged again."""
        self.keys.waits = self.values.waits = waits

    def settle(self, heads: slice | Tensor) -> None:
        """Encodes what has grown old enough for its format."""
        self._require(self.keys.pages_to_settle(heads) + self.values.pages_to_settle(heads))
        self.keys.settle(heads)
        self.values.settle(heads)
        self.note_spans()

    # -- reading ------------------------------------------------------------------------------------------------

    def read(self, heads: slice | Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of each head, [R, longest, size] each; with ``index`` (int64 [R, m] on the device; the last
        entry of a head stands for those beyond it) only of these entries, [R, m, size] each."""
        return self.read_keys(heads, index), self.values.read(heads, index)

    def read_keys(self, heads: slice | Tensor, index: Tensor | None = None) -> Tensor:
        """As ``read``, the keys alone."""
        return self.keys.read(heads, index)

    def read_columns(self, heads: slice | Tensor) -> dict[str, Tensor]:
        """All columns of each head, [R, longest, *shape] each."""
        return self.columns.read(heads) if self.columns else {}

    def read_column(self, heads: slice | Tensor, name: str, index: Tensor | None = None) -> Tensor:
        """One column of each head, [R, longest, *shape], or of entries ``index`` alone (as in ``read``)."""
        assert self.columns is not None
        if index is not None:
            return self.columns.read_at(heads, index, names=(name,))[name]
        return self.columns.read(heads, names=(name,))[name]

    def set_columns(self, heads: slice | Tensor, columns: Mapping[str, Tensor]) -> None:
        """Sets some columns of all entries of each head, [R, longest, *shape] each."""
        assert self.columns is not None
        self.columns.set(heads, dict(columns))

    def own_columns(self, heads: slice | Tensor) -> None:
        """Copies pages of columns that others refer to too, so that kernels may write in them."""
        if self.columns:
            self.columns._own(heads)

    def pages_to_own_columns(self, heads: slice | Tensor) -> list[tuple[Segment, int]]:
        """Pages that ``own_columns`` would allocate."""
        return [(self.columns, self.columns.pages_shared(heads))] if self.columns else []

    # -- shrinking and changing ---------------------------------------------------------------------------------

    def pages_to_change(self, heads: slice | Tensor) -> list[tuple[Segment, int]]:
        """The most pages that ``keep``, ``drop`` and ``overwrite`` can allocate in each segment."""
        needed = self.keys.pages_to_take(heads) + self.values.pages_to_take(heads)
        return [*needed, (self.columns, self.columns.pages_shared(heads))] if self.columns else needed

    def keep(self, heads: slice | Tensor, mask: Tensor, counts: Tensor | None = None) -> None:
        """Keeps the entries where ``mask`` (bool [R, longest]) is true and frees what empties.

        ``counts``: how many are kept in each head (int64 [R] on the host), where the caller knows.
        """
        counts = mask.sum(1).cpu() if counts is None else counts
        if bool((counts == self.lengths[heads]).all()):
            return
        self._require_changes(heads)
        whole = self._in_whole_units(heads, mask)
        index = places(mask, whole, int(counts.max()))
        self.keys.take(heads, index, counts, whole is None)
        self.values.take(heads, index, counts, whole is None)
        if self.columns:
            self.columns.take(heads, index, counts, whole is None)
        self.note_spans()

    def drop(self, heads: slice | Tensor, victims: Tensor, counts: Tensor | None = None) -> None:
        """Removes entries ``victims`` (int64 [R, e], distinct in a row) from each head; the order may change.

        ``counts`` (int64 [R], host): only the first so many of each row; the others may be anything.
        """
        lengths = self.lengths[heads]
        counts = torch.full_like(lengths, victims.shape[1]) if counts is None else counts
        if self.keys.settled or self.values.settled:
            longest = int(lengths.max())
            gone = torch.where(within(counts, victims.shape[1], victims.device), victims, longest)
            mask = within(lengths, longest + 1, victims.device).scatter(1, gone, False)
            self.keep(heads, mask[:, :-1], lengths - counts)
            return
        self._require_changes(heads)
        source, target = refills(lengths, victims, counts)
        for segment in self._open_segments():
            segment.drop(heads, counts, source, target)
        self.note_spans()

    def pop_front(self, heads: slice | Tensor, counts: Tensor) -> None:
        """Removes the oldest ``counts`` entries (int64 [R]) of heads that are dense throughout."""
        assert not (self.keys.settled)
        assert not (self.values.settled)
        for segment in self._open_segments():
            segment.pop_front(heads, counts)
        self.note_spans()

    def overwrite(self, heads: slice | Tensor, touched: Tensor, keys: Tensor, values: Tensor) -> None:
        """Overwrites the entries in ``touched`` (bool [R, longest]) by theirs in ``keys`` and ``values`` ([R, longest,
        size] each)."""
        self._require_changes(heads)
        self.keys.overwrite(heads, touched, keys)
        self.values.overwrite(heads, touched, values)

    def share(self, heads: slice | Tensor, source: "Store", source_heads: slice | Tensor) -> None:
        """Gives empty ``heads`` the entries of another store's heads, by reference, copied on the first write."""
        for mine, theirs in zip(self.segments, source.segments, strict=True):
            mine.share(heads, theirs, source_heads)
        self.note_spans()

    def adopt(self, heads: slice | Tensor, source: "Store", source_heads: slice | Tensor) -> None:
        """Moves the entries of another store's heads (or of this one's) to empty ``heads``; nothing is copied."""
        for mine, theirs in zip(self.segments, source.segments, strict=True):
            mine.adopt(heads, theirs, source_heads)
        self.note_spans()

    def park(self) -> list[Parked]:
        """Moves all entries to host memory; the store is empty until ``unpark``."""
        return [segment.park() for segment in self.segments]

    def unpark(self, parked: list[Parked]) -> None:
        """Puts back, bit by bit, what ``park`` took. Raises OutOfMemory before anything has changed."""
        self._require(self.pages_to_unpark(parked))
        for segment, each in zip(self.segments, parked, strict=True):
            segment.unpark(each)
        self.note_spans()

    def pages_to_unpark(self, parked: list[Parked]) -> list[tuple[Segment, int]]:
        """Pages that ``unpark`` would allocate in each segment."""
        return [(segment, each.pages) for segment, each in zip(self.segments, parked, strict=True)]

    def free(self, heads: slice | Tensor) -> None:
        """Gives every page of these heads back."""
        for segment in self.segments:
            segment.free(heads)

    @property
    def bookkeeping_bytes(self) -> int:
        return sum(segment.bookkeeping_bytes for segment in self.segments)

    def note_spans(self) -> None:
        """Notes for each segment whether its heads are all alike (after any operation that may have made them so)."""
        for segment in self.segments:
            segment.settle_span()

    @property
    def reserved_bookkeeping_bytes(self) -> int:
        return sum(segment.reserved_bookkeeping_bytes for segment in self.segments)

    def _require(self, needed: list[tuple[Segment, int]]) -> None:
        """Raises OutOfMemory unless all these pages can be had, so that no operation stops halfway."""
        self.arena.require(by_pool(needed))

    def _require_changes(self, heads: slice | Tensor) -> None:
        """``_require`` for operations that rewrite these heads."""
        self._require(self.pages_to_change(heads))

    def _open_segments(self) -> list[Segment]:
        return [self.keys.newest, self.values.newest, *([self.columns] if self.columns else [])]

    def _in_whole_units(self, heads: slice | Tensor, mask: Tensor) -> Tensor | None:
        """Entries whose whole unit stays and is settled on both sides: kept first, they need no new encoding. None
        where every entry is a unit."""
        settled = [side.settled for side in (self.keys, self.values) if side.settled]
        unit = max((segment.unit for segment in settled), default=1)
        if unit == 1:
            return None
        bound = sent(torch.stack([segment.lengths[heads] for segment in settled]).amin(0), mask.device)
        units = mask.shape[1] // unit
        whole = mask[:, : units * unit].unflatten(1, (units, unit)).all(2)
        whole &= (torch.arange(1, units + 1, device=mask.device) * unit) <= bound[:, None]
        full = torch.zeros_like(mask)
        full[:, : units * unit] = whole.repeat_interleave(unit, 1)
        return full


def places(mask: Tensor, first: Tensor | None, longest: int) -> Tensor:
    """The first ``longest`` places where ``mask`` (bool [R, n]) is true, ascending, those in ``first`` (a part of it)
    before the others: int64 [R, ``longest``], any places where there are fewer."""
    place = mask.cumsum(1)
    if first is not None:
        before = first.cumsum(1)
        place = torch.where(first, before, before[:, -1:] + place - before)
    index = place.new_zeros((mask.shape[0], longest + 1))
    every = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return index.scatter_(1, torch.where(mask & (place <= longest), place, 0), every)[:, 1:]


def by_pool(needed: list[tuple[Segment, int]]) -> dict[Pool, int]:
    """Pages that segments need, added up for the pools that several of them share."""
    pages: dict[Pool, int] = {}
    for segment, count in needed:
        pages[segment.pool] = pages.get(segment.pool, 0) + count
    return pages
