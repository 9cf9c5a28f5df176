"""The window against its definition, and on a real model."""

import pytest
import torch
from one_layer import OneLayer, random_tokens, split

from kvarn.errors import RecipeError
from kvarn.methods.window import Window


def test_sinks_and_the_newest_stay():
    tokens = random_tokens(40)
    layer = OneLayer("window(sinks=2)", capacity=10)
    layer.prompt(*split(tokens, 0, 30))
    assert layer.positions() == [[0, 1, *range(22, 30)]] * 2
    for position in range(30, 40):
        layer.token(*split(tokens, position, position + 1))
        assert layer.positions() == [[0, 1, *range(position - 7, position + 1)]] * 2


def test_keys_and_values_are_moved_bit_by_bit():
    tokens = random_tokens(30)
    layer = OneLayer("window(sinks=2)", capacity=10)
    layer.prompt(*split(tokens, 0, 20))
    for position in range(20, 30):
        layer.token(*split(tokens, position, position + 1))
    keys, values = layer.keys_and_values()
    for head, positions in enumerate(layer._rows("position")):
        assert torch.equal(keys[head], tokens[1][0, head, positions])
        assert torch.equal(values[head], tokens[2][0, head, positions])


def test_room_for_everything_changes_nothing():
    tokens = random_tokens(30)
    narrow, full = OneLayer("window", capacity=30), OneLayer("full")
    assert torch.equal(narrow.prompt(*split(tokens, 0, 20)), full.prompt(*split(tokens, 0, 20)))
    for position in range(20, 30):
        now = split(tokens, position, position + 1)
        assert torch.equal(narrow.token(*now), full.token(*now))


def test_bad_parameters():
    with pytest.raises(RecipeError, match="sinks < capacity"):
        Window(sinks=10, capacity=10)
