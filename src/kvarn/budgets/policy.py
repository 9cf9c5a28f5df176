"""How a budget is divided over layers and heads."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

UNBOUNDED = 1 << 40  # the capacity of a head that keeps everything, also of what decoding brings


@dataclass(frozen=True)
class Heads:
    """What is to be divided over: ``kv_heads`` in each layer, for sequences of ``lengths`` (int64 [B]) tokens.

    ``acted_on`` (bool [layers]): layers without a sliding window, the ones that methods act on."""

    acted_on: Tensor
    kv_heads: int
    lengths: Tensor

    @property
    def layers(self) -> int:
        return self.acted_on.numel()


class Policy(ABC):
    """Divides a budget over the heads of all layers.

    It states divisions of growing generosity, numbered by a level; the plan takes the highest level that the budget
    allows. A head holds at most its entries, in decoding too where the recipe evicts there; ``UNBOUNDED`` heads keep
    everything and grow as tokens come.
    """

    grades: ClassVar[bool] = False  # whether it says how many entries are kept in the higher of two precisions

    def high(self, capacity: Tensor, heads: Heads) -> Tensor | None:
        """Where it ``grades``: of ``capacity`` entries (int64 [layers, B, K]) those in the higher precision, alike."""
        return None

    @abstractmethod
    def top(self, heads: Heads, most: int) -> Tensor:
        """The highest level of each sequence, int64 [B]; ``most`` is the most entries that a head can ever use."""

    @abstractmethod
    def entries(self, level: Tensor, heads: Heads) -> Tensor:
        """Entries that each head may hold at ``level`` (int64 [B]): int64 [layers, B, K], never less at higher levels.

        The plan raises what is below the least that the recipe can work with."""

    def unasked(self, heads: Heads) -> Tensor | None:
        """The level (int64 [B]) where the user gives no budget; None: as many entries as the eviction's default."""
        return None


@dataclass(frozen=True)
class Uniform(Policy):
    """Every head of every layer the same."""

    def top(self, heads: Heads, most: int) -> Tensor:
        return torch.full_like(heads.lengths, most)

    def entries(self, level: Tensor, heads: Heads) -> Tensor:
        return level[None, :, None].expand(heads.layers, -1, heads.kv_heads)


@dataclass(frozen=True, eq=False)
class Shares(Policy):
    """Entries in proportion to ``shares``, float64 [layers, B or 1, K or 1] above zero; of a mean of one, the level is
    the mean of the entries until heads are full."""

    shares: Tensor

    def top(self, heads: Heads, most: int) -> Tensor:
        return torch.full_like(heads.lengths, int(most / float(self.shares.min())) + 1)

    def entries(self, level: Tensor, heads: Heads) -> Tensor:
        return (self.shares * level[None, :, None]).long().expand(heads.layers, -1, heads.kv_heads)


def highest(fits: Callable[[Tensor], Tensor], top: Tensor) -> Tensor:
    """The highest level of 0 .. ``top`` (int64 [B]) that ``fits`` (levels [B] -> bool [B]); 0 where none does.

    A level fits only if all below it do."""
    low, high = torch.zeros_like(top), top
    while bool((low < high).any()):
        middle = (low + high + 1) // 2
        good = fits(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle - 1)
    return low
