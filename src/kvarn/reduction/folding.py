"""What is over budget is folded into one entry of each head that stands for all of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import ColumnType
from .eviction import Eviction


@dataclass(frozen=True)
class Folding(Eviction):
    """Eviction whose leaving entries are averaged into the last of the ``sinks``: the compensation entry.

    The column "count" says how many entries each one stands for; attention adds its logarithm to the entry's logit.
    Keys are averaged as they are stored, with RoPE at their own positions (RazorAttention, arXiv 2407.15891).
    """

    @property
    def columns(self) -> dict[str, ColumnType]:
        return super().columns | {"count": torch.float32}

    def fresh(self, positions: Tensor) -> dict[str, Tensor]:
        return {"count": torch.ones_like(positions, dtype=torch.float32)}

    def target(self, positions: Tensor) -> Tensor:
        """The compensation entry among ``positions``, as a mask of the same shape."""
        return positions == self.sinks - 1


def folded(keys: Tensor, values: Tensor, counts: Tensor, joining: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One entry in place of those in ``joining`` (bool [..., n]), each with the weight of its count.

    ``keys`` and ``values`` are [..., n, D], ``counts`` [..., n]; gives a key and a value [..., D] and their count
    [...], 0 where nothing joins.
    """
    weight = torch.where(joining, counts, 0)[..., None, :]
    total = weight.sum(-1)
    key, value = ((weight @ x.float()).squeeze(-2) / total.clamp(min=1) for x in (keys, values))
    return key.to(keys.dtype), value.to(values.dtype), total.squeeze(-1)
