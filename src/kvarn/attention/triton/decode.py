"""Decode attention over the entries of a layer as they lie in their pages, without decoding or joining them."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from triton import next_power_of_2

from ...memory import Segment, Store
from ..reference import Paid, Variant
from ..rotary import Rotary
from ..updates import Updates
from .columns import put
from .devices import INTERPRETED, has_float8, overlaps
from .operands import arguments, segments
from .split import attend_split, merge_splits
from .stretches import Stretch, Tuning, stretches
from .tiles import FLOAT8

_MOST_QUERIES = 16  # rows of a tensor-core tile


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


def readable(store: Store, queries: int, together: int = 1, rotary: Rotary | None = None) -> bool:
    """Whether ``attend_stored`` reads this store, for so many queries of a KV head, ``together`` of which are one head
    of the store."""
    each = [stretch.tilings(stretch.tuning().block, False, together, rotary) for stretch in stretches(store)]
    cut = [one for both in each for one in both]
    if queries > _MOST_QUERIES or None in cut:
        return False
    return has_float8(store.arena.device) or all(one.kind != FLOAT8.value for one in cut if one)


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
        PACKED=not INTERPRETED,
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
