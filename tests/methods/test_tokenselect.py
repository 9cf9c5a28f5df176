"""TokenSelect against the paper's algorithm in plain loops (arXiv 2411.02886)."""

import math

import pytest
import torch
from one_layer import GROUP, KV_HEADS, SIZE, OneLayer, random_tokens, split
from rotation import rope, rotated

import kvarn
from drive import logits_of
from kvarn.errors import PromptTooLong, RecipeError
from kvarn.methods.tokenselect import TokenSelect
from kvarn.selection import Voting
from test_real_model import answer, haystack_with_needle
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 90), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (12,), generator=torch.Generator().manual_seed(2))
SINKS, LOCAL, COUNT, CHUNK = 2, 8, 6, 8


class Naive:
    """All tokens of a layer, unrotated: queries [H][n], keys and values [K][n]."""

    def __init__(self, queries, keys, values, pooling: int, scaled: bool, threshold: float):
        self.queries, self.keys, self.values = queries, keys, values
        self.pooling, self.scaled, self.threshold = pooling, scaled, threshold
        self.last: tuple[list, list[int]] | None = None
        self.selections = 0

    def summary(self, first: int, last: int) -> list[torch.Tensor]:
        """Of each head the mean of queries first .. last at positions from LOCAL on."""
        return [torch.stack([rope(q[t], LOCAL + t - first) for t in range(first, last)]).mean(0) for q in self.queries]

    def select(self, summary: list[torch.Tensor], n: int) -> list[int]:
        candidates = range(SINKS, n - LOCAL)
        votes = dict.fromkeys(candidates, 0.0)
        for head, query in enumerate(summary):
            logits = [float(query @ self.keys[head // GROUP][j]) for j in candidates]
            logits = [logit / math.sqrt(SIZE) for logit in logits] if self.scaled else logits
            total = sum(math.exp(logit - max(logits)) for logit in logits)
            for j, logit in zip(candidates, logits, strict=True):
                votes[j] += math.exp(logit - max(logits)) / total
        if self.pooling:
            before = (self.pooling - 1) // 2
            near = {j: range(j - before, j - before + self.pooling) for j in candidates}
            votes = {j: max(votes.get(i, 0.0) for i in near[j]) for j in candidates}
        self.selections += 1
        return sorted(sorted(candidates, key=votes.__getitem__, reverse=True)[:COUNT])

    def attend(self, first: int, last: int, read: list[int]) -> torch.Tensor:
        """Queries first .. last over tokens ``read``, at positions without gaps: [H, last - first, SIZE]."""
        out = torch.zeros(len(self.queries), last - first, SIZE)
        for head, queries in enumerate(self.queries):
            for t in range(first, last):
                seen = [j for j in read if j <= t]
                query = rope(queries[t], len(read) - (last - t))
                keys = [rope(self.keys[head // GROUP][j], place) for place, j in enumerate(seen)]
                logits = torch.stack([query @ key for key in keys]) / math.sqrt(SIZE)
                out[head, t - first] = logits.softmax(0) @ self.values[head // GROUP][seen]
        return out

    def chunk(self, first: int, last: int) -> torch.Tensor:
        if last <= SINKS + COUNT + LOCAL:
            return self.attend(first, last, list(range(last)))
        chosen = self.select(self.summary(first, last), last)
        return self.attend(first, last, [*range(SINKS), *chosen, *range(last - LOCAL, last)])

    def token(self, t: int) -> torch.Tensor:
        n, summary = t + 1, self.summary(t, t + 1)
        flat = torch.cat(summary)
        if self.last is None or float(torch.cosine_similarity(flat, self.last[0], dim=0)) < self.threshold:
            self.last = flat, self.select(summary, n)
        return self.attend(t, n, [*range(SINKS), *self.last[1], *range(n - LOCAL, n)])


def tokens_and_naive(count: int, **settings) -> tuple[list, Naive]:
    query, keys, values = random_tokens(count)
    for t in range(1, count, 3):  # queries that resemble the one before
        query[:, :, t] = query[:, :, t - 1] + 0.3 * query[:, :, t]
    naive = Naive(query[0], keys[0], values[0], **settings)
    return [rotated(query[0])[None], rotated(keys[0])[None], values], naive


@pytest.mark.parametrize(
    ("pooling", "scaled", "threshold"), [(0, False, 0.6), (3, True, 2.0), (4, False, 2.0), (0, True, -1.0)]
)
def test_the_same_outputs_as_the_paper(pooling, scaled, threshold):
    tokens, naive = tokens_and_naive(52, pooling=pooling, scaled=scaled, threshold=threshold)
    recipe = TokenSelect(SINKS, LOCAL, COUNT, CHUNK, threshold, scaled, pooling)
    layer = OneLayer(recipe)
    expected = torch.cat([naive.chunk(first, min(first + CHUNK, 42)) for first in range(0, 42, CHUNK)], 1)
    torch.testing.assert_close(layer.prompt(*split(tokens, 0, 42))[0], expected, rtol=1e-4, atol=1e-4)
    naive.selections = 0
    for t in range(42, 52):
        out = layer.token(*split(tokens, t, t + 1))[0]
        torch.testing.assert_close(out, naive.token(t), rtol=1e-4, atol=1e-4)
    assert naive.selections == {2.0: 10, -1.0: 1}.get(threshold, naive.selections)
    assert threshold != 0.6 or 1 < naive.selections < 10


def test_votes_are_a_distribution_of_each_head_and_those_of_repeated_keys():
    query, keys, _ = random_tokens(20)
    candidates = torch.ones(1, 1, 20, dtype=torch.bool)
    voting = TokenSelect().selection()
    assert isinstance(voting, Voting)
    votes = voting.votes(query[:, :, -1], keys, candidates)
    assert float(votes.sum()) == pytest.approx(KV_HEADS * GROUP, rel=1e-5)
    repeated = voting.votes(query[:, :, -1], keys.repeat_interleave(GROUP, 1), candidates)
    torch.testing.assert_close(repeated, votes)
    one = voting.votes(query[:, :1, -1], keys[:, :1], candidates)[0, 0]
    assert one.topk(5).indices.tolist() == (keys[0, 0] @ query[0, 0, -1]).topk(5).indices.tolist()


@pytest.mark.parametrize("recipe", ["full", "kivi(bits=4, group=16, residual=16)", "snapkv(window=8)"])
def test_where_everything_is_read_nothing_changes(recipe):
    model, budget = make_tiny("llama"), 40 if recipe.startswith("snapkv") else None
    alone = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, recipe, budget))
    joint = "tokenselect" if recipe == "full" else f"{recipe} + tokenselect"
    both = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, joint, budget))
    if "kivi" in recipe:  # codes of keys before their rotation are others
        torch.testing.assert_close(both, alone, rtol=0, atol=0.5 * float(alone.abs().max()))
    else:
        torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-3)


def test_of_what_another_method_keeps_fewer_are_read():
    tokens = random_tokens(60)
    layer = OneLayer("snapkv(window=4) + tokenselect(sinks=2, local=4, count=5, chunk=4)", capacity=30)
    layer.prompt(*split(tokens, 0, 59))
    assert layer.group.store.lengths.tolist() == [30, 30]
    read = []
    layer.group.store.read = lambda heads, index, read_all=layer.group.store.read: (
        read.append(index.shape[1]) or read_all(heads, index)
    )
    layer.token(*split(tokens, 59, 60))
    assert read == [2 + 4 + 5]
    assert layer.group.store.lengths.tolist() == [31, 31]


def test_a_choice_is_forgotten_when_entries_move():
    tokens = random_tokens(60)
    layer = OneLayer("tokenselect(sinks=2, local=4, count=5, chunk=4, threshold=-1.0) + mikv(ratio=0.3, low=8)")
    layer.prompt(*split(tokens, 0, 50))
    known = []
    for t in range(50, 60):
        before = layer.group.store.low.lengths.clone()
        layer.token(*split(tokens, t, t + 1))
        moved = bool((layer.group.store.low.lengths != before).any())
        known.append(bool(layer.group.selector.state["known"].all()))
        assert known[-1] != moved
    assert set(known) == {True, False}


def test_everything_stays_and_its_bytes():
    model = make_tiny("llama")
    full, cache = kvarn.Cache(model), kvarn.Cache(model, "tokenselect(sinks=2, local=8, count=20, chunk=8)")
    for each in (full, cache):
        logits_of(model, PROMPT, CONTINUATION, each)
    assert cache.report().entries == full.report().entries
    heads, size, layers = 4, 16, 4
    assert cache.report().by_format["bases"] == layers * (heads * size * 4 + 20 * 4 + 1)
    assert cache.report().by_format["dense"] == full.report().by_format["dense"]


def test_texts_longer_than_the_model_reads():
    model = make_tiny("llama", max_position_embeddings=64)
    cache = kvarn.Cache(model, "tokenselect(sinks=4, local=16, count=16, chunk=16)")
    with torch.no_grad():
        assert bool(model(PROMPT, past_key_values=cache).logits.isfinite().all())
    with pytest.raises(PromptTooLong), torch.no_grad():
        model(PROMPT, past_key_values=kvarn.Cache(model, "tokenselect"))  # reads up to 2,688 positions


@pytest.mark.parametrize(
    "parameters", [{"sinks": -1}, {"count": 0}, {"chunk": 600}, {"threshold": -2.0}, {"pooling": -1}]
)
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="tokenselect"):
        TokenSelect(**parameters)


def test_what_a_recipe_cannot_be():
    with pytest.raises(RecipeError, match="which entries a query reads"):
        kvarn.Recipe.parse("tokenselect + tokenselect(count=3)")
    with pytest.raises(RecipeError, match="reads the heads of a layer together"):
        kvarn.Recipe.parse("tokenselect + xquant")


def test_a_needle_is_read_among_a_quarter_of_the_tokens(smollm2):
    prompt = haystack_with_needle(smollm2[1], 300, 0.5)
    assert "73915" in answer(smollm2, prompt, "tokenselect(sinks=8, local=64, count=64, chunk=64)", None)
    assert "73915" not in answer(smollm2, prompt, "window(sinks=8, capacity=136)", None)
