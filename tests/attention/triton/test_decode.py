"""The decode kernel against the reference, entry by entry: on a CPU as Triton interprets it, and on a GPU."""

import pytest
import torch

from kernel_reference import expected
from kvarn.attention import Variant
from kvarn.attention.kernels import decode
from kvarn.formats import Columns, Dense, Float8, Int, Spectral
from kvarn.memory import Arena, SideLayout, Store, StoreLayout
from store_model import CPU

RAGGED = [70, 5, 1, 41]  # entries of two sequences with two KV heads
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def side(kind: str, size: int, dtype: torch.dtype) -> SideLayout:
    """``dense``, ``float8``, or as in ``int4/channel/16``."""
    dense = Dense(size, dtype)
    if kind == "dense":
        return SideLayout(dense, dense)
    if kind == "float8":
        return SideLayout(Float8(size, dtype), dense, hold=3)
    bits, axis, group = kind.removeprefix("int").split("/")
    fmt = Int(int(bits), axis, int(group), size, dtype)
    return SideLayout(fmt, dense, block=int(group)) if axis == "channel" else SideLayout(fmt, dense, hold=9)


def stored(
    keys: str,
    values: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    counts: tuple[int, ...] = tuple(RAGGED),
    sizes: tuple[int, int] = (16, 16),
    page: int = 16,
    columns: Columns | None = None,
) -> tuple[Store, slice]:
    """A store of two layers with random entries, and the heads of the second."""
    layout = StoreLayout(side(keys, sizes[0], dtype), side(values, sizes[1], dtype), columns, page)
    store = Store(layout, Arena(device, page), 2 * len(counts))
    generator = torch.Generator().manual_seed(1)
    both = torch.tensor(counts).repeat(2)
    x, y = (torch.randn(both.numel(), int(both.max()), size, generator=generator).to(device, dtype) for size in sizes)
    # In two pieces, so that pages of heads lie among each other.
    for first, last in ((torch.zeros_like(both), both // 3), (both // 3, both)):
        index = (first[:, None] + torch.arange(int((last - first).max()))).clamp(max=x.shape[1] - 1).to(device)
        rows = [t.gather(1, index[..., None].expand(-1, -1, t.shape[2])) for t in (x, y)]
        extra = {}
        if columns is not None:
            extra = {"count": torch.randint(0, 6, index.shape, generator=generator).int().to(device)}
        store.append(slice(0, both.numel()), *rows, extra, last - first)
    return store, slice(len(counts), 2 * len(counts))


def check(
    store: Store,
    heads: slice,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    group: int = 2,
    counted: bool = False,
    **variant: object,
) -> None:
    (size,) = store.keys.layout.dense.layout["x"][0]
    rows = heads.stop - heads.start
    query = torch.randn(2, rows // 2 * group, 1, size, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    shaped = Variant(size**-0.5, **variant)
    out, mass = expected(query, store, heads, shaped, counted)
    attended = decode(query, store, heads, shaped, counts=counted, observe=True)
    assert attended is not None
    tolerance = TOLERANCE[dtype]
    assert attended[0].dtype == dtype
    torch.testing.assert_close(attended[0].float(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(attended[1].mass, mass, rtol=tolerance, atol=tolerance)
    return attended[0]


KINDS = [
    ("dense", "dense"),
    ("int4/channel/16", "int4/token/16"),
    ("int2/channel/32", "int2/token/32"),
    ("int8/channel/16", "int8/token/16"),
    ("int3/channel/16", "int3/token/16"),
    ("int4/channel/8", "int4/token/8"),
    ("int2/token/16", "dense"),
    ("dense", "int4/channel/16"),
    ("float8", "float8"),
]
FOLDED = [  # what is multiplied as codes
    ("int8/channel/32", "int8/token/32", 32),
    ("int4/channel/32", "int4/token/32", 64),
    ("int4/channel/16", "int4/token/64", 128),
    ("int2/channel/32", "int2/token/32", 128),
    ("int4/token/32", "int4/channel/32", 128),
    ("int8/token/64", "int2/channel/16", 128),
    ("int2/token/64", "dense", 128),
    ("dense", "int4/token/32", 64),
    ("float8", "int4/token/32", 64),
    ("float8", "float8", 96),
    ("dense", "int4/token/32", 256),  # eight groups, the most
    ("dense", "int4/token/32", 512),  # too many: decoded
]


@pytest.mark.parametrize(("keys", "values"), KINDS)
def test_every_format_as_the_reference(keys, values, device):
    store, heads = stored(keys, values, device, sizes=(32, 32))
    check(store, heads, device)


@pytest.mark.parametrize(("keys", "values"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(keys, values, dtype, device):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bf16 in its own way")
    store, heads = stored(keys, values, device, dtype, sizes=(64, 64))
    check(store, heads, device, dtype)


@pytest.mark.parametrize(("keys", "values", "size"), FOLDED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_with_codes(keys, values, size, dtype, device):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bf16 in its own way")
    for page in (16, 64) if device.type == "cuda" else (16,):
        store, heads = stored(keys, values, device, dtype, counts=(100, 5, 1, 70), sizes=(size, size), page=page)
        check(store, heads, device, dtype, group=4)


@pytest.mark.parametrize(("sizes", "group"), [((80, 16), 1), ((16, 96), 3), ((128, 64), 8), ((64, 256), 12)])
@pytest.mark.parametrize("kind", ["dense", "int4"])
def test_head_sizes_and_groups(sizes, group, kind, device):
    kinds = ("dense", "dense") if kind == "dense" else ("int4/channel/16", "int4/token/16")
    store, heads = stored(*kinds, device, sizes=sizes, counts=(35, 20))
    check(store, heads, device, group=group)


@pytest.mark.parametrize("kind", ["dense", "int4"])
def test_variants(kind, device):
    kinds = ("dense", "dense") if kind == "dense" else ("int4/channel/16", "int4/token/16")
    store, heads = stored(*kinds, device, columns=Columns({"count": torch.int32}))
    check(store, heads, device, softcap=2.0)
    check(store, heads, device, sinks=torch.tensor([0.5, -3.0, 4.0, 0.0], device=device))
    check(store, heads, device, counted=True)


def test_heads_that_start_within_a_page(device):
    store, heads = stored("dense", "dense", device, counts=(60, 33, 20, 41))
    store.pop_front(heads, torch.tensor([3, 30, 0, 17]))
    assert store.keys.tail.starts[heads].tolist() == [3, 14, 0, 1]
    check(store, heads, device)


def test_many_splits(device):
    store, heads = stored("int4/channel/32", "int4/token/16", device, counts=(290, 10), page=32)
    check(store, heads, device)


def test_nothing_is_observed_where_nobody_asks(device):
    store, heads = stored("dense", "dense", device)
    query = torch.randn(2, 4, 1, 16, device=device)
    out, paid = decode(query, store, heads, Variant(0.25))
    assert paid is None
    assert torch.equal(out, decode(query, store, heads, Variant(0.25), observe=True)[0])


def test_empty_heads_give_nothing(device):
    store, heads = stored("dense", "dense", device, counts=(8, 0))
    query = torch.randn(1, 4, 1, 16, device=device)
    out, _ = decode(query, store, heads, Variant(0.25))
    assert not out[:, 2:].any()
    assert bool(out[:, :2].isfinite().all())


def test_after_entries_have_come_and_gone(device):
    store, heads = stored("int4/channel/16", "int4/token/16", device)
    check(store, heads, device)
    everyone = slice(0, heads.stop)
    for step in range(12):
        store.open_token({})
        x = torch.randn(heads.stop, 16, generator=torch.Generator().manual_seed(step)).to(device)
        store.put_token(everyone, x, x)
        store.settle(everyone)
    check(store, heads, device)
    longest = int(store.lengths.max())
    store.keep(
        everyone,
        torch.arange(longest, device=device).expand(heads.stop, -1) % 3 > 0,
        (store.lengths - (store.lengths + 2) // 3),
    )
    check(store, heads, device)


def test_what_no_kernel_reads_is_left_to_the_reference(device):
    dense = Dense(16, torch.float32)
    other = SideLayout(Spectral(8, 16, 16, torch.float32), dense, block=16)
    store = Store(StoreLayout(SideLayout(dense, dense), other, None, 16), Arena(device, 16), 2)
    assert decode(torch.randn(1, 4, 1, 16, device=device), store, slice(0, 2), Variant(1.0)) is None


def test_cpus_take_the_reference():
    store, heads = stored("dense", "dense", CPU)
    assert decode(torch.randn(2, 4, 1, 16), store, heads, Variant(1.0)) is None
