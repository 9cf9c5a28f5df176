"""Which of the kept entries a query reads."""

from .base import Chosen, Layers, Reading, Selection, Selector
from .chunks import Chunks, stray
from .sentences import SentenceEnds, Sentences
from .voting import Voting

__all__ = [
    "Chosen",
    "Chunks",
    "Layers",
    "Reading",
    "Selection",
    "Selector",
    "SentenceEnds",
    "Sentences",
    "Voting",
    "stray",
]
