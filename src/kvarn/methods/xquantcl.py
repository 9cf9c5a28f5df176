"""XQuant-CL: the inputs of layers as quantized differences between one layer and the next."""

from dataclasses import dataclass, replace

import torch

from .. import rematerialization
from ..errors import RecipeError
from ..memory import SideLayout
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class XQuantCL(Method):
    """Keeps how the input of each layer differs from that of the layer before, and computes keys and values on reading.

    The differences, in ``bits`` bits, are taken against what the layer before gives back, so that errors do not add up.
    Of the ``first`` layers the last keeps its input, the base of all differences, and those before it keep what
    ``xquant`` keeps, all in ``first_bits`` bits. Where queries are grouped, differences are kept as latents as wide as
    keys and values together. All are quantized per token, in groups of ``group`` numbers or of the largest divisor that
    these have in common with the width.
    """

    bits: int = 2
    group: int = 128
    first: int = 3
    first_bits: int = 4

    name = "xquantcl"
    keeps_inputs = True
    family = "rematerialization"
    acts = "end of prompt, every decoding step"
    needs = "inputs of layers"
    citation = (
        "XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization, 2025, arXiv 2508.10395, "
        "section 3.3"
    )

    def __post_init__(self) -> None:
        if not {self.bits, self.first_bits} <= {2, 3, 4, 8}:
            raise RecipeError(f"{self}: bits and first_bits are 2, 3, 4 or 8")
        if min(self.group, self.first) < 1:
            raise RecipeError(f"{self}: group and first are at least 1")

    def told_apart(self, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        full = [number for number, layer in enumerate(layers) if layer.window is None]
        roles = dict.fromkeys(full[self.first :], rematerialization.DIFFERENCE)
        roles |= dict.fromkeys(full[: self.first][-1:], rematerialization.BASE)
        return tuple(replace(layer, role=roles.get(number, "")) for number, layer in enumerate(layers))

    def rows(self, layer: LayerSpec) -> LayerSpec:
        return rematerialization.kept(layer)

    def encoding(self, layer: LayerSpec, dtype: torch.dtype) -> tuple[SideLayout, SideLayout]:
        bits = self.bits if layer.role == rematerialization.DIFFERENCE else self.first_bits
        return rematerialization.encoded(layer, bits, self.group, dtype)
