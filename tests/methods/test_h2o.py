"""H2O against the paper's algorithm in plain loops (arXiv 2306.14048, algorithm 1)."""

import pytest
import torch
from one_layer import KV_HEADS, NaiveHead, OneLayer, in_step, random_tokens, split

from kvarn.errors import RecipeError
from kvarn.methods.h2o import H2O


class NaiveH2O(NaiveHead):
    def __init__(self, capacity: int, recent: int):
        super().__init__()
        self.capacity, self.recent = capacity, recent

    def reduce(self, seen: int) -> None:
        if len(self.entries) <= self.capacity:
            return
        recent = [entry for entry in self.entries if entry.position >= seen - self.recent]
        others = [entry for entry in self.entries if entry.position < seen - self.recent]
        others.sort(key=lambda entry: -entry.mass)
        self.entries = sorted(others[: self.capacity - len(recent)] + recent, key=lambda entry: entry.position)


@pytest.mark.parametrize(("heavy", "recent"), [(0.1, 0.1), (0.2, 0.1), (0.0, 0.1), (0.1, 0.0)])
def test_the_same_entries_and_masses_as_the_paper(heavy, recent):
    capacity = 8
    layer = OneLayer(f"h2o(heavy={heavy}, recent={recent})", capacity)
    newest = int(capacity * recent / (heavy + recent))
    naive = [NaiveH2O(capacity, newest) for _ in range(KV_HEADS)]
    for _ in in_step(layer, naive, random_tokens(34), prompt=20):
        for mass, head in zip(layer.by_position("mass"), naive, strict=True):
            assert mass == pytest.approx({entry.position: entry.mass for entry in head.entries}, abs=1e-5)


def test_mass_is_the_number_of_queries():
    tokens = random_tokens(25)
    layer = OneLayer("h2o", capacity=25)
    layer.prompt(*split(tokens, 0, 20))
    for position in range(20, 25):
        layer.token(*split(tokens, position, position + 1))
    for mass in layer.by_position("mass"):
        assert sum(mass.values()) == pytest.approx(25, abs=1e-4)


def test_without_heavy_hitters_it_is_a_window():
    tokens = random_tokens(40)
    layer, window = OneLayer("h2o(heavy=0.0)", capacity=10), OneLayer("window(sinks=0)", capacity=10)
    for recipe in (layer, window):
        recipe.prompt(*split(tokens, 0, 30))
    assert layer.positions() == window.positions()
    for position in range(30, 40):
        now = split(tokens, position, position + 1)
        torch.testing.assert_close(layer.token(*now), window.token(*now), rtol=1e-5, atol=1e-5)
        assert layer.positions() == window.positions()


def test_room_for_everything_changes_nothing():
    tokens = random_tokens(30)
    layer, full = OneLayer("h2o", capacity=30), OneLayer("full")
    assert torch.equal(layer.prompt(*split(tokens, 0, 20)), full.prompt(*split(tokens, 0, 20)))
    for position in range(20, 30):
        now = split(tokens, position, position + 1)
        torch.testing.assert_close(layer.token(*now), full.token(*now), rtol=1e-5, atol=1e-5)
    assert layer.positions() == [list(range(30))] * 2


def test_an_interval_evicts_that_many_at_once_and_never_exceeds_the_capacity():
    tokens = random_tokens(60)
    layer = OneLayer("h2o(interval=5)", capacity=20)
    layer.prompt(*split(tokens, 0, 30))
    seen = set()
    for position in range(30, 60):
        layer.token(*split(tokens, position, position + 1))
        held = layer.positions()
        seen.add(len(held[0]))
        assert max(map(len, held)) <= 20
        assert all(set(range(position - 5, position + 1)) <= set(head) for head in held)
    assert seen == {16, 17, 18, 19, 20}


def test_heads_may_be_taken_in_turns(monkeypatch):
    tokens, held = random_tokens(50), []
    for entries in (2**24, 1):
        monkeypatch.setattr("kvarn.layers.group._ENTRIES", entries)
        layer = OneLayer("h2o(interval=3)", capacity=20)
        layer.prompt(*split(tokens, 0, 30))
        for position in range(30, 50):
            layer.token(*split(tokens, position, position + 1))
        held.append(layer.positions())
    assert held[0] == held[1]


def test_the_mass_of_a_second_prompt_is_added_to_the_first():
    tokens = random_tokens(30)
    once, twice = OneLayer("h2o", capacity=30), OneLayer("h2o", capacity=30)
    once.prompt(*tokens)
    twice.prompt(*split(tokens, 0, 18))
    twice.prompt(*split(tokens, 18, 30))
    for one, two in zip(once.by_position("mass"), twice.by_position("mass"), strict=True):
        assert two == pytest.approx(one, abs=1e-4)


def test_bad_parameters():
    with pytest.raises(RecipeError, match="heavy"):
        H2O(heavy=0.0, recent=0.0)
