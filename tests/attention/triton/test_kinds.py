"""The decode kernel for formats that are more than codes and scales, and for keys before their rotation, against the
reference: on a CPU as Triton interprets it, and on a GPU."""

import pytest
import torch
from torch import Tensor

from kvarn.attention import Part, Variant, attend_with_mass
from kvarn.attention.kernels import decode, reads
from kvarn.attention.rotary import Rotary
from kvarn.formats import (
    Columns,
    Corrected,
    Dense,
    Exempt,
    Float8,
    Format,
    Int,
    NonUniform,
    Rotated,
    Sparse,
    Spectral,
    Ternary,
)
from kvarn.memory import Arena, SideLayout, Store, StoreLayout
from tiny_models import make_tiny

COUNTS = [42, 5, 1, 21]  # entries of two sequences with two KV heads
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
PAGE = 16


def levels(bits: int, size: int, exact: int, fixed: bool, dtype: torch.dtype, heads: int = 2) -> NonUniform:
    generator = torch.Generator().manual_seed(3)
    shared = {"levels": (2 * torch.rand(2, heads, 2**bits, generator=generator) - 1).sort(-1).values}
    if bits == 2:
        shared["read"] = 1.1 * shared["levels"] - 0.02
    if fixed:
        shared["center"] = torch.randn(2, heads, size, generator=generator).to(dtype)
        shared["half"] = (2 + torch.rand(2, heads, size, generator=generator)).to(dtype)
    return NonUniform(bits, exact, shared, size, dtype)


def side(kind: str, size: int, dtype: torch.dtype, heads: int = 2) -> SideLayout:
    """As in ``sparse/9``, ``ternary/16``, ``spectral/16/8`` (channels of two bits, group), ``int4/channel/16/32/2/0.1``
    (bits, axis, group, block, rank, outliers), ``turned2/16/64/3`` (bits, group, block, exact tokens), the same in an
    order as ``ranked2/…``, or ``levels3/token/4/2`` (bits, range, exact numbers, exact tokens)."""
    name, *rest = kind.split("/")
    dense = Dense(size, dtype)
    if name == "dense":
        return SideLayout(dense, dense)
    if name == "float8":
        return SideLayout(Float8(size, dtype), dense, hold=3)
    if name == "sparse":
        return SideLayout(Sparse(int(rest[0]), size, dtype), dense, hold=3)
    if name == "ternary":
        return SideLayout(Ternary(int(rest[0]), 0.5, size, dtype), dense, block=2 * int(rest[0]))
    if name == "spectral":
        group = int(rest[1])
        return SideLayout(Spectral(int(rest[0]), group, size, dtype), dense, block=2 * group)
    if name.startswith(("turned", "ranked")):
        group, block, most = map(int, rest)
        means = torch.randn(2, 1, size, generator=torch.Generator().manual_seed(5)) if name[0] == "r" else None
        turned = Rotated(Int(int(name[6:]), "token", group, size, dtype), block, size, means)
        return SideLayout(Exempt(turned, most, size, dtype), dense, hold=2)
    if name.startswith("int"):
        axis, group, *correction = rest
        fmt: Format = Int(int(name[3:]), axis, int(group), size, dtype)
        if not correction:
            return SideLayout(fmt, dense, block=fmt.unit)
        block = int(correction[0])
        return SideLayout(Corrected(fmt, block, int(correction[1]), float(correction[2]), 3), dense, block=block)
    axis, exact, most = rest
    codes = levels(int(name[6:]), size, int(exact), axis == "channel", dtype, heads)
    return SideLayout(Exempt(codes, int(most), size, dtype) if int(most) else codes, dense, hold=2)


