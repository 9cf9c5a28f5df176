"""The small operations of decoder layers as one kernel each, rounded where transformers' modules round.

What kernels read before they wait for the ones before them (``gdc_wait``) are weights, which no pass changes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...formats import Dense
from ...memory.triton.encoding import coded, encode_vectors, tokens_as
from ..newest import Pages, Projected
from .devices import overlaps

_BLOCK = 1024
_HEADS = 8  # that a program of ``_appended`` rotates


@triton.jit
def _norm(x, added, weight, total, out, size, epsilon, WIDTH: tl.constexpr, ADDED: tl.constexpr, OVERLAP: tl.constexpr):
    """A row of ``x``, or of ``x + added``, which is ``total``."""
    row, place = tl.program_id(0), tl.arange(0, WIDTH)
    there = place < size
    scale = tl.load(weight + place, mask=there, other=0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    dtype = x.dtype.element_ty
    numbers = tl.load(x + row * size + place, mask=there, other=0).to(tl.float32)
    if ADDED:
        numbers += tl.load(added + row * size + place, mask=there, other=0).to(tl.float32)
        numbers = numbers.to(dtype).to(tl.float32)
        tl.store(total + row * size + place, numbers.to(dtype), mask=there)
    mean = tl.sum(numbers * numbers, 0) / size
    normed = (numbers * tl.rsqrt(mean + epsilon)).to(dtype).to(tl.float32)
    tl.store(out + row * size + place, (scale * normed).to(dtype), mask=there)


@triton.jit
def _gated(gate, up, out, row_stride, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row, place = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = place < size
    dtype = gate.dtype.element_ty
    x = tl.load(gate + row * row_stride + place, mask=there, other=0).to(tl.float32)
    active = (x / (1 + tl.exp(-x))).to(dtype).to(tl.float32)
    product = active * tl.load(up + row * row_stride + place, mask=there, other=0).to(tl.float32)
    tl.store(out + row * size + place, product.to(dtype), mask=there)


@triton.jit
def _rotated(
    source,  # of each head, [BLOCK]
    there,
    cos,
    sin,
    weight,
    epsilon,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Both halves of some heads of a token, normed and rotated: [BLOCK, WIDTH] each."""
    dtype = source.dtype.element_ty
    place = tl.arange(0, WIDTH)
    within = place < HALF
    at, held = source[:, None] + place[None, :], there[:, None] & within[None, :]
    first = tl.load(at, mask=held, other=0).to(tl.float32)
    second = tl.load(at + HALF, mask=held, other=0).to(tl.float32)
    if NORMED:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
        inverse = tl.rsqrt(mean + epsilon)[:, None]
        w1 = tl.load(weight + place, mask=within, other=0).to(tl.float32)[None, :]
        w2 = tl.load(weight + HALF + place, mask=within, other=0).to(tl.float32)[None, :]
        first = ((first * inverse).to(dtype).to(tl.float32) * w1).to(dtype).to(tl.float32)
        second = ((second * inverse).to(dtype).to(tl.float32) * w2).to(dtype).to(tl.float32)
    c1 = tl.load(cos + place, mask=within, other=0).to(tl.float32)[None, :]
    c2 = tl.load(cos + HALF + place, mask=within, other=0).to(tl.float32)[None, :]
    s1 = tl.load(sin + place, mask=within, other=0).to(tl.float32)[None, :]
    s2 = tl.load(sin + HALF + place, mask=within, other=0).to(tl.float32)[None, :]
    a = (first * c1).to(dtype).to(tl.float32) - (second * s1).to(dtype).to(tl.float32)
    b = (second * c2).to(dtype).to(tl.float32) + (first * s2).to(dtype).to(tl.float32)
    return a.to(dtype), b.to(dtype)


