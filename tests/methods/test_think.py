"""ThinK against the paper's greedy choice in plain loops (arXiv 2407.21018, section 3)."""

import pytest
import torch
from one_layer import GROUP, KV_HEADS, SIZE, OneLayer, random_tokens, split
from torch import Tensor

import kvarn
from kvarn.errors import RecipeError
from kvarn.formats import Narrow
from kvarn.methods.think import ThinK
from tiny_models import make_tiny


def naive_channels(queries: Tensor, keys: Tensor, ratio: float, window: int) -> list[int]:
    """Kept channels of one KV head: queries [G, n, D], keys that are cached [m, D]; norms of rank-one matrices."""
    scores = []
    for channel in range(SIZE):
        total = 0.0
        for group in range(GROUP):
            for query in queries[group, -window:]:
                total += sum((float(query[channel]) * float(key[channel])) ** 2 for key in keys)
        scores.append(total)
    pruned = sorted(range(SIZE), key=scores.__getitem__)[: int(ratio * SIZE)]
    return [channel for channel in range(SIZE) if channel not in pruned]


def grouped(query: Tensor) -> Tensor:
    return query.unflatten(1, (KV_HEADS, GROUP))[0]


def narrowed(keys: Tensor, channels: list[int], old: int) -> Tensor:
    out = keys.clone()
    out[:old] = 0
    out[:old, channels] = keys[:old, channels]
    return out


@pytest.mark.parametrize(("ratio", "window", "recent"), [(0.4, 8, 6), (0.7, 3, 0), (0.1, 100, 10)])
def test_the_same_cache_as_the_paper_token_by_token(ratio, window, recent):
    prompt, total = 24, 40
    tokens = random_tokens(total)
    layer = OneLayer(f"think(ratio={ratio}, window={window}, recent={recent})")
    layer.prompt(*split(tokens, 0, prompt))
    queries = grouped(tokens[0])[:, :, :prompt]
    chosen = [naive_channels(queries[h], tokens[1][0, h, :prompt], ratio, window) for h in range(KV_HEADS)]
    for seen in range(prompt, total + 1):
        keys, values = layer.keys_and_values()
        assert torch.equal(values, tokens[2][0, :, :seen])
        for head, channels in enumerate(chosen):
            assert torch.equal(keys[head], narrowed(tokens[1][0, head, :seen], channels, max(seen - recent, 0)))
        if seen < total:
            layer.token(*split(tokens, seen, seen + 1))


def test_channels_are_chosen_for_the_keys_that_eviction_leaves():
    tokens = random_tokens(40)
    layer, alone = OneLayer("snapkv(window=4) + think(window=4, recent=4)", 14), OneLayer("snapkv(window=4)", 14)
    for each in (layer, alone):
        each.prompt(*tokens)
    assert layer.positions() == alone.positions()
    keys, _ = layer.keys_and_values()
    for head, positions in enumerate(layer.positions()):
        kept = tokens[1][0, head, positions]
        channels = naive_channels(grouped(tokens[0])[head], kept, 0.4, 4)
        assert torch.equal(keys[head], narrowed(kept, channels, 10))


def test_a_second_prompt_keeps_the_channels_of_the_first():
    tokens = random_tokens(60)
    layer = OneLayer("think(recent=4)")
    layer.prompt(*split(tokens, 0, 30))
    state = layer.group.store.keys.settled.state["channels"].clone()
    layer.prompt(*split(tokens, 30, 60))
    assert torch.equal(layer.group.store.keys.settled.state["channels"], state)
    keys, _ = layer.keys_and_values()
    for head in range(KV_HEADS):
        assert torch.equal(keys[head], narrowed(tokens[1][0, head], state[head].tolist(), 56))


def test_a_first_prompt_in_which_nothing_settles_leaves_the_choice_to_the_next():
    tokens = random_tokens(60)
    layer = OneLayer("think(window=8, recent=20)")
    layer.prompt(*split(tokens, 0, 10))
    layer.prompt(*split(tokens, 10, 60))
    for head in range(KV_HEADS):
        expected = naive_channels(grouped(tokens[0])[head], tokens[1][0, head, 10:60], 0.4, 8)
        assert layer.group.store.keys.settled.state["channels"][head].tolist() == expected


