"""Consecutive entries are read together, those first whose mean key answers to the query.

ShadowKV (arXiv 2410.21465). Shapes as in ``base``; n chunks, m chosen ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..formats import Columns, Dense
from ..memory import Beside
from ..spec import LayerSpec
from .base import Selection, State


@dataclass(frozen=True)
class Chunks(Selection):
    """Of chunks of ``size`` settled tokens, each KV head reads those whose mean keys (landmarks) get most of a softmax
    over all of them from one of its query heads: ``count`` tokens.

    ``outliers`` chunks of a first prompt, those with a key that points farthest from the mean, are kept exactly beside
    the others, and always read. ``local`` tokens at least do not settle. The values that were read last stay on the
    device.
    """

    size: int
    count: int
    local: int
    outliers: int

    @property
    def most(self) -> int:
        """Chunks that are read."""
        return self.count // self.size

    def beside(self, layer: LayerSpec, dtype: torch.dtype) -> Mapping[str, Beside]:
        exact = (self.size, layer.kv_heads, layer.key_size), (self.size, layer.kv_heads, layer.value_size)
        outliers = Columns(
            {"keys": (exact[0], dtype), "values": (exact[1], dtype), "chunk": ((layer.kv_heads,), torch.int32)}
        )
        return {
            "means": Beside(Dense(layer.kv_heads * layer.key_size, dtype), self.settled),
            "outliers": Beside(outliers, lambda tokens: self.settled(tokens).clamp(max=self.outliers)),
        }

    def state(self, layer: LayerSpec, dtype: torch.dtype, alike: bool) -> State:
        return {
            "values": ((layer.kv_heads, self.count, layer.value_size), dtype),
            "chunks": ((layer.kv_heads, self.most), torch.int64),
        }

    def settled(self, tokens: Tensor) -> Tensor:
        """Chunks among so many tokens."""
        return (tokens - self.local).clamp(min=0) // self.size

    def chosen(self, query: Tensor, means: Tensor, readable: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks that ``query`` [B, H, D] reads of those that are ``readable`` (bool [B, K, n]), by ``means`` [B, K, n,
        D]: int64 [B, K, m], and which of these count, bool."""
        grouped = query.unflatten(1, (means.shape[1], -1)).float()
        logits = grouped @ means.float().transpose(-1, -2) / query.shape[-1] ** 0.5
        paid = logits.masked_fill(~readable[:, :, None], -torch.inf).softmax(-1).amax(2)
        index = paid.masked_fill(~readable, -1.0).topk(min(self.most, paid.shape[-1]), sorted=False).indices
        return index, readable.gather(2, index)


def stray(keys: Tensor) -> Tensor:
    """The smallest cosine between the mean of a chunk and one of its keys: [..., size, D] -> [...]."""
    keys = keys.float()
    return cosine_similarity(keys, keys.mean(-2, keepdim=True), dim=-1).amin(-1)
