"""ARKV: each entry is exact, in eight bits, or gone, and layers differ in how many are exact."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..attention.reference import QUERY_BLOCK
from ..budgets import Policy, PrecisionCascade
from ..errors import RecipeError
from ..formats import Dense, Float8
from ..memory import SideLayout
from ..reduction import Eviction, Precision, Thinning
from ..scoring.shifting import ShiftingMass
from ..spec import LayerSpec
from .base import Method


@dataclass(frozen=True)
class ARKV(Method):
    """Keeps ``capacity`` entries a head, or what the budget allows; some in the model's dtype, the others in fp8.

    The last ``window`` tokens stay exact, and of the others a share that is larger in layers whose attention is spread
    (``tau1``), restless (``tau2``) and peaked (``tau3``; the larger a tau, the less it counts) over the last ``window``
    queries of the prompt; ``exact`` "all" or "none" has the same in all layers. Entries are ranked by the mean
    attention of these queries and ``gamma`` times its variance, in decoding by that of the newest query. A full head
    drops all but the share ``keep`` of what lies before its window, and lowers what is not among the best of the rest.
    """

    window: int = 32
    gamma: float = 263.81
    tau1: float = 7.774
    tau2: float = 5.407
    tau3: float = 5.528
    exact: Literal["layers", "all", "none"] = "layers"
    keep: float = 0.75
    capacity: int = 1024

    name = "arkv"
    family = "quantization"
    acts = "end of prompt, layer by layer; decoding steps that find a head full"
    needs = "queries of the prompt's last tokens; attention of each decoding step"
    citation = (
        "ARKV: Adaptive and Resource-Efficient KV Cache Management under Limited Memory Budget for Long-Context "
        "Inference in LLMs, 2026, arXiv 2603.08727"
    )

    def __post_init__(self) -> None:
        if not 2 <= self.window <= QUERY_BLOCK or self.capacity <= self.window:
            raise RecipeError(f"{self}: needs 2 <= window <= {QUERY_BLOCK} and window < capacity")
        if self.gamma < 0 or min(self.tau1, self.tau2, self.tau3) <= 0:
            raise RecipeError(f"{self}: needs gamma >= 0 and tau1, tau2, tau3 > 0")
        if self.exact not in ("layers", "all", "none"):
            raise RecipeError(f"{self}: exact is 'layers', 'all' or 'none'")
        if not 0 <= self.keep <= 1:
            raise RecipeError(f"{self}: needs 0 <= keep <= 1")

    def eviction(self) -> Eviction:
        return Thinning(self._worth, default=self.capacity, recent=self.window, decode=True, keeps=self.keep)

    def budget(self) -> Policy:
        share = {"layers": None, "all": 1.0, "none": 0.0}[self.exact]
        return PrecisionCascade(self.window, self.tau1, self.tau2, self.tau3, share)

    def precision(self, layer: LayerSpec, dtype: torch.dtype) -> Precision:
        keys, values = Dense(layer.key_size, dtype), Dense(layer.value_size, dtype)
        high = SideLayout(keys, keys), SideLayout(values, values)
        low = SideLayout(Float8(layer.key_size, dtype), keys), SideLayout(Float8(layer.value_size, dtype), values)
        return Precision(self._worth, high, low, share=None, recent=self.window)

    @property
    def _worth(self) -> ShiftingMass:
        return ShiftingMass(self.window, self.gamma, by_age=True)
