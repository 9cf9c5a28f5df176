"""Rows of any type written to pages, and moved from slot to slot of a head.

A *row* is what a pool holds of one unit in one tensor, as words of 4, 2 or 1 bytes. Of the R heads that a kernel
serves, ``plan`` (int32 [n, R]) has what it must know: first each head's number in the page table, then places in units
from the first slot of its first page, and counts.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import Rows
from ..mirror import Mirror

_WORDS = 2048  # of a tile
_WIDEST = 128


@triton.jit
def pages(table, width, head, column):
    """The pages at ``column`` of a head's table, int64; any pages where it has none."""
    return tl.load(table + head.to(tl.int64) * width + tl.minimum(column, width - 1)).to(tl.int64)


@triton.jit
def slots(table, width, head, place, PAGE: tl.constexpr):
    """The flat slots of ``place`` of a head, int64; any slots where it has none."""
    place = tl.maximum(place, 0)
    return pages(table, width, head, place // PAGE) * PAGE + place % PAGE


@triton.jit
def _copy(source, old, target, new, there, WORDS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``old`` of ``source`` to rows ``new`` of ``target``, where they are ``there``."""
    for first in tl.static_range(0, WORDS, WIDTH):
        word = first + tl.arange(0, WIDTH)
        mask = there[:, None] & (word < WORDS)[None, :]
        tile = tl.load(source + old[:, None] * WORDS + word[None, :], mask=mask)
        tl.store(target + new[:, None] * WORDS + word[None, :], tile, mask=mask)


@triton.jit(do_not_specialize=["row_stride", "heads"])
def _write(
    x,
    rows,
    row_stride,
    plan,
    heads,
    table,
    width,
    PAGE: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    unit = block * BLOCK + tl.arange(0, BLOCK)
    there = unit < tl.load(plan + 2 * heads + head)
    target = slots(table, width, tl.load(plan + head), tl.load(plan + heads + head) + unit, PAGE)
    _copy(rows, head * row_stride + unit, x, target, there, WORDS, WIDTH)


@triton.jit(do_not_specialize=["moves", "heads"])
def _move(
    x,
    source,
    target,
    moves,
    plan,
    heads,
    table,
    width,
    PAGE: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    number, start = tl.load(plan + head), tl.load(plan + heads + head)
    move = block * BLOCK + tl.arange(0, BLOCK)
    old = tl.load(source + head * moves + move, mask=move < moves, other=-1)
    new = tl.load(target + head * moves + move, mask=move < moves, other=-1)
    there = old >= 0
    old = slots(table, width, number, start + old, PAGE)
    new = slots(table, width, number, start + new, PAGE)
    _copy(x, old, x, new, there, WORDS, WIDTH)


@triton.jit(do_not_specialize=["index_stride", "heads"])
def _compact(
    x,
    index,
    index_stride,
    plan,
    heads,
    table,
    width,
    PAGE: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some words of all rows of a head. They move forward only, and in order: what a round reads lies where no earlier
    one has written, so a barrier within each round is enough."""
    head = tl.program_id(0).to(tl.int64)
    number, start, count = tl.load(plan + head), tl.load(plan + heads + head), tl.load(plan + 2 * heads + head)
    word = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (word < WORDS)[None, :]
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        there = place < count
        token = tl.load(index + head * index_stride + place, mask=there, other=0)
        old = slots(table, width, number, start + token, PAGE)
        new = slots(table, width, number, place, PAGE)
        mask = there[:, None] & inside
        tile = tl.load(x + old[:, None] * WORDS + word[None, :], mask=mask)
        tl.debug_barrier()
        tl.store(x + new[:, None] * WORDS + word[None, :], tile, mask=mask)


def write(tensors: Rows, rows: Rows, mirror: Mirror, plan: Tensor, most: int) -> None:
    """Writes ``rows`` ([R, units, *shape]) of each head: the first ``counts`` of them, ``most`` at most, from ``first``
    on. ``plan``: numbers, ``first`` and ``counts``."""
    for name, new in _with_words(rows).items():
        x = tensors[name]
        assert new.dtype == x.dtype
        pool, given = _words(x), _words(new.contiguous())
        shape = _shape(pool, most)
        grid = (plan.shape[1], triton.cdiv(most, shape["BLOCK"]))
        _write[grid](pool, given, new.shape[1], *paged(plan, mirror), PAGE=x.shape[1], **shape)


def move(tensors: Rows, source: Tensor, target: Tensor, mirror: Mirror, plan: Tensor) -> None:
    """Moves tokens ``source`` of each head to where ``target`` lie, int64 [R, m] each, -1: none; no token is in both.
    ``plan``: numbers and starts."""
    for x in _with_words(tensors).values():
        pool, moves = _words(x), source.shape[1]
        shape = _shape(pool, moves)
        grid = (plan.shape[1], triton.cdiv(moves, shape["BLOCK"]))
        _move[grid](pool, source, target, moves, *paged(plan, mirror), PAGE=x.shape[1], **shape)


def compact(tensors: Rows, index: Tensor, mirror: Mirror, plan: Tensor) -> None:
    """Moves tokens ``index`` (int64 [R, m], ascending, the first ``counts`` of each row) of each head to its first
    slots, in that order. ``plan``: numbers, starts and ``counts``."""
    index = index.contiguous()
    for x in _with_words(tensors).values():
        pool = _words(x)
        words = pool.shape[1]
        # Few long heads would leave processors without work: parts of rows are moved side by side, each wide enough for
        # what memory reads at once.
        width = min(triton.next_power_of_2(words), 32)
        grid = (plan.shape[1], triton.cdiv(words, width))
        shape = {"WORDS": words, "WIDTH": width, "BLOCK": min(256, 8192 // width)}
        _compact[grid](pool, index, index.shape[1], *paged(plan, mirror), PAGE=x.shape[1], **shape, num_warps=8)


def _with_words(tensors: Rows) -> Rows:
    """The tensors that keep anything: a format may have no minima, or no exact numbers."""
    return {name: x for name, x in tensors.items() if x.numel()}


def _words(x: Tensor) -> Tensor:
    """Rows [a, b, *shape], contiguous, as words, [a * b, words]."""
    flat = x.reshape(x.shape[0] * x.shape[1], -1).view(torch.uint8)
    size = gcd(flat.shape[1], 4)
    flat = flat.clone() if flat.storage_offset() % size else flat
    return flat if size == 1 else flat.view({2: torch.int16, 4: torch.int32}[size])


def _shape(pool: Tensor, rows: int) -> dict[str, int]:
    """Tiles for so many ``rows`` of a head."""
    words = pool.shape[1]
    width = min(triton.next_power_of_2(words), _WIDEST)
    return {"WORDS": words, "WIDTH": width, "BLOCK": min(triton.next_power_of_2(rows), _WORDS // width)}


def paged(plan: Tensor, mirror: Mirror) -> tuple[Tensor, int, Tensor, int]:
    return plan, plan.shape[1], mirror.table, mirror.table.shape[1]
