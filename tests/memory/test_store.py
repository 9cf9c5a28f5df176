"""What a store promises of single operations: exact copies, exact bytes, all or nothing, copy on write."""

from collections.abc import Callable, Iterator
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.errors import CacheMismatch, OutOfMemory
from kvarn.formats import Columns
from kvarn.memory import Arena, SideLayout, Store, StoreLayout
from store_model import (
    COLUMNS,
    CPU,
    LAYOUTS,
    Contents,
    channel_side,
    check_lengths,
    check_pages,
    check_settled,
    dense_side,
    differences,
    fill,
    layout,
    make_store,
    overwrite,
    page_nbytes,
    snapshot,
    token_side,
    vectors,
)

ALL = slice(0, 3)


# -- bytes --------------------------------------------------------------------------------------------------------


def held_bytes(store: Store) -> int:
    """Pages in use and bookkeeping, as torch has them."""
    tables = sum(s.table.nbytes + s.starts.nbytes + s.lengths.nbytes for s in store.segments)
    return tables + sum(pool.used * page_nbytes(pool) for pool in store.arena.pools.values())


sides = st.one_of(
    st.builds(dense_side, st.sampled_from([8, 24])),
    st.builds(
        lambda size, group, blocks, bits: channel_side(size, group, group * blocks, bits),
        st.sampled_from([8, 24]),
        st.sampled_from([1, 4, 12]),
        st.integers(1, 3),
        st.sampled_from([2, 3, 4, 8]),
    ),
    st.builds(
        lambda size, group, hold, bits: token_side(size, group, hold, bits),
        st.sampled_from([8, 24]),
        st.sampled_from([2, 8]),
        st.integers(0, 9),
        st.sampled_from([2, 3, 4, 8]),
    ),
)


