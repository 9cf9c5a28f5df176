"""How much each entry matters."""

from .observing import AccumulatedMass, ObservingScore
from .persistence import Persistence
from .perturbed import PerturbedMass
from .recurrence import Recurrence
from .scores import LayerMass, Recency, Score, WindowMass, protected
from .view import Observation, PromptView

__all__ = [
    "AccumulatedMass",
    "LayerMass",
    "Observation",
    "ObservingScore",
    "Persistence",
    "PerturbedMass",
    "PromptView",
    "Recency",
    "Recurrence",
    "Score",
    "WindowMass",
    "protected",
]
