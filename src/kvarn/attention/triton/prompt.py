"""Attention of a prompt's tokens over what is stored, as it lies in its pages, and over themselves."""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from ...formats import Float8
from ...memory import Side, Store
from ..reference import Variant
from .decode import Tiling, arguments, has_float8, segments, tiling
from .flash import attend_blocks


@dataclass(frozen=True)
class Blocks:
    """How the kernel is run: rows (query heads of tokens) and entries a block, warps, stages of loads under way."""

    rows: int
    entries: int
    warps: int
    stages: int


def blocks(store: Store, query: Tensor) -> Blocks:
    """What the shared memory and the registers of a processor hold."""
    settled = [side.settled.format for side in (store.keys, store.values) if side.settled]
    entries = max(16, gcd(64, *(fmt.unit for fmt in settled if fmt.unit > 1)))
    if not query.is_cuda:
        return Blocks(128, entries, 4, 1)  # interpreted: few programs
    if query.dtype == torch.float32:
        return Blocks(16, min(entries, 32), 4, 1)
    wide = max(side.tail.format.layout["x"][0][0] for side in (store.keys, store.values)) > 128
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
    run = run or blocks(store, query)
    sides = store.keys, store.values
    # Folded codes are for few queries: here a number is made once for many rows.
    tilings = [tiling((side.settled or side.tail).format, run.entries, exact=True) for side in sides]
    key_tiling, value_tiling = tilings
    assert key_tiling
    assert value_tiling
    query, keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (query, keys, values))
    batch, query_heads, tokens, _ = query.shape
    kv_heads = keys.shape[1]
    group = query_heads // kv_heads
    # As the model's next product wants it: transposing it back costs nothing.
    out = query.new_empty((batch, tokens, query_heads, value_tiling.size))
    assert store.columns is not None or not counts
    stored_keys, key_tail = segments(store.keys)
    stored_values, value_tail = segments(store.values)
    attend_blocks[(cdiv(tokens * group, run.rows), batch * kv_heads)](
        query,
        keys,
        values,
        out,
        stored_keys,
        key_tail,
        stored_values,
        value_tail,
        arguments(store.columns, "count") if counts and store.columns else key_tail,
        out if variant.sinks is None else variant.sinks,
        query.stride()[:3],
        keys.stride()[:3],
        values.stride()[:3],
        heads.start,
        tokens,
        window or 0,
        variant.scaling,
        variant.softcap or 1.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=run.rows,
        BLOCK=run.entries,
        STAGES=run.stages,
        **_constants("K", key_tiling, store.keys, query.dtype),
        **_constants("V", value_tiling, store.values, query.dtype),
        PAGE=store.arena.page_size,
        CAPPED=variant.softcap is not None,
        COUNTED=counts,
        SINKS=variant.sinks is not None,
        WINDOWED=window is not None,
        num_warps=run.warps,
    )
    return out.transpose(1, 2)


def _constants(name: str, of: Tiling, side: Side, dtype: torch.dtype) -> dict[str, Any]:
    constants = of.arguments(name, (side.settled or side.tail).pool.page_size, dtype)
    del constants[f"{name}_FOLDED"], constants[f"{name}_BESIDE"]
    return constants
