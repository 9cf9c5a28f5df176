"""Integers by token of which none waits: what no published system is, and tokens of decoding steps are encoded for."""

from dataclasses import dataclass

import torch

from kvarn.formats import Dense, Int
from kvarn.memory import SideLayout
from kvarn.methods import Method
from kvarn.spec import LayerSpec


@dataclass(frozen=True)
class PerToken(Method):
    """``bits`` for keys and for values, a range for ``group`` channels."""

    bits: tuple[int, int] = (8, 4)
    group: int = 8

    name = "pertoken"
    family = "quantization"

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        keys, values = (
            SideLayout(Int(bits, "token", self.group, size, dtype), Dense(size, dtype), encodes_new=True)
            for bits, size in zip(self.bits, (layer.key_size, layer.value_size), strict=True)
        )
        return keys, values
