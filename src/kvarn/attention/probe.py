"""A model's attention replaced by a function, to learn something about the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ..errors import Unsupported
from .reference import Part, Variant

NAME = "kvarn-probe"

Attention = Callable[[int, Tensor, Tensor, Tensor, Variant], Tensor]
_attention: list[Attention] = []


@contextmanager
def attending(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """While inside, layers of ``model`` attend by ``attention(layer, query [B, H, q, D], keys [B, K, q, D], values,
    variant) -> [B, H, q, D]``, which also has to mask. For whole sequences without padding and without a cache."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _attention.append(attention)
    try:
        if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
            raise Unsupported(f"{type(model).__name__} does not let its attention be replaced")
        yield
    finally:
        _attention.pop()
        model.set_attn_implementation(before)


def causal(keys: Tensor, values: Tensor, window: int | None) -> Part:
    """What a layer with a sliding window of so many tokens (None: none) attends to without a cache."""
    if window is None:
        return Part(keys, values, causal=True)
    place = torch.arange(keys.shape[2], device=keys.device)
    age = place[:, None] - place
    return Part(keys, values, ((age >= 0) & (age < window))[None, None])


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    variant = Variant(scaling if scaling is not None else query.shape[-1] ** -0.5, softcap, s_aux)
    out = _attention[-1](cast(int, module.layer_idx), query, key, value, variant)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(**arguments: Any) -> None:
    return None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _no_mask)
