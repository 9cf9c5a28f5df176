"""Layers that keep their entries alike: one store, and what happens to it in a decoding step.

Shapes: B sequences, H query heads, K KV heads, n entries, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import Paid, Variant, attend, attend_observed
from ..attention.kernels import append, decode, reads, rotated
from ..attention.newest import Projected
from ..attention.updates import Update, Updates
from ..memory import Segment, sent
from ..reduction import Eviction, Merging
from ..scoring import Observation, ObservingScore
from .prompts import PromptedLayers
from .step import Fresh, Step

_ENTRIES = 2**24  # of which columns are read at once


class LayerGroup(PromptedLayers):
    """The entries of some layers with equal ``LayerSpec``: what a cache asks for in every pass."""

    _decoded: Tensor  # tokens of each sequence since its last prompt, int64 [B] on the device, in a decoding step
    _even: list[bool]  # of each layer, in a decoding step: whether its heads hold equally many entries

    @property
    def observing(self) -> list[ObservingScore]:
        """Those of ``observers`` that the query of the decoding step under way is shown to."""
        return self.observers

    @property
    def updates(self) -> tuple[Update, ...]:
        """What kernels do to columns in the decoding step under way in place of ``observing``; none where they do not
        know all."""
        known = tuple(update for observer in self.observing if (update := observer.update))
        return known if len(known) == len(self.observing) else ()

    @property
    def shows(self) -> bool:
        """Whether the query of the decoding step under way is shown to observers, and no kernel stands for them."""
        return bool(self.observing) and not self.updates

    @property
    def captures(self) -> bool:
        """Whether decoding steps that have the same ``updates`` are the same kernels over the same buffers, whatever
        heads hold."""
        known = self.reads_pages and type(self).token is LayerGroup.token
        plain = all(observer.update for observer in self.observers) and self.selector is None
        queries = self.layer.query_heads // (self.layer.kv_heads * self._together)
        return known and plain and reads(self.store, queries, self._together, self.rotary)

    def empty(self, batch: int) -> "LayerGroup":
        """A group like this one for ``batch`` sequences, without entries."""
        return LayerGroup(self.numbers, self.layer, self.store.layout, self.eviction, self.arena, batch, self.rotary)

    def selected(self, sequences: Tensor) -> "LayerGroup":
        """A group of sequences ``sequences`` (int64 [B'], host; may repeat) of this one, sharing their pages."""
        group = self.empty(sequences.numel())
        group.store.share(group.everyone, self.store, self.heads_of(sequences))
        group.capacity, group.prompted = self.capacity[:, sequences], self.prompted[sequences]
        group.selector = self.selector.selected(sequences) if self.selector else None
        return group

    def join(self, other: "LayerGroup") -> None:
        """Takes over the sequences of ``other``, which is left without any; nothing is copied."""
        first, batch = self.batch, self.batch + other.batch
        if batch > self.slots:
            self.reserve(max(batch, 2 * self.slots))
        self.store.adopt(self.heads_of(torch.arange(first, batch)), other.store, other.everyone)
        self.batch = batch
        self._capacity[:, first:batch] = other.capacity
        self.prompted = torch.cat([self.prompted, other.prompted])
        if self.selector and other.selector:
            self.selector = self.selector.joined(other.selector)
        other.batch, other.prompted = 0, other.prompted[:0]

    def leave(self, sequence: int) -> "LayerGroup":
        """Takes ``sequence`` out into a group of its own; the last one takes its slot."""
        alone, slot, last = self.empty(1), torch.tensor([sequence]), self.batch - 1
        alone.store.adopt(alone.everyone, self.store, self.heads_of(slot))
        alone.capacity, alone.prompted = self.capacity[:, slot], self.prompted[slot]
        if self.selector:
            others = torch.arange(last)
            others[sequence:][:1] = last
            alone.selector, self.selector = self.selector.selected(slot), self.selector.selected(others)
        if sequence < last:
            self.store.adopt(self.heads_of(slot), self.store, self.heads_of(torch.tensor([last])))
            self._capacity[:, sequence] = self._capacity[:, last]
            self.prompted[sequence] = self.prompted[last]
        self.batch, self.prompted = last, self.prompted[:last]
        return alone

    # -- decoding -----------------------------------------------------------------------------------------------

    def pages_to_open(self) -> list[tuple[Segment, int]]:
        """The most pages that ``begin_token`` takes, of each segment."""
        needed = self.store.pages_to_open(self.everyone)
        return [*needed, *self.store.pages_to_own_columns(self.everyone)] if self.observers else needed

    def begin_token(self, step: Step) -> None:
        """Before the first layer: makes room for one token in every head."""
        columns, heads = {}, self.everyone
        if self.rotary:
            self.rotary.reserve(int(step.after.max()))
        if self.eviction is not None or self.observers or self.rotary:
            before = sent(step.before, self.arena.device)
            positions = before.repeat_interleave(self.layer.kv_heads).repeat(self.layers)
            columns["position"] = positions.int()
            columns |= self._unread(positions)
            columns |= {name: column[:, 0] for name, column in self._noted(heads, step).items()}
        if self.observers:
            self.store.own_columns(heads)
        self.store.open_token(columns, heads)
        self._note_token(step)

    def retract_token(self) -> None:
        """Takes back what ``begin_token`` did."""
        self.store.retract_token(self.everyone)

    def replace_token(self, step: Step) -> None:
        """After sequences have left since ``begin_token``: where the others' entries lie now."""
        self.store.moved_token()
        self._note_token(step)

    def _note_token(self, step: Step) -> None:
        self._decoded = sent(step.after - self.prompted, self.arena.device)
        lengths = self.store.lengths.view(self.layers, self.slots, -1)[:, : self.batch].flatten(1)
        self._even = (lengths == lengths[:, :1]).all(1).tolist()

    def token(self, number: int, fresh: Fresh) -> Tensor:
        """Stores one new token a sequence and attends it to all that is stored."""
        heads = self.heads(number)
        keys, values = self._rows(heads, fresh)
        self.store.put_token(heads, keys.flatten(0, 2), values.flatten(0, 2))
        chosen = self.selector.token(self._reading(number, fresh)) if self.selector else None
        attended = self._attended(heads, fresh) if chosen is None else None
        if attended is not None:
            out, paid = attended
            if paid is not None:
                self._observe(number, paid, fresh.step)
            return out
        if chosen is None:
            mask = None if self._even[self._place[number]] else self._held(heads)[:, :, None]
            query, parts = fresh.query, [self._part(heads, mask)]
        else:
            query, parts = chosen.query, [self._chosen_part(heads, chosen)]
        if not self.observing:
            return attend(query, parts, fresh.variant)
        out, paid = attend_observed(query, parts, fresh.variant)
        if chosen is not None:
            paid = paid.among(chosen.index, int(self.store.lengths[heads].max()))
        self._observe(number, paid, fresh.step)
        return out

    def append(
        self, number: int, token: Projected, positions: Tensor, variant: Variant, query: Tensor | None = None
    ) -> Tensor:
        """As ``token`` where ``captures``, with places that the device finds, so that it can be captured. ``positions``
        are int64 [B, 1] on the device. ``query`` [B, H, 1, D]: where the queries are rotated already."""
        heads = self.heads(number)
        if not self._as_read:
            token, query = self._as_stored(heads, token, positions, variant, query)
        turned = append(token, self.store, heads)
        query = turned if query is None else query
        updates = self._updates(positions)
        attended = decode(query, self.store, heads, variant, self._counted, updates=updates, rotary=self.rotary)
        assert attended is not None
        return attended[0]

    def _as_stored(
        self, heads: slice, token: Projected, positions: Tensor, variant: Variant, query: Tensor | None
    ) -> tuple[Projected, Tensor]:
        """``token`` as rows of the store, where these are not what the model projects, and the rotated queries."""
        turned, keys, values = rotated(token, self.layer.key_size // self._together)
        query = turned if query is None else query
        nothing = torch.zeros(0, dtype=torch.int64)
        step = Step(positions, nothing, nothing, padded=False)
        keys, values = self._rows(heads, Fresh(query, keys, values, step, variant))
        return Projected(torch.cat([keys.flatten(1), values.flatten(1)], 1), 0, keys.shape[1]), query

    def _attended(self, heads: slice, fresh: Fresh) -> tuple[Tensor, Paid | None] | None:
        """Attention of a token to all that a layer stores, and what observers need of it, by the kernels; None where
        they do not serve."""
        if not self.reads_pages:
            return None
        updates = self._updates(fresh.step.positions)
        return decode(fresh.query, self.store, heads, fresh.variant, self._counted, self.shows, updates, self.rotary)

    def _updates(self, positions: Tensor) -> Updates | None:
        return Updates(self.updates, positions) if self.updates else None

    def _observe(self, number: int, paid: Paid, step: Step) -> None:
        """Brings the columns of a layer up to date with a decoding step's attention."""
        heads = self.heads(number)
        observation = Observation(paid, step.positions, self._decoded, number)
        before = self._columns(heads)
        columns = {n: c for observer in self.observing for n, c in observer.observe(observation, before).items()}
        self.store.set_columns(heads, {name: column.flatten(0, 1) for name, column in columns.items()})

    def end_token(self, step: Step) -> None:
        """After the last layer: encodes what is ripe, evicts what is over the capacity."""
        self.arena.note_peak()
        self.store.settle(self.everyone)
        self._finish()
        if self.eviction is not None and self.eviction.decode:
            self._evict(self.eviction, step)
        elif self.layer.window is not None:
            heads = self.everyone
            excess = (self.store.lengths[heads] - (self.layer.window - 1)).clamp(min=0)
            if bool(excess.any()):
                self.store.pop_front(heads, excess)

    @property
    def _full(self) -> Tensor:
        """Heads that hold more than they may, bool [heads]."""
        return self.store.lengths > self._capacity.flatten()

    @property
    def _deciding(self) -> Tensor:
        """Heads whose entries are chosen among at the end of the decoding step under way, bool [heads]."""
        return self._full if self.eviction and self.eviction.decode else torch.zeros_like(self._full)

    def _finish(self) -> None:
        """Brings columns up to date that decide now what becomes of the entries beside them."""
        unfinished = [observer for observer in self.observers if observer.finishes]
        heads = torch.nonzero(self._deciding).flatten() if unfinished else torch.zeros(0, dtype=torch.int64)
        for some in self._in_turns(heads):
            before = self._read_columns(some)
            self.store.set_columns(some, {n: c for each in unfinished for n, c in each.finished(before).items()})

    def _evict(self, eviction: Eviction, step: Step) -> None:
        capacity = self._capacity.flatten()
        heads = torch.nonzero(self._full).flatten()
        if not heads.numel():
            return
        if self.selector:
            self.selector.moved()
        if isinstance(eviction, Merging):
            self._merge(eviction, heads, step.after, eviction.leaving(capacity[heads]))
            return
        for some in self._in_turns(heads):
            self._drop_worst(eviction, some, step.after)

    def _drop_worst(self, eviction: Eviction, heads: Tensor, after: Tensor) -> None:
        """Drops what leaves full ``heads`` (int64 [R]) after so many tokens (int64 [B]). How many that are is known on
        the host, which does not wait for the device to tell which."""
        capacity, device = self._capacity.flatten(), self.arena.device
        leaving = eviction.leaving(capacity[heads])
        state = torch.stack([self.store.lengths, self._per_head(after), capacity])[:, heads]
        lengths, seen, allowed = sent(state, device)
        victims = eviction.victims(self._read_columns(heads), lengths, seen, allowed, int(leaving.max()))
        self.store.drop(heads, victims, leaving)

    def _in_turns(self, heads: Tensor) -> Sequence[Tensor]:
        """Heads (int64 [R]) of which columns are read at once."""
        return heads.split(max(_ENTRIES // int(self.store.lengths[heads].max()), 1)) if heads.numel() else ()

    def _read_columns(self, heads: Tensor) -> dict[str, Tensor]:
        """The columns of heads (int64 [R]), [R, n, …] each; positions are -1 beyond a head's length."""
        columns = self.store.read_columns(heads)
        return columns | {"position": columns["position"].masked_fill(~self._within(heads), -1)}
