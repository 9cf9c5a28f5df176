"""Pages: fixed numbers of slots in a few big tensors, handed out and taken back by integer arithmetic."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from ..errors import OutOfMemory
from ..formats import Format, Rows
from .transfer import sent

# Bookkeeping per page: its place on the free list and its reference count.
PAGE_OVERHEAD = 8
_GROWTH = 1.125

Tier = Literal["device", "host"]


class Pool:
    """The pages of one format on one device.

    A page holds ``page_size`` tokens of ONE head as ``page_size / unit`` units; ``tensors[name]`` has the shape
    [capacity, units a page, *unit shape]. Free list and reference counts are integer tensors on the host, because the
    control plane decides there what is allocated; only page ids travel to the device.
    """

    tier: Tier = "device"

    def __init__(self, fmt: Format, page_size: int, device: torch.device, arena: "Arena"):
        assert page_size % fmt.unit == 0
        self.format, self.page_size, self.device, self.arena = fmt, page_size, device, arena
        self.units = page_size // fmt.unit
        self.page_bytes = self.units * fmt.unit_bytes + PAGE_OVERHEAD
        self.tensors = {
            name: torch.empty((0, self.units, *shape), dtype=dtype, device=self.device)
            for name, (shape, dtype) in fmt.layout.items()
        }
        self.references = torch.zeros(0, dtype=torch.int32)
        self._free = torch.zeros(0, dtype=torch.int32)
        self._free_count = 0
        self.shared = 0  # pages with more than one owner
        self._of_layers: dict[tuple[int, ...], Rows] = {}

    @property
    def capacity(self) -> int:
        return self.references.numel()

    @property
    def used(self) -> int:
        """Pages in use, shared ones counted once."""
        return self.capacity - self._free_count

    @property
    def bytes(self) -> int:
        """Bytes of the pages in use, their bookkeeping included."""
        return self.used * self.page_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all tensors of the pool, free pages included."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values()) + self.capacity * PAGE_OVERHEAD

    def of_layers(self, numbers: Sequence[int]) -> Rows:
        """What the format shares among the sequences of these layers, [layers, KV heads, *shape], once for all."""
        key = tuple(numbers)
        if key not in self._of_layers:
            self._of_layers[key] = {n: t[list(key)].to(self.arena.device) for n, t in self.format.shared.items()}
        return self._of_layers[key]

    def allocate(self, count: int) -> Tensor:
        """``count`` page ids, int32 [count], with one reference each. Raises OutOfMemory before anything changes."""
        if not count:
            return self._free[:0]
        self.arena.require({self: count})
        self.reserve(count)
        self._free_count -= count
        pages = self._free[self._free_count : self._free_count + count].clone()
        self.references[pages.long()] = 1
        self.arena.note_peak()
        return pages

    def release(self, pages: Tensor) -> None:
        """Takes back one reference of each page in ``pages`` (ids may repeat); unreferenced pages become free."""
        if not pages.numel():
            return
        pages = pages.long()
        if self.shared:
            before = self.references[pages.unique()]
            self.references.index_add_(0, pages, torch.full_like(pages, -1, dtype=torch.int32))
            pages = pages.unique()
            now = self.references[pages]
            self.shared -= int(((before > 1) & (now <= 1)).sum())
            pages = pages[now == 0]
        else:
            self.references[pages] = 0
        self._free[self._free_count : self._free_count + pages.numel()] = pages.to(torch.int32)
        self._free_count += pages.numel()

    def share(self, pages: Tensor) -> None:
        """Adds one reference to each page in ``pages`` (ids may repeat)."""
        pages = pages.long()
        unique = pages.unique()
        before = self.references[unique]
        self.references.index_add_(0, pages, torch.ones_like(pages, dtype=torch.int32))
        self.shared += int(((before == 1) & (self.references[unique] > 1)).sum())

    def selected(self, name: str, index: Tensor, pages: bool = False, parts: int = 1) -> Tensor:
        """Units at flat places ``index`` (int64 [n], where the pool is) of one of its tensors, or with ``pages`` whole
        pages, or of units of ``parts`` equal parts some of these, on the device that computes."""
        return self._rows(name, pages, parts).index_select(0, index)

    def write(self, name: str, index: Tensor, units: Tensor) -> None:
        """Writes units ([n, *unit shape]) at flat places ``index`` of one of its tensors."""
        self.tensors[name].flatten(0, 1).index_copy_(0, index, units)

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copies the contents of pages ``source`` to pages ``target`` (int32 or int64 [n] each)."""
        source, target = (sent(pages.long(), self.device) for pages in (source, target))
        for tensor in self.tensors.values():
            tensor[target] = tensor[source]

    def reserve(self, count: int) -> None:
        """Makes room for ``count`` more pages, so that allocating them moves nothing."""
        missing = count - self._free_count
        if missing <= 0:
            return
        old = self.capacity
        new = max(old + missing, int(old * _GROWTH))
        new = max(old + missing, min(new, self.arena.affordable(self)))
        for name, tensor in self.tensors.items():
            # Zeros, because slots beyond a head's last entry are read and masked: they must be finite.
            grown = self._zeros((new, *tensor.shape[1:]), tensor.dtype)
            grown[:old] = tensor
            self.tensors[name] = grown
        self.references = torch.cat([self.references, torch.zeros(new - old, dtype=torch.int32)])
        free = torch.empty(new, dtype=torch.int32)
        free[: new - old] = torch.arange(old, new, dtype=torch.int32)
        free[new - old : new - old + self._free_count] = self._free[: self._free_count]
        self._free, self._free_count = free, self._free_count + new - old

    def _rows(self, name: str, pages: bool, parts: int) -> Tensor:
        tensor = self.tensors[name]
        if pages:
            return tensor
        return tensor.flatten(0, 1) if parts == 1 else tensor.unflatten(-1, (parts, -1)).flatten(0, 2)

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


