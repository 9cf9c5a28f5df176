"""EpiCache: a prompt read in blocks, each scored by an excerpt of what will be asked about."""

from dataclasses import dataclass
from typing import Literal

from ..budgets import Policy, Shares, Uniform
from ..budgets.sensitivity import LayerSensitivity, sensitive_shares
from ..errors import RecipeError
from ..reduction import Eviction
from ..scoring import PatchedMass
from .base import Method


@dataclass(frozen=True)
class EpiCache(Method):
    """Reads a prompt ``block`` tokens at a time and after each keeps what a text of one's choice attends to most.

    The text (``Cache(..., text=...)``; ``kvarn.Episodes`` chooses it from a conversation, and keeps a cache for each of
    its topics) follows the block, scores all entries and is forgotten; without one, the block's last ``tail`` tokens
    follow once more. ``level``: with "pair" all KV heads of a layer share what it may keep, with "head" each has the
    same. ``capacity`` entries a head on average, or what the budget allows. With ``power`` above 0, layers whose keys
    change more when attention is cut into blocks have more (``kvarn calibrate``), the more so the larger it is. The
    first ``sinks`` tokens stay. Acts on prompts only: tokens that come later are all kept until the next one.
    """

    block: int = 2048
    capacity: int = 8192
    level: Literal["pair", "head"] = "pair"
    power: float = 0.0
    tail: int = 64
    sinks: int = 0

    name = "epicache"
    family = "prefill"
    acts = "every block of a prompt"
    needs = "queries of a text that follows each block"
    citation = (
        "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering, 2025, arXiv 2509.17396"
    )

    def __post_init__(self) -> None:
        if min(self.block, self.tail) < 1 or not 0 <= self.sinks < self.capacity:
            raise RecipeError(f"{self}: needs block, tail >= 1 and 0 <= sinks < capacity")
        if self.level not in ("pair", "head"):
            raise RecipeError(f"{self}: level is 'pair' or 'head'")
        if self.power < 0:
            raise RecipeError(f"{self}: power is at least 0")

    def eviction(self) -> Eviction:
        score, pairs = PatchedMass(self.tail), self.level == "pair"
        return Eviction(score, default=self.capacity, sinks=self.sinks, across_heads=pairs)

    def blocks(self) -> int:
        return self.block

    def budget(self) -> Policy:
        return Shares(sensitive_shares(self.knows("similarity"), self.power)) if self.power else Uniform()

    def calibration(self) -> LayerSensitivity | None:
        return LayerSensitivity() if self.power else None
