"""Keys kept before their rotation are rotated on reading: nothing else changes."""

from dataclasses import dataclass

import pytest
import torch

import kvarn
from kvarn.formats import Dense
from kvarn.memory import SideLayout
from kvarn.methods.base import Method
from kvarn.methods.razorattention import RazorAttention
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (2, 60), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(PROMPT)
MASK[0, :9] = 0


HEADS = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
RAZOR = RazorAttention(sinks=2, buffer=12, echo=0.125, induction=0.25, interval=4)
RECIPES = [
    (kvarn.Recipe(()), None),
    ("snapkv(window=8)", 40),
    ("h2o", 40),
    ("d2o(first_layers=0, last_layers=0)", 40),
    (RAZOR.with_learnt({"echo": HEADS, "induction": 1 - HEADS}), None),
]


@dataclass(frozen=True)
class Unrotated(Method):
    """Dense keys before their rotation."""

    name = "unrotated"

    def encoding(self, layer, dtype):
        keys, values = Dense(layer.key_size, dtype), Dense(layer.value_size, dtype)
        return SideLayout(keys, keys, before_rope=True), SideLayout(values, values)


def logits(model, recipe, budget):
    """Of a padded prompt, three steps, a second turn and two more steps."""
    cache = kvarn.Cache(model, recipe, budget)
    mask, out = MASK, [model(PROMPT, attention_mask=MASK, past_key_values=cache).logits]
    for ids in (*PROMPT[:, :3].T[..., None], PROMPT[:, 5:17], *PROMPT[:, 20:22].T[..., None]):
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = mask.cumsum(1)[:, -ids.shape[1] :] - 1
        out.append(model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    return torch.cat(out, 1)[MASK.new_ones(2, PROMPT.shape[1] + 17).index_fill_(1, torch.arange(9), 0) > 0], cache


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt_oss"])
@pytest.mark.parametrize(("recipe", "budget"), RECIPES)
def test_the_same_as_with_rotated_keys(architecture, recipe, budget):
    model = make_tiny(architecture)
    expected, _ = logits(model, recipe, budget)
    kept, cache = logits(model, kvarn.Recipe.parse(recipe) + Unrotated(), budget)
    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-3)
    group = next(group for group in cache._groups if group.layer.window is None)
    rotated = group._read(group.everyone)[0]
    assert not torch.allclose(group.store.read(group.everyone)[0], rotated, atol=0.1)
