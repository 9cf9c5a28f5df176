"""ARKV against the paper's algorithm in plain loops (arXiv 2603.08727)."""

import math
from dataclasses import dataclass
from pydoc_data.topics import topics

import pytest
import torch
from one_layer import GROUP, KV_HEADS, OneLayer, probabilities, random_tokens, split
from test_cake import mean_and_variance, prompt_view, rows_of

import kvarn
from drive import logits_of
from kvarn.budgets import Graded, Policy, PrecisionCascade
from kvarn.errors import RecipeError
from kvarn.formats import Float8
from kvarn.memory import TieredLayout
from kvarn.methods.arkv import ARKV
from kvarn.recipe import Recipe
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 200), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (60,), generator=torch.Generator().manual_seed(2))
WINDOW, GAMMA = 4, 50.0


def naive_fp8(vector: torch.Tensor) -> torch.Tensor:
    """Four bits of mantissa, the first of them implied, below 448."""
    scale = float(vector.abs().max()) / 448
    numbers = []
    for x in vector.tolist():
        exponent = max(math.floor(math.log2(abs(x) / scale)), -6) if x else 0
        step = scale * 2 ** (exponent - 3)
        numbers.append(round(x / step) * step)
    return torch.tensor(numbers)


class Naive:
    """One KV head: the positions that it holds, in order, and which of them are quantized."""

    def __init__(self, queries, keys, values, prompt: int, capacity: int, exact: int):
        self.queries, self.keys, self.values, self.capacity, self.exact = queries, keys, values, capacity, exact
        past = range(prompt - WINDOW)
        marks = [0.0] * len(past)
        for head in rows_of(queries, keys[:prompt], WINDOW):
            for j in past:
                mean, variance = mean_and_variance([row[j] for row in head])
                marks[j] += mean + GAMMA * variance
        best = sorted(past, key=self.pooled(marks).__getitem__)[::-1][: capacity - WINDOW]
        self.held, self.quantized = sorted(best) + list(range(prompt - WINDOW, prompt)), set()

    def pooled(self, marks: list[float]) -> list[float]:
        return [sum(marks[max(0, i - 2) : i + 3]) for i in range(len(marks))]

    def key(self, token: int) -> torch.Tensor:
        return naive_fp8(self.keys[token]) if token in self.quantized else self.keys[token]

    def step(self) -> None:
        position = self.held[-1] + 1
        self.held.append(position)
        marks = [0.0] * (len(self.held) - WINDOW)
        read = torch.stack([self.key(t) for t in self.held])
        for query in self.queries:
            for place, probability in enumerate(probabilities(query[position], read)[: len(marks)]):
                marks[place] += probability
        if len(self.held) <= self.capacity:
            return
        worth = dict(zip(self.held, self.pooled(marks), strict=False))
        keep = sorted(worth, key=worth.__getitem__)[len(worth) - int(0.75 * len(worth)) :]
        self.held = sorted(keep) + self.held[-WINDOW:]
        originals = [t for t in keep if t not in self.quantized]  # in ascending order of worth
        self.quantized = (self.quantized & set(keep)) | set(originals[: max(len(originals) - self.exact, 0)])


@pytest.mark.parametrize("exact", [0, 5, 16])
def test_the_same_three_states_as_the_paper(exact):
    capacity, tokens = 20, random_tokens(56)
    layer = OneLayer(f"arkv(window={WINDOW}, gamma={GAMMA})", capacity)
    layer.group._high[0], layer.group._high[1] = WINDOW + exact, capacity
    layer.prompt(*split(tokens, 0, 30))
    queries = tokens[0].unflatten(1, (KV_HEADS, GROUP))[0]
    naive = [Naive(queries[h], tokens[1][0, h], tokens[2][0, h], 30, capacity, exact) for h in range(KV_HEADS)]
    for position in range(30, 56):
        compare(layer, naive)
        layer.token(*split(tokens, position, position + 1))
        for head in naive:
            head.step()
    compare(layer, naive)
    assert all(bool(head.quantized) == (exact < 16) for head in naive)


def test_attention_is_observed_where_a_head_is_full():
    tokens, layer = random_tokens(50), OneLayer(f"arkv(window={WINDOW})", 40)
    layer.group._high[:] = 40
    layer.prompt(*split(tokens, 0, 36))
    observed = []
    for position in range(36, 50):
        layer.token(*split(tokens, position, position + 1))
        observed.append(bool(layer.group.observing))
    # Of 41 entries a quarter of those before the window, and the fraction of one, leaves.
    assert [place for place, seen in enumerate(observed) if seen] == [4]
    assert layer.group.store.lengths.tolist() == [40] * KV_HEADS


