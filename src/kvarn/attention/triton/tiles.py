"""Entries of a segment as tiles of numbers, on the device: page table, addresses, and codes to numbers.

A *tile* is [BLOCK, width]: some channels of BLOCK consecutive entries of one head. A vector of ``SIZE`` channels is
TILES such tiles. Codes of several channels share a byte (``formats/packing.py``): PARTS of them, so a vector is SIZE /
PARTS bytes, and the tile of a run of bytes gives PARTS tiles of numbers. Where numbers share scales along channels, a
run is no longer than a group, so that an entry has one scale in a tile.
"""

import triton
import triton.language as tl

from ...memory.triton.pages import slots as paged_slots

DENSE = tl.constexpr(0)
CHANNEL = tl.constexpr(1)  # integers, a channel of a unit of entries shares a scale
TOKEN = tl.constexpr(2)  # integers, channels of an entry share a scale
FLOAT8 = tl.constexpr(3)  # float8, all channels of an entry share a scale
CODES = tl.constexpr(4)  # integers without scales


@triton.jit
def first_channel(index: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr, SIZE: tl.constexpr):
    """The first channel of tile ``index``."""
    return (index % PARTS) * (SIZE // PARTS) + (index // PARTS) * RUN


@triton.jit
def slots(segment, head, entries, PAGE: tl.constexpr):
    """The flat slots of ``entries`` of a head, int64. Entries that a head does not have are somewhere in the pool."""
    return paged_slots(segment[2], segment[4], head, tl.load(segment[3] + 2 * head) + entries, PAGE)


@triton.jit
def block_slots(segment, head, base, entries, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """``slots`` of ``base`` + 0 … BLOCK, on the grid of blocks, of a settled segment: such start with their page."""
    if PAGE % BLOCK == 0:
        return slots(segment, head, base, PAGE) + tl.arange(0, BLOCK)
    return slots(segment, head, entries, PAGE)


@triton.jit
def numbers(
    segment,
    head,
    base,
    entries,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
    FINE: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """The TILES tiles of ``entries`` (``base`` + 0 … BLOCK) of a head, in TYPE. Where the head has no such entry they
    are any finite numbers, because slots that hold nothing hold something finite.

    FINE: every number's scale is loaded for itself, where a tile has several. ACROSS: tiles are [WIDTH, BLOCK].
    """
    x, ranges = segment[0], segment[1]
    channel = along(tl.arange(0, WIDTH), ACROSS)
    tiles = ()
    if KIND == 0:
        row = down(slots(segment, head, entries, PAGE), ACROSS)
        for i in tl.static_range(TILES):
            tiles = tiles + (_load(x + row * SIZE + first_channel(i, PARTS, RUN, SIZE), channel, RUN, WIDTH),)
    else:
        slot = block_slots(segment, head, base, entries, BLOCK, PAGE)
        row = down(slot, ACROSS)
        if KIND == 3:
            scale = tl.load(ranges + slot)
            for i in tl.static_range(TILES):
                codes = _load(x + row * SIZE + i * RUN, channel, RUN, WIDTH)
                number = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * down(scale, ACROSS)
                tiles = tiles + (number.to(TYPE),)
        else:
            for run in tl.static_range(TILES // PARTS):
                if BITS == 3:
                    # The low two bits of all codes, then the high ones (``formats/packing.py``).
                    each = run * RUN + channel
                    low = _load(x + row * (SIZE * 3 // 8), each % (SIZE // 4), RUN, WIDTH)
                    high = _load(x + row * (SIZE * 3 // 8) + SIZE // 4, each % (SIZE // 8), RUN, WIDTH)
                    low = (low >> (2 * (each // (SIZE // 4))).to(tl.uint8)) & 3
                    codes = low | (((high >> (each // (SIZE // 8)).to(tl.uint8)) & 1) << 2)
                else:
                    codes = _load(x + row * (SIZE // PARTS) + run * RUN, channel, RUN, WIDTH)
                scales = ()
                minima = ()
                for part in tl.static_range(PARTS if KIND != 4 else 0):
                    first = first_channel(run * PARTS + part, PARTS, RUN, SIZE)
                    if FINE and KIND == 1:
                        s, m = ranges_at(ranges, row // GROUP * SIZE + first + channel, channel < RUN)
                    elif FINE:
                        s, m = ranges_at(ranges, row * (SIZE // GROUP) + (first + channel) // GROUP, channel < RUN)
                    elif KIND == 1:
                        unit = slots(segment, head, base, PAGE) // GROUP
                        s, m = ranges_at(ranges, unit * SIZE + first + channel, channel < RUN)
                    else:
                        s, m = ranges_at(ranges, slot * (SIZE // GROUP) + first // GROUP, slot >= 0)
                        s, m = down(s, ACROSS), down(m, ACROSS)
                    scales = scales + (s,)
                    minima = minima + (m,)
                for part in tl.static_range(PARTS):
                    code = codes if BITS == 3 else (codes >> (BITS * part)) & ((1 << BITS) - 1)
                    number = code.to(tl.float32)
                    if KIND != 4:
                        number = number * scales[part].to(tl.float32) + minima[part].to(tl.float32)
                    tiles = tiles + (number.to(TYPE),)
    return tiles


@triton.jit
def down(x, ACROSS: tl.constexpr):
    """Something of each entry, beside tiles."""
    return x[None, :] if ACROSS else x[:, None]


@triton.jit
def along(x, ACROSS: tl.constexpr):
    """Something of each channel, beside tiles."""
    return x[:, None] if ACROSS else x[None, :]


@triton.jit
def _load(at, channel, RUN: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers ``channel`` from ``at`` on, zero beyond the RUN ones of a tile."""
    if RUN == WIDTH:
        return tl.load(at + channel)
    ACROSS: tl.constexpr = channel.shape[0] == WIDTH
    return tl.load(at + channel, mask=along(tl.arange(0, WIDTH) < RUN, ACROSS), other=0)


@triton.jit
def ranges_at(ranges, index, there):
    """Scales and minima at ``index``. Those of two bytes are loaded together: loads of less than four bytes cannot be
    under way in the background."""
    number = ranges.dtype.element_ty
    if number.primitive_bitwidth == 16:
        pair = tl.load(ranges.to(tl.pointer_type(tl.uint32)) + index, mask=there, other=0)
        scale = pair.to(tl.uint16).to(number, bitcast=True)
        minimum = (pair >> 16).to(tl.uint16).to(number, bitcast=True)
    else:
        scale = tl.load(ranges + 2 * index, mask=there, other=0)
        minimum = tl.load(ranges + 2 * index + 1, mask=there, other=0)
    return scale, minimum
