"""XQuant-CL against plain loops and the identities of its paper (arXiv 2508.10395, section 3.3)."""

import math
from dataclasses import dataclass
from pydoc_data.topics import topics

import pytest
import torch

import kvarn
from drive import logits_of
from kvarn.errors import RecipeError
from kvarn.formats import Dense
from kvarn.memory import SideLayout
from kvarn.methods.xquantcl import XQuantCL
from kvarn.rematerialization import inputs_of
from kvarn.spec import LayerSpec, ModelSpec
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 60), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (6,), generator=torch.Generator().manual_seed(2))
LATENTS, INPUTS = 1, 4  # KV heads of tiny models that keep latents, and of those that keep inputs


@dataclass(frozen=True)
class Exact(XQuantCL):
    """Differences as they are."""

    name = "exact"

    def encoding(self, layer, dtype):
        layer = self.rows(layer)
        keys, values = Dense(layer.key_size, dtype), Dense(layer.value_size, dtype)
        return SideLayout(keys, keys), SideLayout(values, values)


class Watched(kvarn.Cache):
    """A cache that remembers the inputs of every layer, token after token."""

    def attend(self, module, layer, query, keys, values, mask, variant):
        seen = self.__dict__.setdefault("inputs", {}).setdefault(layer, [])
        seen.append(self._input[0])
        return super().attend(module, layer, query, keys, values, mask, variant)


@pytest.mark.parametrize("kv_heads", [LATENTS, 2, INPUTS])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_with_exact_differences_it_is_full(name, kv_heads):
    model = make_tiny(name, num_key_value_heads=kv_heads)
    expected = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model))
    found = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, Exact(first=1)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def naive_int(numbers: list[float], bits: int) -> tuple[list[float], float]:
    low, high = min(numbers), max(numbers)
    scale = (high - low) / (2**bits - 1)
    return [low + scale * (round((x - low) / scale) if scale else 0) for x in numbers], scale


def test_differences_are_taken_against_what_the_layer_before_gives_back():
    model = make_tiny("llama", num_key_value_heads=INPUTS)
    cache = Watched(model, "xquantcl(bits=3, group=16, first=2)")
    logits_of(model, PROMPT, CONTINUATION, cache)
    inputs = {layer: torch.cat(seen) for layer, seen in cache.inputs.items()}
    for token in (0, 33, 59, 60, 65):  # of the prompt and of the steps after it
        known, stale = [0.0] * 64, [0.0] * 64
        for layer in (1, 2, 3):
            group = cache._group_of[layer]
            stored = group.store.keys.read(group.heads(layer))[0, token].tolist()
            given = inputs[layer][token].tolist()
            before = inputs[layer - 1][token].tolist() if layer > 1 else known
            for start in range(0, 64, 16):
                part = range(start, start + 16)
                found, scale = naive_int([given[c] - known[c] for c in part], 4 if layer == 1 else 3)
                assert stored[start : start + 16] == pytest.approx(found, abs=1e-4)
                blind, _ = naive_int([given[c] - before[c] for c in part], 4 if layer == 1 else 3)
                for c, x, y in zip(part, found, blind, strict=True):
                    known[c] += x
                    stale[c] += y
                    assert abs(known[c] - given[c]) <= scale / 2 + 1e-4  # no error of the layers before
        errors = [math.dist(x, given) for x in (known, stale)]
        assert errors[1] > 1.1 * errors[0]  # what adds up differences of the inputs themselves adds up errors


def test_latents_lie_along_what_both_projections_read():
    model = make_tiny("llama", num_key_value_heads=LATENTS)
    spec = kvarn.Recipe.parse("xquantcl(first=1)").told_apart(ModelSpec.from_config(model.config, model.dtype))
    layer, attention = inputs_of(model, spec)[2], model.model.layers[2].self_attn
    assert layer.directions.shape == (64, 32)
    torch.testing.assert_close(layer.directions.T @ layer.directions, torch.eye(32), rtol=1e-4, atol=1e-5)
    for projection in (attention.k_proj.weight, attention.v_proj.weight):
        torch.testing.assert_close(projection @ layer.directions @ layer.directions.T, projection, rtol=1e-4, atol=1e-5)


def test_the_paper_counts_these_bytes():
    spec = ModelSpec("llama", (LayerSpec(32, 32, 128, 128, None, 4096),) * 32, torch.float16, None)
    for bits, expected in ((3, 0.105), (2, 0.076)):
        recipe = kvarn.Recipe.parse(f"xquantcl({bits=})")
        token = sum(
            recipe.layout(layer, spec.dtype, 16).keys.format.unit_bytes for layer in recipe.told_apart(spec).layers
        )
        assert (
            token / spec.dense_bytes(1)
            == pytest.approx((29 * (bits + 0.25) + 3 * 4.25) / 1024)
            == pytest.approx(expected, abs=1e-3)
        )


@pytest.mark.parametrize("kv_heads", [LATENTS, INPUTS])
def test_bytes_are_those_planned_with_the_directions(kv_heads):
    model = make_tiny("llama", num_key_value_heads=kv_heads)
    cache = kvarn.Cache(model, "xquantcl(group=16, first=2)")
    model(PROMPT.repeat(1, 4), past_key_values=cache)
    report = cache.report()
    assert report.bytes == cache.plan.bytes[0]
    directions, bases = 2 * 64 * 32 * 4, 2 * 16 * 17 * 4
    assert report.by_format.get("bases", 0) == (0 if kv_heads == INPUTS else directions + bases)


def test_more_bits_are_nearer_to_full_in_prompts_turns_and_steps():
    model = make_tiny("llama", num_key_value_heads=INPUTS)

    def turns(recipe):
        cache = kvarn.Cache(model, recipe)
        out = [model(PROMPT[:, :40], past_key_values=cache).logits]
        out += [model(token.view(1, 1), past_key_values=cache).logits for token in CONTINUATION]
        out.append(model(PROMPT[:, 40:], past_key_values=cache).logits)
        return torch.cat(out, 1)

    with torch.no_grad():
        full = turns("full")
        recipes = [f"xquantcl({bits=}, first=1, first_bits=8, group=16)" for bits in (2, 4, 8)]
        errors = [float((turns(recipe) - full).norm()) for recipe in (*recipes, "xquant(bits=4, group=16)")]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    assert errors[3] > 2 * errors[1]


@pytest.mark.parametrize("parameters", [{"bits": 5}, {"first_bits": 1}, {"group": 0}, {"first": 0}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="xquantcl"):
        XQuantCL(**parameters)


def test_on_a_real_text_two_bits_of_differences_are_closer_than_two_of_inputs_in_fewer_bytes(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(topics["execmodel"], return_tensors="pt").input_ids[:, :256]
    tokens, predictions = [], []
    with torch.no_grad():
        for recipe in ("full", "xquantcl(group=64)", "xquant(bits=2, group=64)"):
            cache = kvarn.Cache(model, recipe)
            model(ids[:, :250], past_key_values=cache, logits_to_keep=1)
            report = cache.report()
            tokens.append(report.bytes - report.by_format.get("bases", 0))
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(250, 256)]
            predictions.append(torch.cat(steps).double().log_softmax(-1))
    full, differences, inputs = predictions
    divergence = [float((full.exp() * (full - found)).sum(-1).mean()) for found in (differences, inputs)]
    assert tokens[1] < tokens[2]
    assert divergence[0] < 0.85 * divergence[1]
