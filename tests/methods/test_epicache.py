"""EpiCache against the paper's algorithm in plain loops and on transformers' own cache (arXiv 2509.17396)."""

import pytest
import torch
from one_layer import GROUP, KV_HEADS, VARIANT, OneLayer, probabilities, random_tokens, split
from transformers import DynamicCache

import kvarn
from drive import logits_of
from kvarn.budgets.sensitivity import LayerSensitivity, sensitive_shares
from kvarn.errors import CalibrationError, RecipeError
from kvarn.layers import Fresh, Step
from kvarn.methods.epicache import EpiCache
from kvarn.prefill import cuts
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 150), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (8,), generator=torch.Generator().manual_seed(2))
TEXT = torch.randint(1, 160, (9,), generator=torch.Generator().manual_seed(3))
SIMILARITY = torch.tensor([0.9, 0.5, 0.8, 0.7])


def naive_scores(queries, keys) -> list[float]:
    """The most that any query pays to each key, over these keys alone: queries [m, D], keys [n, D]."""
    rows = [probabilities(query, keys) for query in queries]
    return [max(row[i] for row in rows) for i in range(len(keys))]


def read(layer: OneLayer, tokens, first: int, last: int, text) -> torch.Tensor:
    """A block, and queries of a text that follows it; the keys and values of the text are as random."""
    block = split(tokens, first, last)
    fresh = [torch.cat(pair, 2) for pair in zip(block, text, strict=True)]
    following = torch.arange(last, last + text[0].shape[2])[None]
    step = Step(
        torch.arange(first, last)[None], torch.tensor([first]), torch.tensor([last]), False, following=following
    )
    return layer.group.prompt(0, Fresh(*fresh, step, VARIANT))[:, :, : last - first]


@pytest.mark.parametrize("level", ["pair", "head"])
def test_the_same_entries_as_the_paper(level) -> None:
    tokens, size, most = random_tokens(48), 12, 10
    tokens[1][:, 0] *= 0.6  # so that the heads of a layer differ in how sharply they attend
    layer, kept = OneLayer(f"epicache(level={level!r})", capacity=most), [[], []]
    for first in range(0, 48, size):
        text = random_tokens(5, seed=first + 1)
        read(layer, tokens, first, first + size, text)
        kept = [[*head, *range(first, first + size)] for head in kept]
        queries = text[0].unflatten(1, (KV_HEADS, GROUP))[0].flatten(1, 2)
        scores = [naive_scores(queries[h], tokens[1][0, h, kept[h]]) for h in range(KV_HEADS)]
        if level == "pair":
            order = sorted(((-s, h, i) for h in range(KV_HEADS) for i, s in enumerate(scores[h])))[: KV_HEADS * most]
        else:
            order = [x for h in range(KV_HEADS) for x in sorted((-s, h, i) for i, s in enumerate(scores[h]))[:most]]
        if first + size <= most:
            continue
        kept = [sorted(kept[h][i] for _, head, i in order if head == h) for h in range(KV_HEADS)]
        assert layer.positions() == kept
        assert sum(map(len, kept)) == KV_HEADS * most
    assert (len(kept[0]) != len(kept[1])) == (level == "pair")
    keys, values = layer.keys_and_values()
    for head, positions in enumerate(layer._rows("position")):
        assert torch.equal(keys[head, : len(positions)], tokens[1][0, head, positions])
        assert torch.equal(values[head, : len(positions)], tokens[2][0, head, positions])


def test_the_text_changes_nothing_of_what_the_block_reads() -> None:
    tokens = random_tokens(20)
    out = read(OneLayer("epicache", capacity=8), tokens, 0, 20, random_tokens(5, seed=1))
    torch.testing.assert_close(out, OneLayer("full").prompt(*tokens))


