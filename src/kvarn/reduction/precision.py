"""What is less important is kept in fewer bits: which entries of a head, and when."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import ColumnType
from ..memory import SideLayout
from ..scoring import ObservingScore, protected

Sides = tuple[SideLayout, SideLayout]  # of keys and of values


@dataclass(frozen=True)
class Precision:
    """Keeps the share ``share`` of a head's entries, those with the largest score, as ``high`` says, and the others as
    ``low`` says. Of the high ones, the share ``recent_share`` are the newest tokens.

    New entries are high ones. After a prompt, and after each step, those that are too many become low ones for good.
    """

    score: ObservingScore
    high: Sides
    low: Sides
    share: float
    recent_share: float

    @property
    def columns(self) -> dict[str, ColumnType]:
        """What is kept beside each entry."""
        return {"position": torch.int32, **self.score.columns}

    def first_to_go(self, columns: Mapping[str, Tensor], lengths: Tensor, seen: Tensor, recent: Tensor) -> Tensor:
        """Places of a head's high entries, int64 [R, n], in the order in which they become low ones.

        ``columns`` are [R, n, …]; ``lengths``, ``seen`` (tokens of the sequence) and ``recent`` (how many of the newest
        come last) are [R].
        """
        positions = columns["position"]
        beyond = torch.arange(positions.shape[1], device=positions.device) >= lengths[:, None]
        newest = positions >= (seen - recent)[:, None]
        return protected(self.score.stored(columns, seen[:, None]), newest | beyond).argsort(dim=-1, stable=True)
