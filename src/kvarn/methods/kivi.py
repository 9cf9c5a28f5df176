"""KIVI: keys quantized per channel, values per token, the newest tokens exact."""

from dataclasses import dataclass

import torch

from ..errors import RecipeError
from ..formats import Dense, Int
from ..memory import SideLayout
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class KIVI(Method):
    """Quantizes keys per channel in blocks of ``residual`` tokens, values per token; tuning-free.

    A channel of ``group`` consecutive keys, or ``group`` channels of one value, share a scale and a minimum. Of the
    keys the newest T mod ``residual`` stay exact, of the values the newest ``residual``. Prompts are attended to
    exactly, and every token is exact in the step that brings it.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128

    name = "kivi"
    family = "quantization"
    acts = "end of prompt, every decoding step"
    needs = "nothing"
    citation = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, 2024, arXiv 2402.02750"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise RecipeError(f"{self}: bits is 2, 3, 4 or 8")
        if self.group < 1 or self.residual < 1 or self.residual % self.group:
            raise RecipeError(f"{self}: residual must be a positive multiple of group")

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        keys = SideLayout(
            Int(self.bits, "channel", self.group, layer.key_size, dtype),
            Dense(layer.key_size, dtype),
            block=self.residual,
        )
        values = SideLayout(
            Int(self.bits, "token", self.group, layer.value_size, dtype),
            Dense(layer.value_size, dtype),
            hold=self.residual,
        )
        return keys, values
