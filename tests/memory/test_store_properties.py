"""Random driving of two stores in one arena against plain Python lists."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from kvarn.memory import Arena, Store
from kvarn.memory.segment import HEAD_OVERHEAD, TABLE_ENTRY
from store_model import (
    CPU,
    LAYOUTS,
    Contents,
    Entry,
    check_lengths,
    check_pages,
    check_settled,
    held_pages,
    layout,
    overwrite,
    vectors,
)

HEADS = 3
STEP = 2.1 / 255  # of int8 over values in [-1, 1], somewhat widened by encoding what was decoded

which_store = st.integers(0, 1)
seeds = st.integers(0, 2**31)
some_heads = st.one_of(
    st.tuples(st.integers(0, HEADS - 1), st.integers(1, HEADS)).map(lambda t: slice(t[0], max(t[0] + 1, t[1]))),
    st.lists(st.integers(0, HEADS - 1), min_size=1, max_size=HEADS, unique=True).map(torch.tensor),
)


def numbers(heads: slice | Tensor) -> list[int]:
    return torch.arange(HEADS)[heads].tolist()


class Driven(RuleBasedStateMachine):
    """``kind`` is the layout. Each rule changes a store and its model alike; ``touched``: the heads it may change."""

    kind = "dense"

    @initialize(
        page_size=st.sampled_from([1, 2, 4, 6]), counts=st.lists(st.integers(0, 25), min_size=HEADS, max_size=HEADS)
    )
    def begin(self, page_size: int, counts: list[int]) -> None:
        self.arena = Arena(CPU, page_size)
        self.stores = [Store(layout(self.kind, page_size), self.arena, HEADS) for _ in range(2)]
        self.model: list[list[list[Entry]]] = [[[] for _ in range(HEADS)] for _ in self.stores]
        self.dense = not any(side.settled for side in (self.stores[0].keys, self.stores[0].values))
        self.next_position = 0
        self.seen = [Contents.of(store) for store in self.stores]
        for which in range(2):  # something to work on
            self.append(which, slice(0, HEADS), [1 + (count + 7 * which) % 25 for count in counts], seed=which)
        self.touch([(which, head) for which in range(2) for head in range(HEADS)])

    def touch(self, heads: list[tuple[int, int]], *, reorders: bool = False) -> None:
        self.touched, self.reorders = set(heads), reorders
        for store, head in heads:
            for entry in self.model[store][head]:
                entry.encodings += 1

    def shortest(self, store: int, heads: slice | Tensor) -> int:
        return min(len(self.model[store][head]) for head in numbers(heads))

    # -- rules --------------------------------------------------------------------------------------------------

    @rule(
        which=which_store,
        heads=some_heads,
        counts=st.lists(st.integers(0, 20), min_size=HEADS, max_size=HEADS),
        seed=seeds,
    )
    def append(self, which: int, heads: slice | Tensor, counts: list[int], seed: int) -> None:
        ids = numbers(heads)
        counts = counts[: len(ids)]
        longest = max(*counts, 1)
        generator = torch.Generator().manual_seed(seed)
        keys, values = vectors(self.stores[which], len(ids), longest, generator=generator)
        position = torch.arange(self.next_position, self.next_position + longest, dtype=torch.int32)
        mass = torch.rand(len(ids), longest, generator=generator)
        columns = {"position": position.expand(len(ids), -1), "mass": mass}
        self.stores[which].append(heads, keys, values, columns, torch.tensor(counts))
        check_settled(self.stores[which], heads)
        for row, (head, count) in enumerate(zip(ids, counts, strict=True)):
            self.model[which][head] += [
                Entry(self.next_position + i, keys[row, i], values[row, i], float(mass[row, i])) for i in range(count)
            ]
        self.next_position += longest
        self.touch([(which, head) for head in ids])

    @rule(which=which_store, cut=st.integers(1, HEADS), settle=st.booleans(), seed=seeds)
    def token(self, which: int, cut: int, settle: bool, seed: int) -> None:
        store = self.stores[which]
        keys, values = vectors(store, HEADS, generator=torch.Generator().manual_seed(seed))
        position = torch.full((HEADS,), self.next_position, dtype=torch.int32)
        store.open_token({"position": position, "mass": torch.zeros(HEADS)})
        for heads in (slice(0, cut), slice(cut, HEADS)):
            if numbers(heads):
                store.put_token(heads, keys[heads], values[heads])
        for head in range(HEADS):
            self.model[which][head].append(Entry(self.next_position, keys[head], values[head]))
        if settle:
            store.settle(slice(0, HEADS))
        self.next_position += 1
        self.touch([(which, head) for head in range(HEADS)])

    @rule(which=which_store, heads=some_heads)
    def settle(self, which: int, heads: slice | Tensor) -> None:
        self.stores[which].settle(heads)
        check_settled(self.stores[which], heads)
        self.touch([(which, head) for head in numbers(heads)])

    @rule(
        which=which_store,
        heads=some_heads,
        share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
        seed=seeds,
        known=st.booleans(),
    )
    def keep(self, which: int, heads: slice | Tensor, share: float, seed: int, known: bool) -> None:
        store, ids = self.stores[which], numbers(heads)
        lengths = store.lengths[heads]
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(len(ids), int(lengths.max()), generator=generator) < share
        mask &= torch.arange(mask.shape[1]) < lengths[:, None]
        store.keep(heads, mask, mask.sum(1) if known else None)
        for row, head in enumerate(ids):
            self.model[which][head] = [e for e, stays in zip(self.model[which][head], mask[row], strict=False) if stays]
        self.touch([(which, head) for head in ids], reorders=not self.dense)

    @rule(which=which_store, heads=some_heads, count=st.integers(1, 5), seed=seeds)
    def drop(self, which: int, heads: slice | Tensor, count: int, seed: int) -> None:
        count = min(count, self.shortest(which, heads))
        if not count:
            return
        generator = torch.Generator().manual_seed(seed)
        lengths = self.stores[which].lengths[heads].tolist()
        victims = torch.stack([torch.randperm(n, generator=generator)[:count] for n in lengths])
        self.stores[which].drop(heads, victims)
        for row, head in enumerate(numbers(heads)):
            gone = set(victims[row].tolist())
            self.model[which][head] = [e for i, e in enumerate(self.model[which][head]) if i not in gone]
        self.touch([(which, head) for head in numbers(heads)], reorders=True)

    @precondition(lambda self: self.dense)
    @rule(which=which_store, heads=some_heads, counts=st.lists(st.integers(0, 12), min_size=HEADS, max_size=HEADS))
    def pop_front(self, which: int, heads: slice | Tensor, counts: list[int]) -> None:
        ids = numbers(heads)
        counts = [min(n, len(self.model[which][head])) for n, head in zip(counts, ids, strict=False)]
        self.stores[which].pop_front(heads, torch.tensor(counts))
        for head, count in zip(ids, counts, strict=True):
            del self.model[which][head][:count]
        self.touch([(which, head) for head in ids])

    @rule(which=which_store, heads=some_heads, seed=seeds)
    def set_columns(self, which: int, heads: slice | Tensor, seed: int) -> None:
        store, ids = self.stores[which], numbers(heads)
        lengths = store.lengths[heads]
        mass = torch.rand(len(ids), int(lengths.max()), generator=torch.Generator().manual_seed(seed))
        store.set_columns(heads, {"mass": mass})
        for row, head in enumerate(ids):
            for entry, new in zip(self.model[which][head], mass[row].tolist(), strict=False):
                entry.mass = new
        self.touch([(which, head) for head in ids])

    @rule(which=which_store, heads=some_heads, count=st.integers(1, 3), seed=seeds)
    def overwrite(self, which: int, heads: slice | Tensor, count: int, seed: int) -> None:
        count = min(count, self.shortest(which, heads))
        if not count:
            return
        store, ids = self.stores[which], numbers(heads)
        generator = torch.Generator().manual_seed(seed)
        index = torch.stack([torch.randperm(len(self.model[which][head]), generator=generator)[:count] for head in ids])
        keys, values = vectors(store, len(ids), count, generator=generator)
        overwrite(store, heads, index, keys, values)
        self.touch([(which, head) for head in ids])
        for row, head in enumerate(ids):
            for column, place in enumerate(index[row].tolist()):
                old = self.model[which][head][place]
                self.model[which][head][place] = Entry(old.position, keys[row, column], values[row, column], old.mass)

    @rule(which=which_store, heads=some_heads, seed=seeds)
    def share(self, which: int, heads: slice | Tensor, seed: int) -> None:
        """With the other store, as a fork does; a head may be shared many times."""
        ids = numbers(heads)
        source = torch.randint(HEADS, (len(ids),), generator=torch.Generator().manual_seed(seed))
        self.stores[which].free(heads)
        self.stores[which].share(heads, self.stores[1 - which], source)
        for head, other in zip(ids, source.tolist(), strict=True):
            self.model[which][head] = [entry.copy() for entry in self.model[1 - which][other]]
        self.touch([(which, head) for head in ids])

    @rule(which=which_store, heads=some_heads)
    def free(self, which: int, heads: slice | Tensor) -> None:
        self.stores[which].free(heads)
        for head in numbers(heads):
            self.model[which][head] = []
        self.touch([(which, head) for head in numbers(heads)])

    # -- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def mirrors_follow(self) -> None:
        for segment in (segment for store in self.stores for segment in store.segments):
            mirror = segment.mirror()
            assert mirror.spans.T.tolist() == [segment.starts.tolist(), segment.lengths.tolist()]
            held = torch.arange(segment.table.shape[1]) < segment._held(slice(None))[:, None]
            assert torch.equal(mirror.table[:, : held.shape[1]][held], segment.table[held])

    @invariant()
    def pages_have_owners(self) -> None:
        check_pages(self.arena, self.stores)

    @invariant()
    def bytes_are_within_the_most(self) -> None:
        for store in self.stores:
            if self.dense or any(side.layout.ripe(side.tail.lengths).any() for side in (store.keys, store.values)):
                continue
            held = torch.zeros(HEADS, dtype=torch.int64)
            for segment in store.segments:
                pages = torch.tensor(list(map(len, held_pages(segment))))
                held += pages * (segment.pool.page_bytes + TABLE_ENTRY) + HEAD_OVERHEAD
            assert bool((held <= store.layout.most_bytes(store.lengths)).all())

    @invariant()
    def contents_are_the_models(self) -> None:
        now = [Contents.of(store) for store in self.stores]
        for which, (store, contents) in enumerate(zip(self.stores, now, strict=True)):
            check_lengths(store)
            assert store.lengths.tolist() == [len(head) for head in self.model[which]]
            for head in range(HEADS):
                if (which, head) in self.touched:
                    self.check_head(which, head, contents)
                else:
                    assert contents.same_head(self.seen[which], head), "a head changed that was not asked to"
        self.seen = now

    def check_head(self, which: int, head: int, contents: Contents) -> None:
        entries, store = self.model[which][head], self.stores[which]
        if self.reorders:
            order = {position: place for place, position in enumerate(contents.positions[head])}
            entries.sort(key=lambda entry: order.get(entry.position, -1))
        assert contents.positions[head] == [entry.position for entry in entries]
        if not entries:
            return
        torch.testing.assert_close(torch.tensor(contents.masses[head]), torch.tensor([e.mass for e in entries]))
        encodings = torch.tensor([entry.encodings for entry in entries])[:, None]
        for side, found, given in (
            (store.keys, contents.keys[head], torch.stack([e.key for e in entries])),
            (store.values, contents.values[head], torch.stack([e.value for e in entries])),
        ):
            if side.settled is None:
                assert torch.equal(found, given)
            else:
                assert bool(((found - given).abs() <= encodings * STEP / 2).all())

    def teardown(self) -> None:
        if not hasattr(self, "stores"):
            return
        for store in self.stores:
            store.free(slice(0, HEADS))
            assert not store.lengths.any()
        check_pages(self.arena, self.stores)
        assert self.arena.bytes == 0
        assert all(pool.used == 0 for pool in self.arena.pools.values())


@pytest.mark.no_cover
@pytest.mark.parametrize("kind", LAYOUTS)
def test_stores_hold_what_the_model_holds(kind: str) -> None:
    machine = type("Machine", (Driven,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=16))
