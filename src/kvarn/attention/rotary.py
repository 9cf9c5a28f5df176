"""Rotary position embeddings as the model itself applies them, for keys that are kept before their rotation."""

import sys
from functools import cached_property
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
        self._reserved = 0

    @cached_property
    def halves(self) -> int:
        """The size of keys that rotate by halves, channel c and channel c + size / 2 by one angle; 0: none do."""
        device = next(self._embedding.buffers()).device
        cos, sin = self._embedding(torch.empty(0, device=device), torch.arange(3, device=device)[None], **self._types)
        size, half = cos.shape[-1], cos.shape[-1] // 2
        keys = torch.arange(1.0, size + 1, device=device).expand(1, 1, 3, -1)
        turned = self._apply(keys, keys[:, :0], torch.zeros_like(cos), torch.ones_like(sin))[0]
        same = torch.equal(turned, torch.cat([-keys[..., half:], keys[..., :half]], -1))
        return size if same and all(torch.equal(x[..., :half], x[..., half:]) for x in (cos, sin)) else 0

    def reserve(self, tokens: int) -> None:
        """Makes ready for positions below ``tokens``, so that a decoding step needs to make and to look up nothing."""
        self._reserved = max(self._reserved, tokens)
        for dtype, device in list(self._tables):
            self.tables(dtype, device)

    def tables(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions that were reserved, [n, D] each."""
        return self._long_enough(self._reserved, dtype, device)

    @property
    def addresses(self) -> list[int]:
        """Where all tables are; they move when they have to grow."""
        return [table.data_ptr() for pair in self._tables.values() for table in pair]

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys [B, K, n, D] as they are at ``positions`` (int64 [n] or [B, n])."""
        return self._apply(keys, keys[:, :0], *self._table(keys, positions))[0]

    def undo(self, keys: Tensor, positions: Tensor, below: int | None = None) -> Tensor:
        """Keys [B, K, n, D] at ``positions`` (int64 [n] or [B, n]) as they were before their rotation. ``below``: a
        bound of the positions beside what was reserved, where it is known; without it, the device is waited for."""
        exact = keys.to(torch.promote_types(keys.dtype, torch.float32))
        cos, sin = self._table(exact, positions, below)
        # A rotation undone is the one the other way; rounded and scaled cosines and sines also change the length.
        squared = cos**2 + sin**2
        return self._apply(exact, exact[:, :0], cos / squared, -sin / squared)[0].to(keys.dtype)

    def _table(self, keys: Tensor, positions: Tensor, below: int | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1 or B, n, D] in the dtype and on the device of ``keys``."""
        if below is None:
            below = int(positions.max()) + 1 if positions.numel() else 1
        cos, sin = self._long_enough(max(below, self._reserved), keys.dtype, keys.device)
        index = torch.atleast_2d(positions.to(keys.device))
        return cos[index], sin[index]

    def _long_enough(self, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        kind = dtype, device
        if kind not in self._tables or tokens > self._tables[kind][0].shape[0]:
            every = torch.arange(max(256, 2 * tokens), device=device)[None]
            cos, sin = self._embedding(torch.empty(0, dtype=dtype, device=device), every, **self._types)
            self._tables[kind] = cos[0].contiguous(), sin[0].contiguous()
        return self._tables[kind]
