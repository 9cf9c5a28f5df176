"""Chelsea: similar entries of a neighbourhood become one, which counts for all of them."""

from dataclasses import dataclass

from ..errors import RecipeError
from ..reduction import Clustering
from ..scoring import Recency
from .base import Method


@dataclass(frozen=True)
class Chelsea(Method):
    """Merges similar keys within chunks of ``chunk`` entries, and their values, into means; drops nothing.

    Attention adds the logarithm of the number of merged tokens to an entry's logit. The first ``sinks`` tokens and the
    newest ``recent`` ones stay exact. Prompts are merged to the share ``kept`` (or what the budget allows); in decoding
    ``block`` entries become fewer at once whenever a head is full. Published later as CentroidKV.
    """

    kept: float = 0.25
    chunk: int = 64
    sinks: int = 4
    recent: int = 128
    block: int = 64

    name = "chelsea"
    family = "merging"
    acts = "end of prompt, every `block` decoding steps"
    needs = "keys"
    citation = "Efficient Long-Context LLM Inference via KV Cache Clustering, 2025, arXiv 2506.11418"

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise RecipeError(f"{self}: needs 0 < kept <= 1")
        if self.chunk < 2 or self.block < 1 or min(self.sinks, self.recent) < 0:
            raise RecipeError(f"{self}: needs chunk >= 2, block >= 1, sinks and recent >= 0")

    def eviction(self) -> Clustering:
        return Clustering(
            Recency(),
            default=float(self.kept),
            sinks=self.sinks,
            recent=self.recent,
            decode=True,
            interval=self.block,
            chunk=self.chunk,
        )
