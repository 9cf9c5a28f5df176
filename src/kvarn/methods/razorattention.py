"""RazorAttention: retrieval heads keep everything, the others what is near and one entry for all the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budgets import ChosenHeads, Policy
from ..budgets.echoes import HeadSearch
from ..errors import RecipeError
from ..reduction import Folding
from ..scoring import Recency
from .base import Method


@dataclass(frozen=True)
class RazorAttention(Method):
    """Echo and induction heads keep everything; the others ``sinks`` first tokens, the newest ones, and an average.

    Retrieval heads are the ``echo`` share of all KV heads with the best echo scores and the ``induction`` share with
    the best induction scores, found once for a model (``kvarn calibrate``). Of N tokens the others keep
    max(``buffer``, N // ``divisor``) newest ones, or what the budget allows; what they drop is averaged into one
    compensation entry with the weight of all that it stands for. In decoding ``interval`` entries are folded at once.
    """

    sinks: int = 4
    buffer: int = 4000
    divisor: int = 5
    echo: float = 0.01
    induction: float = 0.14
    interval: int = 16

    name = "razorattention"
    family = "head budgets"
    acts = "end of prompt, every few decoding steps"
    needs = "scores of heads, found once for a model"
    citation = "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads, 2024, arXiv 2407.15891"

    def __post_init__(self) -> None:
        if min(self.sinks, self.buffer) < 0 or min(self.divisor, self.interval) < 1:
            raise RecipeError(f"{self}: needs sinks, buffer >= 0 and divisor, interval >= 1")
        if not (0 <= self.echo <= 1 and 0 <= self.induction <= 1):
            raise RecipeError(f"{self}: echo and induction are shares from 0 to 1")

    def eviction(self) -> Folding:
        # The first token after the sinks becomes the compensation entry.
        sinks = self.sinks + 1
        return Folding(Recency(), default=sinks + self.buffer, sinks=sinks, decode=True, interval=self.interval)

    def budget(self) -> Policy:
        chosen = _best(self.knows("echo"), self.echo) | _best(self.knows("induction"), self.induction)
        return ChosenHeads(chosen, self.sinks + 1, self.buffer, self.divisor)

    def calibration(self) -> HeadSearch:
        return HeadSearch()


def _best(scores: Tensor, share: float) -> Tensor:
    """The ``share`` of all heads with the highest scores ([layers, K]), bool."""
    ranked = scores.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[ranked[: round(share * scores.numel())]] = True
    return chosen.view_as(scores)
