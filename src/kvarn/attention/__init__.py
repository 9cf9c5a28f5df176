"""Attention over segments, what it observes, and its place in transformers."""

from .reference import Part, Variant, attend, attend_with_mass, mass_received

__all__ = ["Part", "Variant", "attend", "attend_with_mass", "mass_received"]
