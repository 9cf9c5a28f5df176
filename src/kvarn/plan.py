"""A recipe's budget resolved to the entries that each head may hold."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .budgets import UNBOUNDED, Budget, Cascade, Heads, Policy, allowed_bytes, highest, most_on_average
from .errors import BudgetError
from .memory import Layout, StoreLayout, TieredLayout
from .reduction import Eviction, Merging
from .spec import LayerSpec, ModelSpec


@dataclass(frozen=True, eq=False)
class Plan:
    """A recipe with its budget resolved for one model and the lengths of its sequences.

    ``capacity`` (int64 [layers, B, K], on the host): the entries that each KV head may hold, ``UNBOUNDED`` where it
    keeps everything (layers with a sliding window always do). For each sequence: ``entries``, the mean of that over the
    heads of full-attention layers, with all tokens of the prompt where a head is unbounded; ``bytes``, what all heads
    take at the end of the prompt, or the most that they can take where something was stored before it or heads share
    what a layer keeps; ``allowed``, the bytes that the budget allows (None: no budget in bytes). ``peak``: the most
    bytes that each takes while its prompt is read in the passes that a cache has been given (None: in none).

    Where the policy says how many entries a head keeps in the higher of two precisions (int64 [layers, B, K]): ``high``
    is what it is cut to, when it is full, or has more high ones than ``most_high``.
    """

    capacity: Tensor
    entries: list[int]
    bytes: list[int]
    allowed: list[int | None]
    high: Tensor | None = None
    most_high: Tensor | None = None
    peak: list[int] | None = None

    def selected(self, sequences: list[int]) -> "Plan":
        """The plan of some sequences, which may repeat."""
        return Plan(
            self.capacity[:, sequences],
            [self.entries[i] for i in sequences],
            [self.bytes[i] for i in sequences],
            [self.allowed[i] for i in sequences],
            None if self.high is None else self.high[:, sequences],
            None if self.most_high is None else self.most_high[:, sequences],
            None if self.peak is None else [self.peak[i] for i in sequences],
        )

    def joined(self, other: "Plan") -> "Plan":
        """The plan of these sequences and those of ``other``."""

        def both(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return None if mine is None or theirs is None else torch.cat([mine, theirs], 1)

        return Plan(
            torch.cat([self.capacity, other.capacity], 1),
            self.entries + other.entries,
            self.bytes + other.bytes,
            [*self.allowed, *other.allowed],
            both(self.high, other.high),
            both(self.most_high, other.most_high),
            None if self.peak is None or other.peak is None else self.peak + other.peak,
        )


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

    def planned(self, capacity: Tensor, policy: Policy | None = None) -> Plan:
        """The plan that gives heads ``capacity`` (int64 [layers, B, K])."""
        length = self.heads.lengths[:, None]
        capacity = torch.where(self._full[:, None, None], capacity, UNBOUNDED)
        counted = torch.where(capacity == UNBOUNDED, length, capacity)
        counted = counted[self._full] if bool(self._full.any()) else counted
        entries = torch.minimum(capacity, length)
        high = policy.high(capacity, self.heads) if policy else None
        most_high = None if high is None else self.most_high(capacity, high)
        kept_high = None
        if high is not None and most_high is not None:
            kept_high = torch.where(entries > most_high, torch.minimum(high, entries), entries)
        taken = (self._bytes(entries, kept_high) + self._fixed).tolist()
        return Plan(capacity, counted.double().mean((0, 2)).long().tolist(), taken, self._allowed, high, most_high)

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

    def peak(self, capacity: Tensor, tokens: int, held: Tensor | None = None, decodes: bool = True) -> Tensor:
        """The most bytes that each sequence takes while its prompt is read in passes of ``tokens`` tokens, padding
        included, into heads of ``capacity`` (int64 [layers, B, K]): int64 [B].

        That is what all heads hold, and what the layer that is being attended to has in hand: pages that are about to
        be freed, the new keys and values, and, where it ``decodes`` them, those that are stored. ``held`` (int64 as
        ``capacity``): what heads hold before a single pass; None: the prompt is read from its beginning. Exact for a
        prompt of a dense recipe in one pass. Where layers share a budget by what they show, the bound is that of a
        prompt of which nothing is dropped.
        """
        entries = torch.minimum(capacity, self.heads.lengths[:, None])
        if isinstance(self.policy, Cascade):
            entries = self.heads.lengths[:, None].expand_as(capacity)
        entries = entries if held is None else torch.maximum(entries, held)
        stored, longest = entries if held is None else held, int(self.heads.lengths.max())
        whole = held is None and tokens >= longest
        before = longest if decodes and not whole else 0
        total, most_in_hand = self._fixed.clone(), torch.zeros_like(self._fixed)
        for layer, rows in self._acted_on.items():
            each, past = (x[rows][:: layer.depth, :, : self.kept[layer].kv_heads] for x in (entries, stored))
            between = self._between_layers(layer, each)
            pages = (self._storing(layer, each, tokens, whole) - between).clamp(min=0).sum(2).amax(0)
            decoded = min(int(past.sum(2).max() if self._shares else past.max()), before)
            total += between.sum((0, 2))
            most_in_hand = torch.maximum(most_in_hand, pages + self._in_hand(layer, tokens, decoded))
        for layer in self.spec.layers:
            if layer.window is not None:
                total += layer.kv_heads * self.layouts[layer].open_bytes  # the first token may lie anywhere in a page
                most_in_hand = most_in_hand.clamp(min=self._in_hand(layer, tokens, min(layer.window - 1, before)))
        return total + most_in_hand

    def divided(self, policy: Policy) -> Plan:
        """The plan where ``policy`` divides the budget."""
        assert self.eviction is not None
        return self.planned(self._divided(self.eviction, policy), policy)

    def most_high(self, capacity: Tensor, high: Tensor) -> Tensor:
        """The most entries that heads of ``capacity`` may have in the higher precision, before they are cut to ``high``
        of these. Where the budget is in entries, a head has to be full first."""
        return capacity if self._allowed[0] is None else high

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
        price = self._price(eviction, policy)

        def entries(level: Tensor) -> Tensor:
            return policy.entries(level, self.heads).clamp(min=least)

        needed = price.of(entries(torch.zeros_like(self.heads.lengths)), self)
        self._require(needed, price)
        level = highest(
            lambda level: price.of(entries(level), self) <= price.allowed, policy.top(self.heads, price.most)
        )
        return price.improved(entries(level), self)

    def _price(self, eviction: Eviction, policy: Policy) -> "_Price":
        if self._allowed[0] is None:
            return self._price_in_entries(eviction, policy)
        return self._price_of_grades(policy) if policy.grades else self._price_in_bytes(eviction)

    def _price_of_grades(self, policy: Policy) -> "_Price":
        most = max(int(self.heads.lengths.max()), self.spec.max_positions or 0)
        entries = torch.arange(most + 1)[None]
        allowed = torch.tensor([bytes or 0 for bytes in self._allowed]) - self._fixed
        tiers = [(layer, layout) for layer in self._acted_on if isinstance(layout := self.layouts[layer], TieredLayout)]
        high = {layer: layout.high.most_bytes(entries) for layer, layout in tiers}
        low = {layer: layout.low.most_bytes(entries) for layer, layout in tiers}
        return _GradedPrice("bytes", most, allowed, high, {}, low, policy)

    def _price_in_bytes(self, eviction: Eviction) -> "_Price":
        longest = int(self.heads.lengths.max())
        most = max(longest, self.spec.max_positions or 0) if eviction.decode else longest
        entries = torch.arange(most + 1)
        held = torch.minimum(entries, self.heads.lengths[:, None])
        if eviction.decode or not self.empty:
            # Heads pass through smaller numbers while they grow, and blocks break: the most that they can take counts.
            held = entries[None] if eviction.decode else held
            tables = {layer: self._most(layer)(held) for layer in self._acted_on}
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

    def _bytes(self, entries: Tensor, high: Tensor | None = None) -> Tensor:
        """Bytes of full-attention layers whose heads hold ``entries`` ([layers, B, K]), ``high`` of them in the higher
        precision if it is given: int64 [B]."""
        total = torch.zeros_like(self.heads.lengths)
        for layer, rows in self._acted_on.items():
            layout = self.layouts[layer]
            if high is not None and isinstance(layout, TieredLayout):
                taken = layout.high.most_bytes(high[rows]) + layout.low.most_bytes((entries - high)[rows])
            elif self.eviction is not None and self.eviction.across_heads:
                held = torch.minimum(torch.arange(int(self.heads.lengths.max()) + 1), self.heads.lengths[:, None])
                taken = _looked_up(self._shared(layer, held), _on_average(entries[rows]))
            else:
                taken = self._cost(layer)(entries[rows][:: layer.depth, :, : self.kept[layer].kv_heads])
            total = total + taken.sum((0, 2))
        return total

    def _between_layers(self, layer: LayerSpec, entries: Tensor) -> Tensor:
        """The most bytes of heads of ``entries`` (int64 [layers, B, K]) while other layers are attended to."""
        layout = self.layouts[layer]
        if isinstance(self.policy, Cascade):
            return layout.most_bytes_storing(entries, entries)  # nothing settles until all layers have told
        if not self._shares:
            return layout.most_bytes(entries)
        held = torch.arange(int(self.heads.lengths.max().maximum(entries.max())) + 1)[None]
        return _looked_up(most_on_average(layout.most_bytes(held), held), _on_average(entries))

    def _storing(self, layer: LayerSpec, entries: Tensor, tokens: int, whole: bool) -> Tensor:
        """The most bytes of heads while a pass of ``tokens`` tokens, or the ``whole`` prompt, brings them to
        ``entries``."""
        if self._shares:
            entries = entries.sum(2, keepdim=True).expand_as(entries).minimum(self.heads.lengths.max())
        moving = entries
        if isinstance(self.layouts[layer], StoreLayout) and (whole or self.eviction is None):
            # What comes to an empty head goes straight to its format.
            moving = torch.full_like(entries, 0 if whole else tokens)
        return self.layouts[layer].most_bytes_storing(entries, moving)

    def _in_hand(self, layer: LayerSpec, new: int, past: int) -> int:
        """Bytes of the keys and values that a layer has in hand: so many new ones, and stored ones that are decoded."""
        kept = self.kept[layer]
        width = max(layer.entry_numbers, kept.entry_numbers) * self.spec.dtype.itemsize
        # Bundled layers wait for each other; what is merged, computed from inputs or fetched from the host lies beside
        # what it is made of.
        copies = layer.window is None and (
            isinstance(self.eviction, Merging) or kept is not layer or not isinstance(self.layouts[layer], StoreLayout)
        )
        return width * (new + past) * (1 + 2 * layer.depth if copies else 1)

    @cached_property
    def _shares(self) -> bool:
        """Whether the heads of a layer share what they may keep."""
        return self.eviction is not None and self.eviction.across_heads

    def _cost(self, layer: LayerSpec) -> Callable[[Tensor], Tensor]:
        """What one head of so many entries takes: exactly, or at most where evictions before have left the formats in
        a state that is not known."""
        layout = self.layouts[layer]
        return layout.bytes if self.empty or self.eviction is None else self._most(layer)

    def _most(self, layer: LayerSpec) -> Callable[[Tensor], Tensor]:
        """The most that one head of so many entries takes whenever the budget has to hold: at the end of prompts, and
        after steps of recipes that evict in decoding."""
        layout = self.layouts[layer]
        decodes = self.eviction is not None and self.eviction.decode
        return layout.most_bytes if decodes else layout.most_bytes_of_prompt

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
        return self._of(self.tables, self._priced(entries, planner), planner)

    def improved(self, entries: Tensor, planner: Planner) -> Tensor:
        """As many entries or more for the same price."""
        entries = entries.clone()
        for layer, rows in planner._acted_on.items():
            found = _looked_up(self.better[layer], self._priced(entries[rows], planner))
            entries[rows] = torch.where(entries[rows] > self.most, entries[rows], found)
        return entries

    def _of(self, tables: dict[LayerSpec, Tensor], entries: Tensor, planner: Planner) -> Tensor:
        total = torch.zeros_like(self.allowed)
        for layer, rows in planner._acted_on.items():
            total = total + _looked_up(tables[layer], entries[rows][:: layer.depth]).sum((0, 2))
        return total

    def _priced(self, entries: Tensor, planner: Planner) -> Tensor:
        """Heads that keep everything are paid for the tokens of the prompt."""
        length = planner.heads.lengths[:, None]
        entries = torch.where(entries == UNBOUNDED, length, entries).clamp(max=self.most)
        shared = planner.eviction is not None and planner.eviction.across_heads
        return _on_average(entries) if shared else entries


def _on_average(entries: Tensor) -> Tensor:
    """Entries [layers, B, K] as they are where the heads of a layer have equally many, rounded up."""
    return (-(-entries.sum(-1, keepdim=True) // entries.shape[-1])).expand_as(entries)


@dataclass(frozen=True, eq=False)
class _GradedPrice(_Price):
    """What entries cost where ``policy`` says how many of them are high ones: ``tables`` are those of the high ones,
    ``low`` those of the others."""

    low: dict[LayerSpec, Tensor]
    policy: Policy

    def of(self, entries: Tensor, planner: Planner) -> Tensor:
        entries = self._priced(entries, planner)
        high = self.policy.high(entries, planner.heads)
        assert high is not None
        high = planner.most_high(entries, high)
        return self._of(self.tables, high, planner) + self._of(self.low, entries - high, planner)

    def improved(self, entries: Tensor, planner: Planner) -> Tensor:
        return entries


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """[B or 1, n] at [layers, B, K] -> [layers, B, K]."""
    rows = index.transpose(0, 1).flatten(1)
    found = table.expand(rows.shape[0], -1).gather(1, rows)
    return found.view(index.shape[1], index.shape[0], index.shape[2]).transpose(0, 1)