def compare(layer: OneLayer, naive: list[Naive]) -> None:
    store, everyone = layer.group.store, layer.group.everyone
    for tier, of_low in ((store.low, True), (store.high, False)):
        positions = tier.read_column(everyone, "position")
        keys, values = tier.read(everyone)
        for head, expected in enumerate(naive):
            held = positions[head, : int(tier.lengths[head])].tolist()
            assert set(held) == (expected.quantized if of_low else set(expected.held) - expected.quantized)
            for place, token in enumerate(held):
                torch.testing.assert_close(keys[head, place], expected.key(token), rtol=1e-5, atol=1e-5)
                value = naive_fp8(expected.values[token]) if of_low else expected.values[token]
                torch.testing.assert_close(values[head, place], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_within_a_sixteenth(dtype):
    x = (torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 7).to(dtype)
    x[3] = 0
    fp8 = Float8(64, dtype)
    back = fp8.decode(fp8.encode(x))
    small = x.abs() < x.abs().amax(-1, keepdim=True) / 448 * 2**-6
    assert bool(((back - x).abs() <= x.abs() * (2**-4 + 2**-7))[~small].all())
    assert torch.equal(back[3], x[3])
    assert fp8.unit_bytes == 64 + 4


def test_preferences():
    query, keys, values = random_tokens(30)
    entropy = variance = kurtosis = 0.0
    for head, queries in enumerate(query.unflatten(1, (KV_HEADS, GROUP))[0]):
        for rows in rows_of(queries, keys[0, head], WINDOW):
            entropy -= sum(x * math.log(x + 1e-10) for row in rows for x in row)
            for i in range(len(rows[0])):
                column = [row[i] for row in rows]
                mean, unbiased = mean_and_variance(column)
                variance += unbiased
                fourth, second = (sum((x - mean) ** n for x in column) / len(column) for n in (4, 2))
                kurtosis += fourth / max(second, 1e-8) ** 2
    found = float(PrecisionCascade(WINDOW, 7.0, 5.0, 3.0).preference(prompt_view(query, keys, values))[0])
    assert found == pytest.approx(entropy ** (1 / 7) * variance ** (1 / 5) * kurtosis ** (1 / 3), rel=1e-4)


def test_layers_share_the_exact_entries_by_what_they_want():
    preferences = torch.tensor([[1.0, 3.0], [2.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    policy, capacity = Graded(preferences, 32, None), torch.full((3, 2, 1), 232)
    assert policy.high(capacity, None)[..., 0].tolist() == [[132, 232], [232, 232], [232, 232]]
    assert Graded(preferences, 32, 0.0).high(capacity, None)[..., 0].tolist() == [[32, 32], [32, 32], [232, 232]]
    assert Graded(preferences, 32, None).high(torch.full((3, 2, 1), 20), None).unique().tolist() == [20]


def read(recipe, budget, steps: int = 0) -> kvarn.Cache:
    model = make_tiny("llama")
    cache = kvarn.Cache(model, recipe, budget)
    logits_of(model, PROMPT, CONTINUATION[:steps], cache)
    return cache


def states_of(cache: kvarn.Cache) -> list[list[list[int]]]:
    group = cache._groups[0]
    return [
        [
            sorted(row[:n].tolist())
            for row, n in zip(tier.read_column(group.everyone, "position"), tier.lengths.tolist(), strict=True)
        ]
        for tier in (group.store.low, group.store.high)
    ]


class Told(PrecisionCascade):
    """Knows from the start what all layers want."""

    wanted: torch.Tensor

    def preferring(self, preferences: torch.Tensor) -> Policy:
        return super().preferring(self.wanted)


@dataclass(frozen=True)
class Foretold(ARKV):
    name = "foretold"

    def budget(self) -> Policy:
        policy = Told(self.window, self.tau1, self.tau2, self.tau3)
        object.__setattr__(policy, "wanted", self.learnt["wanted"])
        return policy


def test_budgets_in_bytes_are_used_up_and_decided_as_if_all_layers_had_been_known():
    parameters = {"window": 8, "tau1": 1.0, "tau2": 1.0, "tau3": 1.0}
    cascaded = read(ARKV(**parameters), 0.5)
    plan, report = cascaded.plan, cascaded.report()
    assert report.bytes == plan.bytes[0] <= plan.allowed[0] < 1.05 * report.bytes
    assert plan.capacity.unique().numel() == 1
    assert plan.high[:, 0, 0].unique().numel() == 4
    high = cascaded._groups[0].store.high.lengths.view(4, 1, 2)
    assert torch.equal(high, plan.high)
    assert report.peak_bytes < plan.allowed[0] + 1.2 * report.dense_bytes / 4
    share = (plan.high[:, :, 0] - 8) / (plan.capacity[:, :, 0] - 8)
    at_once = read(Recipe((Foretold(**parameters).with_learnt({"wanted": share.double()}),)), 0.5)
    assert (at_once.plan.high - plan.high).abs().max() <= 1  # shares were rounded to entries
    mine, told = states_of(cascaded), states_of(at_once)
    different = [set(a) ^ set(b) for x, y in zip(mine, told, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(map(len, different)) <= 2


def test_a_budget_in_entries_leaves_all_exact_until_a_head_is_full():
    model = make_tiny("llama")
    full = logits_of(model, PROMPT, CONTINUATION[:20], kvarn.Cache(model))
    everything = kvarn.Cache(model, "arkv(window=8)", 400)
    exact = logits_of(model, PROMPT, CONTINUATION[:20], everything)
    torch.testing.assert_close(exact, full, rtol=1e-4, atol=1e-4)
    assert everything._groups[0].store.low.lengths.max() == 0
    prompt = read("arkv(window=8, exact='none')", 60)
    assert prompt._groups[0].store.high.lengths.unique().tolist() == [60]
    assert prompt.report().bytes == prompt.plan.bytes[0]
    one, many = read("arkv(window=8, exact='none')", 60, 1), read("arkv(window=8, exact='none')", 60, 14)
    assert one._groups[0].store.high.lengths.unique().tolist() == [8]
    assert one._groups[0].store.low.lengths.unique().tolist() == [int(0.75 * 53)]
    assert many._groups[0].store.lengths.unique().tolist() == [8 + int(0.75 * 53) + 13]
    one_by_one = read("arkv(window=8, exact='all', keep=1.0)", 60, 30)
    assert one_by_one._groups[0].store.low.lengths.max() == 0
    assert one_by_one._groups[0].store.lengths.unique().tolist() == [60]


def test_bytes_are_those_of_the_paper_and_the_columns():
    layout = Recipe.parse("arkv").layout(kvarn.spec.LayerSpec(32, 8, 128, 128, None), torch.float16, 64)
    assert isinstance(layout, TieredLayout)
    tokens = torch.tensor(64 * 10_000)
    exact, coded = (int(store.bytes(tokens)) / int(tokens) - 8 for store in (layout.high, layout.low))
    assert exact == pytest.approx(4 * 128, rel=0.01)
    assert coded == pytest.approx(2 * 128 + 8, rel=0.01)


@pytest.mark.parametrize(
    "parameters",
    [{"window": 1}, {"window": 65}, {"tau3": 0.0}, {"capacity": 32}, {"gamma": -1.0}, {"exact": "some"}, {"keep": 1.1}],
)
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="arkv"):
        ARKV(**parameters)


@pytest.mark.parametrize("other", ["h2o", "kivi", "mikv"])
def test_what_a_recipe_cannot_be(other):
    with pytest.raises(RecipeError, match="cannot act together"):
        Recipe.parse(f"arkv + {other}")


@torch.no_grad()
def test_more_entries_in_fewer_bits_are_worth_more_than_fewer_exact_ones(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(topics["objects"], return_tensors="pt").input_ids[:, :205]
    predictions = []
    for recipe, budget in (("full", None), ("arkv(exact='none')", 0.3), ("arkv(exact='all')", 0.3)):
        cache = kvarn.Cache(model, recipe, budget)
        model(ids[:, :200], past_key_values=cache, logits_to_keep=1)
        assert budget is None or cache.report().ratio <= budget
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(200, 205)]
        predictions.append(torch.cat(steps).double().log_softmax(-1))
    full, quantized, evicted = predictions
    divergences = [float((full.exp() * (full - p)).sum(-1).mean()) for p in (quantized, evicted)]
    assert divergences[0] < 0.3 * divergences[1]
