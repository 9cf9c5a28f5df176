"""How entries are encoded. Nothing here knows where they live."""

from .balanced import Balanced
from .base import Format, Rows
from .columns import Columns, ColumnType
from .corrected import Corrected
from .dense import Dense
from .integer import Int
from .narrow import Channels, Narrow
from .sparse import Sparse
from .spectral import Spectral
from .ternary import Ternary

__all__ = [
    "Balanced",
    "Channels",
    "ColumnType",
    "Columns",
    "Corrected",
    "Dense",
    "Format",
    "Int",
    "Narrow",
    "Rows",
    "Sparse",
    "Spectral",
    "Ternary",
]
