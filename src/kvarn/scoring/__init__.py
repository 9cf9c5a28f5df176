"""How much each entry matters."""

from .observing import AccumulatedMass, ObservingScore
from .scores import Recency, Score, WindowMass, protected
from .view import Observation, PromptView

__all__ = [
    "AccumulatedMass",
    "Observation",
    "ObservingScore",
    "PromptView",
    "Recency",
    "Score",
    "WindowMass",
    "protected",
]
