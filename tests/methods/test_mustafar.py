"""Mustafar against the paper's rule in plain loops (arXiv 2505.22913, section 3)."""

import pytest
import torch
from one_layer import KV_HEADS, SIZE, OneLayer, random_tokens, split

import kvarn
from kvarn.errors import RecipeError
from kvarn.formats import Sparse
from kvarn.methods.mustafar import Mustafar
from test_real_model import NEEDLE, answer, haystack_with_needle


def pruned(vector: list[float], sparsity: float) -> list[float]:
    """The int(sparsity * d) numbers smallest in magnitude set to zero."""
    smallest = sorted(range(len(vector)), key=lambda c: abs(vector[c]))[: int(sparsity * len(vector))]
    return [0.0 if c in smallest else x for c, x in enumerate(vector)]


@pytest.mark.parametrize(("keys", "values", "recent"), [(0.5, 0.7, 8), (0.7, 0.0, 0), (0.3, 0.9, 5)])
def test_the_same_cache_as_the_paper_token_by_token(keys, values, recent):
    prompt, total = 20, 40
    tokens = random_tokens(total)
    layer = OneLayer(f"mustafar(key_sparsity={keys}, value_sparsity={values}, recent={recent})")
    layer.prompt(*split(tokens, 0, prompt))
    for seen in range(prompt, total + 1):
        for side, given, sparsity in zip(layer.keys_and_values(), tokens[1:], (keys, values), strict=True):
            for head in range(KV_HEADS):
                rows = given[0, head, :seen].tolist()
                old = max(seen - recent, 0)
                expected = [pruned(row, sparsity) for row in rows[:old]] + rows[old:]
                assert torch.equal(side[head], torch.tensor(expected))
        if seen < total:
            layer.token(*split(tokens, seen, seen + 1))


def test_nothing_pruned_is_full():
    tokens = random_tokens(50)
    for recipe in ("mustafar(key_sparsity=0.0, value_sparsity=0.0)", "mustafar(recent=50)"):
        layer, full = OneLayer(recipe), OneLayer("full")
        assert torch.equal(layer.prompt(*split(tokens, 0, 40)), full.prompt(*split(tokens, 0, 40)))
        for position in range(40, 50):
            now = split(tokens, position, position + 1)
            assert torch.equal(layer.token(*now), full.token(*now))


def test_evicted_tokens_take_nothing_from_the_others():
    """H2O over mustafar keeps entries whose numbers are what was given, or zero."""
    tokens = random_tokens(60)
    layer = OneLayer("h2o + mustafar(recent=4)", capacity=20)
    layer.prompt(*split(tokens, 0, 40))
    for position in range(40, 60):
        layer.token(*split(tokens, position, position + 1))
    for side, given in zip(layer.keys_and_values(), tokens[1:], strict=True):
        for head, positions in enumerate(layer._rows("position")):
            assert len(positions) == 20
            expected = given[0, head, positions]
            assert bool(((side[head] == expected) | (side[head] == 0)).all())
            assert bool(((side[head] != 0).sum(1) >= SIZE // 2).all())


def test_bytes_of_a_vector():
    """At 128 channels in 16 bits and 70 %: 16 bytes of bitmap and 39 numbers, 0.367 of dense (the paper: 0.45)."""
    assert Sparse(128 - int(0.7 * 128), 128, torch.bfloat16).unit_bytes == 16 + 2 * 39


def test_pruned_memory_finds_what_a_window_of_as_many_bytes_loses(smollm2):
    prompt = haystack_with_needle(smollm2[1], 200, 0.1)
    number = NEEDLE.split()[-1].strip(".")
    assert number in answer(smollm2, prompt, "mustafar", None)
    assert number not in answer(smollm2, prompt, "window", 0.6)


@pytest.mark.parametrize("parameters", [{"key_sparsity": 1.0}, {"value_sparsity": -0.1}, {"recent": -1}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="mustafar"):
        Mustafar(**parameters)


def test_head_sizes_that_no_bitmap_fits():
    layer = kvarn.spec.LayerSpec(2, 2, 12, 12, None)
    with pytest.raises(RecipeError, match="multiple of 8 numbers; these have 12"):
        Mustafar().encoding(layer, torch.float32)
