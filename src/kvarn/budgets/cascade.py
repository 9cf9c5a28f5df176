"""Layers that share a budget by what each of them shows in the prompt, decided as the prompt goes through them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import observed
from ..scoring import PromptView
from ..scoring.shifting import over_queries
from .policy import Heads, Uniform


@dataclass(frozen=True)
class Cascade(Uniform):
    """Layers share the budget in proportion to their preferences, which are known only once a layer has been computed.

    Until then a layer is counted with the least that the recipe needs. With every further layer the ones before it hold
    less, so the bytes held never exceed the budget by more than a layer (CAKE, arXiv 2503.12491, section 4.3).

    A layer's preference is D^(1 / ``dispersion``) * V^(1 / ``change``): D the entropy of what the last ``window``
    queries of the prompt pay to entries before them, V the variance of it over these queries, both summed over query
    heads (equations 4 to 6).
    """

    window: int
    dispersion: float
    change: float

    def preference(self, view: PromptView) -> Tensor:
        """How much a layer wants, float64 [B] above zero."""
        queries = view.last_positions(self.window)
        (paid,) = observed(*view.last_queries(self.window), view.variant)
        before = ~view.among_last(self.window)[:, :, None, None]
        rows = (paid.probabilities * before).double()
        entropy = -(rows * (rows + 1e-10).log()).sum((1, 2, 3, 4))
        variance = over_queries(rows, queries)[1].sum((1, 2, 3))
        tiny = torch.finfo(torch.float32).tiny
        return entropy.clamp(min=tiny) ** (1 / self.dispersion) * variance.clamp(min=tiny) ** (1 / self.change)


class Preferred(Uniform):
    """Entries in proportion to ``preferences`` (float64 [layers, B], 0 for layers not seen yet); no head has more than
    the prompt's tokens."""

    def __init__(self, preferences: Tensor):
        seen = preferences > 0
        mean = preferences.sum(0) / seen.sum(0).clamp(min=1)
        # Layers that want next to nothing would make the highest level endless.
        self.shares = torch.where(seen, (preferences / mean).clamp(min=1e-3), 0)

    def top(self, heads: Heads, most: int) -> Tensor:
        return torch.full_like(heads.lengths, 1000 * most)

    def entries(self, level: Tensor, heads: Heads) -> Tensor:
        entries = (self.shares * level).round().long().minimum(heads.lengths)
        return entries[..., None].expand(-1, -1, heads.kv_heads)
