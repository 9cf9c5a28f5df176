"""Decode attention over the entries of a layer as they lie in their pages, without decoding or joining them."""

import os
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ...formats import Dense, Float8, Format, Int
from ...memory import Segment, Side, Store
from ..reference import Paid, Variant
from ..updates import Updates
from .columns import put
from .split import attend_split, merge_splits
from .tiles import CHANNEL, DENSE, FLOAT8, TOKEN

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_OVERLAP = True
_MOST_QUERIES = 16  # rows of a tensor-core tile
_LEAST_CHUNK = 128  # entries of a split


@dataclass(frozen=True)
class Tiling:
    """How the vectors of a format are cut into tiles (see ``tiles``, and ``folded`` for those that are)."""

    kind: int
    bits: int
    group: int
    size: int
    parts: int
    run: int
    fine: bool = False
    folded: bool = False

    @property
    def tiles(self) -> int:
        return 2 * self.size // self.run if self.folded else self.size // self.run

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
        }
        return {f"{side}_{name}": constant for name, constant in constants.items()}


def tiling(fmt: Format, block: int, exact: bool = False) -> Tiling | None:
    """How the kernels read ``fmt`` in blocks of so many entries; None: they do not. ``exact``: numbers in fp32."""
    if type(fmt) is Dense:
        ((size,), _) = fmt.layout["x"]
        return Tiling(DENSE.value, 16, size, size, 1, size)
    if type(fmt) is Float8:
        run = gcd(fmt.size, 64)
        return Tiling(FLOAT8.value, 8, fmt.size, fmt.size, 1, run, folded=_folds(fmt.size, run, exact))
    if type(fmt) is not Int:
        return None
    parts = 1 if fmt.bits == 3 else 8 // fmt.bits
    whole = fmt.size // parts
    per_channel = fmt.axis == "channel"
    run = gcd(whole, 128 if per_channel else fmt.group)
    fine = bool(fmt.group % block) if per_channel else run < 16
    folded = fmt.bits != 3 and not fine and _folds(fmt.size, run, exact)
    kind = CHANNEL if per_channel else TOKEN
    return Tiling(kind.value, fmt.bits, fmt.group, fmt.size, parts, whole if fine else run, fine, folded)


def _folds(size: int, run: int, exact: bool) -> bool:
    """Whether vectors in runs of so many bytes can be read as ``folded`` has them."""
    return run >= 32 and size & (size - 1) == 0 and not exact


