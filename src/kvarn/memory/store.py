"""All entries of the heads of one group of layers: keys, values and columns, each in segments."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..formats import Columns, Dense, Float8, Format, Int
from .pool import PAGE_OVERHEAD, Arena, Pool, Tier
from .segment import EVERY, HEAD_OVERHEAD, TABLE_ENTRY, Parked, Segment, joined, pick, refills, within
from .transfer import sent


@dataclass(frozen=True)
class SideLayout:
    """How the keys (or the values) of a head are kept: the newest tokens dense, older ones settled in ``format``.

    ``hold`` tokens always stay dense; beyond them, the oldest settle in multiples of ``block`` tokens. A dense format
    has no tail of its own. ``before_rope``: keys, those of the tail too, are kept as they are before their rotation.
    ``tier``: where settled tokens are; in the host's memory dense ones settle too. ``encodes_new``: a token of a
    decoding step need not be exact in that step, so that it can be encoded where it is appended (``appends_codes``).
    """

    format: Format
    dense: Dense
    hold: int = 0
    block: int = 1
    before_rope: bool = False
    tier: Tier = "device"
    encodes_new: bool = False

    @property
    def settles(self) -> bool:
        return self.format is not self.dense or self.tier == "host"

    @property
    def settles_at_once(self) -> bool:
        """Whether nothing stays in the tail."""
        return self.settles and self.hold == 0 and self.block == 1

    @property
    def appends_codes(self) -> bool:
        """Whether tokens of decoding steps are encoded where they are appended, so that they are never in the tail:
        where nothing stays there, and kernels know to encode single tokens."""
        alone = isinstance(self.format, Float8) or (isinstance(self.format, Int) and self.format.axis == "token")
        return self.encodes_new and self.settles_at_once and alone and self.tier == "device"

    def open_bytes(self, page_size: int) -> int:
        """Bytes of one page of each segment of a head that tokens come to."""
        one = torch.ones(1, dtype=torch.int64)
        tail = 0 if self.appends_codes else int(_segment_bytes(self.dense, one, page_size))
        return tail + (int(_segment_bytes(self.format, one, page_size, self.tier)) if self.settles else 0)

    def ripe(self, tail: Tensor) -> Tensor:
        """How many tokens of tails of these lengths settle."""
        return (tail - self.hold).clamp(min=0) // self.block * self.block

    def bytes(self, tokens: Tensor, page_size: int) -> Tensor:
        """Exact bytes on the device of one head of so many tokens appended at once, pages and bookkeeping included."""
        if not self.settles:
            return _segment_bytes(self.dense, tokens, page_size)
        settled = self.ripe(tokens)
        tail = _segment_bytes(self.dense, tokens - settled, page_size)
        return tail + _segment_bytes(self.format, settled, page_size, self.tier)

    def most_bytes(self, tokens: Tensor, page_size: int) -> Tensor:
        """The most bytes that one head of so many tokens can take once it has settled, whatever was appended, evicted
        and encoded before; never less for more tokens.

        Eviction breaks units and empties tails, so a tail may have any length up to ``hold + block - 1``. Settling
        removes its front in multiples of ``block``, so its first token may lie anywhere in a page at such a step.
        """
        if not self.settles:
            return self.bytes(tokens, page_size)
        skipped = page_size - math.gcd(self.block, page_size)
        longest = self.hold + self.block - 1
        # The most settles beside k pages of tail where these hold as few tokens as k pages can.
        first = torch.arange(-skipped, longest, page_size).clamp(min=0)
        tail = torch.cat([torch.zeros(1, dtype=torch.int64), first[first < longest] + 1])
        dense = _segment_bytes(self.dense, torch.arange(tail.numel()) * page_size, page_size)
        settled = (tokens[..., None] - tail) // self.format.unit * self.format.unit
        total = dense + _segment_bytes(self.format, settled, page_size, self.tier)
        return torch.where(settled < 0, 0, total).amax(-1)

    def most_bytes_storing(self, tokens: Tensor, moving: Tensor, page_size: int) -> Tensor:
        """The most bytes that one head takes at any moment while a prompt brings it to so many tokens: ``moving`` of
        them may lie in the tail, beside what had waited there, and settle from there."""
        if not self.settles:
            return self.bytes(tokens, page_size)
        tail = torch.minimum(tokens, moving + self.hold + self.block - 1)
        settled = tokens // self.format.unit * self.format.unit
        # Its first token may lie anywhere in a page.
        dense = _segment_bytes(self.dense, tail + page_size - 1, page_size)
        return dense + _segment_bytes(self.format, settled, page_size, self.tier)


class Layout(ABC):
    """How the entries of a head are kept, and so what they take."""

    @property
    @abstractmethod
    def before_rope(self) -> bool:
        """Whether keys are kept as they are before their rotation."""

    @abstractmethod
    def bytes(self, tokens: Tensor) -> Tensor:
        """Exact bytes on the device of one head of ``tokens`` entries (int64, any shape) appended at once."""

    @abstractmethod
    def most_bytes(self, tokens: Tensor) -> Tensor:
        """The most bytes that one head of ``tokens`` entries (int64, any shape) takes after any prompts and steps."""

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Bytes that one layer's sequences share, whatever their tokens."""

    @abstractmethod
    def most_bytes_storing(self, tokens: Tensor, moving: Tensor) -> Tensor:
        """The most bytes that one head takes at any moment while a prompt brings it to ``tokens`` entries, of which it
        moves ``moving`` (int64, alike) at the most: what is new, or all that stay where some leave."""

    def most_bytes_of_prompt(self, tokens: Tensor) -> Tensor:
        """``most_bytes`` at the end of a prompt."""
        return self.most_bytes(tokens)

    @property
    @abstractmethod
    def open_bytes(self) -> int:
        """Bytes of one page of each segment of a head: what a budget may be exceeded by."""


