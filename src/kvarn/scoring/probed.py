"""Attention mass received from a few queries of a prompt, against how many of them could give any."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..attention import observed
from ..attention.updates import Mass, Update
from ..formats import ColumnType
from .hashing import mixed
from .observing import Columns, ObservingScore
from .view import Observation, PromptView


@dataclass(frozen=True)
class ProbedMass(ObservingScore):
    """Mean attention from the probes that see an entry, averaged over the query heads of a KV head; in decoding the
    attention of the last query alone.

    ZipCache (arXiv 2405.14256): of a prompt's queries the share ``recent`` that are the newest (at least one), and the
    share ``random`` of others, drawn without repetition by ``seed``, layer and position. ``over`` "all" divides by how
    many queries of the prompt see the entry, which favours the newest entries, as the release does.
    """

    recent: float
    random: float
    seed: int
    over: Literal["probes", "all"] = "probes"

    columns: ClassVar[Mapping[str, ColumnType]] = {"saliency": torch.float32}

    @property
    def update(self) -> Update:
        return Mass("saliency")

    @property
    def forgets(self) -> bool:
        return True

    def observe(self, observation: Observation, columns: Columns) -> dict[str, Tensor]:
        return {"saliency": observation.paid.mass.mean(2)}

    def stored(self, columns: Columns, seen: Tensor) -> Tensor:
        return columns["saliency"]

    def after_prompt(self, view: PromptView, layer: int) -> PromptView:
        index, positions = self.probes(view.query_positions, layer)
        query, parts = view.queries_at(index, positions)
        mass = sum(paid.mass.mean(2) for paid in observed(query, parts, view.variant))
        seen_by = positions if self.over == "probes" else view.query_positions
        columns = {**view.columns, "saliency": mass / _readers(seen_by, view.positions).clamp(min=1)}
        return replace(view, columns=columns)

    def probes(self, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The probes among queries at ``positions`` ([B, q], -1 for padding): their places and positions, int64 [B, m],
        -1 where a sequence has fewer."""
        real = positions >= 0
        tokens = real.sum(1, keepdim=True)
        recent, random = ((tokens * share + 1e-9).long() for share in (self.recent, self.random))
        recent = recent.clamp(min=1)
        from_end = tokens - real.cumsum(1)  # of padding too, which is never chosen
        drawn = mixed(
            positions.int() * 0x27D4EB2F ^ mixed(torch.full_like(positions, layer * 40503 + self.seed * 97).int())
        )
        # The newest ones first, then the others as they are drawn, then padding.
        turn = drawn.long().masked_fill(from_end < recent, -(2**40)).masked_fill(~real, 2**40)
        count = (recent + random).minimum(tokens)
        index = turn.argsort(dim=1, stable=True)[:, : int(count.max())]
        chosen = torch.arange(index.shape[1], device=index.device) < count
        return index, positions.gather(1, index).masked_fill(~chosen, -1)


def _readers(queries: Tensor, entries: Tensor) -> Tensor:
    """How many of the queries at [B, q] (-1 for padding) see entries at [B, K, n]: those at their position or later."""
    ordered = queries.sort(dim=1).values
    before = torch.searchsorted(ordered, entries.flatten(1).contiguous()).view_as(entries)
    return queries.shape[1] - before
