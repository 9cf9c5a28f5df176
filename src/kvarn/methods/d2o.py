"""D2O: H2O whose evicted entries join similar ones that stay."""

from dataclasses import dataclass

from ..budgets import Density, Policy
from ..errors import RecipeError
from ..reduction import Discrimination
from ..scoring import AccumulatedMass
from .base import Method


@dataclass(frozen=True)
class D2O(Method):
    """Evicts as H2O does, and merges what goes into the most similar entry that stays, where it is similar enough.

    ``heavy`` and ``recent`` are shares of the prompt's length; with a budget only their proportion counts. The first
    ``sinks`` tokens stay. The threshold of similarity is a moving average of what has been seen, of which the past
    counts ``memory``. ``interval`` entries leave a full head at once (None: one, or with a format whose tokens share
    scales as many as share them).

    The ``first_layers`` and the ``last_layers`` keep everything. The others share the budget by the density of their
    attention, as the prompt goes through them. A budget pays for all layers; without one, ``heavy`` and ``recent`` are
    those of the layers that are not kept whole.
    """

    heavy: float = 0.1
    recent: float = 0.1
    sinks: int = 4
    memory: float = 0.5
    interval: int | None = None
    first_layers: int = 2
    last_layers: int = 1

    name = "d2o"
    family = "merging"
    acts = "end of prompt, every decoding step"
    needs = "attention mass of every query, keys"
    citation = (
        "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models, 2024, "
        "arXiv 2406.13035"
    )

    def __post_init__(self) -> None:
        if min(self.heavy, self.recent) < 0 or not 0 < self.heavy + self.recent <= 1:
            raise RecipeError(f"{self}: needs heavy, recent >= 0 and 0 < heavy + recent <= 1")
        if self.sinks < 0 or not 0 <= self.memory <= 1:
            raise RecipeError(f"{self}: needs sinks >= 0 and 0 <= memory <= 1")
        if self.interval is not None and self.interval < 1:
            raise RecipeError(f"{self}: interval is at least 1")
        if min(self.first_layers, self.last_layers) < 0:
            raise RecipeError(f"{self}: needs first_layers, last_layers >= 0")

    def eviction(self) -> Discrimination:
        total = self.heavy + self.recent
        return Discrimination(
            AccumulatedMass(),
            default=total,
            sinks=self.sinks,
            recent_share=self.recent / total,
            decode=True,
            interval=self.interval,
            memory=self.memory,
        )

    def budget(self) -> Policy:
        return Density(self.first_layers, self.last_layers)
