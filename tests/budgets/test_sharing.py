"""What heads can take that share entries: never less than any division takes."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvarn
from kvarn.budgets import most_on_average
from kvarn.methods import Method
from kvarn.recipe import Recipe
from kvarn.reduction import Eviction
from kvarn.scoring import WindowMass
from tiny_models import make_tiny


@dataclass(frozen=True)
class AdaSnap(Method):
    """SnapKV's votes, and heads that share what a layer keeps."""

    name = "adasnap"

    def eviction(self) -> Eviction:
        return Eviction(WindowMass(8, 7, "max"), default=100, sinks=2, recent=8, across_heads=True)


LAYER = kvarn.Cache(make_tiny("llama")).spec.layers[0]


def layout_costs(recipe: str, page: int, most: int) -> torch.Tensor:
    return Recipe.parse(recipe).layout(LAYER, torch.float32, page).bytes(torch.arange(most + 1))


@given(st.sampled_from(["snapkv", "h2o + kivi(bits=4, group=8, residual=16)"]), st.integers(1, 20), st.integers(1, 60))
@settings(max_examples=25)
def test_no_division_takes_more(recipe: str, page: int, longest: int) -> None:
    entries = torch.arange(longest + 5).clamp(max=longest)[None]
    costs = layout_costs(recipe, page, longest)[entries]
    most = most_on_average(costs, entries)[0]
    assert bool((most[1:] >= most[:-1]).all())
    assert int(most[longest]) == int(costs.max())
    for one, other in itertools.product(range(longest + 1), repeat=2):
        average = -(-(one + other) // 2)
        assert int(costs[0, one] + costs[0, other]) <= 2 * int(most[average])


def test_pages_of_one_format_are_priced_as_the_worst_division() -> None:
    page, heads, longest = 16, 16, 200
    costs = 3 + 100 * ((torch.arange(longest + 1) + page - 1) // page)
    most = most_on_average(costs[None], torch.arange(longest + 1)[None])[0]
    for average in range(1, longest):
        spare = heads * average - heads  # beyond one entry in each head, every page of 16 opens another
        pages = min(spare // page + heads, heads * (-(-longest // page)))
        worst = heads * 3 + 100 * pages
        assert worst <= heads * int(most[average]) <= worst + 100 + heads


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9, 1.5])
@pytest.mark.parametrize("encode", ["", " + kivi(bits=8, group=8, residual=16)"])
@torch.no_grad()
def test_plans_hold_whatever_the_division(budget: float, encode: str) -> None:
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "epicache(block=40, tail=8)" + encode, budget)
    prompt = torch.randint(1, 160, (1, 190))
    try:
        model(prompt, past_key_values=cache)
    except kvarn.errors.BudgetError:
        assert budget == 0.2
        return
    report = cache.report()
    assert report.bytes <= cache.plan.bytes[0] <= cache.plan.allowed[0]
    assert report.bytes > 0.75 * min(cache.plan.allowed[0], report.bytes + 1)
    if not encode:
        capacity = cache.plan.capacity[:, 0].sum(1)
        assert torch.equal(torch.tensor(report.entries)[:, 0].sum(1), capacity.clamp(max=380))


@torch.no_grad()
def test_another_score_may_be_shared_over_heads_too() -> None:
    model = make_tiny("llama")
    prompt = torch.randint(1, 160, (1, 190))
    shared, alone = kvarn.Cache(model, AdaSnap(), 40), kvarn.Cache(model, "snapkv(window=8)", 40)
    for cache in (shared, alone):
        model(prompt, past_key_values=cache)
    entries = torch.tensor(shared.report().entries)[:, 0]
    assert entries.sum(1).tolist() == [80] * 4
    assert bool((entries != 40).any())
    group = shared._groups[0]
    for row, length in zip(
        group.store.read_column(group.everyone, "position").tolist(), group.store.lengths.tolist(), strict=True
    ):
        assert {0, 1, *range(182, 190)} <= set(row[:length])
    for _ in range(3):  # decoding keeps what comes in every head
        model(prompt[:, :1], past_key_values=shared)
    assert torch.equal(torch.tensor(shared.report().entries)[:, 0], entries + 3)
    with pytest.raises(AssertionError, match="end of prompts only"):
        Eviction(WindowMass(8, 7, "max"), default=100, across_heads=True, decode=True)
