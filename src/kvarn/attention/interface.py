"""kvarn as an attention implementation of transformers, under the name "kvarn".

``Cache.update`` returns ``Pending`` states instead of tensors; the attention function finds them and hands the queries
to the cache, the one place where queries, keys and values are together. With any other cache the function computes
what transformers' own "sdpa" (or, where that cannot, "eager") computes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..errors import Unsupported
from .reference import Part, Variant, attend

NAME = "kvarn"


class Attends(Protocol):
    """What a cache does with the queries of a layer; all tensors [B, heads, q, D]."""

    def attend(
        self, module: nn.Module, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: "Mask", variant: Variant
    ) -> Tensor: ...


@dataclass(slots=True)
class Pending:
    """New keys or values of one layer on their way from ``Cache.update`` to attention."""

    states: Tensor
    cache: Attends
    layer: int


@dataclass(frozen=True)
class Mask:
    """A mask that transformers asked for, built only where a tensor is needed."""

    arguments: dict[str, Any]

    @cached_property
    def tensor(self) -> Tensor | None:
        """The mask as transformers' sdpa takes it."""
        return sdpa_mask(**self.arguments)

    @cached_property
    def valid(self) -> Tensor | None:
        """Which of the new tokens are not padding, bool [B, q]; None where all are."""
        padding, end = self.arguments.get("attention_mask"), self.arguments["kv_length"]
        if padding is None:
            return None
        new = padding[:, end - self.arguments["q_length"] : end].bool()
        return None if bool(new.all()) else new

    @property
    def custom(self) -> bool:
        """Whether the model asked for more than causal attention, a sliding window and padding."""
        return bool(self.arguments.get("use_vmap")) or not self.arguments.get("allow_is_causal_skip", True)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Pending,
    value: Tensor | Pending,
    attention_mask: Mask | Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns [B, q, H, D]."""
    variant = Variant(scaling if scaling is not None else query.shape[-1] ** -0.5, softcap, s_aux)
    if isinstance(key, Pending) and isinstance(value, Pending):
        if not isinstance(attention_mask, Mask) or attention_mask.custom or kwargs.get("position_bias") is not None:
            raise Unsupported(
                f"{type(module).__name__} was given a custom attention mask or a position bias; a kvarn cache supports "
                "causal attention, sliding windows and 2-d padding masks only"
            )
        out = key.cache.attend(module, key.layer, query, key.states, value.states, attention_mask, variant)
        return out.transpose(1, 2).contiguous(), None
    assert isinstance(key, Tensor)
    assert isinstance(value, Tensor)
    mask = attention_mask.tensor if isinstance(attention_mask, Mask) else attention_mask
    if variant.plain:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    if query.requires_grad or (mask is not None and mask.dtype != torch.bool):
        raise Unsupported(
            f"{type(module).__name__} soft-caps logits or has sinks, for which kvarn's attention takes neither "
            "gradients nor additive masks; use model.set_attn_implementation('eager') for that"
        )
    out = attend(query, [Part(key, value, mask, causal=mask is None)], variant)
    return out.transpose(1, 2).contiguous(), None


def _mask(**arguments: Any) -> Mask:
    return Mask(arguments)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
