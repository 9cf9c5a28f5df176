"""XQuant against plain loops and the identities of its paper (arXiv 2508.10395)."""

import pytest
import torch

import kvarn
from drive import logits_of
from kvarn.errors import RecipeError, Unsupported
from kvarn.methods.xquant import XQuant
from kvarn.rematerialization import inputs_of, kept, state_bytes
from kvarn.spec import ModelSpec
from test_real_model import answer, haystack_with_needle
from tiny_models import TINY, make_tiny

PROMPT = torch.randint(1, 160, (1, 90), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (10,), generator=torch.Generator().manual_seed(2))
LATENTS, INPUTS = 1, 4  # KV heads of tiny models that keep latents, and of those that keep inputs
ARCHITECTURES = sorted(set(TINY) - {"mistral"})  # whose tiny model has sliding windows alone


class Watched(kvarn.Cache):
    """A cache that remembers what its last layer, a full one in every tiny model, is given in the first pass."""

    def attend(self, module, layer, query, keys, values, mask, variant):
        if layer == 3 and "given" not in self.__dict__:
            self.given = self._input, keys, values
        return super().attend(module, layer, query, keys, values, mask, variant)


def given(model, recipe: str = "xquant(group=16)"):
    """Inputs [1, 90, 64], keys and values [1, K, 90, 16] of the last layer, and the cache that met them."""
    cache = Watched(model, recipe)
    model(PROMPT, past_key_values=cache)
    return *cache.given, cache


def naive_int(numbers: list[float], bits: int) -> list[float]:
    low, high = min(numbers), max(numbers)
    scale = (high - low) / (2**bits - 1)
    return [low + scale * (round((x - low) / scale) if scale else 0) for x in numbers]


@pytest.mark.parametrize("kv_heads", [LATENTS, INPUTS])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_kept_gives_the_keys_and_values_of_the_model(name, kv_heads):
    model = make_tiny(name, num_key_value_heads=kv_heads)
    inputs, keys, values, cache = given(model)
    layer = inputs_of(model, cache.spec)[3]
    computed = layer.entries(*layer.rows(inputs))
    torch.testing.assert_close(computed[0], keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(computed[1], values, rtol=1e-4, atol=1e-4)


def test_latents_are_those_of_the_left_singular_vectors():
    model = make_tiny("llama", num_key_value_heads=LATENTS)
    layer = inputs_of(model, ModelSpec.from_config(model.config, model.dtype))[3]
    for side, projection in enumerate((model.model.layers[3].self_attn.k_proj, model.model.layers[3].self_attn.v_proj)):
        left = layer.rows(torch.eye(64)[None])[side][0, 0]  # every unit vector's latents: U itself
        torch.testing.assert_close(left.T @ left, torch.eye(16), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left @ (left.T @ projection.weight.T), projection.weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_latents_are_quantized_per_channel_and_per_token(bits):
    model = make_tiny("llama", num_key_value_heads=LATENTS)
    inputs, _, _, cache = given(model, f"xquant(bits={bits}, group=8)")
    first, second = (side[0, 0].tolist() for side in inputs_of(model, cache.spec)[3].rows(inputs))
    store, heads = cache._group_of[3].store, cache._group_of[3].heads(3)
    keys, values = store.keys.read(heads)[0], store.values.read(heads)[0]
    for start in range(0, 88, 8):  # the two tokens of the last, open block stay exact
        for channel in range(16):
            column = naive_int([row[channel] for row in first[start : start + 8]], bits)
            torch.testing.assert_close(keys[start : start + 8, channel], torch.tensor(column), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(keys[88:], torch.tensor(first[88:]), rtol=0, atol=0)
    for token in range(90):
        row = [x for start in (0, 8) for x in naive_int(second[token][start : start + 8], bits)]
        torch.testing.assert_close(values[token], torch.tensor(row), rtol=1e-4, atol=1e-5)


def test_inputs_are_quantized_per_token():
    model = make_tiny("llama", num_key_value_heads=INPUTS)
    inputs, _, _, cache = given(model, "xquant(bits=4, group=16)")
    rows = cache._group_of[3].store.keys.read(cache._group_of[3].heads(3))[0]
    for token in range(90):
        expected = [x for g in inputs[0, token].split(16) for x in naive_int(g.tolist(), 4)]
        torch.testing.assert_close(rows[token], torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [LATENTS, INPUTS])
def test_more_bits_are_nearer_to_full(kv_heads):
    model = make_tiny("llama", num_key_value_heads=kv_heads)
    full = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model))
    errors = [
        float((logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, f"xquant({bits=}, group=16)")) - full).norm())
        for bits in (2, 4, 8)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("kv_heads", [LATENTS, INPUTS])
def test_bytes_are_those_planned_with_the_bases(kv_heads):
    model = make_tiny("llama", num_key_value_heads=kv_heads)
    cache = kvarn.Cache(model, "xquant(bits=4, group=16)")
    model(PROMPT.repeat(1, 4), past_key_values=cache)
    report, layer = cache.report(), cache.spec.layers[0]
    assert report.bytes == cache.plan.bytes[0]
    bases = 4 * state_bytes(layer, torch.float32)
    assert report.by_format.get("bases", 0) == bases == (0 if kv_heads == INPUTS else 4 * 2 * 16 * 17 * 4)
    width = kept(layer).key_size + kept(layer).value_size
    assert width == (64 if kv_heads == INPUTS else 32)
    codes_and_scales = 4 * 360 * width * (4 / 8 + 8 / 16)
    assert codes_and_scales <= report.bytes - bases < 1.2 * codes_and_scales + 8 * 16 * 32 * 4  # and the open blocks


def test_a_second_model_of_the_same_kind_has_bases_of_its_own():
    one, other = (make_tiny("llama", seed, num_key_value_heads=LATENTS) for seed in (0, 1))
    full = logits_of(other, PROMPT, CONTINUATION, kvarn.Cache(other))
    kvarn.Cache(one, "xquant")
    near = logits_of(other, PROMPT, CONTINUATION, kvarn.Cache(other, "xquant(bits=8, group=16)"))
    torch.testing.assert_close(near, full, rtol=0, atol=0.1 * float(full.abs().max()))


def test_a_model_that_computes_keys_otherwise_is_refused():
    model = make_tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(Unsupported, match="in a way kvarn does not know"):
        model(PROMPT, past_key_values=kvarn.Cache(model, "xquant"))


def test_rows_of_a_layer_cannot_be_evicted_by_head():
    with pytest.raises(RecipeError, match="both decide what to keep"):
        kvarn.Recipe.parse("snapkv + xquant")


@pytest.mark.parametrize("parameters", [{"bits": 5}, {"group": 0}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="xquant"):
        XQuant(**parameters)


def test_a_needle_is_found_in_the_bytes_in_which_the_window_loses_it(smollm2):
    model, tokenizer = smollm2
    prompt = haystack_with_needle(tokenizer, 300, 0.1)
    cache = kvarn.Cache(model, "xquant")
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=7, do_sample=False)
    assert "73915" in tokenizer.decode(out[0, prompt.shape[1] :])
    report = cache.report()
    assert "73915" not in answer(smollm2, prompt, "window", report.ratio)
    bases = report.by_format["bases"]  # as many whatever the length
    assert report.bytes - bases < 0.2 * report.dense_bytes
