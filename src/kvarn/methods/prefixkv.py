"""PrefixKV: one threshold on the share of attention decides how many tokens each layer keeps."""

from dataclasses import dataclass

from ..budgets import Policy
from ..budgets.prefixes import Prefixes, PrefixSearch
from ..errors import RecipeError
from ..reduction import Eviction
from ..scoring import LayerMass
from .base import Method


@dataclass(frozen=True)
class PrefixKV(Method):
    """Every layer keeps the fewest tokens that together receive the same share of its attention.

    How many these are is learnt once for a model (``kvarn calibrate``), for every share ``kept`` of all entries or
    whatever a budget allows. Which they are the prompt decides: those that receive most from all its queries, averaged
    over all heads of the layer, which keep the same tokens; the first ``sinks`` and the ``recent`` newest ones always.
    In decoding the newest entry before the last ``distance`` leaves, so that the prompt's head and what is recent stay.
    """

    kept: float = 0.5
    sinks: int = 1
    recent: int = 1
    distance: int = 25

    name = "prefixkv"
    family = "layer budgets"
    acts = "end of prompt, every decoding step"
    needs = "attention mass of every query of the prompt; prefixes of layers, learnt once for a model"
    citation = (
        "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation, "
        "2024, arXiv 2412.03409"
    )

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise RecipeError(f"{self}: kept is a share above 0 and at most 1")
        if min(self.sinks, self.recent, self.distance) < 0:
            raise RecipeError(f"{self}: needs sinks, recent, distance >= 0")

    def eviction(self) -> Eviction:
        score = LayerMass(self.distance)
        return Eviction(score, default=self.kept, sinks=self.sinks, recent=self.recent, decode=True)

    def budget(self) -> Policy:
        return Prefixes(self.knows("kept"), self.kept)

    def calibration(self) -> PrefixSearch:
        return PrefixSearch()
