"""Stores for tests, what must always hold of them, and a plain Python model of what they contain."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvarn.formats import Columns, Dense, Int
from kvarn.memory import Arena, Pool, Segment, SideLayout, Store, StoreLayout

COLUMNS = {"position": torch.int32, "mass": torch.float32}
CPU = torch.device("cpu")


def dense_side(size: int, dtype: torch.dtype = torch.float32) -> SideLayout:
    fmt = Dense(size, dtype)
    return SideLayout(fmt, fmt)


def channel_side(size: int, group: int, block: int, bits: int = 8, dtype: torch.dtype = torch.float32) -> SideLayout:
    return SideLayout(Int(bits, "channel", group, size, dtype), Dense(size, dtype), block=block)


def token_side(size: int, group: int, hold: int, bits: int = 8, dtype: torch.dtype = torch.float32) -> SideLayout:
    return SideLayout(Int(bits, "token", group, size, dtype), Dense(size, dtype), hold=hold)


def appended_side(size: int, group: int, bits: int = 8, dtype: torch.dtype = torch.float32) -> SideLayout:
    return SideLayout(Int(bits, "token", group, size, dtype), Dense(size, dtype), encodes_new=True)


def layout(kind: str, page_size: int = 4, columns: bool = True, dtype: torch.dtype = torch.float32) -> StoreLayout:
    sides = {
        "dense": (dense_side(8, dtype), dense_side(8, dtype)),
        "uneven": (dense_side(24, dtype), dense_side(8, dtype)),
        "kivi": (channel_side(8, 4, block=8, dtype=dtype), token_side(8, 8, hold=8, dtype=dtype)),
        "kivi uneven": (channel_side(16, 4, block=4, dtype=dtype), token_side(8, 4, hold=3, dtype=dtype)),
        "keys only": (channel_side(8, 4, block=4, dtype=dtype), dense_side(8, dtype)),
        "appended": (appended_side(8, 8, dtype=dtype), appended_side(16, 4, dtype=dtype)),
        "values appended": (dense_side(8, dtype), appended_side(8, 4, dtype=dtype)),
    }
    keys, values = sides[kind]
    return StoreLayout(keys, values, Columns(COLUMNS) if columns else None, page_size)


LAYOUTS = ["dense", "uneven", "kivi", "kivi uneven", "keys only", "appended", "values appended"]


def make_store(kind: str, heads: int = 3, page_size: int = 4, ceiling: int | None = None) -> Store:
    return Store(layout(kind, page_size), Arena(CPU, page_size, ceiling), heads)


def vectors(store: Store, *shape: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Random keys and values in [-1, 1] for ``store``."""
    rows = (side.layout.dense.layout["x"] for side in (store.keys, store.values))
    keys, values = ((torch.rand(*shape, *x, generator=generator) * 2 - 1).to(dtype) for x, dtype in rows)
    return keys, values


def fill(store: Store, heads: slice | Tensor, counts: list[int], first: int = 0) -> tuple[Tensor, Tensor]:
    """Appends so many random entries to each head, at positions from ``first`` on; returns keys and values."""
    longest = max(*counts, 1)
    keys, values = vectors(store, len(counts), longest)
    position = torch.arange(first, first + longest, dtype=torch.int32).expand(len(counts), -1)
    columns = {"position": position, "mass": torch.zeros(len(counts), longest)}
    store.append(heads, keys, values, columns if store.columns else {}, torch.tensor(counts))
    return keys, values


def overwrite(store: Store, heads: slice | Tensor, index: Tensor, keys: Tensor, values: Tensor) -> None:
    """Overwrites entries ``index`` ([R, m], distinct in a row) by [R, m, size] keys and values."""
    rows = torch.arange(index.shape[0])[:, None]
    everything = [side.read(heads).clone() for side in (store.keys, store.values)]
    touched = torch.zeros(everything[0].shape[:2], dtype=torch.bool)
    touched[rows, index] = True
    for side, new in zip(everything, (keys, values), strict=True):
        side[rows, index] = new
    store.overwrite(heads, touched, *everything)


