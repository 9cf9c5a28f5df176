"""Query heads vote for the entries that all of them read; positions close up over what is passed over.

TokenSelect (arXiv 2411.02886). Shapes as in ``base``; V voting groups: one where all heads of a layer hold the same
tokens, else the K KV heads, each with its own query heads.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, max_pool1d, pad

from ..attention import Part, attend
from ..memory import SideLayout
from ..spec import LayerSpec
from .base import Chosen, Layers, Reading, Selection, Selector, State

_LAST = 1 << 40  # sorts behind every position


@dataclass(frozen=True)
class Voting(Selection):
    """The first ``sinks`` tokens, the newest ``local`` ones, and of the others the ``count`` with the most votes.

    A query head's votes for the others are a softmax of its logits with them: keys without rotation, the query at
    position ``local``; with ``scaled`` divided by the
    root of the head size. They are max-pooled over ``pooling`` neighbours if that is not 0. In
    prompts the mean query of ``chunk`` queries votes. In decoding the choice stays as long as the cosine of the query
    with the one that made it is at least ``threshold``. Keys are kept before their rotation and rotated at their rank
    among what is read, and queries at the end of it.
    """

    sinks: int
    local: int
    count: int
    chunk: int
    threshold: float
    scaled: bool
    pooling: int = 0

    def sides(self, keys: SideLayout, values: SideLayout) -> tuple[SideLayout, SideLayout]:
        return replace(keys, before_rope=True), values

    def state(self, layer: LayerSpec, dtype: torch.dtype, alike: bool) -> State:
        voters = 1 if alike else layer.kv_heads
        return {
            "query": ((layer.query_heads, layer.key_size), dtype),
            "chosen": ((voters, self.count), torch.int32),
            "known": ((), torch.bool),
        }

    @property
    def reach(self) -> int:
        """So many entries are read at most."""
        return self.sinks + self.count + self.local

    def selector(self, layers: Layers) -> "VotingSelector":
        return VotingSelector(self, layers)

    def votes(self, query: Tensor, keys: Tensor, candidates: Tensor) -> Tensor:
        """Votes [B, V, n] of ``query`` [B, H, D] for ``candidates`` (bool [B, V, n]) among unrotated ``keys``."""
        grouped = _exact(query.unflatten(1, (keys.shape[1], -1)))
        logits = grouped @ _exact(keys).transpose(-1, -2)  # [B, K, G, n]
        if self.scaled:
            logits /= keys.shape[-1] ** 0.5
        paid = logits.masked_fill(~candidates[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0).sum(2)
        votes = (paid if candidates.shape[1] == paid.shape[1] else paid.sum(1, keepdim=True)).float()
        if not self.pooling:
            return votes
        before = (self.pooling - 1) // 2
        return max_pool1d(pad(votes, (before, self.pooling - 1 - before)), self.pooling, stride=1)

    def always(self, entries: Tensor, seen: Tensor) -> Tensor:
        """Which of ``entries`` (positions [B, V, n], -1: none) are read in any case, after ``seen`` ([B]) tokens."""
        return (entries >= 0) & ((entries < self.sinks) | (entries >= (seen - self.local)[:, None, None]))

    def choose(self, votes: Tensor, entries: Tensor, always: Tensor) -> tuple[Tensor, Tensor]:
        """Entries to read, by position: index int64 and validity bool, [B, V, m] each."""
        exists = entries >= 0
        held = exists.sum(-1)
        ranked = votes.masked_fill(~exists, -torch.inf).masked_fill(always, torch.inf)
        # Equal tokens have equal keys before their rotation, and pooled votes have plateaus: the oldest are taken.
        index = ranked.argsort(dim=-1, descending=True, stable=True)[..., : self.reach]
        room = torch.where(held > self.reach, always.sum(-1) + self.count, held)
        valid = torch.arange(index.shape[-1], device=index.device) < room[..., None]
        order = entries.gather(-1, index).masked_fill(~valid, _LAST).argsort(dim=-1, stable=True)
        return index.gather(-1, order), valid


class VotingSelector(Selector):
    """``Voting`` in the layers of a group."""

    def __init__(self, voting: Voting, layers: Layers):
        super().__init__(voting, layers)
        assert layers.rotary is not None
        self.voting, self.rotary = voting, layers.rotary

    def token(self, reading: Reading) -> Chosen | None:
        voting = self.voting
        if int(reading.store.lengths[reading.heads].max()) <= voting.reach:
            return None
        entries = self._voters(reading.entries())
        seen = reading.positions[:, 0] + 1
        query = self.rotary.undo(reading.query, reading.positions)
        summary = self.rotary.rotate(query, torch.full_like(reading.positions, voting.local))[:, :, 0]
        always = voting.always(entries, seen)
        votes = self._votes(reading, summary, entries, always)
        index, valid = voting.choose(votes, entries, always)
        self._remember(reading.place, index, valid & ~always.gather(-1, index))
        places, query_places = self._places(entries, index, valid, reading.positions)
        index, valid, places = (_per_head(x, reading.shape) for x in (index, valid, places))
        return Chosen(self._rotated(query, query_places), index, valid, places)

    def prompt(self, reading: Reading) -> Tensor | None:
        """Chunk by chunk of the new tokens; what padding says is left open."""
        held, new = reading.store.lengths[reading.heads].view(reading.shape), reading.positions
        if int(held.max()) + int((new >= 0).sum(1).max()) <= self.voting.reach:
            return None
        # Real tokens come first, so that chunks are the same alone or in a batch.
        order = new.masked_fill(new < 0, _LAST).argsort(dim=1, stable=True)
        new = new.gather(1, order)
        at = new.clamp(min=0)
        query, keys, values = (_ordered(x, order) for x in (reading.query, reading.keys, reading.values))
        query, keys = self.rotary.undo(query, at), self.rotary.undo(keys, at)
        entries = new[:, None].expand(-1, reading.shape[1], -1)
        before = int(held.max())
        if before:
            old = [x.unflatten(0, reading.shape) for x in reading.store.read(reading.heads)]
            keys, values = torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2)
            entries = torch.cat([reading.entries(), entries], 2)
        outputs = []
        for first in range(0, new.shape[1], self.voting.chunk):
            last = min(first + self.voting.chunk, new.shape[1])
            seen = (x[:, :, : before + last] for x in (keys, values, entries))
            outputs.append(self._attend(query[:, :, first:last], new[:, first:last], reading, *seen))
        out = torch.cat(outputs, 2)
        return _ordered(out, order.argsort(1))

    def moved(self) -> None:
        self.state["known"].zero_()

    def stored(self, reading: Reading) -> None:
        self.state["known"][reading.place] = False

    def _attend(
        self, query: Tensor, positions: Tensor, reading: Reading, keys: Tensor, values: Tensor, entries: Tensor
    ) -> Tensor:
        """One chunk of a prompt's queries (unrotated, at ``positions`` [B, c]) over entries up to its own end."""
        voting, real = self.voting, positions >= 0
        voters = self._voters(entries)
        always = voting.always(voters, positions.amax(1) + 1)
        ahead = voting.local + torch.arange(positions.shape[1], device=positions.device)
        rotated = _exact(self.rotary.rotate(query, ahead)) * real[:, None, :, None]
        summary = rotated.sum(2) / real.sum(1).clamp(min=1)[:, None, None]
        votes = voting.votes(summary, keys, (voters >= 0) & ~always)
        index, valid = voting.choose(votes, voters, always)
        places, query_places = self._places(voters, index, valid, positions)
        heads = reading.shape
        at, rows = _per_head(index, heads), _per_head(places, heads)
        keys, values = (_picked(x.flatten(0, 1), at) for x in (keys, values))
        keys = self.rotary.rotate(keys[:, None], rows)[:, 0]
        read = voters.gather(-1, index)[:, :, None] <= positions[:, None, :, None]
        mask = (read & valid[:, :, None]).expand(-1, heads[1], -1, -1)
        part = Part(keys.unflatten(0, heads), values.unflatten(0, heads), mask)
        return attend(self._rotated(query, query_places), [part], reading.variant)

    def _voters(self, entries: Tensor) -> Tensor:
        """[B, K, n] -> [B, V, n]."""
        return entries[:, :1] if self.layers.alike else entries

    def _votes(self, reading: Reading, summary: Tensor, entries: Tensor, always: Tensor) -> Tensor:
        """Of a decoding step; where the query is much like the one that chose last, for what that one chose."""
        state = {name: tensor[reading.place] for name, tensor in self.state.items()}
        alike = cosine_similarity(_exact(summary.flatten(1)), _exact(state["query"].flatten(1)), dim=1)
        stays = state["known"] & (alike >= self.voting.threshold)
        chosen = state["chosen"].long().clamp(max=entries.shape[-1] - 1)
        again = torch.zeros(entries.shape, device=entries.device).scatter_(-1, chosen, 1.0)
        if bool(stays.all()):
            return again
        keys = reading.store.read_keys(reading.heads).unflatten(0, reading.shape)
        votes = self.voting.votes(summary, keys, (entries >= 0) & ~always)
        changed = ~stays[:, None, None]
        self.state["query"][reading.place] = torch.where(changed, summary.to(state["query"].dtype), state["query"])
        return torch.where(changed, votes, again)

    def _remember(self, place: int, index: Tensor, voted: Tensor) -> None:
        """What was voted for of ``index``, where as many were as can be."""
        count = self.voting.count
        first = (~voted).byte().argsort(dim=-1, stable=True)[..., :count]
        self.state["chosen"][place] = index.gather(-1, first).int()
        self.state["known"][place] = (voted.sum(-1) == count).all(-1)

    def _places(self, entries: Tensor, index: Tensor, valid: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where chosen entries ([B, V, m]) and queries ([B, V, q]) are rotated: at their ranks where something is
        passed over, else at their own positions."""
        passed = ((entries >= 0).sum(-1) > valid.sum(-1))[..., None]
        rank = torch.arange(index.shape[-1], device=index.device).expand_as(index)
        places = torch.where(passed, rank, entries.gather(-1, index).clamp(min=0))
        real = positions >= 0
        behind = real.sum(1, keepdim=True) - real.cumsum(1)  # real tokens that follow a query in the chunk
        at = valid.sum(-1)[..., None] - 1 - behind[:, None]
        return places, torch.where(passed, at, positions[:, None]).clamp(min=0)

    def _rotated(self, query: Tensor, places: Tensor) -> Tensor:
        """[B, H, q, D] at ``places`` ([B, V, q])."""
        voters = places.shape[1]
        grouped = query.unflatten(1, (voters, -1)).flatten(0, 1)
        return self.rotary.rotate(grouped, places.flatten(0, 1)).unflatten(0, (-1, voters)).flatten(1, 2)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_head(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, V, m] -> [R, m]."""
    return x.expand(-1, shape[1], -1).flatten(0, 1)


def _picked(rows: Tensor, index: Tensor) -> Tensor:
    """[R, n, D] at [R, m] -> [R, m, D]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """[B, heads, q, D] in another order ([B, q]) of tokens."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
