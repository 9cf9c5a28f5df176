"""What happens to what is over budget."""

from .eviction import Eviction
from .merging import Clustering, Discrimination, Entries, Folding, Joined, Merging, Runs
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
]
