"""RotateKV: keys and values turned by Hadamard transforms, keys before RoPE and in a learnt order of channels."""

import math
from dataclasses import dataclass

import torch

from ..errors import RecipeError
from ..fitting import KeyMeans
from ..formats import Dense, Exempt, Int, Rotated
from ..memory import SideLayout
from ..reduction import MassiveTokens
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class RotateKV(Method):
    """Quantizes keys and values per token after a Walsh-Hadamard transform, in which no channel stands out.

    Keys are turned before RoPE, ``heads`` KV heads together (or the greatest common divisor with those of the model),
    and their channels ordered by their sums over a calibration text; values head by head. ``group`` numbers share a
    scale, or the greatest divisor that it has in common with the width. The ends of a group's range are multiplied by
    ``clip`` (None: 0.8 at two bits, else 1). Of the first prompt, the tokens that hold the ``massive`` largest
    magnitudes of what enters a layer stay exact there. Prompts are attended to exactly, and every token is exact in the
    step that brings it.
    """

    bits: int = 2
    group: int = 128
    heads: int = 4
    clip: float | None = None
    massive: int = 20

    name = "rotatekv"
    family = "quantization"
    acts = "end of prompt, every decoding step"
    needs = "keys before RoPE, inputs of layers; an order of channels, learnt once for a model"
    citation = (
        "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations, "
        "2025, arXiv 2501.16383"
    )

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise RecipeError(f"{self}: bits is 2, 3, 4 or 8")
        if min(self.group, self.heads) < 1 or self.massive < 0:
            raise RecipeError(f"{self}: needs group, heads >= 1 and massive >= 0")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise RecipeError(f"{self}: clip is above 0 and at most 1")

    def rows(self, layer: LayerSpec) -> LayerSpec:
        return layer.joint

    def exemption(self) -> MassiveTokens | None:
        return MassiveTokens(self.massive) if self.massive else None

    def calibration(self) -> KeyMeans:
        return KeyMeans()

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        sizes = layer.joint.key_size, layer.joint.value_size
        block = math.gcd(self.heads, layer.kv_heads) * layer.key_size
        keys = Rotated(self._codes(sizes[0], dtype), block, sizes[0], self.knows("means")[:, None])
        values = Rotated(self._codes(sizes[1], dtype), layer.value_size, sizes[1])
        return (
            SideLayout(Exempt(keys, self.massive, sizes[0], dtype), Dense(sizes[0], dtype), before_rope=True),
            SideLayout(Exempt(values, self.massive, sizes[1], dtype), Dense(sizes[1], dtype)),
        )

    def _codes(self, size: int, dtype: torch.dtype) -> Int:
        clip = self.clip or (0.8 if self.bits == 2 else 1.0)
        return Int(self.bits, "token", math.gcd(self.group, size), size, dtype, clip)
