"""How entries are encoded. Nothing here knows where they live."""

from .base import Format, Rows
from .bundled import Bundled, Directions, Subspace
from .columns import Columns, ColumnType
from .corrected import Corrected
from .dense import Dense
from .exempt import Exempt
from .float8 import Float8
from .integer import Int
from .mapped import Mapped, innermost
from .narrow import Channels, Narrow
from .nonuniform import NonUniform, exact_numbers
from .ranged import Codes, Ranged
from .rescaled import Balanced, Rescaled, Separable
from .rotated import Rotated
from .signs import Signs
from .sparse import Sparse
from .spectral import Spectral
from .ternary import Ternary

__all__ = [
    "Balanced",
    "Bundled",
    "Channels",
    "Codes",
    "ColumnType",
    "Columns",
    "Corrected",
    "Dense",
    "Directions",
    "Exempt",
    "Float8",
    "Format",
    "Int",
    "Mapped",
    "Narrow",
    "NonUniform",
    "Ranged",
    "Rescaled",
    "Rotated",
    "Rows",
    "Separable",
    "Signs",
    "Sparse",
    "Spectral",
    "Subspace",
    "Ternary",
    "exact_numbers",
    "innermost",
]
