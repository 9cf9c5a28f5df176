"""VidKV: below two bits, for prompts of many alike tokens."""

from dataclasses import dataclass

import torch

from ..errors import RecipeError
from ..formats import Dense, Int, Spectral, Ternary
from ..memory import SideLayout
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class VidKV(Method):
    """Quantizes keys and values per channel in groups of ``group`` tokens, made for video prompts.

    Keys of ``key_bits`` between 1 and 2: the channels of a head with the largest ranges have 2 bits, the others 1 bit
    for each number of their Fourier transform along the channels. Values of ``value_bits=1.58`` are -1, 0 or 1 times a
    scale, 0 within ``threshold`` times the mean magnitude; ``value_bits=2.0`` are 2-bit codes. The newest T mod
    ``residual`` tokens stay exact, and prompts are attended to exactly.
    """

    key_bits: float = 1.5
    value_bits: float = 1.58
    group: int = 32
    residual: int = 128
    threshold: float = 0.5

    name = "vidkv"
    family = "quantization"
    acts = "end of prompt, every decoding step"
    needs = "nothing"
    citation = "Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models, 2025, arXiv 2503.16257"

    def __post_init__(self) -> None:
        if not 1 < self.key_bits <= 2 or self.value_bits not in (1.58, 2):
            raise RecipeError(f"{self}: key_bits is above 1 and at most 2, value_bits 1.58 or 2.0")
        if self.group < 1 or self.residual < 1 or self.residual % self.group:
            raise RecipeError(f"{self}: residual must be a positive multiple of group")
        if self.threshold < 0:
            raise RecipeError(f"{self}: threshold is at least 0")

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        wide = int(layer.key_size * (self.key_bits - 1))
        keys = (
            Spectral(wide, self.group, layer.key_size, dtype)
            if wide < layer.key_size
            else Int(2, "channel", self.group, layer.key_size, dtype)
        )
        values = (
            Ternary(self.group, self.threshold, layer.value_size, dtype)
            if self.value_bits == 1.58
            else Int(2, "channel", self.group, layer.value_size, dtype)
        )
        return (
            SideLayout(keys, Dense(layer.key_size, dtype), block=self.residual),
            SideLayout(values, Dense(layer.value_size, dtype), block=self.residual),
        )
