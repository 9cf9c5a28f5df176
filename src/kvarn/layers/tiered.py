"""Layers whose heads keep important entries in more bits than the others."""

import torch
from torch import Tensor

from ..attention.rotary import Rotary
from ..memory import Arena, TieredLayout, TieredStore, sent
from ..memory.segment import joined, pick
from ..memory.tiered import leading
from ..plan import Plan
from ..reduction import Eviction, Precision
from ..scoring import ObservingScore
from ..spec import LayerSpec
from .group import LayerGroup
from .step import Step


class TieredGroup(LayerGroup):
    """A layer group whose store has two precisions; ``precision`` says which entries go to the lower one."""

    store: TieredStore

    def __init__(
        self,
        numbers: list[int],
        layer: LayerSpec,
        layout: TieredLayout,
        eviction: Eviction | None,
        precision: Precision,
        arena: Arena,
        batch: int,
        rotary: Rotary | None = None,
    ):
        super().__init__(numbers, layer, layout, eviction, arena, batch, rotary)
        self.tiers, self.precision = layout, precision
        # Where the plan says it: high entries that the heads of each slot are cut to, and the most that they have.
        self._high = torch.zeros((2, *self._capacity.shape), dtype=torch.int64)
        self._due = False  # whether entries leave or change their precision after the step under way

    @property
    def observers(self) -> list[ObservingScore]:
        others = [observer for observer in super().observers if observer != self.precision.score]
        return [*others, self.precision.score]

    @property
    def observing(self) -> list[ObservingScore]:
        # What counts may be what the last query before a decision reads; until then attention need not be seen.
        if self._due or not self.precision.score.forgets:
            return self.observers
        return [observer for observer in self.observers if observer != self.precision.score]

    def empty(self, batch: int) -> "TieredGroup":
        return TieredGroup(
            self.numbers, self.layer, self.tiers, self.eviction, self.precision, self.arena, batch, self.rotary
        )

    def selected(self, sequences: Tensor) -> "TieredGroup":
        group = super().selected(sequences)
        assert isinstance(group, TieredGroup)
        group._high = self._high[:, :, sequences]
        return group

    def reserve(self, slots: int) -> None:
        self._high = torch.nn.functional.pad(self._high, (0, 0, 0, max(slots - self.slots, 0)))
        super().reserve(slots)

    def join(self, other: LayerGroup) -> None:
        assert isinstance(other, TieredGroup)
        first, high = self.batch, other._high[:, :, : other.batch]
        super().join(other)
        self._high[:, :, first : self.batch] = high

    def leave(self, sequence: int) -> "TieredGroup":
        high, last = self._high[:, :, sequence : sequence + 1].clone(), self._high[:, :, self.batch - 1]
        alone = super().leave(sequence)
        assert isinstance(alone, TieredGroup)
        alone._high, self._high[:, :, sequence] = high, last
        return alone

    def allow(self, plan: Plan) -> None:
        super().allow(plan)
        high, most = (self.capacity if of is None else of[self.numbers] for of in (plan.high, plan.most_high))
        self._high[:, :, : self.batch] = torch.stack([high, most])

    def shrink(self, plan: Plan, before: int, after: Tensor) -> None:
        super().shrink(plan, before, after)
        self._demote(self._before(before) & self._over(slice(None), self.store.lengths), after)

    def begin_token(self, step: Step) -> None:
        super().begin_token(step)
        self._due = bool(self._deciding.any())

    def end_token(self, step: Step) -> None:
        changing = self._changing
        super().end_token(step)
        # Fresh entries that have just left have not ripened.
        self._demote(changing & self._ripe(), step.after)

    # -- inside -------------------------------------------------------------------------------------------------

    @property
    def _changing(self) -> Tensor:
        """Heads of which high entries may become low ones after the decoding step under way, bool [heads]."""
        if self.precision.share is None:
            return self._full | self._over(slice(None), self.store.upper_lengths)
        return self._ripe()

    @property
    def _deciding(self) -> Tensor:
        return super()._deciding | self._changing

    def _ripe(self) -> Tensor:
        """Heads whose new entries need not wait any longer, bool [heads]."""
        if self.precision.gap is None or self.store.fresh is None:
            return torch.ones_like(self.store.lengths, dtype=torch.bool)
        return self.store.fresh.lengths >= self.precision.gap

    def _over(self, heads: slice | Tensor, entries: Tensor) -> Tensor:
        """Whether ``entries`` ([R]) are more than may be high ones, bool [R]."""
        if self.precision.share is not None:
            return torch.ones_like(entries, dtype=torch.bool)
        return entries > self._high[1].flatten()[heads]

    def _allowed(self, heads: slice | Tensor, entries: Tensor) -> Tensor:
        """How many of ``entries`` ([R]) stay high ones in heads that are cut, int64 [R]."""
        return self.tiers.count_high(entries) if self.precision.share is not None else self._high[0].flatten()[heads]

    def _enter(self, heads: slice, keys: Tensor, values: Tensor, columns: dict[str, Tensor], counts: Tensor) -> None:
        store, old = self.store, self.store.upper_lengths[heads]
        total, upper = store.lengths[heads] + counts, old + counts
        stored, longest = store.read_upper_columns(heads), int(upper.max())
        candidates = {name: joined(stored[name], new, old, longest) for name, new in columns.items()}
        allowed = torch.where(self._over(heads, total), self._allowed(heads, total), upper)
        goes = self._lowered(heads, candidates, upper, allowed, self._per_head(self.prompted)[heads])
        store.demote(heads, goes[:, : int(old.max())])
        place = old[:, None] + torch.arange(keys.shape[1])
        store.append(heads, keys, values, columns, counts, low=pick(goes, place.to(goes.device)))

    def _demote(self, due: Tensor, after: Tensor) -> None:
        """Lowers the precision of high entries that are too many in heads that are ``due`` (bool [heads]), of sequences
        of ``after`` (int64 [B]) tokens."""
        store, upper = self.store, self.store.upper_lengths
        allowed = self._allowed(slice(None), store.lengths)
        waits = store.fresh.lengths > 0 if store.fresh else torch.zeros_like(due)
        heads = torch.nonzero(due & ((upper > allowed) | waits)).flatten()
        if heads.numel() and self.selector:
            self.selector.moved()
        for some in self._in_turns(heads):
            state = upper[some], allowed[some], self._per_head(after)[some]
            lowered = self._lowered(some, store.read_upper_columns(some), *state)
            store.demote(some, lowered, (upper - allowed)[some].clamp(min=0))

    def _lowered(
        self, heads: slice | Tensor, columns: dict[str, Tensor], lengths: Tensor, allowed: Tensor, seen: Tensor
    ) -> Tensor:
        """Which of ``lengths`` entries that are not low become low ones, bool [R, n]: all beyond ``allowed``."""
        settled = self.store.high.lengths[heads] if self.store.fresh else torch.zeros_like(lengths)
        leaving, longest = lengths - allowed, columns["position"].shape[1]
        lengths, seen, allowed, settled = sent(torch.stack([lengths, seen, allowed, settled]), self.arena.device)
        most = max(int(leaving.max()), 0)
        order = self.precision.first_to_go(columns, lengths, seen, allowed, settled, most)
        return leading(order, leaving, longest)