def naive_cache(model, blocks, text, most: int) -> tuple[DynamicCache, list[torch.Tensor]]:
    """Blocks and texts in passes of their own on transformers' cache, with heads of equal length: the cache, and the
    positions of what each layer's heads keep, [K, most] each."""
    model.set_attn_implementation("eager")
    cache, seen, places = DynamicCache(config=model.config), 0, [torch.zeros(2, 0).long()] * 4
    for block in blocks:
        positions = torch.arange(seen, seen + block.shape[1])[None]
        model(block, position_ids=positions, past_key_values=cache)
        seen += block.shape[1]
        places = [torch.cat([p, positions.expand(2, -1)], 1) for p in places]
        if places[0].shape[1] <= most:
            continue
        held = places[0].shape[1]
        repeated = torch.arange(seen - 1, seen - 1 + len(text))[None]
        attended = model(text[None], position_ids=repeated, past_key_values=cache, output_attentions=True).attentions
        for number, layer in enumerate(cache.layers):
            paid = attended[number][0, :, :, :held]
            scores = (paid / paid.sum(-1, keepdim=True)).unflatten(0, (2, -1)).amax((1, 2))
            best = scores.topk(most, -1).indices.sort(-1).values
            places[number] = places[number].gather(1, best)
            index = best[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
    return cache, places


@torch.no_grad()
def test_the_same_as_passes_of_their_own_on_transformers_cache() -> None:
    blocks = PROMPT.split(50, 1)
    own, places = naive_cache(make_tiny("llama"), blocks, TEXT, 30)
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "epicache(block=50, level='head')", 30, text=TEXT)
    model(PROMPT, past_key_values=cache)
    store = cache._groups[0].store
    order = store.read_column(slice(0, 8), "position").long().sort(1)
    assert torch.equal(order.values.view(4, 2, 30), torch.stack(places))
    keys = store.read(slice(0, 8))[0].gather(1, order.indices[..., None].expand(-1, -1, 16)).view(4, 2, 30, 16)
    torch.testing.assert_close(keys, torch.cat([layer.keys for layer in own.layers]), rtol=1e-4, atol=1e-4)


def test_a_budget_for_everything_is_full() -> None:
    model = make_tiny("llama")
    full = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model))
    whole = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, "epicache", text=TEXT))
    assert torch.equal(whole, full)
    blocks = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, "epicache(block=32)", 158, text=TEXT))
    torch.testing.assert_close(blocks, full, rtol=1e-4, atol=1e-4)


def test_without_a_text_the_end_of_each_block_scores() -> None:
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "epicache(block=50, tail=9)", 30)
    given = logits_of(model, PROMPT, CONTINUATION, cache)
    other = kvarn.Cache(model, "epicache(block=50)", 30)
    with torch.no_grad():
        for first, last in cuts(150, 50):
            other.text = PROMPT[0, last - 9 : last]
            model(PROMPT[:, first:last], past_key_values=other)
    steps = [model(token.view(1, 1), past_key_values=other).logits for token in CONTINUATION]
    assert torch.equal(torch.cat(steps, 1), given[:, 1:])
    assert cache.report().entries == other.report().entries


@pytest.mark.parametrize("level", ["pair", "head"])
def test_each_layer_holds_its_budget_after_every_block_and_the_peak_does_not_grow(level) -> None:
    model, peaks = make_tiny("llama"), []
    for times in (2, 6):
        cache = kvarn.Cache(model, f"epicache(block=50, level={level!r})", 30, text=TEXT)
        with torch.no_grad():
            for block in PROMPT.repeat(1, times).split(50, 1):
                model(block, past_key_values=cache)
                entries = torch.tensor(cache.report().entries)[:, 0]
                assert entries.sum(1).tolist() == [60] * 4
                assert level == "pair" or bool((entries == 30).all())
        peaks.append(cache.report().peak_bytes)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)  # heads of a layer fill their last pages differently
    row = 2 * 16 * 4  # a key and a value
    # The budget; of one layer the block, the text and what is stored, as it is read: the longest head pads the other.
    longest = 60 if level == "pair" else 30
    block, text, decoded = 2 * 50 * row, 2 * 9 * row, 2 * longest * row
    assert max(peaks) <= cache.plan.bytes[0] + block + text + decoded + 2 * 50 * row
    whole = kvarn.Cache(model, "full")
    model(PROMPT, past_key_values=whole)
    assert max(peaks) < 0.5 * whole.report().peak_bytes


