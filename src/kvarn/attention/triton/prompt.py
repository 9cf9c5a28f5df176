"""Attention of a prompt's tokens over what is stored, as it lies in its pages or decoded, and over themselves."""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from ...formats import Dense, Float8
from ...memory import Store, sent
from ..reference import Part, Variant
from .devices import has_float8
from .flash import attend_blocks
from .operands import arguments, segments
from .tilings import Tiling, tiling

_ENTRIES = 64  # of a block
_WIDTH = 16  # a table's width is a multiple of this: kernels are compiled for that


@dataclass(frozen=True)
class Blocks:
    """How the kernel is run: rows (query heads of tokens) and entries a block, warps, stages of loads under way."""

    rows: int
    entries: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Past:
    """What is stored as the kernel takes it: keys and their tail, values and theirs, the counts of entries, the first
    head, and the sizes of pages of settled keys, settled values and tails."""

    sides: tuple[tuple, tuple, tuple, tuple]
    counts: tuple | None
    first: int
    pages: tuple[int, int, int]


def blocks(query: Tensor, size: int, entries: int) -> Blocks:
    """What the shared memory and the registers of a processor hold, of vectors of ``size`` numbers at the most and
    ``entries`` at once."""
    if not query.is_cuda:
        return Blocks(128, entries, 4, 1)  # interpreted: few programs
    if query.dtype == torch.float32:
        return Blocks(16, min(entries, 32), 4, 1)
    wide = size > 128
    if torch.cuda.get_device_capability(query.device) < (9, 0):
        return Blocks(64, min(entries, 32) if wide else entries, 4, 2)
    return Blocks(128, entries, 8, 2 if wide else 3)


def readable(store: Store) -> bool:
    """Whether ``attend_prompt`` reads this store: one precision, in formats that are no map of another."""
    if len(store.stores) > 1:
        return False
    formats = [(side.settled or side.tail).format for side in (store.keys, store.values)]
    float8 = any(isinstance(fmt, Float8) for fmt in formats)
    cut = [tiling(fmt, 16) for fmt in formats]
    return all(each and each.plain for each in cut) and (not float8 or has_float8(store.arena.device))


def attend_prompt(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    store: Store,
    heads: slice,
    variant: Variant,
    window: int | None = None,
    counts: bool = False,
    run: Blocks | None = None,
) -> Tensor:
    """Attention of new tokens (queries [B, H, q, D], keys and values [B, K, q, D]) over all entries of ``heads``, a
    layer's, and over themselves up to each: [B, H, q, D]. ``window``: a token reads the newest so many tokens, itself
    included, and what is stored are the newest before it, in order. ``counts``: stored entries weigh as their column
    ``count`` says. The store is ``readable``.
    """
    sides, settled = (store.keys, store.values), [side.settled for side in (store.keys, store.values) if side.settled]
    widest = max(side.tail.format.layout["x"][0][0] for side in sides)
    units = (segment.unit for segment in settled if segment.unit > 1)
    run = run or blocks(query, widest, max(16, gcd(_ENTRIES, *units)))
    # Folded codes are for few queries: here a number is made once for many rows.
    read = [side.settled or side.tail for side in sides]
    tilings = [tiling(segment.format, run.entries, exact=True) for segment in read]
    assert store.columns is not None or not counts
    stored_keys, key_tail = segments(store.keys)
    stored_values, value_tail = segments(store.values)
    past = Past(
        (stored_keys, key_tail, stored_values, value_tail),
        arguments(store.columns, "count") if counts and store.columns else None,
        heads.start,
        (read[0].pool.page_size, read[1].pool.page_size, store.arena.page_size),
    )
    return _attended(query, keys, values, past, tilings, variant, window, run)


def attend_decoded(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    past: Part,
    lengths: Tensor,
    variant: Variant,
    run: Blocks | None = None,
) -> Tensor:
    """As ``attend_prompt``, over the first ``lengths`` (int64 [B, K] on the host) of the entries ``past`` of each head,
    which have been decoded; they have no mask and no weights."""
    spans = sent(torch.stack([torch.zeros_like(lengths), lengths], -1).int().flatten(0, 1), query.device)
    sides = [_as_pages(x, spans) for x in (past.keys, past.values)]
    sizes = past.keys.shape[3], past.values.shape[3]
    run = run or blocks(query, max(sizes), _ENTRIES)
    tilings = [tiling(Dense(size, query.dtype), run.entries, exact=True) for size in sizes]
    as_stored = Past((sides[0], sides[0], sides[1], sides[1]), None, 0, (1, 1, 1))
    return _attended(query, keys, values, as_stored, tilings, variant, None, run)


def _as_pages(x: Tensor, spans: Tensor) -> tuple:
    """Vectors [B, K, n, size] as a segment of pages of one entry, wherever they lie."""
    batch, heads, entries, size = x.shape
    if x.stride(3) != 1 or any(stride % size for stride in x.stride()[:3]):
        x = x.contiguous()
    width = -(-entries // _WIDTH) * _WIDTH
    places = [torch.arange(count, device=x.device) for count in (batch, heads, width)]
    places[2].clamp_(max=entries - 1)
    row, head, entry = (place * (stride // size) for place, stride in zip(places, x.stride()[:3], strict=True))
    table = (row[:, None, None] + head[:, None] + entry).int().view(batch * heads, width)
    return x, x, table, spans, width


def _attended(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    past: Past,
    tilings: list[Tiling | None],
    variant: Variant,
    window: int | None,
    run: Blocks,
) -> Tensor:
    key_tiling, value_tiling = tilings
    assert key_tiling
    assert value_tiling
    query, keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (query, keys, values))
    batch, query_heads, tokens, _ = query.shape
    kv_heads = keys.shape[1]
    group = query_heads // kv_heads
    # As the model's next product wants it: transposing it back costs nothing.
    out = query.new_empty((batch, tokens, query_heads, value_tiling.size))
    key_page, value_page, page = past.pages
    attend_blocks[(cdiv(tokens * group, run.rows), batch * kv_heads)](
        query,
        keys,
        values,
        out,
        *past.sides,
        past.sides[1] if past.counts is None else past.counts,
        out if variant.sinks is None else variant.sinks,
        query.stride()[:3],
        keys.stride()[:3],
        values.stride()[:3],
        past.first,
        tokens,
        window or 0,
        variant.scaling,
        variant.softcap or 1.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=run.rows,
        BLOCK=run.entries,
        STAGES=run.stages,
        **_constants("K", key_tiling, key_page, query.dtype),
        **_constants("V", value_tiling, value_page, query.dtype),
        PAGE=page,
        CAPPED=variant.softcap is not None,
        COUNTED=past.counts is not None,
        SINKS=variant.sinks is not None,
        WINDOWED=window is not None,
        num_warps=run.warps,
    )
    return out.transpose(1, 2)


def _constants(name: str, of: Tiling, page: int, dtype: torch.dtype) -> dict[str, Any]:
    constants = of.arguments(name, page, dtype)
    del constants[f"{name}_FOLDED"], constants[f"{name}_BESIDE"]
    return constants
