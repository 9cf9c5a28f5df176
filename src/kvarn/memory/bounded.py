"""Two precisions where how many entries are high ones depends on the entries."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .tiered import TieredLayout


@dataclass(frozen=True)
class BoundedLayout(TieredLayout):
    """A ``TieredLayout`` in which at most the share ``share`` of the entries are high ones, which cost more.

    Its bytes are exact where the share is 0, else the most that any number of high entries up to that takes.
    """

    def bytes(self, tokens: Tensor) -> Tensor:
        return self._at_most(tokens) if self.share else super().bytes(tokens)

    def most_bytes_of_prompt(self, tokens: Tensor) -> Tensor:
        return self._at_most(tokens)

    def _at_most(self, tokens: Tensor) -> Tensor:
        high = self.count_high(tokens)
        # With as few high entries as take the same pages, the most are low ones.
        fewest = torch.where(high > 0, (high - 1) // self.high.page_size * self.high.page_size + 1, 0)
        return self.high.most_bytes(high) + self.low.most_bytes(tokens - fewest)
