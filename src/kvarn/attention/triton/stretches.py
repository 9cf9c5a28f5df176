"""What one launch of the decode kernel reads of a store, and how it is run."""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from ...formats import Codes, Dense, Float8, Format, Int, Mapped, Rescaled, innermost
from ...memory import Segment, Side, Store
from ..rotary import Rotary
from .devices import processors
from .tilings import Tiling, tiling

SETTLED, TAIL = 1, 2  # bits: segments of a side
_LEAST_CHUNK = 128  # entries of a split
_MANY = 2**21  # entries that keep all processors busy for several splits each


@dataclass(frozen=True)
class Tuning:
    """How a kernel is run: entries a block, warps, stages of loads under way, the most registers of a thread, how many
    splits a processor runs side by side, where they should all do (None: in turns, ``entries`` each), and how many
    blocks before they are read codes are fetched into the second cache."""

    block: int
    warps: int
    stages: int
    registers: int | None = None
    resident: int | None = None
    distance: int = 0
    entries: int = 1024

    def chunk(self, total: int, rows: int, device: torch.device) -> int:
        """Entries of a split, of so many in all."""
        if self.resident is None:
            return self.entries
        # Every row may have one split that is not full.
        room = max(self.resident * processors(device) - rows, rows)
        return max(-(-total // (room * self.block)) * self.block, _LEAST_CHUNK)


@dataclass(frozen=True)
class Stretch:
    """The entries that one launch reads: those of a store whose keys, and whose values, lie in these segments of their
    side (``SETTLED``, ``TAIL`` or both)."""

    store: Store
    keys: int
    values: int

    def entries(self, heads: slice) -> int:
        """How many there are."""
        begin, end = torch.zeros((), dtype=torch.int64), self.store.lengths[heads]
        for side, reads in ((self.store.keys, self.keys), (self.store.values, self.values)):
            if side.settled and reads == SETTLED:
                end = end.minimum(side.settled.lengths[heads])
            elif side.settled and reads == TAIL:
                begin = begin.maximum(side.settled.lengths[heads])
        return int((end - begin).clamp(min=0).sum())

    @property
    def segments(self) -> tuple[Segment, Segment]:
        """Of keys and of values the segment whose format says how they are cut into tiles."""
        sides = ((self.store.keys, self.keys), (self.store.values, self.values))
        keys, values = (side.settled if side.settled and reads & SETTLED else side.tail for side, reads in sides)
        return keys, values

    @property
    def formats(self) -> tuple[Format, Format]:
        """Those that are read: any map of keys becomes one of queries, but of values only factors are made up for."""
        keys, values = (segment.format for segment in self.segments)
        return innermost(keys), values.inner if isinstance(values, Rescaled) else values

    def tuning(self, entries: int = 0) -> Tuning:
        """What was fastest on an H200 for so many entries in all (``benchmarks/gpu/attention.py``)."""
        settled = [fmt for fmt in self.formats if not isinstance(fmt, Dense)]
        if not settled:
            return Tuning(64, 2, 5, entries=2048) if entries >= _MANY else Tuning(64, 2, 4)
        units = [fmt.unit for fmt in settled if fmt.unit > 1]
        if not all(isinstance(fmt, Dense | Float8 | Int | Codes) for fmt in settled):
            return Tuning(max(16, gcd(32, *units)), 4, 2)  # not measured yet
        if any(isinstance(fmt, Float8) for fmt in settled):
            return Tuning(max(16, gcd(16, *units)), 1, 2, registers=128, resident=16)
        block, bits = max(16, gcd(32, *units)), [fmt.bits for fmt in settled if isinstance(fmt, (Int, Codes))]
        return Tuning(block, 1, 2, registers=168, resident=12, distance=int(max(bits) < 8))

    def tilings(self, block: int, exact: bool, together: int, rotary: Rotary | None) -> list[Tiling | None]:
        """How keys and values are read, None: they are not; as for ``tiling``."""
        keys, values = self.formats
        cut = tiling(keys, block, exact, together, rotary is not None)
        if cut and rotary and (rotary.halves != cut.size or isinstance(self.segments[0].format, Mapped)):
            cut = None
        return [cut, tiling(values, block, exact, together)]

    def asked(self, query: Tensor, heads: slice) -> tuple[Tensor, Tensor | None]:
        """What stored keys are multiplied with in place of ``query`` ([R, G, size]), and what is added to products."""
        keys, _ = self.segments
        if not isinstance(keys.format, Mapped):
            return query, None
        fmt, offset = keys.format_of(heads), None
        while isinstance(fmt, Mapped):
            more = fmt.offset(query)
            if more is not None:
                offset = more if offset is None else offset + more
            query, fmt = fmt.asked(query), fmt.inner
        return query, offset

    def factors(self, heads: slice) -> Tensor | None:
        """By what channels of stored values are divided, [R, 1, size]."""
        _, values = self.segments
        if not isinstance(values.format, Rescaled):
            return None
        fmt = values.format_of(heads)
        assert isinstance(fmt, Rescaled)
        return fmt.factors.contiguous()


def stretches(store: Store) -> list[Stretch]:
    """What launches read, so that every entry is read once."""
    return [
        Stretch(each, keys, values)
        for each in store.stores
        for keys in _apart(each.keys, each is store.stores[-1])
        for values in _apart(each.values, each is store.stores[-1])
    ]


def _apart(side: Side, grows: bool) -> tuple[int, ...]:
    """The segments of a side that launches read: what is a map of something else apart from what is not. ``grows``: new
    tokens come here, to the tail unless they are encoded as they come."""
    if side.settled is None:
        return (TAIL,)
    if side.layout.appends_codes or (side.layout.settles_at_once and not grows):
        return (SETTLED,)
    return (SETTLED, TAIL) if isinstance(side.settled.format, Mapped) else (SETTLED | TAIL,)
