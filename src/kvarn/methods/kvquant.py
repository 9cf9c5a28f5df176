"""KVQuant: keys before RoPE, levels where a calibration wants them, outliers apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError
from ..fitting import LevelSearch
from ..formats import Dense, Exempt, NonUniform, exact_numbers
from ..memory import SideLayout
from ..reduction import FirstTokens
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class KVQuant(Method):
    """Keys before RoPE and values as codes of ``bits`` bits for levels that a calibration has placed, layer by layer.

    A token's keys of all KV heads are one vector, and its values. Ranges of key channels are fixed by the calibration;
    values of a token have a range of their own. The share ``outliers`` of the numbers of a vector, at least one at
    either end, is kept exactly beside the codes (0.0: none), and so are the first ``sinks`` tokens. With ``qnorm``
    two-bit codes are read with the mean and the deviation that they have lost. Prompts are attended to exactly, and
    every token is exact in the step that brings it.
    """

    bits: int = 4
    outliers: float = 0.01
    sinks: int = 1
    qnorm: bool = True

    name = "kvquant"
    family = "quantization"
    acts = "end of prompt, every decoding step"
    needs = "keys before RoPE; levels and ranges, learnt once for a model"
    citation = (
        "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization, 2024, arXiv 2401.18079"
    )

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise RecipeError(f"{self}: bits is 2, 3 or 4")
        if not 0 <= self.outliers <= 1 or self.sinks < 0:
            raise RecipeError(f"{self}: needs 0 <= outliers <= 1 and sinks >= 0")

    def rows(self, layer: LayerSpec) -> LayerSpec:
        return layer.joint

    def exemption(self) -> FirstTokens:
        return FirstTokens(self.sinks)

    def calibration(self) -> LevelSearch:
        return LevelSearch()

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        sizes = layer.joint.key_size, layer.joint.value_size
        ranges = {name: self._learnt_of("keys", name)[:, None].to(dtype) for name in ("center", "half")}
        keys = self._side({**self._levels("keys"), **ranges}, sizes[0], dtype)
        values = self._side(self._levels("values"), sizes[1], dtype)
        return SideLayout(keys, Dense(sizes[0], dtype), before_rope=True), SideLayout(values, Dense(sizes[1], dtype))

    def _side(self, shared: dict[str, Tensor], size: int, dtype: torch.dtype) -> Exempt:
        codes = NonUniform(self.bits, exact_numbers(self.outliers, size), shared, size, dtype)
        return Exempt(codes, self.sinks, size, dtype)

    def _levels(self, side: str) -> dict[str, Tensor]:
        levels = {"levels": self._learnt_of(side, f"levels{self.bits}")[:, None]}
        if self.bits == 2 and self.qnorm:
            levels["read"] = self._learnt_of(side, "read2")[:, None]
        return levels

    def _learnt_of(self, side: str, name: str) -> Tensor:
        return self.knows(f"{side}.{'apart' if self.outliers else 'whole'}.{name}")
