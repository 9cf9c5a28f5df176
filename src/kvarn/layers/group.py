"""Layers that keep their entries alike: one store, and what happens to it in a prompt and in a decoding step.

Shapes: B sequences, H query heads, K KV heads, q new tokens, n entries, D head size. Heads of the store are numbered
(layer, slot, KV head). The sequences fill the first slots, so that a layer is a slice; free slots let others join.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..attention import Paid, Part, Variant, attend, attend_observed
from ..attention.kernels import Projected, append, decode, prompt, prompt_decoded, reads, rotated, serves_prompts
from ..attention.rotary import Rotary
from ..attention.updates import Update, Updates
from ..memory import Arena, Layout, Segment, Store, StoreLayout, TieredLayout, TieredStore, sent
from ..plan import Plan
from ..prefill import Propagation
from ..reduction import Entries, Eviction, Merging
from ..scoring import Observation, ObservingScore, PromptView
from ..selection import Chosen, Layers, Reading, Selection, Selector
from ..spec import LayerSpec
from .step import Fresh, Step

_ENTRIES = 2**24  # of which columns are read at once


class LayerGroup:
    """The entries of some layers with equal ``LayerSpec``, for ``batch`` sequences in as many ``slots`` or more."""

    def __init__(
        self,
        numbers: list[int],
        layer: LayerSpec,
        layout: Layout,
        eviction: Eviction | None,
        arena: Arena,
        batch: int,
        rotary: Rotary | None = None,
    ):
        self.numbers, self.layer, self.eviction, self.arena = numbers, layer, eviction, arena
        self.batch = self.slots = batch
        self.rotary = rotary if layout.before_rope else None
        self.layers = len(numbers) // layer.depth  # of the store
        self.store = _store(layout, arena, self.layers * self.stride, numbers)
        self._capacity = torch.zeros((self.layers, batch, layer.kv_heads), dtype=torch.int64)  # of each slot
        self.prompted = torch.zeros(batch, dtype=torch.int64)  # tokens of each sequence up to its last prompt's end
        self._decoded: Tensor  # tokens of each sequence since then, int64 [B] on the device, in a decoding step
        self.divide: Callable[[int, PromptView], None] | None = None  # of the prompt under way: see ``share``
        self.selector: Selector | None = None  # where queries read only some of what is stored
        self._place = {number: place // layer.depth for place, number in enumerate(numbers)}
        self._even = [False] * self.layers  # whether the heads of a layer hold equally many entries

    @property
    def state_bytes(self) -> int:
        """Bytes kept for the layers themselves, whatever the tokens."""
        shared = len(self.numbers) * self.store.layout.shared_bytes
        return shared + (self.selector.state_bytes if self.selector else 0)

    @property
    def observers(self) -> list[ObservingScore]:
        """What observes attention, each once."""
        return [self.eviction.observes] if self.eviction and self.eviction.observes else []

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
    def _counted(self) -> bool:
        """Whether entries may stand for several."""
        return self.eviction is not None and "count" in self.eviction.columns

    @property
    def _together(self) -> int:
        """KV heads of a layer that are one head of the store."""
        return 1

    @property
    def rows(self) -> int:
        """Heads of one layer."""
        return self.batch * self.layer.kv_heads

    @property
    def stride(self) -> int:
        """Heads of the store from one layer to the next."""
        return self.slots * self.layer.kv_heads

    @property
    def capacity(self) -> Tensor:
        """Entries that each head may hold, where the recipe evicts: int64 [layers, B, K]."""
        return self._capacity[:, : self.batch]

    @capacity.setter
    def capacity(self, capacity: Tensor) -> None:
        self._capacity[:, : self.batch] = capacity

    @property
    def everyone(self) -> slice | Tensor:
        """The store's heads of all layers and sequences."""
        if self.batch == self.slots:
            return slice(0, self.layers * self.stride)
        return self.heads_of(torch.arange(self.batch))

    def heads(self, number: int) -> slice:
        """The store's heads of layer ``number``."""
        first = self._place[number] * self.stride
        return slice(first, first + self.rows)

    def heads_of(self, slots: Tensor) -> Tensor:
        """The store's heads of ``slots`` (int64 [n], may repeat) in all layers, in the order of the store's."""
        within = slots[:, None] * self.layer.kv_heads + torch.arange(self.layer.kv_heads)
        return (torch.arange(self.layers)[:, None] * self.stride + within.flatten()).flatten()

    def entries(self) -> Tensor:
        """Entries of each head, int64 [layers, B, K]."""
        held = self.store.lengths.view(self.layers, self.slots, -1)[:, : self.batch]
        return held.repeat_interleave(self.layer.depth, 0)

    def select(self, selection: Selection, alike: bool, dtype: torch.dtype) -> None:
        """Has queries read what ``selection`` chooses. ``alike``: the heads of a layer always hold the same tokens in
        the same order."""
        count, device = len(self.numbers), self.arena.device
        self.selector = selection.selector(Layers(self.layer, count, self.batch, alike, dtype, device, self.rotary))

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

    # -- sequences that come and go -----------------------------------------------------------------------------

    def reserve(self, slots: int) -> None:
        """Makes room for ``slots`` sequences."""
        if slots <= self.slots:
            return
        before, store, heads = self.slots, self.store, self.heads_of(torch.arange(self.batch))
        self.slots = slots
        self.store = _store(store.layout, self.arena, self.layers * self.stride, self.numbers)
        self.store.adopt(self.everyone, store, heads)
        self._capacity = torch.nn.functional.pad(self._capacity, (0, 0, 0, slots - before))

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

    # -- prompts ------------------------------------------------------------------------------------------------

    def prompt(self, number: int, fresh: Fresh) -> Tensor:
        """Attends new tokens to what is stored and to themselves, exactly, then stores what the recipe keeps."""
        heads = self.heads(number)
        past = bool(self.store.lengths[heads].any())
        # A text that scores is to see everything.
        selects = self.selector is not None and fresh.step.following is None
        out = self.selector.prompt(self._reading(number, fresh)) if self.selector and selects else None
        if out is None and past:
            out = self._over_pages(heads, fresh)
        stored = self._candidates(heads) if past and out is not None and self._weighs(number, fresh.step) else None
        if out is None:
            stored = self._part(heads, None) if past else None
            out = self._over_decoded(heads, stored, fresh) if stored else None
        if out is None:
            out = attend(fresh.query, self._exact_parts(heads, stored, fresh), fresh.variant)
        self.prompted = fresh.step.after
        decoded = [stored.keys, stored.values] if stored else []
        with self.arena.holding(fresh.keys, fresh.values, *decoded):
            asking, fresh = fresh.query, fresh.without_following()
            self._store_prompt(number, stored, fresh, asking[:, :, fresh.keys.shape[2] :])
            if self.selector:
                self.selector.stored(self._reading(number, fresh))
        if not past and self._place[number] == 0:
            self.store.reserve_like(heads, self.layers - 1)
        return out

    def chosen(self, number: int, fresh: Fresh, propagation: Propagation) -> Tensor:
        """The tokens of a first prompt that go on beyond layer ``number``, bool [B, q]."""
        return propagation.chosen(self._view(self.heads(number), None, fresh), fresh.step.counts)

    def end_prompt(self) -> None:
        """After the last layer."""
        if self.divide is not None:
            self.divide = None
            self.arena.note_peak()
            self.store.wait(False)
            self.store.settle(self.everyone)
        self.store.note_spans()

    def share(self, divide: Callable[[int, PromptView], None]) -> None:
        """Before a prompt whose layers share the budget by what they show: ``divide`` is told a layer and its view
        before what the layer keeps is decided, and may shrink others. Until the prompt's end all is kept dense, so that
        what is cut or merged several times is encoded once."""
        self.divide = divide
        self.store.wait(True)

    def allow(self, plan: Plan) -> None:
        """Takes on what ``plan`` allows each head."""
        self.capacity = plan.capacity[self.numbers[:: self.layer.depth]]

    def shrink(self, plan: Plan, before: int, after: Tensor) -> None:
        """Takes on another ``plan`` in the middle of a prompt up to ``after`` (int64 [B]) tokens; the layers before
        ``before``, which have stored it, are cut to that."""
        self.allow(plan)
        capacity = self._capacity.flatten()
        heads = torch.nonzero(self._before(before) & (self.store.lengths > capacity)).flatten()
        if self.eviction is None or not heads.numel():
            return
        if isinstance(self.eviction, Merging):
            self._merge(self.eviction, heads, after, (self.store.lengths - capacity)[heads])
            return
        counts, device = capacity[heads], self.arena.device
        state = sent(torch.stack([self.store.lengths[heads], self._per_head(after)[heads], counts]), device)
        self.store.keep(heads, self.eviction.best(self.store.read_columns(heads), *state), counts)

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

    def _in_turns(self, heads: Tensor) -> Sequence[Tensor]:
        """Heads (int64 [R]) of which columns are read at once."""
        return heads.split(max(_ENTRIES // int(self.store.lengths[heads].max()), 1)) if heads.numel() else ()

    def _read_columns(self, heads: Tensor) -> dict[str, Tensor]:
        """The columns of heads (int64 [R]), [R, n, …] each; positions are -1 beyond a head's length."""
        columns = self.store.read_columns(heads)
        return columns | {"position": columns["position"].masked_fill(~self._within(heads), -1)}

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

    def _merge(self, merging: Merging, heads: Tensor, after: Tensor, leaving: Tensor) -> None:
        """Merges away ``leaving`` (int64 [R], above 0) entries of each of ``heads``, layer by layer; ``after`` (int64
        [B]) tokens have been seen."""
        seen, capacity = self._per_head(after)[heads], self._capacity.flatten()[heads]
        sizes = torch.bincount(heads // self.stride).tolist()
        for layer in zip(*(each.split(sizes) for each in (heads, seen, capacity, leaving)), strict=True):
            if layer[0].numel():
                self._merge_layer(merging, *layer)

    def _merge_layer(self, merging: Merging, heads: Tensor, seen: Tensor, capacity: Tensor, leaving: Tensor) -> None:
        store = self.store
        columns, (keys, values) = store.read_columns(heads), self._read(heads)
        self.arena.note_peak(keys.nbytes + values.nbytes)
        held = self._within(heads)
        columns["position"] = columns["position"].masked_fill(~held, -1)
        state = (sent(each, keys.device) for each in (seen[:, None], capacity, leaving))
        joined = merging.join(Entries(keys, columns, *state))
        self._overwrite(heads, joined.changed, joined.merged(keys), joined.merged(values))
        store.set_columns(heads, joined.columns)
        gone = (joined.stays | ~held).byte().argsort(dim=1, stable=True)[:, : int(leaving.max())]
        store.drop(heads, gone, leaving)

    def _observe(self, number: int, paid: Paid, step: Step) -> None:
        """Brings the columns of a layer up to date with a decoding step's attention."""
        heads = self.heads(number)
        observation = Observation(paid, step.positions, self._decoded, number)
        before = self._columns(heads)
        columns = {n: c for observer in self.observing for n, c in observer.observe(observation, before).items()}
        self.store.set_columns(heads, {name: column.flatten(0, 1) for name, column in columns.items()})

    # -- inside -------------------------------------------------------------------------------------------------

    def _store_prompt(self, number: int, stored: Part | None, fresh: Fresh, following: Tensor) -> None:
        """Keeps what the recipe keeps of a layer's new tokens and of what is ``stored``; ``following``: the queries of
        the text that scores, [B, H, p, D]."""
        if self.eviction is not None or self.observers:
            self._store_best(number, stored, fresh, following)
        elif self.layer.window is not None:
            self._store_window(self.layer.window, self.heads(number), fresh)
        else:
            self._append_all(self.heads(number), fresh)

    def _fits(self, number: int, step: Step) -> bool:
        """Whether a layer may keep everything."""
        held = self.store.lengths[self.heads(number)].view(self.batch, -1)
        capacity = self.capacity[self._place[number]]
        return self.eviction is None or self.eviction.fits(held + step.counts[:, None], capacity)

    def _weighs(self, number: int, step: Step) -> bool:
        """Whether a layer looks at all its candidates at the end of a prompt."""
        return bool(self.observers) or not self._fits(number, step)

    def _store_best(self, number: int, stored: Part | None, fresh: Fresh, following: Tensor) -> None:
        """Keeps the best of what is stored and what is new, by the recipe's score, and what was observed of it."""
        heads, step = self.heads(number), fresh.step
        capacity = self.capacity[self._place[number]]
        if not self._weighs(number, step):
            self._append_all(heads, fresh)
            return
        view = self._view(heads, stored, fresh)
        for observer in self.observers:
            view = observer.after_prompt(view, number)
        if self.divide is not None:
            self.divide(number, view)
            capacity = self.capacity[self._place[number]]
        old = 0 if stored is None else stored.keys.shape[2]
        keep, columns = view.valid, dict(view.columns)
        counts: Tensor | None = step.counts[:, None]
        if self.eviction is not None:
            counts = None if self.eviction.across_heads else torch.minimum(capacity, step.counts[:, None])
            if isinstance(self.eviction, Merging):
                keep, columns, fresh = self._merged(self.eviction, heads, view, fresh, old, capacity)
            elif not self._fits(number, step):
                asked = view if step.following is None else view.asked_by(following, step.following)
                keep = self.eviction.keep(asked, capacity, self._scores(self.eviction, asked))
        del columns["position"]
        if stored is not None:
            if columns:
                self.store.set_columns(heads, {name: c[:, :, :old].flatten(0, 1) for name, c in columns.items()})
            self.store.keep(heads, keep[..., :old].flatten(0, 1))
        if stored is not None or counts is None:
            counts = keep[..., old:].sum(-1).cpu()
        self._append(heads, fresh, keep[..., old:], counts, {name: c[:, :, old:] for name, c in columns.items()})

    def _scores(self, eviction: Eviction, view: PromptView) -> Tensor:
        """What a prompt's candidates are worth, [B, K, n]."""
        return eviction.score.prompt(view)

    def _merged(
        self, merging: Merging, heads: slice, view: PromptView, fresh: Fresh, old: int, capacity: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Fresh]:
        """Merges a prompt's candidates, ``old`` of which are stored: which stay (bool [B, K, n]), their columns, and
        the new ones as they become. Stored ones are overwritten in place."""
        keys, values = (
            torch.cat([getattr(part, side) for part in view.parts], 2).flatten(0, 1) for side in ("keys", "values")
        )
        columns = {name: column.flatten(0, 1) for name, column in view.columns.items()}
        seen = view.seen.repeat_interleave(self.layer.kv_heads)[:, None]
        room = sent(capacity.flatten(), keys.device)
        leaving = (view.valid.flatten(0, 1).sum(1) - room).clamp(min=0)
        joined = merging.join(Entries(keys, columns, seen, room, leaving))
        self.arena.note_peak(2 * (keys.nbytes + values.nbytes))
        keys, values = joined.merged(keys), joined.merged(values)
        if old:
            self._overwrite(heads, joined.changed[:, :old], keys[:, :old], values[:, :old])
        shape = (self.batch, -1)
        columns |= joined.columns
        fresh = replace(fresh, keys=keys[:, old:].unflatten(0, shape), values=values[:, old:].unflatten(0, shape))
        keep = joined.stays.unflatten(0, shape) & view.valid
        return keep, {name: column.unflatten(0, shape) for name, column in columns.items()}, fresh

    def _unread(self, positions: Tensor, prompt: Step | None = None) -> dict[str, Tensor]:
        """The columns of new entries at ``positions``, but for these, before a query has read them."""
        columns = self.eviction.fresh(positions) if self.eviction else {}
        for observer in self.observers:
            first = positions
            if prompt is not None:
                most = prompt.counts if observer.of_prompt is None else prompt.counts.clamp(max=observer.of_prompt)
                first = sent(prompt.after - most, positions.device)[:, None, None]
            columns |= observer.fresh(positions, first)
        return columns

    def _view(self, heads: slice, stored: Part | None, fresh: Fresh) -> PromptView:
        """What a score sees; columns are those before the prompt's queries."""
        step = fresh.step
        positions = step.positions[:, None].expand(-1, self.layer.kv_heads, -1)
        noted = {name: column.unflatten(0, positions.shape[:2]) for name, column in self._noted(heads, step).items()}
        columns = {"position": positions, **self._unread(positions, step), **noted}
        if stored is not None:
            before = self._columns(heads)
            columns = {name: torch.cat([before[name], column], 2) for name, column in columns.items()}

        def masked_parts(query_positions: Tensor) -> tuple[Part, ...]:
            new = Part(fresh.keys, fresh.values, self._visible(query_positions, step.positions[:, None]))
            if stored is None:
                return (new,)
            held = self._held(heads)[:, :, None] & (query_positions >= 0)[:, None, :, None]
            return (replace(stored, mask=held), new)

        if step.padded:
            parts = masked_parts(step.positions)
        else:
            # Masks of a row for each query would take more than all that is held.
            old = () if stored is None else (replace(stored, mask=self._held(heads)[:, :, None]),)
            parts = (*old, Part(fresh.keys, fresh.values, causal=True))
        seen = sent(step.after, fresh.query.device)
        positions = columns["position"]
        return PromptView(fresh.query, step.positions, parts, fresh.variant, positions, seen, columns, masked_parts)

    def _columns(self, heads: slice) -> dict[str, Tensor]:
        """The columns of a layer, [B, K, n, …] each; positions are int64, -1 beyond a head's length."""
        columns = {n: c.unflatten(0, (self.batch, -1)) for n, c in self.store.read_columns(heads).items()}
        position = columns["position"].long()
        lengths = self.store.lengths[heads]
        if not bool((lengths == lengths[0]).all()):
            position = position.masked_fill(~self._held(heads), -1)
        return columns | {"position": position}

    def _exact_parts(self, heads: slice, stored: Part | None, fresh: Fresh) -> list[Part]:
        """What the new tokens may read: stored entries, and new ones up to themselves."""
        window, step = self.layer.window, fresh.step
        positions = step.attending
        if step.padded or (window is not None and int(step.before.max()) + positions.shape[1] >= window):
            new = Part(fresh.keys, fresh.values, self._visible(positions, positions[:, None]))
        else:
            new = Part(fresh.keys, fresh.values, causal=True)
        if stored is None:
            return [new]
        lengths = self.store.lengths[heads]
        mask = None
        if window is not None:
            # Layers with a sliding window hold their newest tokens in order, so positions follow from the lengths.
            place = torch.arange(stored.keys.shape[2]) - lengths.view(self.batch, -1)[:, :1] + step.before[:, None]
            mask = self._visible(positions, place[:, None].to(positions.device))
            mask = mask & self._held(heads)[:, :, None]
        elif not bool((lengths == lengths[0]).all()):
            mask = self._held(heads)[:, :, None].expand(-1, -1, fresh.keys.shape[2], -1)
        return [replace(stored, mask=mask), new]

    def _visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """What queries at [B, q] may read of keys at [B, K or 1, n]: bool [B, K or 1, q, n]; -1 is padding."""
        queries, keys = query_positions[:, None, :, None], key_positions[:, :, None]
        visible = (keys <= queries) & (keys >= 0)
        return visible if self.layer.window is None else visible & (keys > queries - self.layer.window)

    def _store_window(self, window: int, heads: slice, fresh: Fresh) -> None:
        """Keeps the newest tokens that the next query of a sliding-window layer can still read."""
        kept, step = window - 1, fresh.step
        held = self.store.lengths[heads].view(self.batch, -1)
        self.store.pop_front(heads, (held + step.counts[:, None] - kept).clamp(min=0).minimum(held).flatten())
        newest = step.positions >= (step.after - kept).clamp(min=0)[:, None].to(step.positions.device)
        self._append(heads, fresh, newest[:, None], step.counts.clamp(max=kept)[:, None])

    def _append_all(self, heads: slice, fresh: Fresh) -> None:
        positions = fresh.step.positions[:, None]
        columns = {}
        if self.eviction is not None:
            each = positions.expand(-1, self.layer.kv_heads, -1)
            columns = self.eviction.fresh(each)
        noted = self._noted(heads, fresh.step)
        columns |= {name: column.unflatten(0, (self.batch, -1)) for name, column in noted.items()}
        self._append(heads, fresh, positions >= 0, fresh.step.counts[:, None], columns)

    def _append(
        self, heads: slice, fresh: Fresh, keep: Tensor, counts: Tensor, columns: dict[str, Tensor] | None = None
    ) -> None:
        """Appends the new tokens where ``keep`` (bool [B, K or 1, q]), ``counts`` ([B, K or 1], host) of each head."""
        counts = counts.expand(-1, self.layer.kv_heads).flatten()
        longest = int(counts.max())
        if not longest:
            return
        keys, values = self._rows(heads, fresh)
        position = fresh.step.positions.to(torch.int32)[:, None].expand(-1, self.layer.kv_heads, -1)
        marked = self._exempt(fresh)[:, None].expand(-1, self.layer.kv_heads, -1)
        columns = {"position": position, "marked": marked, **(columns or {})}
        if int(counts.min()) < keys.shape[2]:
            index = (~keep).byte().argsort(dim=-1, stable=True)[..., :longest].expand(-1, self.layer.kv_heads, -1)
            keys = keys.gather(2, index[..., None].expand(-1, -1, -1, keys.shape[3]))
            values = values.gather(2, index[..., None].expand(-1, -1, -1, values.shape[3]))
            columns = {name: _gathered(column, index) for name, column in columns.items()}
        rows = {name: column.flatten(0, 1) for name, column in columns.items()}
        self._put(heads, (keys.flatten(0, 1), values.flatten(0, 1)), rows, counts, fresh)

    def _put(
        self, heads: slice, new: tuple[Tensor, Tensor], columns: dict[str, Tensor], counts: Tensor, fresh: Fresh
    ) -> None:
        """Stores ``counts`` (int64 [R]) of the keys and values ``new`` ([R, n, size] each) of a prompt; ``columns`` say
        beside the store's which are ``marked`` to be read exactly."""
        watched, marked = self.store.watched, columns.pop("marked")
        if watched is not None:
            self.store.observe(heads, *new, counts, self._last_queries(fresh, watched), marked)
        self._enter(heads, *new, columns, counts)

    def _enter(self, heads: slice, keys: Tensor, values: Tensor, columns: dict[str, Tensor], counts: Tensor) -> None:
        """Stores a prompt's entries of a layer that stay, ``counts`` of each head: [R, n, …]."""
        self.store.append(heads, keys, values, columns, counts)

    def _last_queries(self, fresh: Fresh, count: int) -> Tensor:
        """The last ``count`` real queries of a prompt, zero where there are fewer: [B * K, G, count, D]."""
        positions, index = fresh.step.positions.sort(dim=1, stable=True)
        first = max(index.shape[1] - count, 0)
        rows = index[:, None, first:, None].expand(-1, fresh.query.shape[1], -1, fresh.query.shape[3])
        real = positions[:, None, first:, None] >= 0
        last = fresh.query.gather(2, rows).masked_fill(~real, 0)
        if self.rotary and count:
            last = self.rotary.undo(last, positions[:, first:].clamp(min=0))
        return last.unflatten(1, (self.layer.kv_heads, -1)).flatten(0, 1)

    def _rows(self, heads: slice, fresh: Fresh) -> tuple[Tensor, Tensor]:
        """What the store keeps of new tokens, [B, K, q, size] each."""
        if self.rotary is None:
            return fresh.keys, fresh.values
        # A captured pass knows no numbers of tokens: what it reads was reserved.
        below = int(fresh.step.after.max()) if fresh.step.after.numel() else 0
        return self.rotary.undo(fresh.keys, fresh.step.positions.clamp(min=0), below), fresh.values

    def _exempt(self, fresh: Fresh) -> Tensor:
        """The new tokens that are to be read exactly, bool [B, q]."""
        return torch.zeros_like(fresh.step.positions, dtype=torch.bool)

    def _read(
        self, heads: slice | Tensor, index: Tensor | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Stored keys and values as attention reads them, [R, n, size] each, or of entries ``index`` ([R, m]) alone.
        ``places`` (int64 [R, m]): where keys are rotated, if not at their positions."""
        keys, values = self.store.read(heads, index)
        if self.rotary and keys.shape[1]:
            places = self.store.read_column(heads, "position", index).long() if places is None else places
            keys = self.rotary.rotate(keys[:, None], places)[:, 0]
        if self.store.away:
            self.arena.note_peak(keys.nbytes + values.nbytes)
        return keys, values

    def _overwrite(self, heads: slice | Tensor, touched: Tensor, keys: Tensor, values: Tensor) -> None:
        """As ``Store.overwrite``, with keys as attention reads them."""
        if self.rotary:
            keys = self.rotary.undo(keys[:, None], self.store.read_column(heads, "position").long())[:, 0]
        self.store.overwrite(heads, touched, keys, values)

    def _part(self, heads: slice, mask: Tensor | None) -> Part:
        shape = (self.batch, self.layer.kv_heads)
        keys, values = self._read(heads)
        return Part(keys.unflatten(0, shape), values.unflatten(0, shape), mask, log_weight=self._log_weight(heads))

    def _log_weight(self, heads: slice) -> Tensor | None:
        """What is added to the logits of a layer's entries where they may stand for several, [B, K, n]."""
        if not self._counted:
            return None
        return self.store.read_column(heads, "count").unflatten(0, (self.batch, -1)).clamp(min=1).log()

    def _candidates(self, heads: slice) -> Part:
        """What is stored, as scores see it: they read no values, merging does."""
        if self.rotary or isinstance(self.eviction, Merging):
            return self._part(heads, None)
        keys = self.store.read_keys(heads).unflatten(0, (self.batch, -1))
        return Part(keys, keys[..., :0], log_weight=self._log_weight(heads))

    @property
    def reads_pages(self) -> bool:
        """Whether what is stored are keys and values, so that kernels may read the pages."""
        return True

    @property
    def _as_read(self) -> bool:
        """Whether they are those of each head as attention reads them."""
        return self.reads_pages and self.rotary is None and self._together == 1

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts leave what is stored in its pages, in its formats."""
        return self.eviction is None and self.selector is None and self._as_read and serves_prompts(self.store)

    def _over_pages(self, heads: slice, fresh: Fresh) -> Tensor | None:
        """Attention of a prompt's tokens to all that a layer stores and to themselves, by the kernel, which decodes no
        copy of it; None where it does not serve."""
        if not self._as_read or fresh.step.padded:
            return None
        new = fresh.query, fresh.keys, fresh.values
        return prompt(*new, self.store, heads, fresh.variant, self.layer.window, self._counted)

    def _over_decoded(self, heads: slice, stored: Part, fresh: Fresh) -> Tensor | None:
        """The same over what was decoded, where no kernel reads it as it lies."""
        if fresh.step.padded or self.layer.window is not None:
            return None
        lengths = self.store.lengths[heads].view(self.batch, -1)
        lengths = lengths.repeat_interleave(stored.keys.shape[1] // lengths.shape[1], 1)
        return prompt_decoded(fresh.query, fresh.keys, fresh.values, stored, lengths, fresh.variant)

    @property
    def captures(self) -> bool:
        """Whether decoding steps that have the same ``updates`` are the same kernels over the same buffers, whatever
        heads hold."""
        known = self.reads_pages and type(self).token is LayerGroup.token
        plain = all(observer.update for observer in self.observers) and self.selector is None
        queries = self.layer.query_heads // (self.layer.kv_heads * self._together)
        return known and plain and reads(self.store, queries, self._together, self.rotary)

    def _attended(self, heads: slice, fresh: Fresh) -> tuple[Tensor, Paid | None] | None:
        """Attention of a token to all that a layer stores, and what observers need of it, by the kernels; None where
        they do not serve."""
        if not self.reads_pages:
            return None
        updates = self._updates(fresh.step.positions)
        return decode(fresh.query, self.store, heads, fresh.variant, self._counted, self.shows, updates, self.rotary)

    def _updates(self, positions: Tensor) -> Updates | None:
        return Updates(self.updates, positions) if self.updates else None

    def _chosen_part(self, heads: slice, chosen: Chosen) -> Part:
        """What was chosen of a layer."""
        shape = (self.batch, self.layer.kv_heads)
        keys, values = self._read(heads, chosen.index, chosen.places)
        part = Part(*(x.unflatten(0, shape) for x in (keys, values, chosen.valid[:, None])))
        if self._counted:
            counts = self.store.read_column(heads, "count", chosen.index)
            part.log_weight = counts.unflatten(0, shape).clamp(min=1).log()
        return part

    def _reading(self, number: int, fresh: Fresh) -> Reading:
        place, step = self._place[number], fresh.step
        new = fresh.query, fresh.keys, fresh.values, step.positions, step.ends
        return Reading(place, self.heads(number), self.store, *new, fresh.variant, self._read)

    def _noted(self, heads: slice | Tensor, step: Step) -> dict[str, Tensor]:
        """The columns that a selection keeps of new tokens of these heads, [R, q] each."""
        return self.selector.fresh(self.store, heads, step.ends) if self.selector else {}

    def _held(self, heads: slice) -> Tensor:
        """Which of the entries that are read exist: bool [B, K, n] (heads shorter than the longest are padded)."""
        return self._within(heads).view(self.batch, self.layer.kv_heads, -1)

    def _within(self, heads: slice | Tensor) -> Tensor:
        """``_held`` head by head: bool [R, n]."""
        lengths = self.store.lengths[heads]
        held = torch.arange(int(lengths.max()), device=self.arena.device)
        return held < sent(lengths, self.arena.device)[:, None]

    def _before(self, number: int) -> Tensor:
        """The store's heads of layers before ``number``, bool [heads]."""
        return torch.tensor([own < number for own in self.numbers[:: self.layer.depth]]).repeat_interleave(self.stride)

    def _per_head(self, per_sequence: Tensor) -> Tensor:
        """[B] -> [heads of the store]; 0 in free slots."""
        of_slots = torch.nn.functional.pad(per_sequence, (0, self.slots - self.batch))
        return of_slots.repeat_interleave(self.layer.kv_heads).repeat(self.layers)


def _gathered(column: Tensor, index: Tensor) -> Tensor:
    """[B, K, n, …] at index [B, K, m] -> [B, K, m, …]."""
    trailing = column.shape[3:]
    return column.gather(2, index.view(*index.shape, *[1] * len(trailing)).expand(*index.shape, *trailing))


def _store(layout: Layout, arena: Arena, heads: int, numbers: list[int]) -> Store:
    if isinstance(layout, TieredLayout):
        return TieredStore(layout, arena, heads, numbers)
    assert isinstance(layout, StoreLayout)
    return Store(layout, arena, heads, numbers)
