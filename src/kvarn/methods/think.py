"""ThinK: key channels that hardly change the logits are left out."""

from dataclasses import dataclass

from ..errors import RecipeError
from ..formats import Channels
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class ThinK(Method):
    """In each KV head, leaves out the share ``ratio`` of key channels that matter least to the last ``window`` queries
    of the prompt; the newest ``recent`` keys and all values stay whole.

    The first prompt chooses the channels, from the keys that it leaves in the cache. Later keys lose the same channels
    when they are no longer among the newest. Prompts are attended to exactly. With a method that encodes keys, the keys
    that it leaves dense stay whole, in place of the newest ``recent``.
    """

    ratio: float = 0.4
    window: int = 32
    recent: int = 32

    name = "think"
    family = "pruning"
    acts = "end of prompt, every decoding step"
    needs = "queries of the prompt's last tokens"
    citation = "ThinK: Thinner Key Cache by Query-Driven Pruning, 2024, arXiv 2407.21018"

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise RecipeError(f"{self}: needs 0 <= ratio < 1")
        if self.window < 1 or self.recent < 0:
            raise RecipeError(f"{self}: needs window >= 1 and recent >= 0")

    def channels(self, layer: LayerSpec) -> Channels | None:
        pruned = int(self.ratio * layer.key_size)
        return Channels(layer.key_size - pruned, self.window, self.recent) if pruned else None
