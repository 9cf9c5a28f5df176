"""What happens to what is over budget."""

from .eviction import Eviction

__all__ = ["Eviction"]
