"""CAKE: layers share one budget by how spread and how restless their attention is."""

from dataclasses import dataclass

from ..attention.reference import QUERY_BLOCK
from ..budgets import Policy, Restlessness
from ..errors import RecipeError
from ..reduction import Eviction
from ..scoring.shifting import ShiftingMass
from .base import Method


@dataclass(frozen=True)
class CAKE(Method):
    """Gives layers more entries where attention is spread over many tokens and changes from query to query.

    The last ``window`` queries of the prompt tell, layer by layer; as later layers tell too, earlier ones are cut.
    ``tau1`` and ``tau2`` say how much entropy and variance count (larger: less). Within a layer each KV head keeps
    the last ``window`` tokens and what these attend to most, with ``gamma`` times the variance over them.
    ``capacity`` entries a head on average, or what the budget allows. In decoding what the newest query attends to
    least leaves.
    """

    window: int = 32
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    capacity: int = 1024

    name = "cake"
    family = "layer budgets"
    acts = "end of prompt, layer by layer; every decoding step"
    needs = "queries of the prompt's last tokens; attention of each decoding step"
    citation = "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences, 2025, arXiv 2503.12491"

    def __post_init__(self) -> None:
        if not 2 <= self.window <= QUERY_BLOCK or self.capacity <= self.window:
            raise RecipeError(f"{self}: needs 2 <= window <= {QUERY_BLOCK} and window < capacity")
        if self.gamma < 0 or min(self.tau1, self.tau2) <= 0:
            raise RecipeError(f"{self}: needs gamma >= 0 and tau1, tau2 > 0")

    def eviction(self) -> Eviction:
        score = ShiftingMass(self.window, self.gamma)
        return Eviction(score, default=self.capacity, recent=self.window, decode=True)

    def budget(self) -> Policy:
        return Restlessness(self.window, self.tau1, self.tau2)
