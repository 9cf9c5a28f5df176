"""CAKE against the paper's algorithm in plain loops (arXiv 2503.12491)."""

import math
from dataclasses import dataclass
from pydoc_data.topics import topics

import pytest
import torch
from one_layer import GROUP, KV_HEADS, VARIANT, OneLayer, probabilities, random_tokens, split

import kvarn
from kvarn.attention import Part
from kvarn.budgets import Policy, Preferred, Restlessness
from kvarn.budgets.policy import Uniform
from kvarn.errors import RecipeError
from kvarn.methods.cake import CAKE
from kvarn.methods.kivi import KIVI
from kvarn.recipe import Recipe
from kvarn.scoring import PromptView
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 200), generator=torch.Generator().manual_seed(1))
WINDOW = 4
NONE = torch.zeros(4, dtype=torch.bool)  # layers that are kept whole


def rows_of(queries, keys, window: int) -> list[list[list[float]]]:
    """For each query head, what each of the last ``window`` queries pays to the entries before them."""
    length = keys.shape[0]
    rows = [[probabilities(query[p], keys[: p + 1]) for p in range(length - window, length)] for query in queries]
    return [[row[: length - window] for row in head] for head in rows]


def mean_and_variance(column: list[float]) -> tuple[float, float]:
    mean = sum(column) / len(column)
    return mean, sum((x - mean) ** 2 for x in column) / (len(column) - 1)


def naive_kept(queries, keys, window: int, gamma: float, capacity: int) -> list[int]:
    prefix = keys.shape[0] - window
    worth = [0.0] * prefix
    for head in rows_of(queries, keys, window):
        marks = [(lambda m, v: m + gamma * v)(*mean_and_variance([row[i] for row in head])) for i in range(prefix)]
        for i in range(prefix):
            worth[i] += sum(marks[max(0, i - 2) : i + 3]) / 5 / len(queries)
    best = sorted(range(prefix), key=lambda i: -worth[i])[: capacity - window]
    return sorted(best) + list(range(prefix, keys.shape[0]))


@pytest.mark.parametrize("gamma", [0.0, 200.0])
def test_the_same_entries_as_the_paper(gamma) -> None:
    tokens = random_tokens(40)
    layer = OneLayer(f"cake(window={WINDOW}, gamma={gamma})", capacity=14)
    layer.prompt(*tokens)
    queries = tokens[0].unflatten(1, (KV_HEADS, GROUP))[0]
    expected = [naive_kept(queries[h], tokens[1][0, h], WINDOW, gamma, 14) for h in range(KV_HEADS)]
    assert layer.positions() == expected


def test_decoding_lets_go_of_what_the_newest_query_reads_least() -> None:
    tokens = random_tokens(41)
    layer = OneLayer(f"cake(window={WINDOW})", capacity=14)
    layer.prompt(*split(tokens, 0, 40))
    before = [[*row, 40] for row in layer._rows("position")]
    layer.token(*split(tokens, 40, 41))
    for head, positions in enumerate(before):
        marks = [0.0] * len(positions)
        for query in tokens[0].unflatten(1, (KV_HEADS, GROUP))[0, head]:
            row = probabilities(query[40], tokens[1][0, head, positions])
            row = [0.0 if p > 40 - WINDOW else x for x, p in zip(row, positions, strict=True)]
            for i in range(len(row)):
                marks[i] += sum(row[max(0, i - 2) : i + 3]) / 5
        old = [i for i, p in enumerate(positions) if p <= 40 - WINDOW]
        gone = positions[min(old, key=lambda i: marks[i])]
        assert layer.positions()[head] == sorted(set(positions) - {gone})


def prompt_view(query, keys, values) -> PromptView:
    """What a score sees of a first prompt."""
    positions = torch.arange(keys.shape[2])

    def parts(queries):
        visible = positions <= queries[:, :, None]
        return (Part(keys, values, visible[:, None]),)

    of_heads = positions.expand(1, KV_HEADS, -1)
    whole, seen = (Part(keys, values, causal=True),), torch.tensor([len(positions)])
    return PromptView(query, positions[None], whole, VARIANT, of_heads, seen, {"position": of_heads}, parts)


def test_preferences() -> None:
    query, keys, values = random_tokens(30)
    view = prompt_view(query, keys, values)
    entropy = variance = 0.0
    for head, queries in enumerate(query.unflatten(1, (KV_HEADS, GROUP))[0]):
        for rows in rows_of(queries, keys[0, head], WINDOW):
            entropy -= sum(x * math.log(x + 1e-10) for row in rows for x in row)
            variance += sum(mean_and_variance([row[i] for row in rows])[1] for i in range(len(rows[0])))
    found = float(Restlessness(WINDOW, 1.6, 0.4).preference(view)[0])
    assert found == pytest.approx(entropy ** (1 / 1.6) * variance ** (1 / 0.4), rel=1e-4)


