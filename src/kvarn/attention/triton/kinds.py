"""Vectors of entries as tiles, on the device, whatever their format: the kinds that ``tiles`` does not know, and what
is laid over decoded numbers (corrections, exact tokens, rotations).

A segment, as kernels take it, is what ``tiles`` reads of it, then the tensors of its kind or of its corrections, then
those of exact tokens, each as a tuple where there are any. ``BESIDE`` is (exact numbers of a vector, rank of a
correction, entries of its block, exact tokens of a head, integers beside signs or heads transformed together). Where
HEADS KV heads have one row of the store, a row has their vectors one after another and ``part`` is the head that is
read; ``SIZE`` is the size of a head's vector.
"""

import triton
import triton.language as tl

from .tiles import along, down, first_channel, numbers, ranges_at, slots

SPARSE = tl.constexpr(8)  # a bitmap, and the numbers at its bits
LEVELS_CHANNEL = tl.constexpr(9)  # codes of levels, ranges of channels that a layer shares, exact numbers apart
LEVELS_TOKEN = tl.constexpr(10)  # the same with a range for each entry
TERNARY = tl.constexpr(11)  # signs or zeros, five to a byte, and a scale for each channel of a unit
SIGNS = tl.constexpr(12)  # integers of two bits for the first channels, signs and magnitudes for the others
TURNED = tl.constexpr(13)  # integers with a scale for channels of an entry, after a transform of some heads together
RANKED = tl.constexpr(14)  # the same, in an order of channels that a layer shares


