"""ShadowKV against the paper's algorithm in plain loops (arXiv 2410.21465)."""

import math

import pytest
import torch
from one_layer import GROUP, KV_HEADS, SIZE, OneLayer, random_tokens, split
from rotation import rope, rotated

import kvarn
from drive import logits_of
from kvarn.attention.rotary import Rotary
from kvarn.errors import RecipeError
from kvarn.formats import Dense, Subspace
from kvarn.memory import Segment
from kvarn.methods.shadowkv import ShadowKV
from kvarn.selection import stray
from test_real_model import haystack_with_needle
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 90), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (12,), generator=torch.Generator().manual_seed(2))
SMALL = ShadowKV(chunk=4, rank=12, count=16, local=2, outliers=3)


def low_rank(keys: torch.Tensor, rank: int) -> torch.Tensor:
    """[K, n, SIZE] by the largest singular values of all heads together."""
    joint = keys.transpose(0, 1).flatten(1)
    left, values, right = torch.linalg.svd(joint, full_matrices=False)
    return (left[:, :rank] * values[:rank] @ right[:rank]).unflatten(1, (KV_HEADS, SIZE)).transpose(0, 1)


class Naive:
    """All tokens of a layer: queries [H][n] and keys [K][n] after RoPE, keys before it, values [K][n]."""

    def __init__(self, queries, plain, values, prompt: int, method: ShadowKV):
        self.method, self.prompt, self.values = method, prompt, values
        self.queries = rotated(queries)
        self.keys = rotated(plain)
        self.chunks = prompt // method.chunk - method.local
        settled = self.chunks * method.chunk
        self.shadows = rotated(low_rank(plain[:, :prompt][:, :settled], method.rank))
        self.settled = settled
        tokens = {i: range(i * method.chunk, (i + 1) * method.chunk) for i in range(self.chunks)}
        self.tokens = tokens
        self.means = [[self.keys[h][list(tokens[i])].mean(0) for i in range(self.chunks)] for h in range(KV_HEADS)]
        self.outliers = []
        for h in range(KV_HEADS):
            least = [
                min(float(torch.cosine_similarity(self.means[h][i], self.keys[h][t], dim=0)) for t in tokens[i])
                for i in range(self.chunks)
            ]
            self.outliers.append(sorted(range(self.chunks), key=least.__getitem__)[: method.outliers])

    def chosen(self, head: int, t: int) -> list[int]:
        left = [i for i in range(self.chunks) if i not in self.outliers[head]]
        best = dict.fromkeys(left, 0.0)
        for query in self.queries[head * GROUP : (head + 1) * GROUP]:
            logits = [float(query[t] @ self.means[head][i]) / math.sqrt(SIZE) for i in left]
            total = sum(math.exp(logit) for logit in logits)
            for i, logit in zip(left, logits, strict=True):
                best[i] = max(best[i], math.exp(logit) / total)
        return sorted(left, key=best.__getitem__, reverse=True)[: self.method.count // self.method.chunk]

    def token(self, t: int) -> torch.Tensor:
        out = []
        for head in range(KV_HEADS):
            exact = [token for i in self.outliers[head] for token in self.tokens[i]] + list(range(self.settled, t + 1))
            shadow = [token for i in self.chosen(head, t) for token in self.tokens[i]]
            keys = torch.cat([self.keys[head][exact], self.shadows[head][shadow]])
            values = self.values[head][exact + shadow]
            for query in self.queries[head * GROUP : (head + 1) * GROUP]:
                out.append((keys @ query[t] / math.sqrt(SIZE)).softmax(0) @ values)
        return torch.stack(out)


def layer_and_naive(prompt: int, count: int, method: ShadowKV) -> tuple[OneLayer, Naive, list[torch.Tensor]]:
    query, keys, values = random_tokens(count)
    tokens = [rotated(query[0])[None], rotated(keys[0])[None], values]
    layer = OneLayer(method)
    layer.prompt(*split(tokens, 0, prompt))
    return layer, Naive(query[0], keys[0], values[0], prompt, method), tokens


@pytest.mark.parametrize("method", [SMALL, ShadowKV(chunk=8, rank=32, count=8, local=0, outliers=0)])
def test_the_same_outputs_as_the_paper(method):
    # The subspace is that of the whole prompt in the paper too where nothing is local; here of what is there.
    layer, naive, tokens = layer_and_naive(64, 74, method)
    if method.local:
        whole = low_rank(naive_plain(tokens, 64), method.rank)
        naive.shadows = rotated(whole[:, : naive.settled])
    chunks = layer.group.store.beside["outliers"].read(layer.group.everyone)["chunk"]
    assert [sorted(row) for row in chunks[0].T.tolist()] == [sorted(o) for o in naive.outliers]
    for t in range(64, 74):
        out = layer.token(*split(tokens, t, t + 1))[0, :, 0]
        torch.testing.assert_close(out, naive.token(t), rtol=1e-3, atol=1e-3)


def naive_plain(tokens: list[torch.Tensor], prompt: int) -> torch.Tensor:
    return torch.stack([torch.stack([rope(k[t], -t) for t in range(prompt)]) for k in tokens[1][0]])


def test_chunks_of_equal_keys_do_not_stray():
    keys = torch.randn(1, 4, 8).repeat(6, 1, 1)
    keys[:] = keys[:, :1]
    keys[2, 3] = -keys[2, 3]
    found = stray(keys)
    assert int(found.argmin()) == 2
    assert float(found[2]) < 0 < 0.999 < float(found[[0, 1, 3, 4, 5]].min())


def test_every_token_of_a_prompt_is_in_one_place():
    layer, naive, _ = layer_and_naive(61, 61, SMALL)
    store = layer.group.store
    settled = int(store.keys.settled.lengths[0])
    assert settled == int(store.values.settled.lengths[0]) == (61 // 4 - 2) * 4
    assert settled + int(store.keys.tail.lengths[0]) == 61
    assert int(store.beside["means"].lengths[0]) * 4 == settled
    assert naive.settled == settled


def test_values_that_were_read_last_are_not_fetched_again(monkeypatch):
    fetched = []
    read = Segment.read_parts
    monkeypatch.setattr(
        Segment, "read_parts", lambda self, heads, *rest: fetched.append(len(heads)) or read(self, heads, *rest)
    )
    layer, _, tokens = layer_and_naive(64, 74, SMALL)
    tokens[0][:, :, 65:] = tokens[0][:, :, 64:65]  # the same question again
    again, _, _ = layer_and_naive(64, 74, SMALL)
    for t in range(64, 74):
        ours = layer.token(*split(tokens, t, t + 1))
        again.group._last.clear()
        torch.testing.assert_close(again.token(*split(tokens, t, t + 1)), ours)
    mine, all_of_them = fetched[::2], fetched[1::2]
    assert set(all_of_them) == {KV_HEADS * 16}
    assert mine[0] == KV_HEADS * 16
    assert sum(mine[1:]) == 0


def test_at_full_rank_and_with_all_chunks_it_is_full():
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "shadowkv(chunk=4, local=2, count=400, outliers=3)")
    ours = logits_of(model, PROMPT, CONTINUATION, cache)
    torch.testing.assert_close(ours, logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model)), rtol=1e-3, atol=1e-3)


