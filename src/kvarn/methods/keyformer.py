"""Keyformer: key tokens by accumulated attention, evened out by noise and a growing temperature."""

from dataclasses import dataclass

from ..errors import RecipeError
from ..reduction import Eviction
from ..scoring import PerturbedMass
from .base import Method


@dataclass(frozen=True)
class Keyformer(Method):
    """Keeps the newest entries and those with the largest accumulated softmax((logits + Gumbel noise) / temperature).

    ``kept`` is the share of the prompt's length that a head holds from then on (or what the budget allows), and
    ``recent`` the share of these that are the newest. The temperature is ``temperature`` in prompts and grows to
    ``last_temperature`` over ``steps`` decoding steps. ``noise`` scales the Gumbel noise, which ``seed`` fixes. The
    output of attention is without noise. With noise 0 and temperatures 1 it is H2O.
    """

    kept: float = 0.5
    recent: float = 0.3
    temperature: float = 1.0
    last_temperature: float = 2.0
    steps: int = 128
    noise: float = 1.0
    seed: int = 0
    interval: int | None = None

    name = "keyformer"
    family = "eviction"
    acts = "end of prompt, every decoding step"
    needs = "attention of every query"
    citation = (
        "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference, 2024, "
        "arXiv 2403.09054"
    )

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1 or not 0 <= self.recent <= 1:
            raise RecipeError(f"{self}: needs 0 < kept <= 1 and 0 <= recent <= 1")
        if min(self.temperature, self.last_temperature) <= 0 or self.noise < 0:
            raise RecipeError(f"{self}: needs temperatures above 0 and noise >= 0")
        if self.steps < 1 or (self.interval is not None and self.interval < 1):
            raise RecipeError(f"{self}: steps and interval are at least 1")
        if not 0 <= self.seed < 2**20:
            raise RecipeError(f"{self}: needs 0 <= seed < {2**20}")

    def eviction(self) -> Eviction:
        score = PerturbedMass(self.temperature, self.last_temperature, self.steps, self.noise, self.seed)
        return Eviction(score, default=float(self.kept), recent_share=self.recent, decode=True, interval=self.interval)
