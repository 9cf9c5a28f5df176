"""How much each entry matters: the scores that eviction methods share. Higher is kept."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ..attention import mass_received
from .view import PromptView, concatenated


class Score(ABC):
    """A score over entries. Higher is kept.

    ``tail``: where it is not the prompt's own queries that score but those of a text that the model reads after each
    block of it and that is not kept, so many of the block's last tokens, unless the cache was given another text.
    """

    tail: int | None = None

    @abstractmethod
    def prompt(self, view: PromptView) -> Tensor:
        """Scores of all candidates at the end of a prompt, fp32 [B, K, n]."""

    def stored(self, columns: Mapping[str, Tensor], seen: Tensor) -> Tensor:
        """Scores of stored entries between decoding steps, [R, n], from their columns ([R, n, …] each) and the tokens
        that their sequences have seen ([R, 1]); positions are -1 where nothing is."""
        raise TypeError(f"{type(self).__name__} scores prompts only")


class Recency(Score):
    """The later, the more."""

    def prompt(self, view: PromptView) -> Tensor:
        return view.positions.float()

    def stored(self, columns: Mapping[str, Tensor], seen: Tensor) -> Tensor:
        return columns["position"].float()


@dataclass(frozen=True)
class WindowMass(Score):
    """Mass received from the last ``window`` queries of the prompt, pooled over neighbours, averaged over the group.

    SnapKV (arXiv 2404.14469, section 4): the softmax runs over all keys, the window's own included; the votes of the
    window's keys are left out before pooling.
    """

    window: int
    kernel: int
    pooling: Literal["max", "avg"]

    def prompt(self, view: PromptView) -> Tensor:
        votes = concatenated(mass_received(*view.last_queries(self.window), view.variant))
        votes = votes.masked_fill(view.among_last(self.window)[:, :, None], 0)
        pool = max_pool1d if self.pooling == "max" else avg_pool1d
        pooled = pool(votes.flatten(0, 2)[:, None], self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.view_as(votes).mean(2)


@dataclass(frozen=True)
class LayerMass(Score):
    """Mass received from all queries of the prompt, averaged over all query heads: the same for every KV head.

    PrefixKV (arXiv 2412.03409). In decoding the prompt's head stays: of the entries before the ``distance`` newest of a
    head (before its newer half, where it holds fewer than twice as many) the older, the more.
    """

    distance: int

    def prompt(self, view: PromptView) -> Tensor:
        mass = concatenated(mass_received(view.query, view.parts, view.variant))
        return mass.mean((1, 2))[:, None].expand_as(view.positions)

    def stored(self, columns: Mapping[str, Tensor], seen: Tensor) -> Tensor:
        position = columns["position"]
        newer = position.argsort(dim=1, descending=True).argsort(dim=1)
        near = ((position >= 0).sum(1, keepdim=True) // 2).clamp(max=self.distance)
        return protected(-position.float(), newer < near)


def protected(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with the entries in ``mask`` raised above all others."""
    return scores.masked_fill(mask, torch.inf)
