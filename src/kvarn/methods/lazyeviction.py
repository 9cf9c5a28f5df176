"""LazyEviction: entries that recur are kept through their silence; evicts seldom."""

from dataclasses import dataclass

from ..errors import RecipeError
from ..reduction import Eviction
from ..scoring import Recurrence
from .base import Method


@dataclass(frozen=True)
class LazyEviction(Method):
    """Keeps the newest ``window`` entries, and those whose silence is short against the longest they came back from.

    For long generations: an entry matters in a step in which it receives at least ``threshold`` of the attention. In
    each head ``window`` entries leave at once, when it holds ``capacity`` (or what the budget allows), so that what
    falls silent has time to return. Prompts that fit are kept whole; longer ones are cut by what their last ``window``
    queries show.
    """

    threshold: float = 1e-4
    window: int = 128
    capacity: int = 1492

    name = "lazyeviction"
    family = "eviction"
    acts = "end of prompt, every `window` decoding steps"
    needs = "attention of every decoding step"
    citation = (
        "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning, 2025, "
        "arXiv 2506.15969"
    )

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise RecipeError(f"{self}: needs 0 < threshold <= 1")
        if self.window < 1 or self.capacity < 2 * self.window:
            raise RecipeError(f"{self}: needs 1 <= window and capacity >= 2 * window")

    def eviction(self) -> Eviction:
        return Eviction(
            Recurrence(self.threshold, self.window),
            default=self.capacity,
            recent=self.window,
            decode=True,
            interval=self.window,
        )
