"""RazorAttention against the paper's algorithm in plain loops (arXiv 2407.15891)."""

import math
from pydoc_data.topics import topics

import pytest
import torch
from one_layer import SIZE, OneLayer, random_tokens, split

import kvarn
from kvarn.budgets import UNBOUNDED
from kvarn.budgets.echoes import HeadSearch
from kvarn.errors import RecipeError
from kvarn.methods.razorattention import RazorAttention
from kvarn.recipe import Recipe
from tiny_models import make_tiny

ECHO = torch.tensor([[0.1, 0.9], [0.2, 0.3], [0.1, 0.1], [0.0, 0.0]])
INDUCTION = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.9, 0.6], [0.7, 0.8]])
PROMPT = torch.randint(1, 160, (1, 120), generator=torch.Generator().manual_seed(1))
# Retrieval heads of SmolLM2-135M-Instruct as its calibration found them: layer and KV head.
SMOLLM2 = [
    (14, 1),
    (17, 1),
    (18, 2),
    (20, 1),
    (20, 2),
    (21, 2),
    (22, 1),
    (22, 2),
    (23, 0),
    (23, 1),
    (23, 2),
    (24, 0),
    (24, 1),
    (24, 2),
]
SINKS, CAPACITY = 2, 11  # of entries: two sinks, the compensation entry, eight near ones


def one_layer(interval: int = 1) -> OneLayer:
    """Head 0 is compressed, head 1 a retrieval head."""
    layer = OneLayer(f"razorattention(sinks={SINKS}, interval={interval})")
    layer.group.capacity = torch.tensor([[[CAPACITY, UNBOUNDED]]])
    return layer


class NaiveHead:
    """One compressed head: the positions it keeps and those it has folded."""

    def __init__(self, keys, values):
        self.keys, self.values, self.kept, self.folded = keys, values, [], []

    def add(self, first: int, last: int, at_once: int) -> None:
        self.kept += range(first, last)
        while len(self.kept) + bool(self.folded) > CAPACITY:
            for _ in range(at_once if self.folded else at_once + 1):  # the first becomes the compensation entry
                self.folded.append(self.kept.pop(SINKS))

    def attend(self, query, more: list[int]) -> torch.Tensor:
        read = [(self.keys[p], self.values[p], 1) for p in self.kept + more]
        if self.folded:
            key, value = (sum(rows[p] for p in self.folded) / len(self.folded) for rows in (self.keys, self.values))
            read.append((key, value, len(self.folded)))
        weights = [n * math.exp(float(query @ key) / math.sqrt(SIZE)) for key, _, n in read]
        return sum(w * value for w, (_, value, _) in zip(weights, read, strict=True)) / sum(weights)


@pytest.mark.parametrize("interval", [1, 4])
def test_what_is_dropped_counts_as_often_at_its_mean(interval) -> None:
    query, keys, values = tokens = random_tokens(60)
    layer, full = one_layer(interval), OneLayer("full")
    naive = NaiveHead(keys[0, 0], values[0, 0])
    assert torch.equal(layer.prompt(*split(tokens, 0, 30)), full.prompt(*split(tokens, 0, 30)))
    naive.add(0, 30, 1)
    for position in range(30, 45):
        out = layer.token(*split(tokens, position, position + 1))
        theirs = full.token(*split(tokens, position, position + 1))
        torch.testing.assert_close(out[:, 2:], theirs[:, 2:])  # the retrieval head reads everything
        for head in (0, 1):
            expected = naive.attend(query[0, head, position], [position])
            torch.testing.assert_close(out[0, head, 0], expected, rtol=1e-4, atol=1e-4)
        naive.add(position, position + 1, interval)
        positions, counts = layer._rows("position")[0], layer._rows("count")[0]
        assert sorted(positions) == sorted([*naive.kept, SINKS])
        assert dict(zip(positions, counts, strict=True))[SINKS] == len(naive.folded)
    # A second turn reads the compensation entry and adds to it.
    out = layer.prompt(*split(tokens, 45, 59))
    torch.testing.assert_close(out[0, 0, 0], naive.attend(query[0, 0, 45], [45]), rtol=1e-4, atol=1e-4)
    naive.add(45, 59, 1)
    assert sorted(layer._rows("position")[0]) == sorted([*naive.kept, SINKS])
    out = layer.token(*split(tokens, 59, 60))
    torch.testing.assert_close(out[0, 0, 0], naive.attend(query[0, 0, 59], [59]), rtol=1e-4, atol=1e-4)