@dataclass(frozen=True)
class Tuning:
    """How a kernel is run: entries a block, warps, stages of loads under way, the most registers of a thread, and how
    many splits a processor runs side by side, where they should all do (None: in turns, ``entries`` each)."""

    block: int
    warps: int
    stages: int
    registers: int | None = None
    resident: int | None = None
    entries: int = 1024

    def chunk(self, total: int, rows: int, device: torch.device) -> int:
        """Entries of a split, of so many in all."""
        if self.resident is None:
            return self.entries
        # Every row may have one split that is not full.
        room = max(self.resident * _processors(device) - rows, rows)
        return max(-(-total // (room * self.block)) * self.block, _LEAST_CHUNK)


def tuning(store: Store) -> Tuning:
    """What was fastest on an H200 (``benchmarks/gpu/attention.py``)."""
    settled = [side.settled.format for side in (store.keys, store.values) if side.settled]
    if not settled:
        return Tuning(64, 2, 4)
    units = [fmt.unit for fmt in settled if fmt.unit > 1]
    bits = [8 if isinstance(fmt, Float8) else fmt.bits for fmt in settled if isinstance(fmt, (Float8, Int))]
    block = max(16, gcd(16 if 8 in bits else 32, *units))
    return Tuning(block, 1, 2, registers=128, resident=16) if bits == [2, 2] else Tuning(block, 1, 2, 168, 12)


def readable(store: Store, queries: int) -> bool:
    """Whether ``attend_stored`` reads this store, for so many queries of a KV head."""
    formats = [(side.settled or side.tail).format for side in (store.keys, store.values)]
    return queries <= _MOST_QUERIES and all(tiling(fmt, tuning(store).block) for fmt in formats)


def attend_stored(
    query: Tensor,
    store: Store,
    heads: slice,
    variant: Variant,
    counts: bool = False,
    observe: bool = False,
    updates: Updates | None = None,
    tuned: Tuning | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Paid | None] | None:
    """Attention of one token's queries ([B, H, 1, D]) over all entries of ``heads``, a layer's: [B, H, 1, D], and with
    ``observe`` what was paid to each entry. ``counts``: entries weigh as their column ``count`` says. ``updates``: what
    changes of the columns, in pages that are not shared.

    None where the kernels do not read the store's formats.
    """
    tuned = tuned or tuning(store)
    exact = query.dtype == torch.float32
    tilings = [tiling((side.settled or side.tail).format, tuned.block, exact) for side in (store.keys, store.values)]
    key_tiling, value_tiling = tilings
    rows = heads.stop - heads.start
    queries = query.shape[0] * query.shape[1] // rows
    if key_tiling is None or value_tiling is None or queries > _MOST_QUERIES:
        return None
    if FLOAT8.value in (key_tiling.kind, value_tiling.kind) and not _has_float8(query.device):
        return None
    total = int(store.lengths[heads].sum())
    chunk = chunk or tuned.chunk(total, rows, query.device)
    splits = total // chunk + rows  # or fewer
    overlap = _OVERLAP and overlaps(query.device)
    partial = query.new_empty((splits, queries, value_tiling.size), dtype=torch.float32)
    extent = query.new_empty((splits, queries, 2), dtype=torch.float32)
    observed = observe or updates is not None
    entries = _bound(store, heads, updates) if observed else 0
    logits = query.new_empty((rows, queries, entries), dtype=torch.float32) if observed else extent
    if observe:
        logits.fill_(-torch.inf)
    sums = query.new_empty((rows * queries,), dtype=torch.float32) if observed else extent
    out = query.new_empty((*query.shape[:3], value_tiling.size))
    keys, key_tail = _segments(store.keys)
    values, value_tail = _segments(store.values)
    assert store.columns is not None or not counts
    columns = _arguments(store.columns, "count") if counts and store.columns else key_tail
    attend_split[(splits,)](
        query.contiguous(),
        keys,
        key_tail,
        values,
        value_tail,
        columns,
        partial,
        extent,
        logits,
        heads.start,
        rows,
        chunk,
        entries,
        variant.scaling,
        variant.softcap or 1.0,
        ROWS=next_power_of_2(rows),
        QUERIES=queries,
        HEIGHT=8 if queries <= 8 else 16,
        BLOCK=tuned.block,
        STAGES=tuned.stages,
        **key_tiling.arguments("K", (store.keys.settled or store.keys.tail).pool.page_size, query.dtype),
        **value_tiling.arguments("V", (store.values.settled or store.values.tail).pool.page_size, query.dtype),
        PACKED=not _INTERPRETED,
        PAGE=store.arena.page_size,
        CAPPED=variant.softcap is not None,
        COUNTED=counts,
        OBSERVED=observed,
        OVERLAP=overlap,
        num_warps=tuned.warps,
        maxnreg=tuned.registers,
        launch_pdl=overlap,
    )
    merge_splits[(rows * queries,)](
        partial,
        extent,
        extent if variant.sinks is None else variant.sinks,
        key_tail,
        keys,
        out,
        sums,
        heads.start,
        rows,
        chunk,
        query.shape[1],
        ROWS=next_power_of_2(rows),
        QUERIES=queries,
        SETTLED=store.keys.settled is not None,
        V_SIZE=value_tiling.size,
        V_WIDTH=next_power_of_2(value_tiling.size),
        BLOCK=16,
        SINKS=variant.sinks is not None,
        OBSERVED=observed,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )
    if updates is not None:
        assert store.columns is not None
        for update in updates.each:
            put(update, logits, sums, store.columns, heads.start, updates.positions, overlap)
    if not observe:
        return out, None
    weights = logits.sub_(sums.view(rows, queries, 1)).exp2_()
    weights = weights.view(query.shape[0], -1, queries, 1, entries)
    return out, Paid([weights], [torch.ones_like(weights[..., :1])], [entries])


def _bound(store: Store, heads: slice, updates: Updates | None) -> int:
    """Entries of which logits are kept. With updates as many as the columns' table has room for: when heads outgrow it,
    it moves, so that a captured pass is captured anew."""
    if updates is None:
        return int(store.lengths[heads].max())
    assert store.columns is not None
    return store.columns.mirror().table.shape[1] * store.columns.pool.page_size


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def overlaps(device: torch.device) -> bool:
    """Whether kernels can be launched before those are done that they wait for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _has_float8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _segments(side: Side) -> tuple[tuple, tuple]:
    """The settled segment (the tail, where there is none) and the tail, as kernels take them."""
    tail = _arguments(side.tail)
    return (_arguments(side.settled) if side.settled else tail), tail


def _arguments(segment: Segment, column: str | None = None) -> tuple:
    tensors, mirror = segment.pool.tensors, segment.mirror()
    x = tensors[column or ("codes" if "codes" in tensors else "x")]
    return x, tensors.get("range", tensors.get("scale", x)), mirror.table, mirror.spans, mirror.table.stride(0)
