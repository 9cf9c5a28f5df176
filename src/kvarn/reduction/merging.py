"""What is over budget joins entries that stay, instead of being dropped."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..formats import ColumnType
from ..scoring import protected
from .eviction import Eviction

# Entries whose similarity to all others is computed at once, so that it never takes n x n numbers.
ROW_BLOCK = 256


@dataclass(frozen=True)
class Entries:
    """The entries of R heads, n places each, of which some hold none.

    ``keys``: [R, n, D]; ``columns`` [R, n, …], position among them (-1 where nothing is); ``seen`` [R, 1], tokens of
    the sequence; ``capacity`` [R], the most entries of a head; ``leaving`` [R], how many have to go.
    """

    keys: Tensor
    columns: Mapping[str, Tensor]
    seen: Tensor
    capacity: Tensor
    leaving: Tensor


@dataclass(frozen=True)
class Joined:
    """Which entries become one: ``into`` (int64 [R, n]) is the place that each joins, its own where it stays, and -1
    where it is dropped; ``weight`` (fp32 [R, n]) what it counts in the mean that an entry becomes; ``columns`` ([R, n])
    those that change."""

    into: Tensor
    weight: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def stays(self) -> Tensor:
        """Bool [R, n]."""
        return self.into == torch.arange(self.into.shape[1], device=self.into.device)

    @property
    def changed(self) -> Tensor:
        """Which entries stay and were joined by others, bool [R, n]."""
        joins = (self.into >= 0) & ~self.stays
        return torch.zeros_like(joins, dtype=torch.int32).scatter_add(1, self._places, joins.int()) > 0

    def summed(self, x: Tensor) -> Tensor:
        """Sums over the entries that become one, [R, n]; 0 where none stays."""
        return torch.zeros_like(x).scatter_add(1, self._places, x.masked_fill(self.into < 0, 0))

    def merged(self, x: Tensor) -> Tensor:
        """``x`` ([R, n, D]) with the weighted mean in place of each entry that others joined."""
        weight = self.weight.masked_fill(self.into < 0, 0)
        rows = self._places[..., None].expand_as(x)
        total = torch.zeros_like(x, dtype=torch.float32).scatter_add(1, rows, weight[..., None] * x.float())
        mean = total / self.summed(self.weight)[..., None]
        return torch.where(self.changed[..., None], mean.to(x.dtype), x)

    @property
    def _places(self) -> Tensor:
        return self.into.clamp(min=0)


@dataclass(frozen=True)
class Merging(Eviction):
    """A reduction that merges, in prompts and between decoding steps.

    Where it has a column ``count``, the tokens that an entry stands for, attention adds its logarithm to the logit.
    """

    @abstractmethod
    def join(self, entries: Entries) -> Joined:
        """What becomes of the entries of heads that are over their capacity."""

    def protects(self, entries: Entries) -> Tensor:
        """Places that hold nothing, the first tokens and the newest ones, bool [R, n]."""
        positions = entries.columns["position"]
        capacity = entries.capacity[:, None]
        recent = self.recent + (capacity * self.recent_share).long()
        # At least one entry more than has to leave is open to it.
        recent = recent.minimum(capacity - self.sinks - self.at_once)
        return (positions < self.sinks) | (positions >= entries.seen - recent) | (positions < 0)


@dataclass(frozen=True)
class Counting(Merging):
    """A reduction whose entries stand for as many tokens as have joined them, and count so much in means."""

    @property
    def columns(self) -> dict[str, ColumnType]:
        return {**super().columns, "count": torch.float32}

    def fresh(self, positions: Tensor) -> dict[str, Tensor]:
        return {**super().fresh(positions), "count": torch.ones_like(positions, dtype=torch.float32)}


@dataclass(frozen=True)
class Folding(Counting):
    """What a score would drop is averaged into the last of the ``sinks``: the compensation entry.

    Keys are averaged as attention reads them, with RoPE at their own positions (RazorAttention, arXiv 2407.15891).
    """

    def join(self, entries: Entries) -> Joined:
        position, count = entries.columns["position"], entries.columns["count"]
        ranked = protected(self.score.stored(entries.columns, entries.seen), self.protects(entries))
        rank = ranked.argsort(dim=1, stable=True).argsort(dim=1)
        own = torch.arange(position.shape[1], device=position.device)
        target = (position == self.sinks - 1).byte().argmax(1, keepdim=True)
        joined = Joined(torch.where(rank < entries.leaving[:, None], target, own), count)
        return replace(joined, columns={"count": joined.summed(count)})


@dataclass(frozen=True)
class Clustering(Counting):
    """In chunks of ``chunk`` consecutive entries, every second one may join its most similar among the others.

    Chelsea (arXiv 2506.11418): bipartite soft matching by the cosine of the keys; of all a head's matches the best are
    merged into means weighted by counts, in as many passes as it takes, each of which at most halves a chunk.
    """

    chunk: int = 64

    def join(self, entries: Entries) -> Joined:
        position, count = entries.columns["position"], entries.columns["count"]
        into = torch.arange(position.shape[1], device=position.device).expand_as(position)
        free, leaving, keys = ~self.protects(entries), entries.leaving, entries.keys
        own, nowhere = into, into.shape[1]
        joined = Joined(into, count)
        while int(leaving.max()) > 0:
            source, target, best = self._matches(keys, position, free)
            best = best & (best.cumsum(1) <= leaving[:, None])
            step = pad(own, (0, 1)).scatter(1, source.masked_fill(~best, nowhere), target)[:, :nowhere]
            into, free = step.gather(1, into), free & (step == own)
            leaving = leaving - best.sum(1)
            joined = Joined(into, count)
            keys = joined.merged(entries.keys)
        return replace(joined, columns={"count": joined.summed(count)})

    def _matches(self, keys: Tensor, position: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each head: places that may join, the place that each would join, and whether it is a match at all; the
        most similar first, [R, m] each."""
        never = torch.iinfo(torch.int64).max
        order = position.long().masked_fill(~free, never).argsort(dim=1, stable=True)
        size = min(self.chunk, order.shape[1])
        padding = -order.shape[1] % size
        order = pad(order, (0, padding))
        real = torch.arange(order.shape[1], device=free.device) < free.sum(1, keepdim=True)
        directions = normalize(keys.float(), dim=-1)
        rows = directions.gather(1, order[..., None].expand(-1, -1, keys.shape[2]))
        chunks, real, order = (x.unflatten(1, (-1, size)) for x in (rows, real, order))
        similar = chunks[:, :, ::2] @ chunks[:, :, 1::2].transpose(-1, -2)
        similar = similar.masked_fill(~(real[:, :, ::2, None] & real[:, :, None, 1::2]), -torch.inf)
        value, nearest = similar.max(-1)
        source, target = order[:, :, ::2].flatten(1), order[:, :, 1::2].gather(2, nearest).flatten(1)
        value, rank = value.flatten(1).sort(dim=1, descending=True, stable=True)
        return source.gather(1, rank), target.gather(1, rank), value > -torch.inf


