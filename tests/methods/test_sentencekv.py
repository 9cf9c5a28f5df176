"""SentenceKV against the paper's algorithm in plain loops (arXiv 2504.00970)."""

import math

import pytest
import torch
from one_layer import GROUP, KV_HEADS, SIZE, OneLayer, random_tokens, split

import kvarn
from drive import logits_of
from kvarn.calibration import calibrate
from kvarn.errors import CalibrationError, RecipeError, Unsupported
from kvarn.methods.sentencekv import SentenceKV
from kvarn.methods.snapkv import SnapKV
from kvarn.selection import SentenceEnds
from test_real_model import haystack_with_needle
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 90), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (30,), generator=torch.Generator().manual_seed(2))
ENDS = {"ends": torch.tensor([7, 30, 51, 88, 101, 140])}
SMALL = SentenceKV(count=16, factor=2.0, window=4, kernel=3, first=2, recent=4)


class Naive:
    """One KV head with its query heads: what is kept of a prompt, its sentences, and what each step reads."""

    def __init__(self, queries, keys, values, kept: list[int], ends: list[bool], prompt: int):
        self.queries, self.keys, self.values, self.ends = queries, keys, values, ends
        self.slots = list(kept)
        bounds = [t + 1 for t in range(prompt) if ends[t]]
        starts = [0, *bounds]
        ranges = [range(a, b) for a, b in zip(starts, [*bounds, prompt], strict=True)]
        self.sentences = [[t for t in sentence if t in kept] for sentence in ranges]
        self.sentences = [sentence for sentence in self.sentences if sentence]
        self.means = [self.keys[sentence].mean(0) for sentence in self.sentences]
        self.buffer: list[int] = []

    def reads(self, t: int) -> list[int]:
        self.slots.append(t)
        self.buffer.append(t)
        if self.ends[t]:
            self.sentences.append(list(self.buffer))
            self.means.append(self.keys[self.buffer].mean(0))
            self.buffer = []
        if len(self.buffer) <= SMALL.whole or len(self.slots) <= SMALL.count:
            return list(self.slots)
        mean_query = sum(query[self.buffer].mean(0) for query in self.queries)
        order = sorted(range(len(self.means)), key=lambda s: -float(self.means[s] @ mean_query))
        always = self.slots[: SMALL.first] + self.slots[-SMALL.recent :]
        rest = [token for s in order for token in self.sentences[s] if token not in always]
        return always + rest[: SMALL.count - len(always)]

    def token(self, t: int) -> torch.Tensor:
        read = self.reads(t)
        logits = [torch.stack([q[t] @ self.keys[j] for j in read]) / math.sqrt(SIZE) for q in self.queries]
        return torch.stack([row.softmax(0) @ self.values[read] for row in logits])


def test_the_same_entries_are_read_as_in_the_paper():
    tokens = random_tokens(80)
    ends = [t % 11 == 7 or t % 13 == 3 for t in range(80)]
    marks = torch.tensor(ends)[None]
    layer = OneLayer(SMALL, capacity=32)
    layer.prompt(*split(tokens, 0, 60), marks[:, :60])
    query = tokens[0][0].unflatten(0, (KV_HEADS, GROUP))
    kept = layer.positions()
    naive = [Naive(query[h], tokens[1][0, h], tokens[2][0, h], kept[h], ends, 60) for h in range(KV_HEADS)]
    assert layer.group.store.beside["means"].lengths.tolist() == [len(head.means) for head in naive]
    for t in range(60, 80):
        out = layer.token(*split(tokens, t, t + 1), marks[:, t : t + 1])[0, :, 0]
        expected = torch.cat([head.token(t) for head in naive])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for head, means in enumerate(layer.group.store.beside["means"].decode(layer.group.everyone)):
        torch.testing.assert_close(
            means[: len(naive[head].means)], torch.stack(naive[head].means), rtol=1e-4, atol=1e-4
        )


def test_what_a_prompt_leaves_is_what_snapkv_keeps():
    tokens = random_tokens(60)
    ours, theirs = OneLayer(SMALL, capacity=32), OneLayer(SnapKV(window=4, kernel=3), capacity=32)
    ours.prompt(*tokens, torch.zeros(1, 60, dtype=torch.bool))
    theirs.prompt(*tokens)
    assert ours.positions() == theirs.positions()


