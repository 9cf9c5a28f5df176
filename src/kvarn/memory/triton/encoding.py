"""Dense tokens in their pages to codes and scales in other pages, bit by bit as ``Format.encode`` makes them.

``plan`` (int32 [4, R]): each head's number in the page tables; the place of its first token from the first slot of its
first dense page; the place in units of the first one that is written; how many units. Products must not become one
operation with a sum, which would round once where ``Format.encode`` rounds twice.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...formats import Float8, Int
from ...formats.float8 import LARGEST
from ...formats.packing import packed_size
from ..mirror import Mirror
from ..pool import Pool
from .pages import paged, slots

_UNSPECIALIZED = ["heads"]
_NUMBERS = 2048  # of a tile


@triton.jit
def _bounds(least, most, CLIP: tl.constexpr, LEVELS: tl.constexpr, TYPE: tl.constexpr):
    """Scale and minimum of numbers between ``least`` and ``most``, as they are stored."""
    least, most = least * CLIP, most * CLIP
    levels = tl.full(least.shape, LEVELS, tl.float32)
    return _number(tl.div_rn(most - least, levels), TYPE), _number(least, TYPE)


@triton.jit
def _number(x, TYPE: tl.constexpr):
    """``x`` as it is stored, the largest number there is in place of what is beyond."""
    if tl.float16 == TYPE:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(TYPE)


@triton.jit
def _codes(x, scale, minimum, LEVELS: tl.constexpr):
    step = tl.broadcast_to(scale.to(tl.float32), x.shape)
    code = tl.div_rn(x - minimum.to(tl.float32), tl.where(step > 0, step, 1.0))
    code = tl.minimum(tl.maximum(tl.where(step > 0, code, 0.0), 0.0), LEVELS)
    # At 3 * 2**22 neighbouring numbers are one apart, so that the addition rounds to the nearest even integer.
    return ((code + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def _store_codes(codes, parts, row, byte, there, BITS: tl.constexpr, SIZE: tl.constexpr):
    """Codes of the runs of a vector, as ``formats/packing.py`` packs them, to rows ``row`` of ``codes``."""
    PARTS: tl.constexpr = len(parts)
    RUN: tl.constexpr = SIZE // PARTS
    if BITS == 3:
        even = tl.zeros(parts[0].shape, tl.int32)
        odd = tl.zeros(parts[0].shape, tl.int32)
        high = tl.zeros(parts[0].shape, tl.int32)
        for part in tl.static_range(PARTS):
            high = high | ((parts[part] >> 2) << part)
            if part % 2 == 0:
                even = even | ((parts[part] & 3) << part)
            else:
                odd = odd | ((parts[part] & 3) << (part - 1))
        tl.store(codes + row + byte, even.to(tl.uint8), mask=there)
        tl.store(codes + row + RUN + byte, odd.to(tl.uint8), mask=there)
        tl.store(codes + row + 2 * RUN + byte, high.to(tl.uint8), mask=there)
    else:
        packed = tl.zeros(parts[0].shape, tl.int32)
        for part in tl.static_range(PARTS):
            packed = packed | (parts[part] << (BITS * part))
        tl.store(codes + row + byte, packed.to(tl.uint8), mask=there)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _encode_channels(
    x,
    x_table,
    x_width,
    codes,
    ranges,
    plan,
    heads,
    table,
    width,
    X_PAGE: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    CLIP: tl.constexpr,
    LEVELS: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One unit of a head: those of its channels whose codes share WIDTH bytes of a vector."""
    head, unit = tl.program_id(0), tl.program_id(1)
    if unit < tl.load(plan + 3 * heads + head):
        number, first = tl.load(plan + head), tl.load(plan + heads + head)
        token = tl.arange(0, ROWS)
        source = slots(x_table, x_width, number, first + unit * GROUP + token, token < GROUP, X_PAGE)
        target = slots(table, width, number, tl.load(plan + 2 * heads + head) + unit, True, PAGE)
        RUN: tl.constexpr = SIZE // PARTS
        byte = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
        inside = byte < RUN
        there = (token < GROUP)[:, None] & inside[None, :]
        parts = ()
        for part in tl.static_range(PARTS):
            channel = part * RUN + byte
            numbers = tl.load(x + source[:, None] * SIZE + channel[None, :], mask=there, other=0).to(tl.float32)
            least = tl.min(tl.where(there, numbers, float("inf")), 0)
            most = tl.max(tl.where(there, numbers, float("-inf")), 0)
            scale, minimum = _bounds(least, most, CLIP, LEVELS, ranges.dtype.element_ty)
            at = ranges + (target * SIZE + channel) * 2
            tl.store(at, scale, mask=inside)
            tl.store(at + 1, minimum, mask=inside)
            parts = parts + (_codes(numbers, scale[None, :], minimum[None, :], LEVELS),)
        row = (target * GROUP + token)[:, None] * PACKED
        _store_codes(codes, parts, row, byte[None, :], there, BITS, SIZE)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _encode_tokens(
    x,
    x_table,
    x_width,
    codes,
    ranges,
    plan,
    heads,
    table,
    width,
    X_PAGE: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    CLIP: tl.constexpr,
    LEVELS: tl.constexpr,
    PACKED: tl.constexpr,
    GROUPS: tl.constexpr,
    WITHIN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK tokens of a head: first their scales and minima, which are then read by the channels that share them."""
    head, token = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number, first, place = tl.load(plan + head), tl.load(plan + heads + head), tl.load(plan + 2 * heads + head)
    there = token < tl.load(plan + 3 * heads + head)
    source = slots(x_table, x_width, number, first + token, there, X_PAGE)
    target = slots(table, width, number, place + token, there, PAGE)

    group, within = tl.arange(0, GROUPS), tl.arange(0, WITHIN)
    real = (group < SIZE // GROUP)[None, :]
    channel = group[:, None] * GROUP + within[None, :]
    mask = there[:, None, None] & real[:, :, None] & (within < GROUP)[None, None, :]
    numbers = tl.load(x + source[:, None, None] * SIZE + channel[None, :, :], mask=mask, other=0).to(tl.float32)
    least = tl.min(tl.where(mask, numbers, float("inf")), 2)
    most = tl.max(tl.where(mask, numbers, float("-inf")), 2)
    scale, minimum = _bounds(least, most, CLIP, LEVELS, ranges.dtype.element_ty)
    at = ranges + (target[:, None] * (SIZE // GROUP) + group[None, :]) * 2
    tl.store(at, scale, mask=there[:, None] & real)
    tl.store(at + 1, minimum, mask=there[:, None] & real)
    tl.debug_barrier()

    RUN: tl.constexpr = SIZE // PARTS
    byte = tl.arange(0, WIDTH)[None, :]
    mask = there[:, None] & (byte < RUN)
    parts = ()
    for part in tl.static_range(PARTS):
        channel = part * RUN + byte
        numbers = tl.load(x + source[:, None] * SIZE + channel, mask=mask, other=0).to(tl.float32)
        at = ranges + (target[:, None] * (SIZE // GROUP) + channel // GROUP) * 2
        scale, minimum = tl.load(at, mask=mask, other=0), tl.load(at + 1, mask=mask, other=0)
        parts = parts + (_codes(numbers, scale, minimum, LEVELS),)
    _store_codes(codes, parts, target[:, None] * PACKED, byte, mask, BITS, SIZE)


@triton.jit
def _e4m3(x):
    """Bytes of e4m3 closest to numbers (fp32) of up to 448, the even one where two are."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Below the least normal number, 2**-6, codes are as far apart as fp32 numbers are at 2**14: an addition rounds.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    normal = (rounded - 0x3C000000) >> 20  # 120 is the difference of the exponents' biases
    return (tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _encode_float8(
    x,
    x_table,
    x_width,
    codes,
    scales,
    plan,
    heads,
    table,
    width,
    X_PAGE: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    MOST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, token = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number, first, place = tl.load(plan + head), tl.load(plan + heads + head), tl.load(plan + 2 * heads + head)
    there = token < tl.load(plan + 3 * heads + head)
    source = slots(x_table, x_width, number, first + token, there, X_PAGE)
    target = slots(table, width, number, place + token, there, PAGE)
    channel = tl.arange(0, WIDTH)[None, :]
    mask = there[:, None] & (channel < SIZE)
    numbers = tl.load(x + source[:, None] * SIZE + channel, mask=mask, other=0).to(tl.float32)
    largest = tl.max(tl.abs(numbers), 1)
    scale = tl.div_rn(largest, tl.full(largest.shape, MOST, tl.float32))
    step = tl.broadcast_to(scale[:, None], numbers.shape)
    scaled = tl.where(step > 0, tl.div_rn(numbers, tl.where(step > 0, step, 1.0)), 0.0)
    tl.store(scales + target, scale, mask=there)
    tl.store(codes + target[:, None] * SIZE + channel, _e4m3(scaled), mask=mask)


def encode(
    fmt: Int | Float8, dense: Pool, dense_mirror: Mirror, settled: Pool, mirror: Mirror, plan: Tensor, most: int
) -> None:
    """Encodes tokens of ``dense`` pages to units of ``settled`` ones, ``most`` of a head at most."""
    x, heads = dense.tensors["x"], plan.shape[1]
    size = {"X_PAGE": dense.page_size, "PAGE": settled.units, "SIZE": fmt.size}
    given = x, dense_mirror.table, dense_mirror.table.shape[1], settled.tensors["codes"]
    paging = paged(plan, mirror)
    if isinstance(fmt, Float8):
        wide = triton.next_power_of_2(fmt.size)
        block = min(triton.next_power_of_2(most), max(_NUMBERS // wide, 1))
        shape = {"MOST": LARGEST, "WIDTH": wide, "BLOCK": block}
        _encode_float8[(heads, triton.cdiv(most, block))](
            *given, settled.tensors["scale"], *paging, **size, **shape, num_warps=_warps(block * wide)
        )
        return
    parts = 8 if fmt.bits == 3 else 8 // fmt.bits
    run = triton.next_power_of_2(fmt.size // parts)
    codes = {
        "BITS": fmt.bits,
        "PARTS": parts,
        "GROUP": fmt.group,
        "CLIP": fmt.clip,
        "LEVELS": 2.0**fmt.bits - 1,
        "PACKED": packed_size(fmt.size, fmt.bits),
    }
    ranges = settled.tensors["range"]
    if fmt.axis == "channel":
        rows = triton.next_power_of_2(fmt.group)
        wide = min(run, max(_NUMBERS // rows, 16))
        shape = {"ROWS": rows, "WIDTH": wide}
        grid = (heads, most, triton.cdiv(fmt.size // parts, wide))
        options = {"num_warps": _warps(rows * wide), "enable_fp_fusion": False}
        _encode_channels[grid](*given, ranges, *paging, **size, **codes, **shape, **options)
        return
    groups, within = triton.next_power_of_2(fmt.size // fmt.group), triton.next_power_of_2(fmt.group)
    block = min(triton.next_power_of_2(most), max(_NUMBERS // (groups * within), 1))
    shape = {"GROUPS": groups, "WITHIN": within, "WIDTH": run, "BLOCK": block}
    options = {"num_warps": _warps(block * groups * within), "enable_fp_fusion": False}
    _encode_tokens[(heads, triton.cdiv(most, block))](*given, ranges, *paging, **size, **codes, **shape, **options)


def _warps(numbers: int) -> int:
    return max(1, min(8, numbers // 512))
