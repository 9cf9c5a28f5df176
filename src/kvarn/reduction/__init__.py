"""What happens to what is over budget."""

from .eviction import Eviction
from .folding import Folding, folded
from .precision import Precision

__all__ = ["Eviction", "Folding", "Precision", "folded"]
