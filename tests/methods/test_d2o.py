"""D2O against the paper's algorithm in plain loops (arXiv 2406.13035, section 3)."""

import math
import statistics
from dataclasses import dataclass

import pytest
import torch
from one_layer import (
    GROUP,
    KV_HEADS,
    VARIANT,
    NaiveHead,
    OneLayer,
    assert_same_rows,
    in_step,
    probabilities,
    random_tokens,
    split,
)
from real_text import divergences
from torch.nn.functional import cosine_similarity

import kvarn
from kvarn.attention import Part
from kvarn.budgets import Density, Uniform
from kvarn.errors import BudgetError, RecipeError
from kvarn.methods.d2o import D2O
from kvarn.recipe import Recipe
from kvarn.scoring import PromptView
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 200), generator=torch.Generator().manual_seed(1))


class NaiveD2O(NaiveHead):
    def __init__(self, capacity: int, sinks: int, recent: int, memory: float):
        super().__init__()
        self.capacity, self.sinks, self.recent, self.memory = capacity, sinks, recent, memory
        self.threshold: float | None = None

    def reduce(self, seen: int) -> None:
        count = len(self.entries) - self.capacity
        if count <= 0:
            return
        open_ = [e for e in self.entries if self.sinks <= e.position < seen - self.recent]
        gone = sorted(open_, key=lambda e: e.mass)[:count]
        kept = [e for e in self.entries if e not in gone]
        nearest = [max((float(cosine_similarity(g.key, e.key, dim=0)), e.position) for e in kept) for g in gone]
        mean = sum(u for u, _ in nearest) / count
        old = self.threshold
        self.threshold = mean if old is None else self.memory * old + (1 - self.memory) * mean
        for e in kept:
            joins = [(math.exp(u), g) for (u, p), g in zip(nearest, gone, strict=True) if p == e.position]
            joins = [(w, g) for w, g in joins if math.log(w) >= self.threshold - 1e-6]
            total = math.e + sum(w for w, _ in joins)
            e.key, e.value = (
                (math.e * getattr(e, side) + sum(w * getattr(g, side) for w, g in joins)) / total
                for side in ("key", "value")
            )
        self.entries = kept


@pytest.mark.parametrize("memory", [0.5, 0.9])
def test_the_same_entries_as_the_paper(memory):
    capacity = 12
    layer = OneLayer(f"d2o(sinks=2, memory={memory})", capacity)
    naive = [NaiveD2O(capacity, 2, 6, memory) for _ in range(KV_HEADS)]
    for _ in in_step(layer, naive, random_tokens(40), prompt=24):
        assert_same_rows(layer, naive)
    assert layer.by_position("threshold")[0][0] == pytest.approx(naive[0].threshold, abs=1e-4)


def test_what_is_equal_to_one_that_stays_changes_nothing():
    query, keys, values = random_tokens(30)
    keys[:], values[:] = keys[:, :, :1], values[:, :, :1]
    layer = OneLayer("d2o(sinks=2)", 12)
    layer.prompt(query, keys, values)
    for mine, theirs in zip(layer.keys_and_values(), (keys, values), strict=True):
        torch.testing.assert_close(mine, theirs[0, :, :12])


def test_the_entries_that_stay_are_those_of_h2o_at_first():
    tokens = random_tokens(40)
    layer, h2o = OneLayer("d2o(sinks=0)", 12), OneLayer("h2o", 12)
    for recipe in (layer, h2o):
        recipe.prompt(*tokens)
    assert layer.positions() == h2o.positions()
    assert not torch.equal(layer.keys_and_values()[0], h2o.keys_and_values()[0])


def test_room_for_everything_changes_nothing():
    tokens = random_tokens(30)
    layer, full = OneLayer("d2o", 30), OneLayer("full")
    assert torch.equal(layer.prompt(*split(tokens, 0, 20)), full.prompt(*split(tokens, 0, 20)))
    for position in range(20, 30):
        now = split(tokens, position, position + 1)
        torch.testing.assert_close(layer.token(*now), full.token(*now), rtol=1e-5, atol=1e-5)


