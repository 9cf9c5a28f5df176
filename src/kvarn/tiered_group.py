"""Layers whose heads keep important entries in more bits than the others."""

import torch
from torch import Tensor

from .attention.rotary import Rotary
from .group import Fresh, LayerGroup, Step
from .memory import Arena, TieredLayout, TieredStore
from .reduction import Eviction, Precision
from .scoring import ObservingScore
from .spec import LayerSpec


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

    @property
    def observers(self) -> list[ObservingScore]:
        others = [observer for observer in super().observers if observer != self.precision.score]
        return [*others, self.precision.score]

    def empty(self, batch: int) -> "TieredGroup":
        return TieredGroup(
            self.numbers, self.layer, self.tiers, self.eviction, self.precision, self.arena, batch, self.rotary
        )

    def prompt(self, number: int, fresh: Fresh) -> Tensor:
        out = super().prompt(number, fresh)
        self._demote(self.heads(number), fresh.step.after)
        return out

    def shrink(self, capacity: Tensor, before: int, after: Tensor) -> None:
        super().shrink(capacity, before, after)
        self._demote(self.everyone, after)

    def end_token(self, step: Step) -> None:
        super().end_token(step)
        self._demote(self.everyone, step.after)

    def _demote(self, heads: slice | Tensor, after: Tensor) -> None:
        """Lowers the precision of high entries that are too many, of sequences of ``after`` (int64 [B]) tokens."""
        allowed = self.tiers.count_high(self.store.lengths[heads])
        excess = self.store.high.lengths[heads] - allowed
        some = torch.nonzero(excess > 0).flatten()
        if not some.numel():
            return
        if self.selector:
            self.selector.moved()
        chosen = some + heads.start if isinstance(heads, slice) else heads[some]
        device = self.arena.device
        recent = (self.precision.recent_share * allowed[some]).long()
        state = (self.store.high.lengths[chosen], self._per_head(after)[chosen], recent)
        columns = self.store.high.read_columns(chosen)
        order = self.precision.first_to_go(columns, *(t.to(device) for t in state))
        self.store.demote(chosen, order[:, : int(excess.max())], excess[some])
