"""MiKV against the paper's algorithm in plain loops (arXiv 2402.18096)."""

import math

import pytest
import torch
from one_layer import GROUP, KV_HEADS, SIZE, OneLayer, probabilities, random_tokens, split

import kvarn
from drive import logits_of
from kvarn.errors import RecipeError
from kvarn.formats import Int
from kvarn.memory import TieredLayout
from kvarn.methods.mikv import MiKV
from test_real_model import answer, haystack_with_needle
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 90), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (12,), generator=torch.Generator().manual_seed(2))


def naive_int(numbers: list[float], bits: int) -> list[float]:
    low, high = min(numbers), max(numbers)
    scale = (high - low) / (2**bits - 1)
    return [low + scale * round((x - low) / scale) for x in numbers]


class Naive:
    """One KV head: exact keys and values of all tokens, which are low ones, and what is read."""

    def __init__(self, queries, keys, values, prompt: int, ratio: float, low: int):
        self.queries, self.keys, self.values, self.ratio, self.low = queries, keys, values, ratio, low
        self.mass, self.lows = [0.0] * prompt, set()
        self.balance = []
        for channel in range(SIZE):
            most = max(abs(float(query[t, channel])) for query in queries for t in range(prompt))
            self.balance.append(math.sqrt(most / max(abs(float(keys[t, channel])) for t in range(prompt))))
        for position in range(prompt):
            self.pay(position, keys[: position + 1])
        self.demote()

    def pay(self, position: int, read) -> None:
        for query in self.queries:
            for index, probability in enumerate(probabilities(query[position], read)):
                self.mass[index] += probability

    def demote(self) -> None:
        tokens = len(self.mass)
        important = int(self.ratio * tokens + 1e-9)
        newest = set(range(tokens - important // 2, tokens))
        while tokens - len(self.lows) > important:
            rest = [t for t in range(tokens) if t not in self.lows and t not in newest]
            self.lows.add(min(rest, key=self.mass.__getitem__))

    def step(self) -> None:
        position = len(self.mass)
        self.mass.append(0.0)
        self.pay(position, torch.stack([self.key(t) for t in range(position + 1)]))
        self.demote()

    def key(self, token: int) -> torch.Tensor:
        if token not in self.lows:
            return self.keys[token]
        balanced = [float(x) * b for x, b in zip(self.keys[token], self.balance, strict=True)]
        codes = [x for g in (balanced[: SIZE // 2], balanced[SIZE // 2 :]) for x in naive_int(g, self.low)]
        return torch.tensor([x / b for x, b in zip(codes, self.balance, strict=True)])


@pytest.mark.parametrize(("ratio", "low"), [(0.25, 2), (0.6, 4), (0.0, 3)])
def test_the_same_tokens_in_the_same_precision_as_the_paper(ratio, low):
    tokens = random_tokens(36)
    layer = OneLayer(f"mikv(ratio={ratio}, low={low})")
    layer.prompt(*split(tokens, 0, 30))
    queries = tokens[0].unflatten(1, (KV_HEADS, GROUP))[0]
    naive = [Naive(queries[h], tokens[1][0, h], tokens[2][0, h], 30, ratio, low) for h in range(KV_HEADS)]
    for position in range(30, 36):
        compare(layer, naive)
        layer.token(*split(tokens, position, position + 1))
        for head in naive:
            head.step()
    compare(layer, naive)


def compare(layer: OneLayer, naive: list[Naive]) -> None:
    store, everyone = layer.group.store, layer.group.everyone
    for tier, of_low in ((store.low, True), (store.high, False)):
        positions = tier.read_column(everyone, "position")
        keys, values = tier.read(everyone)
        for head, expected in enumerate(naive):
            count = int(tier.lengths[head])
            held = positions[head, :count].tolist()
            assert set(held) == (expected.lows if of_low else set(range(len(expected.mass))) - expected.lows)
            for place, token in enumerate(held):
                torch.testing.assert_close(keys[head, place], expected.key(token), rtol=1e-4, atol=1e-4)
                if not of_low:
                    assert torch.equal(values[head, place], expected.values[token])


def test_all_important_is_full_and_none_is_quantized():
    model = make_tiny("llama")
    full = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model))
    cache = kvarn.Cache(model, "mikv(ratio=1.0)")
    torch.testing.assert_close(logits_of(model, PROMPT, CONTINUATION, cache), full, rtol=1e-4, atol=1e-4)
    assert "int2/token" not in {name for name, held in cache.report().by_format.items() if held}
    none = kvarn.Cache(model, "mikv(ratio=0.0, low=8)")
    near = logits_of(model, PROMPT, CONTINUATION, none)
    torch.testing.assert_close(near, full, rtol=0, atol=0.05 * float(full.abs().max()))
    assert all(int(group.store.high.lengths.max()) == 0 for group in none._groups)


def test_the_balancer_saves_logits_from_outlier_channels():
    query, keys, values = random_tokens(60)
    query[..., 3] *= 30
    keys[..., 9] *= 12
    errors = []
    for balancer in (True, False):
        layer = OneLayer(f"mikv(ratio=0.0, low=2, balancer={balancer})")
        layer.prompt(query, keys, values)
        order = layer.group.store.read_column(layer.group.everyone, "position").long()
        read, _ = layer.keys_and_values()
        exact = keys[0].gather(1, order[..., None].expand(-1, -1, SIZE))
        grouped = query[0].unflatten(0, (KV_HEADS, GROUP)).flatten(1, 2)
        errors.append(float((grouped @ (read - exact).transpose(1, 2)).square().mean().sqrt()))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize(("high", "low"), [(16, 2), (8, 2), (4, 2), (16, 3)])
def test_bytes_are_those_of_the_paper_and_the_columns(high, low):
    recipe = kvarn.Recipe.parse(f"mikv(high={high}, low={low})")
    spec = kvarn.spec.LayerSpec(32, 8, 128, 128, None)
    layout = recipe.layout(spec, torch.float16, 64)
    assert isinstance(layout, TieredLayout)
    tokens, columns = 64 * 10_000, 8
    share = int(layout.bytes(torch.tensor(tokens))) / tokens - columns
    paper = {(16, 2): 0.325, (8, 2): 0.23125, (4, 2): 0.18125, (16, 3): 0.375}[high, low]
    assert share / (2 * 128 * 2) == pytest.approx(paper, rel=0.02)


def test_a_prompt_is_rounded_once():
    tokens = random_tokens(30)
    layer = OneLayer("mikv(high=8, low=2, balancer=False)")
    layer.prompt(*tokens)
    store, everyone = layer.group.store, layer.group.everyone
    places = store.low.read_column(everyone, "position").long()[..., None].expand(-1, -1, SIZE)
    codes = Int(2, "token", SIZE // 2, SIZE, torch.float32)
    for read, exact in zip(store.low.read(everyone), tokens[1:], strict=True):
        assert torch.equal(read, codes.decode(codes.encode(exact[0].gather(1, places))))


def test_what_another_method_evicts_is_the_rest_in_two_precisions():
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "snapkv(window=8) + mikv(ratio=0.5, low=4)", 40)
    model(PROMPT, past_key_values=cache)
    (group,) = cache._groups
    assert group.store.high.lengths.unique().tolist() == [20]
    assert group.store.low.lengths.unique().tolist() == [20]


@pytest.mark.parametrize("parameters", [{"ratio": 1.5}, {"high": 2}, {"low": 5}, {"high": 4, "low": 8}, {"groups": 0}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="mikv"):
        MiKV(**parameters)


def test_what_a_recipe_cannot_be():
    with pytest.raises(RecipeError, match="both decide in which format"):
        kvarn.Recipe.parse("mikv + kivi")


def test_a_needle_that_eviction_loses_stays_in_few_bits(smollm2):
    prompt = haystack_with_needle(smollm2[1], 300, 0.5)
    model, tokenizer = smollm2
    cache = kvarn.Cache(model, "mikv(low=4)")
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=7, do_sample=False)
    assert "73915" in tokenizer.decode(out[0, prompt.shape[1] :])
    assert "73915" not in answer(smollm2, prompt, "h2o", cache.report().ratio)
