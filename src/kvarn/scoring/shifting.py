"""What the newest queries attend to, and how much that changes from one to the next."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ..attention.updates import Mass, Update
from ..formats import ColumnType
from .observing import Columns, ObservingScore
from .view import Observation, PromptView


@dataclass(frozen=True)
class ShiftingMass(ObservingScore):
    """Mean attention of the last ``window`` queries and ``shift`` times its variance over them, pooled over ``kernel``
    neighbours, averaged over the group; in decoding the attention of the last query alone.

    CAKE (arXiv 2503.12491, section 4.2). What the window itself receives does not count. Neighbours are those in the
    order of reading, or with ``by_age`` in that of their positions; then decoding steps pool when entries are chosen.
    """

    window: int
    shift: float
    kernel: int = 5
    by_age: bool = False

    columns: ClassVar[Mapping[str, ColumnType]] = {"worth": torch.float32}

    @property
    def of_prompt(self) -> int:
        return self.window

    @property
    def update(self) -> Update:
        # The variance over one query is nothing.
        return Mass("worth", window=self.window, kernel=1 if self.by_age else self.kernel)

    @property
    def forgets(self) -> bool:
        return True

    @property
    def finishes(self) -> bool:
        return self.by_age

    def observe(self, observation: Observation, columns: Columns) -> dict[str, Tensor]:
        mean, variance = over_queries(observation.paid.probabilities, observation.queries)
        worth = mean + self.shift * variance
        newest = observation.queries.amax(1)[:, None, None]
        worth = worth.masked_fill((columns["position"] > newest - self.window)[:, :, None], 0)
        worth = worth.mean(2)
        return {"worth": worth if self.by_age else self._pooled(worth)}

    def finished(self, columns: Columns) -> dict[str, Tensor]:
        # Sorting is not worth the while for each query, of which most decide nothing.
        worth = columns["worth"].masked_fill(columns["position"] < 0, 0)
        order = columns["position"].argsort(dim=-1, stable=True)
        return {"worth": torch.empty_like(worth).scatter_(-1, order, self._pooled(worth.gather(-1, order)))}

    def after_prompt(self, view: PromptView, layer: int) -> PromptView:
        view = super().after_prompt(view, layer)
        if not self.by_age:
            return view
        return replace(view, columns={**view.columns, **self.finished({**view.columns, "position": view.positions})})

    def _pooled(self, worth: Tensor) -> Tensor:
        pooled = avg_pool1d(worth.flatten(0, -2)[:, None], self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.view_as(worth)

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


def kurtosis(probabilities: Tensor, queries: Tensor) -> Tensor:
    """The fourth central moment over the square of the second (at least 1e-8), of what the real ones of ``queries`` pay
    (arguments as for ``over_queries``): [B, K, G, n]."""
    real = (queries >= 0)[:, None, None, :, None]
    mean, _ = over_queries(probabilities, queries)
    squares = (probabilities - mean[:, :, :, None]).square() * real
    count = real.sum(3).clamp(min=1)
    return (squares.square().sum(3) / count) / (squares.sum(3) / count).clamp(min=1e-8).square()
