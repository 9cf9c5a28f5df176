"""Attention of many queries over a paged store and over new entries, blocks of the ones by blocks of the others.

A *row* is one query head of one new token; the rows of a KV head are ordered by token. What is stored comes first,
then the new entries; logits are in base 2. No copy of what is stored is made: codes are decoded block by block.
"""

import triton
import triton.language as tl

from .split import LOG2E
from .tiles import first_channel, numbers, slots


@triton.jit(do_not_specialize=["first", "tokens", "window"])
def attend_blocks(
    query,  # [B, H, tokens, K_SIZE]
    new_keys,  # [B, K, tokens, K_SIZE]
    new_values,  # [B, K, tokens, V_SIZE]
    out,  # [B, tokens, H, V_SIZE]
    keys,
    key_tail,
    values,
    value_tail,
    counts,
    sinks,  # [H], where SINKS
    query_strides,  # of a sequence, a head and a token
    key_strides,
    value_strides,
    first,
    tokens,
    window,
    scaling,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
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
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    COUNTED: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """ROWS rows of one KV head; ``window``: a token reads so many, itself included, where WINDOWED."""
    # Later tokens read more, so they begin.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % KV_HEADS
    head = first + tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    there = row < tokens * GROUP
    # Rows beyond the last one compute what the last token does, and are not stored.
    place = tl.minimum(row // GROUP, tokens - 1)
    of_group = row % GROUP
    earliest = block * ROWS // GROUP
    latest = tl.minimum((block * ROWS + ROWS - 1) // GROUP, tokens - 1)

    k_settled = 0
    v_settled = 0
    if K_KIND != 0:
        k_settled = tl.load(keys[3] + 2 * head + 1)
    if V_KIND != 0:
        v_settled = tl.load(values[3] + 2 * head + 1)
    length = k_settled + tl.load(key_tail[3] + 2 * head + 1)

    query += sequence * query_strides[0]
    query_at = (kv_head * GROUP + of_group).to(tl.int64) * query_strides[1] + place.to(tl.int64) * query_strides[2]
    queries = ()
    for i in tl.static_range(K_TILES):
        channel = tl.arange(0, K_WIDTH)
        at = query + query_at[:, None] + first_channel(i, K_PARTS, K_RUN, K_SIZE) + channel[None, :]
        queries = queries + (_channels_of(at, channel, K_RUN, K_WIDTH),)

    if SINKS:
        top = tl.load(sinks + kv_head * GROUP + of_group).to(tl.float32) * LOG2E
        total = tl.full([ROWS], 1, tl.float32)
    else:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    sums = ()
    for _ in tl.static_range(V_TILES):
        sums = sums + (tl.zeros([ROWS, V_WIDTH], tl.float32),)

    # Keys and values settle at different entries: see ``attend_split``.
    for part in tl.static_range(4):
        if (K_KIND != 0 or part // 2 == 1) and (V_KIND != 0 or part % 2 == 1):
            top, total, sums = _attend_part(
                queries, keys, key_tail, values, value_tail, counts, head, k_settled, v_settled, length, earliest,
                place, window, scaling, softcap, top, total, sums, part // 2, part % 2, BLOCK, STAGES,
                K_KIND, K_BITS, K_GROUP, K_PAGE, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH, K_FINE, K_TYPE,
                V_KIND, V_BITS, V_GROUP, V_PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, V_FINE, V_TYPE,
                PAGE, CAPPED, COUNTED, WINDOWED,
            )  # fmt: skip

    # What is new, up to each token itself: whole blocks that all rows read, then the others.
    new_keys += sequence * key_strides[0] + kv_head.to(tl.int64) * key_strides[1]
    new_values += sequence * value_strides[0] + kv_head.to(tl.int64) * value_strides[1]
    if WINDOWED:
        rest = tl.maximum(earliest - window + 1, 0) // BLOCK * BLOCK
    else:
        rest = (earliest + 1) // BLOCK * BLOCK
        for base in tl.range(0, rest, BLOCK, num_stages=STAGES):
            top, total, sums = _attend_new(
                queries, new_keys, new_values, key_strides[2], value_strides[2], base, tokens, place, window, scaling,
                softcap, top, total, sums, False, BLOCK, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH,
                V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, CAPPED, WINDOWED,
            )  # fmt: skip
    for base in tl.range(rest, latest + 1, BLOCK, num_stages=STAGES if WINDOWED else 1):
        top, total, sums = _attend_new(
            queries, new_keys, new_values, key_strides[2], value_strides[2], base, tokens, place, window, scaling,
            softcap, top, total, sums, True, BLOCK, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH,
            V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, CAPPED, WINDOWED,
        )  # fmt: skip

    channel = tl.arange(0, V_WIDTH)
    line = (sequence * tokens + place) * (KV_HEADS * GROUP) + kv_head * GROUP + of_group
    for i in tl.static_range(V_TILES):
        at = out + line[:, None] * V_SIZE + first_channel(i, V_PARTS, V_RUN, V_SIZE) + channel[None, :]
        result = (sums[i] / total[:, None]).to(out.dtype.element_ty)
        tl.store(at, result, mask=there[:, None] & (channel < V_RUN)[None, :])


@triton.jit
def _attend_part(
    queries,
    keys,
    key_tail,
    values,
    value_tail,
    counts,
    head,
    k_settled,
    v_settled,
    length,
    earliest,
    place,
    window,
    scaling,
    softcap,
    top,
    total,
    sums,
    K_TAIL: tl.constexpr,
    V_TAIL: tl.constexpr,
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
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    COUNTED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Stored entries whose keys, and whose values, lie in the tail or have settled; rows are ``place`` in the prompt,
    the first of them ``earliest``."""
    begin = 0
    end = length
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
    if WINDOWED:
        begin = tl.maximum(begin, length + earliest - window + 1)
    # Blocks lie on a grid from entry 0, so that none crosses a unit of the settled format. Where all is dense only the
    # last one needs a mask; beside decoding codes a mask costs little. Tails are short beside what has settled.
    dense: tl.constexpr = K_KIND == 0 and V_KIND == 0
    short: tl.constexpr = (K_TAIL and K_KIND != 0) or (V_TAIL and V_KIND != 0) or (dense and not WINDOWED)
    rest = begin // BLOCK * BLOCK
    if dense and not WINDOWED:
        rest = end // BLOCK * BLOCK
        for base in tl.range(0, rest, BLOCK, num_stages=STAGES):
            top, total, sums = _attend_stored(
                queries, k_segment, v_segment, counts, head, base, begin, end, k_shift, v_shift, length, place, window,
                scaling, softcap, top, total, sums, K_TAIL, V_TAIL, False, BLOCK,
                K_KIND, K_BITS, K_GROUP, K_PAGE, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH, K_FINE, K_TYPE,
                V_KIND, V_BITS, V_GROUP, V_PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, V_FINE, V_TYPE,
                PAGE, CAPPED, COUNTED, WINDOWED,
            )  # fmt: skip
    for base in tl.range(rest, tl.where(begin < end, end, rest), BLOCK, num_stages=1 if short else STAGES):
        top, total, sums = _attend_stored(
            queries, k_segment, v_segment, counts, head, base, begin, end, k_shift, v_shift, length, place, window,
            scaling, softcap, top, total, sums, K_TAIL, V_TAIL, True, BLOCK,
            K_KIND, K_BITS, K_GROUP, K_PAGE, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH, K_FINE, K_TYPE,
            V_KIND, V_BITS, V_GROUP, V_PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, V_FINE, V_TYPE,
            PAGE, CAPPED, COUNTED, WINDOWED,
        )  # fmt: skip
    return top, total, sums


@triton.jit
def _attend_stored(
    queries,
    k_segment,
    v_segment,
    counts,
    head,
    base,
    begin,
    end,
    k_shift,
    v_shift,
    length,
    place,
    window,
    scaling,
    softcap,
    top,
    total,
    sums,
    K_TAIL: tl.constexpr,
    V_TAIL: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
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
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    COUNTED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Stored entries ``base`` + 0 … BLOCK; those from ``begin`` to ``end`` where MASKED."""
    k_type: tl.constexpr = queries[0].dtype if K_TAIL else K_TYPE
    v_type: tl.constexpr = queries[0].dtype if V_TAIL else V_TYPE
    entries = base + tl.arange(0, BLOCK)
    key_tiles = numbers(
        k_segment, head, base - k_shift, entries - k_shift, BLOCK, 0 if K_TAIL else K_KIND, K_BITS, K_GROUP,
        PAGE if K_TAIL else K_PAGE, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH, k_type, K_FINE, False,
    )  # fmt: skip
    logit = _product(queries, key_tiles, K_TILES)
    unit = scaling * LOG2E
    if CAPPED or COUNTED:
        logit = _shaped(logit, scaling, softcap, CAPPED)
        unit = 1.0
    if COUNTED:
        count = tl.load(counts[0] + slots(counts, head, entries, PAGE))
        logit += tl.log2(tl.maximum(count, 1).to(tl.float32))[None, :]
    if MASKED:
        visible = ((entries >= begin) & (entries < end))[None, :]
        if WINDOWED:
            visible = visible & (entries[None, :] > (length + place - window)[:, None])
        logit = tl.where(visible, logit, float("-inf"))
    weight, fade, top, total = _weighed(logit, unit, top, total, WINDOWED)
    value_tiles = numbers(
        v_segment, head, base - v_shift, entries - v_shift, BLOCK, 0 if V_TAIL else V_KIND, V_BITS, V_GROUP,
        PAGE if V_TAIL else V_PAGE, V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH, v_type, V_FINE, False,
    )  # fmt: skip
    return top, total, _added(sums, fade, weight, value_tiles, V_TILES)


@triton.jit
def _attend_new(
    queries,
    keys,
    values,
    key_stride,
    value_stride,
    base,
    tokens,
    place,
    window,
    scaling,
    softcap,
    top,
    total,
    sums,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    K_SIZE: tl.constexpr,
    K_TILES: tl.constexpr,
    K_PARTS: tl.constexpr,
    K_RUN: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_TILES: tl.constexpr,
    V_PARTS: tl.constexpr,
    V_RUN: tl.constexpr,
    V_WIDTH: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """New entries ``base`` + 0 … BLOCK; those that each row may read where MASKED."""
    entries = base + tl.arange(0, BLOCK)
    rows = tl.minimum(entries, tokens - 1)
    key_tiles = _new_tiles(keys + rows * key_stride, K_SIZE, K_TILES, K_PARTS, K_RUN, K_WIDTH)
    logit = _product(queries, key_tiles, K_TILES)
    unit = scaling * LOG2E
    if CAPPED:
        logit = _shaped(logit, scaling, softcap, CAPPED)
        unit = 1.0
    if MASKED:
        visible = entries[None, :] <= place[:, None]
        if WINDOWED:
            visible = visible & (entries[None, :] > (place - window)[:, None])
        logit = tl.where(visible, logit, float("-inf"))
    weight, fade, top, total = _weighed(logit, unit, top, total, WINDOWED)
    value_tiles = _new_tiles(values + rows * value_stride, V_SIZE, V_TILES, V_PARTS, V_RUN, V_WIDTH)
    return top, total, _added(sums, fade, weight, value_tiles, V_TILES)


@triton.jit
def _shaped(product, scaling, softcap, CAPPED: tl.constexpr):
    """Products of queries and keys as logits in base 2."""
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right for infinite exponentials too.
        twice = product * (2 * LOG2E * scaling / softcap)
        return (1 - 2 / (tl.exp2(twice) + 1)) * (softcap * LOG2E)
    return product * (scaling * LOG2E)


@triton.jit
def _product(queries, key_tiles, TILES: tl.constexpr):
    """Products of rows and entries, fp32 [ROWS, BLOCK]."""
    logit = tl.zeros([queries[0].shape[0], key_tiles[0].shape[0]], tl.float32)
    for i in tl.static_range(TILES):
        keys = tl.trans(key_tiles[i])
        logit = tl.dot(queries[i].to(keys.dtype), keys, logit, input_precision="ieee")
    return logit


@triton.jit
def _weighed(logit, unit, top, total, WINDOWED: tl.constexpr):
    """Weights of ``unit`` times ``logit``, what earlier sums fade by, and the largest logit and the sum of weights of
    each row now."""
    higher = tl.maximum(top, tl.max(logit, 1) * unit)
    # A window may hide a whole block from a row that has read nothing yet.
    ceiling = tl.where(higher == float("-inf"), 0, higher) if WINDOWED else higher
    weight = tl.exp2(logit * unit - ceiling[:, None])
    fade = tl.exp2(top - ceiling)
    return weight, fade, higher, total * fade + tl.sum(weight, 1)


@triton.jit
def _added(sums, fade, weight, value_tiles, TILES: tl.constexpr):
    """``sums`` of values with those of a block, by their weights."""
    weight = weight.to(value_tiles[0].dtype)
    added = ()
    for i in tl.static_range(TILES):
        added = added + (tl.dot(weight, value_tiles[i], sums[i] * fade[:, None], input_precision="ieee"),)
    return added


@triton.jit
def _new_tiles(
    rows, SIZE: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr
):
    """New vectors at ``rows`` (pointers), cut as stored ones are: [BLOCK, WIDTH] each."""
    channel = tl.arange(0, WIDTH)
    tiles = ()
    for i in tl.static_range(TILES):
        at = rows[:, None] + first_channel(i, PARTS, RUN, SIZE) + channel[None, :]
        tiles = tiles + (_channels_of(at, channel, RUN, WIDTH),)
    return tiles


@triton.jit
def _channels_of(at, channel, RUN: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers at pointers ``at`` ([n, WIDTH]), zero beyond the RUN ones of a tile."""
    if RUN == WIDTH:
        return tl.load(at)
    return tl.load(at, mask=(channel < RUN)[None, :], other=0)
