"""What the recipes are for, on SmolLM2-135M-Instruct's real weights."""

from pydoc_data.topics import topics

import pytest
import torch
from transformers import DynamicCache

import kvarn

NEEDLE = "The special magic number for the Kiruna mill is 73915."
QUESTION = "Answer from the text above. What is the special magic number for the Kiruna mill?"
HAYSTACK = "\n\n".join(topics[name] for name in ("objects", "execmodel", "import", "assignment", "class", "function"))


def haystack_with_needle(tokenizer, tokens: int, depth: float) -> torch.Tensor:
    """A chat prompt [1, about tokens] of a real text with the needle at ``depth``, and the question."""
    ids = tokenizer(HAYSTACK).input_ids[:tokens]
    cut = int(depth * len(ids))
    text = tokenizer.decode(ids[:cut]) + "\n" + NEEDLE + "\n" + tokenizer.decode(ids[cut:])
    chat = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


def answer(smollm2, prompt: torch.Tensor, recipe: str, budget: float | None) -> str:
    model, tokenizer = smollm2
    cache = kvarn.Cache(model, recipe, budget)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=16, do_sample=False
    )
    if budget is not None:
        assert cache.plan.bytes[0] <= budget * model.dtype.itemsize * 30 * 2 * 3 * 64 * prompt.shape[1]
    return tokenizer.decode(out[0, prompt.shape[1] :])


@pytest.mark.parametrize(("tokens", "depth"), [(2000, 0.2), (2000, 0.7)])
def test_snapkv_finds_at_a_quarter_of_the_bytes_what_the_window_loses(smollm2, tokens, depth):
    prompt = haystack_with_needle(smollm2[1], tokens, depth)
    assert "73915" in answer(smollm2, prompt, "full", None)
    assert "73915" in answer(smollm2, prompt, "snapkv", 0.25)
    assert "73915" not in answer(smollm2, prompt, "window", 0.25)


@torch.no_grad()
def test_full_equals_transformers_at_4k_tokens(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(HAYSTACK, return_tensors="pt").input_ids[:, :4000]
    own, ours = DynamicCache(config=model.config), kvarn.Cache(model)
    a = model(ids, past_key_values=own, logits_to_keep=1).logits
    b = model(ids, past_key_values=ours, logits_to_keep=1).logits
    for _ in range(12):
        assert torch.equal(a, b)
        token = a[:, -1:].argmax(-1)
        a, b = model(token, past_key_values=own).logits, model(token, past_key_values=ours).logits


@pytest.fixture(scope="module")
def divergences(smollm2) -> dict[str, float]:
    """Mean KL(full || recipe) in nats over the 48 tokens that really follow a text of 1,500 tokens."""
    model, tokenizer = smollm2
    ids = tokenizer(HAYSTACK, return_tensors="pt").input_ids[:, :1548]
    recipes = {
        "full": ("full", None),
        "window": ("window", 0.25),
        "h2o": ("h2o", 0.25),
        "snapkv": ("snapkv", 0.25),
        "kivi4": ("kivi(bits=4)", None),
        "kivi2": ("kivi(bits=2)", None),
        "snapkv+kivi4": ("snapkv + kivi(bits=4)", 0.25),
        "h2o+kivi4": ("h2o + kivi(bits=4)", 0.25),
    }
    predictions = {}
    with torch.no_grad():
        for name, (recipe, budget) in recipes.items():
            cache = kvarn.Cache(model, recipe, budget)
            model(ids[:, :1500], past_key_values=cache, logits_to_keep=1)
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(1500, 1548)]
            predictions[name] = torch.cat(steps).double().log_softmax(-1)
    full = predictions["full"]
    return {name: float((full.exp() * (full - p)).sum(-1).mean()) for name, p in predictions.items()}


def test_each_method_shows_its_point(divergences):
    assert divergences["full"] == 0
    assert divergences["h2o"] < divergences["window"]
    assert divergences["snapkv"] < divergences["window"]
    assert divergences["kivi4"] < divergences["kivi2"]
    assert divergences["kivi4"] < divergences["window"]
    assert divergences["snapkv+kivi4"] < divergences["snapkv"]
    assert divergences["h2o+kivi4"] < divergences["h2o"]