def test_first_tokens_may_be_pinned() -> None:
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "epicache(block=50, sinks=4)", 12, text=TEXT)
    model(PROMPT, past_key_values=cache)
    store = cache._groups[0].store
    positions = store.read_column(slice(0, 8), "position")
    for row, length in zip(positions.tolist(), store.lengths.tolist(), strict=True):
        assert {0, 1, 2, 3} <= set(row[:length])


def test_layers_that_blocks_change_more_have_more() -> None:
    shares = sensitive_shares(SIMILARITY, 1.1).flatten()
    weights = [((0.9 - float(s)) / 0.4) ** 1.1 for s in SIMILARITY]
    expected = [max(4 * w / sum(weights), 0.25) for w in weights]
    assert shares.tolist() == pytest.approx([4 * e / sum(expected) for e in expected], rel=1e-5)
    assert sensitive_shares(torch.full((4,), 0.8), 1.1).flatten().tolist() == [1.0] * 4
    sliding = sensitive_shares(torch.tensor([0.9, torch.nan, 0.5]), 2.0).flatten()
    assert sliding[[0, 2]].tolist() == pytest.approx([0.25 / 1.125, 2 / 1.125])
    method = EpiCache(power=1.1, block=50).with_learnt({"similarity": SIMILARITY})
    model = make_tiny("llama")
    cache = kvarn.Cache(model, method, 0.5)
    model(PROMPT, past_key_values=cache)
    held = torch.tensor(cache.report().entries)[:, 0].sum(1)
    assert held.argsort().tolist() == [0, 2, 3, 1]
    assert cache.report().bytes <= cache.plan.allowed[0]
    with pytest.raises(CalibrationError, match=r"kvarn calibrate \S+ 'epicache\(power=1.1\)'"):
        kvarn.Cache(model, "epicache(power=1.1)")


@torch.no_grad()
def test_sensitivity_is_that_of_a_mask_of_blocks() -> None:
    model, ids = make_tiny("llama"), PROMPT[0]
    search = LayerSensitivity(tokens=150, block=40, sinks=3, window=10)
    steps: list[tuple[int, int]] = []
    found = search.similarity(model, ids, lambda done, total: steps.append((done, total)))
    assert steps == [(done, 4) for done in (1, 2, 3, 4)]
    visible = torch.zeros(150, 150, dtype=torch.bool)
    for query in range(150):
        for key in range(query + 1):
            visible[query, key] = key < 3 or key >= query // 40 * 40 - 20
    model.set_attn_implementation("eager")
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
    model(ids[None], past_key_values=caches[0])
    model(ids[None], attention_mask=mask, past_key_values=caches[1])
    for number, (one, other) in enumerate(zip(caches[0].layers, caches[1].layers, strict=True)):
        alike = []
        for head in range(KV_HEADS):
            for start in range(0, 150, 10):
                a, b = (x.keys[0, head, start : start + 10].flatten() for x in (one, other))
                alike.append(float(a @ b / (a.norm() * b.norm())))
        assert float(found[number]) == pytest.approx(sum(alike) / len(alike), abs=1e-4)
    assert float(found[0]) == pytest.approx(1, abs=1e-4)


def test_sensitivity_leaves_sliding_layers_alone() -> None:
    model = make_tiny("gemma3")
    found = LayerSensitivity(tokens=150, block=40, sinks=3, window=10).similarity(model, PROMPT[0], lambda *_: None)
    assert found.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "parameters", [{"block": 0}, {"tail": 0}, {"level": "layer"}, {"power": -1.0}, {"sinks": 9, "capacity": 9}]
)
def test_bad_parameters(parameters) -> None:
    with pytest.raises(RecipeError, match="epicache"):
        EpiCache(**parameters)
