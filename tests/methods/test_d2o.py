"""D2O's merging against the paper's algorithm in plain loops (arXiv 2406.13035, section 3.3)."""

import math

import pytest
import torch
from one_layer import KV_HEADS, NaiveHead, OneLayer, assert_same_rows, in_step, random_tokens, split
from real_text import divergences
from torch.nn.functional import cosine_similarity

from kvarn.errors import RecipeError
from kvarn.methods.d2o import D2O


class NaiveD2O(NaiveHead):
    def __init__(self, capacity: int, sinks: int, recent: int, memory: float):
        super().__init__()
        self.capacity, self.sinks, self.recent, self.memory = capacity, sinks, recent, memory
        self.threshold: float | None = None

    def reduce(self, seen: int) -> None:
        count = len(self.entries) - self.capacity
        if count <= 0:
            return
        open_ = [e for e in self.entries if self.sinks <= e.position < seen - self.recent]
        gone = sorted(open_, key=lambda e: e.mass)[:count]
        kept = [e for e in self.entries if e not in gone]
        nearest = [max((float(cosine_similarity(g.key, e.key, dim=0)), e.position) for e in kept) for g in gone]
        mean = sum(u for u, _ in nearest) / count
        old = self.threshold
        self.threshold = mean if old is None else self.memory * old + (1 - self.memory) * mean
        for e in kept:
            joins = [(math.exp(u), g) for (u, p), g in zip(nearest, gone, strict=True) if p == e.position]
            joins = [(w, g) for w, g in joins if math.log(w) >= self.threshold - 1e-6]
            total = math.e + sum(w for w, _ in joins)
            e.key, e.value = (
                (math.e * getattr(e, side) + sum(w * getattr(g, side) for w, g in joins)) / total
                for side in ("key", "value")
            )
        self.entries = kept


@pytest.mark.parametrize("memory", [0.5, 0.9])
def test_the_same_entries_as_the_paper(memory):
    capacity = 12
    layer = OneLayer(f"d2o(sinks=2, memory={memory})", capacity)
    naive = [NaiveD2O(capacity, 2, 6, memory) for _ in range(KV_HEADS)]
    for _ in in_step(layer, naive, random_tokens(40), prompt=24):
        assert_same_rows(layer, naive)
    assert layer.by_position("threshold")[0][0] == pytest.approx(naive[0].threshold, abs=1e-4)


def test_what_is_equal_to_one_that_stays_changes_nothing():
    query, keys, values = random_tokens(30)
    keys[:], values[:] = keys[:, :, :1], values[:, :, :1]
    layer = OneLayer("d2o(sinks=2)", 12)
    layer.prompt(query, keys, values)
    for mine, theirs in zip(layer.keys_and_values(), (keys, values), strict=True):
        torch.testing.assert_close(mine, theirs[0, :, :12])


def test_the_entries_that_stay_are_those_of_h2o_at_first():
    tokens = random_tokens(40)
    layer, h2o = OneLayer("d2o(sinks=0)", 12), OneLayer("h2o", 12)
    for recipe in (layer, h2o):
        recipe.prompt(*tokens)
    assert layer.positions() == h2o.positions()
    assert not torch.equal(layer.keys_and_values()[0], h2o.keys_and_values()[0])


def test_room_for_everything_changes_nothing():
    tokens = random_tokens(30)
    layer, full = OneLayer("d2o", 30), OneLayer("full")
    assert torch.equal(layer.prompt(*split(tokens, 0, 20)), full.prompt(*split(tokens, 0, 20)))
    for position in range(20, 30):
        now = split(tokens, position, position + 1)
        torch.testing.assert_close(layer.token(*now), full.token(*now), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parameters", [{"heavy": 0.0, "recent": 0.0}, {"sinks": -1}, {"memory": 1.5}, {"interval": 0}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="d2o"):
        D2O(**parameters)


def test_on_a_real_text_it_is_closer_than_a_window(smollm2):
    merged, window = divergences(smollm2, ["d2o", "window"], entries=80, steps=24)
    assert merged < window
