"""TokenSelect: each query reads the tokens that the heads of a layer vote for together."""

from dataclasses import dataclass

from ..errors import RecipeError
from ..selection import Selection, Voting
from .base import Method


@dataclass(frozen=True)
class TokenSelect(Method):
    """Keeps everything; queries read the first ``sinks`` tokens, the newest ``local`` ones and ``count`` others, those
    to which the query heads of a layer together pay most.

    In prompts ``chunk`` queries choose together, in decoding a query chooses anew where its cosine with the one that
    chose last is below ``threshold``. ``scaled`` divides the logits of votes by sqrt(head size); ``pooling`` max-pools
    votes over so many neighbours (0: not). What is read has positions without gaps, so that a context may be longer
    than the positions of the model.
    """

    sinks: int = 128
    local: int = 512
    count: int = 2048
    chunk: int = 512
    threshold: float = 0.9
    scaled: bool = False
    pooling: int = 0

    name = "tokenselect"
    family = "selection"
    acts = "every chunk of a prompt, every decoding step"
    needs = "keys before RoPE, queries"
    citation = (
        "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV "
        "Cache Selection, 2024, arXiv 2411.02886"
    )

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.count < 1 or not 1 <= self.chunk <= self.local:
            raise RecipeError(f"{self}: needs sinks >= 0, count >= 1 and 1 <= chunk <= local")
        if self.threshold < -1 or self.pooling < 0:
            raise RecipeError(f"{self}: needs threshold >= -1 and pooling >= 0")

    def selection(self) -> Selection:
        return Voting(self.sinks, self.local, self.count, self.chunk, self.threshold, self.scaled, self.pooling)
