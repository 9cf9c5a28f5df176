"""Heads that keep everything beside heads that keep little."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .policy import UNBOUNDED, Heads, Policy


@dataclass(frozen=True, eq=False)
class RankedHeads(Policy):
    """The heads of the highest ``gates`` ([layers, K]) keep everything, the others ``few`` entries.

    A budget decides how many are which; where not even ``few`` fit everywhere, all heads keep as many as do. Without a
    budget a ``share`` of the heads keeps everything.
    """

    gates: Tensor
    few: int
    share: float

    def top(self, heads: Heads, most: int) -> Tensor:
        return torch.full_like(heads.lengths, self.few + heads.layers * heads.kv_heads)

    def entries(self, level: Tensor, heads: Heads) -> Tensor:
        gates = torch.where(heads.acted_on[:, None], self.gates, -torch.inf)
        rank = gates.flatten().argsort(descending=True, stable=True).argsort().view_as(gates)
        everything = rank[:, None] < (level - self.few)[None, :, None]
        few = level.clamp(max=self.few)[None, :, None]
        return torch.where(everything, UNBOUNDED, few)

    def unasked(self, heads: Heads) -> Tensor:
        count = int(heads.acted_on.sum()) * heads.kv_heads
        return torch.full_like(heads.lengths, self.few + round(self.share * count))


@dataclass(frozen=True, eq=False)
class ChosenHeads(Policy):
    """The ``chosen`` heads (bool [layers, K]) keep everything, the others as many entries as the budget allows.

    Without a budget the others keep ``aside`` entries and of N tokens max(``least``, N // ``divisor``).
    """

    chosen: Tensor
    aside: int
    least: int
    divisor: int

    def top(self, heads: Heads, most: int) -> Tensor:
        return torch.full_like(heads.lengths, most)

    def entries(self, level: Tensor, heads: Heads) -> Tensor:
        return torch.where(self.chosen[:, None], UNBOUNDED, level[None, :, None])

    def unasked(self, heads: Heads) -> Tensor:
        return self.aside + (heads.lengths // self.divisor).clamp(min=self.least)
