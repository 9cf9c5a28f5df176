"""FastKV: later layers read the tokens that matter, and every layer keeps its own best entries."""

from dataclasses import dataclass
from typing import Literal

from ..errors import RecipeError
from ..prefill import Propagation
from ..reduction import Eviction
from ..scoring import WindowMass
from .base import Method


@dataclass(frozen=True)
class FastKV(Method):
    """Carries the share ``rate`` of a first prompt's tokens beyond ``layer``, and keeps the share ``retention`` of its
    entries in each layer, both by what the last ``window`` queries attend to.

    ``layer`` counts from 0; None is the last of the first half of the layers. Votes are pooled over ``kernel``
    neighbours. Later prompts of a conversation go through all layers whole, since a short question has no tokens to
    spare. A first prompt gives logits for the tokens that were carried to the end; the last token always is.
    """

    rate: float = 0.2
    retention: float = 0.1
    layer: int | None = None
    window: int = 8
    kernel: int = 7
    pooling: Literal["max", "avg"] = "max"

    name = "fastkv"
    family = "prefill"
    acts = "prompt, end of prompt"
    needs = "queries of the prompt's last tokens"
    citation = (
        "FastKV: Decoupling of Context Reduction and KV Cache Compression for Prefill-Decoding Acceleration, 2025, "
        "arXiv 2502.01068"
    )

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1 or not 0 < self.retention <= 1:
            raise RecipeError(f"{self}: needs 0 < rate <= 1 and 0 < retention <= 1")
        if self.layer is not None and self.layer < 0:
            raise RecipeError(f"{self}: layer counts from 0")
        if self.window < 1:
            raise RecipeError(f"{self}: window is at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise RecipeError(f"{self}: kernel must be odd, so that pooling keeps the length")

    def eviction(self) -> Eviction:
        return Eviction(self._votes, default=float(self.retention), recent=self.window)

    def propagation(self) -> Propagation:
        return Propagation(self._votes, self.rate, self.window, self.layer)

    @property
    def _votes(self) -> WindowMass:
        return WindowMass(self.window, self.kernel, self.pooling)
