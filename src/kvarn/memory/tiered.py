"""Entries of two precisions: a head's important entries in one store, the others in a second, and perhaps the newest,
exact, in a third."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout, StoreLayout
from .pool import Arena
from .segment import EVERY, Segment, joined, pick, within
from .store import Store, by_pool, places
from .transfer import sent


@dataclass(frozen=True)
class TieredLayout(Layout):
    """Of the entries of a head, the share ``share`` is kept as ``high`` says, the others as ``low`` says.

    ``rounds_up``: a fraction of an entry counts as a high one. In decoding up to ``most_fresh`` new entries lie in
    ``fresh``, if there is one, before they become either.
    """

    high: StoreLayout
    low: StoreLayout
    share: float
    rounds_up: bool = False
    fresh: StoreLayout | None = None
    most_fresh: int = 0

    @property
    def before_rope(self) -> bool:
        return self.high.before_rope

    def count_high(self, tokens: Tensor) -> Tensor:
        """How many of so many entries are high ones."""
        # 0.29 * 100 is 28.999…
        if self.rounds_up:
            return tokens - (tokens.double() * (1 - self.share) + 1e-9).long()
        return (tokens.double() * self.share + 1e-9).long()

    def bytes(self, tokens: Tensor) -> Tensor:
        high = self.count_high(tokens)
        total = self.high.bytes(high) + self.low.bytes(tokens - high)
        return total + self.fresh.bytes(torch.zeros_like(tokens)) if self.fresh else total

    def most_bytes(self, tokens: Tensor) -> Tensor:
        if self.fresh is None:
            return self.most_bytes_of_prompt(tokens)
        # In a head that evicts, fresh entries may take the place of low ones. The most beside k pages of fresh ones is
        # where these hold least.
        first = torch.arange(0, self.most_fresh, self.fresh.page_size) + 1
        fresh = torch.cat([torch.zeros(1, dtype=torch.int64), first]).minimum(tokens[..., None])
        high = self.count_high(tokens)[..., None].minimum(tokens[..., None] - fresh)
        total = self.high.most_bytes(high) + self.low.most_bytes(tokens[..., None] - fresh - high)
        return (total + self.fresh.bytes(fresh)).amax(-1)

    def most_bytes_of_prompt(self, tokens: Tensor) -> Tensor:
        high = self.count_high(tokens)
        total = self.high.most_bytes(high) + self.low.most_bytes(tokens - high)
        return total + self.fresh.bytes(torch.zeros_like(tokens)) if self.fresh else total

    def most_bytes_storing(self, tokens: Tensor, moving: Tensor) -> Tensor:
        # Entries enter the one before they leave the other.
        layouts = [layout for layout in (self.high, self.low, self.fresh) if layout]
        return torch.stack([layout.most_bytes_storing(tokens, moving) for layout in layouts]).sum(0)

    @property
    def shared_bytes(self) -> int:
        return self.high.shared_bytes + self.low.shared_bytes

    @property
    def open_bytes(self) -> int:
        return sum(layout.open_bytes for layout in (self.high, self.low, self.fresh) if layout)


class TieredStore(Store):
    """A ``Store`` whose entries are in one of several. In decoding new ones come to ``fresh``, or to ``high`` where the
    layout has no such; ``demote`` moves them to ``low`` and what is left of ``fresh`` to ``high``.

    What is read has a head's low entries first, then the high ones, then the fresh ones.
    """

    def __init__(self, layout: TieredLayout, arena: Arena, heads: int, layers: Sequence[int] = (0,)):
        self.layout: Layout = layout
        self.arena = arena
        self.beside = {}  # what is kept for several entries together has no place in two stores
        self.high, self.low = (Store(tier, arena, heads, layers) for tier in (layout.high, layout.low))
        self.fresh = Store(layout.fresh, arena, heads, layers) if layout.fresh else None

    @property
    def stores(self) -> list[Store]:
        """In the order of reading; the last is where new entries come."""
        return [self.low, *self.upper]

    @property
    def upper(self) -> list[Store]:
        """What is not ``low``, in the order of reading."""
        return [self.high, self.fresh] if self.fresh else [self.high]

    @property
    def lengths(self) -> Tensor:
        """Entries of each head, int64 [heads] on the host."""
        return torch.stack([store.lengths for store in self.stores]).sum(0)

    @property
    def upper_lengths(self) -> Tensor:
        """Of those the ones that are not low, int64 [heads] on the host."""
        return self.lengths - self.low.lengths

    @property
    def segments(self) -> Iterator[Segment]:
        for store in self.stores:
            yield from store.segments

    # -- growing ------------------------------------------------------------------------------------------------

    def append(
        self,
        heads: slice | Tensor,
        keys: Tensor,
        values: Tensor,
        columns: Mapping[str, Tensor],
        counts: Tensor,
        low: Tensor | None = None,
    ) -> None:
        """As ``Store.append``: those in ``low`` (bool [R, n]) are low entries, the others high ones."""
        if low is None:
            self.high.append(heads, keys, values, columns, counts)
            return
        held = within(counts, keys.shape[1], keys.device)
        parts = [(store, *_packed(mask)) for store, mask in ((self.low, held & low), (self.high, held & ~low))]
        self._require([needed for store, _, chosen in parts for needed in store.pages_to_append(heads, chosen)])
        for store, index, chosen in parts:
            rows = {name: pick(column, index) for name, column in columns.items()}
            store.append(heads, pick(keys, index), pick(values, index), rows, chosen)

    def observe(
        self, heads: slice | Tensor, keys: Tensor, values: Tensor, counts: Tensor, queries: Tensor, marked: Tensor
    ) -> None:
        """As ``Store.observe``, for all of them: each sees all tokens."""
        for store in self.stores:
            store.observe(heads, keys, values, counts, queries, marked)

    def pages_to_open(self, heads: slice | Tensor) -> list[tuple[Segment, int]]:
        return self.upper[-1].pages_to_open(heads)

    def open_token(self, columns: Mapping[str, Tensor], heads: slice | Tensor | None = None) -> None:
        self.upper[-1].open_token(columns, heads)

    def retract_token(self, heads: slice | Tensor) -> None:
        self.upper[-1].retract_token(heads)

    def moved_token(self) -> None:
        self.upper[-1].moved_token()

    def put_token(
        self, heads: slice, keys: Tensor, values: Tensor, channels: tuple[slice, slice] = (EVERY, EVERY)
    ) -> None:
        self.upper[-1].put_token(heads, keys, values, channels)

    def wait(self, waits: bool) -> None:
        for store in self.stores:
            store.wait(waits)

    def settle(self, heads: slice | Tensor) -> None:
        for store in self.stores:
            store.settle(heads)

    # -- reading ------------------------------------------------------------------------------------------------

    def read(self, heads: slice | Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``Store.read``."""
        return self.read_keys(heads, index), self._read(heads, index, lambda store, at: store.values.read(heads, at))

    def read_keys(self, heads: slice | Tensor, index: Tensor | None = None) -> Tensor:
        return self._read(heads, index, lambda store, at: store.read_keys(heads, at))

    def read_channels(self, heads: slice | Tensor, keys: slice, values: slice) -> tuple[Tensor, Tensor]:
        """As ``read``, but of each key only the numbers ``keys``, of each value the numbers ``values``."""
        return (
            self._read(heads, None, lambda store, at: store.keys.read(heads, at, keys)),
            self._read(heads, None, lambda store, at: store.values.read(heads, at, values)),
        )

    def read_columns(self, heads: slice | Tensor) -> dict[str, Tensor]:
        return _columns(self.stores, heads)

    def read_upper_columns(self, heads: slice | Tensor) -> dict[str, Tensor]:
        """The columns of the entries that are not low, in the order of reading."""
        return _columns(self.upper, heads)

    def read_column(self, heads: slice | Tensor, name: str, index: Tensor | None = None) -> Tensor:
        return self._read(heads, index, lambda store, at: store.read_column(heads, name, at))

    def set_columns(self, heads: slice | Tensor, columns: Mapping[str, Tensor]) -> None:
        split = {name: _split(self.stores, heads, column) for name, column in columns.items()}
        for place, store in enumerate(self.stores):
            store.set_columns(heads, {name: parts[place] for name, parts in split.items()})

    def own_columns(self, heads: slice | Tensor) -> None:
        for store in self.stores:
            store.own_columns(heads)

    def pages_to_own_columns(self, heads: slice | Tensor) -> list[tuple[Segment, int]]:
        return [needed for store in self.stores for needed in store.pages_to_own_columns(heads)]

    # -- shrinking and changing ---------------------------------------------------------------------------------

    def demote(self, heads: slice | Tensor, chosen: Tensor, counts: Tensor | None = None) -> None:
        """Of the entries that are not low, as they are read, moves those in ``chosen`` (bool [R, n]) to ``low``, and
        fresh ones that are not to ``high``. The order of what stays may change.

        ``counts``: how many of each head are chosen (int64 [R] on the host), where the caller knows."""
        counts = counts if self.fresh is None else None  # how many of each store is not known then
        for store, mask in zip(self.upper, _split(self.upper, heads, chosen), strict=True):
            _move(heads, store, self.low, mask & _held(store, heads, mask), counts)
        if self.fresh:
            _move(heads, self.fresh, self.high, _held(self.fresh, heads, chosen))

    def keep(self, heads: slice | Tensor, mask: Tensor, counts: Tensor | None = None) -> None:
        """As ``Store.keep``, of the entries as they are read."""
        for store, part in zip(self.stores, _split(self.stores, heads, mask), strict=True):
            store.keep(heads, part & _held(store, heads, mask))

    def drop(self, heads: slice | Tensor, victims: Tensor, counts: Tensor | None = None) -> None:
        """As ``Store.drop``, of the entries as they are read."""
        stays = victims.new_zeros(victims.shape, dtype=torch.bool)
        if counts is not None:
            stays = ~within(counts, victims.shape[1], victims.device)
        everything = victims.new_ones((victims.shape[0], int(self.lengths[heads].max())), dtype=torch.bool)
        self.keep(heads, everything.scatter(1, victims, stays))

    def _read(
        self, heads: slice | Tensor, index: Tensor | None, read: Callable[[Store, Tensor | None], Tensor]
    ) -> Tensor:
        """What ``read`` gives of all stores, as the entries are read."""
        if index is None:
            return _joined(self.stores, heads, [read(store, None) for store in self.stores])
        first, found = torch.zeros_like(index), None
        for store in self.stores:
            lengths = store.lengths[heads]
            if not int(lengths.max()):
                continue
            part = read(store, (index - first).clamp(min=0))
            own = (index >= first).view(*index.shape, *[1] * (part.dim() - 2))
            found = part if found is None else torch.where(own, part, found)
            first = first + sent(lengths, index.device)[:, None]
        return read(self.high, index) if found is None else found


