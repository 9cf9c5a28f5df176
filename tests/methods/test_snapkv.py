"""SnapKV against the paper's algorithm in plain loops (arXiv 2404.14469, section 4)."""

import pytest
import torch
from one_layer import GROUP, KV_HEADS, OneLayer, probabilities, random_tokens, split

from kvarn.errors import RecipeError
from kvarn.methods.snapkv import SnapKV


def naive_snapkv(queries, keys, window: int, kernel: int, pooling: str, capacity: int) -> list[int]:
    """Positions kept in one KV head: queries [G, n, D], keys [n, D]."""
    length = keys.shape[0]
    prefix = length - window
    pooled = [0.0] * prefix
    for query in queries:
        votes = [0.0] * prefix
        for position in range(prefix, length):
            row = probabilities(query[position], keys[: position + 1])
            for index in range(prefix):
                votes[index] += row[index]
        for index in range(prefix):
            around = votes[max(0, index - kernel // 2) : index + kernel // 2 + 1]
            pooled[index] += (max(around) if pooling == "max" else sum(around) / kernel) / len(queries)
    best = sorted(range(prefix), key=lambda index: (-round(pooled[index], 9), index))[: capacity - window]
    return sorted(best) + list(range(prefix, length))


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize(("window", "kernel"), [(4, 3), (1, 1), (8, 7)])
def test_the_same_entries_as_the_paper(pooling, window, kernel):
    tokens = random_tokens(40)
    layer = OneLayer(f"snapkv(window={window}, kernel={kernel}, pooling={pooling!r})", capacity=14)
    layer.prompt(*tokens)
    queries = tokens[0].unflatten(1, (KV_HEADS, GROUP))[0]
    expected = [naive_snapkv(queries[h], tokens[1][0, h], window, kernel, pooling, 14) for h in range(KV_HEADS)]
    assert layer.positions() == expected
    keys, values = layer.keys_and_values()
    for head, positions in enumerate(layer._rows("position")):
        assert torch.equal(keys[head], tokens[1][0, head, positions])
        assert torch.equal(values[head], tokens[2][0, head, positions])


def test_neighbours_of_a_peak_stay():
    query, keys, values = random_tokens(40)
    keys, query = keys * 0.01, query * 0.01
    keys[:, :, 17] = 10
    query[:, :, -1] = 10
    layer = OneLayer("snapkv(window=1, kernel=7)", capacity=8)
    layer.prompt(query, keys, values)
    assert layer.positions() == [[*range(14, 21), 39]] * 2


def test_what_fits_is_left_alone():
    tokens = random_tokens(30)
    layer, full = OneLayer("snapkv(window=8)", capacity=30), OneLayer("full")
    for recipe in (layer, full):
        recipe.prompt(*tokens)
    for mine, theirs in zip(layer.keys_and_values(), full.keys_and_values(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_prompt_itself_is_attended_to_exactly_and_decoding_evicts_nothing():
    tokens = random_tokens(50)
    layer, full = OneLayer("snapkv(window=4)", capacity=12), OneLayer("full")
    assert torch.equal(layer.prompt(*split(tokens, 0, 40)), full.prompt(*split(tokens, 0, 40)))
    for position in range(40, 50):
        layer.token(*split(tokens, position, position + 1))
    assert all(len(head) == 22 and set(range(36, 50)) <= set(head) for head in layer.positions())


def test_a_second_prompt_is_judged_with_what_is_stored():
    tokens = random_tokens(60)
    layer = OneLayer("snapkv(window=4)", capacity=12)
    layer.prompt(*split(tokens, 0, 40))
    first = layer.positions()
    layer.prompt(*split(tokens, 40, 60))
    for before, after in zip(first, layer.positions(), strict=True):
        assert len(after) == 12
        assert after[-4:] == [56, 57, 58, 59]
        assert {position for position in after if position < 40} <= set(before)


@pytest.mark.parametrize("parameters", [{"kernel": 4}, {"window": 0}, {"pooling": "min"}, {"window": 9, "capacity": 9}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="snapkv"):
        SnapKV(**parameters)