@dataclass(frozen=True)
class Beside:
    """Rows that a head keeps beside its entries, each for several of them: at most ``most`` of so many entries (int64,
    any shape)."""

    format: Format
    most: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StoreLayout(Layout):
    """What a store keeps for each entry, and in which formats; ``beside``: what it keeps for several together."""

    keys: SideLayout
    values: SideLayout
    columns: Columns | None
    page_size: int
    beside: Mapping[str, Beside] = field(default_factory=dict)

    @property
    def before_rope(self) -> bool:
        return self.keys.before_rope

    def bytes(self, tokens: Tensor) -> Tensor:
        return self.keys.bytes(tokens, self.page_size) + self.values.bytes(tokens, self.page_size) + self._rest(tokens)

    def most_bytes(self, tokens: Tensor) -> Tensor:
        sides = self.keys.most_bytes(tokens, self.page_size) + self.values.most_bytes(tokens, self.page_size)
        return sides + self._rest(tokens)

    def most_bytes_storing(self, tokens: Tensor, moving: Tensor) -> Tensor:
        sides = [side.most_bytes_storing(tokens, moving, self.page_size) for side in (self.keys, self.values)]
        return sides[0] + sides[1] + self._rest(tokens)

    @property
    def shared_bytes(self) -> int:
        return self.keys.format.shared_bytes + self.values.format.shared_bytes

    @property
    def open_bytes(self) -> int:
        one = torch.ones(1, dtype=torch.int64)
        formats = [*([self.columns] if self.columns else []), *(beside.format for beside in self.beside.values())]
        sides = self.keys.open_bytes(self.page_size) + self.values.open_bytes(self.page_size)
        return sides + sum(int(_segment_bytes(fmt, one, self.page_size)) for fmt in formats)

    def _rest(self, tokens: Tensor) -> Tensor:
        """The most bytes of columns and of what is kept beside so many entries."""
        total = torch.zeros_like(tokens)
        if self.columns:
            total = total + _segment_bytes(self.columns, tokens, self.page_size)
        for beside in self.beside.values():
            total = total + _segment_bytes(beside.format, beside.most(tokens), self.page_size)
        return total


