"""The bookkeeping of a segment as kernels read it. What it holds is checked in ``test_store_properties``."""

import pytest
import torch

from store_model import fill, make_store


def addresses(store):
    mirrors = [segment.mirror() for segment in store.segments]
    return [(mirror.table.data_ptr(), mirror.spans.data_ptr()) for mirror in mirrors]


def test_addresses_stay_until_the_table_widens():
    store = make_store("dense")
    fill(store, slice(0, 3), [60, 5, 9])
    before = addresses(store)
    moves = [segment.mirror().moves for segment in store.segments]
    assert moves == [1, 1, 1]
    for _ in range(4):
        store.open_token({"position": torch.zeros(3, dtype=torch.int32), "mass": torch.zeros(3)})
    store.drop(slice(0, 3), torch.tensor([[0], [1], [2]]))
    assert addresses(store) == before
    fill(store, slice(1, 2), [200])
    assert [segment.mirror().moves for segment in store.segments] == [2, 2, 2]


def test_a_new_page_is_sent_alone(monkeypatch: pytest.MonkeyPatch):
    store = make_store("dense")
    fill(store, slice(0, 3), [60, 48, 9])
    mirror = store.keys.tail.mirror()
    monkeypatch.setattr(mirror, "_copy", None)  # the whole table
    store.open_token({"position": torch.zeros(3, dtype=torch.int32), "mass": torch.zeros(3)})
    assert store.keys.tail.mirror() is mirror
    assert int(mirror.table[1, 12]) == int(store.keys.tail.table[1, 12])


def test_it_costs_nothing_until_it_is_asked_for():
    store = make_store("dense")
    fill(store, slice(0, 3), [60, 5, 9])
    assert store.keys.tail._mirror is None
    reserved = store.keys.tail.reserved_bookkeeping_bytes
    mirror = store.keys.tail.mirror()
    assert store.keys.tail.reserved_bookkeeping_bytes == reserved + mirror.nbytes
