"""Scissorhands against the paper's algorithm in plain loops (arXiv 2305.17118, algorithms 1 and 2)."""

import pytest
import torch
from one_layer import GROUP, KV_HEADS, OneLayer, probabilities, random_tokens, split
from real_text import divergences

from kvarn.errors import RecipeError
from kvarn.methods.scissorhands import Scissorhands


class NaiveScissorhands:
    """One KV head: entries as [position, key, positions of the queries that ignored it]."""

    def __init__(self, capacity: int, history: int, recent: int, drop: int):
        self.capacity, self.history, self.recent, self.drop = capacity, history, recent, drop
        self.entries: list[list] = []

    def attend(self, queries, now: int) -> None:
        read = [entry for entry in self.entries if entry[0] <= now]
        keys = torch.stack([entry[1] for entry in read])
        rows = [probabilities(query, keys) for query in queries]
        for index, entry in enumerate(read):
            if sum(row[index] for row in rows) / len(rows) < 1 / len(read):
                entry[2].add(now)

    def compress(self, now: int, count: int) -> None:
        old = [entry for entry in self.entries if entry[0] <= now - self.recent]
        ignored = {entry[0]: len([q for q in entry[2] if q > now - self.history]) for entry in old}
        gone = sorted(old, key=lambda entry: (-ignored[entry[0]], entry[0]))[:count]
        self.entries = [entry for entry in self.entries if entry not in gone]

    def run(self, queries, keys, prompt: int):
        self.entries = [[position, keys[position], set()] for position in range(prompt)]
        for position in range(max(0, prompt - self.history), prompt):
            self.attend(queries[:, position], position)
        self.compress(prompt - 1, max(0, prompt - self.capacity))
        yield
        for position in range(prompt, keys.shape[0]):
            self.entries.append([position, keys[position], set()])
            self.attend(queries[:, position], position)
            if len(self.entries) > self.capacity:
                self.compress(position, self.drop)
            yield


@pytest.mark.parametrize(("history", "drop"), [(8, 0.5), (16, 0.3), (64, 0.0)])
def test_the_same_entries_as_the_paper(history, drop):
    capacity, prompt, recent = 14, 20, 3
    tokens = random_tokens(50)
    layer = OneLayer(f"scissorhands(history={history}, recent={recent}, drop={drop})", capacity)
    naive = [NaiveScissorhands(capacity, history, recent, max(1, int(drop * capacity))) for _ in range(KV_HEADS)]
    queries = tokens[0].unflatten(1, (KV_HEADS, GROUP))[0]
    steps = zip(*(n.run(queries[h], tokens[1][0, h], prompt) for h, n in enumerate(naive)), strict=True)
    for taken, _ in enumerate(steps):
        first = 0 if taken == 0 else prompt + taken - 1
        (layer.prompt if taken == 0 else layer.token)(*split(tokens, first, prompt + taken))
        assert layer.positions() == [[entry[0] for entry in n.entries] for n in naive]


def test_equal_attention_leaves_a_window():
    query, keys, values = random_tokens(40)
    layer, window = OneLayer("scissorhands(drop=0.0, recent=0)", 12), OneLayer("window(sinks=0)", 12)
    for recipe in (layer, window):
        recipe.prompt(*split((query, 0 * keys, values), 0, 30))
        for position in range(30, 40):
            recipe.token(*split((query, 0 * keys, values), position, position + 1))
    assert layer.positions() == window.positions()


def test_a_second_prompt_is_remembered_as_one_by_one():
    tokens = random_tokens(40)
    turns, single = OneLayer("scissorhands(history=16)", 40), OneLayer("scissorhands(history=16)", 40)
    for layer in (turns, single):
        layer.prompt(*split(tokens, 0, 30))
    turns.prompt(*split(tokens, 30, 40))
    for position in range(30, 40):
        single.token(*split(tokens, position, position + 1))
    assert turns.by_position("ignored") == single.by_position("ignored")


@pytest.mark.parametrize("parameters", [{"history": 12}, {"drop": 1.0}, {"recent": 10, "capacity": 10}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="scissorhands"):
        Scissorhands(**parameters)


def test_on_a_real_text_it_is_closer_than_a_window_and_the_closer_the_less_leaves_at_once(smollm2):
    recipes = ["scissorhands(history=64, drop=0.25)", "window", "scissorhands(history=64)"]
    quarter, window, half = divergences(smollm2, recipes, entries=80)
    assert quarter < window
    assert quarter < half
