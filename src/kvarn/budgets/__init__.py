"""How much each layer and head may keep."""

from .amounts import Budget, allowed_bytes, check_budget, parse_budget, parse_bytes
from .cascade import Cascade, Density, Graded, PrecisionCascade, Preferred, Restlessness
from .policy import UNBOUNDED, Heads, Policy, Shares, Uniform, highest
from .retrieval import ChosenHeads, RankedHeads
from .sharing import most_on_average

__all__ = [
    "UNBOUNDED",
    "Budget",
    "Cascade",
    "ChosenHeads",
    "Density",
    "Graded",
    "Heads",
    "Policy",
    "PrecisionCascade",
    "Preferred",
    "RankedHeads",
    "Restlessness",
    "Shares",
    "Uniform",
    "allowed_bytes",
    "check_budget",
    "highest",
    "most_on_average",
    "parse_budget",
    "parse_bytes",
]
