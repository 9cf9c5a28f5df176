"""DuoAttention: retrieval heads keep everything, streaming heads the first tokens and the newest."""

from dataclasses import dataclass

from ..budgets import Policy, RankedHeads
from ..budgets.gates import GateTraining
from ..errors import RecipeError
from ..reduction import Eviction
from ..scoring import Recency
from .base import Method


@dataclass(frozen=True)
class DuoAttention(Method):
    """Retrieval heads keep everything; streaming heads keep ``sinks`` first tokens and the ``recent`` newest ones.

    Which heads are which is learnt once for a model (``kvarn calibrate``): a gate for each KV head, trained so that the
    model still finds passkeys in a long text. Without a budget ``sparsity`` of all heads stream. A budget decides how
    many: the heads with the highest gates keep everything as far as it goes, and where it does not even pay for
    streaming heads, their recent tokens are fewer. Retrieval heads grow while decoding, streaming heads do not.
    """

    sinks: int = 64
    recent: int = 256
    sparsity: float = 0.5

    name = "duoattention"
    family = "head budgets"
    acts = "end of prompt, every decoding step"
    needs = "gates of heads, learnt once for a model"
    citation = (
        "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, 2024, arXiv 2410.10819"
    )

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1:
            raise RecipeError(f"{self}: needs sinks >= 0 and recent >= 1")
        if not 0 <= self.sparsity <= 1:
            raise RecipeError(f"{self}: sparsity is a share from 0 to 1")

    def eviction(self) -> Eviction:
        return Eviction(Recency(), default=self.sinks + self.recent, sinks=self.sinks, decode=True)

    def budget(self) -> Policy:
        return RankedHeads(self.knows("gates"), self.sinks + self.recent, 1 - self.sparsity)

    def calibration(self) -> GateTraining:
        return GateTraining()