@dataclass(frozen=True)
class Discrimination(Merging):
    """What a score would drop joins the most similar entry that stays, if it is similar enough; else it is dropped.

    D2O (arXiv 2406.13035, section 3.3): similar is the cosine u of the keys, enough the threshold of the head: the mean
    of u at first, then ``memory`` times the old threshold and 1 - ``memory`` times the new mean. An entry that others
    join becomes the mean of all with weights e for itself and exp(u) for them. The column ``threshold`` is the head's,
    the same for all entries that were there when it changed last (-inf before).
    """

    memory: float = 0.5

    @property
    def columns(self) -> dict[str, ColumnType]:
        return {**super().columns, "threshold": torch.float32}

    def fresh(self, positions: Tensor) -> dict[str, Tensor]:
        none = torch.full_like(positions, -torch.inf, dtype=torch.float32)
        return {**super().fresh(positions), "threshold": none}

    def join(self, entries: Entries) -> Joined:
        held = entries.columns["position"] >= 0
        ranked = protected(self.score.stored(entries.columns, entries.seen), self.protects(entries))
        most = int(entries.leaving.max())
        gone = ranked.argsort(dim=1, stable=True)[:, :most]
        real = torch.arange(most, device=gone.device) < entries.leaving[:, None]
        into = torch.arange(held.shape[1], device=held.device).expand_as(held)
        leaves = torch.zeros_like(held).scatter(1, gone, real)
        similar, nearest = self._nearest(entries.keys, gone, held & ~leaves)
        threshold = self._threshold(entries, similar, real, held)
        target = torch.where(similar >= threshold, nearest, -1)
        into = into.scatter(1, gone, torch.where(real, target, gone))
        weight = torch.full_like(ranked, math.e, dtype=torch.float32)
        weight = weight.scatter(1, gone, torch.where(real, similar, 1).exp())
        return Joined(into, weight, {"threshold": threshold.expand_as(weight)})

    def _nearest(self, keys: Tensor, gone: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
        """The cosine of entries ``gone`` ([R, m]) to their most similar one that stays, and its place, [R, m]."""
        directions = normalize(keys.float(), dim=-1)
        rows = directions.gather(1, gone[..., None].expand(-1, -1, keys.shape[2]))
        best = [
            (block @ directions.transpose(1, 2)).masked_fill_(~stays[:, None], -torch.inf).max(-1)
            for block in rows.split(ROW_BLOCK, 1)
        ]
        return torch.cat([b.values for b in best], 1), torch.cat([b.indices for b in best], 1)

    def _threshold(self, entries: Entries, similar: Tensor, real: Tensor, held: Tensor) -> Tensor:
        """The threshold of each head by now, [R, 1]; heads that lose nothing keep theirs."""
        old = entries.columns["threshold"].masked_fill(~held, -torch.inf).amax(1, keepdim=True)
        count = real.sum(1, keepdim=True)
        mean = torch.where(real, similar, 0).sum(1, keepdim=True) / count.clamp(min=1)
        now = torch.where(old == -torch.inf, mean, self.memory * old + (1 - self.memory) * mean)
        return torch.where(count > 0, now, old)


@dataclass(frozen=True)
class Runs(Merging):
    """Runs of consecutive entries with similar keys become one, at the entry of most attention.

    KVMerger (arXiv 2407.08454, section 3): of the pairs of neighbours the most similar (cosine) are joined, as many as
    entries have to leave; pairs of which one is protected come last. Protected are the newest and the share ``heavy``
    of a head's capacity with the highest scores. Of the members of a run the pivot is that of the highest score, and
    the others count exp(-d^2 / (2 ``sigma``^2)) in the mean, d being the distance of their keys to the pivot's.
    """

    heavy: float = 0.0
    sigma: float = 5.0

    def join(self, entries: Entries) -> Joined:
        position = entries.columns["position"]
        size, held = position.shape[1], position >= 0
        score = self.score.stored(entries.columns, entries.seen).masked_fill(~held, -torch.inf)
        order = position.long().masked_fill(~held, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        joins = self._joins(entries, score, held, order)
        # A run has a number, the same for all its members: how many runs have begun up to them.
        run = torch.empty_like(order).scatter(1, order, pad(~joins, (1, 0), value=True).cumsum(1) - 1)
        best = torch.full_like(score, -torch.inf).scatter_reduce(1, run, score, "amax")
        own = torch.arange(size, device=order.device).expand_as(order)
        places = torch.where(score == best.gather(1, run), own, size)
        pivot = torch.full_like(order, size).scatter_reduce(1, run, places, "amin").gather(1, run)
        pivots = entries.keys.gather(1, pivot[..., None].expand_as(entries.keys))
        distance = (entries.keys.float() - pivots.float()).square().sum(-1)
        return Joined(pivot, torch.exp(-distance / (2 * self.sigma**2)))

    def _joins(self, entries: Entries, score: Tensor, held: Tensor, order: Tensor) -> Tensor:
        """Which entries, in order, join the next one: bool [R, n - 1]."""
        protects = self.protects(entries)
        open_ = score.masked_fill(protects, -torch.inf)
        rank = open_.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        protects = protects | (rank < (entries.capacity[:, None] * self.heavy).long())
        directions = normalize(entries.keys.float(), dim=-1)
        directions = directions.gather(1, order[..., None].expand_as(directions))
        protects, held = protects.gather(1, order), held.gather(1, order)
        similar = (directions[:, 1:] * directions[:, :-1]).sum(-1) - 4.0 * (protects[:, 1:] | protects[:, :-1])
        similar = similar.masked_fill(~held[:, 1:], -torch.inf)
        best = similar.argsort(dim=1, descending=True, stable=True)
        within = torch.arange(best.shape[1], device=best.device) < entries.leaving[:, None]
        return torch.zeros_like(within).scatter(1, best, within)