def _segment_bytes(fmt: Format, tokens: Tensor, page_size: int, tier: Tier = "device") -> Tensor:
    size = -(-page_size // fmt.unit) * fmt.unit
    pages = (tokens + size - 1) // size
    page_bytes = size // fmt.unit * fmt.unit_bytes + PAGE_OVERHEAD if tier == "device" else 0
    return pages * (page_bytes + TABLE_ENTRY) + HEAD_OVERHEAD + fmt.state_bytes


class Side:
    """The keys, or the values, of all heads: a settled segment (if the layout has one), then a dense tail."""

    def __init__(self, layout: SideLayout, arena: Arena, heads: int, layers: Sequence[int] = (0,)):
        self.layout = layout
        self.tail = Segment(arena.pool(layout.dense), heads)
        self.settled = Segment(arena.pool(layout.format, layout.tier), heads, layers) if layout.settles else None
        self.waits = False  # nothing settles for now

    @property
    def segments(self) -> list[Segment]:
        return [self.settled, self.tail] if self.settled else [self.tail]

    @property
    def newest(self) -> Segment:
        """Where the tokens of decoding steps come."""
        return self.settled if self.settled and self.layout.appends_codes else self.tail

    @property
    def lengths(self) -> Tensor:
        return self.settled.lengths + self.tail.lengths if self.settled else self.tail.lengths

    def pages_to_append(self, heads: slice | Tensor, counts: Tensor) -> list[tuple[Segment, int]]:
        """Pages that ``append`` would allocate in each segment."""
        if self.settled is None or self.waits:
            return [(self.tail, self.tail.pages_to_extend(heads, counts))]
        tail = self.tail.lengths[heads]
        ripe = self.layout.ripe(tail + counts)
        longer = counts if int(tail.max()) else counts - ripe
        return [
            (self.tail, self.tail.pages_to_extend(heads, longer)),
            (self.settled, self.settled.pages_to_extend(heads, ripe) + self.settled.pages_to_grow(heads)),
        ]

    def pages_to_take(self, heads: slice | Tensor) -> list[tuple[Segment, int]]:
        """The most pages that ``take`` or ``replace`` can allocate in each segment: copies of shared ones, and for
        sides that settle the tokens that return to the tail or ripen."""
        moving = [(segment, segment.pages_shared(heads)) for segment in self.segments]
        if self.settled is None:
            return moving
        heads_count = self.lengths[heads].numel()
        tail_pages = -(-self.settled.unit // self.tail.pool.page_size)
        ripe_pages = -(-(self.settled.unit + self.layout.block) // self.settled.pool.page_size) + 1
        return [*moving, (self.tail, heads_count * tail_pages), (self.settled, heads_count * ripe_pages)]

    def pages_to_settle(self, heads: slice | Tensor) -> list[tuple[Segment, int]]:
        """Pages that ``settle`` would allocate."""
        if self.settled is None or self.waits or not self.tail.span(heads)[1]:
            return []
        ripe = self.layout.ripe(self.tail.lengths[heads])
        return [(self.settled, self.settled.pages_to_extend(heads, ripe) + self.settled.pages_to_grow(heads))]

    def append(self, heads: slice | Tensor, x: Tensor, counts: Tensor) -> None:
        """Appends ``x`` ([R, n, size], the first ``counts`` of each row); what is ripe goes straight to its format."""
        if self.settled is None or self.waits:
            self.tail.append(heads, self.tail.format.encode(x), counts)
            return
        if int(self.tail.lengths[heads].max()):
            self.tail.append(heads, self.tail.format.encode(x), counts)
            self.settle(heads)
            return
        ripe = self.layout.ripe(counts)
        first = int(ripe.max())
        if first:
            self._settle(self.settled, heads, x[:, :first], ripe)
        rest = counts - ripe
        index = sent(ripe, x.device)[:, None] + torch.arange(int(rest.max()), device=x.device)
        self.tail.append(heads, self.tail.format.encode(pick(x, index)), rest)

    def settle(self, heads: slice | Tensor) -> None:
        """Moves ripe tokens from the tail to the settled segment."""
        if self.settled is None or self.waits or not self.tail.span(heads)[1]:
            return
        ripe = self.layout.ripe(self.tail.lengths[heads])
        some = torch.nonzero(ripe).flatten()
        if not some.numel():
            return
        if some.numel() < ripe.numel():
            heads, ripe = self.tail.ids(heads)[some], ripe[some]
        if self._encodes:
            self._encode_front(heads, ripe)
        else:
            self._settle(self.settled, heads, self._front(heads, int(ripe.max())), ripe)
        self.tail.pop_front(heads, ripe)

    def put(self, slots: Tensor, x: Tensor, channels: slice = EVERY) -> None:
        """Writes one token a head ([R, size], or of dense ones ``channels`` of it) at flat ``slots`` of ``newest``."""
        fmt = self.newest.format
        if self.newest.by_kernels and isinstance(fmt, Int | Float8):
            from .triton.encoding import put

            put(fmt, x, self.newest.pool, slots)
        else:
            self.newest.put(slots, fmt.encode(x), channels)

    def read(self, heads: slice | Tensor, index: Tensor | None = None, channels: slice = EVERY) -> Tensor:
        """The tokens of each head, settled ones first: [R, longest, size]; with ``index`` (int64 [R, m] on the device)
        only these, [R, m, size], and nothing else is decoded; of each only the numbers ``channels``."""
        if index is not None:
            return self._read_at(heads, index)[..., channels]
        tail = self.tail.decode(heads, channels=channels)
        if self.settled is None or not self.settled.span(heads)[1]:
            return tail
        longest = int(self.lengths[heads].max())
        return joined(self.settled.decode(heads, channels=channels), tail, self.settled.lengths[heads], longest)

    def take(self, heads: slice | Tensor, index: Tensor, counts: Tensor, ordered: bool) -> None:
        """Keeps tokens ``index`` of each head, in that order (see ``Segment.take``).

        Of the tokens that had settled, those that no longer fill a unit return to the tail, decoded.
        """
        if self.settled is None:
            self.tail.take(heads, index, counts, ordered)
            return
        before = sent(self.settled.lengths[heads], index.device)[:, None]
        valid = within(counts, index.shape[1], index.device)
        leading = ((index < before) & valid).cumprod(1).sum(1).cpu()
        stay = leading // self.settled.unit * self.settled.unit
        rest = counts - stay
        place = sent(stay, index.device)[:, None] + torch.arange(int(rest.max()), device=index.device)
        last = pick(index, place)
        if ordered and self.settled.unit == 1:
            self.tail.take(heads, (last - before).clamp(min=0), rest, ordered)
        else:
            self.tail.rewrite(heads, self.tail.format.encode(self.read(heads, last)), rest)
        self.settled.take(heads, index[:, : int(stay.max())], stay, ordered)
        self.settle(heads)

    def overwrite(self, heads: slice | Tensor, touched: Tensor, everything: Tensor) -> None:
        """Overwrites the tokens in ``touched`` (bool [R, longest]) by theirs in ``everything`` ([R, longest, size]),
        each in the segment it lies in."""
        offset = torch.zeros_like(self.lengths[heads])
        for segment in self.segments:
            lengths = segment.lengths[heads]
            place = sent(offset, touched.device)[:, None] + torch.arange(int(lengths.max()), device=touched.device)
            segment.overwrite(heads, pick(everything, place), pick(touched, place))
            offset += lengths

    def _settle(self, settled: Segment, heads: slice | Tensor, x: Tensor, counts: Tensor) -> None:
        settled.grow(heads, x, counts)
        settled.append(heads, settled.encode(heads, x), counts)

    @property
    def _encodes(self) -> bool:
        """Whether a kernel encodes what is in the tail."""
        if self.settled is None or not isinstance(fmt := self.settled.format, Int | Float8):
            return False
        alike = self.tail.format.layout == Dense(fmt.size, fmt.dtype).layout
        return alike and self.tail.by_kernels and self.settled.by_kernels

    def _encode_front(self, heads: slice | Tensor, counts: Tensor) -> None:
        """Appends the first ``counts`` tokens of tails to the settled segment, page by page by a kernel."""
        from .triton.encoding import encode

        tail, settled = self.tail, self.settled
        assert settled is not None
        assert isinstance(settled.format, Int | Float8)
        ends, units = settled.starts[heads] + settled.lengths[heads], counts // settled.unit
        settled.extend(heads, counts)
        plan = settled.planned(heads, tail.starts[heads], ends // settled.unit, units)
        paged = tail.pool, tail.mirror(), settled.pool, settled.mirror()
        encode(settled.format, *paged, plan, int(units.max()))

    def _read_at(self, heads: slice | Tensor, index: Tensor) -> Tensor:
        if self.settled is None or not self.settled.span(heads)[1]:
            return self.tail.decode_at(heads, index)
        if not self.tail.span(heads)[1]:
            return self.settled.decode_at(heads, index)
        before = sent(self.settled.lengths[heads], index.device)[:, None]
        settled = self.settled.decode_at(heads, index)
        tail = self.tail.decode_at(heads, (index - before).clamp(min=0))
        return torch.where((index < before)[..., None], settled, tail)

    def _front(self, heads: slice | Tensor, count: int) -> Tensor:
        front = self.tail.decode(heads, count)
        short = count - front.shape[1]
        return torch.nn.functional.pad(front, (0, 0, 0, short)) if short else front


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