def test_the_density_of_a_layer():
    query, keys, values = random_tokens(30)
    positions = torch.arange(30).expand(1, KV_HEADS, -1)
    parts = (Part(keys, values, causal=True),)
    view = PromptView(query, positions[:, 0], parts, VARIANT, positions, torch.tensor([30]), {}, lambda queries: parts)
    variances = []
    for head in range(KV_HEADS * GROUP):
        mass = [0.0] * 30
        for position in range(30):
            row = probabilities(query[0, head, position], keys[0, head // GROUP, : position + 1])
            mass = [x + y for x, y in zip(mass, row + [0.0] * 30, strict=False)]
        variances.append(statistics.variance(mass))
    least, greatest = min(variances), max(variances)
    sparse = sum((v - least) / (greatest - least + 1e-6) for v in variances) / len(variances)
    assert float(Density(0, 0).preference(view)) == pytest.approx(math.exp(-sparse), rel=1e-4)


def read(method, budget, prompt=PROMPT):
    model = make_tiny("llama")
    cache = kvarn.Cache(model, method, budget)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    return cache


def held(cache) -> list[int]:
    return [layer[0][0] for layer in cache.report().entries]


def test_layers_at_both_ends_keep_everything_and_the_others_share_what_is_left():
    cache = read("d2o(first_layers=1)", 0.8)
    assert (held(cache)[0], held(cache)[3]) == (200, 200)
    assert all(40 < entries < 130 for entries in held(cache)[1:3])
    assert 0.9 * cache.plan.allowed[0] < cache.report().bytes <= cache.plan.allowed[0]
    unasked = held(read("d2o(first_layers=1, heavy=0.2, recent=0.3)", None))
    assert (unasked[0], unasked[3]) == (200, 200)
    assert 196 <= sum(unasked[1:3]) <= 200  # half of the prompt on average
    with pytest.raises(BudgetError, match=r"d2o needs at least [\d,]+ bytes"):
        read("d2o", 0.5)
    assert held(read("d2o", None)) == [200, 200, 40, 200]


@dataclass(frozen=True)
class AtOnce(D2O):
    """D2O whose layers are told at once how much they may keep."""

    name = "atonce"

    def budget(self):
        return Given(self.learnt["capacity"])


class Given(Uniform):
    def __init__(self, capacity):
        self.capacity = capacity

    def entries(self, level, heads):
        return self.capacity

    def unasked(self, heads):
        return heads.lengths


@pytest.mark.parametrize("more", ["", " + gear(group=8, block=16)", " + kivi(bits=8, group=4, residual=16)"])
def test_layers_cut_on_the_way_hold_the_tokens_of_one_division_at_the_end(more):
    cascaded = read("d2o(first_layers=1, last_layers=0)" + more, 0.7)
    capacity = cascaded.plan.capacity
    assert capacity[1:, 0, 0].unique().numel() > 1
    at_once = AtOnce().with_learnt({"capacity": capacity})
    at_once = read(Recipe((at_once, *Recipe.parse("d2o" + more).methods[1:])), None)
    assert positions_of(cascaded) == positions_of(at_once)
    assert held(cascaded)[0] == 200
    assert cascaded.report().bytes <= cascaded.plan.allowed[0]


def positions_of(cache) -> list[list[int]]:
    store = cache._groups[0].store
    rows = store.read_column(cache._groups[0].everyone, "position")
    return [sorted(row[:n].tolist()) for row, n in zip(rows, store.lengths.tolist(), strict=True)]


@pytest.mark.parametrize(
    "parameters",
    [{"heavy": 0.0, "recent": 0.0}, {"sinks": -1}, {"memory": 1.5}, {"interval": 0}, {"first_layers": -1}],
)
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="d2o"):
        D2O(**parameters)


@dataclass(frozen=True)
class Even(D2O):
    """D2O whose layers all have the same budget."""

    name = "even"

    def budget(self):
        return Uniform()


def test_on_a_real_text_layer_budgets_bring_it_closer(smollm2):
    density = D2O(first_layers=0, last_layers=0)
    dense, even = divergences(smollm2, [(density, 100), (Even(), 100)], prompt=350, steps=6)
    assert dense < 0.8 * even
