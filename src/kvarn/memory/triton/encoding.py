"""Dense tokens to codes and scales in pages, bit by bit as ``Format.encode`` makes them.

Where they come from dense pages, ``plan`` (int32 [4, R]) has each head's number in the page tables; the place of its
first token from the first slot of its first dense page; the place in units of the first one that is written; how many
units. Products must not become one operation with a sum, which would round once where ``Format.encode`` rounds twice.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...formats import Float8, Int, Rows
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
        source = slots(x_table, x_width, number, first + unit * GROUP + token, X_PAGE)
        target = slots(table, width, number, tl.load(plan + 2 * heads + head) + unit, PAGE)
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


@triton.jit
def encode_vectors(rows, codes, beside, target, there, SIZE: tl.constexpr, AS: tl.constexpr):
    """Vectors that begin at ``rows`` (pointers [BLOCK]) to slots ``target`` of a pool, where they are ``there``: 8-bit
    floats with their scales, or integers by token with their ranges, which are ``beside`` their codes. ``AS``: see
    ``tokens_as``."""
    if AS[0] == 0:
        _encode_floats(rows, codes, beside, target, there, SIZE, AS)
    else:
        _encode_integers(rows, codes, beside, target, there, SIZE, AS)


@triton.jit
def _encode_integers(rows, codes, ranges, target, there, SIZE: tl.constexpr, AS: tl.constexpr):
    """First scales and minima, which are then read by the channels that share them."""
    BITS: tl.constexpr = AS[0]
    PARTS: tl.constexpr = AS[1]
    GROUP: tl.constexpr = AS[2]
    LEVELS: tl.constexpr = AS[4]
    group, within = tl.arange(0, AS[7]), tl.arange(0, AS[8])
    real = (group < SIZE // GROUP)[None, :]
    channel = group[:, None] * GROUP + within[None, :]
    mask = there[:, None, None] & real[:, :, None] & (within < GROUP)[None, None, :]
    numbers = tl.load(rows[:, None, None] + channel[None, :, :], mask=mask, other=0).to(tl.float32)
    least = tl.min(tl.where(mask, numbers, float("inf")), 2)
    most = tl.max(tl.where(mask, numbers, float("-inf")), 2)
    scale, minimum = _bounds(least, most, AS[3], LEVELS, ranges.dtype.element_ty)
    at = ranges + (target[:, None] * (SIZE // GROUP) + group[None, :]) * 2
    tl.store(at, scale, mask=there[:, None] & real)
    tl.store(at + 1, minimum, mask=there[:, None] & real)
    tl.debug_barrier()

    RUN: tl.constexpr = SIZE // PARTS
    byte = tl.arange(0, AS[6])[None, :]
    mask = there[:, None] & (byte < RUN)
    parts = ()
    for part in tl.static_range(PARTS):
        channel = part * RUN + byte
        numbers = tl.load(rows[:, None] + channel, mask=mask, other=0).to(tl.float32)
        at = ranges + (target[:, None] * (SIZE // GROUP) + channel // GROUP) * 2
        scale, minimum = tl.load(at, mask=mask, other=0), tl.load(at + 1, mask=mask, other=0)
        parts = parts + (_codes(numbers, scale, minimum, LEVELS),)
    _store_codes(codes, parts, target[:, None] * AS[5], byte, mask, BITS, SIZE)


@triton.jit
def _encode_floats(rows, codes, scales, target, there, SIZE: tl.constexpr, AS: tl.constexpr):
    channel = tl.arange(0, AS[1])[None, :]
    mask = there[:, None] & (channel < SIZE)
    numbers = tl.load(rows[:, None] + channel, mask=mask, other=0).to(tl.float32)
    largest = tl.max(tl.abs(numbers), 1)
    scale = tl.div_rn(largest, tl.full(largest.shape, AS[2], tl.float32))
    step = tl.broadcast_to(scale[:, None], numbers.shape)
    scaled = tl.where(step > 0, tl.div_rn(numbers, tl.where(step > 0, step, 1.0)), 0.0)
    tl.store(scales + target, scale, mask=there)
    tl.store(codes + target[:, None] * SIZE + channel, _e4m3(scaled), mask=mask)


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
def _encode_tokens(
    x,
    x_table,
    x_width,
    codes,
    beside,
    plan,
    heads,
    table,
    width,
    X_PAGE: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    AS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK tokens of a head."""
    head, token = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number, first, place = tl.load(plan + head), tl.load(plan + heads + head), tl.load(plan + 2 * heads + head)
    there = token < tl.load(plan + 3 * heads + head)
    source = slots(x_table, x_width, number, first + token, X_PAGE)
    target = slots(table, width, number, place + token, PAGE)
    encode_vectors(x + source * SIZE, codes, beside, target, there, SIZE, AS)