def test_a_second_prompt_is_encoded_with_the_first():
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "shadowkv(chunk=4, local=2, count=400, outliers=3)")
    full = kvarn.Cache(model)
    for each in (cache, full):
        logits_of(model, PROMPT[:, :30], CONTINUATION, each)
    with torch.no_grad():
        turns = [model(PROMPT[:, 30:], past_key_values=each).logits for each in (cache, full)]
        steps = [model(PROMPT[:, :1], past_key_values=each).logits for each in (cache, full)]
    torch.testing.assert_close(turns[0], turns[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-3)
    assert cache._groups[0].store.keys.settled.lengths.tolist() == [((30 + 12 + 60) // 4 - 2) * 4] * 4


def test_bytes_are_those_of_the_paper():
    recipe = kvarn.Recipe.parse("shadowkv")
    spec = kvarn.spec.LayerSpec(32, 8, 128, 128, None)
    layout = recipe.layout(spec, torch.float16, 64)
    ends = [int(layout.bytes(torch.tensor(n))) for n in (64 * 400, 64 * 1400)]
    columns, tables = 4, 4 * 4 / 64 + 8 * 3 / 64
    # Coordinates and landmarks of a prompt's token; its position and page tables are ours.
    assert (ends[1] - ends[0]) / 64_000 == pytest.approx(2 * 160 + 2048 / 8 + columns + tables, rel=0.005)
    state = 8 * 128 * 160 * 2
    outliers = 64 * 8 * 8 * 128 * 2 * 2  # 48 chunks in a page of 64
    local = 4 * 8 * 2 * 2 * 8 * 128
    assert ends[0] == pytest.approx(64 * 400 * (576 + columns + tables) + state + outliers + local, rel=0.01)


@pytest.mark.parametrize(
    "parameters", [{"chunk": 0}, {"rank": 0}, {"count": 4}, {"count": 2047}, {"local": -1}, {"outliers": -1}]
)
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="shadowkv"):
        ShadowKV(**parameters)


@pytest.mark.parametrize(
    ("other", "message"),
    [("snapkv", "what to keep"), ("kivi", "in which format"), ("tokenselect", "which entries"), ("think", "channels")],
)
def test_what_a_recipe_cannot_be(other, message):
    with pytest.raises(RecipeError, match=message):
        kvarn.Recipe.parse(f"shadowkv + {other}")


def test_a_needle_is_found_by_landmarks_and_keys_are_low_rank_before_their_rotation(smollm2):
    model, tokenizer = smollm2
    prompt = haystack_with_needle(tokenizer, 300, 0.5)
    cache = kvarn.Cache(model, "shadowkv(rank=96, count=96, outliers=8)")
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=7, do_sample=False)
    assert "73915" in tokenizer.decode(out[0, prompt.shape[1] :])
    report = cache.report()
    assert report.by_tier["host"] > 0.4 * report.dense_bytes
    full = kvarn.Cache(model)
    with torch.no_grad():
        model(prompt[:, :300], past_key_values=full, logits_to_keep=1)
    (group,) = full._groups
    errors = []
    for undo in (True, False):
        keys = group.store.read(group.heads(12))[0][None]
        keys = Rotary(model).undo(keys, torch.arange(300)) if undo else keys
        joint = keys[0].transpose(0, 1).flatten(1)[None]
        fmt = Subspace(Dense(48, joint.dtype), 48, joint.shape[-1], joint.dtype)
        fmt = fmt.given(fmt.observe(joint, torch.ones(1, 300, dtype=torch.bool), joint[:, None, :0]))
        errors.append(float((fmt.decode(fmt.encode(joint)) - joint).square().sum().sqrt()))
        assert errors[-1] == pytest.approx(float(torch.linalg.svdvals(joint[0])[48:].square().sum().sqrt()), rel=1e-3)
    assert errors[0] < 0.8 * errors[1]
