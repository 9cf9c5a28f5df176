"""KVMerger against its algorithm in plain loops (arXiv 2407.08454, section 3)."""

import math

import pytest
import torch
from one_layer import GROUP, KV_HEADS, OneLayer, probabilities, random_tokens, split
from real_text import divergences
from torch.nn.functional import cosine_similarity

from kvarn.errors import RecipeError
from kvarn.methods.kvmerger import KVMerger


class NaiveKVMerger:
    """One KV head: entries as [position, key, value, mass], in order."""

    def __init__(self, capacity: int, recent: int, heavy: int, sigma: float):
        self.capacity, self.recent, self.heavy, self.sigma = capacity, recent, heavy, sigma
        self.entries: list[list] = []

    def attend(self, queries, now: int) -> None:
        read = [entry for entry in self.entries if entry[0] <= now]
        keys = torch.stack([entry[1] for entry in read])
        rows = [probabilities(query, keys) for query in queries]
        for index, entry in enumerate(read):
            entry[3] += sum(row[index] for row in rows) / len(rows)

    def reduce(self, seen: int) -> None:
        count = len(self.entries) - self.capacity
        if count <= 0:
            return
        others = [e for e in self.entries if e[0] < seen - self.recent]
        heavy = [e[0] for e in sorted(others, key=lambda e: -e[3])[: self.heavy]]
        free = {e[0] for e in others} - set(heavy)
        pairs = []
        for i, (a, b) in enumerate(zip(self.entries, self.entries[1:], strict=False)):
            both = a[0] in free and b[0] in free
            pairs.append((both, float(cosine_similarity(a[1], b[1], dim=0)), i))
        joins = {i for *_, i in sorted(pairs, reverse=True)[:count]}
        runs, run = [], []
        for i, entry in enumerate(self.entries):
            run.append(entry)
            if i not in joins:
                runs.append(run)
                run = []
        self.entries = [self.merged(run) for run in runs]

    def merged(self, run: list) -> list:
        pivot = max(run, key=lambda e: e[3])
        weights = [math.exp(-float((e[1] - pivot[1]).square().sum()) / (2 * self.sigma**2)) for e in run]
        key, value = (sum(w * e[side] for w, e in zip(weights, run, strict=True)) / sum(weights) for side in (1, 2))
        return [pivot[0], key, value, pivot[3]]

    def run(self, queries, keys, values, prompt: int):
        self.entries = [[p, keys[p], values[p], 0.0] for p in range(prompt)]
        for position in range(prompt):
            self.attend(queries[:, position], position)
        self.reduce(prompt)
        yield
        for position in range(prompt, keys.shape[0]):
            self.entries.append([position, keys[position], values[position], 0.0])
            self.attend(queries[:, position], position)
            self.reduce(position + 1)
            yield


def test_the_same_entries_as_in_plain_loops():
    capacity, prompt = 16, 30
    tokens = random_tokens(44)
    layer = OneLayer("kvmerger(sigma=8.0)", capacity)
    naive = [NaiveKVMerger(capacity, int(0.34 * capacity), int(0.24 * capacity), 8.0) for _ in range(KV_HEADS)]
    queries = tokens[0].unflatten(1, (KV_HEADS, GROUP))[0]
    runs = [n.run(queries[h], tokens[1][0, h], tokens[2][0, h], prompt) for h, n in enumerate(naive)]
    for taken, _ in enumerate(zip(*runs, strict=True)):
        first = 0 if taken == 0 else prompt + taken - 1
        (layer.prompt if taken == 0 else layer.token)(*split(tokens, first, prompt + taken))
        assert layer.positions() == [[entry[0] for entry in n.entries] for n in naive]
        keys, values = layer.keys_and_values()
        for h, positions in enumerate(layer._rows("position")):
            by_position = {entry[0]: entry for entry in naive[h].entries}
            for place, position in enumerate(positions):
                torch.testing.assert_close(keys[h, place], by_position[position][1], rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(values[h, place], by_position[position][2], rtol=1e-3, atol=1e-4)


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
    merged, window = divergences(smollm2, ["kvmerger", "window"], entries=80, steps=24)
    assert merged < 0.7 * window
