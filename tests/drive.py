"""Driving a model and a cache by hand, the same way for every test."""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


@torch.no_grad()
def logits_of(
    model: PreTrainedModel, prompts: Tensor, continuation: Tensor, cache: Cache, mask: Tensor | None = None
) -> Tensor:
    """Prefills ``prompts`` ([B, n]), then feeds ``continuation`` ([m]) to every sequence token by token.

    ``mask`` (int64 [B, n]) is 0 for padding. Returns logits [B, 1 + m, vocabulary].
    """
    mask = torch.ones_like(prompts) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = [model(prompts, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1:]]
    for token in continuation:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        ids = token.expand(len(mask), 1)
        step = model(ids, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache)
        out.append(step.logits)
    return torch.cat(out, 1)


def left_padded(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One batch [B, longest] of sequences ([n] each) padded on the left with 0, and its mask."""
    longest = max(map(len, sequences))
    ids = torch.stack([torch.cat([s.new_zeros(longest - len(s)), s]) for s in sequences])
    mask = torch.stack([torch.cat([s.new_zeros(longest - len(s)), torch.ones_like(s)]) for s in sequences])
    return ids, mask
