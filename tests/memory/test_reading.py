"""Reading by index, and settled tokens in the host's memory."""

from dataclasses import replace

import pytest
import torch

from kvarn.formats import Columns, Dense, Int
from kvarn.memory import Arena, Beside, HostPool, Store, StoreLayout
from store_model import COLUMNS, CPU, LAYOUTS, channel_side, dense_side, fill, layout, token_side, vectors

ALL = slice(0, 3)
INDEX = torch.tensor([[0, 12, 5, 5], [3, 6, 1, 0], [0, 1, 0, 2]])
COUNTS = [13, 7, 3]


def on_host(kind: str) -> StoreLayout:
    plain = layout(kind)
    keys, values = (replace(side, tier="host", hold=side.hold + 2) for side in (plain.keys, plain.values))
    return replace(plain, keys=keys, values=values)


def filled(store_layout: StoreLayout, counts=COUNTS) -> Store:
    torch.manual_seed(4)
    store = Store(store_layout, Arena(CPU, 4), 3)
    fill(store, ALL, counts)
    return store


@pytest.mark.parametrize("where", [layout, on_host])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_entries_of_an_index_are_those_of_reading_everything(kind, where):
    store = filled(where(kind))
    rows = torch.arange(3)[:, None]
    for heads, index in ((ALL, INDEX), (torch.tensor([2, 0]), INDEX[[2, 0]])):
        whole = store.read(heads)
        for ours, everything in zip(store.read(heads, index), whole, strict=True):
            assert torch.equal(ours, everything[rows[: index.shape[0]], index])
        assert torch.equal(store.read_column(heads, "position", index).long(), index)
    beyond = store.read(ALL, INDEX + torch.tensor([[0], [0], [50]]))
    assert torch.equal(beyond[0][2], store.read(ALL)[0][2, [2] * 4])


@pytest.mark.parametrize(("axis", "decoded"), [("channel", 12), ("token", 4)])
def test_only_what_is_asked_for_is_decoded(axis, decoded, monkeypatch):
    sides = {"channel": channel_side(8, 4, block=4), "token": token_side(8, 8, hold=0)}
    store = Store(StoreLayout(sides[axis], sides[axis], None, 16), Arena(CPU, 16), 1)
    fill(store, slice(0, 1), [400])
    tokens = []
    decode = Int.decode
    monkeypatch.setattr(Int, "decode", lambda self, rows: tokens.append((x := decode(self, rows)).shape[1]) or x)
    store.read(slice(0, 1), torch.tensor([[3, 200, 201, 399]]))  # of units 0, 50 and 99, where tokens share scales
    assert tokens == [decoded, decoded]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_host_holds_what_the_device_would(kind):
    on_device = on_host(kind)
    keys, values = (replace(side, tier="device") for side in (on_device.keys, on_device.values))
    away, here = filled(on_device), filled(replace(on_device, keys=keys, values=values))
    for step in range(9):
        for store in (away, here):
            torch.manual_seed(step)
            store.open_token({"position": torch.full((3,), 13 + step, dtype=torch.int32), "mass": torch.zeros(3)})
            keys, values = vectors(store, 3)
            store.put_token(ALL, keys, values)
            store.settle(ALL)
    kept = torch.rand(3, 22) < 0.6
    for store in (away, here):
        store.keep(ALL, kept & (torch.arange(22) < store.lengths[:, None]))
    held = torch.arange(int(away.lengths.max())) < away.lengths[:, None]
    for ours, theirs in zip(away.read(ALL), here.read(ALL), strict=True):
        assert torch.equal(ours[held], theirs[held])
    assert {type(s.pool) for s in (away.keys.settled, away.values.settled) if s} == {HostPool}
    if kind.startswith("kivi"):  # dense sides have no settled segment on the device
        assert away.arena.bytes + away.arena.host_bytes == here.arena.bytes
    away.free(ALL)
    assert away.arena.bytes == away.arena.host_bytes == 0


def test_bytes_of_the_device_are_those_of_the_tail_and_the_tables():
    store = filled(on_host("dense"), [13, 13, 13])
    pages = sum(s.page_bytes for s in (store.keys.tail, store.values.tail, store.columns))
    assert store.arena.bytes == pages
    assert store.arena.host_bytes == sum(s.page_bytes for s in (store.keys.settled, store.values.settled))
    assert store.arena.bytes + store.bookkeeping_bytes == 3 * int(store.layout.bytes(torch.tensor(13)))
    assert store.arena.host_bytes == 3 * 2 * 3 * (4 * 8 * 4 + 8)  # 11 tokens a head and side: 3 pages


def test_a_ceiling_is_about_the_device():
    store = Store(on_host("dense"), Arena(CPU, 4, ceiling=3 * 9_000), 3)
    fill(store, ALL, [800] * 3)  # columns take 8,000 bytes a head
    assert store.arena.host_bytes > 5 * store.arena.ceiling
    assert store.arena.bytes <= store.arena.ceiling


def test_forks_share_pages_on_the_host():
    store = filled(on_host("kivi"))
    held = store.arena.host_bytes
    twin = Store(store.layout, store.arena, 3)
    twin.share(ALL, store, ALL)
    assert store.arena.host_bytes == held > 0
    twin.keep(ALL, torch.arange(13)[None].expand(3, -1) < torch.tensor([[6], [7], [2]]))
    assert torch.equal(store.read(ALL)[0], filled(on_host("kivi")).read(ALL)[0])
    store.free(ALL)
    twin.free(ALL)
    assert store.arena.host_bytes == 0


def test_rows_beside_entries_are_shared_freed_and_counted():
    beside = {"means": Beside(Dense(8, torch.float32), lambda tokens: (tokens + 3) // 4)}
    plain = StoreLayout(dense_side(8), dense_side(8), Columns(COLUMNS), 4)
    store = Store(replace(plain, beside=beside), Arena(CPU, 4), 3)
    fill(store, ALL, [16, 16, 16])
    means = torch.rand(3, 4, 8)
    store.beside["means"].append(ALL, {"x": means}, torch.tensor([4, 4, 4]))
    assert store.arena.bytes + store.bookkeeping_bytes == 3 * int(store.layout.bytes(torch.tensor(16)))
    twin = Store(store.layout, store.arena, 3)
    twin.share(ALL, store, ALL)
    store.drop(ALL, torch.tensor([[0, 1]] * 3))
    assert torch.equal(twin.beside["means"].decode(ALL), means)
    assert torch.equal(store.beside["means"].decode(ALL), means)
    store.free(ALL)
    twin.free(ALL)
    assert store.arena.bytes == 0


@pytest.mark.gpu
def test_pinned_memory_gives_back_what_was_written():
    device = torch.device("cuda")
    store, cpu = Store(on_host("kivi"), Arena(device, 4), 3), filled(on_host("kivi"))
    torch.manual_seed(4)
    keys, values = vectors(store, 3, 13)
    columns = {"position": torch.arange(13, dtype=torch.int32).expand(3, -1), "mass": torch.zeros(3, 13)}
    store.append(
        ALL,
        *(x.to(device) for x in (keys, values)),
        {n: c.to(device) for n, c in columns.items()},
        torch.tensor(COUNTS),
    )
    assert all(t.is_pinned() for t in store.keys.settled.pool.tensors.values())
    for ours, theirs in zip(store.read(ALL, INDEX.to(device)), cpu.read(ALL, INDEX), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=1e-2)
