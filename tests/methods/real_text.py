"""How far recipes are from the full cache on a real text that is decoded token by token."""

from collections.abc import Sequence
from pydoc_data.topics import topics

import torch

import kvarn
from kvarn.methods import Method

TEXT = "\n\n".join(topics[name] for name in ("objects", "execmodel"))


@torch.no_grad()
def divergences(
    smollm2,
    recipes: Sequence[tuple[str | Method, float | int | None]],
    prompt: int = 120,
    steps: int = 8,
) -> list[float]:
    """Mean KL(full || recipe) in nats over the ``steps`` tokens that follow a prompt, of recipes and their budgets."""
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, : prompt + steps]

    def predictions(recipe: str | Method, budget: float | int | None) -> torch.Tensor:
        cache = kvarn.Cache(model, recipe, budget)
        model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
        logits = [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(prompt, prompt + steps)]
        return torch.cat(logits).double().log_softmax(-1)

    # The full cache predicts in one pass what it predicts step by step.
    full = model(ids, past_key_values=kvarn.Cache(model), logits_to_keep=steps).logits[0].double().log_softmax(-1)
    return [float((full.exp() * (full - predictions(*pair))).sum(-1).mean()) for pair in recipes]
