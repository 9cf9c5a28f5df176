"""Attention over segments, what it observes, and its place in transformers."""

from .reference import Paid, Part, Variant, attend, attend_observed, attend_with_mass, mass_received, observed

__all__ = [
    "Paid",
    "Part",
    "Variant",
    "attend",
    "attend_observed",
    "attend_with_mass",
    "mass_received",
    "observed",
]
