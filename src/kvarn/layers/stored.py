"""What some layers hold: how their heads are numbered in one store, and what attention reads of them.

Shapes: B sequences, K KV heads, q new tokens, n entries, D head size. Heads of the store are numbered (layer, slot, KV
head). The sequences fill the first slots, so that a layer is a slice; free slots let others join.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..attention import Part
from ..attention.rotary import Rotary
from ..memory import Arena, Layout, Store, StoreLayout, TieredLayout, TieredStore, sent
from ..reduction import Eviction, Merging
from ..selection import Chosen, Layers, Reading, Selection, Selector
from ..spec import LayerSpec
from .step import Fresh


class StoredLayers:
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
        self.selector: Selector | None = None  # where queries read only some of what is stored
        self._place = {number: place // layer.depth for place, number in enumerate(numbers)}

    @property
    def state_bytes(self) -> int:
        """Bytes kept for the layers themselves, whatever the tokens."""
        shared = len(self.numbers) * self.store.layout.shared_bytes
        return shared + (self.selector.state_bytes if self.selector else 0)

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

    def reserve(self, slots: int) -> None:
        """Makes room for ``slots`` sequences."""
        if slots <= self.slots:
            return
        before, store, heads = self.slots, self.store, self.heads_of(torch.arange(self.batch))
        self.slots = slots
        self.store = _store(store.layout, self.arena, self.layers * self.stride, self.numbers)
        self.store.adopt(self.everyone, store, heads)
        self._capacity = torch.nn.functional.pad(self._capacity, (0, 0, 0, slots - before))

    def _before(self, number: int) -> Tensor:
        """The store's heads of layers before ``number``, bool [heads]."""
        return torch.tensor([own < number for own in self.numbers[:: self.layer.depth]]).repeat_interleave(self.stride)

    def _per_head(self, per_sequence: Tensor) -> Tensor:
        """[B] -> [heads of the store]; 0 in free slots."""
        of_slots = torch.nn.functional.pad(per_sequence, (0, self.slots - self.batch))
        return of_slots.repeat_interleave(self.layer.kv_heads).repeat(self.layers)

    # -- what attention reads -----------------------------------------------------------------------------------

    @property
    def reads_pages(self) -> bool:
        """Whether what is stored are keys and values, so that kernels may read the pages."""
        return True

    @property
    def _as_read(self) -> bool:
        """Whether they are those of each head as attention reads them."""
        return self.reads_pages and self.rotary is None and self._together == 1

    def _rows(self, heads: slice, fresh: Fresh) -> tuple[Tensor, Tensor]:
        """What the store keeps of new tokens, [B, K, q, size] each."""
        if self.rotary is None:
            return fresh.keys, fresh.values
        # A captured pass knows no numbers of tokens: what it reads was reserved.
        below = int(fresh.step.after.max()) if fresh.step.after.numel() else 0
        return self.rotary.undo(fresh.keys, fresh.step.positions.clamp(min=0), below), fresh.values

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

    def _candidates(self, heads: slice) -> Part:
        """What is stored, as scores see it: they read no values, merging does."""
        if self.rotary or isinstance(self.eviction, Merging):
            return self._part(heads, None)
        keys = self.store.read_keys(heads).unflatten(0, (self.batch, -1))
        return Part(keys, keys[..., :0], log_weight=self._log_weight(heads))

    def _chosen_part(self, heads: slice, chosen: Chosen) -> Part:
        """What was chosen of a layer."""
        shape = (self.batch, self.layer.kv_heads)
        keys, values = self._read(heads, chosen.index, chosen.places)
        part = Part(*(x.unflatten(0, shape) for x in (keys, values, chosen.valid[:, None])))
        if self._counted:
            counts = self.store.read_column(heads, "count", chosen.index)
            part.log_weight = counts.unflatten(0, shape).clamp(min=1).log()
        return part

    def _log_weight(self, heads: slice) -> Tensor | None:
        """What is added to the logits of a layer's entries where they may stand for several, [B, K, n]."""
        if not self._counted:
            return None
        return self.store.read_column(heads, "count").unflatten(0, (self.batch, -1)).clamp(min=1).log()

    def _reading(self, number: int, fresh: Fresh) -> Reading:
        place, step = self._place[number], fresh.step
        new = fresh.query, fresh.keys, fresh.values, step.positions, step.ends
        return Reading(place, self.heads(number), self.store, *new, fresh.variant, self._read)

    def _columns(self, heads: slice) -> dict[str, Tensor]:
        """The columns of a layer, [B, K, n, …] each; positions are int64, -1 beyond a head's length."""
        columns = {n: c.unflatten(0, (self.batch, -1)) for n, c in self.store.read_columns(heads).items()}
        position = columns["position"].long()
        lengths = self.store.lengths[heads]
        if not bool((lengths == lengths[0]).all()):
            position = position.masked_fill(~self._held(heads), -1)
        return columns | {"position": position}

    def _held(self, heads: slice) -> Tensor:
        """Which of the entries that are read exist: bool [B, K, n] (heads shorter than the longest are padded)."""
        return self._within(heads).view(self.batch, self.layer.kv_heads, -1)

    def _within(self, heads: slice | Tensor) -> Tensor:
        """``_held`` head by head: bool [R, n]."""
        lengths = self.store.lengths[heads]
        held = torch.arange(int(lengths.max()), device=self.arena.device)
        return held < sent(lengths, self.arena.device)[:, None]

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


def _store(layout: Layout, arena: Arena, heads: int, numbers: list[int]) -> Store:
    if isinstance(layout, TieredLayout):
        return TieredStore(layout, arena, heads, numbers)
    assert isinstance(layout, StoreLayout)
    return Store(layout, arena, heads, numbers)