@triton.jit
def _stored(target, a, b, there, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """Both halves to where each head's vector goes, ``target`` [BLOCK]."""
    place = tl.arange(0, WIDTH)
    at, held = target[:, None] + place[None, :], there[:, None] & (place < HALF)[None, :]
    tl.store(at, a, mask=held)
    tl.store(at + HALF, b, mask=held)


@triton.jit
def _turned(
    query, key, cos, sin, query_out, key_out, queries, keys, table_row, HALF: tl.constexpr, WIDTH: tl.constexpr
):
    """One head of one token: queries first, then keys. Tokens are [heads * 2 * HALF] in memory."""
    token, head = tl.program_id(0), tl.program_id(1) + tl.arange(0, 1)
    if tl.program_id(1) < queries:
        source = query + (token * queries + head) * 2 * HALF
        target = query_out + (token * queries + head) * 2 * HALF
    else:
        source = key + (token * keys + head - queries) * 2 * HALF
        target = key_out + (token * keys + head - queries) * 2 * HALF
    turn = token * table_row
    a, b = _rotated(source, head >= 0, cos + turn, sin + turn, cos, 0.0, HALF, WIDTH, False)
    _stored(target, a, b, head >= 0, HALF, WIDTH)


@triton.jit
def _newest(table, spans, width, head, there, PAGE: tl.constexpr):
    """The slots of the newest tokens of heads, and which of them have one: heads of no sequence are empty."""
    start = tl.load(spans + 2 * head, mask=there, other=0)
    length = tl.load(spans + 2 * head + 1, mask=there, other=0)
    place = tl.maximum(start + length - 1, 0)
    page = tl.load(table + head.to(tl.int64) * width + place // PAGE, mask=there, other=0)
    return page.to(tl.int64) * PAGE + place % PAGE, there & (length > 0)


@triton.jit
def _kept(source, pages, beside, slot, there, SIZE: tl.constexpr, WIDTH: tl.constexpr, AS: tl.constexpr):
    """Vectors of some heads, ``source`` [BLOCK], to slots of pages: as they are, or encoded (see ``tokens_as``)."""
    if AS is None:
        place = tl.arange(0, WIDTH)[None, :]
        held = there[:, None] & (place < SIZE)
        numbers = tl.load(source[:, None] + place, mask=held, other=0)
        tl.store(pages + slot[:, None] * SIZE + place, numbers, mask=held)
    else:
        encode_vectors(source, pages, beside, slot, there, SIZE, AS)


@triton.jit(do_not_specialize=["first"])
def _appended(
    states,  # [tokens, (QUERIES + HEADS) * SIZE + HEADS * VALUE]: queries, keys, values of each
    cos,
    sin,
    query_weight,
    key_weight,
    keys,
    key_beside,  # where keys are encoded
    key_table,
    key_spans,
    values,
    value_beside,
    value_table,
    value_spans,
    out,  # [tokens, QUERIES, SIZE]
    turned,  # [tokens, HEADS, SIZE]: keys that are encoded after their rotation
    first,
    table_row,
    key_width,
    value_width,
    query_epsilon,
    key_epsilon,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS_AS: tl.constexpr,
    VALUES_AS: tl.constexpr,
    TURNED: tl.constexpr,
    NORMED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some heads of one token: queries first, then keys, then values. Keys and values are stored as they are, or
    encoded (see ``tokens_as``)."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    HALF: tl.constexpr = SIZE // 2
    OF_QUERIES: tl.constexpr = (QUERIES + BLOCK - 1) // BLOCK
    OF_KEYS: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    token, block = tl.program_id(0), tl.program_id(1)
    states += token.to(tl.int64) * ((QUERIES + HEADS) * SIZE + HEADS * VALUE)
    turn = token * table_row
    stored = first + token * HEADS
    head = block * BLOCK + tl.arange(0, BLOCK)
    if block < OF_QUERIES:
        there = head < QUERIES
        a, b = _rotated(
            states + head * SIZE, there, cos + turn, sin + turn, query_weight, query_epsilon, HALF, WIDTH, NORMED
        )
        _stored(out + (token * QUERIES + head) * SIZE, a, b, there, HALF, WIDTH)
    elif block < OF_QUERIES + OF_KEYS:
        head -= OF_QUERIES * BLOCK
        slot, there = _newest(key_table, key_spans, key_width, stored + head, head < HEADS, PAGE)
        source = states + (QUERIES + head) * SIZE
        if TURNED:
            a, b = _rotated(source, there, cos + turn, sin + turn, key_weight, key_epsilon, HALF, WIDTH, NORMED)
            if KEYS_AS is None:
                _stored(keys + slot * SIZE, a, b, there, HALF, WIDTH)
            else:
                # Channels that share a scale or a byte are in both halves: all are read again as they lie in memory.
                source = turned + (token * HEADS + head) * SIZE
                _stored(source, a, b, there, HALF, WIDTH)
                tl.debug_barrier()
        if not TURNED or KEYS_AS is not None:
            _kept(source, keys, key_beside, slot, there, SIZE, 2 * WIDTH, KEYS_AS)
    else:
        head -= (OF_QUERIES + OF_KEYS) * BLOCK
        slot, there = _newest(value_table, value_spans, value_width, stored + head, head < HEADS, PAGE)
        source = states + (QUERIES + HEADS) * SIZE + head * VALUE
        _kept(source, values, value_beside, slot, there, VALUE, VALUE_WIDTH, VALUES_AS)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of [..., size] with a weight of [size]."""
    return _normed(x, None, weight, epsilon)[1]


def added_norm(x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``x + added``, rounded, and the RMSNorm of that."""
    return _normed(x, added.contiguous(), weight, epsilon)


def _normed(x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    size, overlap = x.shape[-1], overlaps(x.device)
    _norm[(x.numel() // size,)](
        x,
        x if added is None else added,
        weight,
        total,
        out,
        size,
        epsilon,
        WIDTH=triton.next_power_of_2(size),
        ADDED=added is not None,
        OVERLAP=overlap,
        num_warps=8,
        launch_pdl=overlap,
    )
    return total, out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of [..., size] each, which may be columns of one tensor."""
    size = gate.shape[-1]
    rows, overlap = gate.numel() // size, overlaps(gate.device)
    out = gate.new_empty(gate.shape)
    stride = gate.stride(-2) if rows > 1 else size
    grid = (rows, triton.cdiv(size, _BLOCK))
    _gated[grid](gate, up, out, stride, size, BLOCK=_BLOCK, OVERLAP=overlap, launch_pdl=overlap)
    return out


def turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B, H, 1, D] and keys [B, K, 1, D], whose heads lie side by side, rotated by [1 or B, 1, D]."""
    batch, queries, _, size = query.shape
    keys = key.shape[1]
    query_out, key_out = query.new_empty((batch, queries, 1, size)), key.new_empty((batch, keys, 1, size))
    row = 0 if cos.shape[0] == 1 else size
    grid = (batch, queries + keys)
    half = size // 2
    width = triton.next_power_of_2(half)
    # Each product is rounded before the sum, so the two must not become one operation.
    options = {"num_warps": 1, "enable_fp_fusion": False}
    _turned[grid](query, key, cos, sin, query_out, key_out, queries, keys, row, HALF=half, WIDTH=width, **options)
    return query_out, key_out


def append(token: Projected, keys: Pages, values: Pages, first: int) -> Tensor:
    """Rotates queries and keys, and writes keys and values, in the formats of their pages, as the newest of heads from
    ``first`` on. Returns the queries, [B, H, 1, D]."""
    states, size, value_size = token.states, keys.format.size, values.format.size
    batch, overlap = states.shape[0], overlaps(states.device)
    out = states.new_empty((batch, token.queries, 1, size))
    (key_pages, key_beside, keys_as), (value_pages, value_beside, values_as) = _written(keys), _written(values)
    between = out if keys_as is None or token.turn is None else states.new_empty((batch, token.keys, size))
    cos, sin = token.turn or (states, states)
    (query_weight, query_epsilon), (key_weight, key_epsilon) = token.norms or [(cos, 0.0)] * 2
    grid = (batch, triton.cdiv(token.queries, _HEADS) + 2 * triton.cdiv(token.keys, _HEADS))
    _appended[grid](
        states,
        cos,
        sin,
        query_weight,
        key_weight,
        key_pages,
        key_beside,
        keys.table,
        keys.spans,
        value_pages,
        value_beside,
        values.table,
        values.spans,
        out,
        between,
        first,
        0 if cos.shape[0] == 1 else size,
        keys.table.stride(0),
        values.table.stride(0),
        query_epsilon,
        key_epsilon,
        QUERIES=token.queries,
        HEADS=token.keys,
        SIZE=size,
        WIDTH=triton.next_power_of_2(triton.cdiv(size, 2)),
        VALUE=value_size,
        VALUE_WIDTH=triton.next_power_of_2(value_size),
        PAGE=key_pages.shape[1],
        BLOCK=_HEADS,
        KEYS_AS=keys_as,
        VALUES_AS=values_as,
        TURNED=token.turn is not None,
        NORMED=bool(token.norms),
        OVERLAP=overlap,
        num_warps=4,
        enable_fp_fusion=False,  # as in ``turned``
        launch_pdl=overlap,
    )
    return out


def _written(pages: Pages) -> tuple[Tensor, Tensor, tuple | None]:
    """The tensors that tokens are written to, twice the same where they stay as they are, and how they are encoded."""
    if isinstance(pages.format, Dense):
        return pages.tensors["x"], pages.tensors["x"], None
    return *coded(pages.format, pages.tensors), tokens_as(pages.format)
