"""Layers that keep their entries together with their neighbours."""

import torch
from torch import Tensor

from ..attention import Part, attend
from ..attention.rotary import Rotary
from ..bundles import Bundle
from ..formats import Bundled
from ..memory import Arena, BoundedLayout, TieredStore
from ..memory.segment import joined, pick
from ..memory.tiered import leading
from ..reduction import Eviction
from ..scoring import PromptView
from ..spec import LayerSpec
from .group import LayerGroup
from .step import Fresh, Step


class BundledGroup(LayerGroup):
    """A layer group whose store holds bundles of layers: its heads are numbered (bundle, sequence, head).

    Rows of the store's low part are encoded together, those of its high part stay as they are. New keys and values wait
    until the last layer of their bundle has come, and no longer.
    """

    store: TieredStore

    def __init__(
        self,
        numbers: list[int],
        layer: LayerSpec,
        layout: BoundedLayout,
        eviction: Eviction | None,
        bundle: Bundle,
        arena: Arena,
        batch: int,
        rotary: Rotary | None = None,
    ):
        super().__init__(numbers, bundle.kept(layer), layout, eviction, arena, batch, rotary)
        self.bundle, self.tiers, self._whole = bundle, layout, layer
        self._depth_of = {number: place % layer.bundle for place, number in enumerate(numbers)}
        self._waiting: list[list[Tensor]] = []  # new keys and values of layers, [B, heads of a row, q, size]
        self._worth: list[Tensor] = []  # what candidates are worth to layers, [B, K, n]
        self._number = numbers[0]  # the layer that is being attended to

    def empty(self, batch: int) -> "BundledGroup":
        return BundledGroup(
            self.numbers, self._whole, self.tiers, self.eviction, self.bundle, self.arena, batch, self.rotary
        )

    # -- prompts ------------------------------------------------------------------------------------------------

    def prompt(self, number: int, fresh: Fresh) -> Tensor:
        self._number = number
        return super().prompt(number, fresh)

    def _store_prompt(self, number: int, stored: Part | None, fresh: Fresh, following: Tensor) -> None:
        heads = self.heads(number)
        self._waiting.append(self._by_row(heads, fresh))
        in_hand = sum(side.nbytes for layer in self._waiting for side in layer)
        others = in_hand - sum(side.nbytes for side in self._waiting[-1])  # than the layer that is being attended to
        self.arena.note_peak(others)
        if len(self._waiting) < self.layer.bundle:
            if self.eviction is not None and not self._fits(number, fresh.step):
                self._worth.append(super()._scores(self.eviction, self._view(heads, stored, fresh)))
            return
        self.arena.note_peak(others + in_hand)  # the same once more, side by side
        super()._store_prompt(number, stored, fresh, following)
        self._waiting, self._worth = [], []
        self._bound(heads)

    def _scores(self, eviction: Eviction, view: PromptView) -> Tensor:
        """What candidates are worth to the layers of a bundle on average: what leaves one of them leaves all."""
        return torch.stack([*self._worth, super()._scores(eviction, view)]).mean(0)

    def _rows(self, heads: slice, fresh: Fresh) -> tuple[Tensor, Tensor]:
        keys, values = (torch.cat(side, -1) for side in zip(*self._waiting, strict=True))
        return keys, values

    def _put(
        self, heads: slice, new: tuple[Tensor, Tensor], columns: dict[str, Tensor], counts: Tensor, fresh: Fresh
    ) -> None:
        del columns["marked"]
        if self.bundle.by_prompt and int(self.store.lengths[heads].max()):
            new, columns, counts = self._taken_out(heads, new, columns, counts)
        watched = self.store.watched
        if watched is not None:
            unmarked = torch.zeros(new[0].shape[:2], dtype=torch.bool, device=self.arena.device)
            self.store.observe(heads, *new, counts, self._last_queries(fresh, watched), unmarked)
        exact = self._exact(heads, new, counts)
        absent = (torch.arange(exact.shape[1]) >= counts[:, None]).to(exact.device)
        high = exact.sum(1).cpu()
        for store, apart, number in ((self.store.low, exact, counts - high), (self.store.high, ~exact, high)):
            most = int(number.max())
            if most == exact.shape[1] and bool((number == most).all()):
                store.append(heads, *new, columns, number)
            elif most:
                index = (apart | absent).byte().argsort(dim=1, stable=True)[:, :most]
                picked = {name: pick(column, index) for name, column in columns.items()}
                store.append(heads, pick(new[0], index), pick(new[1], index), picked, number)

    def _taken_out(
        self, heads: slice, new: tuple[Tensor, Tensor], columns: dict[str, Tensor], counts: Tensor
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor], Tensor]:
        """What is stored, and after it what is new, as one prompt; nothing is stored then."""
        lengths = self.store.lengths[heads].clone()
        longest = int((lengths + counts).max())
        old, beside = self.store.read(heads), self.store.read_columns(heads)
        self.store.free(heads)
        keys, values = (joined(a, b, lengths, longest) for a, b in zip(old, new, strict=True))
        self.arena.note_peak(2 * (keys.nbytes + values.nbytes))
        columns = {name: joined(column, columns[name], lengths, longest) for name, column in beside.items()}
        return (keys, values), columns, lengths + counts

    # -- decoding -----------------------------------------------------------------------------------------------

    def token(self, number: int, fresh: Fresh) -> Tensor:
        self._number = number
        heads = self.heads(number)
        keys, values = (side.flatten(0, 2) for side in self._by_row(heads, fresh))
        self.store.put_token(heads, keys, values, self._channels)
        mask = None if self._even[self._place[number]] else self._held(heads)[:, :, None]
        return attend(fresh.query, [self._part(heads, mask)], fresh.variant)

    def end_token(self, step: Step) -> None:
        if not self.bundle.by_prompt:
            self._encode_new()
        super().end_token(step)
        self._bound(self.everyone)

    def _encode_new(self) -> None:
        """Encodes the newest of the entries that are as they are, in heads where it need not stay so."""
        high, everyone = self.store.high, self._ids(self.everyone)
        heads = everyone[high.lengths[everyone] > 0]
        newest = (high.lengths[heads] - 1)[:, None].to(self.arena.device)
        keys, values = high.read(heads, newest)
        some = (self._strain(heads, keys, values)[:, 0] < 0).cpu()
        if not bool(some.any()):
            return
        heads, newest, keys, values = heads[some], newest[some], keys[some], values[some]
        columns = {"position": high.read_column(heads, "position", newest)} if high.columns else {}
        self.store.low.append(heads, keys, values, columns, torch.ones_like(heads))
        high.drop(heads, newest)

    # -- inside -------------------------------------------------------------------------------------------------

    def _by_row(self, heads: slice, fresh: Fresh) -> list[Tensor]:
        """A layer's new keys and values as the store joins them with those of its neighbours, [B, rows, q, size]."""
        sides = super()._rows(heads, fresh)
        return [x.unflatten(1, (self.layer.kv_heads, -1)).transpose(2, 3).flatten(3) for x in sides]

    @property
    def _channels(self) -> tuple[slice, slice]:
        """Which numbers of the store's keys and values are those of the layer that is being attended to."""
        place = self._depth_of[self._number]
        keys, values = self.layer.key_size // self.layer.bundle, self.layer.value_size // self.layer.bundle
        return slice(place * keys, (place + 1) * keys), slice(place * values, (place + 1) * values)

    def _ids(self, heads: slice | Tensor) -> Tensor:
        return torch.arange(self.store.lengths.numel())[heads] if isinstance(heads, slice) else heads

    def _strain(self, heads: slice | Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """How far entries are beyond what should be encoded, fp32 [R, n]."""
        low = self.store.low
        of_keys, of_values = (
            fmt.strain(x)
            for side, x in ((low.keys, keys), (low.values, values))
            if side.settled and isinstance(fmt := side.settled.format_of(heads), Bundled)
        )
        return torch.maximum(of_keys, of_values)

    def _exact(self, heads: slice, new: tuple[Tensor, Tensor], counts: Tensor) -> Tensor:
        """Which new entries stay as they are, bool [R, n]: no more than the layout allows."""
        present = (torch.arange(new[0].shape[1]) < counts[:, None]).to(self.arena.device)
        if not self.tiers.share:
            return torch.zeros_like(present)
        strain = self._strain(heads, *new).masked_fill(~present, -torch.inf)
        most = self.tiers.count_high(self.store.lengths[heads] + counts).to(strain.device)
        rank = strain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return (strain >= 0) & (rank < most[:, None])

    def _bound(self, heads: slice | Tensor) -> None:
        """Encodes entries that stay as they are where these are more than the layout allows, the least strained."""
        excess = self.store.high.lengths[heads] - self.tiers.count_high(self.store.lengths[heads])
        some = torch.nonzero(excess > 0).flatten()
        if self.bundle.by_prompt or not some.numel():
            return
        chosen = self._ids(heads)[some]
        keys, values = self.store.high.read(chosen)
        beyond = torch.arange(keys.shape[1]) >= self.store.high.lengths[chosen][:, None]
        strain = self._strain(chosen, keys, values).masked_fill(beyond.to(keys.device), torch.inf)
        order = strain.argsort(dim=1, stable=True)
        self.store.demote(chosen, leading(order, excess[some], order.shape[1]), excess[some])

    def _part(self, heads: slice, mask: Tensor | None) -> Part:
        """What is stored, as the layer that is being attended to reads it."""
        sides = self.store.read_channels(heads, *self._channels)
        keys, values = (
            side.unflatten(-1, (-1, size)).transpose(1, 2)
            for side, size in zip(sides, (self._whole.key_size, self._whole.value_size), strict=True)
        )
        if self.rotary and keys.shape[2]:
            keys = self.rotary.rotate(keys, self.store.read_column(heads, "position").long())
        keys, values = (side.unflatten(0, (self.batch, -1)).flatten(1, 2) for side in (keys, values))
        return Part(keys, values, mask)
