"""What is over budget is dropped: which entries go, at the end of a prompt and between decoding steps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import ColumnType
from ..memory import sent
from ..scoring import ObservingScore, PromptView, Score, protected


@dataclass(frozen=True)
class Eviction:
    """Keeps the best entries of each head by a score.

    Always kept: the first ``sinks`` tokens, the newest ``recent`` ones, and of a capacity of C entries the newest
    ``recent_share * C``. ``decode``: evicts between decoding steps too, ``interval`` entries at once and at least
    ``interval_share * C``, so that a head never holds more than C; None: one, or with a format that encodes units of
    tokens, as many as a unit.
    ``default``: entries to keep where the user gives no budget, as a number or, where a float, as a share of the
    prompt's tokens. ``across_heads``: the KV heads of a layer share what they may keep all together, by the score; at
    the end of prompts only (AdaKV, arXiv 2407.11550; EpiCache's pairs, arXiv 2509.17396).
    """

    score: Score
    default: int | float
    sinks: int = 0
    recent: int = 0
    recent_share: float = 0.0
    decode: bool = False
    interval: int | None = None
    interval_share: float = 0.0
    across_heads: bool = False

    def __post_init__(self) -> None:
        assert not (self.across_heads and self.decode), "heads share what they keep at the end of prompts only"

    @property
    def least(self) -> int:
        """Entries below which the method cannot act as it should."""
        return self.sinks + self.recent + (self.at_once if self.decode else 1)

    @property
    def observes(self) -> ObservingScore | None:
        """What observes attention, if anything does."""
        return self.score if isinstance(self.score, ObservingScore) else None

    @property
    def columns(self) -> dict[str, ColumnType]:
        """What is kept beside each entry."""
        return {"position": torch.int32, **(self.observes.columns if self.observes else {})}

    def fresh(self, positions: Tensor) -> dict[str, Tensor]:
        """The columns of new entries at ``positions`` (int64, any shape), but for these and what is observed."""
        return {}

    @property
    def at_once(self) -> int:
        """The least entries that leave a full head together."""
        return self.interval or 1

    def leaving(self, capacity: Tensor) -> Tensor:
        """How many entries leave full heads of so many entries (int64, any shape)."""
        return (capacity * self.interval_share).long().clamp(min=self.at_once)

    def fits(self, entries: Tensor, capacity: Tensor) -> bool:
        """Whether nothing has to leave where heads hold ``entries`` (int64 [..., K], as ``capacity``)."""
        if self.across_heads:
            entries, capacity = entries.sum(-1), capacity.sum(-1)
        return bool((entries <= capacity).all())

    def keep(self, view: PromptView, capacity: Tensor, scores: Tensor) -> Tensor:
        """Which candidates of ``scores`` stay in a layer, both [B, K, n]. ``capacity`` is int64 [B, K], on the host."""
        capacity = capacity.clamp(max=scores.shape[-1])
        recent = sent(self.recent + (capacity * self.recent_share).long(), scores.device)
        protect = view.among_last(recent) | (view.positions < self.sinks)
        ranked = protected(scores, protect).masked_fill(~view.valid, -torch.inf)
        if self.across_heads:
            return _best(ranked.flatten(1), capacity.sum(1)).view_as(ranked) & view.valid
        return _best(ranked, capacity) & view.valid

    def best(self, columns: Mapping[str, Tensor], lengths: Tensor, seen: Tensor, capacity: Tensor) -> Tensor:
        """Which stored entries stay where heads shrink to ``capacity``, bool [R, n]; arguments as for ``victims``."""
        positions = columns["position"]
        recent = self.recent + (capacity * self.recent_share).long()
        protect = (positions >= (seen - recent)[:, None]) | (positions < self.sinks)
        place = torch.arange(positions.shape[1], device=positions.device)
        ranked = protected(self.score.stored(columns, seen[:, None]), protect)
        ranked = ranked.masked_fill(place >= lengths[:, None], -torch.inf)
        best = ranked.argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(protect).scatter(1, best, place < capacity[:, None])

    def victims(
        self, columns: Mapping[str, Tensor], lengths: Tensor, seen: Tensor, capacity: Tensor, most: int
    ) -> Tensor:
        """The ``most`` entries that leave each head first, in the order in which they would: int64 [R, most].

        ``columns`` are [R, n, …]; ``lengths``, ``seen`` (tokens of the sequence) and ``capacity`` are [R].
        """
        positions = columns["position"]
        recent = self.recent + (capacity * self.recent_share).long()
        recent = recent.minimum(capacity + 1 - self.leaving(capacity))
        protect = (positions >= (seen - recent)[:, None]) | (positions < self.sinks)
        beyond = torch.arange(positions.shape[1], device=positions.device) >= lengths[:, None]
        ranked = protected(self.score.stored(columns, seen[:, None]), protect | beyond)
        if most == 1:  # the first of equal ones, as by sorting
            return ranked.argmin(dim=-1, keepdim=True)
        return ranked.argsort(dim=-1, stable=True)[:, :most]


@dataclass(frozen=True)
class Thinning(Eviction):
    """Eviction that leaves the share ``keeps`` of what a full head holds before its newest ``recent`` entries."""

    keeps: float = 0.75

    def leaving(self, capacity: Tensor) -> Tensor:
        older = capacity + 1 - self.recent
        return (older - (older * self.keeps + 1e-9).long()).clamp(min=self.at_once)


def _best(ranked: Tensor, count: Tensor) -> Tensor:
    """The ``count`` ([...], on the host) highest of ``ranked`` ([..., n]), bool."""
    most = int(count.max())
    # Pooled scores have plateaus: a stable sort breaks ties by age, whatever the batch and its padding.
    best = ranked.argsort(dim=-1, descending=True, stable=True)[..., :most]
    within = torch.arange(most, device=best.device) < sent(count, best.device)[..., None]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, within)