def test_equal_entries_fold_without_loss() -> None:
    query, keys, values = random_tokens(40)
    keys[:, 0, SINKS:32], values[:, 0, SINKS:32] = keys[:, 0, 5:6], values[:, 0, 5:6]
    layer, full = one_layer(), OneLayer("full")
    for recipe in (layer, full):
        recipe.prompt(*split((query, keys, values), 0, 39))
    ours, theirs = (recipe.token(*split((query, keys, values), 39, 40)) for recipe in (layer, full))
    torch.testing.assert_close(ours, theirs)


def razor(**parameters) -> Recipe:
    method = RazorAttention(**{"sinks": 2, "buffer": 20, "interval": 4} | parameters)
    return Recipe((method.with_learnt({"echo": ECHO, "induction": INDUCTION}),))


def run(recipe, budget=None) -> tuple[kvarn.Cache, torch.Tensor]:
    model = make_tiny("llama")
    cache = kvarn.Cache(model, recipe, budget)
    with torch.no_grad():
        logits = [model(PROMPT, past_key_values=cache).logits[:, -1:]]
        logits += [model(PROMPT[:, i : i + 1], past_key_values=cache).logits for i in range(20)]
    return cache, torch.cat(logits, 1)


def test_the_best_of_all_layers_are_retrieval_heads() -> None:
    cache, _ = run(razor(echo=0.125, induction=0.25))
    held = torch.tensor(cache.report().entries)[:, 0]
    assert (held == 140).nonzero().tolist() == [[0, 1], [2, 0], [3, 1]]
    # Of 120 tokens max(20, 120 // 5) near ones, two sinks and the compensation entry.
    assert cache.plan.capacity.min() == 27
    assert set(held[held < 140].tolist()) <= set(range(24, 28))
    both = run(razor(echo=0.25, induction=0.5))[0].plan.capacity[:, 0] == UNBOUNDED
    assert both.nonzero().tolist() == [[0, 1], [1, 1], [2, 0], [2, 1], [3, 0], [3, 1]]


def test_where_nothing_is_dropped_it_is_full() -> None:
    full = run("full")[1]
    torch.testing.assert_close(run(razor(echo=1.0))[1], full, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(razor(buffer=200))[1], full, rtol=1e-4, atol=1e-4)


def test_the_buffer_takes_what_the_budget_leaves() -> None:
    small, large = (run(razor(echo=0.125, induction=0.25), b)[0].plan.capacity.min() for b in (0.6, 0.8))
    assert 15 < int(small) < int(large) < 120


def test_scores_of_heads_that_only_look_back() -> None:
    echo, induction = torch.zeros(16, 16), torch.zeros(16, 16)
    for i in range(6, 16):
        echo[i, i - 5] = 1
        induction[i, i - 4] = 1
    scores = HeadSearch(tokens=5, repeats=3).scored(torch.stack([echo, induction]))
    assert scores.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_the_search_reads_blocks_of_distinct_tokens() -> None:
    model, search = make_tiny("llama"), HeadSearch(tokens=20)
    found = search.run(model, None, "", lambda done, total: None)
    assert {name: scores.shape for name, scores in found.items()} == {"echo": (4, 2), "induction": (4, 2)}
    assert all(float(s.min()) > 0 and float(s.max()) < 1 for s in found.values())
    blocks = search.sequence(model)[0, 1:].view(4, 20)
    assert blocks.unique(dim=0).shape == (1, 20)
    assert blocks[0].unique().numel() == 20


@pytest.mark.parametrize("parameters", [{"sinks": -1}, {"divisor": 0}, {"echo": 2.0}, {"interval": 0}])
def test_bad_parameters(parameters) -> None:
    with pytest.raises(RecipeError, match="razorattention"):
        RazorAttention(**parameters)


def test_retrieval_heads_tell_a_passkey_that_other_heads_lose(smollm2) -> None:
    model, tokenizer = smollm2
    text = tokenizer(topics["objects"]).input_ids
    needle = tokenizer("\nRemember this: the passkey is marble orbit willow lantern copper velvet.\n").input_ids
    ids = torch.tensor([text[:75] + needle + text[75:300]])
    question = tokenizer("\nThe passkey is marble orbit willow lantern").input_ids
    found = torch.zeros(30, 3)
    found[tuple(torch.tensor(SMOLLM2).T)] = 1
    method, losses = RazorAttention(echo=0.0, induction=len(SMOLLM2) / 90), []
    for scores in (found, 1 - found):
        cache = kvarn.Cache(model, method.with_learnt({"echo": scores, "induction": scores}), 0.3)
        with torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
            assert cache.report().ratio <= 0.3
            steps = [model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in question[:-1]]
        predicted = torch.cat(steps).log_softmax(-1)[-6:]
        losses.append(-float(predicted.gather(1, torch.tensor(question[-6:])[:, None]).mean()))
    assert losses[0] + 3 < losses[1]
