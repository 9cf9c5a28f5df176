"""Entries of two precisions that move from one store to the other."""

import pytest
import torch

from kvarn.errors import OutOfMemory
from kvarn.formats import Columns, Dense, Int
from kvarn.memory import Arena, SideLayout, StoreLayout, TieredLayout, TieredStore

HEADS, SIZE, PAGE = 2, 16, 4
ROWS = torch.randn(HEADS, 10, SIZE, generator=torch.Generator().manual_seed(0))
POSITIONS = {"position": torch.arange(10, dtype=torch.int32).expand(HEADS, -1)}
CHOSEN = torch.arange(10).expand(HEADS, -1) % 3 == 0


def filled(fresh: bool) -> TieredStore:
    dense = Dense(SIZE, torch.float32)
    exact, coded = SideLayout(dense, dense), SideLayout(Int(4, "token", SIZE, SIZE, torch.float32), dense)
    tiers = [StoreLayout(side, side, Columns({"position": torch.int32}), PAGE) for side in (exact, coded, exact)]
    layout = TieredLayout(tiers[0], tiers[1], 0.5, fresh=tiers[2] if fresh else None, most_fresh=3)
    store = TieredStore(layout, Arena(torch.device("cpu"), PAGE), 2 * HEADS)
    store.append(slice(0, HEADS), ROWS, ROWS, POSITIONS, torch.tensor([10, 7]))
    return store


def held(store: TieredStore) -> list[list[list[int]]]:
    heads = slice(0, HEADS)
    columns = [(each, each.read_column(heads, "position")) for each in store.stores]
    return [[row[:n].tolist() for row, n in zip(c, s.lengths[heads].tolist(), strict=True)] for s, c in columns]


@pytest.mark.parametrize("fresh", [False, True])
def test_what_moves_is_what_was_chosen_and_reads_at_its_place(fresh):
    store = filled(fresh)
    if fresh:
        store.open_token({"position": torch.full((HEADS,), 50, dtype=torch.int32)}, slice(0, HEADS))
        assert held(store) == [[[], []], [list(range(10)), list(range(7))], [[50], [50]]]
        chosen = torch.cat([CHOSEN, torch.tensor([[False], [False]])], 1)
        chosen[1, 7] = True  # the fresh one of the shorter head
    store.demote(slice(0, HEADS), chosen if fresh else CHOSEN)
    low, high = [[0, 3, 6, 9], [0, 3, 6]], [[1, 2, 4, 5, 7, 8], [1, 2, 4, 5]]
    if fresh:
        low, high = [low[0], [*low[1], 50]], [[*high[0], 50], high[1]]
    found = held(store)
    assert [[sorted(row) for row in tier] for tier in found[:2]] == [low, high]
    index = torch.tensor([[9, 0, 4], [6, 2, 5]])
    keys, columns = store.read(slice(0, HEADS), index)[0], store.read_column(slice(0, HEADS), "position", index)
    whole = store.read(slice(0, HEADS))[0].gather(1, index[..., None].expand(-1, -1, SIZE))
    assert torch.equal(keys, whole)
    order = [a + b for a, b in zip(*found[:2], strict=True)]
    assert columns.tolist() == [[row[i] for i in at] for row, at in zip(order, index.tolist(), strict=True)]


def test_a_move_that_does_not_fit_changes_nothing():
    store, own, twin = filled(False), slice(0, HEADS), slice(HEADS, 2 * HEADS)
    store.share(twin, store, torch.arange(HEADS))
    before, pages = held(store), store.arena.bytes
    store.demote(own, CHOSEN)
    grown = store.arena.bytes - pages
    store = filled(False)
    store.share(twin, store, torch.arange(HEADS))
    store.arena.ceiling = store.arena.bytes + grown // 2  # room for the codes, none for copies of shared pages
    with pytest.raises(OutOfMemory):
        store.demote(own, CHOSEN)
    assert held(store) == before
