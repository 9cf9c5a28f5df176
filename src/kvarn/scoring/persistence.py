"""How often an entry was passed over of late."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.updates import Ignoring, Update
from ..formats import ColumnType
from .observing import Columns, ObservingScore
from .view import Observation

_BITS = 8


@dataclass(frozen=True)
class Persistence(ObservingScore):
    """Entries that fewer of the last ``history`` queries ignored; of equals, the newer one.

    Scissorhands (arXiv 2305.17118, algorithm 2): a query ignores an entry to which it pays less than 1 / t, t being the
    entries that it reads; the query heads of a KV head together, by their mean. The column ``ignored`` has a bit for
    each of the last ``history`` queries (a multiple of 8), at its position modulo ``history``.
    """

    history: int

    @property
    def columns(self) -> Mapping[str, ColumnType]:
        return {"ignored": ((self.history // _BITS,), torch.uint8)}

    @property
    def of_prompt(self) -> int:
        return self.history

    @property
    def update(self) -> Update:
        return Ignoring("ignored", self.history)

    def observe(self, observation: Observation, columns: Columns) -> dict[str, Tensor]:
        queries, entries = observation.queries[:, None, :, None], columns["position"][:, :, None]
        reads = (entries >= 0) & (entries <= queries)
        level = 1 / reads.sum(-1, keepdim=True).clamp(min=1)
        ignores = reads & (observation.paid.probabilities.mean(2) < level)
        bits = self._bits(observation.queries)
        # Each query has a bit of its own, so that adding them up sets them; bytes are exact in fp32.
        added = (ignores.transpose(2, 3).float() @ bits[:, None]).to(torch.uint8)
        written = bits.sum(1).to(torch.uint8)[:, None, None]
        return {"ignored": (columns["ignored"] & ~written) | added}

    def stored(self, columns: Columns, seen: Tensor) -> Tensor:
        ignored = _ones(columns["ignored"]).sum(-1)
        return columns["position"].double() - ignored.double() * 2**32

    def _bits(self, queries: Tensor) -> Tensor:
        """The bit of each query ([B, q]) in the bytes of the column, as a number: fp32 [B, q, bytes]."""
        place = queries % self.history
        bytes_ = torch.arange(self.history // _BITS, device=queries.device)
        here = (place[..., None] // _BITS == bytes_) & (queries >= 0)[..., None]
        return here * (2.0 ** (place % _BITS))[..., None]


def _ones(bytes_: Tensor) -> Tensor:
    """How many bits of each byte are set, uint8."""
    pairs = bytes_ - (bytes_ >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return fours + (fours >> 4) & 0x0F
