"""What formats learn of a model: how its keys and values are distributed."""

from .levels import LevelSearch
from .means import KeyMeans

__all__ = ["KeyMeans", "LevelSearch"]
