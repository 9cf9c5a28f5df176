"""The same on a GPU as on the CPU."""

import re

import pytest
import torch

import kvarn
from drive import left_padded, logits_of
from methods.one_layer import OneLayer, random_tokens, split
from test_cache import CONTINUATION, PROMPT, RECIPES
from tiny_models import make_tiny

pytestmark = pytest.mark.gpu


# One number that is rounded the other way, or the other of two equal tokens that is chosen, changes what follows.
CODED = ("kivi", "fp8", "gear", "mikv", "vidkv", "xquant", "kvquant", "rotatekv", "zipcache", "arkv", "tokenselect")
EXACT = [pair for pair in RECIPES if not any(name in str(pair[0]) for name in CODED)]
EVERYWHERE = [pair for pair in EXACT if not re.search("fastkv|minicache", str(pair[0]))]


@pytest.mark.parametrize(
    ("architecture", "recipe", "budget"),
    [("llama", *pair) for pair in EXACT]
    + [(name, *pair) for name in ("gemma3", "gemma2", "gpt_oss") for pair in EVERYWHERE],
)
def test_a_gpu_gives_what_the_cpu_gives(architecture, recipe, budget):
    ids, mask = left_padded([PROMPT[0, :90], PROMPT[0, 12:61]])  # where no recipe has to choose between equals
    outcome = {}
    for device in ("cpu", "cuda"):
        model = make_tiny(architecture).to(device)
        cache = kvarn.Cache(model, recipe, budget)
        logits = logits_of(model, ids.to(device), CONTINUATION.to(device), cache, mask.to(device))
        outcome[device] = logits.cpu(), cache.report().entries
    torch.testing.assert_close(outcome["cuda"][0], outcome["cpu"][0], rtol=5e-3, atol=5e-3)
    assert outcome["cuda"][1] == outcome["cpu"][1]


@pytest.mark.parametrize(
    "recipe",
    [
        "kivi(bits=4, group=8, residual=16)",
        "h2o + kivi(bits=8, group=8, residual=16)",
        "h2o + fp8",
        "zipcache(gap=8)",
        "tokenselect(sinks=2, local=8, count=10, chunk=8)",
    ],
)
def test_a_layer_holds_the_same_numbers(recipe):
    """Layer by layer: through a whole model, one number that is rounded the other way changes all that follow."""
    tokens = random_tokens(120)
    layers = {device: OneLayer(recipe, 60, device) for device in ("cpu", "cuda")}
    for first, last in [(0, 80), *((t, t + 1) for t in range(80, 120))]:
        outs = []
        for device, layer in layers.items():
            step = layer.prompt if last - first > 1 else layer.token
            outs.append(step(*(t.to(device) for t in split(tokens, first, last))).cpu())
        torch.testing.assert_close(*outs, rtol=1e-2, atol=1e-2)
    for ours, theirs in zip(*(layer.keys_and_values() for layer in layers.values()), strict=True):
        assert (ours - theirs.cpu()).abs().gt(1e-3).double().mean() < 1e-3


@pytest.mark.parametrize(("recipe", "budget"), RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(recipe, budget, dtype):
    model = make_tiny("llama").to("cuda", dtype)
    cache = kvarn.Cache(model, recipe, budget)
    assert bool(logits_of(model, PROMPT.cuda(), CONTINUATION.cuda(), cache).isfinite().all())


def test_held_bytes_are_device_memory():
    model = make_tiny("llama").cuda()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = kvarn.Cache(model, "snapkv(window=8)", 0.25)
    with torch.no_grad():
        model(PROMPT.repeat(1, 10).cuda(), past_key_values=cache)
    torch.cuda.synchronize()
    report = cache.report()
    taken = torch.cuda.memory_allocated() - before
    assert report.bytes - report.by_format["tables"] <= taken + 8 * 10**4
    assert taken <= report.reserved_bytes + 2**20
