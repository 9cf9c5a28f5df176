"""How much each entry matters."""

from .scores import AccumulatedMass, Recency, Score, WindowMass, protected
from .view import PromptView

__all__ = ["AccumulatedMass", "PromptView", "Recency", "Score", "WindowMass", "protected"]
