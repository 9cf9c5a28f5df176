"""SnapKV: what the last tokens of the prompt look at is kept."""

from dataclasses import dataclass
from typing import Literal

from ..errors import RecipeError
from ..reduction import Eviction
from ..scoring import WindowMass
from .base import Method


@dataclass(frozen=True)
class SnapKV(Method):
    """Keeps, in each KV head, the entries that the last ``window`` queries of the prompt attend to most, and these.

    Votes are pooled over ``kernel`` neighbours, so that clusters stay whole. ``capacity`` entries a head, the window
    included, or what the budget allows. Acts on prompts only: tokens that come later are all kept until the next one.
    """

    window: int = 32
    kernel: int = 7
    pooling: Literal["max", "avg"] = "max"
    capacity: int = 2048

    name = "snapkv"
    family = "eviction"
    acts = "end of prompt"
    needs = "queries of the prompt's last tokens"
    citation = "SnapKV: LLM Knows What You are Looking for Before Generation, 2024, arXiv 2404.14469"

    def __post_init__(self) -> None:
        if self.window < 1 or self.capacity <= self.window:
            raise RecipeError(f"{self}: needs 1 <= window < capacity")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise RecipeError(f"{self}: kernel must be odd, so that pooling keeps the length")
        if self.pooling not in ("max", "avg"):
            raise RecipeError(f"{self}: pooling is 'max' or 'avg'")

    def eviction(self) -> Eviction:
        return Eviction(WindowMass(self.window, self.kernel, self.pooling), default=self.capacity, recent=self.window)
