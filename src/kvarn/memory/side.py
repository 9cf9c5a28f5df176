"""The keys, or the values, of all heads: what has settled in a format, and the newest tokens beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import Dense, Float8, Int
from .layout import SideLayout
from .pool import Arena
from .segment import EVERY, Segment, joined, pick, within
from .transfer import sent


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
