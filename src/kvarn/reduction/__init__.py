"""What happens to what is over budget."""

from .eviction import Eviction
from .folding import Folding, folded

__all__ = ["Eviction", "Folding", "folded"]
