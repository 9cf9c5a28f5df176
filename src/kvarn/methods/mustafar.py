"""Mustafar: the small numbers of every key and value are left out."""

from dataclasses import dataclass

import torch

from ..errors import RecipeError
from ..formats import Dense, Sparse
from ..memory import SideLayout
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class Mustafar(Method):
    """Of each key and each value, the share ``key_sparsity`` or ``value_sparsity`` of numbers smallest in magnitude is
    left out; the newest ``recent`` tokens stay whole.

    What stays is packed, with a bitmap of its channels. Prompts are attended to exactly; while decoding, one token a
    step grows old and is pruned.
    """

    key_sparsity: float = 0.5
    value_sparsity: float = 0.5
    recent: int = 32

    name = "mustafar"
    family = "pruning"
    acts = "end of prompt, every decoding step"
    needs = "nothing"
    citation = "MUSTAFAR: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference, 2025, arXiv 2505.22913"

    def __post_init__(self) -> None:
        if not 0 <= min(self.key_sparsity, self.value_sparsity) <= max(self.key_sparsity, self.value_sparsity) < 1:
            raise RecipeError(f"{self}: needs 0 <= key_sparsity, value_sparsity < 1")
        if self.recent < 0:
            raise RecipeError(f"{self}: recent is at least 0")

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        return (
            self._side(self.key_sparsity, layer.key_size, dtype),
            self._side(self.value_sparsity, layer.value_size, dtype),
        )

    def _side(self, sparsity: float, size: int, dtype: torch.dtype) -> SideLayout:
        dense = Dense(size, dtype)
        pruned = int(sparsity * size)
        return SideLayout(Sparse(size - pruned, size, dtype) if pruned else dense, dense, hold=self.recent)
