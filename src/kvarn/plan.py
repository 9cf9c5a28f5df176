"""A recipe's budget resolved to the entries that each head may hold."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .budgets import UNBOUNDED, Budget, Heads, Policy, allowed_bytes, highest, most_on_average
from .errors import BudgetError
from .memory import Layout
from .reduction import Eviction
from .spec import LayerSpec, ModelSpec


@dataclass(frozen=True, eq=False)
class Plan:
    """A recipe with its budget resolved for one model and the lengths of its sequences.

    ``capacity`` (int64 [layers, B, K], on the host): the entries that each KV head may hold, ``UNBOUNDED`` where it
    keeps everything (layers with a sliding window always do). For each sequence: ``entries``, the mean of that over the
    heads of full-attention layers, with all tokens of the prompt where a head is unbounded; ``bytes``, what all heads
    take at the end of the prompt, or the most that they can take where something was stored before it or heads share
    what a layer keeps; ``allowed``, the bytes that the budget allows (None: no budget in bytes).
    """

    capacity: Tensor
    entries: list[int]
    bytes: list[int]
    allowed: list[int | None]

    def selected(self, sequences: list[int]) -> "Plan":
        """The plan of some sequences, which may repeat."""
        return Plan(
            self.capacity[:, sequences],
            [self.entries[i] for i in sequences],
            [self.bytes[i] for i in sequences],
            [self.allowed[i] for i in sequences],
        )

    def joined(self, other: "Plan") -> "Plan":
        """The plan of these sequences and those of ``other``."""
        capacity = torch.cat([self.capacity, other.capacity], 1)
        return Plan(capacity, self.entries + other.entries, self.bytes + other.bytes, [*self.allowed, *other.allowed])


@dataclass(frozen=True, eq=False)
class Planner:
    """Divides a budget over the heads of sequences of ``lengths`` tokens, as ``policy`` wants it.

    ``kept`` and ``layouts`` say how each kind of layer is stored, ``state_bytes`` what is kept besides, whatever the
    tokens; ``eviction`` is None where everything is kept; ``name`` is the recipe, for errors. ``empty``: nothing is
    stored yet, so that it is known in which formats a prompt will lie.
    """

    name: str
    spec: ModelSpec
    kept: dict[LayerSpec, LayerSpec]
    layouts: dict[LayerSpec, Layout]
    state_bytes: int
    eviction: Eviction | None
    policy: Policy
    budget: Budget
    lengths: list[int]
    empty: bool

    def plan(self) -> Plan:
        """Raises BudgetError, naming the least, where the budget cannot be met."""
        if self.eviction is None:
            self._check_everything()
            return self.planned(torch.full((self.heads.layers, len(self.lengths), self.heads.kv_heads), UNBOUNDED))
        return self.planned(self._divided(self.eviction, self.policy))

    def planned(self, capacity: Tensor) -> Plan:
        """The plan that gives heads ``capacity`` (int64 [layers, B, K])."""
        length = self.heads.lengths[:, None]
        capacity = torch.where(self._full[:, None, None], capacity, UNBOUNDED)
        counted = torch.where(capacity == UNBOUNDED, length, capacity)
        counted = counted[self._full] if bool(self._full.any()) else counted
        taken = self._bytes(torch.minimum(capacity, length)) + self._fixed
        return Plan(capacity, counted.double().mean((0, 2)).long().tolist(), taken.tolist(), self._allowed)

    def most(self, tokens: int) -> Tensor:
        """The most bytes, an open page of each segment included, that each sequence takes until decoding has brought it
        to ``tokens`` tokens, int64 [B]."""
        capacity, length = self.plan().capacity, self.heads.lengths[:, None]
        if self.eviction is not None and self.eviction.decode:
            held = capacity.clamp(max=tokens)
        else:
            held = torch.minimum(capacity, length) + (tokens - length)
        total = torch.full_like(self.heads.lengths, self.open_bytes)
        for layer, rows in self._acted_on.items():
            total = total + self.layouts[layer].most_bytes(held[rows]).sum((0, 2))
        for layer in self.spec.layers:
            if layer.window is not None:
                total = total + layer.kv_heads * self.layouts[layer].most_bytes(torch.tensor(layer.kept_dense(tokens)))
        return total

    def divided(self, policy: Policy) -> Tensor:
        """Capacities [layers, B, K] where ``policy`` divides the budget."""
        assert self.eviction is not None
        return self._divided(self.eviction, policy)

    @cached_property
    def heads(self) -> Heads:
        layer = next(iter(self._acted_on), self.spec.layers[0])
        return Heads(self._full, self.kept[layer].kv_heads, torch.tensor(self.lengths))

    # -- dividing -----------------------------------------------------------------------------------------------

    def _divided(self, eviction: Eviction, policy: Policy) -> Tensor:
        """The capacities of the highest level that the budget allows, int64 [layers, B, K]."""
        least = self.heads.lengths.clamp(max=eviction.least)[:, None]
        unasked = policy.unasked(self.heads) if self.budget is None else None
        if unasked is not None:
            return policy.entries(unasked, self.heads).clamp(min=least)
        if self._allowed[0] is not None:
            price = self._price_in_bytes(eviction)
        else:
            price = self._price_in_entries(eviction, policy)

        def entries(level: Tensor) -> Tensor:
            return policy.entries(level, self.heads).clamp(min=least)

        needed = price.of(entries(torch.zeros_like(self.heads.lengths)), self)
        self._require(needed, price)
        level = highest(
            lambda level: price.of(entries(level), self) <= price.allowed, policy.top(self.heads, price.most)
        )
        return price.improved(entries(level), self)

    def _price_in_bytes(self, eviction: Eviction) -> "_Price":
        longest = int(self.heads.lengths.max())
        most = max(longest, self.spec.max_positions or 0) if eviction.decode else longest
        entries = torch.arange(most + 1)
        held = torch.minimum(entries, self.heads.lengths[:, None])
        if eviction.decode or not self.empty:
            # Heads pass through smaller numbers while they grow, and blocks break: the most that they can take counts.
            held = entries[None] if eviction.decode else held
            tables = {layer: self.layouts[layer].most_bytes(held) for layer in self._acted_on}
            better = dict.fromkeys(self._acted_on, entries[None])
        else:
            # Formats in blocks may take less for more entries; then the head holds those.
            raw = {layer: self.layouts[layer].bytes(held) for layer in self._acted_on}
            least = {layer: costs.flip(1).cummin(1) for layer, costs in raw.items()}
            tables = {layer: found.values.flip(1) for layer, found in least.items()}
            better = {
                layer: torch.where(tables[layer] < raw[layer], most - found.indices.flip(1), entries)
                for layer, found in least.items()
            }
        if eviction.across_heads:
            tables = {layer: self._shared(layer, held) for layer in self._acted_on}
            better = dict.fromkeys(self._acted_on, entries[None])
        allowed = torch.tensor([bytes or 0 for bytes in self._allowed]) - self._fixed
        return _Price("bytes", most, allowed, tables, better)

    def _price_in_entries(self, eviction: Eviction, policy: Policy) -> "_Price":
        asked = torch.tensor([self._entries(eviction, length) for length in self.lengths])
        count = int(self._full.sum()) * self.heads.kv_heads
        allowed = asked * count
        if self.budget is None:
            # The method's own default is for the heads that it bounds.
            bounded = policy.entries(torch.zeros_like(asked), self.heads) != UNBOUNDED
            whole = count - bounded[self._full].sum((0, 2))
            allowed = allowed + whole * (self.heads.lengths - asked)
        most = max(int(self.heads.lengths.max()), self.spec.max_positions or 0, int(asked.max()))
        table = {layer: torch.arange(most + 1)[None] for layer in self._acted_on}
        return _Price("entries", most, allowed, table, table)

    def _entries(self, eviction: Eviction, length: int) -> int:
        if isinstance(self.budget, int):
            return self.budget
        if isinstance(eviction.default, float):
            return max(int(eviction.default * length), eviction.least)
        return eviction.default

    # -- refusing -----------------------------------------------------------------------------------------------

    def _check_everything(self) -> None:
        longest = max(self.lengths)
        if isinstance(self.budget, int) and self.budget < longest:
            raise BudgetError(
                f"{self.name} evicts nothing and needs {longest} entries a head; the budget is {self.budget}"
            )
        # A share of 1 or more asks for nothing to be saved, so it does not fail for the bookkeeping.
        if self._allowed[0] is not None and not (isinstance(self.budget, float) and self.budget >= 1):
            allowed = torch.tensor([bytes or 0 for bytes in self._allowed]) - self._fixed
            everything = self.heads.lengths[:, None].expand(self.heads.layers, -1, self.heads.kv_heads)
            self._require(self._bytes(everything), _Price("bytes", longest, allowed, {}, {}))

    def _require(self, needed: Tensor, price: "_Price") -> None:
        """An open page of each segment of a head is beyond a budget in bytes; anything more is an error."""
        spare = self.open_bytes if price.unit == "bytes" else 0
        short = torch.nonzero(needed > price.allowed + spare).flatten().tolist()
        if not short:
            return
        worst = short[0]
        if price.unit == "entries":
            heads = int(self._full.sum()) * self.heads.kv_heads
            raise BudgetError(
                f"{self.name} needs at least {-(-int(needed[worst]) // heads)} entries a head; the budget is "
                f"{int(price.allowed[worst]) // heads}"
            )
        length, total = self.lengths[worst], int(needed[worst] + self._fixed[worst])
        dense = self.spec.dense_bytes(length)
        raise BudgetError(
            f"{self.name} needs at least {total:,} bytes for {length} tokens ({total / dense:.3f} of the dense "
            f"{dense:,}); the budget allows {self._allowed[worst]:,}"
        )

    # -- counting -----------------------------------------------------------------------------------------------

    @cached_property
    def _allowed(self) -> list[int | None]:
        return allowed_bytes(self.budget, self.spec, self.lengths)

    @cached_property
    def _full(self) -> Tensor:
        """Which layers are without a sliding window, bool [layers]: the ones that methods act on."""
        return torch.tensor([layer.window is None for layer in self.spec.layers])

    @cached_property
    def _acted_on(self) -> dict[LayerSpec, Tensor]:
        """Full-attention layers that are alike, as bool [layers]."""
        full = {layer for layer in self.spec.layers if layer.window is None}
        return {layer: torch.tensor([other == layer for other in self.spec.layers]) for layer in full}

    def _bytes(self, entries: Tensor) -> Tensor:
        """Bytes of full-attention layers whose heads hold ``entries`` ([layers, B, K]): int64 [B]."""
        total = torch.zeros_like(self.heads.lengths)
        for layer, rows in self._acted_on.items():
            if self.eviction is not None and self.eviction.across_heads:
                held = torch.minimum(torch.arange(int(self.heads.lengths.max()) + 1), self.heads.lengths[:, None])
                taken = _looked_up(self._shared(layer, held), _on_average(entries[rows]))
            else:
                taken = self._cost(layer)(entries[rows][:: layer.depth, :, : self.kept[layer].kv_heads])
            total = total + taken.sum((0, 2))
        return total

    def _cost(self, layer: LayerSpec) -> Callable[[Tensor], Tensor]:
        """What one head of so many entries takes: exactly, or at most where evictions before have left the formats in
        a state that is not known."""
        layout = self.layouts[layer]
        return layout.bytes if self.empty or self.eviction is None else layout.most_bytes

    def _shared(self, layer: LayerSpec, held: Tensor) -> Tensor:
        """The most that a head takes on average where the heads of a layer share ``held`` entries each on average
        (int64 [B, n], never falling)."""
        return most_on_average(self._cost(layer)(held), held)

    @cached_property
    def _fixed(self) -> Tensor:
        """Bytes of all layers with a sliding window, and of what is kept for layers themselves, int64 [B]."""
        total = torch.full_like(self.heads.lengths, self.state_bytes)
        for layer in self.spec.layers:
            if layer.window is not None:
                kept = torch.tensor([layer.kept_dense(length) for length in self.lengths])
                total = total + layer.kv_heads * self.layouts[layer].bytes(kept)
        return total

    @cached_property
    def open_bytes(self) -> int:
        """Bytes of one page of each segment of a sequence's heads."""
        pages = [self.kept[x].kv_heads * self.layouts[x].open_bytes // x.depth for x in self.spec.layers]
        return sum(pages)


@dataclass(frozen=True, eq=False)
class _Price:
    """What entries cost, in bytes or in entries, up to ``most`` a head, and what is ``allowed`` (int64 [B]).

    ``tables`` (int64 [B or 1, most + 1] for each kind of layer) never fall; ``better`` holds as many entries or more at
    the price.
    """

    unit: str
    most: int
    allowed: Tensor
    tables: dict[LayerSpec, Tensor]
    better: dict[LayerSpec, Tensor]

    def of(self, entries: Tensor, planner: Planner) -> Tensor:
        """The price of ``entries`` (int64 [layers, B, K]) for each sequence, int64 [B]."""
        total = torch.zeros_like(self.allowed)
        for layer, rows in planner._acted_on.items():
            priced = self._priced(entries[rows][:: layer.depth], planner)
            total = total + _looked_up(self.tables[layer], priced).sum((0, 2))
        return total

    def improved(self, entries: Tensor, planner: Planner) -> Tensor:
        """As many entries or more for the same price."""
        entries = entries.clone()
        for layer, rows in planner._acted_on.items():
            found = _looked_up(self.better[layer], self._priced(entries[rows], planner))
            entries[rows] = torch.where(entries[rows] > self.most, entries[rows], found)
        return entries

    def _priced(self, entries: Tensor, planner: Planner) -> Tensor:
        """Heads that keep everything are paid for the tokens of the prompt."""
        length = planner.heads.lengths[:, None]
        entries = torch.where(entries == UNBOUNDED, length, entries).clamp(max=self.most)
        shared = planner.eviction is not None and planner.eviction.across_heads
        return _on_average(entries) if shared else entries


def _on_average(entries: Tensor) -> Tensor:
    """Entries [layers, B, K] as they are where the heads of a layer have equally many, rounded up."""
    return (-(-entries.sum(-1, keepdim=True) // entries.shape[-1])).expand_as(entries)


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """[B or 1, n] at [layers, B, K] -> [layers, B, K]."""
    rows = index.transpose(0, 1).flatten(1)
    found = table.expand(rows.shape[0], -1).gather(1, rows)
    return found.view(index.shape[1], index.shape[0], index.shape[2]).transpose(0, 1)
