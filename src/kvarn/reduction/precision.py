"""What is less important is kept in fewer bits: which entries of a head, and when."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import ColumnType
from ..memory import SideLayout
from ..scoring import ObservingScore

Sides = tuple[SideLayout, SideLayout]  # of keys and of values


@dataclass(frozen=True)
class Precision:
    """Keeps the share ``share`` of a head's entries, those with the largest score, as ``high`` says, and the others as
    ``low`` says. Of the high ones the newest ``recent`` tokens and the newest share ``recent_share`` come last to be
    lowered. Where ``share`` is None, the policy says how many are high ones (``Policy.high``).

    New entries are high ones. After a prompt, and after each step, those that are too many become low ones for good;
    where the policy decides, once a head is full or has more of them than fit.
    With ``gap``, new entries of decoding stay exact until so many have come; then they become high and low ones
    together, and those that were high already stay so. ``rounds_up``: a fraction of an entry counts as a high one.
    """

    score: ObservingScore
    high: Sides
    low: Sides
    share: float | None
    recent: int = 0
    recent_share: float = 0.0
    gap: int | None = None
    rounds_up: bool = False

    @property
    def columns(self) -> dict[str, ColumnType]:
        """What is kept beside each entry."""
        return {"position": torch.int32, **self.score.columns}

    def first_to_go(
        self, columns: Mapping[str, Tensor], lengths: Tensor, seen: Tensor, allowed: Tensor, settled: Tensor
    ) -> Tensor:
        """Places of a head's entries that are not low, int64 [R, n], in the order in which they become low ones.

        ``columns`` are [R, n, …]; ``lengths``, ``seen`` (tokens of the sequence), ``allowed`` (how many may stay high)
        and ``settled`` (how many of the first come after the others, as they are high ones for good) are [R].
        """
        positions = columns["position"]
        place = torch.arange(positions.shape[1], device=positions.device)
        recent = self.recent + (self.recent_share * allowed).long()
        turn = (place < settled[:, None]).byte()
        turn = turn.masked_fill(positions >= (seen - recent)[:, None], 2)
        turn = turn.masked_fill(place >= lengths[:, None], 3)
        order = self.score.stored(columns, seen[:, None]).argsort(dim=-1, stable=True)
        return order.gather(1, turn.gather(1, order).argsort(dim=-1, stable=True))
