"""Pools and arenas: pages handed out, shared and taken back, and the bytes they report."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarn.errors import OutOfMemory
from kvarn.formats import Columns, Dense, Format, Int
from kvarn.memory import Arena, Pool
from store_model import CPU, page_nbytes

FORMATS = [
    Dense(8, torch.bfloat16),
    Int(2, "channel", 4, 8, torch.float16),
    Int(3, "token", 8, 24, torch.float32),
    Columns({"position": torch.int32, "mass": torch.float32}),
]


def make_pool(fmt: Format = FORMATS[0], page_size: int = 4, ceiling: int | None = None) -> Pool:
    return Arena(CPU, page_size, ceiling).pool(fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_bytes_are_those_of_the_tensors(fmt: Format) -> None:
    pool = make_pool(fmt)
    pages = pool.allocate(5)
    assert pool.page_bytes == page_nbytes(pool)
    assert pool.bytes == pool.arena.bytes == 5 * pool.page_bytes
    tensors = sum(t.untyped_storage().nbytes() for t in pool.tensors.values())
    assert (
        pool.reserved_bytes == tensors + pool.references.nbytes + pool._free.nbytes == pool.capacity * pool.page_bytes
    )
    assert pool.arena.reserved_bytes == pool.reserved_bytes
    pool.release(pages)
    assert pool.bytes == 0
    assert pool.reserved_bytes == pool.capacity * pool.page_bytes > 0


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 12)), max_size=30))
def test_pages_are_handed_out_once(steps: list[tuple[str, int]]) -> None:
    pool, owners = make_pool(), {}
    for step, count in steps:
        if step == "allocate":
            pages = pool.allocate(count).tolist()
            assert len(set(pages)) == count
            assert not owners.keys() & set(pages)
            owners |= dict.fromkeys(pages, 1)
        elif owners:
            pages = sorted(owners)[: max(count, 1)]
            # The same page twice in one call, as where two heads share it.
            if step == "share":
                pages += pages[:2]
                pool.share(torch.tensor(pages, dtype=torch.int32))
            else:
                pages += [page for page in pages[:2] if owners[page] > 1]
                pool.release(torch.tensor(pages, dtype=torch.int32))
            for page in pages:
                owners[page] += 1 if step == "share" else -1
            owners = {page: n for page, n in owners.items() if n}
        assert pool.used == len(owners)
        assert pool.shared == sum(n > 1 for n in owners.values())
        assert pool.references.tolist() == [owners.get(page, 0) for page in range(pool.capacity)]


def test_growing_keeps_contents_and_room_is_finite() -> None:
    pool = make_pool()
    first = pool.allocate(3)
    pool.tensors["x"][first.long()] = torch.arange(3.0, dtype=torch.bfloat16)[:, None, None]
    pool.allocate(50)
    assert torch.equal(pool.tensors["x"][first.long(), 0, 0], torch.arange(3.0, dtype=torch.bfloat16))
    pool.reserve(20)
    assert bool(torch.isfinite(pool.tensors["x"]).all())
    capacity = pool.capacity
    assert capacity - pool.used >= 20
    pool.allocate(20)
    assert pool.capacity == capacity, "what was reserved is there"


def test_copied_pages() -> None:
    pool = make_pool(FORMATS[1])
    pages = pool.allocate(4)
    for tensor in pool.tensors.values():
        tensor.copy_(torch.randint(0, 9, tensor.shape))
    pool.copy_pages(pages[:2], pages[2:])
    for tensor in pool.tensors.values():
        assert torch.equal(tensor[pages[:2].long()], tensor[pages[2:].long()])


def test_a_ceiling_bounds_all_pools_together() -> None:
    arena = Arena(CPU, 4, ceiling=1000)
    small, large = arena.pool(Dense(8, torch.float32)), arena.pool(Dense(16, torch.float32))
    assert (small.page_bytes, large.page_bytes) == (136, 264)
    small.allocate(3)
    large.allocate(2)
    assert (arena.bytes, arena.affordable(small), arena.affordable(large)) == (936, 3, 2)
    for pool in (small, large):
        capacity = pool.capacity
        with pytest.raises(
            OutOfMemory, match=rf"asked for {pool.page_bytes:,} bytes \(1 pages of dense\), but only 64 "
        ):
            pool.allocate(1)
        assert pool.capacity == capacity
    with pytest.raises(OutOfMemory, match=r"2 pages of dense, 1 pages of dense"):
        arena.require({small: 2, large: 1})
    arena.ceiling = None
    small.allocate(1)
    assert arena.affordable(small) > 2**30


def test_growth_stays_under_the_ceiling() -> None:
    arena = Arena(CPU, 4, ceiling=136 * 10)
    pool = arena.pool(Dense(8, torch.float32))
    for _ in range(10):
        pool.allocate(1)
    assert pool.capacity == 10
    assert arena.reserved_bytes == arena.ceiling


def test_formats_alike_share_a_pool_and_others_do_not() -> None:
    arena = Arena(CPU, 4)
    assert arena.pool(Dense(8, torch.float32)) is arena.pool(Dense(8, torch.float32))
    others = [Dense(16, torch.float32), Dense(8, torch.float16), *FORMATS]
    others += [Int(2, "token", 4, 8, torch.float16), Int(4, "channel", 4, 8, torch.float16)]
    assert len({id(arena.pool(fmt)) for fmt in others}) == len(others)


def test_pages_hold_whole_units() -> None:
    assert make_pool(Int(2, "channel", 32, 8, torch.float16), page_size=16).page_size == 32
    assert make_pool(Int(2, "channel", 12, 8, torch.float16), page_size=16).page_size == 24
    assert make_pool(Dense(8, torch.float16), page_size=16).page_size == 16


def test_the_peak_remembers_the_most() -> None:
    pool = make_pool()
    pages = pool.allocate(6)
    pool.release(pages)
    pool.allocate(2)
    assert pool.arena.peak_bytes == 6 * pool.page_bytes
    pool.arena.note_peak(transient=5 * pool.page_bytes)
    assert pool.arena.peak_bytes == 7 * pool.page_bytes


def test_an_arena_is_filled_in_proportion():
    arena = Arena(torch.device("cpu"), 4, ceiling=10_000)
    small, large = arena.pool(Dense(4, torch.float32)), arena.pool(Dense(16, torch.float32))
    small.allocate(6), large.allocate(3)
    arena.fill()
    assert 9_000 < arena.reserved_bytes <= 10_000
    assert small.capacity / large.capacity == pytest.approx(2, rel=0.1)
    before = [pool.tensors["x"].data_ptr() for pool in (small, large)]
    small.allocate(20), large.allocate(10)
    assert [pool.tensors["x"].data_ptr() for pool in (small, large)] == before, "nothing moved"
