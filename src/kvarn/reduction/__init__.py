"""What happens to what is over budget."""

from .eviction import Eviction
from .folding import Folding, folded
from .merging import Clustering, Discrimination, Entries, Joined, Merging, Runs
from .precision import Precision

__all__ = [
    "Clustering",
    "Discrimination",
    "Entries",
    "Eviction",
    "Folding",
    "Joined",
    "Merging",
    "Precision",
    "Runs",
    "folded",
]
