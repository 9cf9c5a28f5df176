"""FastKV against the paper's algorithm in plain loops (arXiv 2502.01068, section 4); what later layers are given."""

import pytest
import torch
from one_layer import GROUP, KV_HEADS, VARIANT, OneLayer, probabilities, random_tokens

import kvarn
from drive import left_padded, logits_of
from kvarn.errors import RecipeError, Unsupported
from kvarn.layers import Fresh
from kvarn.methods.fastkv import FastKV
from test_real_model import answer, haystack_with_needle
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 90), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (8,), generator=torch.Generator().manual_seed(2))


def naive_choice(queries, keys, window: int, kernel: int, rate: float) -> list[int]:
    """Positions that go on: queries [K, G, n, D], keys [K, n, D]."""
    length = keys.shape[1]
    prefix = length - window
    total = [0.0] * prefix
    for key_head, group in zip(keys, queries, strict=True):
        for query in group:
            votes = [0.0] * prefix
            for position in range(prefix, length):
                row = probabilities(query[position], key_head[: position + 1])
                for index in range(prefix):
                    votes[index] += row[index]
            for index in range(prefix):
                total[index] += max(votes[max(0, index - kernel // 2) : index + kernel // 2 + 1])
    best = sorted(range(prefix), key=lambda index: (-round(total[index], 9), index))[: int(rate * length) - window]
    return sorted(best) + list(range(prefix, length))


@pytest.mark.parametrize(("window", "kernel", "rate"), [(4, 3, 0.3), (8, 7, 0.5), (1, 1, 0.2)])
def test_the_same_tokens_as_the_paper(window, kernel, rate):
    tokens = random_tokens(40)
    method = FastKV(rate=rate, window=window, kernel=kernel)
    layer = OneLayer("full")
    fresh = Fresh(*tokens, layer._step(tokens[1]), VARIANT)
    chosen = layer.group.chosen(0, fresh, method.propagation())
    queries = tokens[0].unflatten(1, (KV_HEADS, GROUP))[0]
    assert torch.nonzero(chosen[0]).flatten().tolist() == naive_choice(queries, tokens[1][0], window, kernel, rate)


def test_nothing_left_behind_is_snapkv_and_nothing_evicted_is_full():
    model = make_tiny("llama")
    snapkv = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, "snapkv(window=8)", 30))
    assert torch.equal(logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, "fastkv(rate=1.0)", 30)), snapkv)
    full = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model))
    whole = kvarn.Cache(model, "fastkv(rate=1.0, retention=1.0)")
    assert torch.equal(logits_of(model, PROMPT, CONTINUATION, whole), full)


def test_early_layers_are_those_of_full_and_later_ones_are_given_the_rest():
    model = make_tiny("llama")
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: [], 3: []}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen[number]: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
    model(PROMPT, past_key_values=kvarn.Cache(model))
    model(PROMPT, past_key_values=kvarn.Cache(model, "fastkv(rate=0.3, retention=1.0)"))
    assert [layer[1].shape[1] for layer in seen.values()] == [90, 90, 27, 27]
    assert all(torch.equal(*seen[number]) for number in (0, 1))
    rows = (seen[2][0][0, :, None] == seen[2][1][0, None]).all(-1)  # which of all rows each carried row is
    places = [int(row) for row in rows.byte().argmax(0)]
    assert places == sorted(set(places))
    assert places[-8:] == list(range(82, 90))


@pytest.mark.parametrize(("retention", "entries"), [(0.1, [9, 9, 9, 9]), (0.5, [45, 45, 27, 27])])
def test_every_layer_keeps_as_many_as_it_is_given_and_may_keep(retention, entries):
    model = make_tiny("llama")
    cache = kvarn.Cache(model, f"fastkv(rate=0.3, window=4, retention={retention})")
    model(PROMPT, past_key_values=cache)
    assert cache.report().entries == [[[count] * 2] for count in entries]


def test_a_later_prompt_goes_through_all_layers_whole():
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "fastkv(rate=0.3, retention=1.0)")
    model(PROMPT, past_key_values=cache)
    assert model(PROMPT[:, :20], past_key_values=cache).logits.shape[1] == 20
    assert cache.report().entries == [[[110] * 2], [[110] * 2], [[47] * 2], [[47] * 2]]


@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_a_padded_batch_carries_what_each_sequence_carries_alone(rate):
    model = make_tiny("llama")
    recipe = f"fastkv(rate={rate}, window=4, retention=0.5)"
    sequences = [PROMPT[0], PROMPT[0, 30:], PROMPT[0, :41]]
    prompts, mask = left_padded(sequences)
    together = logits_of(model, prompts, CONTINUATION, kvarn.Cache(model, recipe), mask)
    for row, sequence in zip(together, sequences, strict=True):
        alone = logits_of(model, sequence[None], CONTINUATION, kvarn.Cache(model, recipe))[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_an_interrupted_pass_leaves_other_caches_alone():
    model = make_tiny("llama")
    expected = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model))
    cache = kvarn.Cache(model, "fastkv(rate=0.3)")
    stop = model.model.layers[3].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(PROMPT, past_key_values=cache)
    stop.remove()
    assert torch.equal(logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model)), expected)
    cache.reset()
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    assert model(PROMPT, past_key_values=cache).logits.shape[1] == 27


def test_models_that_cannot_leave_tokens_behind():
    with pytest.raises(Unsupported, match="sliding window and need every token"):
        kvarn.Cache(make_tiny("gemma2"), "fastkv")
    with pytest.raises(Unsupported, match="after layer 3 of 4"):
        kvarn.Cache(make_tiny("llama"), "fastkv(layer=3)")


@pytest.mark.parametrize(
    "parameters", [{"rate": 0}, {"retention": 1.5}, {"layer": -1}, {"window": 0}, {"kernel": 2}, {"rate": 1.1}]
)
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="fastkv"):
        FastKV(**parameters)


def test_a_needle_is_found_with_a_fifth_of_the_tokens_in_later_layers(smollm2):
    model, tokenizer = smollm2
    prompt = haystack_with_needle(tokenizer, 800, 0.2)
    rows = []
    watch = model.model.layers[20].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    try:
        assert "73915" in answer(smollm2, prompt, "fastkv", 0.25)
    finally:
        watch.remove()
    assert rows[0] == int(0.2 * prompt.shape[1])
    assert "73915" not in answer(smollm2, prompt, "window", 0.25)
