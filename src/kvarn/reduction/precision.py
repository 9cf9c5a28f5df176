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
        self, columns: Mapping[str, Tensor], lengths: Tensor, seen: Tensor, allowed: Tensor, settled: Tensor, most: int
    ) -> Tensor:
        """Places of the ``most`` of a head's entries that become low ones first, int64 [R, most], in that order, among
        those that are not low.

        ``columns`` are [R, n, …]; ``lengths``, ``seen`` (tokens of the sequence), ``allowed`` (how many may stay high)
        and ``settled`` (how many of the first come after the others, as they are high ones for good) are [R].
        """
        positions = columns["position"]
        place = torch.arange(positions.shape[1], device=positions.device)
        recent = self.recent + (self.recent_share * allowed).long()
        turn = (place < settled[:, None]).byte()
        turn = turn.masked_fill(positions >= (seen - recent)[:, None], 2)
        turn = turn.masked_fill(place >= lengths[:, None], 3)
        score = self.score.stored(columns, seen[:, None])
        if most == 1:  # the first of equal ones, as by sorting
            return score.masked_fill(turn > turn.amin(1, keepdim=True), torch.inf).argmin(1, keepdim=True)
        order = score.argsort(dim=-1, stable=True)
        return order.gather(1, turn.gather(1, order).argsort(dim=-1, stable=True))[:, :most]