class Given(Uniform):
    def __init__(self, capacity):
        self.capacity = capacity

    def entries(self, level, heads):
        return self.capacity


@dataclass(frozen=True)
class Fixed(CAKE):
    """CAKE whose layers are told at once how much they may keep."""

    name = "fixed"

    def budget(self) -> Policy:
        return Given(self.learnt["capacity"])


def read(recipe, budget, prompt=PROMPT) -> kvarn.Cache:
    model = make_tiny("llama")
    cache = kvarn.Cache(model, recipe, budget)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    return cache


def positions_of(cache: kvarn.Cache) -> list[list[int]]:
    store = cache._groups[0].store
    rows = store.read_column(cache._groups[0].everyone, "position")
    return [sorted(row[:n].tolist()) for row, n in zip(rows, store.lengths.tolist(), strict=True)]


def test_a_cascade_keeps_what_one_division_at_the_end_would() -> None:
    cascaded = read(CAKE(window=8), 0.4)
    capacity = cascaded.plan.capacity
    assert capacity[:, 0, 0].unique().numel() > 1
    at_once = read(Recipe((Fixed(window=8).with_learnt({"capacity": capacity}),)), 0.4)
    assert positions_of(cascaded) == positions_of(at_once)
    assert torch.equal(torch.tensor(cascaded.report().entries), capacity)
    report = cascaded.report()
    assert 0.95 * cascaded.plan.allowed[0] < report.bytes == cascaded.plan.bytes[0] <= cascaded.plan.allowed[0]
    dense_layer = report.dense_bytes / 4
    assert report.peak_bytes < cascaded.plan.allowed[0] + 1.1 * dense_layer


def test_layers_that_were_cut_on_the_way_are_encoded_once() -> None:
    kivi = KIVI(bits=2, group=8, residual=16)
    cascaded = read(CAKE(window=8) + kivi, 0.3)
    fixed = Fixed(window=8).with_learnt({"capacity": cascaded.plan.capacity})
    at_once = read(Recipe((fixed, kivi)), 0.3)
    assert torch.equal(torch.tensor(cascaded.report().entries), torch.tensor(at_once.report().entries))
    for mine, theirs in zip(*(cache._groups[0].store.read(slice(0, 8)) for cache in (cascaded, at_once)), strict=True):
        for head, length in enumerate(cascaded._groups[0].store.lengths.tolist()):
            assert length > 16
            torch.testing.assert_close(mine[head, :length], theirs[head, :length])


def test_large_taus_are_uniform_and_what_fits_is_left_alone() -> None:
    even = read(CAKE(window=8, tau1=1e9, tau2=1e9), 60)
    assert {n for layer in even.report().entries for n in layer[0]} <= {59, 60}
    assert read(CAKE(window=8), 400).report().entries == [[[200, 200]]] * 4


def test_a_layer_that_wants_more_gets_more() -> None:
    planner = Recipe.parse("cake(window=8)").planner(read("full", None).spec, 50, [200])
    wanted = torch.tensor([[1.0], [2.0], [3.0], [2.0]], dtype=torch.float64)
    assert planner.divided(Preferred(wanted, NONE)).capacity[:, 0, 0].tolist() == [25, 50, 75, 50]
    wanted[2:] = 0  # not seen yet
    partly = planner.divided(Preferred(wanted, NONE)).capacity[:, 0, 0]
    assert int(partly.sum()) <= 200
    assert abs(int(partly[1]) - 2 * int(partly[0])) <= 1
    assert partly[2:].tolist() == [9, 9]  # the least, until they are seen
    assert Preferred(torch.tensor([[1.0], [0.0]]), NONE[:2]).shares.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize(
    "parameters", [{"window": 1}, {"window": 65}, {"tau1": 0.0}, {"capacity": 32}, {"gamma": -1.0}]
)
def test_bad_parameters(parameters) -> None:
    with pytest.raises(RecipeError, match="cake"):
        CAKE(**parameters)


class Reversed(Restlessness):
    def preference(self, view):
        return 1 / super().preference(view)


@dataclass(frozen=True)
class LeastWanted(CAKE):
    name = "leastwanted"

    def budget(self) -> Policy:
        return Reversed(self.window, self.tau1, self.tau2)


@torch.no_grad()
def test_layers_that_want_more_are_the_ones_that_need_it(smollm2) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(topics["objects"], return_tensors="pt").input_ids[:, :305]
    predictions = []
    for recipe, budget in (("full", None), (CAKE(), 0.2), (LeastWanted(), 0.2)):
        cache = kvarn.Cache(model, recipe, budget)
        model(ids[:, :300], past_key_values=cache, logits_to_keep=1)
        assert budget is None or cache.report().ratio <= budget
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(300, 305)]
        predictions.append(torch.cat(steps).double().log_softmax(-1))
    full, wanted, reversed_ = predictions
    divergences = [float((full.exp() * (full - p)).sum(-1).mean()) for p in (wanted, reversed_)]
    assert divergences[0] < 0.5 * divergences[1]
