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
    as_terms,
    channel_ranges,
    factor,
    fetch,
    from_terms,
    group_minima,
    group_scales,
    key_channels,
    key_codes,
    key_tiles,
    per_entry,
    ranges,
    raw_ranges,
    relative,
    value_channels,
    value_codes,
    value_tiles,
)
from .kinds import rotated, vectors
from .tiles import first_channel, slots

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["first", "rows", "chunk", "longest", "ahead"])
def attend_split(
    query,  # [rows * QUERIES, K_SIZE]
    offset,  # fp32 [rows * QUERIES], added to products with settled keys, where OFFSET
    keys,
    key_tail,
    values,
    value_tail,
    counts,
    rotation,  # positions of keys, cosines and sines, where ROTATED
    partial,  # fp32 [splits, QUERIES, V_SIZE]
    extent,  # fp32 [splits, QUERIES, 2]: the largest logit, the sum of weights
    logits,  # fp32 [rows, QUERIES, longest], where OBSERVED
    skipped,  # int32 [rows]: entries that are read before those of this store, where SKIPS
    bounds,  # int32 [rows + 1]: where the splits of each row begin and end
    first,
    rows,
    chunk,
    longest,
    ahead,
    scaling,
    softcap,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DISTANCE: tl.constexpr,
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
    K_BESIDE: tl.constexpr,
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
    V_BESIDE: tl.constexpr,
    K_SETTLED: tl.constexpr,
    V_SETTLED: tl.constexpr,
    K_READS: tl.constexpr,
    V_READS: tl.constexpr,
    OFFSET: tl.constexpr,
    SKIPS: tl.constexpr,
    PACKED: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    COUNTED: tl.constexpr,
    OBSERVED: tl.constexpr,
    ROTATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A split of a row: ``chunk`` of its entries, or more where there are more than splits have been made room for.

    Of each side the segments in READS are read: SETTLED, TAIL or both. Splits of this kernel are numbered from
    ``ahead`` on. HEADS rows of a sequence are kept as one head of the store.
    """
    V_LINES: tl.constexpr = V_RUN // 2 if V_FOLDED else V_WIDTH
    split = tl.program_id(0)
    every = tl.arange(0, ROWS)
    begins, finishes = _stretch(
        keys, key_tail, values, first + every // HEADS, every < rows, K_SETTLED, V_SETTLED, K_READS, V_READS
    )
    lengths = tl.maximum(finishes - begins, 0)
    # Heads may have grown since room was made for splits, where the launch was captured.
    least = tl.cdiv(tl.cdiv(tl.sum(lengths, 0), tl.num_programs(0) - rows), BLOCK) * BLOCK
    chunk = tl.maximum(chunk, least)
    ends = tl.cumsum((lengths + chunk - 1) // chunk, 0)
    row = tl.sum((ends <= split).to(tl.int32), 0)
    head = first + tl.minimum(row, rows - 1) // HEADS
    k_settled = 0
    v_settled = 0
    if K_SETTLED:
        k_settled = tl.load(keys[3] + 2 * head + 1)
    if V_SETTLED:
        v_settled = tl.load(values[3] + 2 * head + 1)
    begin, finish = _stretch(keys, key_tail, values, head, True, K_SETTLED, V_SETTLED, K_READS, V_READS)
    low = begin + (split - tl.max(tl.where(ends <= split, ends, 0), 0)) * chunk
    high = tl.minimum(low + chunk, finish)
    if OVERLAP:
        # Kernels are launched while those before them run: the merge after this one, and this one after others, none of
        # which writes lengths (``memory.mirror``).
        gdc_wait()
        gdc_launch_dependents()
    if split == 0:
        tl.store(bounds, ahead)
        tl.store(bounds + 1 + every, ahead + ends, mask=every < rows)
    if row >= rows:
        return
    if OBSERVED and SKIPS:
        logits += tl.load(skipped + row)

    top = tl.full([HEIGHT], float("-inf"), tl.float32)
    total = tl.zeros([8, HEIGHT], tl.float32)  # to be added up, as the minima
    sums = ()
    for _ in tl.static_range(V_TILES):
        sums = sums + (tl.zeros([V_LINES, HEIGHT], tl.float32),)
    minima = ()
    if V_FOLDED and V_KIND == 2:
        minima = tl.zeros([16, HEIGHT], tl.float32)

    # Keys and values settle at different entries, so a split is cut where either does. Which of two orders the cuts
    # have differs from head to head: of the second and the third loop at most one runs.
    for part in tl.static_range(4):
        if K_READS >> (part // 2) & 1 and V_READS >> (part % 2) & 1:
            top, total, sums, minima = _attend_part(
                query, offset, keys, key_tail, values, value_tail, counts, rotation, logits, row, head, low, high,
                k_settled, v_settled, longest, scaling, softcap, top, total, sums, minima, part // 2, part % 2, HEADS,
                QUERIES, HEIGHT, BLOCK, STAGES, DISTANCE,
                K_KIND, K_BITS, K_GROUP, K_PAGE, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH, K_FINE, K_FOLDED, K_TYPE,
                K_BESIDE,
                V_KIND, V_BITS, V_GROUP, V_PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, V_FINE, V_FOLDED, V_TYPE,
                V_BESIDE,
                OFFSET, PACKED, PAGE, CAPPED, COUNTED, OBSERVED, ROTATED,
            )  # fmt: skip

    line = tl.arange(0, HEIGHT)
    at = (ahead + split) * QUERIES + line
    tl.store(extent + 2 * at, top, mask=line < QUERIES)
    tl.store(extent + 2 * at + 1, tl.sum(total, 0), mask=line < QUERIES)
    place = tl.arange(0, V_LINES)
    there = (line < QUERIES)[None, :]
    if not V_FOLDED and V_RUN < V_WIDTH:
        there = there & (place < V_RUN)[:, None]
    for i in tl.static_range(V_TILES):
        least = tl.zeros([HEIGHT], tl.float32)
        if V_FOLDED and V_KIND == 2:
            group = (i % V_PARTS * (V_SIZE // V_PARTS) + i // (2 * V_PARTS) * V_RUN) // V_GROUP
            least = tl.sum(tl.where(tl.arange(0, 16)[:, None] == V_SIZE // V_GROUP - 1 - group, minima, 0), 0)
        if V_FOLDED:
            channel = value_channels(i, V_SIZE, V_PARTS, V_RUN)
        else:
            channel = first_channel(i, V_PARTS, V_RUN, V_SIZE) + place
        tl.store(partial + at[None, :] * V_SIZE + channel[:, None], sums[i] + least[None, :], mask=there)


@triton.jit
def _stretch(
    keys,
    key_tail,
    values,
    head,
    there,
    K_SETTLED: tl.constexpr,
    V_SETTLED: tl.constexpr,
    K_READS: tl.constexpr,
    V_READS: tl.constexpr,
):
    """The first entry of ``head`` that lies in segments that are read, and the one after the last."""
    begin = tl.zeros_like(head)
    finish = tl.load(key_tail[3] + 2 * head + 1, mask=there, other=0)
    if K_SETTLED:
        settled = tl.load(keys[3] + 2 * head + 1, mask=there, other=0)
        finish = settled if K_READS == 1 else finish + settled
        if K_READS == 2:
            begin = settled
    if V_SETTLED and V_READS != 3:
        settled = tl.load(values[3] + 2 * head + 1, mask=there, other=0)
        if V_READS == 1:
            finish = tl.minimum(finish, settled)
        else:
            begin = tl.maximum(begin, settled)
    return begin, finish


@triton.jit
def _attend_part(
    query,
    offset,
    keys,
    key_tail,
    values,
    value_tail,
    counts,
    rotation,
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
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEIGHT: tl.constexpr,
    MOST: tl.constexpr,
    STAGES: tl.constexpr,
    DISTANCE: tl.constexpr,
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
    K_BESIDE: tl.constexpr,
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
    V_BESIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    PACKED: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    COUNTED: tl.constexpr,
    OBSERVED: tl.constexpr,
    ROTATED: tl.constexpr,
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
    k_type: tl.constexpr = key_tail[0].dtype.element_ty if K_TAIL else K_TYPE
    v_type: tl.constexpr = value_tail[0].dtype.element_ty if V_TAIL else V_TYPE
    scale = scaling * LOG2E * (2 / softcap if CAPPED else 1.0)
    if k_folded:
        queries = _woven_queries(query, row, scale, QUERIES, HEIGHT, K_SIZE, K_TILES, K_KIND, K_BITS, K_PARTS, K_RUN)
    elif K_FOLDED:
        queries = _queries(query, row, QUERIES, HEIGHT, K_SIZE, 1, 1, K_SIZE, K_WIDTH, k_type)
    else:
        queries = _queries(query, row, QUERIES, HEIGHT, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH, k_type)
    if OFFSET and not K_TAIL:
        line = tl.arange(0, HEIGHT)
        shift = tl.load(offset + row * QUERIES + line, mask=line < QUERIES, other=0) * scale
    if v_folded:
        sums = _in_units(sums, False, V_TILES, V_KIND, V_BITS, V_PARTS)
    # Tails are short beside what has settled: their loops should not take shared memory from the others.
    short: tl.constexpr = (K_TAIL and K_KIND != 0) or (V_TAIL and V_KIND != 0)
    stages: tl.constexpr = 1 if k_folded and v_folded else 2 if short else STAGES
    BLOCK: tl.constexpr = MOST // 2 if short and MOST > 16 else MOST
    # Blocks lie on a grid from entry 0, so that none crosses a unit of the settled format.
    grid = begin // BLOCK * BLOCK
    far: tl.constexpr = DISTANCE if k_folded and v_folded else 0
    for step in tl.static_range(1, far):
        _fetch_both(
            k_segment, v_segment, head, grid + step * BLOCK, end, BLOCK,
            K_KIND, K_GROUP, K_PAGE, K_SIZE, K_PARTS, V_KIND, V_GROUP, V_PAGE, V_SIZE, V_PARTS,
        )  # fmt: skip
    for base in tl.range(grid, tl.where(begin < end, end, grid), BLOCK, num_stages=stages):
        entries = base + tl.arange(0, BLOCK)
        valid = (entries >= begin) & (entries < end)
        if v_folded:
            value = value_codes(v_segment, head, base, BLOCK, V_KIND, V_GROUP, V_PAGE, V_SIZE, V_PARTS, V_RUN)
        if k_folded:
            key = key_codes(k_segment, head, base, BLOCK, K_KIND, K_GROUP, K_PAGE, K_SIZE, K_PARTS, K_RUN)
            if far:
                _fetch_both(
                    k_segment, v_segment, head, base + far * BLOCK, end, BLOCK,
                    K_KIND, K_GROUP, K_PAGE, K_SIZE, K_PARTS, V_KIND, V_GROUP, V_PAGE, V_SIZE, V_PARTS,
                )  # fmt: skip
            logit = _folded_logits(
                queries, key, k_segment, BLOCK, HEIGHT, K_KIND, K_BITS, K_SIZE, K_PARTS, K_RUN, PACKED
            )
        else:
            cut: tl.constexpr = not K_FOLDED
            tiles = vectors(
                k_segment, head, base - k_shift, entries - k_shift, row % HEADS, BLOCK, 0 if K_TAIL else K_KIND, K_BITS,
                K_GROUP, PAGE if K_TAIL else K_PAGE, K_SIZE, K_TILES if cut else 1, K_PARTS if cut else 1,
                K_RUN if cut else K_SIZE, K_WIDTH, k_type, K_FINE, False, HEADS, K_BESIDE,
            )  # fmt: skip
            if ROTATED:
                tiles = rotated(
                    tiles, rotation, head, entries, valid, PAGE, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH
                )  # fmt: skip
            logit = tl.zeros([BLOCK, HEIGHT], tl.float32)
            for i in tl.static_range(K_TILES if cut else 1):
                logit = tl.dot(tiles[i], queries[i], logit, input_precision="ieee")
            logit *= scale
        if OFFSET and not K_TAIL:
            logit += shift[None, :]
        if CAPPED:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right for infinite exponentials too.
            logit = (1 - 2 / (tl.exp2(logit) + 1)) * (softcap * LOG2E)
        if COUNTED:
            count = tl.load(counts[0] + slots(counts, head, entries, PAGE))
            logit += tl.log2(tl.maximum(count, 1).to(tl.float32))[:, None]
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
            # Loaded after the logits are computed: of two layouts Triton keeps the later one, so that it brings the
            # weights into that of the scales, once, and not the scales of every group into that of the weights.
            value += raw_ranges(v_segment, head, base, False, BLOCK, V_KIND, V_GROUP, V_PAGE, V_SIZE, V_PARTS, V_RUN)
            sums, minima = _folded_sums(
                sums, minima, weight, fade, value, v_segment, BLOCK, HEIGHT, V_KIND, V_BITS, V_GROUP, V_SIZE, V_PARTS,
                V_RUN, PACKED,
            )  # fmt: skip
        else:
            if V_FOLDED:
                tiles = _woven_values(v_segment, head, entries - v_shift, PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN)
            else:
                tiles = vectors(
                    v_segment, head, base - v_shift, entries - v_shift, row % HEADS, BLOCK, 0 if V_TAIL else V_KIND,
                    V_BITS, V_GROUP, PAGE if V_TAIL else V_PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, v_type,
                    V_FINE, True, HEADS, V_BESIDE,
                )  # fmt: skip
            added = ()
            for i in tl.static_range(V_TILES):
                faded = sums[i] * fade[None, :]
                added = added + (tl.dot(tiles[i], weight.to(v_type), faded, input_precision="ieee"),)
            sums = added
            if V_FOLDED and V_KIND == 2:
                minima *= fade[None, :]
    if v_folded:
        sums = _in_units(sums, True, V_TILES, V_KIND, V_BITS, V_PARTS)
    return top, total, sums, minima


@triton.jit
def _fetch_both(
    keys,
    values,
    head,
    base,
    end,
    BLOCK: tl.constexpr,
    K_KIND: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_SIZE: tl.constexpr,
    K_PARTS: tl.constexpr,
    V_KIND: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_PARTS: tl.constexpr,
):
    if base < end:
        fetch(keys, head, base, BLOCK, K_KIND, K_GROUP, K_PAGE, K_SIZE, K_PARTS)
        fetch(values, head, base, BLOCK, V_KIND, V_GROUP, V_PAGE, V_SIZE, V_PARTS)


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
    tiles = ()
    for run in tl.static_range(RUNS):
        tiles = tiles + key_tiles(codes[run], KIND, BITS, PACKED)
    if KIND == 1:
        lowest = tl.zeros([RUN // 2, HEIGHT], tl.float16)  # queries times minima, which all entries of a unit share
        for back in tl.static_range(PARTS):
            # Queries have been made smaller for every part but the first.
            if back:
                lowest *= 1 << BITS
            for run in tl.static_range(RUNS):
                numbers = channel_ranges(codes[RUNS + (run + 1) * PARTS - 1 - back], HEIGHT, PACKED)
                for byte in tl.static_range(2):
                    asking = queries[(2 * run + byte + 1) * PARTS - 1 - back]
                    logit = tl.dot(tiles[(2 * run + byte + 1) * PARTS - 1 - back], asking * numbers[2 * byte], logit)
                    lowest += asking * numbers[2 * byte + 1]
        ones = tl.full([BLOCK, RUN // 2], 1.0, tl.float16)
        logit = tl.dot(ones, lowest, logit * factor(0, KIND, BITS, PARTS))
    else:
        for run in tl.static_range(RUNS):
            for part in tl.static_range(PARTS):
                low, high = queries[2 * run * PARTS + part], queries[(2 * run + 1) * PARTS + part]
                product = tl.dot(tiles[2 * run * PARTS + part], low)
                product = tl.dot(tiles[(2 * run + 1) * PARTS + part], high, product)
                s, m = ranges(segment, codes[RUNS + run * PARTS + part], KIND)
                logit += product * per_entry(s * factor(part, KIND, BITS, PARTS), HEIGHT)
                if KIND == 2:
                    whole = tl.sum(low.to(tl.float32) + high.to(tl.float32), 0)
                    logit += per_entry(m, HEIGHT) * whole[None, :]
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
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """``sums``, in the units of ``_in_units``, and ``minima`` ([16, HEIGHT], lines as in ``group_minima``) with what
    the values of ``value_codes`` and their ``raw_ranges`` add."""
    RUNS: tl.constexpr = SIZE // PARTS // RUN
    added = ()
    if KIND == 2:
        half = weight.to(tl.float16)
        minima = tl.dot(group_minima(codes[RUNS + 1]), half, minima * fade[None, :])
        terms = as_terms(half)
        scales = group_scales(codes[RUNS])
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
        elif KIND == 2:
            weights = ()
            for part in tl.static_range(PARTS):
                scale = scales[(part * (SIZE // PARTS) + run * RUN) // GROUP]
                weights = weights + (from_terms(terms * scale),)
            for i in tl.static_range(2 * PARTS):
                added = added + (tl.dot(tiles[i], weights[i % PARTS], before[i] * fade[None, :]),)
        else:
            s, _ = ranges(segment, codes[RUNS + run], KIND)
            scaled = (weight * per_entry(s, HEIGHT)).to(tl.float16)
            for i in tl.static_range(2):
                added = added + (tl.dot(tiles[i], scaled, before[i] * fade[None, :]),)
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
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
):
    """The row's queries times ``scale`` in the order of tiles of codes, [RUN / 2, HEIGHT] each, in fp16; where scales
    are those of channels, such that products with any tile's numbers have the same unit."""
    line = tl.arange(0, HEIGHT)
    tiles = ()
    for i in tl.static_range(TILES):
        at = query + (row * QUERIES + line)[None, :] * SIZE + key_channels(i, SIZE, PARTS, RUN)[:, None]
        unit = relative(i, BITS, PARTS) if KIND == 1 else 1.0
        tiles = tiles + ((tl.load(at, mask=(line < QUERIES)[None, :], other=0) * (scale * unit)).to(tl.float16),)
    return tiles


@triton.jit(do_not_specialize=["rows", "heads"])
def merge_splits(
    partial,
    extent,
    bounds,  # [LAUNCHES, rows + 1]
    factors,  # of each launch [rows, V_SIZE], by which what it gives is divided, where its bit in DIVIDED is set
    sinks,  # [query heads of a sequence], where SINKS
    out,  # [rows * QUERIES, V_SIZE]
    sums,  # fp32 [rows * QUERIES]: log-sum-exps, where OBSERVED
    rows,
    heads,
    QUERIES: tl.constexpr,
    LAUNCHES: tl.constexpr,
    DIVIDED: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    OBSERVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What one query's splits, of all launches, give together, normalized."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    query = tl.program_id(0)
    row = query // QUERIES
    channel = tl.arange(0, V_WIDTH)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if SINKS:
        top = tl.load(sinks + query % heads).to(tl.float32) * LOG2E
        total += 1
    result = tl.zeros([V_WIDTH], tl.float32)
    for launch in tl.static_range(LAUNCHES):
        begin = tl.load(bounds + launch * (rows + 1) + row)
        end = tl.load(bounds + launch * (rows + 1) + row + 1)
        if DIVIDED >> launch & 1:
            factor = tl.load(factors[launch] + row * V_SIZE + channel, mask=channel < V_SIZE, other=1).to(tl.float32)
        for base in range(begin, end, BLOCK):
            split = base + tl.arange(0, BLOCK)
            at = split * QUERIES + query % QUERIES
            tops = tl.load(extent + 2 * at, mask=split < end, other=float("-inf"))
            totals = tl.load(extent + 2 * at + 1, mask=split < end, other=0)
            there = (split < end)[:, None] & (channel < V_SIZE)[None, :]
            some = tl.load(partial + at[:, None] * V_SIZE + channel[None, :], mask=there, other=0)
            higher = tl.maximum(top, tl.max(tops, 0))
            share = tl.exp2(tops - higher)
            fade = tl.exp2(top - higher)
            added = tl.sum(share[:, None] * some, 0)
            if DIVIDED >> launch & 1:
                added /= factor
            total = total * fade + tl.sum(share * totals, 0)
            result = result * fade + added
            top = higher
    # A head without entries and sinks gives nothing, and nothing is paid.
    mass = tl.where(total > 0, total, 1)
    result = tl.where(total > 0, result / mass, 0)
    tl.store(out + query * V_SIZE + channel, result.to(out.dtype.element_ty), mask=channel < V_SIZE)
    if OBSERVED:
        tl.store(sums + query, tl.where(total > 0, top + tl.log2(mass), 0))