def stored(
    keys: SideLayout,
    values: SideLayout,
    device: torch.device,
    counts: list[int] = COUNTS,
    heads: int = 2,
) -> tuple[Store, slice]:
    """A store of two layers with ``heads`` heads for each sequence, and the heads of the second layer. Some of the
    first tokens are to be read exactly."""
    columns = Columns({"position": torch.int32})
    store = Store(StoreLayout(keys, values, columns, PAGE), Arena(device, PAGE), 2 * len(counts), (0, 1))
    generator, everyone = torch.Generator().manual_seed(1), slice(0, 2 * len(counts))
    both = torch.tensor(counts).repeat(2)
    shape = both.numel(), int(both.max())
    x, y = (
        torch.randn(*shape, fmt.dense.layout["x"][0][0], generator=generator).to(device, fmt.dense.layout["x"][1])
        for fmt in (keys, values)
    )
    marked = torch.rand(shape, generator=generator) < 0.04
    store.observe(everyone, x, y, both, x[:, None, :0], marked.to(device))
    positions = torch.randint(0, 600, shape, generator=generator).int().to(device)
    # In two pieces, so that pages of heads lie among each other.
    for first, last in ((torch.zeros_like(both), both // 3), (both // 3, both)):
        index = (first[:, None] + torch.arange(int((last - first).max()))).clamp(max=shape[1] - 1).to(device)
        rows = [t.gather(1, index[..., None].expand(-1, -1, t.shape[2])) for t in (x, y)]
        store.append(everyone, *rows, {"position": positions.gather(1, index)}, last - first)
    return store, slice(len(counts), 2 * len(counts))


def expected(query: Tensor, store: Store, heads: slice, together: int, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """The output, and the mass of each entry, by the reference in fp32."""
    keys, values = (x.unflatten(2, (together, -1)).transpose(1, 2) for x in store.read(heads))
    if rotary:
        keys = rotary.rotate(keys, store.read_column(heads, "position").long())
    keys, values = (x.float().reshape(query.shape[0], -1, *x.shape[2:]) for x in (keys, values))
    held = (torch.arange(keys.shape[2]) < store.lengths[heads][:, None]).to(query.device).repeat_interleave(together, 0)
    part = Part(keys, values, held.unflatten(0, (query.shape[0], -1))[:, :, None])
    out, masses = attend_with_mass(query.float(), [part], Variant(query.shape[3] ** -0.5))
    return out, masses[0]


def check(
    store: Store,
    heads: slice,
    size: int = 32,
    batch: int = 2,
    group: int = 2,
    together: int = 1,
    rotary: Rotary | None = None,
) -> None:
    device, dtype = store.arena.device, store.keys.layout.dense.layout["x"][1]
    kv_heads = (heads.stop - heads.start) // batch * together
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(batch, kv_heads * group, 1, size, generator=generator).to(device, dtype)
    out, mass = expected(query, store, heads, together, rotary)
    assert reads(store, group, together, rotary)
    attended = decode(query, store, heads, Variant(size**-0.5), observe=True, rotary=rotary)
    assert attended is not None
    assert attended[0].dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(attended[0].float(), out, rtol=tolerance, atol=tolerance)
    some = (store.lengths[heads] > 0).repeat_interleave(together)
    paid, mass = (x.flatten(0, 1)[some.to(device)] for x in (attended[1].mass, mass))
    torch.testing.assert_close(paid, mass, rtol=tolerance, atol=tolerance)


def skip_interpreted(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bf16 in its own way")


KINDS = [
    ("sparse/9", "sparse/20"),
    ("sparse/32", "dense"),
    ("ternary/16", "ternary/8"),
    ("int2/channel/16", "ternary/16"),
    ("levels4/channel/4/1", "levels4/token/4/1"),
    ("levels2/token/6/3", "levels3/channel/0/0"),
    ("levels3/channel/2/0", "levels2/channel/5/2"),
    ("int2/channel/16/32/2/0.1", "int2/token/16/16/2/0.1"),
    ("int4/channel/16/16/1/0.0", "int8/token/8/32/0/0.2"),
    ("int3/token/16/16/2/0.05", "int3/channel/8/16/3/0.05"),
    ("spectral/16/16", "ternary/16"),
    ("spectral/8/8", "turned4/16/32/3"),
]


@pytest.mark.parametrize(("keys", "values"), KINDS)
def test_every_format_as_the_reference(keys, values, device):
    check(*stored(side(keys, 32, torch.float32), side(values, 32, torch.float32), device))


@pytest.mark.parametrize(("keys", "values"), [KINDS[0], KINDS[3], KINDS[4], KINDS[7], KINDS[10]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(keys, values, dtype, device):
    skip_interpreted(dtype, device)
    check(*stored(side(keys, 64, dtype), side(values, 64, dtype), device), size=64)


@pytest.mark.parametrize(("size", "group"), [(80, 1), (16, 3), (128, 4)])
@pytest.mark.parametrize(
    ("keys", "values"),
    [("sparse/7", "ternary/16"), ("levels4/channel/4/1", "int4/token/8/16/2/0.1"), ("spectral/8/16", "ternary/8")],
)
def test_head_sizes_and_groups(keys, values, size, group, device):
    store, heads = stored(side(keys, size, torch.float32), side(values, size, torch.float32), device, [35, 0, 20, 8])
    check(store, heads, size, group=group)


ROTATED = [
    ("dense", "dense"),
    ("levels4/channel/4/1", "levels4/token/4/1"),
    ("sparse/5", "dense"),
    ("int4/channel/16", "dense"),
    ("int2/token/8", "dense"),
    ("int8/channel/16", "dense"),
    ("int3/token/16", "dense"),
    ("float8", "dense"),
]


@pytest.mark.parametrize(("keys", "values"), ROTATED)
def test_keys_before_their_rotation(keys, values, device):
    turned(keys, values, torch.float32, device)


@pytest.mark.parametrize(("keys", "values"), ROTATED[:3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_before_their_rotation_in_half_precision(keys, values, dtype, device):
    skip_interpreted(dtype, device)
    turned(keys, values, dtype, device)


def turned(keys: str, values: str, dtype: torch.dtype, device: torch.device) -> None:
    rotary = Rotary(make_tiny("llama").to(device))
    rotary.reserve(600)
    check(*stored(side(keys, 16, dtype), side(values, 16, dtype), device), 16, group=3, rotary=rotary)


@pytest.mark.parametrize(("heads", "turns"), [(2, True), (3, False)])
@pytest.mark.parametrize(("keys", "values"), [("levels4/channel/4/1", "levels2/token/6/3"), ("dense", "dense")])
def test_rows_of_several_heads(keys, values, turns, heads, device):
    rotary = Rotary(make_tiny("llama").to(device)) if turns else None
    if rotary:
        rotary.reserve(600)
    keys, values = (side(kind, 16 * heads, torch.float32, heads=1) for kind in (keys, values))
    store, own = stored(keys, values, device, [38, 0, 21], heads=1)
    check(store, own, 16, batch=3, together=heads, rotary=rotary)


# Heads, the size of each, and queries; whether keys are rotated.
ROWS = [
    ("ranked2/16/64/3", "turned2/32/16/3", 4, 16, 2, True),
    ("ranked4/8/32/0", "turned4/64/16/2", 4, 16, 1, True),
    ("ranked2/32/64/2", "dense", 2, 32, 4, False),
    ("ranked3/8/16/2", "turned3/48/16/0", 3, 16, 2, True),
    ("turned8/16/64/1", "turned8/16/64/1", 2, 64, 2, True),
]


@pytest.mark.parametrize(("keys", "values", "heads", "size", "group", "turns"), ROWS)
def test_rows_of_heads_that_are_turned_together(keys, values, heads, size, group, turns, device):
    rows_of_turned_heads(keys, values, torch.float32, heads, size, group, turns, device)


@pytest.mark.parametrize(("keys", "values", "heads", "size", "group", "turns"), [ROWS[0], ROWS[4]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_heads_that_are_turned_together_in_half_precision(
    keys, values, heads, size, group, turns, dtype, device
):
    skip_interpreted(dtype, device)
    rows_of_turned_heads(keys, values, dtype, heads, size, group, turns, device)


def rows_of_turned_heads(
    keys: str, values: str, dtype: torch.dtype, heads: int, size: int, group: int, turns: bool, device: torch.device
) -> None:
    rotary = Rotary(make_tiny("llama", head_dim=size).to(device)) if turns else None
    if rotary:
        rotary.reserve(600)
    sides = (side(kind, size * heads, dtype, heads=1) for kind in (keys, values))
    store, own = stored(*sides, device, [38, 0, 21], heads=1)
    check(store, own, size, batch=3, group=group, together=heads, rotary=rotary)


def test_rotations_of_a_part_of_the_channels_are_left_to_the_reference(device):
    rotary = Rotary(make_tiny("llama").to(device))
    dense = side("dense", 32, torch.float32)
    store, heads = stored(dense, dense, device)
    assert rotary.halves == 16
    assert not reads(store, 2, 1, rotary)
    assert decode(torch.randn(2, 4, 1, 32, device=device), store, heads, Variant(1.0), rotary=rotary) is None
