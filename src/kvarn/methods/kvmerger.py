"""KVMerger: runs of similar keys become one, by Gaussian weights around the entry of most attention."""

from dataclasses import dataclass

from ..errors import RecipeError
from ..reduction import Runs
from ..scoring import AccumulatedMass
from .base import Method


@dataclass(frozen=True)
class KVMerger(Method):
    """Merges runs of consecutive entries with similar keys into their pivot, the one that received most attention.

    ``kept`` is the share of the prompt's length that a head holds from then on (or what the budget allows). Of these
    the share ``recent``, the newest, and the share ``heavy``, those of most attention, are merged last of all.
    ``sigma`` is the width of the Gaussian that weighs the members of a run by the distance of their keys to the
    pivot's. In decoding ``interval`` entries become fewer at once (None: one, or with a format whose tokens share
    scales as many as do).
    """

    kept: float = 0.5
    recent: float = 0.34
    heavy: float = 0.24
    sigma: float = 5.0
    interval: int | None = None

    name = "kvmerger"
    family = "merging"
    acts = "end of prompt, every decoding step"
    needs = "attention mass of every query, keys"
    citation = (
        "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks, 2024, "
        "arXiv 2407.08454"
    )

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1 or min(self.recent, self.heavy) < 0 or self.recent + self.heavy >= 1:
            raise RecipeError(f"{self}: needs 0 < kept <= 1, recent, heavy >= 0 and recent + heavy < 1")
        if self.sigma <= 0 or (self.interval is not None and self.interval < 1):
            raise RecipeError(f"{self}: needs sigma > 0 and interval >= 1")

    def eviction(self) -> Runs:
        return Runs(
            AccumulatedMass(),
            default=float(self.kept),
            recent_share=self.recent,
            decode=True,
            interval=self.interval,
            heavy=self.heavy,
            sigma=self.sigma,
        )
