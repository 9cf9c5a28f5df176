"""What the newest queries attend to, and how much that changes from one to the next."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ..formats import ColumnType
from .observing import Columns, ObservingScore
from .view import Observation


@dataclass(frozen=True)
class ShiftingMass(ObservingScore):
    """Mean attention of the last ``window`` queries and ``shift`` times its variance over them, pooled over ``kernel``
    neighbours, averaged over the group; in decoding the attention of the last query alone.

    CAKE (arXiv 2503.12491, section 4.2). What the window itself receives does not count.
    """

    window: int
    shift: float
    kernel: int = 5

    columns: ClassVar[Mapping[str, ColumnType]] = {"worth": torch.float32}

    @property
    def of_prompt(self) -> int:
        return self.window

    def observe(self, observation: Observation, columns: Columns) -> dict[str, Tensor]:
        mean, variance = over_queries(observation.paid.probabilities, observation.queries)
        worth = mean + self.shift * variance
        newest = observation.queries.amax(1)[:, None, None]
        worth = worth.masked_fill((columns["position"] > newest - self.window)[:, :, None], 0)
        pooled = avg_pool1d(worth.flatten(0, 2)[:, None], self.kernel, stride=1, padding=self.kernel // 2)
        return {"worth": pooled.view_as(worth).mean(2)}

    def stored(self, columns: Columns, seen: Tensor) -> Tensor:
        return columns["worth"]


def over_queries(probabilities: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the real ones of ``queries`` ([B, q], -1 for padding) of what they pay
    ([B, K, G, q, n]): [B, K, G, n] each; the variance of a single query is 0."""
    real = (queries >= 0)[:, None, None, :, None]
    count = real.sum(3)
    mean = (probabilities * real).sum(3) / count.clamp(min=1)
    squares = ((probabilities - mean[:, :, :, None]).square() * real).sum(3)
    return mean, squares / (count - 1).clamp(min=1)
