"""What a score sees of a layer: at the end of a prompt, and of the attention that it observes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention import Paid, Part, Variant


@dataclass(frozen=True)
class PromptView:
    """One layer at the end of a prompt, before anything of it is stored.

    Candidates are the entries stored earlier, then the new ones: n in all, part by part. ``positions`` ([B, K, n],
    int64) counts the tokens of each sequence from 0; -1 marks padding. ``columns`` ([B, K, n, …]) are the position and,
    where a score observes attention, its columns with this prompt in them. ``masked_parts`` gives the parts as a subset
    of queries may read them.
    """

    query: Tensor  # [B, H, q, D], the prompt's queries after RoPE
    query_positions: Tensor  # [B, q] int64, -1 for padding
    parts: tuple[Part, ...]
    variant: Variant
    positions: Tensor
    seen: Tensor  # [B] int64, tokens of each sequence so far, this prompt included
    columns: Mapping[str, Tensor]
    masked_parts: Callable[[Tensor], tuple[Part, ...]]

    def last_queries(self, count: int) -> tuple[Tensor, tuple[Part, ...]]:
        """The last ``count`` real tokens of each prompt (fewer give rows that read nothing): [B, H, count, D]."""
        index = self._last(count)
        return self.queries_at(index, self.query_positions.gather(1, index))

    def queries_at(self, index: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Part, ...]]:
        """The queries at ``index`` (int64 [B, m]) and the parts as they may read them from ``positions``, which are
        theirs, or -1 to read nothing: [B, H, m, D]."""
        query = self.query.gather(2, index[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3]))
        return query, self.masked_parts(positions)

    def last_positions(self, count: int) -> Tensor:
        """The positions of ``last_queries``, int64 [B, count], -1 for padding."""
        return self.query_positions.gather(1, self._last(count))

    def among_last(self, counts: Tensor | int) -> Tensor:
        """Which candidates are among the last ``counts`` ([B, K] or one number) tokens of their sequence: [B, K, n]."""
        return self.positions >= (self.seen[:, None] - counts)[..., None]

    def _last(self, count: int) -> Tensor:
        return self.query_positions.argsort(dim=1, stable=True)[:, -min(count, self.query.shape[2]) :]

    def asked_by(self, query: Tensor, positions: Tensor) -> "PromptView":
        """The same candidates before other queries, [B, H, q, D] at ``positions`` ([B, q], -1 for padding)."""
        return replace(self, query=query, query_positions=positions, parts=self.masked_parts(positions))

    @property
    def valid(self) -> Tensor:
        return self.positions >= 0


@dataclass(frozen=True)
class Observation:
    """What q queries of a layer paid to its entries: a block of a prompt's queries, or the one of a decoding step.

    ``queries`` ([B, q], int64) are their positions, -1 for padding, which pays nothing; ``decoded`` ([B], int64) how
    many tokens came one by one since the last prompt, these included (0 in a prompt); ``layer`` the layer's number.
    """

    paid: Paid
    queries: Tensor
    decoded: Tensor
    layer: int


def concatenated(per_part: list[Tensor]) -> Tensor:
    """Per-part tensors over entries as one over all candidates."""
    return per_part[0] if len(per_part) == 1 else torch.cat(per_part, -1)