def leading(order: Tensor, counts: Tensor, longest: int) -> Tensor:
    """The first ``counts`` ([R] on the host) of each row of ``order`` (int64 [R, n], distinct in a row) as a mask, bool
    [R, ``longest``]."""
    chosen = within(counts, order.shape[1], order.device)
    return chosen.new_zeros((order.shape[0], longest)).scatter_(1, order, chosen)


def _move(heads: slice | Tensor, source: Store, target: Store, mask: Tensor, counts: Tensor | None = None) -> None:
    """Moves the entries in ``mask`` (bool [R, longest]), ``counts`` of each head, from one store to the other."""
    index, counts = _packed(mask, counts)
    if not index.shape[1]:
        return
    target.arena.require(by_pool(target.pages_to_append(heads, counts) + source.pages_to_change(heads)))
    names = source.columns.pool.tensors if source.columns else ()
    columns = {name: source.read_column(heads, name, index) for name in names}
    target.append(heads, *source.read(heads, index), columns, counts)
    source.drop(heads, index, counts)


def _packed(mask: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The places in ``mask`` (bool [R, n]) in order, int64 [R, the most], and how many, int64 [R] on the host, unless
    they are known."""
    counts = mask.sum(1).cpu() if counts is None else counts
    return places(mask, None, int(counts.max())), counts


def _joined(stores: list[Store], heads: slice | Tensor, parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """What was read of each store as what is read of all: [R, longest, …]."""
    whole, lengths = parts[0], stores[0].lengths[heads]
    for store, part in zip(stores[1:], parts[1:], strict=True):
        longest = int((lengths + store.lengths[heads]).max())
        whole = joined(whole, part, lengths, longest)
        lengths = lengths + store.lengths[heads]
    return whole


def _columns(stores: list[Store], heads: slice | Tensor) -> dict[str, Tensor]:
    parts = [store.read_columns(heads) for store in stores]
    return {name: _joined(stores, heads, [part[name] for part in parts]) for name in parts[0]}


def _split(stores: list[Store], heads: slice | Tensor, x: Tensor) -> list[Tensor]:
    """[R, longest, …] as read -> what belongs to each store."""
    first, parts = torch.zeros_like(stores[0].lengths[heads]), []
    for store in stores:
        lengths = store.lengths[heads]
        parts.append(pick(x, sent(first, x.device)[:, None] + torch.arange(int(lengths.max()), device=x.device)))
        first = first + lengths
    return parts


def _held(store: Store, heads: slice | Tensor, like: Tensor) -> Tensor:
    """Which of the entries that are read exist, bool [R, longest]."""
    lengths = store.lengths[heads]
    return within(lengths, int(lengths.max()), like.device)
