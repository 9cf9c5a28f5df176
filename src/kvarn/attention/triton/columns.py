"""What a decoding step's queries paid to each entry, put into the columns beside the entries, in their pages."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...memory import Segment
from ..updates import Ignoring, Mass, Recurring, Update
from .operands import arguments
from .tiles import slots

MASS = tl.constexpr(0)
RECURRING = tl.constexpr(1)
IGNORING = tl.constexpr(2)

_BLOCK = 256  # entries
_PROGRAMS = 1024  # enough to keep a device busy


@triton.jit(do_not_specialize=["first", "longest", "kv_heads"])
def update_columns(
    logits,  # fp32 [rows, QUERIES, longest], in base 2
    sums,  # fp32 [rows * QUERIES]: their log-sum-exps
    stores,  # of each store a segment whose tensors are two columns, in the order of reading
    positions,  # int64 [sequences]: the queries'
    first,
    longest,
    kv_heads,
    threshold,
    STORES: tl.constexpr,
    KIND: tl.constexpr,
    ADDS: tl.constexpr,
    WINDOW: tl.constexpr,
    KERNEL: tl.constexpr,
    HISTORY: tl.constexpr,
    QUERIES: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some blocks of entries of a row."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    head = first + row
    now = tl.load(positions + row // kv_heads).to(tl.int32)
    total = tl.zeros([], tl.int32)
    for index in tl.static_range(STORES):
        total += tl.load(stores[index][3] + 2 * head + 1)
    before = tl.zeros([], tl.int32)
    for index in tl.static_range(STORES):
        segment = stores[index]
        column = segment[0]
        other = segment[1]
        length = tl.load(segment[3] + 2 * head + 1)
        for base in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
            entries = base + tl.arange(0, BLOCK)
            there = entries < length
            slot = slots(segment, head, entries, PAGE)
            if KIND == 0:
                mass = tl.zeros([BLOCK], tl.float32)
                for place in tl.static_range(KERNEL):
                    near = before + entries + (place - KERNEL // 2)
                    received = tl.sum(_paid(logits, sums, row, near, total, longest, QUERIES, HEIGHT), 0) / QUERIES
                    if WINDOW > 0:
                        received = tl.where(_second(stores, head, near, STORES, PAGE) > now - WINDOW, 0, received)
                    mass += received
                mass = mass / KERNEL
                if ADDS:
                    mass += tl.load(column + slot, mask=there, other=0)
                tl.store(column + slot, mass, mask=there)
            else:
                paid = _paid(logits, sums, row, before + entries, total, longest, QUERIES, HEIGHT)
                if KIND == 1:
                    matters = there & (tl.max(paid, 0) >= threshold)
                    silence = now - tl.load(column + slot, mask=matters, other=0)
                    interval = tl.load(other + slot, mask=matters, other=0)
                    tl.store(other + slot, tl.maximum(interval, silence), mask=matters)
                    tl.store(column + slot, tl.zeros_like(silence) + now, mask=matters)
                else:
                    bit = now % HISTORY
                    byte = column + slot * (HISTORY // 8) + bit // 8
                    ignores = tl.sum(paid, 0) / QUERIES < tl.div_rn(1.0, total.to(tl.float32))
                    old = tl.load(byte, mask=there, other=0).to(tl.int32) & ~(1 << (bit % 8))
                    tl.store(byte, (old | (ignores.to(tl.int32) << (bit % 8))).to(tl.uint8), mask=there)
        before += length


@triton.jit
def _second(stores, head, entries, STORES: tl.constexpr, PAGE: tl.constexpr):
    """The second column (int32) of ``entries`` as they are read of all stores together; 0 where there is none."""
    numbers = tl.zeros_like(entries)
    for index in tl.static_range(STORES):
        segment = stores[index]
        length = tl.load(segment[3] + 2 * head + 1)
        if length > 0:  # a store without entries has no table
            own = (entries >= 0) & (entries < length)
            numbers += tl.load(segment[1] + slots(segment, head, entries, PAGE), mask=own, other=0)
        entries -= length
    return numbers


@triton.jit
def _paid(logits, sums, row, entries, total, longest, QUERIES: tl.constexpr, HEIGHT: tl.constexpr):
    """What the queries of a row pay to entries, [HEIGHT, BLOCK]; nothing where the head has no such entry."""
    query = row * QUERIES + tl.arange(0, HEIGHT)
    real = tl.arange(0, HEIGHT) < QUERIES
    valid = real[:, None] & ((entries >= 0) & (entries < total))[None, :]
    at = logits + query.to(tl.int64)[:, None] * longest + entries[None, :]
    logit = tl.load(at, mask=valid, other=float("-inf"))
    return tl.exp2(logit - tl.load(sums + query, mask=real, other=0)[:, None])


def put(
    update: Update,
    logits: Tensor,
    sums: Tensor,
    columns: Sequence[Segment],
    first: int,
    positions: Tensor,
    overlap: bool,
) -> None:
    """Brings the columns of all stores, in the order of reading, up to date with the ``logits`` (fp32 [rows, G,
    longest] in base 2, undefined beyond a head's entries) of the rows from head ``first`` on, and their log-sum-exps
    ``sums`` ([rows * G]), of queries at ``positions`` (int64 [B, 1])."""
    rows, queries, longest = logits.shape
    programs = min(triton.cdiv(longest, _BLOCK), triton.cdiv(_PROGRAMS, rows))
    update_columns[(rows, programs)](
        logits,
        sums,
        tuple(arguments(segment, *update.columns) for segment in columns),
        positions,
        first,
        longest,
        rows // positions.shape[0],
        update.threshold if isinstance(update, Recurring) else 0.0,
        STORES=len(columns),
        **_constants(update),
        QUERIES=queries,
        HEIGHT=triton.next_power_of_2(queries),
        BLOCK=_BLOCK,
        PAGE=columns[0].pool.page_size,
        OVERLAP=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )


def _constants(update: Update) -> dict[str, int]:
    constants = {"KIND": RECURRING.value, "ADDS": False, "WINDOW": 0, "KERNEL": 1, "HISTORY": 0}
    if isinstance(update, Mass):
        return constants | {
            "KIND": MASS.value,
            "ADDS": update.adds,
            "WINDOW": update.window,
            "KERNEL": update.kernel,
        }
    if isinstance(update, Ignoring):
        return constants | {"KIND": IGNORING.value, "HISTORY": update.history}
    return constants
