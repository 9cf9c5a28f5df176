"""How much each entry matters."""

from .observing import AccumulatedMass, ObservingScore
from .patched import PatchedMass
from .persistence import Persistence
from .perturbed import PerturbedMass
from .probed import ProbedMass
from .recurrence import Recurrence
from .scores import LayerMass, Recency, Score, WindowMass, protected
from .view import Observation, PromptView

__all__ = [
    "AccumulatedMass",
    "LayerMass",
    "Observation",
    "ObservingScore",
    "PatchedMass",
    "Persistence",
    "PerturbedMass",
    "ProbedMass",
    "PromptView",
    "Recency",
    "Recurrence",
    "Score",
    "WindowMass",
    "protected",
]