@settings(max_examples=60)
@given(sides, sides, st.booleans(), st.integers(1, 17), st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_layout_bytes_are_what_a_fresh_store_holds(
    keys: SideLayout, values: SideLayout, columns: bool, page_size: int, counts: list[int]
) -> None:
    described = StoreLayout(keys, values, Columns(COLUMNS) if columns else None, page_size)
    for count, expected in zip(counts, described.bytes(torch.tensor(counts)).tolist(), strict=True):
        store = Store(described, Arena(CPU, page_size), 2)
        fill(store, slice(0, 2), [count, count])
        assert held_bytes(store) == 2 * expected
        assert store.arena.bytes + store.bookkeeping_bytes == 2 * expected
        assert sum(s.page_bytes + s.bookkeeping_bytes for s in store.segments) == 2 * expected
        check_pages(store.arena, [store])


def test_layout_bytes_takes_any_shape() -> None:
    described = layout("kivi")
    tokens = torch.arange(12).view(3, 4)
    assert described.bytes(tokens).shape == (3, 4)
    assert torch.equal(described.bytes(tokens).flatten(), described.bytes(tokens.flatten()))


def test_settled_bytes_by_hand() -> None:
    """40 tokens of KIVI's layout: 5 key blocks settled, 32 values settled and 8 dense, in pages of 4."""
    side_keys, side_values = channel_side(8, 4, 8, bits=2), token_side(8, 8, 8, bits=2)
    store = Store(StoreLayout(side_keys, side_values, None, 4), Arena(CPU, 4), 1)
    fill(store, slice(0, 1), [40])
    key_page = 4 * 8 * 2 // 8 + 2 * 8 * 4  # 4 tokens of 8 codes of 2 bits; a scale and a minimum a channel
    value_page = 4 * (8 * 2 // 8 + 2 * 4)
    dense_page = 4 * 8 * 4
    pages = 10 * (key_page + 8) + 8 * (value_page + 8) + 2 * (dense_page + 8)
    tables = 4 * (10 + 8 + 2) + 4 * 16
    assert store.arena.bytes == pages
    assert store.arena.bytes + store.bookkeeping_bytes == pages + tables == int(store.layout.bytes(torch.tensor(40)))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_shared_pages_count_once(kind: str) -> None:
    store = make_store(kind, heads=4)
    fill(store, slice(0, 2), [21, 13])
    before = store.arena.bytes
    store.share(slice(2, 4), store, slice(0, 2))
    assert store.arena.bytes == before == sum(s.page_bytes for s in store.segments)
    store.free(slice(0, 2))
    assert store.arena.bytes == before
    store.free(slice(2, 4))
    assert store.arena.bytes == 0


# -- contents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_one_append_or_many_or_token_by_token(kind: str) -> None:
    """However tokens come, the same ones settle in the same units, so what is read is bit for bit the same."""
    counts, longest = torch.tensor([37, 5, 20]), 37
    stores = [make_store(kind) for _ in range(3)]
    keys, values = vectors(stores[0], 3, longest)
    position = torch.arange(longest, dtype=torch.int32).expand(3, -1)
    mass = torch.rand(3, longest)

    def append(store: Store, first: int, last: int) -> None:
        columns = {"position": position[:, first:last], "mass": mass[:, first:last]}
        now = (counts - first).clamp(0, last - first)
        store.append(ALL, keys[:, first:last], values[:, first:last], columns, now)

    append(stores[0], 0, longest)
    for first, last in ((0, 3), (3, 4), (4, 17), (17, 30), (30, longest)):
        append(stores[1], first, last)
    for head, count in enumerate(counts.tolist()):
        for i in range(count):
            one = slice(head, head + 1)
            columns = {"position": position[one, i : i + 1], "mass": mass[one, i : i + 1]}
            stores[2].append(one, keys[one, i : i + 1], values[one, i : i + 1], columns, torch.tensor([1]))
    contents = [Contents.of(store) for store in stores]
    for head in range(3):
        assert contents[0].same_head(contents[1], head)
        assert contents[0].same_head(contents[2], head)
    for store in stores:
        check_lengths(store)
        check_settled(store, ALL)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_decoding_equals_appending(kind: str) -> None:
    decoded, appended = make_store(kind), make_store(kind)
    keys, values = vectors(decoded, 30, 3)
    position, mass = torch.arange(30, dtype=torch.int32)[:, None].expand(-1, 3), torch.rand(30, 3)
    for i in range(30):
        decoded.open_token({"position": position[i], "mass": mass[i]})
        for heads in (slice(0, 1), slice(1, 3)):
            decoded.put_token(heads, keys[i, heads], values[i, heads])
        decoded.settle(ALL)
        check_settled(decoded, ALL)
    columns = {"position": position.T, "mass": mass.T}
    appended.append(ALL, keys.transpose(0, 1), values.transpose(0, 1), columns, torch.full((3,), 30))
    one, other = Contents.of(decoded), Contents.of(appended)
    assert all(one.same_head(other, head) for head in range(3))


@pytest.mark.parametrize(("tokens", "residual"), [(0, 8), (7, 8), (8, 8), (9, 8), (40, 8), (41, 8)])
def test_what_settles_as_kivi_says(tokens: int, residual: int) -> None:
    """Keys settle in blocks of ``residual``, so T mod residual stay exact; of the values the newest ``residual``."""
    store = make_store("kivi", heads=1)
    keys, values = fill(store, slice(0, 1), [tokens])
    assert store.keys.settled is not None
    assert store.values.settled is not None
    assert int(store.keys.tail.lengths[0]) == tokens % residual
    assert int(store.values.tail.lengths[0]) == min(tokens, residual)
    contents = Contents.of(store)
    exact_keys, exact_values = tokens - tokens % residual, max(tokens - residual, 0)
    assert torch.equal(contents.keys[0][exact_keys:], keys[0, exact_keys:tokens])
    assert torch.equal(contents.values[0][exact_values:], values[0, exact_values:tokens])
    if tokens < residual:
        assert torch.equal(contents.keys[0], keys[0, :tokens])


@settings(max_examples=30)
@given(
    st.sampled_from(["kivi", "kivi uneven", "keys only"]),
    st.lists(st.integers(0, 50), min_size=3, max_size=3),
    st.sampled_from([0.5, 0.9, 0.97]),
    st.integers(0, 2**31),
)
def test_units_that_stay_whole_are_moved_bit_by_bit(kind: str, counts: list[int], share: float, seed: int) -> None:
    # In bf16 encoding anew what was decoded would give other codes and scales.
    store = Store(layout(kind, dtype=torch.bfloat16), Arena(CPU, 4), 3)
    fill(store, ALL, counts)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, max(counts), generator=generator) < share
    mask &= torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    old = {name: store_side.settled for name, store_side in (("keys", store.keys), ("values", store.values))}
    bound = torch.stack([s.lengths for s in old.values() if s]).amin(0)
    rows = {name: s.read(ALL) for name, s in old.items() if s}
    whole_unit = max(s.unit for s in old.values() if s)
    units = {
        head: [
            first
            for first in range(0, int(bound[head]) - whole_unit + 1, whole_unit)
            if bool(mask[head, first : first + whole_unit].all())
        ]
        for head in range(3)
    }
    store.keep(ALL, mask)
    positions = store.read_column(ALL, "position")
    for name, side in (("keys", store.keys), ("values", store.values)):
        if side.settled is None:
            continue
        new = side.settled.read(ALL)
        for head, firsts in units.items():
            for first in firsts:
                place = positions[head].tolist().index(first)
                assert positions[head, place : place + whole_unit].tolist() == list(range(first, first + whole_unit))
                for i in range(whole_unit // side.settled.unit):
                    now, then = place // side.settled.unit + i, first // side.settled.unit + i
                    for tensor in new:
                        assert torch.equal(new[tensor][head, now], rows[name][tensor][head, then])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_keep_nothing_and_keep_everything(kind: str) -> None:
    store = make_store(kind)
    fill(store, ALL, [25, 3, 0])
    before = snapshot(store)
    everything = torch.arange(25) < torch.tensor([25, 3, 0])[:, None]
    store.keep(ALL, everything)
    assert not differences(before, snapshot(store))
    store.keep(ALL, torch.zeros(3, 25, dtype=torch.bool))
    assert not store.lengths.any()
    assert store.arena.bytes == 0
    fill(store, ALL, [2, 30, 9])
    assert store.lengths.tolist() == [2, 30, 9]


@pytest.mark.parametrize("kind", ["dense", "uneven"])
@pytest.mark.parametrize("shrink", ["keep", "drop", "pop_front"])
def test_a_page_is_freed_when_its_last_entry_goes(kind: str, shrink: str) -> None:
    store = make_store(kind, heads=1, page_size=4)
    one = slice(0, 1)
    fill(store, one, [12])
    per_page = store.arena.bytes // 3
    for left in range(11, -1, -1):
        if shrink == "keep":
            store.keep(one, torch.arange(left + 1)[None] < left)
        elif shrink == "drop":
            store.drop(one, torch.tensor([[left // 2]]))
        else:
            store.pop_front(one, torch.tensor([1]))
        assert int(store.lengths[0]) == left
        # Popping leaves a hole at the front of the first page.
        first = 12 - left if shrink == "pop_front" else 0
        pages = len({i // 4 for i in range(first, first + left)})
        assert store.arena.bytes == pages * per_page
        check_pages(store.arena, [store])


def test_a_head_dropped_empty_after_popping_holds_no_page() -> None:
    store = make_store("dense", heads=1, page_size=4)
    fill(store, slice(0, 1), [5])
    store.pop_front(slice(0, 1), torch.tensor([3]))
    store.drop(slice(0, 1), torch.tensor([[0, 1]]))
    assert store.lengths.tolist() == [0]
    assert store.arena.bytes == 0


@pytest.mark.parametrize("popped", [0, 2])
def test_dropping_any_entries(popped: int) -> None:
    """Every set of victims of seven entries, in any order; those of a row are dropped together."""
    for count in range(1, 8):
        victims = torch.tensor(list(permutations(range(7), count))[::13])
        heads = slice(0, victims.shape[0])
        store = make_store("dense", heads=victims.shape[0])
        keys, _ = fill(store, heads, [7 + popped] * victims.shape[0])
        store.pop_front(heads, torch.full((victims.shape[0],), popped))
        store.drop(heads, victims)
        contents = Contents.of(store)
        for head, gone in enumerate(victims.tolist()):
            left = sorted(set(range(7)) - set(gone))
            assert sorted(contents.positions[head]) == [place + popped for place in left]
            assert torch.equal(contents.keys[head], keys[head, torch.tensor(contents.positions[head]).long()])


@pytest.mark.parametrize("kind", ["dense", "kivi"])
def test_heads_may_lose_different_numbers(kind: str) -> None:
    store = make_store(kind)
    fill(store, ALL, [17, 9, 11])
    victims = torch.tensor([[3, 0, 16], [8, 1, 2], [10, 10, 0]])
    store.drop(ALL, victims, torch.tensor([3, 0, 1]))
    left = [[place for place in range(17) if place not in (3, 0, 16)], list(range(9)), list(range(10))]
    assert [sorted(positions) for positions in Contents.of(store).positions] == left


def test_heads_that_start_elsewhere_are_read_and_set() -> None:
    store = make_store("dense")
    keys, values = fill(store, ALL, [17, 9, 11])
    popped = [6, 3, 11]
    store.pop_front(ALL, torch.tensor(popped))
    mass = torch.rand(3, 11)
    store.set_columns(ALL, {"mass": mass})
    contents = Contents.of(store)
    for head, (first, last) in enumerate(zip(popped, [17, 9, 11], strict=True)):
        assert torch.equal(contents.keys[head], keys[head, first:last])
        assert torch.equal(contents.values[head], values[head, first:last])
        assert contents.positions[head] == list(range(first, last))
        assert contents.masses[head] == mass[head, : last - first].tolist()


def test_columns_are_optional() -> None:
    store = Store(layout("kivi", columns=False), Arena(CPU, 4), 2)
    fill(store, slice(0, 2), [11, 20])
    store.open_token({})
    keys, values = vectors(store, 2)
    store.put_token(slice(0, 2), keys, values)
    store.settle(slice(0, 2))
    assert store.lengths.tolist() == [12, 21]
    assert len(list(store.segments)) == 4


# -- sharing ------------------------------------------------------------------------------------------------------


def writes(store: Store) -> dict[str, Callable[[], None]]:
    """Everything that changes head 0, each as it would be called."""
    one = slice(0, 1)
    length = int(store.lengths[0])
    keys, values = vectors(store, 1, 2)
    some = torch.arange(length)[None] % 3 > 0

    def append() -> None:
        fill(store, one, [9], first=100)

    def open_token() -> None:
        store.open_token({"position": torch.full((3,), 99).int(), "mass": torch.ones(3)})

    def token() -> None:
        open_token()
        store.put_token(ALL, *vectors(store, 3))
        store.settle(ALL)

    operations: dict[str, Callable[[], None]] = {
        "append": append,
        "token": token,
        "open_token": open_token,
        "settle": lambda: store.settle(ALL),
        "keep": lambda: store.keep(one, some),
        "drop": lambda: store.drop(one, torch.tensor([[1, 4]])),
        "set_columns": lambda: store.set_columns(one, {"mass": torch.ones(1, length)}),
        "overwrite": lambda: overwrite(store, one, torch.tensor([[0, 3]]), keys, values),
        "free": lambda: store.free(one),
    }
    if not (store.keys.settled or store.values.settled):
        operations["pop_front"] = lambda: store.pop_front(one, torch.tensor([3]))
    return operations


OPERATIONS = ["append", "token", "keep", "drop", "set_columns", "overwrite", "free"]
WRITES = [(kind, operation) for kind in LAYOUTS for operation in OPERATIONS]
WRITES += [("dense", "pop_front"), ("uneven", "pop_front")]  # only dense stores pop


@pytest.mark.parametrize(("kind", "operation"), WRITES)
@pytest.mark.parametrize("writer", [0, 1])
def test_writing_one_side_never_changes_the_other(kind: str, operation: str, writer: int) -> None:
    original = make_store(kind)
    fill(original, ALL, [22, 9, 14])
    fork = Store(original.layout, original.arena, 3)
    fork.share(ALL, original, ALL)
    pair = [original, fork]
    before = Contents.of(pair[1 - writer])
    writes(pair[writer])[operation]()
    after = Contents.of(pair[1 - writer])
    assert all(before.same_head(after, head) for head in range(3))
    mine = Contents.of(pair[writer])
    assert not mine.same_head(before, 0), "the writer did write"
    check_pages(original.arena, pair)
    for store in pair:
        store.free(ALL)
    assert original.arena.bytes == 0


@pytest.mark.parametrize("kind", LAYOUTS)
def test_reading_and_freeing_a_fork_copies_nothing(kind: str) -> None:
    store = make_store(kind, heads=3)
    fill(store, ALL, [22, 9, 14])
    before = store.arena.bytes
    fork = Store(store.layout, store.arena, 3)
    fork.share(ALL, store, ALL)
    Contents.of(fork)
    assert store.arena.bytes == before == store.arena.peak_bytes
    fork.free(ALL)
    assert store.arena.bytes == before
    assert all(pool.shared == 0 for pool in store.arena.pools.values())


def test_only_the_open_page_is_copied_for_a_new_token() -> None:
    store = make_store("dense", heads=1, page_size=4)
    fill(store, slice(0, 1), [10])
    fork = Store(store.layout, store.arena, 1)
    fork.share(slice(0, 1), store, slice(0, 1))
    page = {pool: pool.used for pool in store.arena.pools.values()}
    fork.open_token({"position": torch.tensor([10]).int(), "mass": torch.ones(1)})
    copied = {pool: pool.used - page[pool] for pool in page}
    assert sorted(copied.values()) == [1, 2]  # columns one page; keys and values share a pool
    check_pages(store.arena, [store, fork])


def test_sharing_needs_empty_heads_of_the_same_pools() -> None:
    store = make_store("dense")
    fill(store, slice(0, 1), [5])
    with pytest.raises(CacheMismatch, match="free them first"):
        store.share(slice(0, 1), store, slice(1, 2))
    with pytest.raises(CacheMismatch, match="same arena"):
        make_store("dense").share(slice(0, 1), store, slice(0, 1))


# -- ceilings -----------------------------------------------------------------------------------------------------


def prepared(kind: str, shared: bool, unsettled: bool) -> tuple[Store, list[Store]]:
    """A store with content, and all stores of its arena; with ``shared`` its pages have second owners."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        store = make_store(kind)
        fill(store, ALL, [22, 9, 14])
        stores = [store]
        if shared:
            fork = Store(store.layout, store.arena, 3)
            fork.share(ALL, store, ALL)
            stores.append(fork)
        if unsettled:
            for side in (store.keys, store.values):
                x = torch.rand(3, 12, 8) * 2 - 1
                side.tail.append(ALL, side.tail.format.encode(x), torch.full((3,), 12))
            assert store.columns
            store.columns.append(
                ALL, {n: torch.zeros(3, 12, dtype=d) for n, d in COLUMNS.items()}, torch.full((3,), 12)
            )
    return store, stores


def outcome(act: Callable[[], None]) -> str | None:
    """The refusal, or None where it was done."""
    try:
        act()
    except OutOfMemory as error:
        return str(error)
    return None


def limited(kind: str, operation: str, shared: bool) -> None:
    """Runs ``operation`` under every ceiling from what is held to what it needs: it does all, or nothing."""
    store, stores = prepared(kind, shared, operation == "settle")
    held = store.arena.bytes
    assert held == store.arena.peak_bytes
    sizes = {page_nbytes(pool) for pool in store.arena.pools.values()}
    refused, ceiling = 0, held
    while True:
        store, stores = prepared(kind, shared, operation == "settle")
        assert store.arena.bytes == held
        act = writes(store)[operation]
        store.arena.ceiling = ceiling
        before = snapshot(store)
        refusal = outcome(act)
        check_pages(store.arena, stores)
        if refusal is None:
            break
        refused += 1
        changed = differences(before, snapshot(store))
        assert not changed, f"refused at {ceiling - held} bytes beyond what is held, yet changed {changed}"
        check_lengths(store)
        assert "asked for" in refusal
        assert f"only {ceiling - held:,} of the ceiling of {ceiling:,} bytes are left" in refusal
        ceiling += min(sizes)
    grown = store.arena.bytes - held
    assert refused or grown <= 0


def ceiling_cases() -> Iterator[tuple[str, str, bool]]:
    for kind in ("dense", "kivi"):
        for shared in (False, True):
            for operation in ["append", "open_token", "settle", "keep", "drop", "set_columns", "overwrite"]:
                if (kind, operation) == ("dense", "settle"):
                    continue
                yield kind, operation, shared


@pytest.mark.parametrize(("kind", "operation", "shared"), list(ceiling_cases()))
def test_over_the_ceiling_nothing_changes(kind: str, operation: str, shared: bool) -> None:
    limited(kind, operation, shared)


def test_the_error_names_what_was_asked_and_what_is_left() -> None:
    store = make_store("dense", ceiling=1000)
    with pytest.raises(
        OutOfMemory,
        match=r"asked for [\d,]+ bytes \(\d+ pages of dense(?:, \d+ pages of [\w/]+)*\), but only 1,000 of the",
    ):
        fill(store, ALL, [40, 40, 40])
    assert store.arena.bytes == 0


def test_settling_heads_whose_tails_start_elsewhere() -> None:
    """A short tail late in its first page beside a long one that fills the page table."""
    store = make_store("keys only", heads=2, page_size=6)
    for first, counts in ((0, [0, 3]), (10, [1, 3]), (20, [15, 0])):
        fill(store, slice(0, 2), counts, first)
    assert store.lengths.tolist() == [16, 6]
    check_settled(store, slice(0, 2))
