"""GEAR: integers, and what they miss as a low-rank part and a few exact outliers."""

from dataclasses import dataclass

import torch

from ..errors import RecipeError
from ..formats import Corrected, Dense, Int
from ..formats.integer import Axis
from ..memory import SideLayout
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class GEAR(Method):
    """Quantizes blocks of ``block`` tokens, keys per channel and values per token, and corrects the error of each block
    and head.

    The share ``outliers`` of numbers that stretch the ranges is kept exactly, and of what is missed then ``rank`` pairs
    of factors, found by ``loops`` power iterations. ``group`` numbers share a scale. The newest T mod ``block`` tokens
    stay exact, and prompts are attended to exactly. ``outliers=0.0`` is GEAR-L.
    """

    bits: int = 2
    group: int = 64
    block: int = 64
    rank: int = 2
    outliers: float = 0.02
    loops: int = 3

    name = "gear"
    family = "quantization"
    acts = "end of prompt, every decoding step"
    needs = "nothing"
    citation = (
        "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM, 2024, "
        "arXiv 2403.05527"
    )

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise RecipeError(f"{self}: bits is 2, 3, 4 or 8")
        if self.group < 1 or self.block < 1 or self.block % self.group:
            raise RecipeError(f"{self}: block must be a positive multiple of group")
        if self.rank < 0 or self.loops < 1 or not 0 <= self.outliers <= 1:
            raise RecipeError(f"{self}: needs rank >= 0, loops >= 1 and 0 <= outliers <= 1")

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        return self._side("channel", layer.key_size, dtype), self._side("token", layer.value_size, dtype)

    def _side(self, axis: Axis, size: int, dtype: torch.dtype) -> SideLayout:
        if self.rank > min(self.block, size):
            raise RecipeError(f"{self}: rank is at most the block and the head size, here {min(self.block, size)}")
        backbone = Int(self.bits, axis, self.group, size, dtype)
        corrected = Corrected(backbone, self.block, self.rank, self.outliers, self.loops)
        return SideLayout(corrected, Dense(size, dtype), block=self.block)