@triton.jit
def vectors(
    segment,
    head,
    base,
    entries,
    part,
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
    HEADS: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """The TILES tiles of ``entries``, as ``tiles.numbers`` gives them, for every kind."""
    if KIND < 8 and (KIND != 0 or HEADS == 1):
        tiles = numbers(
            segment, head, base, entries, BLOCK, KIND, BITS, GROUP, PAGE, SIZE, TILES, PARTS, RUN, WIDTH, TYPE, FINE,
            ACROSS,
        )  # fmt: skip
    elif KIND == 8:
        slot = slots(segment, head, entries, PAGE)
        tiles = _sparse(segment, slot, GROUP, SIZE, RUN, WIDTH, TYPE, ACROSS)
    elif KIND == 13 or KIND == 14:
        slot = slots(segment, head, entries, PAGE)
        tiles = _turned(
            segment, head, slot, part, KIND == 14, BITS, GROUP, SIZE, TILES, RUN, WIDTH, TYPE, HEADS, BESIDE[4], ACROSS
        )  # fmt: skip
    else:
        slot = slots(segment, head, entries, PAGE)
        tiles = ()
        for i in tl.static_range(TILES):
            channel = first_channel(i, PARTS, RUN, SIZE) + tl.arange(0, WIDTH)
            there = tl.arange(0, WIDTH) < RUN
            if KIND == 11:
                x = _ternary(segment, slot, channel, there, GROUP, SIZE, ACROSS)
            elif KIND == 12:
                x = _signs(segment, slot, i * RUN, GROUP, BESIDE[4], SIZE, RUN, WIDTH, ACROSS)
            else:
                place = part * SIZE + channel
                if KIND == 0:
                    at = down(slot, ACROSS) * (SIZE * HEADS) + along(place, ACROSS)
                    x = tl.load(segment[0] + at, mask=along(there, ACROSS), other=0)
                else:
                    x = _levels(segment, head, slot, place, there, KIND == 9, BITS, SIZE * HEADS, BESIDE[0], ACROSS)
            tiles = tiles + (x.to(TYPE),)
    if (KIND == 1 or KIND == 2) and BESIDE[2] > 0:
        tiles = _corrected(
            tiles, segment, slots(segment, head, entries, PAGE), KIND == 1, SIZE, TILES, PARTS, RUN, WIDTH, ACROSS,
            BESIDE,
        )  # fmt: skip
    if KIND != 0 and BESIDE[3] > 0:
        tiles = _exempted(
            tiles, segment, head, entries, part, SIZE, HEADS, TILES, PARTS, RUN, WIDTH, ACROSS, BESIDE[3]
        )  # fmt: skip
    return tiles


@triton.jit
def rotated(
    tiles,
    segment,
    head,
    entries,
    valid,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Keys ([BLOCK, WIDTH] each) as they are at their positions, of which ``segment`` has the column, and the tables of
    cosines and sines of its first SIZE / 2 channels; channel c turns with channel c + SIZE / 2."""
    # What slots hold beyond a head's entries may be a position that the tables do not reach.
    position = tl.load(segment[0] + slots(segment, head, entries, PAGE), mask=valid, other=0).to(tl.int64)
    there = (tl.arange(0, WIDTH) < RUN)[None, :]
    # The tile with the channels SIZE / 2 further on: another part of the same run, or a later run.
    AWAY: tl.constexpr = PARTS // 2 if PARTS > 1 else TILES // 2
    cosines = ()
    sines = ()
    turned = ()
    for i in tl.static_range(TILES):
        if i % (2 * AWAY) < AWAY:
            channel = first_channel(i, PARTS, RUN, SIZE) + tl.arange(0, WIDTH)
            at = position[:, None] * SIZE + channel[None, :]
            cosines = cosines + (tl.load(segment[5][0] + at, mask=there, other=0).to(tl.float32),)
            sines = sines + (tl.load(segment[5][1] + at, mask=there, other=0).to(tl.float32),)
            other = -tiles[i + AWAY].to(tl.float32)
        else:
            cosines = cosines + (cosines[i - AWAY],)
            sines = sines + (sines[i - AWAY],)
            other = tiles[i - AWAY].to(tl.float32)
        x = tiles[i].to(tl.float32) * cosines[i] + other * sines[i]
        turned = turned + (x.to(tiles[i].dtype),)
    return turned


@triton.jit
def _sparse(
    segment,
    slot,
    KEPT: tl.constexpr,
    SIZE: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """Tile p has the channels of bit p of all bytes. A channel's number is the one after those of all bits below it:
    those of lower parts, and those of its own part in bytes before."""
    axis: tl.constexpr = 0 if ACROSS else 1
    byte = tl.arange(0, WIDTH)
    at = down(slot, ACROSS) * RUN + along(byte, ACROSS)
    bits = tl.load(segment[0] + at, mask=along(byte < RUN, ACROSS), other=0).to(tl.int32)
    # Eight counts at once, each in a byte of two words: a multiplication copies four bits to where their bytes begin.
    low = ((bits & 15) * 0x204081) & 0x1010101
    high = ((bits >> 4) * 0x204081) & 0x1010101
    counted = (tl.cumsum(low, axis), tl.cumsum(high, axis))
    totals = (tl.sum(low, axis), tl.sum(high, axis))
    first = slot * KEPT
    tiles = ()
    for part in tl.static_range(8):
        stays = ((bits >> part) & 1) > 0
        rank = ((counted[part // 4] >> (8 * (part % 4))) & 255) - 1
        tiles = tiles + (tl.load(segment[1] + down(first, ACROSS) + rank, mask=stays, other=0).to(TYPE),)
        first += (totals[part // 4] >> (8 * (part % 4))) & 255
    return tiles


@triton.jit
def _ternary(segment, slot, channel, there, UNIT: tl.constexpr, SIZE: tl.constexpr, ACROSS: tl.constexpr):
    there = along(there, ACROSS)
    at = down(slot, ACROSS) * ((SIZE + 4) // 5) + along(channel // 5, ACROSS)
    codes = tl.load(segment[0] + at, mask=there, other=0).to(tl.int32)
    # Divided by the digit's power of three by a multiplication, which is exact for bytes.
    digit = channel % 5
    power = tl.where(digit == 0, 65536, tl.where(digit == 1, 21846, tl.where(digit == 2, 7282, 2428)))
    power = tl.where(digit == 4, 810, power)
    signs = ((codes * along(power, ACROSS)) >> 16) % 3 - 1
    scale = tl.load(segment[1] + down(slot // UNIT, ACROSS) * SIZE + along(channel, ACROSS), mask=there, other=0)
    return signs.to(tl.float32) * scale.to(tl.float32)


@triton.jit
def _signs(
    segment,
    slot,
    FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """Numbers FIRST … FIRST + RUN, of which either all or none are among the WIDE ones that are integers."""
    inside = _inside(RUN, WIDTH, ACROSS)
    row, unit = down(slot, ACROSS), down(slot // UNIT, ACROSS)
    if FIRST < WIDE:
        place = along(FIRST + tl.arange(0, WIDTH), ACROSS)
        return _integers(
            segment[0] + row * (WIDE // 4), place, inside, segment[1], unit * WIDE + place, inside, 2, WIDE
        )
    else:
        REST: tl.constexpr = SIZE - WIDE
        signs, magnitudes = segment[5]
        place = along(FIRST - WIDE + tl.arange(0, WIDTH), ACROSS)
        codes = _code(signs + row * (REST // 8), place, inside, 1, REST)
        magnitude = tl.load(magnitudes + unit * REST + place, mask=inside, other=0)
        return (2 * codes - 1).to(tl.float32) * magnitude.to(tl.float32)


@triton.jit
def _turned(
    segment,
    head,
    slot,
    part,
    ORDERED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
    HEADS: tl.constexpr,
    JOINT: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """The vectors of head ``part`` of rows in which the vectors of JOINT neighbouring heads were transformed together.

    A Walsh-Hadamard transform is one over the heads, then one over the tiles of a head, then one within tiles.
    """
    ENTRIES: tl.constexpr = slot.shape[0]
    ROW: tl.constexpr = SIZE * HEADS
    rows = segment[0] + down(slot, ACROSS) * (ROW * BITS // 8)
    ranges = segment[1] + down(slot, ACROSS) * (ROW // GROUP * 2)
    if ORDERED:
        ranks = segment[5][0] + tl.load(segment[5][1] + head) * ROW
    inside = _inside(RUN, WIDTH, ACROSS)
    first = part // JOINT * JOINT
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + (tl.zeros([WIDTH, ENTRIES] if ACROSS else [ENTRIES, WIDTH], tl.float32),)
    for other in tl.range(JOINT, num_stages=1):
        sign = 1.0 - 2 * _odd((part - first) & other)
        added = ()
        for i in tl.static_range(TILES):
            begin = (first + other) * SIZE + i * RUN
            place = begin + along(tl.arange(0, WIDTH), ACROSS)
            if ORDERED:
                place = tl.load(ranks + place, mask=inside, other=0).to(tl.int32)
            if not ORDERED and GROUP % RUN == 0:
                x = _integers(rows, place, inside, ranges, begin // GROUP, True, BITS, ROW)
            else:
                x = _integers(rows, place, inside, ranges, place // GROUP, inside, BITS, ROW)
            added = added + (sums[i] + sign * x,)
        sums = added
    return _turned_within(sums, TILES, RUN, WIDTH, TYPE, SIZE * JOINT, ACROSS)


@triton.jit
def _turned_within(
    sums,
    TILES: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
    TOGETHER: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """The transform over tiles and within each; TOGETHER numbers are transformed in all."""
    channel = tl.arange(0, WIDTH)
    # Products with what tiles have beyond RUN are 0.
    within = (channel < RUN)[:, None] & (channel < RUN)[None, :]
    matrix = tl.where(within, 1 - 2 * _odd(channel[:, None] & channel[None, :]), 0).to(TYPE)
    for bit in tl.static_range(_log2(TILES)):
        mixed = ()
        for i in tl.static_range(TILES):
            if i >> bit & 1:
                mixed = mixed + (sums[i - (1 << bit)] - sums[i],)
            else:
                mixed = mixed + (sums[i] + sums[i + (1 << bit)],)
        sums = mixed
    tiles = ()
    for i in tl.static_range(TILES):
        total = (sums[i] * _inverse_root(TOGETHER)).to(TYPE)
        if ACROSS:
            turned = tl.dot(matrix, total, input_precision="ieee")
        else:
            turned = tl.dot(total, matrix, input_precision="ieee")
        tiles = tiles + (turned.to(TYPE),)
    return tiles


@triton.jit
def _integers(rows, place, inside, ranges, index, there, BITS: tl.constexpr, SIZE: tl.constexpr):
    """Numbers ``place`` of packed rows, whose scales and minima are ``ranges`` at ``index``."""
    scale, minimum = ranges_at(ranges, index, there)
    codes = _code(rows, place, inside, BITS, SIZE)
    return codes.to(tl.float32) * scale.to(tl.float32) + minimum.to(tl.float32)


@triton.jit
def _inside(RUN: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr):
    """Which places of a tile hold numbers, beside tiles. True, all of them, costs nothing."""
    if RUN == WIDTH:
        return True
    else:
        return along(tl.arange(0, WIDTH) < RUN, ACROSS)


@triton.jit
def _odd(bits):
    """1 where an odd number of the low eight bits are set, else 0."""
    bits ^= bits >> 4
    bits ^= bits >> 2
    return (bits ^ (bits >> 1)) & 1


@triton.constexpr_function
def _log2(power):
    return power.bit_length() - 1


@triton.constexpr_function
def _inverse_root(number):
    return number**-0.5


@triton.jit
def _levels(
    segment,
    head,
    slot,
    place,
    there,
    FIXED: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    EXACT: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """Numbers ``place`` of rows of SIZE numbers; FIXED: channels have ranges, not entries."""
    exact, places, read, shared, center, half = segment[5]
    own = tl.load(shared + head)
    row, column, inside = down(slot, ACROSS), along(place, ACROSS), along(there, ACROSS)
    codes = _code(segment[0] + row * (SIZE * BITS // 8), column, inside, BITS, SIZE)
    x = tl.load(read + own * (1 << BITS) + codes)
    if FIXED:
        middle = along(tl.load(center + own * SIZE + place, mask=there, other=0), ACROSS)
        reach = along(tl.load(half + own * SIZE + place, mask=there, other=0), ACROSS)
    else:
        middle = down(tl.load(center + slot), ACROSS)
        reach = down(tl.load(half + slot), ACROSS)
    x = x * reach.to(tl.float32) + middle.to(tl.float32)
    for i in tl.static_range(EXACT):
        apart = tl.load(places + slot * EXACT + i).to(tl.int32)
        number = tl.load(exact + slot * EXACT + i).to(tl.float32)
        x = tl.where(column == down(apart, ACROSS), down(number, ACROSS), x)
    return x


@triton.jit
def _code(rows, place, there, BITS: tl.constexpr, SIZE: tl.constexpr):
    """Codes ``place`` of packed rows (``formats/packing.py``), int32."""
    if BITS == 3:
        low = tl.load(rows + place % (SIZE // 4), mask=there, other=0).to(tl.int32)
        high = tl.load(rows + SIZE // 4 + place % (SIZE // 8), mask=there, other=0).to(tl.int32)
        return ((low >> (2 * (place // (SIZE // 4)))) & 3) | (((high >> (place // (SIZE // 8))) & 1) << 2)
    else:
        each: tl.constexpr = SIZE * BITS // 8
        codes = tl.load(rows + place % each, mask=there, other=0).to(tl.int32)
        return (codes >> (BITS * (place // each))) & ((1 << BITS) - 1)


@triton.jit
def _corrected(
    tiles,
    segment,
    slot,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """Integers with the exact numbers of their vectors, then the low-rank part of their block. CHANNELS: vectors are
    those of a channel in a block, and places are entries."""
    exact, places, left, right = segment[5]
    EXACT: tl.constexpr = BESIDE[0]
    RANK: tl.constexpr = BESIDE[1]
    UNIT: tl.constexpr = BESIDE[2]
    out = ()
    for i in tl.static_range(TILES):
        channel = first_channel(i, PARTS, RUN, SIZE) + tl.arange(0, WIDTH)
        there = along(tl.arange(0, WIDTH) < RUN, ACROSS)
        vector = down(slot // UNIT * SIZE, ACROSS) + along(channel, ACROSS)
        x = tiles[i].to(tl.float32)
        for j in tl.static_range(EXACT):
            if CHANNELS:
                apart = tl.load(places + vector * EXACT + j, mask=there, other=0).to(tl.int32)
                number = tl.load(exact + vector * EXACT + j, mask=there, other=0).to(tl.float32)
                x = tl.where(apart == down((slot % UNIT).to(tl.int32), ACROSS), number, x)
            else:
                apart = down(tl.load(places + slot * EXACT + j).to(tl.int32), ACROSS)
                number = down(tl.load(exact + slot * EXACT + j).to(tl.float32), ACROSS)
                x = tl.where(apart == along(channel, ACROSS), number, x)
        for j in tl.static_range(RANK):
            of_entry = tl.load(left + slot * RANK + j).to(tl.float32)
            of_channel = tl.load(right + vector * RANK + j, mask=there, other=0).to(tl.float32)
            x += down(of_entry, ACROSS) * of_channel
        out = out + (x.to(tiles[i].dtype),)
    return out


@triton.jit
def _exempted(
    tiles,
    segment,
    head,
    entries,
    part,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,
    MOST: tl.constexpr,
):
    """The same with exact vectors where a head has them."""
    exact, places = segment[-1]
    row = head.to(tl.int64) * MOST
    every = tl.arange(0, _power_of_two(MOST))
    place = tl.load(places + row + every, mask=every < MOST, other=-1)
    found = tl.max(tl.where(place[None, :] == entries[:, None], every[None, :], -1), 1)
    apart = down(found >= 0, ACROSS)
    first = down((row + found) * (SIZE * HEADS) + part * SIZE, ACROSS)
    out = ()
    for i in tl.static_range(TILES):
        channel = first_channel(i, PARTS, RUN, SIZE) + tl.arange(0, WIDTH)
        there = apart & along(tl.arange(0, WIDTH) < RUN, ACROSS)
        x = tl.load(exact + first + along(channel, ACROSS), mask=there, other=0).to(tiles[i].dtype)
        out = out + (tl.where(apart, x, tiles[i]),)
    return out


@triton.constexpr_function
def _power_of_two(number):
    return triton.next_power_of_2(number)
