"""The entries of many heads that share one format: a page table, a start and a length for each head."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CacheMismatch
from ..formats import Format, Rows
from .kernels import serves
from .mirror import Mirror
from .pool import Pool
from .transfer import sent

TABLE_ENTRY = 4  # bytes of one page id in a page table
HEAD_OVERHEAD = 16  # bytes of a head's start and length
EVERY = slice(None)
_GROWTH = 1.125


@dataclass(slots=True)
class Parked:
    """The contents of a segment in host memory: its ``starts`` and ``lengths``, and the ``rows`` of its ``pages``."""

    starts: Tensor
    lengths: Tensor
    rows: Rows
    pages: int


class Segment:
    """Rows of ``heads`` heads over one pool.

    ``table`` is int32 [heads, width] of page ids, ``starts`` and ``lengths`` int64 [heads] in tokens, all on the host.
    The tokens of a head lie at ``starts .. starts + lengths`` of its pages; start is below the page size. Heads are
    named by a slice or an int64 tensor ``heads``; data of R heads has R as its first dimension. They are those of
    ``layers``, numbered (layer, sequence, KV head): where the format shares something among a layer's sequences, heads
    refer to it.
    """

    def __init__(self, pool: Pool, heads: int, layers: Sequence[int] = (0,)):
        self.pool, self.format, self.unit = pool, pool.format, pool.format.unit
        self._room = torch.zeros((heads, 0), dtype=torch.int32)  # the table, and columns that it may take
        self.table = self._room
        self.starts = torch.zeros(heads, dtype=torch.int64)
        self.lengths = torch.zeros(heads, dtype=torch.int64)
        self.state = {
            name: torch.zeros((heads, *shape), dtype=dtype, device=pool.arena.device)
            for name, (shape, dtype) in self.format.state.items()
        }
        self._shared = {name: tensor.flatten(0, 1) for name, tensor in pool.of_layers(layers).items()}
        self._row_shared = torch.zeros(0, dtype=torch.int64)  # each head's row of what is shared
        if self._shared:
            kv_heads = next(iter(pool.of_layers(layers).values())).shape[1]
            each = torch.arange(len(layers) * kv_heads).view(len(layers), 1, kv_heads)
            self._row_shared = each.repeat(1, heads // each.numel(), 1).flatten().to(pool.arena.device)
        self._device_pages: dict[tuple[int, int, int], Tensor] = {}
        self._span: tuple[int, int] | None = None  # start and length, where known to be the same for all heads
        self._mirror: Mirror | None = None  # where a kernel has asked for it

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages these heads refer to, a page that several of them share counted once."""
        pages = self.table[torch.arange(self.table.shape[1]) < self._held(slice(None))[:, None]]
        return (pages.unique().numel() if self.pool.shared else pages.numel()) * self.pool.page_bytes

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes of starts, lengths, states and the part of the page table that is in use."""
        return self.pages_held(slice(None)) * TABLE_ENTRY + self._head_bytes

    @property
    def reserved_bookkeeping_bytes(self) -> int:
        """Bytes of starts, lengths, states, the page table with room for its longest head, and the mirror."""
        mirrored = self._mirror.nbytes if self._mirror else 0
        return self._room.numel() * TABLE_ENTRY + self._head_bytes + mirrored

    def mirror(self) -> Mirror:
        """Table, starts and lengths on the device, up to date. The first call makes them."""
        if self._mirror is None:
            self._mirror = Mirror(self.pool.device, self.lengths.numel())
        self._mirror.update(self.table, self.starts, self.lengths)
        return self._mirror

    @property
    def shared(self) -> tuple[Rows, Tensor]:
        """What layers share, tensors of [rows, *shape], and each head's row of it (int64 [heads])."""
        return self._shared, self._row_shared

    @property
    def bound(self) -> list[Tensor]:
        """What ``format_of`` reads, at addresses that stay."""
        return [*self.state.values(), *self._shared.values(), self._row_shared]

    # -- growing ------------------------------------------------------------------------------------------------

    def pages_to_extend(self, heads: slice | Tensor, counts: Tensor) -> int:
        """Pages that ``extend`` would allocate, copies of shared open pages included."""
        ends = self.starts[heads] + self.lengths[heads]
        needed = int((self._pages_of(ends + counts) - self._held(heads)).sum())
        return needed + self._shared_open(heads, counts)[0].numel()

    def pages_held(self, heads: slice | Tensor) -> int:
        """Pages in these heads' tables."""
        return int(self._held(heads).sum())

    def pages_shared(self, heads: slice | Tensor) -> int:
        """Pages of these heads that others refer to too: as many may have to be copied when the heads are written."""
        if not self.pool.shared:
            return 0
        held = torch.arange(self.table.shape[1]) < self._held(heads)[:, None]
        return int((self.pool.references[self.table[heads][held].long()] > 1).sum())

    def extend(self, heads: slice | Tensor, counts: Tensor) -> None:
        """Lengthens each head by ``counts`` tokens (int64 [R], multiples of the unit), to be written by ``write``."""
        owners, columns = self._shared_open(heads, counts)
        ids = self.ids(heads)
        ends = self.starts[heads] + self.lengths[heads]
        held = self._held(heads)
        needed = self._pages_of(ends + counts) - held
        total = int(needed.sum())
        pages = self.pool.allocate(total + owners.numel())
        self._resize(heads, self.lengths[heads] + counts)
        if not total and not owners.numel():
            return
        self._replace_shared(owners, columns, pages[total:])
        self._widen(int((held + needed).max()))
        row, place = torch.nonzero(torch.arange(int(needed.max())) < needed[:, None], as_tuple=True)
        self._set_pages(ids[row], held[row] + place, pages[:total])

    def retract(self, heads: slice | Tensor) -> None:
        """Takes back the last token of each head, which was not written."""
        left = self.lengths[heads] - 1
        self._free_beyond(heads, torch.where(left > 0, self._pages_of(self.starts[heads] + left), 0))
        self.starts[heads] = torch.where(left > 0, self.starts[heads], 0)
        self._resize(heads, left)

    def write(self, heads: slice | Tensor, first: Tensor, rows: Rows, counts: Tensor) -> None:
        """Writes units: ``rows`` are tensors of [R, units, *shape], ``first`` and ``counts`` int64 [R] in tokens."""
        units = int(counts.max()) // self.unit
        if not units:
            return
        if self.by_kernels:
            from .triton.pages import write

            plan = self.planned(heads, (self.starts[heads] + first) // self.unit, counts // self.unit)
            write(self.pool.tensors, rows, self.mirror(), plan, units)
            return
        slots = self._slots(heads, first, units * self.unit)[:, :: self.unit] // self.unit
        if bool((counts == counts[0]).all()):
            index = slots.flatten().to(self.pool.device)
            for name, new in rows.items():
                self.pool.write(name, index, new[:, :units].flatten(0, 1))
            return
        valid = torch.arange(units) < (counts // self.unit)[:, None]
        index, mask = slots[valid].to(self.pool.device), valid.to(self.pool.arena.device)
        for name, new in rows.items():
            self.pool.write(name, index, new[:, :units][mask])

    def append(self, heads: slice | Tensor, rows: Rows, counts: Tensor) -> None:
        """``extend`` and ``write``: ``rows`` are tensors of [R, units, *shape], ``counts`` int64 [R] in tokens."""
        first = self.lengths[heads].clone()
        self.extend(heads, counts)
        self.write(heads, first, rows, counts)

    def next_slots(self, heads: slice | Tensor) -> Tensor:
        """Flat slots of the last token of each head, int64 [R] on the device (unit 1; no meaning for empty heads)."""
        return sent(self._slots(heads, (self.lengths[heads] - 1).clamp(min=0), 1).flatten(), self.pool.device)

    def put(self, slots: Tensor, rows: Rows, channels: slice = EVERY) -> None:
        """Writes one token a head at flat ``slots``: tensors of [R, *shape], or ``channels`` of the last dimension. The
        fast way of decoding."""
        for name, new in rows.items():
            self.pool.tensors[name].flatten(0, 1)[..., channels].index_copy_(0, slots, new)

    # -- reading ------------------------------------------------------------------------------------------------

    def read(self, heads: slice | Tensor, limit: int | None = None, names: Collection[str] | None = None) -> Rows:
        """The units of each head, oldest first: tensors of [R, units, *shape], padded to the longest head.

        ``limit``: only so many tokens from the front (a multiple of the unit); ``names``: only these tensors.
        """
        first, longest = self.span(heads)
        longest = longest if limit is None else min(longest, limit)
        count = heads.stop - heads.start if isinstance(heads, slice) else heads.numel()
        if not longest:
            empty = {n: t.new_empty((count, 0, *t.shape[2:])) for n, t in self.pool.tensors.items()}
            return {name: rows.to(self.pool.arena.device) for name, rows in empty.items()}
        units = longest // self.unit
        reach = self._reach(heads)
        if limit is not None:
            reach = min(reach, int(self.starts[heads].max()) + longest)
        pages = self._pages(heads, reach)
        out = {}
        for name in names or self.pool.tensors:
            tensor = self.pool.tensors[name]
            read = self.pool.selected(name, pages, pages=True).view(
                count, pages.numel() // count * tensor.shape[1], *tensor.shape[2:]
            )
            if first is None:
                out[name] = _shifted(read, self.starts[heads] // self.unit, units)
            else:
                out[name] = read[:, first // self.unit : first // self.unit + units]
        return out

    def span(self, heads: slice | Tensor) -> tuple[int | None, int]:
        """The start that these heads have in common (None: they differ) and the longest length."""
        if self._span is not None:
            return self._span
        starts, lengths = self.starts[heads], self.lengths[heads]
        if not starts.numel():
            return 0, 0
        return (int(starts[0]) if bool((starts == starts[0]).all()) else None), int(lengths.max())

    def settle_span(self) -> None:
        """Notes whether all heads now have one start and one length, which makes reading them cheap."""
        even = (
            self.lengths.numel() and (self.starts == self.starts[0]).all() and (self.lengths == self.lengths[0]).all()
        )
        self._span = (int(self.starts[0]), int(self.lengths[0])) if even else None

    def decode(self, heads: slice | Tensor, limit: int | None = None, channels: slice = EVERY) -> Tensor:
        """The tokens of each head as vectors, [R, longest, size], in the model's dtype; ``limit`` as in ``read``,
        ``channels`` as in ``Format.decode_channels``."""
        return self.format_of(heads).decode_channels(self.read(heads, limit), channels)

    def read_at(self, heads: slice | Tensor, index: Tensor, names: Collection[str] | None = None) -> Rows:
        """Units ``index`` (int64 [R, u] on the device; the last one of a head stands for those beyond it) alone:
        tensors of [R, u, *shape]."""
        index = self._within(heads, index, self.unit).to(self.pool.device)
        place = sent(self.starts[heads] // self.unit, index.device)[:, None] + index
        pages = self._pages(heads, self._reach(heads)).view(index.shape[0], -1)
        slots = pages.gather(1, place // self.pool.units) * self.pool.units + place % self.pool.units
        rows = {name: self.pool.selected(name, slots.flatten()) for name in names or self.pool.tensors}
        return {name: x.view(*index.shape, *x.shape[1:]) for name, x in rows.items()}

    def read_parts(self, heads: Tensor, tokens: Tensor, parts: Tensor, of: int) -> Tensor:
        """Of dense vectors of ``of`` equal parts, part ``parts`` of token ``tokens`` of head ``heads`` (int64 [n] each,
        on the host): [n, size / of]."""
        place = self.starts[heads] + tokens
        page = self.table[heads, place // self.pool.page_size].long()
        slots = page * self.pool.page_size + place % self.pool.page_size
        return self.pool.selected("x", sent(slots * of + parts, self.pool.device), parts=of)

    def decode_at(self, heads: slice | Tensor, index: Tensor) -> Tensor:
        """Tokens ``index`` (int64 [R, m] on the device, as in ``read_at``) as vectors [R, m, size]. Only their units
        are read and decoded, each once."""
        if self.unit == 1:
            return self.format_of(heads).decode(self.read_at(heads, index))
        index = self._within(heads, index, 1)
        units = index // self.unit
        touched = units.new_zeros((units.shape[0], self.span(heads)[1] // self.unit), dtype=torch.bool)
        touched.scatter_(1, units, True)
        rank = touched.cumsum(1)
        some = (~touched).byte().argsort(dim=1, stable=True)[:, : int(rank[:, -1].max())]
        x = self.format_of(heads).decode(self.read_at(heads, some))
        return pick(x, (rank.gather(1, units) - 1) * self.unit + index % self.unit)

    # -- encoding -----------------------------------------------------------------------------------------------

    def observe(self, heads: slice | Tensor, x: Tensor, counts: Tensor, queries: Tensor, marked: Tensor) -> None:
        """Makes the state of heads that are empty: what they will hold is encoded by it (see ``Format.observe`` and
        ``Format.exempt``)."""
        queries = queries[:, :, max(queries.shape[2] - self.format.watched, 0) :]
        empty = sent(self.lengths[heads] == 0, x.device)
        state = self.format.observe(x, within(counts, x.shape[1], x.device), queries) | self.format.exempt(x, marked)
        for name, new in state.items():
            old = self.state[name]
            old[heads] = torch.where(empty.view(-1, *[1] * (new.dim() - 1)), new, old[heads])

    def format_of(self, heads: slice | Tensor) -> Format:
        """The format, bound to the states of these heads and to what their layers share."""
        if not (self.state or self._shared):
            return self.format
        at = heads if isinstance(heads, slice) else sent(heads, self.pool.arena.device)
        shared = {name: tensor[self._row_shared[at]] for name, tensor in self._shared.items()}
        return self.format.given({name: state[at] for name, state in self.state.items()} | shared)

    def pages_to_grow(self, heads: slice | Tensor) -> int:
        """The most pages that ``grow`` can allocate."""
        return self.pages_shared(heads) if self.format.grows else 0

    def grow(self, heads: slice | Tensor, x: Tensor, counts: Tensor) -> None:
        """Before the first ``counts`` of tokens ``x`` ([R, n, size]) are encoded: brings the state of a format that
        grows up to date with them, and encodes anew what lies in heads whose state has changed."""
        if not self.format.grows:
            return
        held = within(counts, x.shape[1], x.device)
        old = {name: state[heads] for name, state in self.state.items()}
        new = self.format.grown(old, x, held)
        changed = torch.stack([(new[name] != old[name]).flatten(1).any(1) for name in new]).any(0).cpu()
        again = self.ids(heads)[changed & (self.lengths[heads] > 0)]
        vectors = self.decode(again) if again.numel() else x
        for name, state in new.items():
            self.state[name][heads] = state
        if again.numel():
            self._own(again)
            lengths = self.lengths[again]
            self.write(again, torch.zeros_like(lengths), self.encode(again, vectors), lengths)

    def encode(self, heads: slice | Tensor, x: Tensor) -> Rows:
        """Tokens of these heads ([R, tokens, size]) in the format."""
        return self.format_of(heads).encode(x)

    # -- shrinking and changing ---------------------------------------------------------------------------------

    def rewrite(self, heads: slice | Tensor, rows: Rows, counts: Tensor) -> None:
        """Replaces all tokens of each head by ``rows`` ([R, units, *shape], ``counts`` tokens), freeing the rest."""
        self._own(heads)
        keep = torch.minimum(self._pages_of(counts), self._held(heads))
        self._free_beyond(heads, keep)
        self.starts[heads] = 0
        self._resize(heads, torch.minimum(counts, keep * self.pool.page_size))
        self.extend(heads, counts - self.lengths[heads])
        self.write(heads, torch.zeros_like(counts), rows, counts)

    def take(self, heads: slice | Tensor, index: Tensor, counts: Tensor, ordered: bool = False) -> None:
        """Keeps tokens ``index`` (int64 [R, m] on the device, distinct, the first ``counts`` of each row valid).

        Formats whose unit is one token are moved bit by bit, by kernels in place where they are ``ordered``, that is
        ascending. Where tokens share scales, units that stay whole and in order are moved bit by bit too, and the
        others are encoded anew.
        """
        if not int(counts.max()):
            self.free(heads)
            return
        if self.unit == 1:
            if ordered and self.by_kernels:
                self._compact(heads, index, counts)
            else:
                self.rewrite(heads, self.read_at(heads, index), counts)
            return
        old, fmt = self.read(heads), self.format_of(heads)
        new = fmt.encode(pick(fmt.decode(old), index))
        groups = index.unflatten(1, (-1, self.unit))
        whole = groups[..., :1] // self.unit * self.unit + torch.arange(self.unit, device=index.device)
        same = (groups == whole).all(-1)
        source = groups[..., 0] // self.unit
        rows = {name: torch.where(_expand(same, t), pick(old[name], source), t) for name, t in new.items()}
        self.rewrite(heads, rows, counts)

    def drop(self, heads: slice | Tensor, counts: Tensor, source: Tensor, target: Tensor) -> None:
        """Removes ``counts`` tokens (int64 [R]) of each head, unit-1 rows, in place: ``source`` are those of the last
        ones that stay and ``target`` the holes that they move into, as ``refills`` gives them."""
        self._own_tokens(heads, target)
        if self.by_kernels:
            from .triton.pages import move

            move(self.pool.tensors, source, target, self.mirror(), self.planned(heads, self.starts[heads]))
        else:
            self._move(heads, source, target)
        remaining = self.lengths[heads] - counts
        self._free_beyond(heads, torch.where(remaining > 0, self._pages_of(self.starts[heads] + remaining), 0))
        self.starts[heads] = torch.where(remaining > 0, self.starts[heads], 0)
        self._resize(heads, remaining)

    def pop_front(self, heads: slice | Tensor, counts: Tensor) -> None:
        """Removes the oldest ``counts`` tokens of each head (int64 [R]); pages are freed as they empty."""
        ids = self.ids(heads)
        starts = self.starts[ids] + counts
        lengths = self.lengths[ids] - counts
        held = self._held(ids)
        gone = torch.where(lengths > 0, starts // self.pool.page_size, held)
        self.starts[ids] = torch.where(lengths > 0, starts % self.pool.page_size, 0)
        self._resize(ids, lengths)
        if not int(gone.sum()):
            return
        columns = torch.arange(self.table.shape[1])
        table = self.table[ids]
        self.pool.release(table[columns < gone[:, None]])
        source = (columns + gone[:, None]).clamp(max=self.table.shape[1] - 1)
        row, column = torch.nonzero((columns < (held - gone)[:, None]) & (gone > 0)[:, None], as_tuple=True)
        self._set_pages(ids[row], column, table.gather(1, source)[row, column])

    def overwrite(self, heads: slice | Tensor, x: Tensor, touched: Tensor) -> None:
        """Encodes anew, from ``x`` ([R, longest, size]), units with a ``touched`` token (bool [R, longest])."""
        self._own(heads)
        old, counts = self.read(heads), self.lengths[heads]
        new = self.encode(heads, x)
        units = touched.unflatten(1, (-1, self.unit)).any(2)
        rows = {name: torch.where(_expand(units, t), t, old[name]) for name, t in new.items()}
        self.write(heads, torch.zeros_like(counts), rows, counts)

    def set(self, heads: slice | Tensor, rows: Rows) -> None:
        """Overwrites some of the tensors of all tokens of each head by ``rows`` ([R, longest, *shape]; unit 1)."""
        self._own(heads)
        first, longest = self.span(heads)
        lengths = self.lengths[heads]
        if self.by_kernels or first is None or not bool((lengths == longest).all()):
            self.write(heads, torch.zeros_like(lengths), rows, lengths)
            return
        # Heads that are alike write whole pages, whose ids are on the device already; nothing else lies in them.
        pages = self._pages(heads, first + longest)
        for name, new in rows.items():
            tensor = self.pool.tensors[name]
            whole = new.new_zeros(new.shape[0], pages.numel() // new.shape[0] * self.pool.page_size, *new.shape[2:])
            whole[:, first : first + longest] = new
            tensor.index_copy_(0, pages, whole.view(-1, *tensor.shape[1:]))

    def share(self, heads: slice | Tensor, source: "Segment", source_heads: slice | Tensor) -> None:
        """Gives empty ``heads`` the tokens of ``source_heads`` by reference; whoever writes first copies the page."""
        if source.pool is not self.pool:
            raise CacheMismatch("segments share pages only within one pool: use the same arena and format")
        if int(self.lengths[heads].sum()):
            raise CacheMismatch("sharing needs empty heads: free them first")
        ids, others = self.ids(heads), source.ids(source_heads)
        width = source.table.shape[1]
        self._widen(width)
        self.starts[ids] = source.starts[others]
        self._resize(ids, source.lengths[others])
        row, column = torch.nonzero(torch.arange(width) < self._held(ids)[:, None], as_tuple=True)
        pages = source.table[others[row], column]
        self._set_pages(ids[row], column, pages)
        self.pool.share(pages)
        for name, state in self.state.items():
            state[ids] = source.state[name][others]

    def adopt(self, heads: slice | Tensor, source: "Segment", source_heads: slice | Tensor) -> None:
        """Moves the tokens of ``source_heads``, which are empty afterwards, to empty ``heads``; ``source`` may be this
        segment. Tables move; pages and their reference counts stay as they are."""
        if source.pool is not self.pool:
            raise CacheMismatch("segments hand over pages only within one pool: use the same arena and format")
        ids, others = self.ids(heads), source.ids(source_heads)
        if not ids.numel():
            return
        held = source._held(others)
        self._widen(int(held.max()))
        row, column = torch.nonzero(torch.arange(int(held.max())) < held[:, None], as_tuple=True)
        self._set_pages(ids[row], column, source.table[others[row], column])
        self.starts[ids] = source.starts[others]
        self._resize(ids, source.lengths[others])
        for name, state in self.state.items():
            state[ids] = source.state[name][others]
        source.starts[others] = 0
        source._resize(others, torch.zeros_like(others))
        source._device_pages.clear()

    def park(self) -> Parked:
        """Moves the pages of all heads to host memory; the heads are empty until ``unpark``."""
        held = torch.arange(self.table.shape[1]) < self._held(slice(None))[:, None]
        pages = self.table[held].long().to(self.pool.device)
        rows = {name: self.pool.selected(name, pages, pages=True).cpu() for name in self.pool.tensors}
        parked = Parked(self.starts.clone(), self.lengths.clone(), rows, pages.numel())
        self.free(slice(None))
        return parked

    def unpark(self, parked: Parked) -> None:
        """Puts back, bit by bit, what ``park`` took from these heads."""
        self.starts = parked.starts
        self._resize(slice(None), parked.lengths)
        held = torch.arange(self.table.shape[1]) < self._held(slice(None))[:, None]
        pages = self.pool.allocate(parked.pages)
        row, column = torch.nonzero(held, as_tuple=True)
        self._set_pages(row, column, pages)
        units = (pages.long()[:, None] * self.pool.units + torch.arange(self.pool.units)).flatten()
        for name, rows in parked.rows.items():
            self.pool.write(name, units.to(self.pool.device), rows.flatten(0, 1).to(self.pool.arena.device))

    def free(self, heads: slice | Tensor) -> None:
        """Gives every page of these heads back."""
        self._free_beyond(heads, torch.zeros_like(self.lengths[heads]))
        self.starts[heads] = 0
        self._resize(heads, torch.zeros_like(self.lengths[heads]))

    # -- kernels ------------------------------------------------------------------------------------------------

    @property
    def by_kernels(self) -> bool:
        """Whether kernels read and write these pages, and find them in the mirror."""
        return self.pool.tier == "device" and serves(self.pool.device)

    def planned(self, heads: slice | Tensor, *numbers: Tensor) -> Tensor:
        """What kernels must know of these heads: their ids, then ``numbers`` (int64 [R] each), int32 [n, R] on the
        device."""
        return sent(torch.stack([self.ids(heads), *numbers]).int(), self.pool.device)

    # -- inside -------------------------------------------------------------------------------------------------

    def _compact(self, heads: slice | Tensor, index: Tensor, counts: Tensor) -> None:
        """``take`` of ascending tokens, in place."""
        from .triton.pages import compact

        self._own(heads)
        compact(self.pool.tensors, index, self.mirror(), self.planned(heads, self.starts[heads], counts))
        self._free_beyond(heads, self._pages_of(counts))
        self.starts[heads] = 0
        self._resize(heads, counts)

    def _move(self, heads: slice | Tensor, source: Tensor, target: Tensor) -> None:
        """Copies tokens ``source`` of each head to where ``target`` lie (int64 [R, m] each, -1: none)."""
        valid = source >= 0
        rows = torch.arange(source.shape[0], device=source.device)[:, None].expand_as(source)[valid]
        pages = self._pages(heads, self._reach(heads)).view(source.shape[0], -1)
        starts = sent(self.starts[heads], source.device)[rows]
        old, new = (
            pages[rows, place // self.pool.page_size] * self.pool.page_size + place % self.pool.page_size
            for place in (starts + source[valid], starts + target[valid])
        )
        for tensor in self.pool.tensors.values():
            flat = tensor.flatten(0, 1)
            flat[new] = flat[old]

    def _within(self, heads: slice | Tensor, index: Tensor, unit: int) -> Tensor:
        """Places in units of ``unit`` tokens, the last one of a head in place of those beyond it."""
        return index.minimum(sent((self.lengths[heads] // unit - 1).clamp(min=0), index.device)[:, None])

    def ids(self, heads: slice | Tensor) -> Tensor:
        return torch.arange(self.lengths.numel())[heads] if isinstance(heads, slice) else heads

    @property
    def _head_bytes(self) -> int:
        return self.lengths.numel() * (HEAD_OVERHEAD + self.format.state_bytes)

    def _resize(self, heads: slice | Tensor, lengths: Tensor) -> None:
        self.lengths[heads] = lengths
        self._span = None
        if self._mirror:
            self._mirror.note_spans()

    def _set_pages(self, ids: Tensor, columns: Tensor, pages: Tensor) -> None:
        """Puts ``pages`` at (ids, columns) of the table, int64 [n] each."""
        self.table[ids, columns] = pages
        self._device_pages.clear()
        if self._mirror:
            self._mirror.note_pages(ids, columns)

    def _reach(self, heads: slice | Tensor) -> int:
        """Tokens from the first slot of the first page to the last token, for the head that reaches furthest."""
        if self._span is not None:
            return sum(self._span)
        return int((self.starts[heads] + self.lengths[heads]).max())

    def _held(self, heads: slice | Tensor) -> Tensor:
        """Pages of each head (an empty head starts at 0, so it holds none)."""
        return self._pages_of(self.starts[heads] + self.lengths[heads])

    def _pages_of(self, tokens: Tensor) -> Tensor:
        return (tokens + self.pool.page_size - 1) // self.pool.page_size

    def _slots(self, heads: slice | Tensor, first: Tensor, count: int) -> Tensor:
        """Flat token slots of tokens first .. first + count, int64 [R, count] on the host (clamped to the table)."""
        place = (self.starts[heads] + first)[:, None] + torch.arange(count)
        column = (place // self.pool.page_size).clamp(max=self.table.shape[1] - 1)
        return self.table[self.ids(heads)[:, None], column].long() * self.pool.page_size + place % self.pool.page_size

    def _pages(self, heads: slice | Tensor, tokens: int) -> Tensor:
        """Page ids of the first ``tokens`` of each head, int64 [R * pages] on the device; cached for slices."""
        width = -(-tokens // self.pool.page_size)
        key = (heads.start, heads.stop, width) if isinstance(heads, slice) else None
        if key is not None and key in self._device_pages:
            return self._device_pages[key]
        held, table = self._held(heads), self.table
        if self.by_kernels:
            held, table = sent(held, self.pool.device), self.mirror().table
            heads = heads if isinstance(heads, slice) else sent(heads, self.pool.device)
        table = table[heads, :width].long()
        # Beyond a short head's pages its own first page is read and masked: the table's old ids mean nothing there.
        own = torch.arange(width, device=table.device) < held[:, None]
        table = torch.where(own, table, table[:, :1].clamp(max=self.pool.capacity - 1))
        pages = table.flatten() if self.by_kernels else sent(table.flatten(), self.pool.device)
        if key is not None:
            self._device_pages[key] = pages
        return pages

    def _widen(self, width: int) -> None:
        before = self.table.shape[1]
        if width <= before:
            return
        if width > self._room.shape[1]:
            room = max(width, int(before * _GROWTH))
            self._room = torch.nn.functional.pad(self.table, (0, room - before))
        self.table = self._room[:, :width]

    def _free_beyond(self, heads: slice | Tensor, keep: Tensor) -> None:
        """Releases every page of a head after its first ``keep``."""
        ids, held = self.ids(heads), self._held(heads)
        some = torch.nonzero(held > keep).flatten()
        if not some.numel():
            return
        ids, held, keep = ids[some], held[some], keep[some]
        columns = torch.arange(int(keep.min()), int(held.max()))
        self.pool.release(self.table[ids[:, None], columns][(columns >= keep[:, None]) & (columns < held[:, None])])
        self._device_pages.clear()

    def _shared_open(self, heads: slice | Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Heads (and table columns) whose open page is shared and about to be written."""
        nothing = torch.zeros(0, dtype=torch.int64)
        if not self.pool.shared:
            return nothing, nothing
        ids = self.ids(heads)
        ends = self.starts[ids] + self.lengths[ids]
        ids = ids[(ends % self.pool.page_size > 0) & (counts > 0)]
        column = (self.starts[ids] + self.lengths[ids]) // self.pool.page_size
        shared = self.pool.references[self.table[ids, column].long()] > 1
        return ids[shared], column[shared]

    def _own(self, heads: slice | Tensor) -> None:
        """Copies every shared page of these heads, so that they can be written."""
        if self.pool.shared:
            self._own_pages(heads, torch.arange(self.table.shape[1]) < self._held(heads)[:, None])

    def _own_tokens(self, heads: slice | Tensor, tokens: Tensor) -> None:
        """Copies the shared pages that hold ``tokens`` (int64 [R, m] on the device, -1: none)."""
        if self.pool.shared:
            tokens = tokens.cpu()
            column = (self.starts[heads][:, None] + tokens.clamp(min=0)) // self.pool.page_size
            touched = torch.zeros(tokens.shape[0], self.table.shape[1], dtype=torch.int64)
            self._own_pages(heads, touched.scatter_add_(1, column, (tokens >= 0).long()) > 0)

    def _own_pages(self, heads: slice | Tensor, pages: Tensor) -> None:
        """Copies the shared ones among ``pages`` (bool [R, table width])."""
        ids = self.ids(heads)
        row, column = torch.nonzero(pages & (self.pool.references[self.table[ids].long()] > 1), as_tuple=True)
        self._replace_shared(ids[row], column, self.pool.allocate(row.numel()))

    def _replace_shared(self, ids: Tensor, columns: Tensor, pages: Tensor) -> None:
        """Copies the shared pages at (ids, columns) of the table to ``pages`` and refers to those instead."""
        if not ids.numel():
            return
        old = self.table[ids, columns]
        self.pool.copy_pages(old, pages)
        self._set_pages(ids, columns, pages)
        self.pool.release(old)


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """[R, n, *shape] at index [R, m] (out-of-range clamped) -> [R, m, *shape]."""
    index = index.clamp(max=rows.shape[1] - 1)
    return rows[torch.arange(rows.shape[0], device=rows.device)[:, None], index]


def joined(first: Tensor, second: Tensor, counts: Tensor, longest: int) -> Tensor:
    """Of each row the first ``counts`` (int64 [R] on the host) of ``first`` [R, n, *shape], then ``second`` [R, m,
    *shape]: [R, ``longest``, *shape] or more."""
    if not first.shape[1]:
        return second
    joint = torch.cat([first, second], 1)
    if bool((counts == first.shape[1]).all()):
        return joint
    counts = sent(counts, joint.device)[:, None]
    place = torch.arange(longest, device=joint.device)
    return pick(joint, torch.where(place < counts, place, place - counts + first.shape[1]))


def within(counts: Tensor, longest: int, device: torch.device) -> Tensor:
    """The first ``counts`` (int64 [R] on the host) of each row, bool [R, ``longest``] on ``device``."""
    return torch.arange(longest, device=device) < sent(counts, device)[:, None]


def refills(lengths: Tensor, victims: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """How the last of ``lengths`` tokens fill the holes of those that leave: the first ``counts`` (both int64 [R] on
    the host) of ``victims`` (int64 [R, e], distinct in a row).

    Gives which tokens move and where to, int64 [R, e] each, -1: none. A head costs as many moves as tokens leave at
    most, whatever its length; the order changes.
    """
    device, most = victims.device, victims.shape[1]
    left, leaving = sent(torch.stack([lengths - counts, counts]), device)[..., None]
    place = torch.arange(most, device=device)
    leaves = place < leaving
    stays = torch.ones((victims.shape[0], most + 1), dtype=torch.bool, device=device)
    stays.scatter_(1, torch.where(leaves & (victims >= left), victims - left, most), False)
    source = torch.where(stays[:, :most] & leaves, left + place, -1)
    target = torch.where(leaves & (victims < left), victims, -1)
    return source.sort(1, descending=True).values, target.sort(1, descending=True).values


def _shifted(rows: Tensor, starts: Tensor, count: int) -> Tensor:
    """Row r from starts[r] on: [R, n, *shape] -> [R, count, *shape]."""
    return pick(rows, sent(starts, rows.device)[:, None] + torch.arange(count, device=rows.device))


def _expand(mask: Tensor, like: Tensor) -> Tensor:
    """[R, units] as a mask for [R, units, *shape]."""
    return mask.view(*mask.shape, *[1] * (like.dim() - 2))
