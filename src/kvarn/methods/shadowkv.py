"""ShadowKV: keys in few coordinates on the device, values on the host, and a few chunks of them for each query."""

from dataclasses import dataclass

import torch

from ..errors import RecipeError
from ..formats import Dense, Subspace
from ..memory import SideLayout
from ..selection import Chunks
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class ShadowKV(Method):
    """Keeps the keys of a prompt, before RoPE and of all KV heads together, as ``rank`` coordinates, and its values in
    the host's memory; a decoding step reads ``count`` tokens of them, in chunks of ``chunk``.

    Each KV head reads the chunks whose mean keys, after RoPE, one of its queries pays most. ``outliers`` chunks of the
    first prompt whose keys differ most from their mean stay exact on the device and are always read, as are the last
    ``local`` chunks and what is left of a prompt, and generated tokens until the next prompt. Prompts are attended to
    exactly.
    """

    chunk: int = 8
    rank: int = 160
    count: int = 2048
    local: int = 4
    outliers: int = 48

    name = "shadowkv"
    family = "selection"
    acts = "end of prompt, every decoding step"
    needs = "keys before RoPE, queries of each step"
    citation = "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference, 2024, arXiv 2410.21465"

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.rank < 1 or self.count < self.chunk or self.count % self.chunk:
            raise RecipeError(f"{self}: needs chunk, rank >= 1 and count a multiple of chunk")
        if self.local < 0 or self.outliers < 0:
            raise RecipeError(f"{self}: needs local, outliers >= 0")

    def rows(self, layer: LayerSpec) -> LayerSpec:
        return layer.joint

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        layer, hold = layer.joint, self.local * self.chunk
        rank = min(self.rank, layer.key_size)
        keys, values = Dense(layer.key_size, dtype), Dense(layer.value_size, dtype)
        coordinates = Subspace(Dense(rank, dtype), rank, layer.key_size, dtype)
        return (
            SideLayout(coordinates, keys, hold, self.chunk, before_rope=True),
            SideLayout(values, values, hold, self.chunk, tier="host"),
        )

    def selection(self) -> Chunks:
        return Chunks(self.chunk, self.count, self.local * self.chunk, self.outliers)
