"""When an entry mattered, and how long it has been silent before."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.updates import Recurring, Update
from ..formats import ColumnType
from .observing import Columns, ObservingScore
from .view import Observation


@dataclass(frozen=True)
class Recurrence(ObservingScore):
    """Entries whose silence is short against the longest after which they mattered again, and those that recur often.

    LazyEviction (arXiv 2506.15969): an entry matters to a query that pays it at least ``threshold`` (of a KV head's
    query heads, any). Of equals, the newer one. Columns: ``last``, the position of the last query it mattered to, and
    ``interval``, the longest time between two such. Of a prompt the last ``window`` queries are observed.
    """

    threshold: float
    window: int

    @property
    def columns(self) -> Mapping[str, ColumnType]:
        return {"last": torch.int32, "interval": torch.int32}

    @property
    def of_prompt(self) -> int:
        return self.window

    @property
    def update(self) -> Update:
        return Recurring("last", "interval", self.threshold)

    def fresh(self, positions: Tensor, first: Tensor) -> dict[str, Tensor]:
        # What came before anything was observed begins its silence there, not at its own position.
        last = positions.maximum(first.expand_as(positions)).int() - 1
        return {"last": last, "interval": torch.zeros_like(last)}

    def observe(self, observation: Observation, columns: Columns) -> dict[str, Tensor]:
        matters = observation.paid.probabilities.amax(2) >= self.threshold
        times = observation.queries.int()[:, None, :, None]
        mattered = torch.where(matters, times, -1)
        through = torch.cat([columns["last"][:, :, None], mattered], 2).cummax(2).values
        silence = torch.where(matters, times - through[:, :, :-1], 0).amax(2)
        return {"last": through[:, :, -1], "interval": columns["interval"].maximum(silence)}

    def stored(self, columns: Columns, seen: Tensor) -> Tensor:
        interval = columns["interval"].float()
        silence = (seen - 1 - columns["last"]).float()
        recurs = torch.where(interval > 0, 2 * torch.sigmoid(1 - interval), 0)
        score = 2 * torch.sigmoid(-1 - silence / (interval + 1e-5)) + recurs
        # What never mattered has no score at all: of such entries the newer ones stay.
        return score.double() + columns["position"] * 2.0**-50
