"""KIVI against the paper's algorithm in plain loops (arXiv 2402.02750, algorithm 1)."""

import pytest
import torch
from one_layer import KV_HEADS, SIZE, OneLayer, random_tokens, split
from torch import Tensor

from kvarn.errors import RecipeError
from kvarn.methods.kivi import KIVI


def quantized(numbers: list[float], bits: int) -> list[float]:
    """Asymmetric round-to-nearest over one group, there and back."""
    low, high = min(numbers), max(numbers)
    scale = (high - low) / (2**bits - 1)
    return [round((x - low) / scale) * scale + low if scale else low for x in numbers]


class NaiveKIVI:
    """One KV head: exact tails, and what has been quantized, as lists of vectors."""

    def __init__(self, bits: int, group: int, residual: int):
        self.bits, self.group, self.residual = bits, group, residual
        self.keys: list[list[float]] = []
        self.key_tail: list[list[float]] = []
        self.values: list[list[float]] = []
        self.value_tail: list[list[float]] = []

    def add(self, key: Tensor, value: Tensor) -> None:
        self.key_tail.append(key.tolist())
        self.value_tail.append(value.tolist())
        if len(self.key_tail) == self.residual:
            for first in range(0, self.residual, self.group):
                block = self.key_tail[first : first + self.group]
                channels = [quantized([row[c] for row in block], self.bits) for c in range(SIZE)]
                self.keys += [[channel[t] for channel in channels] for t in range(self.group)]
            self.key_tail = []
        if len(self.value_tail) > self.residual:
            row = self.value_tail.pop(0)
            groups = [row[first : first + self.group] for first in range(0, SIZE, self.group)]
            self.values.append([x for group in groups for x in quantized(group, self.bits)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_same_cache_as_the_paper_token_by_token(bits):
    group, residual, prompt, total = 8, 16, 37, 75
    tokens = random_tokens(total)
    layer = OneLayer(f"kivi(bits={bits}, group={group}, residual={residual})")
    naive = [NaiveKIVI(bits, group, residual) for _ in range(KV_HEADS)]
    for position in range(total):
        for head, n in enumerate(naive):
            n.add(tokens[1][0, head, position], tokens[2][0, head, position])
        if position + 1 < prompt:
            continue
        if position + 1 == prompt:
            layer.prompt(*split(tokens, 0, prompt))
        else:
            layer.token(*split(tokens, position, position + 1))
        store = layer.group.store
        assert store.keys.tail.lengths.tolist() == [(position + 1) % residual] * KV_HEADS
        assert store.values.tail.lengths.tolist() == [min(position + 1, residual)] * KV_HEADS
        keys, values = layer.keys_and_values()
        torch.testing.assert_close(keys, torch.tensor([n.keys + n.key_tail for n in naive]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values, torch.tensor([n.values + n.value_tail for n in naive]), rtol=1e-4, atol=1e-4)


def test_several_tokens_at_once_equal_one_by_one():
    tokens = random_tokens(90)
    together, single = (OneLayer("kivi(bits=4, group=8, residual=16)") for _ in range(2))
    together.prompt(*split(tokens, 0, 30))
    together.prompt(*split(tokens, 30, 90))
    single.prompt(*split(tokens, 0, 30))
    for position in range(30, 90):
        single.token(*split(tokens, position, position + 1))
    for one, other in zip(together.keys_and_values(), single.keys_and_values(), strict=True):
        assert torch.equal(one, other)


def test_short_sequences_are_exact():
    tokens = random_tokens(31)
    layer, full = OneLayer("kivi(bits=2, residual=32)"), OneLayer("full")
    assert torch.equal(layer.prompt(*split(tokens, 0, 20)), full.prompt(*split(tokens, 0, 20)))
    for position in range(20, 31):
        now = split(tokens, position, position + 1)
        assert torch.equal(layer.token(*now), full.token(*now))


def test_the_current_token_is_exact_in_its_own_step():
    tokens = random_tokens(33)
    layer = OneLayer("kivi(bits=2, group=8, residual=16)")
    layer.prompt(*split(tokens, 0, 31))
    keys, values = layer.keys_and_values()
    query, key, value = split(tokens, 31, 32)  # fills the tail of keys: they are quantized after this step
    logits = query[0].unflatten(0, (KV_HEADS, -1))[:, :, 0] @ torch.cat([keys, key[0]], 1).transpose(1, 2) / SIZE**0.5
    expected = logits.softmax(-1) @ torch.cat([values, value[0]], 1)
    torch.testing.assert_close(layer.token(query, key, value)[0, :, 0], expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_bad_parameters():
    with pytest.raises(RecipeError, match="multiple of group"):
        KIVI(group=32, residual=48)
    with pytest.raises(RecipeError, match="bits"):
        KIVI(bits=5)
