"""The same on a GPU as on the CPU."""

import pytest
import torch

import kvarn
from conftest import make_tiny
from drive import left_padded, logits_of
from test_cache import CONTINUATION, PROMPT, RECIPES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("recipe", "budget"), RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma2", "gpt_oss"])
def test_a_gpu_gives_what_the_cpu_gives(recipe, budget, architecture):
    ids, mask = left_padded([PROMPT[0, :90], PROMPT[0, 10:57]])
    outcome = {}
    for device in ("cpu", "cuda"):
        model = make_tiny(architecture).to(device)
        cache = kvarn.Cache(model, recipe, budget)
        logits = logits_of(model, ids.to(device), CONTINUATION.to(device), cache, mask.to(device))
        outcome[device] = logits.cpu(), cache.report().entries
    torch.testing.assert_close(outcome["cuda"][0], outcome["cpu"][0], rtol=5e-3, atol=5e-3)
    assert outcome["cuda"][1] == outcome["cpu"][1]


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
