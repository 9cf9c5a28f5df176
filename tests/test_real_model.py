"""What the recipes are for, on SmolLM2-135M-Instruct's real weights."""

from copy import deepcopy
from pydoc_data.topics import topics

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import kvarn
from methods.real_text import divergences

NEEDLE = "The special magic number for the Kiruna mill is 73915."
QUESTION = "Answer from the text above. What is the special magic number for the Kiruna mill?"
BEGINNING = "The special magic number for the Kiruna mill is"  # of the answer; its number follows at once
HAYSTACK = "\n\n".join(topics[name] for name in ("objects", "execmodel", "import", "assignment", "class", "function"))


def haystack_with_needle(tokenizer, tokens: int, depth: float) -> torch.Tensor:
    """A chat prompt [1, about tokens] of a real text with the needle at ``depth``, the question, and the beginning of
    an answer."""
    ids = tokenizer(HAYSTACK).input_ids[:tokens]
    cut = int(depth * len(ids))
    text = tokenizer.decode(ids[:cut]) + "\n" + NEEDLE + "\n" + tokenizer.decode(ids[cut:])
    chat = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(prompt + BEGINNING, return_tensors="pt", add_special_tokens=False).input_ids


def answer(smollm2, prompt: torch.Tensor, recipe: str, budget: float | None) -> str:
    model, tokenizer = smollm2
    cache = kvarn.Cache(model, recipe, budget)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=7, do_sample=False
    )
    if budget is not None:
        assert cache.plan.bytes[0] <= budget * model.dtype.itemsize * 30 * 2 * 3 * 64 * prompt.shape[1]
    return tokenizer.decode(out[0, prompt.shape[1] :])


@pytest.mark.parametrize(("tokens", "depth"), [(500, 0.2), (500, 0.7)])
def test_snapkv_finds_at_a_quarter_of_the_bytes_what_the_window_loses(smollm2, tokens, depth):
    prompt = haystack_with_needle(smollm2[1], tokens, depth)
    assert "73915" in answer(smollm2, prompt, "full", None)
    assert "73915" in answer(smollm2, prompt, "snapkv", 0.25)
    assert "73915" not in answer(smollm2, prompt, "window", 0.25)


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A model of its first ``count`` layers with the same weights."""
    config = deepcopy(model.config)
    config.num_hidden_layers = count
    part = type(model)(config).eval()
    part.load_state_dict(model.state_dict(), strict=False)
    return part


@pytest.mark.parametrize(("layers", "tokens"), [(30, 300), (2, 4000)])
@torch.no_grad()
def test_full_equals_transformers(smollm2, layers, tokens):
    model, tokenizer = smollm2
    model = first_layers(model, layers) if layers < model.config.num_hidden_layers else model
    ids = tokenizer(HAYSTACK, return_tensors="pt").input_ids[:, :tokens]
    own, ours = DynamicCache(config=model.config), kvarn.Cache(model)
    a = model(ids, past_key_values=own, logits_to_keep=1).logits
    b = model(ids, past_key_values=ours, logits_to_keep=1).logits
    for _ in range(12):
        assert torch.equal(a, b)
        token = a[:, -1:].argmax(-1)
        a, b = model(token, past_key_values=own).logits, model(token, past_key_values=ours).logits


def test_each_method_shows_its_point(smollm2):
    keeping = ("window", "h2o", "snapkv", "snapkv + kivi(bits=4, residual=32)", "h2o + kivi(bits=4, residual=32)")
    evicting = [(recipe, 0.25) for recipe in keeping]
    others = [(recipe, None) for recipe in ("kivi(bits=4)", "kivi(bits=2)", "full")]
    found = divergences(smollm2, evicting + others, prompt=300)
    window, h2o, snapkv, coded_snapkv, coded_h2o, kivi4, kivi2, full = found
    assert full < 1e-9
    assert h2o < window
    assert snapkv < window
    assert kivi4 < kivi2
    assert kivi4 < window
    assert coded_snapkv < snapkv
    assert coded_h2o < h2o