@triton.jit(do_not_specialize=["count"])
def _encode_rows(x, codes, beside, target, count, SIZE: tl.constexpr, AS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK of ``count`` vectors, one after another, to slots ``target``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = row < count
    encode_vectors(x + row * SIZE, codes, beside, tl.load(target + row, mask=there, other=0), there, SIZE, AS)


def tokens_as(fmt: Int | Float8) -> tuple:
    """How ``encode_vectors`` encodes in ``fmt``, whose unit is a token: 0, the width of a vector and its largest code;
    or bits, runs of a vector that share bytes, numbers that share a range, clip, levels, bytes of a vector's codes, and
    the widths of a run, of a vector's groups and of a group."""
    if isinstance(fmt, Float8):
        return 0, triton.next_power_of_2(fmt.size), LARGEST
    widths = fmt.size // _parts(fmt.bits), fmt.size // fmt.group, fmt.group
    return *_integers(fmt).values(), *map(triton.next_power_of_2, widths)


def coded(fmt: Int | Float8, tensors: Rows) -> tuple[Tensor, Tensor]:
    """Codes, and what is beside them."""
    return tensors["codes"], tensors["scale" if isinstance(fmt, Float8) else "range"]


def put(fmt: Int | Float8, x: Tensor, settled: Pool, target: Tensor) -> None:
    """Encodes vectors ([R, size]) to flat slots ``target`` (int64 [R]) of a pool whose unit is a token."""
    x, count, wide = x.contiguous(), x.shape[0], triton.next_power_of_2(fmt.size)
    block = min(triton.next_power_of_2(count), max(_NUMBERS // wide, 1))
    shape = {"SIZE": fmt.size, "AS": tokens_as(fmt), "BLOCK": block}
    options = {"num_warps": _warps(block * wide), "enable_fp_fusion": False}
    _encode_rows[(triton.cdiv(count, block),)](x, *coded(fmt, settled.tensors), target, count, **shape, **options)


def encode(
    fmt: Int | Float8, dense: Pool, dense_mirror: Mirror, settled: Pool, mirror: Mirror, plan: Tensor, most: int
) -> None:
    """Encodes tokens of ``dense`` pages to units of ``settled`` ones, ``most`` of a head at most."""
    x, heads = dense.tensors["x"], plan.shape[1]
    size = {"X_PAGE": dense.page_size, "PAGE": settled.units, "SIZE": fmt.size}
    given = x, dense_mirror.table, dense_mirror.table.shape[1], *coded(fmt, settled.tensors)
    paging = paged(plan, mirror)
    if isinstance(fmt, Int) and fmt.axis == "channel":
        rows, run = triton.next_power_of_2(fmt.group), fmt.size // _parts(fmt.bits)
        wide = min(triton.next_power_of_2(run), max(_NUMBERS // rows, 16))
        shape = {"ROWS": rows, "WIDTH": wide}
        grid = (heads, most, triton.cdiv(run, wide))
        options = {"num_warps": _warps(rows * wide), "enable_fp_fusion": False}
        _encode_channels[grid](*given, *paging, **size, **_integers(fmt), **shape, **options)
        return
    wide = triton.next_power_of_2(fmt.size)
    block = min(triton.next_power_of_2(most), max(_NUMBERS // wide, 1))
    options = {"num_warps": _warps(block * wide), "enable_fp_fusion": False}
    _encode_tokens[(heads, triton.cdiv(most, block))](
        *given, *paging, **size, AS=tokens_as(fmt), BLOCK=block, **options
    )


def _integers(fmt: Int) -> dict[str, int | float]:
    """What kernels must know of integers, by axis and by token."""
    return {
        "BITS": fmt.bits,
        "PARTS": _parts(fmt.bits),
        "GROUP": fmt.group,
        "CLIP": fmt.clip,
        "LEVELS": 2.0**fmt.bits - 1,
        "PACKED": packed_size(fmt.size, fmt.bits),
    }


def _parts(bits: int) -> int:
    """Into how many runs a vector's channels are cut whose codes share bytes."""
    return 8 if bits == 3 else 8 // bits


def _warps(numbers: int) -> int:
    return max(1, min(8, numbers // 512))
