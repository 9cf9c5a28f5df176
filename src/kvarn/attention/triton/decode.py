"""Decode attention over the entries of a layer as they lie in their pages, without decoding or joining them."""

import os
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from math import gcd
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ...formats import (
    Codes,
    Corrected,
    Dense,
    Exempt,
    Float8,
    Format,
    Int,
    Mapped,
    NonUniform,
    Rescaled,
    Rotated,
    Signs,
    Sparse,
    Ternary,
    innermost,
)
from ...memory import Segment, Side, Store
from ..reference import Paid, Variant
from ..rotary import Rotary
from ..updates import Updates
from .columns import put
from .kinds import LEVELS_CHANNEL, LEVELS_TOKEN, RANKED, SIGNS, SPARSE, TERNARY, TURNED
from .split import attend_split, merge_splits
from .tiles import CHANNEL, CODES, DENSE, FLOAT8, TOKEN

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_OVERLAP = True
_MOST_QUERIES = 16  # rows of a tensor-core tile
_LEAST_CHUNK = 128  # entries of a split
_MANY = 2**21  # entries that keep all processors busy for several splits each
_MOST_BESIDE = 64  # exact numbers of a vector (loops over them are unrolled), or exact tokens (entries look for theirs)
_TURNED = 32  # channels that one product transforms: more are more multiplications, fewer are more sums before
_SETTLED, _TAIL = 1, 2  # bits: segments of a side


@dataclass(frozen=True)
class Tiling:
    """How the vectors of a format are cut into tiles (see ``tiles``, and ``folded`` for those that are), and what is
    kept beside them (see ``kinds``)."""

    kind: int
    bits: int
    group: int
    size: int
    parts: int
    run: int
    fine: bool = False
    folded: bool = False
    beside: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)

    @property
    def tiles(self) -> int:
        return 2 * self.size // self.run if self.folded else self.size // self.run

    @property
    def plain(self) -> bool:
        """Whether ``tiles.numbers`` gives all of it."""
        return self.kind < SPARSE.value and not any(self.beside)

    def arguments(self, side: str, page: int, dtype: torch.dtype) -> dict[str, Any]:
        """Constants of the kernels, named for a side; ``dtype``: the model's."""
        number = tl.float32 if dtype == torch.float32 else tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
        constants = {
            "KIND": self.kind,
            "BITS": self.bits,
            "GROUP": self.group,
            "PAGE": page,
            "SIZE": self.size,
            "TILES": self.tiles,
            "PARTS": self.parts,
            "RUN": self.run,
            "WIDTH": max(16, next_power_of_2(self.size if self.folded else self.run)),
            "FINE": self.fine,
            "FOLDED": self.folded,
            "TYPE": number,
            "BESIDE": self.beside,
        }
        return {f"{side}_{name}": constant for name, constant in constants.items()}


