"""The tiny random models must be worth testing with: reproducible, and with attention that chooses."""

import pytest
import torch

from tiny_models import TINY, make_tiny

PROMPT = torch.randint(2, 160, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TINY)
def test_reproducible_and_not_degenerate(name):
    model, twin = make_tiny(name), make_tiny(name)
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, twin.state_dict()[key]), key
    mask = torch.ones_like(PROMPT)
    tokens = model.generate(PROMPT, attention_mask=mask, max_new_tokens=30, do_sample=False)[:, 48:]
    assert tokens.shape == (2, 30)
    assert all(len(set(row.tolist())) > 10 for row in tokens)


@pytest.mark.parametrize("name", TINY)
def test_logits_depend_on_a_distant_token(name):
    model = make_tiny(name)
    changed = PROMPT.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 160
    assert (model(PROMPT).logits[:, -1] - model(changed).logits[:, -1]).abs().max() > 1e-3
