"""Decode attention over a paged store: heads cut into splits of entries, and the merge of what the splits give.

A *row* is a KV head of a layer with its queries. Splits of all rows are numbered through, so that rows of very
different lengths take as many programs as they have entries for. Logits are in base 2 throughout: natural ones times
log2(e).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .tiles import first_channel, numbers, slots

LOG2E = tl.constexpr(1.4426950408889634)
LIFT = tl.constexpr(256.0)


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
    V_TYPE: tl.constexpr,
    PACKED: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    COUNTED: tl.constexpr,
    OBSERVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A split of a row: ``chunk`` of its entries."""
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
    total = tl.zeros([HEIGHT], tl.float32)
    sums = ()
    for _ in tl.static_range(V_TILES):
        sums = sums + (tl.zeros([V_WIDTH, HEIGHT], tl.float32),)

    # Keys and values settle at different entries, so a split is cut where either does. Which of two orders the cuts
    # have differs from head to head: of the second and the third loop at most one runs.
    for part in tl.static_range(4):
        if (K_KIND != 0 or part // 2 == 1) and (V_KIND != 0 or part % 2 == 1):
            top, total, sums = _attend_part(
                query, keys, key_tail, values, value_tail, counts, logits, row, head, low, high, k_settled, v_settled,
                longest, scaling, softcap, top, total, sums, part // 2, part % 2, QUERIES, HEIGHT, BLOCK, STAGES,
                K_KIND, K_BITS, K_GROUP, K_PAGE, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH, K_FINE, K_TYPE,
                V_KIND, V_BITS, V_GROUP, V_PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, V_FINE, V_TYPE,
                PACKED, PAGE, CAPPED, COUNTED, OBSERVED,
            )  # fmt: skip

    line = tl.arange(0, HEIGHT)
    at = split * QUERIES + line
    tl.store(extent + 2 * at, top, mask=line < QUERIES)
    tl.store(extent + 2 * at + 1, total, mask=line < QUERIES)
    channel = tl.arange(0, V_WIDTH)
    there = (channel < V_RUN)[:, None] & (line < QUERIES)[None, :]
    for i in tl.static_range(V_TILES):
        place = at[None, :] * V_SIZE + first_channel(i, V_PARTS, V_RUN, V_SIZE) + channel[:, None]
        tl.store(partial + place, sums[i] / LIFT if V_KIND == 3 else sums[i], mask=there)


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
    k_type: tl.constexpr = query.dtype.element_ty if K_TAIL else K_TYPE
    v_type: tl.constexpr = query.dtype.element_ty if V_TAIL else V_TYPE
    queries = _queries(query, row, QUERIES, HEIGHT, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH, k_type)
    # Tails are short beside what has settled: their loops should not take shared memory from the others.
    short: tl.constexpr = (K_TAIL and K_KIND != 0) or (V_TAIL and V_KIND != 0)
    stages: tl.constexpr = 2 if short else STAGES
    BLOCK: tl.constexpr = MOST // 2 if short and MOST > 16 else MOST
    # Blocks lie on a grid from entry 0, so that none crosses a unit of the settled format.
    grid = begin // BLOCK * BLOCK
    for base in tl.range(grid, tl.where(begin < end, end, grid), BLOCK, num_stages=stages):
        entries = base + tl.arange(0, BLOCK)
        key_tiles = numbers(
            k_segment, head, base - k_shift, entries - k_shift, BLOCK, 0 if K_TAIL else K_KIND, K_BITS, K_GROUP,
            PAGE if K_TAIL else K_PAGE, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH, k_type, K_FINE, PACKED, False,
        )  # fmt: skip
        logit = tl.zeros([BLOCK, HEIGHT], tl.float32)
        for i in tl.static_range(K_TILES):
            logit = tl.dot(key_tiles[i], queries[i], logit, input_precision="ieee")
        if K_KIND == 3 and not K_TAIL:
            logit *= _scale(k_segment, head, entries - k_shift, K_PAGE)[:, None]
        logit = _shaped(logit, scaling, softcap, CAPPED)
        if COUNTED:
            count = tl.load(counts[0] + slots(counts, head, entries, PAGE))
            logit += tl.log2(tl.maximum(count, 1).to(tl.float32))[:, None]
        valid = (entries >= begin) & (entries < end)
        logit = tl.where(valid[:, None], logit, float("-inf"))
        if OBSERVED:
            line = tl.arange(0, HEIGHT)
            at = logits + (row * QUERIES + line).to(tl.int64)[None, :] * longest + entries[:, None]
            tl.store(at, logit, mask=(line < QUERIES)[None, :] & valid[:, None])
        higher = tl.maximum(top, tl.max(logit, 0))
        weight = tl.exp2(logit - higher[None, :])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, 0)
        top = higher
        value_tiles = numbers(
            v_segment, head, base - v_shift, entries - v_shift, BLOCK, 0 if V_TAIL else V_KIND, V_BITS, V_GROUP,
            PAGE if V_TAIL else V_PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, v_type, V_FINE, PACKED, True,
        )  # fmt: skip
        if V_KIND == 3:
            # Lifted, so that small scales do not bring weights below what fp16 has.
            weight *= LIFT if V_TAIL else _scale(v_segment, head, entries - v_shift, V_PAGE)[:, None] * LIFT
        weight = weight.to(v_type)
        added = ()
        for i in tl.static_range(V_TILES):
            faded = sums[i] * fade[None, :]
            added = added + (tl.dot(value_tiles[i], weight, faded, input_precision="ieee"),)
        sums = added
    return top, total, sums


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
def _scale(segment, head, entries, PAGE: tl.constexpr):
    """The scales of entries, [BLOCK] in fp32, of a format with one for each."""
    return tl.load(segment[1] + slots(segment, head, entries, PAGE)).to(tl.float32)


@triton.jit
def _shaped(logit, scaling, softcap, CAPPED: tl.constexpr):
    """Products of queries and keys as logits in base 2."""
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right for infinite exponentials too.
        twice = logit * (2 * LOG2E * scaling / softcap)
        return (1 - 2 / (tl.exp2(twice) + 1)) * (softcap * LOG2E)
    return logit * (scaling * LOG2E)


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