def tiling(fmt: Format, block: int, exact: bool = False, heads: int = 1, turns: bool = False) -> Tiling | None:
    """How the kernels read ``fmt`` in blocks of so many entries; None: they do not. ``exact``: numbers in fp32;
    ``heads``: KV heads whose vectors are one row; ``turns``: tiles are cut so that channels half a vector apart lie at
    the same places of two tiles."""
    cut = _joint_tiling(fmt, heads) or (_tiling(fmt, block, exact) if heads == 1 else None)
    if cut is None or max(cut.beside[0], cut.beside[1], cut.beside[3]) > _MOST_BESIDE:
        return None
    if turns:
        cut = replace(cut, run=gcd(cut.run, cut.size // 2) if cut.parts == 1 else cut.run, folded=False)
    return cut


def _tiling(fmt: Format, block: int, exact: bool) -> Tiling | None:
    if type(fmt) is Float8:
        run = gcd(fmt.size, 64)
        return Tiling(FLOAT8.value, 8, fmt.size, fmt.size, 1, run, folded=_folds(fmt.size, run, exact))
    if type(fmt) is Sparse:
        return Tiling(SPARSE.value, 1, fmt.kept, fmt.size, 8, fmt.size // 8)
    if type(fmt) is Ternary:
        return Tiling(TERNARY.value, 2, fmt.unit, fmt.size, 1, fmt.size)
    if type(fmt) is Signs:
        run = gcd(fmt.wide, fmt.size)
        return Tiling(SIGNS.value, 2, fmt.unit, fmt.size, 1, run, beside=(0, 0, 0, 0, fmt.wide))
    if type(fmt) is Corrected:
        cut = _tiling(fmt.backbone, block, exact)
        return cut and replace(cut, folded=False, beside=(2 * fmt.each_side, fmt.rank, fmt.unit, 0, 0))
    if type(fmt) is Codes:
        parts = _parts(fmt.bits)
        return Tiling(CODES.value, fmt.bits, fmt.size, fmt.size, parts, fmt.size // parts)
    if type(fmt) is not Int:
        return None
    parts = _parts(fmt.bits)
    whole = fmt.size // parts
    per_channel = fmt.axis == "channel"
    run = gcd(whole, 64 if per_channel else fmt.group)
    fine = bool(fmt.group % block) if per_channel else run < 16
    few = per_channel or fmt.size <= 8 * fmt.group  # groups that ``folded.group_minima`` has lines for
    folded = fmt.bits != 3 and not fine and few and _folds(fmt.size, run, exact)
    kind = CHANNEL if per_channel else TOKEN
    return Tiling(kind.value, fmt.bits, fmt.group, fmt.size, parts, whole if fine else run, fine, folded)


def _joint_tiling(fmt: Format, heads: int) -> Tiling | None:
    """Of formats that are read where ``heads`` KV heads have one row too."""
    if type(fmt) is Dense:
        ((row,), _) = fmt.layout["x"]
        return Tiling(DENSE.value, 16, row, row // heads, 1, row // heads)
    if type(fmt) is NonUniform:
        kind, size = LEVELS_CHANNEL if fmt.fixed else LEVELS_TOKEN, fmt.size // heads
        return Tiling(kind.value, fmt.bits, size, size, 1, size, beside=(fmt.exact, 0, 0, 0, 0))
    if type(fmt) is Rotated:
        kind, size = RANKED if fmt.shared else TURNED, fmt.inner.size // heads
        if fmt.inner.axis == "channel" or fmt.block % size:
            return None
        beside = (0, 0, 0, 0, fmt.block // size)
        return Tiling(kind.value, fmt.inner.bits, fmt.inner.group, size, 1, gcd(size, _TURNED), beside=beside)
    if type(fmt) is Exempt and isinstance(fmt.inner, NonUniform | Rotated):
        cut = _joint_tiling(fmt.inner, heads)
        return cut and replace(cut, beside=(*cut.beside[:3], fmt.most, cut.beside[4]))
    return None


def _parts(bits: int) -> int:
    """Codes that share a byte."""
    return 1 if bits == 3 else 8 // bits


def _folds(size: int, run: int, exact: bool) -> bool:
    """Whether vectors in runs of so many bytes can be read as ``folded`` has them."""
    return run >= 32 and size & (size - 1) == 0 and not exact


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
        room = max(self.resident * _processors(device) - rows, rows)
        return max(-(-total // (room * self.block)) * self.block, _LEAST_CHUNK)


@dataclass(frozen=True)
class Stretch:
    """The entries that one launch reads: those of a store whose keys, and whose values, lie in these segments of their
    side (``_SETTLED``, ``_TAIL`` or both)."""

    store: Store
    keys: int
    values: int

    def entries(self, heads: slice) -> int:
        """How many there are."""
        begin, end = torch.zeros((), dtype=torch.int64), self.store.lengths[heads]
        for side, reads in ((self.store.keys, self.keys), (self.store.values, self.values)):
            if side.settled and reads == _SETTLED:
                end = end.minimum(side.settled.lengths[heads])
            elif side.settled and reads == _TAIL:
                begin = begin.maximum(side.settled.lengths[heads])
        return int((end - begin).clamp(min=0).sum())

    @property
    def segments(self) -> tuple[Segment, Segment]:
        """Of keys and of values the segment whose format says how they are cut into tiles."""
        sides = ((self.store.keys, self.keys), (self.store.values, self.values))
        keys, values = (side.settled if side.settled and reads & _SETTLED else side.tail for side, reads in sides)
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
        return (_TAIL,)
    if side.layout.appends_codes or (side.layout.settles_at_once and not grows):
        return (_SETTLED,)
    return (_SETTLED, _TAIL) if isinstance(side.settled.format, Mapped) else (_SETTLED | _TAIL,)


def readable(store: Store, queries: int, together: int = 1, rotary: Rotary | None = None) -> bool:
    """Whether ``attend_stored`` reads this store, for so many queries of a KV head, ``together`` of which are one head
    of the store."""
    each = [stretch.tilings(stretch.tuning().block, False, together, rotary) for stretch in stretches(store)]
    cut = [one for both in each for one in both]
    if queries > _MOST_QUERIES or None in cut:
        return False
    return has_float8(store.arena.device) or all(one.kind != FLOAT8.value for one in cut if one)


@dataclass(frozen=True)
class Launch:
    """A launch of ``attend_split``: which queries ([R, G, size of keys]) read what, in how many splits of how many
    entries, beginning with split ``ahead`` of all; what is added to products ([R, G]), and by what the channels of
    values are divided ([R, size of values]). ``together`` of the R rows are one head of the store."""

    stretch: Stretch
    tuning: Tuning
    query: Tensor
    offset: Tensor | None
    factors: Tensor | None
    chunk: int
    splits: int
    ahead: int
    together: int


@dataclass(frozen=True)
class Partials:
    """What the launches give: of each split the sums of values [splits, G, size] with the largest logit and the sum of
    weights [splits, G, 2], of each launch where the splits of its rows begin and end [launches, R + 1], and the logits
    of all entries [R, G, entries], where they are observed."""

    sums: Tensor
    extent: Tensor
    bounds: Tensor
    logits: Tensor | None


def attend_stored(
    query: Tensor,
    store: Store,
    heads: slice,
    variant: Variant,
    counts: bool = False,
    observe: bool = False,
    updates: Updates | None = None,
    rotary: Rotary | None = None,
    tuned: Tuning | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Paid | None] | None:
    """Attention of one token's queries ([B, H, 1, D]) over all entries of ``heads``, a layer's: [B, H, 1, D], and with
    ``observe`` what was paid to each entry. ``counts``: entries weigh as their column ``count`` says. ``updates``: what
    changes of the columns, in pages that are not shared. ``rotary`` rotates keys, for the positions that were reserved.
    A head of the store may have the vectors of several KV heads.

    None where the kernels do not read the store's formats.
    """
    newest = store.stores[-1]
    ((width,), _), ((value_width,), _) = (side.tail.format.layout["x"] for side in (newest.keys, newest.values))
    together = width // query.shape[3]
    rows, size = (heads.stop - heads.start) * together, value_width // together
    queries = query.shape[0] * query.shape[1] // rows
    if not readable(store, queries, together, rotary):
        return None
    launches = _planned(query.reshape(rows, queries, -1), store, heads, together, tuned, chunk)
    splits = launches[-1].ahead + launches[-1].splits
    observed = observe or updates is not None
    entries = _bound(store, heads, updates) if observed else 0
    partials = Partials(
        sums=query.new_empty((splits, queries, size), dtype=torch.float32),
        extent=query.new_empty((splits, queries, 2), dtype=torch.float32),
        bounds=query.new_empty((len(launches), rows + 1), dtype=torch.int32),
        logits=query.new_empty((rows, queries, entries), dtype=torch.float32) if observed else None,
    )
    if observe and partials.logits is not None:
        partials.logits.fill_(-torch.inf)
    skipped = _skipped(store, heads) if observed else {}
    for place, launch in enumerate(launches):
        bounds, before = partials.bounds[place], skipped.get(launch.stretch.store)
        _attend(launch, heads, variant, counts, rotary, partials, bounds, before, query.dtype)
    out, sums = _merged(launches, partials, query, variant, size)
    if updates is not None and partials.logits is not None:
        columns, overlap = _columns(store), overlaps(query.device)
        for update in updates.each:
            put(update, partials.logits, sums, columns, heads.start, updates.positions, overlap)
    if not observe or partials.logits is None:
        return out, None
    weights = partials.logits.sub_(sums.view(rows, queries, 1)).exp2_()
    weights = weights.view(query.shape[0], -1, queries, 1, entries)
    return out, Paid([weights], [torch.ones_like(weights[..., :1])], [entries])


def _planned(
    query: Tensor, store: Store, heads: slice, together: int, tuned: Tuning | None, chunk: int | None
) -> list[Launch]:
    """The launches for ``query``, [R, G, size]; ``tuned`` and ``chunk``: in place of what is chosen."""
    launches: list[Launch] = []
    ahead = read = 0
    for stretch in stretches(store):
        total = stretch.entries(heads) * together
        tuning = tuned or stretch.tuning(total)
        each = chunk or tuning.chunk(total, query.shape[0], query.device)
        splits = _room(total, each, query.shape[0])
        launches.append(
            Launch(stretch, tuning, *stretch.asked(query, heads), stretch.factors(heads), each, splits, ahead, together)
        )
        ahead, read = ahead + splits, read + total
    assert read == int(store.lengths[heads].sum()) * together
    return launches


def _room(total: int, chunk: int, rows: int) -> int:
    """The most splits that so many entries of so many rows have, and one more, so that there is room to grow."""
    return total // chunk + rows + 1


def _attend(
    launch: Launch,
    heads: slice,
    variant: Variant,
    counts: bool,
    rotary: Rotary | None,
    partials: Partials,
    bounds: Tensor,
    skipped: Tensor | None,
    dtype: torch.dtype,
) -> None:
    stretch, tuning, store = launch.stretch, launch.tuning, launch.stretch.store
    rows, queries, _ = launch.query.shape
    key_tiling, value_tiling = stretch.tilings(tuning.block, dtype == torch.float32, launch.together, rotary)
    key_segment, value_segment = stretch.segments
    assert key_tiling
    assert value_tiling
    assert store.columns is not None or not (counts or rotary)
    keys, key_tail = segments(store.keys)
    values, value_tail = segments(store.values)
    overlap, unused, logits = overlaps(launch.query.device), partials.extent, partials.logits
    rotation = key_tail
    if rotary and store.columns:
        rotation = (*arguments(store.columns, "position"), rotary.tables(dtype, launch.query.device))
    attend_split[(launch.splits,)](
        launch.query.contiguous(),
        unused if launch.offset is None else launch.offset,
        keys,
        key_tail,
        values,
        value_tail,
        arguments(store.columns, "count") if counts and store.columns else key_tail,
        rotation,
        partials.sums,
        partials.extent,
        unused if logits is None else logits,
        unused if skipped is None else skipped,
        bounds,
        heads.start,
        rows,
        launch.chunk,
        0 if logits is None else logits.shape[2],
        launch.ahead,
        variant.scaling,
        variant.softcap or 1.0,
        ROWS=next_power_of_2(rows),
        HEADS=launch.together,
        QUERIES=queries,
        HEIGHT=8 if queries <= 8 else 16,
        BLOCK=tuning.block,
        STAGES=tuning.stages,
        DISTANCE=tuning.distance if overlap else 0,
        **key_tiling.arguments("K", key_segment.pool.page_size, dtype),
        **value_tiling.arguments("V", value_segment.pool.page_size, dtype),
        K_SETTLED=store.keys.settled is not None,
        V_SETTLED=store.values.settled is not None,
        K_READS=stretch.keys,
        V_READS=stretch.values,
        OFFSET=launch.offset is not None,
        SKIPS=skipped is not None,
        PACKED=not _INTERPRETED,
        PAGE=store.arena.page_size,
        CAPPED=variant.softcap is not None,
        COUNTED=counts,
        OBSERVED=logits is not None,
        ROTATED=rotary is not None,
        OVERLAP=overlap,
        num_warps=tuning.warps,
        maxnreg=tuning.registers,
        launch_pdl=overlap,
    )


def _merged(
    launches: list[Launch], partials: Partials, query: Tensor, variant: Variant, size: int
) -> tuple[Tensor, Tensor]:
    """The output [B, H, 1, size], and the log-sum-exps of the logits [R * G] where these are observed."""
    rows, queries, _ = launches[0].query.shape
    out, unused = query.new_empty((*query.shape[:3], size)), partials.extent
    observed, overlap = partials.logits is not None, overlaps(query.device)
    sums = query.new_empty((rows * queries,), dtype=torch.float32) if observed else unused
    merge_splits[(rows * queries,)](
        partials.sums,
        partials.extent,
        partials.bounds,
        tuple(unused if launch.factors is None else launch.factors for launch in launches),
        unused if variant.sinks is None else variant.sinks,
        out,
        sums,
        rows,
        query.shape[1],
        QUERIES=queries,
        LAUNCHES=len(launches),
        DIVIDED=sum((launch.factors is not None) << place for place, launch in enumerate(launches)),
        V_SIZE=size,
        V_WIDTH=next_power_of_2(size),
        BLOCK=16,
        SINKS=variant.sinks is not None,
        OBSERVED=observed,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )
    return out, sums


def _skipped(store: Store, heads: slice) -> dict[Store, Tensor]:
    """How many entries of each head are read before those of each store but the first, int32 [R] on the device."""
    lengths = [
        torch.stack([segment.mirror().spans[heads, 1] for segment in each.keys.segments]).sum(0, dtype=torch.int32)
        for each in store.stores[:-1]
    ]
    return dict(zip(store.stores[1:], accumulate(lengths), strict=True))


def _bound(store: Store, heads: slice, updates: Updates | None) -> int:
    """Entries of which logits are kept. With updates as many as the columns' tables have room for: when heads outgrow
    one, it moves, so that a captured pass is captured anew."""
    if updates is None:
        return int(store.lengths[heads].max())
    return sum(each.mirror().table.shape[1] * each.pool.page_size for each in _columns(store))


def _columns(store: Store) -> list[Segment]:
    """The columns of all stores, in the order of reading."""
    columns = [each.columns for each in store.stores if each.columns]
    assert len(columns) == len(store.stores)
    return columns


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def overlaps(device: torch.device) -> bool:
    """Whether kernels can be launched before those are done that they wait for."""
    return _OVERLAP and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def has_float8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def segments(side: Side) -> tuple[tuple, tuple]:
    """The settled segment (the tail, where there is none) and the tail, as kernels take them."""
    tail = arguments(side.tail)
    return (arguments(side.settled) if side.settled else tail), tail


def arguments(segment: Segment, column: str | None = None) -> tuple:
    tensors, mirror = segment.pool.tensors, segment.mirror()
    x = tensors[column] if column else _first(tensors, "codes", "bitmap", "x")
    second = _first(tensors, "range", "scale", "numbers") if len(tensors) > 1 and not column else None
    place = mirror.table, mirror.spans, mirror.table.stride(0)
    return (x, x if second is None else second, *place, *_beside(segment))


def _beside(segment: Segment) -> tuple[tuple, ...]:
    """The tensors that the kind of a segment needs besides, and those of exact tokens (see ``kinds``)."""
    fmt = segment.format
    if isinstance(fmt, Exempt):
        return (*_of_kind(segment, fmt.inner), (segment.state["exact"], segment.state["places"]))
    return _of_kind(segment, fmt)


def _of_kind(segment: Segment, fmt: Format) -> tuple[tuple, ...]:
    tensors, (shared, row) = segment.pool.tensors, segment.shared
    while isinstance(fmt, Mapped) and not (isinstance(fmt, Rotated) and fmt.shared):
        fmt = fmt.inner
    if isinstance(fmt, Rotated):
        return ((shared["rank"], row),)
    if isinstance(fmt, Corrected):
        return (tuple(tensors[name] for name in ("exact", "places", "left", "right")),)
    if isinstance(fmt, Signs):
        return ((tensors["signs"], tensors["magnitude"]),)
    if isinstance(fmt, NonUniform):
        ranges = shared if fmt.fixed else tensors
        read = shared["read"] if "read" in shared else shared["levels"]
        return ((tensors["exact"], tensors["places"], read, row, ranges["center"], ranges["half"]),)
    return ()


def _first(tensors: dict[str, Tensor], *names: str) -> Tensor | None:
    return next((tensors[name] for name in names if name in tensors), None)