class HostPool(Pool):
    """A pool in the host's memory, pinned where a CUDA device computes.

    What is read is gathered here and copied to the device; what is written is copied here first. With CUDA neither
    waits for the device: rows on their way here are put in their places before anything is read, moved or copied.
    """

    tier = "host"

    def __init__(self, fmt: Format, page_size: int, device: torch.device, arena: "Arena"):
        self._pinned = device.type == "cuda"
        self._computes = device
        self._arriving: list[tuple[str, Tensor, Tensor, torch.cuda.Event]] = []
        super().__init__(fmt, page_size, torch.device("cpu"), arena)

    def selected(self, name: str, index: Tensor, pages: bool = False, parts: int = 1) -> Tensor:
        self._arrive()
        if not self._pinned:
            return super().selected(name, index, pages, parts)
        tensor = self._rows(name, pages, parts)
        staged = torch.empty((index.numel(), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
        torch.index_select(tensor, 0, index, out=staged)
        return staged.to(self._computes, non_blocking=True)

    def write(self, name: str, index: Tensor, units: Tensor) -> None:
        if not self._pinned:
            super().write(name, index, units)
            return
        staged = torch.empty(units.shape, dtype=units.dtype, pin_memory=True)
        staged.copy_(units, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._arriving.append((name, index, staged, event))

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        self._arrive()
        super().copy_pages(source, target)

    def reserve(self, count: int) -> None:
        self._arrive()
        super().reserve(count)

    def _arrive(self) -> None:
        """Puts rows that were on their way in their places."""
        for name, index, staged, event in self._arriving:
            event.synchronize()
            super().write(name, index, staged)
        self._arriving.clear()

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=self._pinned)


class Arena:
    """All pools of one cache or engine: one pool a format and tier, one ceiling in bytes for all of the device (None:
    no ceiling)."""

    def __init__(self, device: torch.device, page_size: int, ceiling: int | None = None):
        self.device = torch.empty(0, device=device).device  # with its number, as tensors name it
        self.page_size, self.ceiling = page_size, ceiling
        self.pools: dict[tuple, Pool] = {}
        self.peak_bytes = 0
        self._in_hand = 0

    def pool(self, fmt: Format, tier: Tier = "device") -> Pool:
        """The pool of ``fmt``, made at the first asking. Its page size is a multiple of the format's unit."""
        key = (tier, *fmt.key)
        if key not in self.pools:
            page_size = -(-self.page_size // fmt.unit) * fmt.unit
            kind = Pool if tier == "device" else HostPool
            self.pools[key] = kind(fmt, page_size, self.device, self)
        return self.pools[key]

    @property
    def bytes(self) -> int:
        """Bytes of pages on the device."""
        return sum(pool.bytes for pool in self._of("device"))

    @property
    def host_bytes(self) -> int:
        """Bytes of pages in the host's memory."""
        return sum(pool.bytes for pool in self._of("host"))

    @property
    def reserved_bytes(self) -> int:
        """Bytes that pools have taken of the device, free pages included."""
        return sum(pool.reserved_bytes for pool in self._of("device"))

    def require(self, pages: dict[Pool, int]) -> None:
        """Raises OutOfMemory unless these pages can be allocated together under the ceiling."""
        if self.ceiling is None:
            return
        pages = {pool: count for pool, count in pages.items() if pool.tier == "device"}
        asked = sum(count * pool.page_bytes for pool, count in pages.items())
        left = self.ceiling - self.bytes
        if asked > left:
            raise OutOfMemory(
                f"asked for {asked:,} bytes ({_named(pages.items())}), but only {left:,} of the ceiling of "
                f"{self.ceiling:,} bytes are left; raise the ceiling, lower the budget or free sequences"
            )

    def fill(self) -> None:
        """Takes all that the ceiling allows, in the proportions in which pools are used now, so that nothing moves
        later unless these change."""
        used = self.bytes
        if self.ceiling is None or not used:
            return
        left = self.ceiling - used
        for pool in self._of("device"):
            pool.reserve(int(left * (pool.bytes / used)) // pool.page_bytes)

    def affordable(self, pool: Pool) -> int:
        """The largest capacity that the ceiling allows ``pool``."""
        if self.ceiling is None or pool.tier == "host":
            return 2**31 - 1
        return pool.used + (self.ceiling - self.bytes) // pool.page_bytes

    def note_peak(self, transient: int = 0) -> None:
        """Remembers the most bytes held on the device at once; ``transient`` of them outside the pools just now, beside
        what is being held in hand."""
        self.peak_bytes = max(self.peak_bytes, self.bytes + self._in_hand + transient)

    @contextmanager
    def holding(self, *tensors: Tensor) -> Iterator[None]:
        """Counts ``tensors``, which are outside the pools, for the peak."""
        in_hand = sum(tensor.nbytes for tensor in tensors)
        self._in_hand += in_hand
        try:
            self.note_peak()
            yield
        finally:
            self._in_hand -= in_hand

    def _of(self, tier: Tier) -> Iterable[Pool]:
        return (pool for pool in self.pools.values() if pool.tier == tier)


def _named(items: Iterable[tuple[Pool, int]]) -> str:
    return ", ".join(f"{count} pages of {pool.format.name}" for pool, count in items if count)
