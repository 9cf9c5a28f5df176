"""Scissorhands against the paper's algorithm in plain loops (arXiv 2305.17118, algorithms 1 and 2)."""

from collections import defaultdict

import pytest
from one_layer import KV_HEADS, Entry, NaiveHead, OneLayer, in_step, random_tokens, split
from real_text import divergences

from kvarn.errors import RecipeError
from kvarn.methods.scissorhands import Scissorhands


class NaiveScissorhands(NaiveHead):
    def __init__(self, capacity: int, history: int, recent: int, drop: int, prompt: int):
        super().__init__()
        self.capacity, self.history, self.recent, self.drop, self.prompt = capacity, history, recent, drop, prompt
        self.ignored: dict[int, set[int]] = defaultdict(set)  # by position, the queries that ignored it

    def observe(self, entry: Entry, paid: float, read: int, now: int) -> None:
        if now >= self.prompt - self.history and paid < 1 / read:
            self.ignored[entry.position].add(now)

    def reduce(self, seen: int) -> None:
        excess = len(self.entries) - self.capacity
        if excess <= 0:
            return
        now = seen - 1
        old = [entry.position for entry in self.entries if entry.position <= now - self.recent]
        often = {position: len([q for q in self.ignored[position] if q > now - self.history]) for position in old}
        gone = sorted(old, key=lambda p: (-often[p], p))[: excess if seen == self.prompt else self.drop]
        self.entries = [entry for entry in self.entries if entry.position not in gone]


@pytest.mark.parametrize(("history", "drop"), [(8, 0.5), (16, 0.3), (64, 0.0)])
def test_the_same_entries_as_the_paper(history, drop):
    capacity, prompt, recent = 14, 20, 3
    layer = OneLayer(f"scissorhands(history={history}, recent={recent}, drop={drop})", capacity)
    leaving = max(1, int(drop * capacity))
    naive = [NaiveScissorhands(capacity, history, recent, leaving, prompt) for _ in range(KV_HEADS)]
    for _ in in_step(layer, naive, random_tokens(50), prompt):
        pass


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
    quarter, window, half = divergences(smollm2, [(recipe, 80) for recipe in recipes])
    assert quarter < window
    assert quarter < half
