"""Products with codes: their scales and minima are folded into what they are multiplied with.

Codes are read as *halves*, 16 bits: two bytes of one entry, with 16 / BITS codes of as many channels. A *run* of RUN
bytes gives so many tiles, one of each place in a half, of RUN / 2 channels. Which channel a place of a tile stands for
is free, as long as queries are read, and outputs written, in the same order. The order here is that in which the
threads of a tensor-core product find what they need in consecutive memory, so that codes go to its registers without a
detour through shared memory.

A code at bit b of a half, masked and read as fp16, is the subnormal number code * 2**(b - 24), which tensor cores
multiply exactly. What is left to do is one multiplication of the sums, which are fp32.
"""

import triton
import triton.language as tl

from ...memory.triton.pages import pages

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
    line = tl.arange(0, 8)[None, :, None, None]
    inner = 8 * tl.arange(0, BLOCK // 8)[None, None, :, None]
    half = each * tl.arange(0, 4)[:, None, None, None] + tl.arange(0, each)[None, None, None, :]
    halves = segment[0].to(tl.pointer_type(tl.uint16)) + half
    codes = ()
    for run in tl.static_range(SIZE // PARTS // RUN):
        at = _at(halves + run * RUN // 2, segment, head, base, line, inner, SIZE // PARTS // 2, BLOCK, PAGE)
        codes = codes + (tl.load(at),)
    return codes + raw_ranges(segment, head, base, True, BLOCK, KIND, GROUP, PAGE, SIZE, PARTS, RUN)


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
    """As ``key_codes``, without scales and minima: of each run uint16 [4, 8, BLOCK / 8, 2, RUN / 16]."""
    each: tl.constexpr = RUN // 16
    pair = 2 * tl.arange(0, 4)[:, None, None, None, None]
    inner = 8 * tl.arange(0, BLOCK // 8)[None, None, :, None, None] + tl.arange(0, 2)[None, None, None, :, None]
    half = each * tl.arange(0, 8)[None, :, None, None, None] + tl.arange(0, each)[None, None, None, None, :]
    halves = segment[0].to(tl.pointer_type(tl.uint16)) + half
    codes = ()
    for run in tl.static_range(SIZE // PARTS // RUN):
        at = _at(halves + run * RUN // 2, segment, head, base, pair, inner, SIZE // PARTS // 2, BLOCK, PAGE)
        codes = codes + (tl.load(at),)
    return codes


@triton.jit
def raw_ranges(
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
    """What numbers are scaled with, as it is stored. Every thread loads for itself what it needs, though others load
    the same: nothing need be handed on."""
    raw = ()
    if KIND == 1:
        unit = _page(segment, head, base // PAGE) * (PAGE // GROUP) + base % PAGE // GROUP
        if KEYS:
            # Of each half both bytes together, of each run and part: [4, 8, RUN / 16, 2]. A thread loads two at once,
            # and of a longer last dimension would be given some of another's.
            half = RUN // 8 * tl.arange(0, 4)[:, None, None, None] + tl.arange(0, 2)[None, None, None, :]
            half += 2 * tl.arange(0, RUN // 16)[None, None, :, None] + tl.zeros([8], tl.int32)[None, :, None, None]
            twos = segment[1].to(tl.pointer_type(tl.uint64)) + unit * (SIZE // 2)
            for run in tl.static_range(SIZE // PARTS // RUN):
                for part in tl.static_range(PARTS):
                    raw = raw + (tl.load(twos + part * (SIZE // PARTS // 2) + run * (RUN // 2) + half),)
        else:
            pairs = segment[1].to(tl.pointer_type(tl.uint32)) + unit * SIZE
            for index in tl.static_range(2 * SIZE // RUN):
                raw = raw + (tl.load(pairs + value_channels(index, SIZE, PARTS, RUN)),)
    elif KIND == 2 and not KEYS:
        # Those of the terms that a thread multiplies, all groups together, [4, 8, BLOCK / 8, 2, groups]; and of line g
        # those of the group that is g-th from the last, again and again.
        groups: tl.constexpr = SIZE // GROUP
        pair = 2 * tl.arange(0, 4)[:, None, None, None, None]
        inner = 8 * tl.arange(0, BLOCK // 8)[None, None, :, None, None] + tl.arange(0, 2)[None, None, None, :, None]
        line = tl.arange(0, 8)[None, :, None, None, None]
        numbers = segment[1].to(tl.pointer_type(tl.uint32))
        all_groups = numbers + (tl.arange(0, groups)[None, None, None, None, :] + line * 0)
        one_group = numbers + (groups - 1 - line % groups)
        for start in tl.static_range(2):
            at = _at(one_group if start else all_groups, segment, head, base, pair, inner, groups, BLOCK, PAGE)
            raw = raw + (tl.load(at),)
    else:
        # Those of the lines that a thread has of a product, [4, 8, BLOCK / 8].
        line, same = tl.arange(0, 8)[None, :, None], 0 * tl.arange(0, 4)[:, None, None]
        inner = 8 * tl.arange(0, BLOCK // 8)[None, None, :]
        for index in tl.static_range(SIZE // RUN):
            if KIND == 3:
                raw = raw + (tl.load(_at(segment[1] + same, segment, head, base, line, inner, 1, BLOCK, PAGE)),)
            else:
                group = (index % PARTS * (SIZE // PARTS) + index // PARTS * RUN) // GROUP
                numbers = segment[1].to(tl.pointer_type(tl.uint32)) + group + same
                raw = raw + (tl.load(_at(numbers, segment, head, base, line, inner, SIZE // GROUP, BLOCK, PAGE)),)
    return raw


@triton.jit
def fetch(
    segment,
    head,
    base,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Has the memory bring what BLOCK entries from ``base`` on have into the second cache, without waiting for it."""
    width: tl.constexpr = segment[1].dtype.element_ty.primitive_bitwidth // 8
    numbers: tl.constexpr = width if KIND == 3 else SIZE // GROUP * 4 if KIND == 2 else SIZE * 4 // GROUP
    together: tl.constexpr = BLOCK if PAGE % BLOCK == 0 else PAGE
    # Else rows that lie together would end beyond their page.
    if BLOCK % together == 0:
        for first in tl.static_range(0, BLOCK, together):
            place = _page(segment, head, (base + first) // PAGE) * PAGE + (base + first) % PAGE
            _fetch(segment[0], place, SIZE // PARTS, together)
            _fetch(segment[1], place, numbers, together)


@triton.jit
def _fetch(start, place, BYTES: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows of BYTES, from row ``place`` on."""
    if BYTES * COUNT % 16 == 0:
        code: tl.constexpr = _fetching(BYTES * COUNT)
        address = (start.to(tl.pointer_type(tl.uint8)) + place * BYTES).to(tl.uint64, bitcast=True)
        tl.inline_asm_elementwise(code, "=r,l", [address], tl.uint32, False, 1)


@triton.constexpr_function
def _fetching(size):
    """Code by which one thread of a warp asks for ``size`` bytes."""
    code = "mov.u32 l, %laneid; setp.eq.u32 p, l, 0; @p cp.async.bulk.prefetch.L2.global [$1], "
    return "{ .reg .pred p; .reg .u32 l; " + code + f"{size}; mov.u32 $0, 0; }}"


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
def channel_ranges(raw, HEIGHT: tl.constexpr, PACKED: tl.constexpr):
    """What ``key_codes`` has of the channels of a run and part, [4, 8, RUN / 16, 2], for the tiles of both bytes:
    scales, minima of the first, and of the second, fp16 [RUN / 2, HEIGHT] each."""
    if PACKED:
        code: tl.constexpr = (
            "{ .reg .b32 a, b, c, d; mov.b64 {a, b}, $4; mov.b64 {c, d}, $5; prmt.b32 $0, a, c, 0x5410; "
            "prmt.b32 $1, a, c, 0x7632; prmt.b32 $2, b, d, 0x5410; prmt.b32 $3, b, d, 0x7632; }"
        )
        numbers = tl.inline_asm_elementwise(code, "=r,=r,=r,=r,l,l", [raw], (tl.float16,) * 4, True, 2)
    else:
        numbers = ()
        for place in tl.static_range(4):
            numbers = numbers + ((raw >> (16 * place)).to(tl.uint16).to(tl.float16, bitcast=True),)
    terms = ()
    for place in tl.static_range(4):
        terms = terms + (_per_term(numbers[place], HEIGHT),)
    return terms


@triton.jit
def _per_term(x, HEIGHT: tl.constexpr):
    """Numbers of the terms of a product as they were loaded, [4, 8, n / 8, 2], as it multiplies them, [n, HEIGHT]."""
    some: tl.constexpr = x.shape[2] // 2
    terms = x.reshape(4, 8, some, 2, 2).permute(2, 3, 0, 4, 1).reshape(some * 16, 1, 8)
    return tl.broadcast_to(terms, [some * 16, HEIGHT // 8, 8]).reshape(some * 16, HEIGHT)


@triton.jit
def group_scales(raw):
    """Of each group (eight at the most) the scales of all terms, fp16 [4, 8, BLOCK / 8, 2, 1]."""
    scales = (raw.to(tl.uint16).to(tl.float16, bitcast=True),)
    t: tl.constexpr = raw.shape
    for level in tl.static_range(3):
        if len(scales) < t[4]:
            even = ()
            odd = ()
            for i in tl.static_range(len(scales)):
                pair = tl.split(scales[i].reshape(t[0], t[1], t[2], t[3], t[4] // (2 << level), 2))
                even = even + (pair[0],)
                odd = odd + (pair[1],)
            scales = even + odd
    one = ()
    for i in tl.static_range(t[4]):
        one = one + (scales[i].reshape(t[0], t[1], t[2], t[3], 1),)
    return one


@triton.jit
def group_minima(raw):
    """Of line g of 16 the minima of all terms in the group that is g-th from the last, fp16 [16, BLOCK]."""
    blocks: tl.constexpr = raw.shape[2]
    lines = (raw >> 16).to(tl.uint16).to(tl.float16, bitcast=True).permute(1, 2, 0, 3, 4).reshape(1, 8, blocks * 8)
    return tl.broadcast_to(lines, [2, 8, blocks * 8]).reshape(16, blocks * 8)


@triton.jit
def as_terms(weight):
    """[BLOCK, HEIGHT] as the numbers of ``group_scales`` lie, [4, 8, BLOCK / 8, 2, HEIGHT / 8]."""
    blocks: tl.constexpr = weight.shape[0] // 8
    return weight.reshape(blocks, 4, 2, weight.shape[1] // 8, 8).permute(1, 4, 0, 2, 3)


@triton.jit
def from_terms(x):
    """What ``as_terms`` took."""
    return x.permute(2, 0, 3, 4, 1).reshape(x.shape[2] * 8, x.shape[4] * 8)


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
def _at(start, segment, head, base, thread, inner, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Where the numbers of entries ``base`` + ``thread`` + ``inner`` are, WIDTH of each from ``start`` on, in a settled
    segment. Blocks lie on a grid, and such segments start with their first page. ``thread`` (0 … 8) is added before
    ``inner`` (multiples of 8, and what keeps the sum below the next), which is known when this is compiled: so all that
    a thread loads has one address and offsets from it."""
    if PAGE % BLOCK == 0:
        place = _page(segment, head, base // PAGE) * PAGE + base % PAGE
        return start + place * WIDTH + thread * WIDTH + inner * WIDTH
    elif BLOCK == 2 * PAGE and PAGE % 8 == 0:
        first, second = _page(segment, head, base // PAGE), _page(segment, head, base // PAGE + 1)
        page = tl.where(inner < PAGE, first, second)
        return start + page * (PAGE * WIDTH) + thread * WIDTH + inner % PAGE * WIDTH
    else:
        entry = base + thread + inner
        return start + (_page(segment, head, entry // PAGE) * PAGE + entry % PAGE) * WIDTH


@triton.jit
def _page(segment, head, column):
    """Pages of a head, int64; those that it does not have are somewhere in the pool."""
    return pages(segment[2], segment[4], head, column)


@triton.constexpr_function
def _assembly(kind, bits):
    """Code that makes numbers of two halves, and its operands: a register for each tile, and the halves."""
    if kind == 3:
        code = ".reg .b32 x; .reg .b16 a, b; prmt.b32 x, $2, 0, 0x3120; mov.b32 {a, b}, x; "
        return "{" + code + "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }", "=r,=r,r"
    if bits == 8:
        return "{ prmt.b32 $0, $2, 0, 0x4240; prmt.b32 $1, $2, 0, 0x4341; }", "=r,=r,r"
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
