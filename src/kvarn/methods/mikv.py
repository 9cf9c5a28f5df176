"""MiKV: what others would evict stays in few bits."""

from dataclasses import dataclass

import torch

from ..errors import RecipeError
from ..formats import Balanced, Dense, Int
from ..memory import SideLayout
from ..reduction import Precision
from ..scoring import AccumulatedMass
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class MiKV(Method):
    """Keeps the share ``ratio`` of a head's entries in ``high`` bits, all others in ``low`` bits, and drops none.

    The high ones are the newest (half of them) and those with the largest attention mass accumulated over all queries.
    An entry that is no longer among them becomes a low one for good. ``groups`` groups of channels of a token share a
    scale and a minimum. With ``balancer``, quantized keys are multiplied by sqrt(max |q| / max |k|) of each channel,
    from the first prompt, and divided by it on reading: outliers of queries and keys meet in the middle. ``high`` is
    16, exact entries in the model's dtype, or 8 or 4.
    """

    ratio: float = 0.2
    high: int = 16
    low: int = 2
    groups: int = 2
    balancer: bool = True

    name = "mikv"
    family = "quantization"
    acts = "end of prompt, every decoding step"
    needs = "attention mass of every query"
    citation = (
        "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization, 2024, "
        "arXiv 2402.18096"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise RecipeError(f"{self}: needs 0 <= ratio <= 1")
        if self.high not in (4, 8, 16) or self.low not in (2, 3, 4, 8) or self.low > self.high:
            raise RecipeError(f"{self}: high is 16, 8 or 4, low is 8, 4, 3 or 2, and not above high")
        if self.groups < 1:
            raise RecipeError(f"{self}: groups is at least 1")

    def precision(self, layer: LayerSpec, dtype: torch.dtype) -> Precision:
        high, low = ((self._keys(layer, dtype, b), self._values(layer, dtype, b)) for b in (self.high, self.low))
        return Precision(AccumulatedMass(), high, low, self.ratio, recent_share=0.5)

    def _keys(self, layer: LayerSpec, dtype: torch.dtype, bits: int) -> SideLayout:
        dense, codes = Dense(layer.key_size, dtype), self._codes(layer.key_size, dtype, bits)
        if codes is None:
            return SideLayout(dense, dense)
        return SideLayout(Balanced(codes, layer.key_size, dtype) if self.balancer else codes, dense)

    def _values(self, layer: LayerSpec, dtype: torch.dtype, bits: int) -> SideLayout:
        dense = Dense(layer.value_size, dtype)
        return SideLayout(self._codes(layer.value_size, dtype, bits) or dense, dense)

    def _codes(self, size: int, dtype: torch.dtype, bits: int) -> Int | None:
        if bits == 16:
            return None
        if size % self.groups:
            raise RecipeError(f"{self}: groups must divide the head size {size}")
        return Int(bits, "token", size // self.groups, size, dtype)
