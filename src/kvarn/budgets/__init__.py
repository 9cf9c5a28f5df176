"""How much each layer and head may keep."""

from .uniform import uniform

__all__ = ["uniform"]
