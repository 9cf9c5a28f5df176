"""Budgets as users write them: a share of the dense bytes, a size, or entries a head."""

import math
import re

from ..errors import BudgetError
from ..spec import ModelSpec

Budget = float | int | str | None

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """``"64MiB"``, ``"1.5 GB"``, ``"4096"`` -> bytes; raises BudgetError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or (match[2] or "B").upper() not in _UNITS:
        raise BudgetError(
            f"budget {text!r} is not a size: write a number and one of {', '.join(_UNITS)}, as in '64MiB'"
        )
    return int(float(match[1]) * _UNITS[(match[2] or "B").upper()])


def parse_budget(text: str) -> Budget:
    """``"512"`` is entries a head, ``"0.25"`` a share of the dense bytes, ``"64MiB"`` bytes. Raises BudgetError."""
    if re.fullmatch(r"[+-]?\d+", text):
        budget: Budget = int(text)
    elif re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+)", text):
        budget = float(text)
    else:
        budget = text
    check_budget(budget)
    return budget


def check_budget(budget: Budget) -> None:
    """Raises BudgetError unless ``budget`` is a share above 0, a size, a number of entries above 0, or None."""
    if isinstance(budget, str):
        parse_bytes(budget)
    elif budget is not None and not (type(budget) in (int, float) and 0 < budget < math.inf):
        raise BudgetError(
            f"budget {budget!r}: give a float above 0 (share of the dense bytes), a size such as '64MiB', or an int "
            "above 0 (entries a head)"
        )


def allowed_bytes(budget: Budget, spec: ModelSpec, lengths: list[int]) -> list[int | None]:
    """The bytes that ``budget`` allows each sequence; None where it is not about bytes."""
    check_budget(budget)
    if isinstance(budget, str):
        total = parse_bytes(budget)
        return [total // len(lengths)] * len(lengths)
    if isinstance(budget, float):
        return [int(budget * spec.dense_bytes(length)) for length in lengths]
    return [None] * len(lengths)
