"""KVMerger against its algorithm in plain loops (arXiv 2407.08454, section 3)."""

import math

import pytest
import torch
from one_layer import KV_HEADS, Entry, NaiveHead, OneLayer, assert_same_rows, in_step, random_tokens, split
from real_text import divergences
from torch.nn.functional import cosine_similarity

from kvarn.errors import RecipeError
from kvarn.methods.kvmerger import KVMerger


class NaiveKVMerger(NaiveHead):
    def __init__(self, capacity: int, recent: int, heavy: int, sigma: float):
        super().__init__()
        self.capacity, self.recent, self.heavy, self.sigma = capacity, recent, heavy, sigma

    def reduce(self, seen: int) -> None:
        count = len(self.entries) - self.capacity
        if count <= 0:
            return
        others = [e for e in self.entries if e.position < seen - self.recent]
        heavy = [e.position for e in sorted(others, key=lambda e: -e.mass)[: self.heavy]]
        free = {e.position for e in others} - set(heavy)
        pairs = []
        for i, (a, b) in enumerate(zip(self.entries, self.entries[1:], strict=False)):
            both = a.position in free and b.position in free
            pairs.append((both, float(cosine_similarity(a.key, b.key, dim=0)), i))
        joins = {i for *_, i in sorted(pairs, reverse=True)[:count]}
        runs, run = [], []
        for i, entry in enumerate(self.entries):
            run.append(entry)
            if i not in joins:
                runs.append(run)
                run = []
        self.entries = [self.merged(run) for run in runs]

    def merged(self, run: list[Entry]) -> Entry:
        pivot = max(run, key=lambda e: e.mass)
        weights = [math.exp(-float((e.key - pivot.key).square().sum()) / (2 * self.sigma**2)) for e in run]
        key, value = (
            sum(w * getattr(e, side) for w, e in zip(weights, run, strict=True)) / sum(weights)
            for side in ("key", "value")
        )
        return Entry(pivot.position, key, value, pivot.mass)


def test_the_same_entries_as_in_plain_loops():
    capacity = 16
    layer = OneLayer("kvmerger(sigma=8.0)", capacity)
    naive = [NaiveKVMerger(capacity, int(0.34 * capacity), int(0.24 * capacity), 8.0) for _ in range(KV_HEADS)]
    for _ in in_step(layer, naive, random_tokens(44), prompt=30):
        assert_same_rows(layer, naive)


def test_a_narrow_gaussian_keeps_the_pivots_as_they_are():
    tokens = random_tokens(40)
    layer = OneLayer("kvmerger(sigma=0.1)", 16)
    layer.prompt(*tokens)
    keys, values = layer.keys_and_values()
    for head, positions in enumerate(layer._rows("position")):
        torch.testing.assert_close(keys[head], tokens[1][0, head, positions])
        torch.testing.assert_close(values[head], tokens[2][0, head, positions])


def test_room_for_everything_changes_nothing():
    tokens = random_tokens(30)
    layer, full = OneLayer("kvmerger", 30), OneLayer("full")
    assert torch.equal(layer.prompt(*split(tokens, 0, 20)), full.prompt(*split(tokens, 0, 20)))
    for position in range(20, 30):
        now = split(tokens, position, position + 1)
        torch.testing.assert_close(layer.token(*now), full.token(*now), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parameters", [{"kept": 0.0}, {"recent": 0.6, "heavy": 0.4}, {"sigma": 0.0}, {"interval": 0}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="kvmerger"):
        KVMerger(**parameters)


def test_on_a_real_text_it_is_closer_than_a_window(smollm2):
    merged, window = divergences(smollm2, [("kvmerger", 80), ("window", 80)])
    assert merged < 0.7 * window
