"""FP8: keys and values as 8-bit floats."""

from dataclasses import dataclass

import torch

from ..formats import Dense, Float8
from ..memory import SideLayout
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class FP8(Method):
    """Keeps every key and every value as e4m3 with a scale of its own.

    The largest number of a vector becomes the largest that e4m3 has; each number is kept within a sixteenth of itself.
    Nothing stays exact: a generated token is encoded where it is stored, so that its own step reads it so too. Prompts
    are attended to exactly.
    """

    name = "fp8"
    family = "quantization"
    acts = "end of prompt, every decoding step"
    needs = "nothing"
    citation = "FP8 Formats for Deep Learning, 2022, arXiv 2209.05433"

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        return _side(layer.key_size, dtype), _side(layer.value_size, dtype)


def _side(size: int, dtype: torch.dtype) -> SideLayout:
    return SideLayout(Float8(size, dtype), Dense(size, dtype), encodes_new=True)
