"""How a decoding step's query changes columns beside entries, in words that kernels know; scores choose among them."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Mass:
    """``column`` (fp32) becomes what the query pays to an entry, averaged over the query heads of its KV head, or grows
    by that where ``adds``.

    Averaged over ``kernel`` (odd) neighbours in the order of reading too, of which those among the newest ``window``
    tokens, and those beyond the ends, count nothing.
    """

    column: str
    adds: bool = False
    window: int = 0
    kernel: int = 1

    @property
    def columns(self) -> tuple[str, str]:
        return self.column, "position"


@dataclass(frozen=True)
class Recurring:
    """Of entries to which any query head pays at least ``threshold``: ``interval`` (int32) grows to the time since
    ``last`` (int32), which becomes the query's position."""

    last: str
    interval: str
    threshold: float

    @property
    def columns(self) -> tuple[str, str]:
        return self.last, self.interval


@dataclass(frozen=True)
class Ignoring:
    """``column`` (uint8 [history / 8]) has a bit for each of the last ``history`` queries, at their positions modulo
    ``history``: set where the query heads pay an entry less, by their mean, than an equal share of all entries."""

    column: str
    history: int

    @property
    def columns(self) -> tuple[str, str]:
        return self.column, "position"


Update = Mass | Recurring | Ignoring


class Updates(NamedTuple):
    """Changes of columns, and the queries' positions (int64 [B, 1], on the device)."""

    each: tuple[Update, ...]
    positions: Tensor
