"""XQuant: the inputs of layers, quantized; keys and values are computed again when they are read."""

from dataclasses import dataclass

import torch

from .. import rematerialization
from ..errors import RecipeError
from ..memory import SideLayout
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class XQuant(Method):
    """Keeps what keys and values are computed from, and computes them on reading.

    Models whose keys and values together are as wide as a layer's input keep that input, quantized per token. Others
    (grouped queries) keep its two latents, as wide as the keys and the values: those of the keys quantized per channel
    in blocks of ``group`` tokens, of which the newest block stays exact, those of the values per token. ``group``
    numbers share a scale and a minimum; where it does not divide a width, its largest divisor in common does.
    """

    bits: int = 4
    group: int = 128

    name = "xquant"
    keeps_inputs = True
    family = "rematerialization"
    acts = "end of prompt, every decoding step"
    needs = "inputs of layers"
    citation = (
        "XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization, 2025, arXiv 2508.10395"
    )

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise RecipeError(f"{self}: bits is 2, 3, 4 or 8")
        if self.group < 1:
            raise RecipeError(f"{self}: group is at least 1")

    def rows(self, layer: LayerSpec) -> LayerSpec:
        return rematerialization.kept(layer)

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        return rematerialization.encoded(layer, self.bits, self.group, dtype)