def test_one_sentence_is_read_from_its_front():
    tokens = random_tokens(60)
    layer, read = OneLayer(SMALL, capacity=32), []
    none = torch.zeros(1, 60, dtype=torch.bool)
    layer.prompt(*split(tokens, 0, 58), none[:, :58])
    store_read = layer.group.store.read
    layer.group.store.read = lambda heads, index=None: read.append(index) or store_read(heads, index)
    for t in (58, 59):
        layer.token(*split(tokens, t, t + 1), none[:, t : t + 1])
    assert read[0] is None  # the first query of a sentence
    # 34 are held: the first 2, the newest 4, and 10 more in their order
    assert [sorted(row) for row in read[1].tolist()] == [[*range(12), 30, 31, 32, 33]] * KV_HEADS


def test_where_everything_fits_it_is_full():
    model = make_tiny("llama")
    cache = kvarn.Cache(model, SentenceKV(count=200, window=8).with_learnt(ENDS))
    ours = logits_of(model, PROMPT, CONTINUATION, cache)
    torch.testing.assert_close(ours, logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model)), rtol=1e-4, atol=1e-4)


def test_the_device_holds_means_and_the_newest_and_the_host_the_rest():
    model = make_tiny("llama")
    cache = kvarn.Cache(model, SentenceKV(count=64, factor=4.0, window=8, first=4, recent=16).with_learnt(ENDS))
    with torch.no_grad():
        model(PROMPT.repeat(1, 4), past_key_values=cache)
        before = cache.report().bytes
        for token in CONTINUATION:
            model(token.view(1, 1), past_key_values=cache)
    report = cache.report()
    held = 256 + 30
    assert {entries for layer in report.entries for heads in layer for entries in heads} == {held}
    settled = sum(group.store.keys.settled.lengths.sum() for group in cache._groups)
    assert int(settled) == 8 * 256  # all but the newest 30
    assert report.by_tier["host"] == 8 * 2 * 16 * (16 * 16 * 4 + 8)
    assert report.by_tier["device"] == report.bytes < 0.35 * report.by_tier["host"]
    assert report.peak_bytes >= before + 2 * 257 * 2 * 16 * 4  # the first step reads everything
    assert "on the host" in str(report)


def test_it_needs_to_know_the_tokenizer_and_the_tokens(smollm2):
    model = make_tiny("llama")
    with pytest.raises(CalibrationError, match="kvarn calibrate"):
        kvarn.Cache(model, "sentencekv")
    with pytest.raises(Unsupported, match="input_ids"), torch.no_grad():
        model(inputs_embeds=torch.zeros(1, 5, 64), past_key_values=kvarn.Cache(model, SMALL.with_learnt(ENDS)))
    tokenizer = smollm2[1]
    ends = SentenceEnds().run(smollm2[0], tokenizer, "", lambda done, total: None)["ends"].tolist()
    for text, expected in ((".", True), ("?", True), ("\n", True), (" the", False), (",", False), (" ", False)):
        assert (tokenizer(text).input_ids[-1] in ends) == expected


@pytest.mark.parametrize(
    "parameters", [{"count": 64}, {"first": -1}, {"kernel": 4}, {"window": 0}, {"factor": 0.5}, {"whole": -1}]
)
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="sentencekv"):
        SentenceKV(**parameters)


def test_what_a_recipe_cannot_be():
    with pytest.raises(RecipeError, match="what to keep"):
        kvarn.Recipe.parse("sentencekv + snapkv")
    with pytest.raises(RecipeError, match="in two precisions"):
        kvarn.Cache(make_tiny("llama"), SMALL.with_learnt(ENDS) + kvarn.Recipe.parse("mikv"))


def test_a_needle_comes_back_from_the_host(smollm2, monkeypatch, tmp_path):
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path))
    model, tokenizer = smollm2
    calibrate(model, tokenizer, SentenceKV())
    prompt = haystack_with_needle(tokenizer, 400, 0.5)
    cache = kvarn.Cache(model, "sentencekv(count=96, factor=3.0, first=16, recent=16)")
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=7, do_sample=False)
    assert "73915" in tokenizer.decode(out[0, prompt.shape[1] :])
    report = cache.report()
    assert report.ratio < 0.3
    assert report.by_tier["host"] > report.bytes
