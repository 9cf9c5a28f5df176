"""Sequences that join and leave a running batch, against the same sequences on their own."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvarn
from kvarn.errors import CacheMismatch, OutOfMemory
from kvarn.memory import Arena
from test_cache import PROMPT, RECIPES, two_layers
from tiny_models import make_tiny

LENGTHS = (50, 62, 37)
STEPS = torch.randint(1, 160, (3, 24), generator=torch.Generator().manual_seed(5))


def arena(ceiling: int | None = None) -> Arena:
    return Arena(torch.device("cpu"), 16, ceiling)


@torch.no_grad()
def prefilled(model: PreTrainedModel, sequence: int, recipe, budget, pools: Arena) -> kvarn.Cache:
    cache = kvarn.Cache(model, recipe, budget, arena=pools)
    model(PROMPT[:, : LENGTHS[sequence]], past_key_values=cache)
    return cache


@torch.no_grad()
def decode(model: PreTrainedModel, cache: kvarn.Cache, tokens: list[int]) -> Tensor:
    positions = torch.tensor(cache.report().tokens)[:, None]
    return model(torch.tensor(tokens)[:, None], position_ids=positions, past_key_values=cache).logits[:, -1]


class Alone:
    """Sequences decoded each in a cache of its own: what they hold and give."""

    def __init__(self, model: PreTrainedModel, recipe, budget):
        self.model = model
        self.caches = [prefilled(model, i, recipe, budget, arena()) for i in range(len(LENGTHS))]
        self.fed = [0] * len(LENGTHS)

    def step(self, sequence: int) -> tuple[int, Tensor]:
        token = int(STEPS[sequence, self.fed[sequence]])
        self.fed[sequence] += 1
        return token, decode(self.model, self.caches[sequence], [token])[0]

    def entries(self, sequence: int) -> list[list[int]]:
        return [layer[0] for layer in self.caches[sequence].report().entries]


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("architecture", "recipe", "budget"),
    [("llama", *pair) for pair in RECIPES]
    + [("gemma3", *pair) for pair in RECIPES if str(pair[0]).startswith(("full", "h2o", "mikv", "snapkv + kivi"))],
)
def test_sequences_come_and_go(architecture, recipe, budget):
    model = two_layers(architecture, recipe).double()  # in fp32 the order of additions can flip a code
    alone, pools = Alone(model, recipe, budget), arena()
    running = prefilled(model, 0, recipe, budget, pools)
    order = [0]

    def steps(count: int) -> None:
        for _ in range(count):
            each = [alone.step(sequence) for sequence in order]
            logits = decode(model, running, [token for token, _ in each])
            torch.testing.assert_close(logits, torch.stack([own for _, own in each]), rtol=1e-4, atol=1e-4)
            held = running.report().entries
            assert [[layer[i] for layer in held] for i in range(len(order))] == [alone.entries(i) for i in order]

    for sequence in (1, 2):
        running.join(prefilled(model, sequence, recipe, budget, pools))
        order.append(sequence)
        steps(2)
    gone = running.leave(0)
    order = [2, 1]
    steps(2)
    running.leave(1).free()
    running.join(gone)
    order = [2, 0]
    steps(2)
    assert running.report().tokens == [LENGTHS[i] + alone.fed[i] for i in order]
    assert running.plan.capacity.shape[1] == len(order)
    for _ in order:
        running.leave(0)
    assert running.batch_size == 0
    assert pools.bytes == 0, "every page is back"


def test_a_fork_joins_and_shared_pages_are_counted_once():
    model, pools = make_tiny("llama"), arena()
    running = prefilled(model, 0, "full", None, pools)
    before = pools.bytes
    running.join(running.fork())
    assert pools.bytes == before
    logits = decode(model, running, [5, 7])
    own = [decode(model, prefilled(model, 0, "full", None, arena()), [token])[0] for token in (5, 7)]
    torch.testing.assert_close(logits, torch.stack(own), rtol=1e-4, atol=1e-4)
    running.free()
    assert pools.bytes == 0


@pytest.mark.parametrize(
    ("recipe", "budget"),
    [
        ("full", None),
        ("h2o + mikv(low=4)", 0.4),
        ("snapkv(window=8) + think(window=8, recent=8)", 0.5),
        ("snapkv(window=8) + kivi(bits=4, group=16, residual=16)", 0.4),
        ("h2o + fp8", 0.4),
    ],
)
def test_the_host_and_back_bit_by_bit(recipe, budget):
    model, pools = make_tiny("llama"), arena()
    running = prefilled(model, 0, recipe, budget, pools)
    running.join(prefilled(model, 1, recipe, budget, pools))
    for step in STEPS[0, :8].tolist():
        running.open()
        decode(model, running, [step, step])
        running.settle()
    held = pools.bytes
    apart = running.leave(1)
    twin = apart.fork()
    apart.to_host()
    assert apart.parked_bytes > 0
    twin.free()
    assert pools.bytes < held
    pools.ceiling = held - 1
    with pytest.raises(OutOfMemory):
        apart.to_device()
    assert pools.bytes < held
    pools.ceiling = None
    apart.to_device()
    assert pools.bytes == held
    running.join(apart)
    again = prefilled(model, 0, recipe, budget, pools)
    again.join(prefilled(model, 1, recipe, budget, pools))
    for step in STEPS[0, :8].tolist():
        decode(model, again, [step, step])
    for mine, others in zip(running._groups, again._groups, strict=True):
        for ours, theirs in zip(mine.store.read(mine.everyone), others.store.read(others.everyone), strict=True):
            assert torch.equal(ours, theirs)


def test_a_step_that_is_opened_by_hand():
    model, pools = make_tiny("gemma3"), arena()
    running = prefilled(model, 0, "h2o", 40, pools)
    running.to_host()
    with pytest.raises(CacheMismatch, match="between two passes"):
        running.open()
    running.to_device()
    running.open()
    with pytest.raises(CacheMismatch, match="another pass"), torch.no_grad():
        model(PROMPT[:, :3], past_key_values=running)
    decode(model, running, [3])
    with pytest.raises(CacheMismatch, match="settle"):
        decode(model, running, [3])
    alone = running.leave(0)
    alone.settle()
    own = prefilled(model, 0, "h2o", 40, arena())
    decode(model, own, [3])
    assert alone.report().entries == own.report().entries


def test_an_empty_cache_takes_over_all():
    model, pools = make_tiny("llama"), arena()
    running, first = kvarn.Cache(model, arena=pools), prefilled(model, 0, "full", None, pools)
    running.join(first)
    assert running.report().tokens == [50]
    assert first.batch_size == -1
    assert first.report().bytes == 0


def test_another_turn_of_joined_sequences():
    model, pools = make_tiny("llama"), arena()
    running = prefilled(model, 0, "snapkv(window=8)", 40, pools)
    running.join(prefilled(model, 2, "snapkv(window=8)", 40, pools))
    positions = torch.tensor([[50], [37]]) + torch.arange(12)
    with torch.no_grad():
        both = model(PROMPT[:, 50:62].expand(2, -1), position_ids=positions, past_key_values=running).logits
        for i, length in enumerate((50, 37)):
            cache = prefilled(model, 2 * i, "snapkv(window=8)", 40, arena())
            own = model(PROMPT[:, 50:62], position_ids=positions[i : i + 1], past_key_values=cache).logits
            torch.testing.assert_close(both[i : i + 1], own, rtol=1e-3, atol=1e-3)
            assert length + 12 == cache.get_seq_length()


def test_a_ceiling_is_shared_and_refuses_before_anything_changed():
    model = make_tiny("llama")
    free = arena()
    prefilled(model, 0, "full", None, free).report()
    pools = arena(int(1.5 * free.peak_bytes))
    first = prefilled(model, 0, "full", None, pools)
    held = pools.bytes
    with pytest.raises(OutOfMemory):
        prefilled(model, 1, "full", None, pools)
    assert pools.bytes == held, "what was refused gives back what its first layers took"
    assert first.report().tokens == [50]


def test_refusals():
    model, pools = make_tiny("llama"), arena()
    running = prefilled(model, 0, "full", None, pools)
    others = {
        "itself": running,
        "another model": prefilled(make_tiny("llama"), 1, "full", None, pools),
        "recipe": prefilled(model, 1, "h2o", 40, pools),
        "arena": prefilled(model, 1, "full", None, arena()),
        "nothing": kvarn.Cache(model, arena=pools),
    }
    for reason, other in others.items():
        with pytest.raises(CacheMismatch, match=reason):
            running.join(other)
    with pytest.raises(CacheMismatch, match="sequence 1 of 1"):
        running.leave(1)
    assert running.report().tokens == [50]


@pytest.mark.parametrize(
    ("recipe", "budget"), [("snapkv(window=8)", 0.5), ("h2o", 24), ("kivi(bits=4, group=16, residual=16)", None)]
)
def test_chunks_of_a_prompt_that_is_expected(recipe, budget):
    """The capacities are those of the whole prompt from the first chunk on, and the peak stays near them."""
    model = make_tiny("llama")
    whole, chunked = kvarn.Cache(model, recipe, budget), kvarn.Cache(model, recipe, budget)
    chunked.expect(90)
    with torch.no_grad():
        model(PROMPT, past_key_values=whole)
        for first in range(0, 90, 16):
            model(PROMPT[:, first : first + 16], past_key_values=chunked)
            if whole.recipe.names == ["h2o"]:
                assert torch.equal(chunked.plan.capacity, whole.plan.capacity)
    assert chunked.report().tokens == [90]
    assert chunked.report().entries == whole.report().entries or budget == 0.5
    with torch.no_grad():
        model(PROMPT[:, :1], past_key_values=chunked)
    assert chunked.get_seq_length() == 91
