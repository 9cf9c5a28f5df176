"""ZipCache: tokens that few probes attend to are kept in fewer bits, with scales that cost next to nothing."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import RecipeError
from ..formats import Dense, Format, Int, Ranged, Separable
from ..memory import SideLayout
from ..reduction import Precision
from ..scoring import ProbedMass
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class ZipCache(Method):
    """Keeps the share ``regular`` of a head's entries in ``low`` bits, those with the smallest normalized saliency, and
    the others in ``high`` bits, and drops none.

    An entry's saliency is the mean attention that it gets from those probes among the prompt's queries that see it: the
    newest ``recent`` of them and ``random`` of the others. ``normalize`` "all" divides by all queries that see it
    instead, as the release does. New tokens stay exact until ``gap`` have come; then those of them to which the newest
    query attends least become regular ones. Keys share a range for each channel, values a scale for each token, after
    their channels are divided by the square root of their peaks: those of the first prompt, or with ``peaks`` "all" of
    what came since too. ``high`` is 16, exact entries in the model's dtype, or 8 or 4.
    """

    regular: float = 0.4
    high: int = 4
    low: int = 2
    recent: float = 0.05
    random: float = 0.05
    normalize: Literal["probes", "all"] = "probes"
    gap: int = 100
    peaks: Literal["all", "prompt"] = "all"
    seed: int = 0

    name = "zipcache"
    family = "quantization"
    acts = "end of prompt, every `gap` decoding steps"
    needs = "attention of a tenth of the prompt's queries, and of the last query when new tokens are encoded"
    citation = (
        "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification, 2024, "
        "arXiv 2405.14256"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.regular <= 1:
            raise RecipeError(f"{self}: needs 0 <= regular <= 1")
        if self.high not in (4, 8, 16) or self.low not in (2, 3, 4, 8) or self.low > self.high:
            raise RecipeError(f"{self}: high is 16, 8 or 4, low is 8, 4, 3 or 2, and not above high")
        if min(self.recent, self.random) < 0 or self.recent + self.random > 1:
            raise RecipeError(f"{self}: needs recent, random >= 0 and recent + random <= 1")
        if self.normalize not in ("probes", "all") or self.peaks not in ("all", "prompt"):
            raise RecipeError(f"{self}: normalize is 'probes' or 'all', peaks is 'all' or 'prompt'")
        if self.gap < 1:
            raise RecipeError(f"{self}: gap is at least 1")

    def precision(self, layer: LayerSpec, dtype: torch.dtype) -> Precision:
        score = ProbedMass(self.recent, self.random, self.seed, self.normalize)
        high, low = ((self._keys(layer, dtype, b), self._values(layer, dtype, b)) for b in (self.high, self.low))
        return Precision(score, high, low, 1 - self.regular, gap=self.gap, rounds_up=True)

    def _keys(self, layer: LayerSpec, dtype: torch.dtype, bits: int) -> SideLayout:
        return _side(Dense(layer.key_size, dtype), Ranged(bits, layer.key_size, dtype) if bits < 16 else None)

    def _values(self, layer: LayerSpec, dtype: torch.dtype, bits: int) -> SideLayout:
        size, codes = layer.value_size, None
        if bits < 16:
            codes = Separable(Int(bits, "token", size, size, dtype), size, dtype, grows=self.peaks == "all")
        return _side(Dense(size, dtype), codes)


def _side(dense: Dense, codes: Format | None) -> SideLayout:
    return SideLayout(codes or dense, dense)
