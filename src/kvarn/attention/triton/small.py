"""The small operations of decoder layers as one kernel each, rounded where transformers' modules round."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _norm(x, weight, out, size, epsilon, WIDTH: tl.constexpr):
    row, place = tl.program_id(0), tl.arange(0, WIDTH)
    there = place < size
    numbers = tl.load(x + row * size + place, mask=there, other=0).to(tl.float32)
    mean = tl.sum(numbers * numbers, 0) / size
    normed = (numbers * tl.rsqrt(mean + epsilon)).to(x.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + place, mask=there, other=0).to(tl.float32)
    tl.store(out + row * size + place, (scale * normed).to(x.dtype.element_ty), mask=there)


@triton.jit
def _gated(gate, up, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    x = tl.load(gate + place, mask=there, other=0).to(tl.float32)
    active = (x / (1 + tl.exp(-x))).to(gate.dtype.element_ty).to(tl.float32)
    product = active * tl.load(up + place, mask=there, other=0).to(tl.float32)
    tl.store(out + place, product.to(gate.dtype.element_ty), mask=there)


@triton.jit
def _turned(
    query, key, cos, sin, query_out, key_out, queries, keys, table_row, HALF: tl.constexpr, WIDTH: tl.constexpr
):
    """One head of one token: queries first, then keys. Tokens are [heads * 2 * HALF] in memory."""
    token, head, place = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDTH)
    there = place < HALF
    if head < queries:
        source = query + (token * queries + head) * 2 * HALF
        target = query_out + (token * queries + head) * 2 * HALF
    else:
        source = key + (token * keys + head - queries) * 2 * HALF
        target = key_out + (token * keys + head - queries) * 2 * HALF
    dtype = query.dtype.element_ty
    row = token * table_row
    first = tl.load(source + place, mask=there, other=0).to(tl.float32)
    second = tl.load(source + HALF + place, mask=there, other=0).to(tl.float32)
    c1 = tl.load(cos + row + place, mask=there, other=0).to(tl.float32)
    c2 = tl.load(cos + row + HALF + place, mask=there, other=0).to(tl.float32)
    s1 = tl.load(sin + row + place, mask=there, other=0).to(tl.float32)
    s2 = tl.load(sin + row + HALF + place, mask=there, other=0).to(tl.float32)
    a = (first * c1).to(dtype).to(tl.float32) - (second * s1).to(dtype).to(tl.float32)
    b = (second * c2).to(dtype).to(tl.float32) + (first * s2).to(dtype).to(tl.float32)
    tl.store(target + place, a.to(dtype), mask=there)
    tl.store(target + HALF + place, b.to(dtype), mask=there)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of [..., size] with a weight of [size]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    _norm[(x.numel() // size,)](x, weight, out, size, epsilon, WIDTH=triton.next_power_of_2(size), num_warps=8)
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    out = torch.empty_like(gate)
    _gated[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, out, gate.numel(), BLOCK=_BLOCK)
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
