"""A plain window: the first tokens (attention sinks) and the newest ones."""

from dataclasses import dataclass

from ..errors import RecipeError
from ..reduction import Eviction
from ..scoring import Recency
from .base import Method


@dataclass(frozen=True)
class Window(Method):
    """Keeps ``sinks`` first tokens and the newest ones, ``capacity`` entries a head in all (or what the budget allows).

    The sinks are StreamingLLM's; keys keep their original positions, where StreamingLLM renumbers them in the cache.
    """

    sinks: int = 4
    capacity: int = 1024

    name = "window"
    family = "eviction"
    acts = "end of prompt, every decoding step"
    needs = "positions"
    citation = "Efficient Streaming Language Models with Attention Sinks, 2023, arXiv 2309.17453"

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.capacity <= self.sinks:
            raise RecipeError(f"{self}: needs 0 <= sinks < capacity")

    def eviction(self) -> Eviction:
        return Eviction(Recency(), default=self.capacity, sinks=self.sinks, decode=True)
