"""Rotary position embeddings as the model itself applies them, for keys that are kept before their rotation."""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import Unsupported

_VARYING = {"dynamic", "longrope"}  # frequencies depend on how long the sequence has become


class Rotary:
    """Rotates keys (or queries) of full-attention layers, and takes the rotation out of rotated ones.

    The frequencies and the function are the model's own, so partial rotations and scaled ones are as there. Raises
    Unsupported for models whose keys cannot be rotated later.
    """

    def __init__(self, model: PreTrainedModel):
        decoder = model.get_decoder()
        self._embedding: Any = getattr(decoder, "rotary_emb", None)
        self._apply: Any = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
        name = type(model).__name__
        if self._embedding is None or self._apply is None:
            raise Unsupported(f"{name} does not rotate keys by position, so kvarn cannot keep them before rotation")
        kinds = getattr(self._embedding, "rope_type", "default")
        if _VARYING & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            raise Unsupported(
                f"{name} changes its rotary frequencies as sequences grow, so kvarn cannot keep keys before rotation"
            )
        self._types = {"layer_type": "full_attention"} if hasattr(self._embedding, "layer_types") else {}
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys [B, K, n, D] as they are at ``positions`` (int64 [n] or [B, n])."""
        return self._apply(keys, keys[:, :0], *self._table(keys, positions))[0]

    def undo(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys [B, K, n, D] at ``positions`` (int64 [n] or [B, n]) as they were before their rotation."""
        exact = keys.to(torch.promote_types(keys.dtype, torch.float32))
        cos, sin = self._table(exact, positions)
        # A rotation undone is the one the other way; rounded and scaled cosines and sines also change the length.
        squared = cos**2 + sin**2
        return self._apply(exact, exact[:, :0], cos / squared, -sin / squared)[0].to(keys.dtype)

    def _table(self, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1 or B, n, D] in the dtype and on the device of ``keys``."""
        most = int(positions.max()) + 1 if positions.numel() else 1
        kind = keys.dtype, keys.device
        if kind not in self._tables or most > self._tables[kind][0].shape[0]:
            every = torch.arange(max(256, 2 * most), device=keys.device)[None]
            cos, sin = self._embedding(keys, every, **self._types)
            self._tables[kind] = cos[0], sin[0]
        cos, sin = self._tables[kind]
        index = torch.atleast_2d(positions.to(keys.device))
        return cos[index], sin[index]
