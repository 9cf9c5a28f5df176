"""Scissorhands: what recent queries kept ignoring goes, half of the cache at once."""

from dataclasses import dataclass

from ..errors import RecipeError
from ..reduction import Eviction
from ..scoring import Persistence
from .base import Method


@dataclass(frozen=True)
class Scissorhands(Method):
    """Drops the entries that most of the last ``history`` queries paid less than an equal share; keeps the ``recent``.

    The persistence of importance: what mattered will matter again. A head that is full (``capacity`` entries, or what
    the budget allows) loses the share ``drop`` of them at once; of entries equally often ignored the older one goes.
    ``history`` is a multiple of 8: an entry keeps a bit for each query.
    """

    history: int = 400
    recent: int = 10
    drop: float = 0.5
    capacity: int = 1024

    name = "scissorhands"
    family = "eviction"
    acts = "end of prompt, decoding steps that find a head full"
    needs = "attention of the last `history` queries"
    citation = (
        "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time, "
        "2023, arXiv 2305.17118"
    )

    def __post_init__(self) -> None:
        if self.history < 8 or self.history % 8:
            raise RecipeError(f"{self}: history must be a positive multiple of 8")
        if not 0 <= self.drop < 1 or self.recent < 0 or self.capacity <= self.recent:
            raise RecipeError(f"{self}: needs 0 <= drop < 1 and 0 <= recent < capacity")

    def eviction(self) -> Eviction:
        return Eviction(
            Persistence(self.history),
            default=self.capacity,
            recent=self.recent,
            decode=True,
            interval_share=self.drop,
        )
