"""Products with codes: their scales and minima are folded into what they are multiplied with.

Codes are read as *halves*, 16 bits: two bytes of one entry, with 16 / BITS codes of as many channels. A *run* of RUN
bytes gives so many tiles, one of each place in a half, of RUN / 2 channels. Which channel a place of a tile stands for
is free, as long as queries are read, and outputs written, in the same order. The order here is that in which the
threads of a tensor-core product find what they need in consecutive memory, so that codes go to its registers without a
detour through shared memory.

A code at bit b of a half, masked and read as fp16, is the subnormal number code * 2**(b - 24), which tensor cores
multiply exactly. What is left to do is one multiplication of the sums, which are fp32.
"""

import math

import triton
import triton.language as tl

LIFT = tl.constexpr(6.0)  # weights are 2**LIFT at the most, so that they times scales are not below what fp16 has


@triton.jit
def key_channels(index: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr):
    """The channels of the terms of products over channels in tile ``index``, int32 [RUN / 2]."""
    term = tl.arange(0, RUN // 2)
    half = term // 2 % 4 * (RUN // 8) + term // 16 * 4 + term // 8 % 2 * 2 + term % 2
    return _channel(half, index, SIZE, PARTS, RUN)


@triton.jit
def value_channels(index: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr):
    """The channels of the lines of tile ``index`` of values, int32 [RUN / 2]."""
    line = tl.arange(0, RUN // 2)
    return _channel(line % 8 * (RUN // 16) + line // 8, index, SIZE, PARTS, RUN)


@triton.jit
def _channel(half, index, SIZE: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr):
    """The channel of a half of a run in tile ``index``: tiles are numbered by run, byte of a half, and part."""
    return index % PARTS * (SIZE // PARTS) + index // (2 * PARTS) * RUN + index // PARTS % 2 + 2 * half


@triton.constexpr_function
def factor(index, kind, bits, parts):
    """What the numbers of tile ``index`` must be multiplied with to be codes."""
    return 1.0 if kind == 3 else 2.0**24 * relative(index, bits, parts)


@triton.constexpr_function
def relative(index, bits, parts):
    """The same, as a share of what those of the first tile must be."""
    return 1.0 / (1 << (bits * (index % parts)))


@triton.jit
def key_codes(
    segment,
    head,
    base,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
):
    """The codes of BLOCK entries from ``base`` on, as threads hold them: of each run uint16 [4, 8, BLOCK / 8, RUN / 8],
    where the first two dimensions number the threads of a warp. Behind them scales and minima, for ``ranges``: those
    of all channels, or of each run and part those of the entries."""
    each: tl.constexpr = RUN // 8
    entry = tl.arange(0, 8)[:, None] + 8 * tl.arange(0, BLOCK // 8)[None, :]
    half = each * tl.arange(0, 4)[:, None] + tl.arange(0, each)[None, :]
    rows = _rows(segment, head, base, entry, BLOCK, PAGE, SIZE // PARTS)
    codes = ()
    for run in tl.static_range(SIZE // PARTS // RUN):
        codes = codes + (tl.load(rows[None, :, :, None] + (run * RUN // 2 + half)[:, None, None, :]),)
    return codes + _raw_ranges(segment, head, base, True, BLOCK, KIND, GROUP, PAGE, SIZE, PARTS, RUN)


@triton.jit
def value_codes(
    segment,
    head,
    base,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
):
    """As ``key_codes``; codes are uint16 [4, 8, BLOCK / 8, 2, RUN / 16], ranges of channels those of each tile."""
    each: tl.constexpr = RUN // 16
    entry = 2 * tl.arange(0, 4)[:, None, None] + 8 * tl.arange(0, BLOCK // 8)[None, :, None]
    entry += tl.arange(0, 2)[None, None, :]
    half = each * tl.arange(0, 8)[:, None, None, None] + tl.arange(0, each)[None, None, None, :]
    rows = _rows(segment, head, base, entry, BLOCK, PAGE, SIZE // PARTS)
    codes = ()
    for run in tl.static_range(SIZE // PARTS // RUN):
        codes = codes + (tl.load(rows[:, None, :, :, None] + (run * RUN // 2 + half)[None, :, :, :, :]),)
    return codes + _raw_ranges(segment, head, base, False, BLOCK, KIND, GROUP, PAGE, SIZE, PARTS, RUN)


@triton.jit
def _raw_ranges(
    segment,
    head,
    base,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
):
    raw = ()
    if KIND == 1:
        unit = _page(segment, head, base // PAGE) * (PAGE // GROUP) + base % PAGE // GROUP
        pairs = segment[1].to(tl.pointer_type(tl.uint32)) + unit * SIZE
        for index in tl.static_range(2 * SIZE // RUN):
            if KEYS:
                raw = raw + (tl.load(pairs + key_channels(index, SIZE, PARTS, RUN)),)
            else:
                raw = raw + (tl.load(pairs + value_channels(index, SIZE, PARTS, RUN)),)
    else:
        # Every thread has those of the lines that it has of a product, [BLOCK, HEIGHT]: nothing need be handed on.
        entry = tl.arange(0, 8)[:, None] + 8 * tl.arange(0, BLOCK // 8)[None, :]
        first, rest = _places(segment, head, base, entry, BLOCK, PAGE)
        same = tl.zeros([4], tl.int32)[:, None, None]
        for index in tl.static_range(SIZE // RUN):
            if KIND == 3:
                raw = raw + (tl.load(segment[1] + (first + rest)[None, :, :] + same),)
            else:
                numbers = segment[1].to(tl.pointer_type(tl.uint32)) + first * (SIZE // GROUP) + rest * (SIZE // GROUP)
                group = (index % PARTS * (SIZE // PARTS) + index // PARTS * RUN) // GROUP
                raw = raw + (tl.load(numbers[None, :, :] + same + group),)
    return raw


@triton.jit
def key_tiles(halves, KIND: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr):
    """The tiles of a run, [BLOCK, RUN / 2] in fp16."""
    blocks: tl.constexpr = halves.shape[2]
    each: tl.constexpr = halves.shape[3]
    split = halves.reshape(4, 8, blocks, each // 4, 2, 2).permute(2, 1, 3, 4, 0, 5)
    return _decoded(split.reshape(blocks * 8, each * 4), KIND, BITS, PACKED)


@triton.jit
def value_tiles(halves, KIND: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr):
    """The tiles of a run, [RUN / 2, BLOCK] in fp16."""
    blocks: tl.constexpr = halves.shape[2]
    each: tl.constexpr = halves.shape[4]
    turned = halves.permute(4, 1, 2, 0, 3)
    return _decoded(turned.reshape(each * 8, blocks * 8), KIND, BITS, PACKED)


@triton.jit
def half_ranges(segment, raw, FACTOR: tl.constexpr, PACKED: tl.constexpr):
    """As ``ranges`` of integers, in fp16, the scale times FACTOR: computed before threads share it."""
    if PACKED:
        code: tl.constexpr = _narrowing(segment[1].dtype.element_ty, FACTOR)
        pair = tl.inline_asm_elementwise(code, "=r,r", [raw], tl.uint32, False, 1)
        return pair.to(tl.uint16).to(tl.float16, bitcast=True), (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        s, m = ranges(segment, raw, 1)
        return (s * FACTOR).to(tl.float16), m.to(tl.float16)


@triton.constexpr_function
def _narrowing(number, factor):
    """Code that makes a scale, times a power of two, and a minimum fp16 numbers."""
    if number == tl.bfloat16:
        code = "shl.b32 s, $1, 16; and.b32 m, $1, 0xFFFF0000;"
    else:
        code = ".reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 s, a; cvt.f32.f16 m, b;"
    scaled = f" mul.f32 s, s, 0f{0x3F800000 + (round(math.log2(factor)) << 23):08X};"
    return "{ .reg .b32 s, m; " + code + scaled + " cvt.rn.f16x2.f32 $0, m, s; }"


@triton.jit
def per_entry(raw, HEIGHT: tl.constexpr):
    """Numbers of entries as they were loaded, [4, 8, BLOCK / 8], as a product has them, [BLOCK, HEIGHT]."""
    blocks: tl.constexpr = raw.shape[2]
    lines = tl.broadcast_to(raw.permute(2, 1, 0)[:, :, None, :, None], [blocks, 8, HEIGHT // 8, 4, 2])
    return lines.reshape(blocks * 8, HEIGHT)


@triton.jit
def ranges(segment, raw, KIND: tl.constexpr):
    """Scales and minima, fp32; formats of floats have no minima (the scales stand for them)."""
    if KIND == 3:
        return raw.to(tl.float32), raw.to(tl.float32)
    else:
        number = segment[1].dtype.element_ty
        scale = raw.to(tl.uint16).to(number, bitcast=True).to(tl.float32)
        return scale, (raw >> 16).to(tl.uint16).to(number, bitcast=True).to(tl.float32)


@triton.jit
def _rows(segment, head, base, entry, BLOCK: tl.constexpr, PAGE: tl.constexpr, BYTES: tl.constexpr):
    first, rest = _places(segment, head, base, entry, BLOCK, PAGE)
    return segment[0].to(tl.pointer_type(tl.uint16)) + first * (BYTES // 2) + rest * (BYTES // 2)


@triton.jit
def _places(segment, head, base, entry, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Flat slots of ``base`` + ``entry`` (0 … BLOCK) of a settled segment, as two terms: one that all of a page share,
    and where in it. Blocks lie on a grid, and settled segments start with their first page."""
    if PAGE % BLOCK == 0:
        return _page(segment, head, base // PAGE) * PAGE + base % PAGE, entry
    elif BLOCK == 2 * PAGE:
        first, second = _page(segment, head, base // PAGE), _page(segment, head, base // PAGE + 1)
        return tl.where(entry < PAGE, first, second) * PAGE, entry % PAGE
    else:
        return _page(segment, head, (base + entry) // PAGE) * PAGE, (base + entry) % PAGE


@triton.jit
def _page(segment, head, column):
    """Pages of a head, int64; those that it does not have are somewhere in the pool."""
    column = tl.minimum(column, segment[4] - 1)
    return tl.load(segment[2] + head.to(tl.int64) * segment[4] + column).to(tl.int64)


@triton.constexpr_function
def _assembly(kind, bits):
    """Code that makes numbers of two halves, and its operands: a register for each tile, and the halves."""
    if kind == 3:
        code = ".reg .b32 x; .reg .b16 a, b; prmt.b32 x, $2, 0, 0x3120; mov.b32 {a, b}, x; "
        return "{" + code + "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }", "=r,=r,r"
    parts = 8 // bits
    count = 2 * parts
    lines = [".reg .b32 high;", f"shr.b32 high, ${count}, 8;"]
    for index in range(count):
        mask = ((1 << bits) - 1) << (bits * (index % parts))
        source = "high" if index >= parts else f"${count}"
        lines.append(f"and.b32 ${index}, {source}, 0x{mask:04X}{mask:04X};")
    return "{" + " ".join(lines) + "}", ",".join(["=r"] * count + ["r"])


@triton.jit
def _decoded(halves, KIND: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr):
    """The PER tiles of ``halves`` (uint16): numbers that are codes once multiplied with ``factor``."""
    if PACKED:
        assembly: tl.constexpr = _assembly(KIND, BITS)
        code: tl.constexpr = assembly[0]
        operands: tl.constexpr = assembly[1]
        if BITS == 8:
            return tl.inline_asm_elementwise(code, operands, [halves], (tl.float16,) * 2, True, 2)
        elif BITS == 4:
            return tl.inline_asm_elementwise(code, operands, [halves], (tl.float16,) * 4, True, 2)
        else:
            return tl.inline_asm_elementwise(code, operands, [halves], (tl.float16,) * 8, True, 2)
    else:
        return _decoded_plainly(halves, KIND, BITS)


@triton.jit
def _decoded_plainly(halves, KIND: tl.constexpr, BITS: tl.constexpr):
    f: tl.constexpr = tl.float16
    tiles = ()
    for index in tl.static_range(16 // BITS):
        codes = (halves >> (8 * (index // (8 // BITS)))) & 255
        if KIND == 3:
            tiles = tiles + (codes.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(f),)
        else:
            tiles = tiles + ((codes & (((1 << BITS) - 1) << (BITS * (index % (8 // BITS))))).to(f, bitcast=True),)
    return tiles