def test_with_kivi_what_stays_is_quantized_and_its_tail_is_whole():
    """The codes are those of KIVI on the channels that stay; the newest keys, short of a block, keep all."""
    tokens = random_tokens(50)
    both = OneLayer("think(ratio=0.5) + kivi(bits=4, group=8, residual=16)")
    both.prompt(*split(tokens, 0, 40))
    for position in range(40, 50):
        both.token(*split(tokens, position, position + 1))
    keys, values = both.keys_and_values()
    kivi = OneLayer("kivi(bits=4, group=8, residual=16)")
    kivi.prompt(*tokens)
    own_keys, own_values = kivi.keys_and_values()
    assert torch.equal(values, own_values)
    for head in range(KV_HEADS):
        channels = naive_channels(grouped(tokens[0])[head, :, :40], tokens[1][0, head, :40], 0.5, 32)
        assert torch.equal(keys[head], narrowed(own_keys[head], channels, 48))


def test_a_width_that_the_format_cannot_pack():
    with pytest.raises(RecipeError, match="multiple of 8 numbers; these have 10"):
        OneLayer("think + kivi(group=8)")
    with pytest.raises(RecipeError, match="both decide which channels of the keys stay"):
        kvarn.Recipe.parse("xquant + think")


def test_planted_channels_go():
    query, keys, values = random_tokens(30)
    planted = [1, 4, 6, 9, 11, 15]
    keys[..., planted] *= 1e-4
    layer = OneLayer(f"think(ratio={len(planted) / SIZE})")
    layer.prompt(query, keys, values)
    kept = [channel for channel in range(SIZE) if channel not in planted]
    assert layer.group.store.keys.settled.state["channels"].tolist() == [kept] * KV_HEADS


def test_nothing_pruned_is_full():
    tokens = random_tokens(50)
    for recipe in ("think(ratio=0.0)", "think(recent=50)"):
        layer, full = OneLayer(recipe), OneLayer("full")
        assert torch.equal(layer.prompt(*split(tokens, 0, 40)), full.prompt(*split(tokens, 0, 40)))
        for position in range(40, 50):
            now = split(tokens, position, position + 1)
            assert torch.equal(layer.token(*now), full.token(*now))


def test_channels_are_counted_and_go_with_forks_and_selections():
    model = make_tiny("llama")
    prompt = torch.randint(1, 160, (2, 90))
    cache = kvarn.Cache(model, "think(recent=8)")
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    kept, heads = 16 - int(0.4 * 16), 4 * 2 * 2
    segment = cache._groups[0].store.keys.settled
    plain = segment.pages_held(slice(None)) * 4 + heads * 16
    assert segment.bookkeeping_bytes == plain + heads * kept * 2
    assert cache.report().bytes == sum(cache.plan.bytes)
    before = segment.state["channels"].view(4, 2, 2, kept).clone()
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    fork = cache.fork()
    for each in (cache, fork):
        now = each._groups[0].store.keys.settled.state["channels"].view(4, 3, 2, kept)
        assert torch.equal(now, before[:, [1, 1, 0]])


def test_the_queries_choose_better_than_chance(smollm2, monkeypatch):
    """Predictions are nearer to the full cache's than with as many channels left out at random."""
    from test_real_model import HAYSTACK

    model, tokenizer = smollm2
    ids = tokenizer(HAYSTACK, return_tensors="pt").input_ids[:, :206]

    def predictions(recipe: str) -> Tensor:
        cache = kvarn.Cache(model, recipe)
        with torch.no_grad():
            model(ids[:, :200], past_key_values=cache, logits_to_keep=1)
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(200, 206)]
        return torch.cat(steps).double().log_softmax(-1)

    def at_random(self: Narrow, x: Tensor, held: Tensor, queries: Tensor) -> dict[str, Tensor]:
        order = torch.rand(x.shape[0], self.size).argsort(-1)[:, : self.kept]
        return {"channels": order.sort(-1).values.to(torch.int16)}

    full, chosen = predictions("full"), predictions("think")
    monkeypatch.setattr(Narrow, "observe", at_random)
    random = predictions("think")
    near, far = (float((full.exp() * (full - p)).sum(-1).mean()) for p in (chosen, random))
    assert near * 3 < far, (near, far)


@pytest.mark.parametrize("parameters", [{"ratio": 1.0}, {"ratio": -0.1}, {"window": 0}, {"recent": -1}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="think"):
        ThinK(**parameters)
