"""What happens to what is over budget."""

from .eviction import Eviction, Thinning
from .exemption import Exemption, FirstTokens, MassiveTokens
from .merging import Clustering, Discrimination, Entries, Folding, Joined, Merging, Runs
from .precision import Precision

__all__ = [
    "Clustering",
    "Discrimination",
    "Entries",
    "Eviction",
    "Exemption",
    "FirstTokens",
    "Folding",
    "Joined",
    "MassiveTokens",
    "Merging",
    "Precision",
    "Runs",
    "Thinning",
]
