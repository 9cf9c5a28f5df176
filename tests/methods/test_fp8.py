"""FP8 against the format's rule in plain loops (arXiv 2209.05433, table 1)."""

import math

import pytest
import torch
from one_layer import KV_HEADS, SIZE, VARIANT, OneLayer, random_tokens, split
from real_text import divergences

import kvarn
from kvarn.formats import Float8
from kvarn.layers import Fresh
from kvarn.methods.fp8 import FP8
from kvarn.spec import LayerSpec
from test_real_model import NEEDLE, answer, haystack_with_needle


def e4m3(x: float) -> float:
    """The nearest number with three bits of mantissa and exponents from -6 on, ties to even."""
    if not x:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(x))), -6) - 3)
    return round(x / step) * step


def encoded(vector: list[float]) -> list[float]:
    scale = max(map(abs, vector)) / 448
    return [e4m3(x / scale) * scale if scale else 0.0 for x in vector]


def test_the_same_cache_as_the_format_token_by_token():
    prompt, total = 21, 50
    tokens = random_tokens(total)
    tokens[1][0, 0, 3], tokens[2][0, 1, 30] = 0, 0  # vectors without a largest number
    layer = OneLayer("fp8")
    layer.prompt(*split(tokens, 0, prompt))
    for seen in range(prompt, total + 1):
        for side, given in zip(layer.keys_and_values(), tokens[1:], strict=True):
            expected = [[encoded(row) for row in given[0, head, :seen].tolist()] for head in range(KV_HEADS)]
            torch.testing.assert_close(side, torch.tensor(expected), rtol=1e-6, atol=1e-6)
        store = layer.group.store
        assert store.keys.tail.lengths.tolist() == store.values.tail.lengths.tolist() == [0] * KV_HEADS
        if seen < total:
            layer.token(*split(tokens, seen, seen + 1))


def test_a_token_is_read_as_it_is_stored_in_its_own_step_too():
    tokens = random_tokens(33)
    layer = OneLayer("fp8")
    layer.prompt(*split(tokens, 0, 32))
    query, key, value = split(tokens, 32, 33)
    out = layer.token(query, key, value)[0, :, 0]
    keys, values = layer.keys_and_values()
    logits = query[0].unflatten(0, (KV_HEADS, -1))[:, :, 0] @ keys.transpose(1, 2) / SIZE**0.5
    torch.testing.assert_close(out, (logits.softmax(-1) @ values).flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["fp8", "h2o + fp8"])
def test_memory_is_what_the_plan_says_at_every_step(recipe):
    """No page is ever held for exact tokens, neither before a step nor after it."""
    tokens, layer = random_tokens(70), OneLayer(recipe, capacity=50)
    layer.prompt(*split(tokens, 0, 30))
    group, arena = layer.group, layer.group.arena
    arena.peak_bytes = 0  # of the prompt, which was in hand
    for seen in range(30, 70):
        step = layer._step(tokens[1][:, :, :1])
        group.begin_token(step)
        planned = int(group.store.layout.most_bytes(group.store.lengths).sum())
        assert arena.bytes + group.store.bookkeeping_bytes == planned
        group.token(0, Fresh(*split(tokens, seen, seen + 1), step, VARIANT))
        group.end_token(step)
        assert arena.bytes <= arena.peak_bytes <= planned
    assert not group.store.keys.tail.pool.capacity


def test_several_tokens_at_once_equal_one_by_one():
    tokens = random_tokens(60)
    together, single = OneLayer("fp8"), OneLayer("fp8")
    together.prompt(*split(tokens, 0, 20))
    together.prompt(*split(tokens, 20, 60))
    single.prompt(*split(tokens, 0, 20))
    for position in range(20, 60):
        single.token(*split(tokens, position, position + 1))
    for one, other in zip(together.keys_and_values(), single.keys_and_values(), strict=True):
        assert torch.equal(one, other)


def test_a_prompt_is_attended_to_exactly():
    tokens = random_tokens(40)
    assert torch.equal(OneLayer("fp8").prompt(*tokens), OneLayer("full").prompt(*tokens))


def test_what_snapkv_keeps_is_what_is_encoded():
    tokens = random_tokens(60)
    both, alone = OneLayer("snapkv(window=8) + fp8", capacity=20), OneLayer("snapkv(window=8)", capacity=20)
    both.prompt(*split(tokens, 0, 60))
    alone.prompt(*split(tokens, 0, 60))
    for coded, exact in zip(both.keys_and_values(), alone.keys_and_values(), strict=True):
        expected = torch.tensor([[encoded(row) for row in head] for head in exact.tolist()])
        torch.testing.assert_close(coded, expected, rtol=1e-6, atol=1e-6)


def test_bytes_of_an_entry():
    """At 128 channels in 16 bits: 132 bytes of 256 for a key, and as many for a value of as many channels."""
    keys, values = FP8().encoding(LayerSpec(8, 2, 128, 128, None), torch.bfloat16)
    assert keys.format.unit_bytes == values.format.unit_bytes == 132
    assert type(keys.format) is Float8


def test_a_step_opens_no_page_but_of_codes():
    layout = kvarn.Recipe.parse("fp8").layout(LayerSpec(8, 2, 128, 128, None), torch.bfloat16, 16)
    assert layout.open_bytes == 2 * (16 * 132 + 8 + 4 + 16)  # vectors, a page's and a head's bookkeeping


def test_near_the_full_cache_where_fewer_entries_are_not(smollm2):
    """On a real text; SnapKV holds half of the entries, which is as many bytes in 16 bits. Measured: 0.004, 0.158."""
    fp8, snapkv = divergences(smollm2, [("fp8", None), ("snapkv", 80)], prompt=150)
    assert fp8 < 0.01
    assert fp8 < snapkv / 10


def test_finds_what_a_window_of_twice_as_many_bytes_loses(smollm2):
    prompt = haystack_with_needle(smollm2[1], 200, 0.5)
    number = NEEDLE.split()[-1].strip(".")
    assert number in answer(smollm2, prompt, "fp8", None)
    assert number not in answer(smollm2, prompt, "window", 0.5)
