"""How entries are encoded. Nothing here knows where they live."""

from .base import Format, Rows
from .columns import Columns
from .dense import Dense
from .integer import Int

__all__ = ["Columns", "Dense", "Format", "Int", "Rows"]