def held_pages(segment: Segment) -> list[list[int]]:
    """The page ids of each head, restated from its start and length."""
    size, pages = segment.pool.page_size, []
    for row, start, length in zip(
        segment.table.tolist(), segment.starts.tolist(), segment.lengths.tolist(), strict=True
    ):
        assert 0 <= start < size
        pages.append(row[: -(-(start + length) // size)] if length else [])
    return pages


def page_nbytes(pool: Pool) -> int:
    """Bytes of a page as torch has them, with its place on the free list and its reference count."""
    return (
        sum(math.prod(t.shape[1:]) * t.element_size() for t in pool.tensors.values())
        + 2 * pool.references.element_size()
    )


def check_pages(arena: Arena, stores: list[Store]) -> None:
    """Every page is on the free list or counted once per head that holds it; the bytes are those of the pages held."""
    total = 0
    for pool in arena.pools.values():
        owners = torch.zeros(pool.capacity, dtype=torch.int32)
        for store in stores:
            for segment in store.segments:
                if segment.pool is not pool:
                    continue
                for pages in held_pages(segment):
                    assert len(set(pages)) == len(pages), "a head holds a page twice"
                    owners[pages] += 1
        assert torch.equal(owners, pool.references)
        assert pool.shared == int((owners > 1).sum())
        free = pool._free[: pool._free_count].tolist()
        assert sorted(free) == torch.nonzero(owners == 0).flatten().tolist()
        assert pool.used == int((owners > 0).sum())
        assert pool.bytes == pool.used * page_nbytes(pool)
        total += pool.bytes
        storages = sum(t.untyped_storage().nbytes() for t in pool.tensors.values())
        assert pool.reserved_bytes == storages + pool.references.nbytes + pool._free.nbytes
        assert pool.reserved_bytes == pool.capacity * page_nbytes(pool)
    assert arena.bytes == total <= arena.reserved_bytes
    assert arena.peak_bytes >= total
    assert arena.ceiling is None or total <= arena.ceiling


def check_lengths(store: Store) -> None:
    for side in (store.keys, store.values):
        assert torch.equal(side.lengths, store.lengths)
        if side.settled:
            assert not (side.settled.lengths % side.settled.unit).any()
    if store.columns:
        assert torch.equal(store.columns.lengths, store.lengths)


def check_settled(store: Store, heads: slice | Tensor) -> None:
    """Nothing ripe is left in a tail."""
    for side in (store.keys, store.values):
        assert not (side.settled and side.layout.ripe(side.tail.lengths[heads]).any())


def snapshot(store: Store) -> dict[str, object]:
    """Everything that an operation may change, copied."""
    state: dict[str, object] = {}
    for number, pool in enumerate(store.arena.pools.values()):
        state |= {f"pool {number} {name}": tensor.clone() for name, tensor in pool.tensors.items()}
        state |= {
            f"pool {number} references": pool.references.clone(),
            f"pool {number} free": pool._free[: pool._free_count].clone(),
            f"pool {number} shared": pool.shared,
        }
    for number, segment in enumerate(store.segments):
        state |= {
            f"segment {number} table": segment.table.clone(),
            f"segment {number} starts": segment.starts.clone(),
            f"segment {number} lengths": segment.lengths.clone(),
        }
    return state


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """The names of what is not bit for bit the same."""

    def same(x: object, y: object) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    return [name for name in before if not same(before[name], after[name])]


@dataclass
class Entry:
    """One entry of the model. ``encodings``: how often it may have been encoded since it was given."""

    position: int
    key: Tensor
    value: Tensor
    mass: float = 0.0
    encodings: int = 1

    def copy(self) -> "Entry":
        return Entry(self.position, self.key, self.value, self.mass, self.encodings)


@dataclass
class Contents:
    """What the heads of a store hold, head by head, read through its public face."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    masses: list[list[float]] = field(default_factory=list)

    @classmethod
    def of(cls, store: Store) -> "Contents":
        everyone, lengths = slice(0, store.lengths.numel()), store.lengths.tolist()
        keys, values = store.keys.read(everyone), store.values.read(everyone)
        columns = [store.read_column(everyone, name) if store.columns else [[]] * len(lengths) for name in COLUMNS]
        return cls(
            [row[:n].clone() for row, n in zip(keys, lengths, strict=True)],
            [row[:n].clone() for row, n in zip(values, lengths, strict=True)],
            *([list(map(float, row[:n])) for row, n in zip(column, lengths, strict=True)] for column in columns),
        )

    def same_head(self, other: "Contents", head: int) -> bool:
        return (
            torch.equal(self.keys[head], other.keys[head])
            and torch.equal(self.values[head], other.values[head])
            and self.positions[head] == other.positions[head]
            and self.masses[head] == other.masses[head]
        )
