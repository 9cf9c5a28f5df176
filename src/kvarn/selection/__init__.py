"""Which of the kept entries a query reads."""

from .base import Chosen, Layers, Reading, Selection, Selector
from .voting import Voting

__all__ = ["Chosen", "Layers", "Reading", "Selection", "Selector", "Voting"]
