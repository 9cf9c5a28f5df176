"""LazyEviction against the paper's algorithm in plain loops (arXiv 2506.15969)."""

import math

import pytest
import torch
from one_layer import GROUP, KV_HEADS, OneLayer, probabilities, random_tokens, split
from real_text import divergences

from kvarn.errors import RecipeError
from kvarn.methods.lazyeviction import LazyEviction
from kvarn.scoring import Recurrence


class NaiveLazyEviction:
    """One KV head: entries as [position, key, last time it mattered, longest silence before it mattered again]."""

    def __init__(self, capacity: int, threshold: float, window: int):
        self.capacity, self.threshold, self.window = capacity, threshold, window
        self.entries: list[list] = []

    def step(self, queries, now: int) -> None:
        read = [entry for entry in self.entries if entry[0] <= now]
        keys = torch.stack([entry[1] for entry in read])
        rows = [probabilities(query, keys) for query in queries]
        for index, entry in enumerate(read):
            if any(row[index] >= self.threshold for row in rows):
                entry[3] = max(entry[3], now - entry[2])
                entry[2] = now

    def score(self, entry, now: int) -> float:
        prior = 2 / (1 + math.exp(entry[3] - 1)) if entry[3] else 0.0
        return 2 / (1 + math.exp(min(700, 1 + (now - entry[2]) / (entry[3] + 1e-5)))) + prior

    def reduce(self, now: int, to: int) -> None:
        newest = [entry for entry in self.entries if entry[0] > now - self.window]
        others = [entry for entry in self.entries if entry[0] <= now - self.window]
        others.sort(key=lambda entry: (-self.score(entry, now), -entry[0]))
        self.entries = sorted(others[: to - len(newest)] + newest, key=lambda entry: entry[0])

    def run(self, queries, keys, prompt: int):
        start = prompt - min(self.window, prompt)
        self.entries = [[p, keys[p], max(p, start) - 1, 0] for p in range(prompt)]
        for position in range(start, prompt):
            self.step(queries[:, position], position)
        if prompt > self.capacity:
            self.reduce(prompt - 1, self.capacity)
        yield
        for position in range(prompt, keys.shape[0]):
            self.entries.append([position, keys[position], position - 1, 0])
            self.step(queries[:, position], position)
            if len(self.entries) > self.capacity:
                self.reduce(position, self.capacity + 1 - self.window)
            yield


@pytest.mark.parametrize("prompt", [12, 25])
def test_the_same_entries_and_columns_as_the_paper(prompt):
    capacity, window, threshold = 18, 5, 0.04
    tokens = random_tokens(45)
    layer = OneLayer(f"lazyeviction(threshold={threshold}, window={window}, capacity=18)", capacity)
    naive = [NaiveLazyEviction(capacity, threshold, window) for _ in range(KV_HEADS)]
    queries = tokens[0].unflatten(1, (KV_HEADS, GROUP))[0]
    steps = zip(*(n.run(queries[h], tokens[1][0, h], prompt) for h, n in enumerate(naive)), strict=True)
    for taken, _ in enumerate(steps):
        first = 0 if taken == 0 else prompt + taken - 1
        (layer.prompt if taken == 0 else layer.token)(*split(tokens, first, prompt + taken))
        assert layer.positions() == [[entry[0] for entry in n.entries] for n in naive]
        for column, place in (("last", 2), ("interval", 3)):
            assert layer.by_position(column) == [{entry[0]: entry[place] for entry in n.entries} for n in naive]


def test_the_score_of_a_hand_traced_entry():
    columns = {"last": torch.tensor([[12]]), "interval": torch.tensor([[7]]), "position": torch.tensor([[2]])}
    score = Recurrence(1e-4, 8).stored(columns, torch.tensor([[21]]))
    assert float(score) == pytest.approx(2 / (1 + math.exp(1 + 8 / 7)) + 2 / (1 + math.exp(6)), abs=1e-5)


def test_observing_changes_no_output_and_evicts_in_blocks():
    tokens = random_tokens(60)
    layer, full = OneLayer("lazyeviction(window=5)", capacity=40), OneLayer("full")
    torch.testing.assert_close(layer.prompt(*split(tokens, 0, 20)), full.prompt(*split(tokens, 0, 20)))
    held = []
    for position in range(20, 60):
        now = split(tokens, position, position + 1)
        ours, exact = layer.token(*now), full.token(*now)
        if position < 40:
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
        held.append(len(layer.positions()[0]))
    assert held == [*range(21, 41), *[36, 37, 38, 39, 40] * 4]


@pytest.mark.parametrize("parameters", [{"threshold": 0.0}, {"window": 0}, {"window": 100, "capacity": 150}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="lazyeviction"):
        LazyEviction(**parameters)


def test_on_a_real_text_it_is_closer_than_a_window_if_the_threshold_tells_entries_apart(smollm2):
    recipes = ["lazyeviction(window=16, threshold=0.01)", "window", "lazyeviction(window=16, threshold=0.0001)"]
    tuned, window, blind = divergences(smollm2, [(recipe, 80) for recipe in recipes])
    assert tuned < 0.8 * window
    assert tuned < 0.5 * blind
