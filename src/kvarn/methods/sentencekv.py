"""SentenceKV: sentences stay together on the host, and come back when the sentence being written needs them."""

from dataclasses import dataclass

from ..errors import RecipeError
from ..reduction import Eviction
from ..scoring import WindowMass
from ..selection import Selection, SentenceEnds, Sentences
from .base import Method


@dataclass(frozen=True)
class SentenceKV(Method):
    """Of a prompt keeps, in each KV head, ``factor`` times ``count`` entries as SnapKV does, in the host's memory; a
    decoding step reads ``count`` of them.

    Those are the ``first`` and the ``recent`` ones and, sentence by sentence, those whose mean key has the largest
    product with the mean query of the sentence being written. At the end of a sentence, and for the ``whole`` queries
    that begin the next, everything is read. The mean keys are on the device, as are the newest entries.
    """

    count: int = 1024
    factor: float = 3.0
    window: int = 32
    kernel: int = 7
    first: int = 32
    recent: int = 32
    whole: int = 1

    name = "sentencekv"
    family = "selection"
    acts = "end of prompt, every decoding step"
    needs = "ids of tokens, queries of the prompt's last tokens, queries of each step"
    citation = "SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching, 2025, arXiv 2504.00970"

    def __post_init__(self) -> None:
        if min(self.first, self.recent, self.whole) < 0 or self.first + self.recent >= self.count:
            raise RecipeError(f"{self}: needs first, recent, whole >= 0 and first + recent < count")
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise RecipeError(f"{self}: needs window >= 1 and an odd kernel")
        if self.factor < 1 or int(self.factor * self.count) <= self.window:
            raise RecipeError(f"{self}: needs factor >= 1 and factor * count > window")

    def eviction(self) -> Eviction:
        score = WindowMass(self.window, self.kernel, "max")
        return Eviction(score, default=int(self.factor * self.count), recent=self.window)

    def selection(self) -> Selection:
        ends = self.learnt["ends"].tolist() if self.learnt else ()
        return Sentences(self.count, self.first, self.recent, self.whole, tuple(ends))

    def calibration(self) -> SentenceEnds:
        return SentenceEnds()
