"""H2O: heavy hitters by accumulated attention, and the newest tokens."""

from dataclasses import dataclass

from ..errors import RecipeError
from ..reduction import Eviction
from ..scoring import AccumulatedMass
from .base import Method


@dataclass(frozen=True)
class H2O(Method):
    """Keeps the entries with the largest attention mass accumulated over all queries, and the newest ones.

    ``heavy`` and ``recent`` are shares of the prompt's length; with a budget only their proportion counts. The prompt
    is pruned once at its end, then ``interval`` entries leave each head whenever it is full. None means one, the
    paper's greedy step; with a format whose tokens share scales it means as many as share them, since entries that
    lose such a neighbour are encoded anew. Scores are fp32 sums, never normalized; a KV head's score is the mean over
    its query heads.
    """

    heavy: float = 0.1
    recent: float = 0.1
    interval: int | None = None

    name = "h2o"
    family = "eviction"
    acts = "end of prompt, every decoding step"
    needs = "attention mass of every query"
    citation = (
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, 2023, arXiv 2306.14048"
    )

    def __post_init__(self) -> None:
        if min(self.heavy, self.recent) < 0 or not 0 < self.heavy + self.recent <= 1:
            raise RecipeError(f"{self}: needs heavy, recent >= 0 and 0 < heavy + recent <= 1")
        if self.interval is not None and self.interval < 1:
            raise RecipeError(f"{self}: interval is at least 1")

    def eviction(self) -> Eviction:
        total = self.heavy + self.recent
        share = self.recent / total
        return Eviction(AccumulatedMass(), default=total, recent_share=share, decode=True, interval=self.interval)
