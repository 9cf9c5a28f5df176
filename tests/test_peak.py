"""What a prompt takes at its peak, as planned and as it was."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvarn
from kvarn.engine.scheduler import Sizes
from tiny_models import make_tiny

RECIPES = [
    "full",
    "snapkv(window=8)",
    "kivi(bits=4, group=16, residual=16)",
    "snapkv(window=8) + kivi(bits=2, group=16, residual=16)",
    "h2o",
]
ROW = 2 * 2 * 16 * 4  # a key and a value for each KV head, fp32


@cache
def model():
    return make_tiny("llama", num_hidden_layers=2)


def ids(batch: int, count: int) -> torch.Tensor:
    return torch.randint(1, 160, (batch, count), generator=torch.Generator().manual_seed(count))


def read(held: kvarn.Cache, tokens: torch.Tensor, chunk: int) -> None:
    with torch.no_grad():
        for part in tokens.split(chunk, 1):
            model()(part, past_key_values=held)


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(2, 120),
    chunk=st.integers(8, 80),
    later=st.integers(1, 20),
    budget=st.sampled_from([None, 40, 100]),
    page_size=st.sampled_from([4, 16]),
    batch=st.integers(1, 2),
    announced=st.booleans(),
)
def test_a_prompt_never_takes_more_than_planned(recipe, tokens, chunk, later, budget, page_size, batch, announced):
    budget = None if "snapkv" not in recipe and recipe != "h2o" else budget
    held = kvarn.Cache(model(), recipe, budget, page_size=page_size)
    if announced := announced or tokens % chunk == 1:  # one token alone would be a decoding step
        held.expect(tokens)
    read(held, ids(batch, tokens), chunk)
    first = held.report().peak_bytes
    assert first <= sum(held.plan.peak)
    if announced:
        sizes = Sizes(held.recipe, held.spec, budget, page_size, chunk)
        assert first <= batch * sizes.peak(tokens)
    read(held, ids(batch, later), 1)
    if later > 1:
        held._arena.peak_bytes = 0  # what decoding has added is no part of a prompt's plan
        read(held, ids(batch, later), later)
        assert held.report().peak_bytes <= sum(held.plan.peak)


@pytest.mark.parametrize(("recipe", "budget"), [("full", None), ("snapkv(window=8)", 24)])
def test_a_dense_prompt_takes_what_is_planned(recipe, budget):
    held = kvarn.Cache(model(), recipe, budget)
    held.expect(160)
    read(held, ids(1, 160), 160)
    assert held.report().peak_bytes == held.plan.peak[0] == held.plan.bytes[0] + 160 * ROW
    chunked = held.empty()
    chunked.expect(160)
    read(chunked, ids(1, 160), 40)
    stored = 120 if recipe == "full" else 24
    assert chunked.plan.peak[0] >= chunked.report().peak_bytes == chunked.plan.bytes[0] + (40 + stored) * ROW


def test_layers_with_windows():
    gemma = make_tiny("gemma2")
    held = kvarn.Cache(gemma, "full")
    for part in ids(1, 90).split(25, 1):
        gemma(part, past_key_values=held)
        assert held.report().peak_bytes <= held.plan.peak[0]


def test_plans_of_sequences_keep_their_peaks():
    both = kvarn.Cache(model(), "full")
    read(both, ids(2, 30), 30)
    assert both.plan.selected([1]).peak == [both.plan.peak[1]]
    assert both.plan.joined(both.plan.selected([0])).peak == [*both.plan.peak, both.plan.peak[0]]


def test_a_request_is_admitted_by_its_peak():
    """One layer's prompt in hand does not fit beside a sequence that runs, though its pages would."""
    free = kvarn.Engine(model(), "snapkv(window=8)", 16, page_size=4)
    prompt, short = ids(1, 400)[0].tolist(), ids(1, 8)[0].tolist()
    most, peak = free._sizes.most(400, 8), free._sizes.peak(400)
    assert peak > 3 * most
    for memory, together in ((peak + 8 * most, 2), (2 * most + peak // 2, 1)):
        engine = kvarn.Engine(model(), "snapkv(window=8)", 16, page_size=4, memory=memory)
        for each in (short, prompt):
            engine.add(each, kvarn.Sampling(max_tokens=8))
        engine.step()
        assert engine.running == together
        while engine.busy:
            engine.step()
        assert engine.arena.bytes == 0
