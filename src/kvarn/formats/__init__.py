"""How entries are encoded. Nothing here knows where they live."""

from .base import Format, Rows
from .columns import Columns, ColumnType
from .dense import Dense
from .integer import Int

__all__ = ["ColumnType", "Columns", "Dense", "Format", "Int", "Rows"]
