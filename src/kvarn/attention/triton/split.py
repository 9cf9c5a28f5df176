"""Decode attention over a paged store: heads cut into splits of entries, and the merge of what the splits give.

A *row* is a KV head of a layer with its queries. Splits of all rows are numbered through, so that rows of very
different lengths take as many programs as they have entries for. Logits are in base 2 throughout: natural ones times
log2(e).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .folded import (
    LIFT,
    factor,
    half_ranges,
    key_channels,
    key_codes,
    key_tiles,
    per_entry,
    ranges,
    relative,
    value_channels,
    value_codes,
    value_tiles,
)
from .tiles import first_channel, numbers, slots

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["first", "rows", "chunk", "longest"])
def attend_split(
    query,  # [rows * QUERIES, K_SIZE]
    keys,
    key_tail,
    values,
    value_tail,
    counts,
    partial,  # fp32 [splits, QUERIES, V_SIZE]
    extent,  # fp32 [splits, QUERIES, 2]: the largest logit, the sum of weights
    logits,  # fp32 [rows, QUERIES, longest], where OBSERVED
    first,
    rows,
    chunk,
    longest,
    scaling,
    softcap,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    K_KIND: tl.constexpr,
    K_BITS: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_SIZE: tl.constexpr,
    K_TILES: tl.constexpr,
    K_PARTS: tl.constexpr,
    K_RUN: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_FINE: tl.constexpr,
    K_FOLDED: tl.constexpr,
    K_TYPE: tl.constexpr,
    V_KIND: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_TILES: tl.constexpr,
    V_PARTS: tl.constexpr,
    V_RUN: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_FINE: tl.constexpr,
    V_FOLDED: tl.constexpr,
    V_TYPE: tl.constexpr,
    PACKED: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    COUNTED: tl.constexpr,
    OBSERVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A split of a row: ``chunk`` of its entries."""
    V_LINES: tl.constexpr = V_RUN // 2 if V_FOLDED else V_WIDTH
    if OVERLAP:
        # Kernels are launched while those before them run: the merge after this one, and this one after others.
        gdc_wait()
        gdc_launch_dependents()
    split = tl.program_id(0)
    ends = tl.cumsum(_splits(keys, key_tail, first, rows, chunk, K_KIND != 0, ROWS), 0)
    row = tl.sum((ends <= split).to(tl.int32), 0)
    if row >= rows:
        return
    head = first + row
    k_settled = 0
    v_settled = 0
    if K_KIND != 0:
        k_settled = tl.load(keys[3] + 2 * head + 1)
    if V_KIND != 0:
        v_settled = tl.load(values[3] + 2 * head + 1)
    length = k_settled + tl.load(key_tail[3] + 2 * head + 1)
    low = (split - tl.max(tl.where(ends <= split, ends, 0), 0)) * chunk
    high = tl.minimum(low + chunk, length)

    top = tl.full([HEIGHT], float("-inf"), tl.float32)
    total = tl.zeros([8, HEIGHT], tl.float32)  # to be added up, as the minima
    sums = ()
    for _ in tl.static_range(V_TILES):
        sums = sums + (tl.zeros([V_LINES, HEIGHT], tl.float32),)
    minima = ()
    for _ in tl.static_range(V_TILES // 2 if V_FOLDED else 0):
        minima = minima + (tl.zeros([8, HEIGHT], tl.float32),)

    # Keys and values settle at different entries, so a split is cut where either does. Which of two orders the cuts
    # have differs from head to head: of the second and the third loop at most one runs.
    for part in tl.static_range(4):
        if (K_KIND != 0 or part // 2 == 1) and (V_KIND != 0 or part % 2 == 1):
            top, total, sums, minima = _attend_part(
                query, keys, key_tail, values, value_tail, counts, logits, row, head, low, high, k_settled, v_settled,
                longest, scaling, softcap, top, total, sums, minima, part // 2, part % 2, QUERIES, HEIGHT, BLOCK,
                STAGES,
                K_KIND, K_BITS, K_GROUP, K_PAGE, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH, K_FINE, K_FOLDED, K_TYPE,
                V_KIND, V_BITS, V_GROUP, V_PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, V_FINE, V_FOLDED, V_TYPE,
                PACKED, PAGE, CAPPED, COUNTED, OBSERVED,
            )  # fmt: skip

    line = tl.arange(0, HEIGHT)
    at = split * QUERIES + line
    tl.store(extent + 2 * at, top, mask=line < QUERIES)
    tl.store(extent + 2 * at + 1, tl.sum(total, 0), mask=line < QUERIES)
    place = tl.arange(0, V_LINES)
    there = (line < QUERIES)[None, :]
    if not V_FOLDED and V_RUN < V_WIDTH:
        there = there & (place < V_RUN)[:, None]
    for i in tl.static_range(V_TILES):
        least = tl.zeros([HEIGHT], tl.float32)
        if V_FOLDED and V_KIND == 2:
            least = tl.sum(minima[i // (2 * V_PARTS) * V_PARTS + i % V_PARTS], 0)
        if V_FOLDED:
            channel = value_channels(i, V_SIZE, V_PARTS, V_RUN)
        else:
            channel = first_channel(i, V_PARTS, V_RUN, V_SIZE) + place
        tl.store(partial + at[None, :] * V_SIZE + channel[:, None], sums[i] + least[None, :], mask=there)


@triton.jit
def _splits(keys, key_tail, first, rows, chunk, SETTLED: tl.constexpr, ROWS: tl.constexpr):
    """How many splits each row has, [ROWS]: a power of two that is not below ``rows``."""
    row = tl.arange(0, ROWS)
    length = tl.load(key_tail[3] + 2 * (first + row) + 1, mask=row < rows, other=0)
    if SETTLED:
        length += tl.load(keys[3] + 2 * (first + row) + 1, mask=row < rows, other=0)
    return (length + chunk - 1) // chunk


@triton.jit
def _attend_part(
    query,
    keys,
    key_tail,
    values,
    value_tail,
    counts,
    logits,
    row,
    head,
    begin,
    end,
    k_settled,
    v_settled,
    longest,
    scaling,
    softcap,
    top,
    total,
    sums,
    minima,
    K_TAIL: tl.constexpr,
    V_TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    HEIGHT: tl.constexpr,
    MOST: tl.constexpr,
    STAGES: tl.constexpr,
    K_KIND: tl.constexpr,
    K_BITS: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_SIZE: tl.constexpr,
    K_TILES: tl.constexpr,
    K_PARTS: tl.constexpr,
    K_RUN: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_FINE: tl.constexpr,
    K_FOLDED: tl.constexpr,
    K_TYPE: tl.constexpr,
    V_KIND: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_TILES: tl.constexpr,
    V_PARTS: tl.constexpr,
    V_RUN: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_FINE: tl.constexpr,
    V_FOLDED: tl.constexpr,
    V_TYPE: tl.constexpr,
    PACKED: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    COUNTED: tl.constexpr,
    OBSERVED: tl.constexpr,
):
    """Entries from ``begin`` to ``end`` whose keys, and whose values, lie in the tail or have settled."""
    k_shift = 0
    v_shift = 0
    if K_TAIL:
        begin = tl.maximum(begin, k_settled)
        k_shift = k_settled
        k_segment = key_tail
    else:
        end = tl.minimum(end, k_settled)
        k_segment = keys
    if V_TAIL:
        begin = tl.maximum(begin, v_settled)
        v_shift = v_settled
        v_segment = value_tail
    else:
        end = tl.minimum(end, v_settled)
        v_segment = values
    k_folded: tl.constexpr = K_FOLDED and not K_TAIL
    v_folded: tl.constexpr = V_FOLDED and not V_TAIL
    k_type: tl.constexpr = query.dtype.element_ty if K_TAIL else K_TYPE
    v_type: tl.constexpr = query.dtype.element_ty if V_TAIL else V_TYPE
    scale = scaling * LOG2E * (2 / softcap if CAPPED else 1.0)
    if k_folded:
        queries = _woven_queries(query, row, scale, QUERIES, HEIGHT, K_SIZE, K_TILES, K_PARTS, K_RUN)
    elif K_FOLDED:
        queries = _queries(query, row, QUERIES, HEIGHT, K_SIZE, 1, 1, K_SIZE, K_WIDTH, k_type)
    else:
        queries = _queries(query, row, QUERIES, HEIGHT, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH, k_type)
    if v_folded:
        sums = _in_units(sums, False, V_TILES, V_KIND, V_BITS, V_PARTS)
    # Tails are short beside what has settled: their loops should not take shared memory from the others.
    short: tl.constexpr = (K_TAIL and K_KIND != 0) or (V_TAIL and V_KIND != 0)
    stages: tl.constexpr = 1 if k_folded and v_folded else 2 if short else STAGES
    BLOCK: tl.constexpr = MOST // 2 if short and MOST > 16 else MOST
    # Blocks lie on a grid from entry 0, so that none crosses a unit of the settled format.
    grid = begin // BLOCK * BLOCK
    for base in tl.range(grid, tl.where(begin < end, end, grid), BLOCK, num_stages=stages):
        entries = base + tl.arange(0, BLOCK)
        if v_folded:
            value = value_codes(v_segment, head, base, BLOCK, V_KIND, V_GROUP, V_PAGE, V_SIZE, V_PARTS, V_RUN)
        if k_folded:
            key = key_codes(k_segment, head, base, BLOCK, K_KIND, K_GROUP, K_PAGE, K_SIZE, K_PARTS, K_RUN)
            logit = _folded_logits(
                queries, key, k_segment, BLOCK, HEIGHT, K_KIND, K_BITS, K_SIZE, K_PARTS, K_RUN, PACKED
            )
        else:
            cut: tl.constexpr = not K_FOLDED
            tiles = numbers(
                k_segment, head, base - k_shift, entries - k_shift, BLOCK, 0 if K_TAIL else K_KIND, K_BITS, K_GROUP,
                PAGE if K_TAIL else K_PAGE, K_SIZE, K_TILES if cut else 1, K_PARTS if cut else 1,
                K_RUN if cut else K_SIZE, K_WIDTH, k_type, K_FINE, False,
            )  # fmt: skip
            logit = tl.zeros([BLOCK, HEIGHT], tl.float32)
            for i in tl.static_range(K_TILES if cut else 1):
                logit = tl.dot(tiles[i], queries[i], logit, input_precision="ieee")
            logit *= scale
        if CAPPED:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right for infinite exponentials too.
            logit = (1 - 2 / (tl.exp2(logit) + 1)) * (softcap * LOG2E)
        if COUNTED:
            count = tl.load(counts[0] + slots(counts, head, entries, PAGE))
            logit += tl.log2(tl.maximum(count, 1).to(tl.float32))[:, None]
        valid = (entries >= begin) & (entries < end)
        logit = tl.where(valid[:, None], logit, float("-inf"))
        if OBSERVED:
            line = tl.arange(0, HEIGHT)
            at = logits + (row * QUERIES + line).to(tl.int64)[None, :] * longest + entries[:, None]
            tl.store(at, logit, mask=(line < QUERIES)[None, :] & valid[:, None])
        higher = tl.maximum(top, tl.max(logit, 0) - LIFT)
        weight = tl.exp2(logit - higher[None, :])
        fade = tl.exp2(top - higher)
        total = total * fade[None, :] + _in_eights(weight, BLOCK, HEIGHT)
        top = higher
        if v_folded:
            sums, minima = _folded_sums(
                sums, minima, weight, fade, value, v_segment, BLOCK, HEIGHT, V_KIND, V_BITS, V_SIZE, V_PARTS, V_RUN,
                PACKED,
            )  # fmt: skip
        else:
            if V_FOLDED:
                tiles = _woven_values(v_segment, head, entries - v_shift, PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN)
            else:
                tiles = numbers(
                    v_segment, head, base - v_shift, entries - v_shift, BLOCK, 0 if V_TAIL else V_KIND, V_BITS,
                    V_GROUP, PAGE if V_TAIL else V_PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, v_type, V_FINE, True,
                )  # fmt: skip
            added = ()
            for i in tl.static_range(V_TILES):
                faded = sums[i] * fade[None, :]
                added = added + (tl.dot(tiles[i], weight.to(v_type), faded, input_precision="ieee"),)
            sums = added
            if V_FOLDED and V_KIND == 2:
                faded = ()
                for i in tl.static_range(V_TILES // 2):
                    faded = faded + (minima[i] * fade[None, :],)
                minima = faded
    if v_folded:
        sums = _in_units(sums, True, V_TILES, V_KIND, V_BITS, V_PARTS)
    return top, total, sums, minima


@triton.jit
def _folded_logits(
    queries,
    codes,
    segment,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Products of queries and the keys of ``key_codes``, [BLOCK, HEIGHT]."""
    RUNS: tl.constexpr = SIZE // PARTS // RUN
    logit = tl.zeros([BLOCK, HEIGHT], tl.float32)
    lowest = tl.zeros([RUN // 2, HEIGHT], tl.float16)  # queries times minima, which all entries of a unit share
    for run in tl.static_range(RUNS):
        tiles = key_tiles(codes[run], KIND, BITS, PACKED)
        asking = queries[run * 2 * PARTS : (run + 1) * 2 * PARTS]
        if KIND == 1:
            raw = codes[RUNS + run * 2 * PARTS : RUNS + (run + 1) * 2 * PARTS]
            for i in tl.static_range(2 * PARTS):
                s, m = half_ranges(segment, raw[i], relative(i, BITS, PARTS), PACKED)
                logit = tl.dot(tiles[i], asking[i] * s[:, None], logit)
                lowest += asking[i] * m[:, None]
        else:
            raw = codes[RUNS + run * PARTS : RUNS + (run + 1) * PARTS]
            for part in tl.static_range(PARTS):
                product = tl.dot(tiles[part], asking[part])
                product = tl.dot(tiles[PARTS + part], asking[PARTS + part], product)
                s, m = ranges(segment, raw[part], KIND)
                logit += product * per_entry(s * factor(part, KIND, BITS, PARTS), HEIGHT)
                if KIND == 2:
                    whole = tl.sum(asking[part].to(tl.float32) + asking[PARTS + part].to(tl.float32), 0)
                    logit += per_entry(m, HEIGHT) * whole[None, :]
    if KIND == 1:
        ones = tl.full([BLOCK, RUN // 2], 1.0, tl.float16)
        logit = tl.dot(ones, lowest, logit * factor(0, KIND, BITS, PARTS))
    return logit


@triton.jit
def _folded_sums(
    sums,
    minima,
    weight,
    fade,
    codes,
    segment,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """``sums``, in the units of ``_in_units``, and ``minima`` with what the values of ``value_codes`` add: of each run
    and part the sums of weights times minima, not yet added up over eight groups of entries."""
    RUNS: tl.constexpr = SIZE // PARTS // RUN
    added = ()
    more = ()
    for run in tl.static_range(RUNS):
        tiles = value_tiles(codes[run], KIND, BITS, PACKED)
        before = sums[run * 2 * PARTS : (run + 1) * 2 * PARTS]
        if KIND == 1:
            raw = codes[RUNS + run * 2 * PARTS : RUNS + (run + 1) * 2 * PARTS]
            for i in tl.static_range(2 * PARTS):
                s, m = ranges(segment, raw[i], KIND)
                product = tl.dot(tiles[i], weight.to(tl.float16))
                whole = tl.sum(weight, 0) / factor(i, KIND, BITS, PARTS)
                added = added + (before[i] * fade[None, :] + product * s[:, None] + m[:, None] * whole[None, :],)
        else:
            raw = codes[RUNS + run * PARTS : RUNS + (run + 1) * PARTS]
            weights = ()
            for part in tl.static_range(PARTS):
                s, m = ranges(segment, raw[part], KIND)
                weights = weights + ((weight * per_entry(s, HEIGHT)).to(tl.float16),)
                if KIND == 2:
                    least = _in_eights(weight * per_entry(m, HEIGHT), BLOCK, HEIGHT)
                    more = more + (minima[run * PARTS + part] * fade[None, :] + least,)
            for i in tl.static_range(2 * PARTS):
                added = added + (tl.dot(tiles[i], weights[i % PARTS], before[i] * fade[None, :]),)
    if KIND == 2:
        minima = more
    return added, minima


@triton.jit
def _in_eights(x, BLOCK: tl.constexpr, HEIGHT: tl.constexpr):
    """[BLOCK, HEIGHT] added up over groups of eight lines, which takes one thread no other: [8, HEIGHT]."""
    return tl.sum(x.reshape(BLOCK // 8, 8, HEIGHT), 0)


@triton.jit
def _in_units(
    sums, BACK: tl.constexpr, TILES: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr
):
    """Sums in the units in which products with codes are added up, or back."""
    scaled = ()
    for i in tl.static_range(TILES):
        if BACK:
            scaled = scaled + (sums[i] * factor(i, KIND, BITS, PARTS),)
        else:
            scaled = scaled + (sums[i] * (1 / factor(i, KIND, BITS, PARTS)),)
    return scaled


@triton.jit
def _woven_values(
    segment,
    head,
    entries,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Values that are kept as they are, in the order of tiles of codes."""
    row = segment[0] + slots(segment, head, entries, PAGE)[None, :] * SIZE
    tiles = ()
    for i in tl.static_range(TILES):
        tiles = tiles + (tl.load(row + value_channels(i, SIZE, PARTS, RUN)[:, None]),)
    return tiles


@triton.jit
def _queries(
    query,
    row,
    QUERIES: tl.constexpr,
    HEIGHT: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The row's queries, cut as tiles of keys are: [WIDTH, HEIGHT] each."""
    line = tl.arange(0, HEIGHT)
    channel = tl.arange(0, WIDTH)
    there = (channel < RUN)[:, None] & (line < QUERIES)[None, :]
    tiles = ()
    for i in tl.static_range(TILES):
        at = query + (row * QUERIES + line)[None, :] * SIZE + first_channel(i, PARTS, RUN, SIZE) + channel[:, None]
        tiles = tiles + (tl.load(at, mask=there, other=0).to(TYPE),)
    return tiles


@triton.jit
def _woven_queries(
    query,
    row,
    scale,
    QUERIES: tl.constexpr,
    HEIGHT: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
):
    """The row's queries times ``scale`` in the order of tiles of codes: [RUN / 2, HEIGHT] each, in fp16."""
    line = tl.arange(0, HEIGHT)
    tiles = ()
    for i in tl.static_range(TILES):
        at = query + (row * QUERIES + line)[None, :] * SIZE + key_channels(i, SIZE, PARTS, RUN)[:, None]
        tiles = tiles + ((tl.load(at, mask=(line < QUERIES)[None, :], other=0) * scale).to(tl.float16),)
    return tiles


@triton.jit(do_not_specialize=["first", "rows", "chunk", "heads"])
def merge_splits(
    partial,
    extent,
    sinks,  # [query heads of a sequence], where SINKS
    key_tail,
    keys,
    out,  # [rows * QUERIES, V_SIZE]
    sums,  # fp32 [rows * QUERIES]: log-sum-exps, where OBSERVED
    first,
    rows,
    chunk,
    heads,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    SETTLED: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    OBSERVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What one query's splits give together, normalized."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    query = tl.program_id(0)
    row = query // QUERIES
    splits = _splits(keys, key_tail, first, rows, chunk, SETTLED, ROWS)
    every = tl.arange(0, ROWS)
    before = tl.sum(tl.where(every < row, splits, 0), 0)
    used = tl.sum(tl.where(every == row, splits, 0), 0)
    channel = tl.arange(0, V_WIDTH)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if SINKS:
        top = tl.load(sinks + query % heads).to(tl.float32) * LOG2E
        total += 1
    result = tl.zeros([V_WIDTH], tl.float32)
    for base in range(0, used, BLOCK):
        split = base + tl.arange(0, BLOCK)
        at = (before + split) * QUERIES + query % QUERIES
        tops = tl.load(extent + 2 * at, mask=split < used, other=float("-inf"))
        totals = tl.load(extent + 2 * at + 1, mask=split < used, other=0)
        there = (split < used)[:, None] & (channel < V_SIZE)[None, :]
        some = tl.load(partial + at[:, None] * V_SIZE + channel[None, :], mask=there, other=0)
        higher = tl.maximum(top, tl.max(tops, 0))
        share = tl.exp2(tops - higher)
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(share * totals, 0)
        result = result * fade + tl.sum(share[:, None] * some, 0)
        top = higher
    # A head without entries and sinks gives nothing.
    result = tl.where(total > 0, result / tl.where(total > 0, total, 1), 0)
    tl.store(out + query * V_SIZE + channel, result.to(out.dtype.element_ty), mask=channel < V_SIZE)
    if OBSERVED:
        tl.store(sums + query, top + tl.log2(total))
