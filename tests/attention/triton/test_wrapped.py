"""Kernels over formats that are a map of another format, and over stores in several precisions, as the reference."""

import pytest
import torch
from torch import Tensor

from kernel_reference import expected
from kvarn.attention import Variant
from kvarn.attention.kernels import decode, reads, serves_prompts
from kvarn.formats import (
    Balanced,
    Columns,
    Dense,
    Exempt,
    Float8,
    Format,
    Int,
    Mapped,
    Narrow,
    Ranged,
    Rotated,
    Separable,
    Spectral,
    innermost,
)
from kvarn.memory import Arena, SideLayout, Store, StoreLayout, TieredLayout, TieredStore

SIZE, PAGE = 32, 16
RAGGED = [45, 5, 1, 26]  # entries of two sequences with two KV heads
TOLERANCE = {torch.float32: 1e-4, torch.float16: 6e-3, torch.bfloat16: 3e-2}
COLUMNS = Columns({"count": torch.int32})


def codes(bits: int, axis: str, size: int, dtype: torch.dtype) -> Int:
    return Int(bits, axis, group_of(size), size, dtype)


def group_of(size: int) -> int:
    """Wide vectors have groups that are wide enough for codes to be folded."""
    return 16 if size < 64 else 32


def side(kind: str, size: int, dtype: torch.dtype) -> SideLayout:
    """How one side is kept; what has a state or a map is made up of both."""
    dense = Dense(size, dtype)
    kept, group = size * 3 // 4, group_of(size)
    means = torch.randn(2, 2, size, generator=torch.Generator().manual_seed(5))
    fmt, hold, block = {
        "dense": lambda: (dense, 0, 1),
        "int4": lambda: (codes(4, "token", size, dtype), 9, 1),
        "int4/channel": lambda: (codes(4, "channel", size, dtype), 0, group),
        "float8": lambda: (Float8(size, dtype), 0, 1),
        "narrow": lambda: (Narrow(Dense(kept, dtype), kept, 4, size), 7, 1),
        "narrow/odd": lambda: (Narrow(Dense(kept - 1, dtype), kept - 1, 4, size), 0, 1),
        "narrow/channel": lambda: (Narrow(codes(4, "channel", kept, dtype), kept, 4, size), 0, group_of(kept)),
        "balanced": lambda: (Balanced(codes(8, "token", size, dtype), size, dtype), 5, 1),
        "balanced/at once": lambda: (Balanced(codes(4, "token", size, dtype), size, dtype), 0, 1),
        "balanced/rotated": lambda: (Balanced(Rotated(codes(8, "token", size, dtype), 16, size), size, dtype), 3, 1),
        "rotated": lambda: (Rotated(codes(4, "channel", size, dtype), 16, size), 0, group),
        "rotated/ordered": lambda: (Rotated(codes(4, "token", size, dtype), size, size, means), 4, 1),
        "spectral": lambda: (Spectral(size // 2, group, size, dtype), 0, group),
        "ranged": lambda: (Ranged(4, size, dtype), 6, 1),
        "ranged/8": lambda: (Ranged(8, size, dtype), 0, 1),
        "ranged/3": lambda: (Ranged(3, size, dtype), 0, 1),
        "separable": lambda: (Separable(codes(4, "token", size, dtype), size, dtype, grows=False), 8, 1),
        "separable/grows": lambda: (Separable(Int(2, "token", size, size, dtype), size, dtype, grows=True), 0, 1),
    }[kind]()
    return SideLayout(fmt, dense, hold, block)


def fill(store: Store, counts: list[int], dtype: torch.dtype, device: torch.device, size: int = SIZE) -> None:
    """Random entries, in two pieces, so that pages of heads lie among each other; of a tiered store some are low."""
    generator = torch.Generator().manual_seed(1)
    both = torch.tensor(counts)
    x, y = (torch.randn(both.numel(), int(both.max()), size, generator=generator) for _ in range(2))
    x[..., 3] *= 6  # a channel that stands out
    x, y = x.to(device, dtype), y.to(device, dtype)
    queries = torch.randn(both.numel(), 2, 8, size, generator=generator).to(device, dtype)
    everyone = slice(0, both.numel())
    store.observe(everyone, x, y, both, queries, torch.zeros(x.shape[:2], dtype=torch.bool, device=device))
    for first, last in ((torch.zeros_like(both), both // 3), (both // 3, both)):
        index = (first[:, None] + torch.arange(int((last - first).max()))).clamp(max=x.shape[1] - 1).to(device)
        rows = [t.gather(1, index[..., None].expand(-1, -1, size)) for t in (x, y)]
        extra = {"count": torch.randint(0, 6, index.shape, generator=generator).int().to(device)}
        if isinstance(store, TieredStore):
            store.append(everyone, *rows, extra, last - first, low=index % 3 > 0)
        else:
            store.append(everyone, *rows, extra, last - first)


def stored(
    keys: str,
    values: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    counts: list[int] = RAGGED,
    size: int = SIZE,
) -> Store:
    """A store of two layers."""
    page = max(PAGE, group_of(size))
    layout = StoreLayout(side(keys, size, dtype), side(values, size, dtype), COLUMNS, page)
    store = Store(layout, Arena(device, page), 2 * len(counts), (0, 1))
    fill(store, 2 * counts, dtype, device, size)
    return store


def tiered(high: tuple[str, str], low: tuple[str, str], device: torch.device, dtype: torch.dtype, fresh: int) -> Store:
    """Two precisions; ``fresh`` new entries of decoding."""
    dense = ("dense", "dense")
    tiers = [StoreLayout(*(side(kind, SIZE, dtype) for kind in sides), COLUMNS, PAGE) for sides in (high, low, dense)]
    layout = TieredLayout(tiers[0], tiers[1], 0.5, fresh=tiers[2] if fresh else None, most_fresh=8)
    store = TieredStore(layout, Arena(device, PAGE), 2 * len(RAGGED), (0, 1))
    fill(store, 2 * RAGGED, dtype, device)
    grow(store, max(fresh, 1), dtype, device)
    return store


def grow(store: Store, steps: int, dtype: torch.dtype, device: torch.device) -> None:
    heads = store.lengths.numel()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        store.open_token({"count": torch.full((heads,), 2, dtype=torch.int32, device=device)})
        x = torch.randn(2, heads, SIZE, generator=generator).to(device, dtype)
        store.put_token(slice(0, heads), x[0], x[1])
        if step < steps - 1:  # the last one is being attended
            store.settle(slice(0, heads))


def check(store: Store, device: torch.device, dtype: torch.dtype = torch.float32, group: int = 2, **other) -> None:
    """The second of two layers of two sequences."""
    heads, counted = slice(len(RAGGED), 2 * len(RAGGED)), other.pop("counted", False)
    generator = torch.Generator().manual_seed(2)
    ((size,), _) = store.stores[-1].keys.tail.format.layout["x"]
    query = torch.randn(2, len(RAGGED) // 2 * group, 1, size, generator=generator).to(device, dtype)
    variant = Variant(size**-0.5, **other)
    out, mass = expected(query, store, heads, variant, counted)
    attended = decode(query, store, heads, variant, counts=counted, observe=True)
    assert attended is not None
    tolerance = TOLERANCE[dtype]
    assert attended[0].dtype == dtype
    torch.testing.assert_close(attended[0].float(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(attended[1].mass, mass, rtol=tolerance, atol=tolerance)


KINDS = [
    ("narrow", "dense"),
    ("narrow/odd", "int4"),
    ("narrow/channel", "int4"),
    ("balanced/rotated", "dense"),
    ("balanced", "float8"),
    ("balanced/at once", "int4/channel"),
    ("rotated", "int4"),
    ("rotated/ordered", "dense"),
    ("spectral", "rotated/ordered"),
    ("ranged", "separable"),
    ("ranged/8", "dense"),
    ("ranged/3", "separable/grows"),
    ("int4/channel", "separable"),
    ("dense", "separable/grows"),
]
TIERS = [
    (("dense", "dense"), ("balanced/at once", "int4"), 0),
    (("balanced/at once", "separable/grows"), ("ranged/8", "separable/grows"), 0),
    (("ranged", "separable"), ("ranged/3", "separable/grows"), 5),
    (("dense", "dense"), ("float8", "float8"), 0),
    (("int4/channel", "int4"), ("narrow", "separable"), 3),
]


@pytest.mark.parametrize(("keys", "values"), KINDS)
def test_maps_as_the_reference(keys, values, device):
    check(stored(keys, values, device), device)


@pytest.mark.parametrize(("keys", "values"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision(keys, values, dtype, device):
    if device.type == "cpu" and (dtype == torch.bfloat16 or keys not in ("narrow", "balanced", "ranged")):
        pytest.skip("the interpreter is slow, and computes bf16 in its own way")
    check(stored(keys, values, device, dtype), device, dtype)


@pytest.mark.parametrize(("keys", "values"), KINDS)
def test_wide_heads(keys, values, device):
    if device.type == "cpu" and (keys, values) not in (("rotated", "int4"), ("int4/channel", "separable")):
        pytest.skip("the interpreter is slow")
    check(stored(keys, values, device, torch.float16, size=128), device, torch.float16)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_groups_of_queries(group, device):
    check(stored("ranged", "separable", device, counts=[20, 3, 0, 9]), device, group=group)


def test_what_is_observed_changes_nothing(device):
    store, heads = tiered(("dense", "dense"), ("ranged", "separable"), device, torch.float32, 2), slice(0, len(RAGGED))
    query = torch.randn(2, 4, 1, SIZE, generator=torch.Generator().manual_seed(2)).to(device)
    unseen, nothing = decode(query, store, heads, Variant(0.2))
    assert nothing is None
    assert torch.equal(unseen, decode(query, store, heads, Variant(0.2), observe=True)[0])


def test_variants(device):
    store = stored("ranged", "separable", device)
    check(store, device, softcap=2.0)
    check(store, device, sinks=torch.tensor([0.5, -3.0, 4.0, 0.0], device=device))
    check(store, device, counted=True)


@pytest.mark.parametrize(("high", "low", "fresh"), TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions_together_as_the_reference(high, low, fresh, dtype, device):
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("the interpreter is slow")
    store = tiered(high, low, device, dtype, fresh)
    assert [bool(each.lengths.sum()) for each in store.stores] == [True] * len(store.stores)
    check(store, device, dtype)


def test_precisions_in_every_variant(device):
    store = tiered(("ranged", "separable"), ("balanced/at once", "int4"), device, torch.float32, 3)
    check(store, device, softcap=2.0, counted=True)
    check(store, device, sinks=torch.tensor([0.5, -3.0, 4.0, 0.0], device=device))


def test_after_entries_have_come_and_moved(device):
    store = stored("balanced", "separable/grows", device)
    grow(store, 12, torch.float32, device)
    check(store, device)
    store = tiered(("ranged", "separable"), ("ranged/3", "separable/grows"), device, torch.float32, 5)
    chosen = torch.arange(int(store.upper_lengths.max()), device=device).expand(store.lengths.numel(), -1) % 2 == 0
    store.demote(slice(0, store.lengths.numel()), chosen)
    assert not store.fresh.lengths.any()
    check(store, device)


def test_more_entries_than_there_was_room_for_splits(device, monkeypatch):
    """A captured launch has the grid of the time when it was captured."""
    from kvarn.attention.triton import decode as launching

    monkeypatch.setattr(launching, "_room", lambda total, chunk, rows: rows + 1)
    monkeypatch.setattr(launching.Tuning, "chunk", lambda self, total, rows, device: 16)
    for store in (stored("dense", "dense", device, counts=[170, 5, 1, 41]), stored("balanced", "separable", device)):
        check(store, device)


def test_what_cannot_be_mapped_is_left_to_the_reference(device):
    dense = Dense(SIZE, torch.float32)
    inner = codes(4, "token", SIZE, torch.float32)
    plain = SideLayout(dense, dense)
    for keys, values in [
        (plain, SideLayout(Rotated(inner, SIZE // 2, SIZE), dense)),
        (plain, SideLayout(Rotated(codes(4, "channel", SIZE, torch.float32), SIZE, SIZE), dense, block=16)),
        (plain, SideLayout(Ranged(4, SIZE, torch.float32), dense)),
        (SideLayout(Exempt(inner, 2, SIZE, torch.float32), dense), plain),
    ]:
        assert not reads(Store(StoreLayout(keys, values, None, PAGE), Arena(device, PAGE), 2), 2)


@pytest.mark.parametrize(
    "kind", ["narrow", "balanced/rotated", "balanced", "rotated", "rotated/ordered", "spectral", "ranged"]
)
def test_a_map_of_queries_gives_the_products_of_what_is_decoded(kind):
    layout = side(kind, SIZE, torch.float32)
    fmt, generator = layout.format, torch.Generator().manual_seed(0)
    x, query = torch.randn(2, 16, SIZE, generator=generator), torch.randn(2, 3, SIZE, generator=generator)
    held = torch.ones(2, 16, dtype=torch.bool)
    state = fmt.grown(fmt.observe(x, held, query[:, None]), x, held)
    fmt = fmt.given(state | {name: tensor[0] for name, tensor in fmt.shared.items()})
    rows = fmt.encode(x)
    products = query @ fmt.decode(rows).transpose(1, 2)
    mapped, inner = query, fmt
    offset: Tensor | float = 0.0
    while isinstance(inner, Mapped):
        more = inner.offset(mapped)
        offset = offset if more is None else offset + more[..., None]
        mapped, inner = inner.asked(mapped), inner.inner
    assert isinstance(inner, Format)
    assert type(inner) is type(innermost(layout.format))
    torch.testing.assert_close(mapped @ inner.decode(rows).transpose(1, 2) + offset, products, rtol=1e-4, atol=1e-4)


def test_prompts_do_not_read_what_is_mapped_as_it_lies(device):
    assert not serves_prompts(stored("balanced", "dense", device))
    assert not serves_prompts(stored("dense", "separable", device))
    assert not serves_prompts(tiered(("dense", "dense"), ("int4", "int4"), device, torch.float32, 2))
