"""The memory's kernels beside torch's operations, bit by bit: on a CPU as Triton interprets them, and on a GPU."""

import pytest
import torch

from kernel_reference import DEVICES
from kvarn.formats import Columns, Dense, Float8, Int
from kvarn.memory import Arena, SideLayout, Store, StoreLayout, kernels
from methods.one_layer import OneLayer, random_tokens, split
from store_model import Contents, check_lengths, check_pages, layout

pytest.importorskip("triton")

ODD = {
    "position": torch.int32,
    "mass": torch.float32,
    "bits": ((3,), torch.uint8),
    "flag": torch.bool,
    "nothing": ((0,), torch.uint8),
}
COUNTS = torch.tensor([37, 0, 5, 500])
EVERYONE = slice(0, 4)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def token_layout() -> StoreLayout:
    sides = (SideLayout(Int(3, "token", 8, 24, torch.float32), Dense(24, torch.float32), hold=9) for _ in range(2))
    return StoreLayout(*sides, Columns(ODD), 4)


def layouts() -> dict[str, StoreLayout]:
    dense = layout("uneven")
    odd = StoreLayout(dense.keys, dense.values, Columns(ODD), 4)
    return {"dense": odd, "token": token_layout(), "kivi": layout("kivi uneven")}


def filled(described: StoreLayout, device: torch.device) -> Store:
    """A store of four heads with random entries in scattered pages, not all of which start with their page."""
    store, generator = Store(described, Arena(device, 4), 4), torch.Generator().manual_seed(0)
    for first, last in ((torch.zeros_like(COUNTS), COUNTS // 3), (COUNTS // 3, COUNTS)):
        counts, longest = last - first, int((last - first).max())
        keys, values = (
            torch.randn(4, longest, *side.dense.layout["x"][0], generator=generator).to(device)
            for side in (described.keys, described.values)
        )
        columns = {
            "position": (first[:, None] + torch.arange(longest)).int(),
            "mass": torch.rand(4, longest, generator=generator),
            "bits": torch.randint(0, 256, (4, longest, 3), generator=generator).byte(),
            "flag": torch.rand(4, longest, generator=generator) > 0.5,
            "nothing": torch.zeros(4, longest, 0, dtype=torch.uint8),
        }
        columns = {name: columns[name].to(device) for name in described.columns.layout}
        store.append(EVERYONE, keys, values, columns, counts)
    if not (store.keys.settled or store.values.settled):
        store.pop_front(EVERYONE, COUNTS.clamp(max=3))
    return store


def outcome(store: Store) -> tuple[Contents, dict[str, list[torch.Tensor]]]:
    check_lengths(store)
    check_pages(store.arena, [store])
    columns = store.read_columns(EVERYONE)
    rows = {name: [x[:n].cpu() for x, n in zip(c, store.lengths, strict=True)] for name, c in columns.items()}
    return Contents.of(store), rows


def both(device: torch.device, monkeypatch: pytest.MonkeyPatch, make, act) -> list[Store]:
    """What ``act`` makes of a store by torch's operations, and by the kernels."""
    stores = []
    for devices in (set(), {device.type}):
        monkeypatch.setattr(kernels, "DEVICES", set())
        stores.append(make())
        monkeypatch.setattr(kernels, "DEVICES", devices)
        act(stores[-1])
    monkeypatch.setattr(kernels, "DEVICES", set())
    return stores


def same(mine, theirs) -> None:
    for head in range(4):
        assert mine[0].same_head(theirs[0], head)
        assert all(torch.equal(mine[1][name][head], theirs[1][name][head]) for name in mine[1])


def kept(store: Store) -> None:
    mask = torch.rand(4, int(store.lengths.max()), generator=torch.Generator().manual_seed(1)) > 0.4
    mask &= torch.arange(mask.shape[1]) < store.lengths[:, None]
    mask[2] = False
    store.keep(EVERYONE, mask.to(store.arena.device))


def kept_of_some(store: Store) -> None:
    heads = torch.tensor([3, 0])
    mask = torch.arange(int(store.lengths.max())) % 3 > 0
    mask = mask & (torch.arange(mask.shape[0]) < store.lengths[heads][:, None])
    store.keep(heads, mask.to(store.arena.device), mask.sum(1))


def dropped(store: Store) -> None:
    heads = torch.tensor([0, 3])
    most = int(store.lengths[heads].min())
    victims = torch.stack([torch.randperm(most, generator=torch.Generator().manual_seed(n))[:20] for n in (0, 1)])
    victims[1, :4] = store.lengths[3] - 1 - torch.tensor([0, 2, 5, 6])
    store.drop(heads, victims.to(store.arena.device), torch.tensor([20, 11]))


def set_anew(store: Store) -> None:
    mass = torch.rand(4, int(store.lengths.max()), generator=torch.Generator().manual_seed(1))
    store.set_columns(EVERYONE, {"mass": mass.to(store.arena.device)})


@pytest.mark.parametrize("kind", ["dense", "token", "kivi"])
@pytest.mark.parametrize("act", [kept, kept_of_some, dropped, set_anew])
def test_entries_are_where_torch_puts_them(kind, act, device, monkeypatch):
    stores = both(device, monkeypatch, lambda: filled(layouts()[kind], device), act)
    same(*(outcome(store) for store in stores))


def test_dropping_by_hand(device, monkeypatch):
    """The last entries fill the holes, whatever of them leaves too."""
    monkeypatch.setattr(kernels, "DEVICES", {device.type})
    store = Store(layout("dense"), Arena(device, 4), 2)
    x = torch.arange(10.0, device=device)[None, :, None].expand(2, -1, 8)
    columns = {"position": torch.arange(10, dtype=torch.int32, device=device).expand(2, -1), "mass": x[..., 0]}
    store.append(slice(0, 2), x, x + 0.5, columns, torch.tensor([10, 7]))
    victims = torch.tensor([[9, 1, 4], [6, 2, 0]], device=device)
    store.drop(slice(0, 2), victims, torch.tensor([3, 1]))
    contents = Contents.of(store)
    assert contents.positions == [[0, 7, 2, 3, 8, 5, 6], [0, 1, 2, 3, 4, 5]]
    for keys, values, positions in zip(contents.keys, contents.values, contents.positions, strict=True):
        assert keys[:, 0].tolist() == positions
        assert (values[:, 7] - 0.5).tolist() == positions


def test_shared_pages_are_copied_before_entries_move(device, monkeypatch):
    monkeypatch.setattr(kernels, "DEVICES", {device.type})
    store = filled(layouts()["dense"], device)
    fork = Store(store.layout, store.arena, 4)
    fork.share(EVERYONE, store, EVERYONE)
    before = Contents.of(store)
    for act in (dropped, kept, set_anew):
        act(fork)
    after = Contents.of(store)
    assert all(before.same_head(after, head) for head in range(4))


FORMATS = [
    *(("int", bits, "channel", 8, 24, 1.0) for bits in (2, 3, 4, 8)),
    *(("int", bits, "token", 8, 24, 1.0) for bits in (2, 3, 4, 8)),
    ("int", 4, "channel", 12, 96, 0.9),
    ("int", 2, "token", 96, 96, 0.9),
    ("int", 3, "token", 128, 128, 1.0),
    ("int", 2, "channel", 32, 128, 1.0),
    ("float8", 24),
    ("float8", 128),
]


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if (device.type, request.param) == ("cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter cuts numbers off where bfloat16 rounds")
    return request.param


def format_of(described: tuple, dtype: torch.dtype) -> Float8 | Int:
    if described[0] == "float8":
        return Float8(described[1], dtype)
    _, bits, axis, group, size, clip = described
    return Int(bits, axis, group, size, dtype, clip)


@pytest.mark.parametrize("described", FORMATS, ids=str)
def test_tokens_settle_as_the_format_encodes_them(described, dtype, device, monkeypatch):
    fmt = format_of(described, dtype)
    dense = Dense(fmt.size, dtype)
    side = SideLayout(fmt, dense, hold=3, block=2 * fmt.unit)
    counts = torch.tensor([70, 3, 0, 41])
    x = torch.randn(4, 70, fmt.size, generator=torch.Generator().manual_seed(0)) * 3
    x[0, :20] *= 1e-3  # the least float8 numbers
    x[0, 8:16] = 0.25  # constant groups
    x = x.to(device, dtype)

    def waiting() -> Store:
        """Heads with some tokens that have settled, and others that are ripe."""
        store = Store(StoreLayout(side, SideLayout(dense, dense), None, 16), Arena(device, 16), 4)
        for first, last in ((0, 30), (30, 70)):
            store.append(EVERYONE, x[:, first:last], x[:, first:last], {}, (counts - first).clamp(0, last - first))
            store.wait(True)
        store.wait(False)
        return store

    stores = both(device, monkeypatch, waiting, lambda store: store.settle(EVERYONE))
    for store in stores:
        check_pages(store.arena, [store])
    mine, theirs = (store.keys for store in stores)
    assert torch.equal(mine.tail.read(EVERYONE)["x"], theirs.tail.read(EVERYONE)["x"])
    assert torch.equal(mine.settled.lengths, theirs.settled.lengths)
    assert mine.settled.lengths.tolist() == [(count - 3) // side.block * side.block for count in (70, 3, 3, 41)]
    others = theirs.settled.read(EVERYONE)
    for name, rows in mine.settled.read(EVERYONE).items():
        for head, count in enumerate((mine.settled.lengths // fmt.unit).tolist()):
            assert torch.equal(rows[head, :count], others[name][head, :count])


@pytest.mark.parametrize("described", [each for each in FORMATS if "channel" not in each], ids=str)
def test_tokens_of_steps_are_encoded_where_they_are_appended(described, dtype, device, monkeypatch):
    fmt = format_of(described, dtype)
    side = SideLayout(fmt, Dense(fmt.size, dtype), encodes_new=True)
    x = torch.randn(9, 4, fmt.size, generator=torch.Generator().manual_seed(0)) * 3
    x[0] *= 1e-3  # the least float8 numbers
    x[1, :, 8:16] = 0.25  # constant groups
    x[2, 3] = 0
    x = x.to(device, dtype)

    def empty() -> Store:
        return Store(StoreLayout(side, side, None, 4), Arena(device, 4), 4)

    def decoded(store: Store) -> None:
        for keys, values in zip(x, x.flip(0), strict=True):
            store.open_token({})
            for heads in (slice(0, 3), slice(3, 4)):
                store.put_token(heads, keys[heads], values[heads])
            store.settle(EVERYONE)

    for store in both(device, monkeypatch, empty, decoded):
        check_pages(store.arena, [store])
        for given, its in ((x, store.keys), (x.flip(0), store.values)):
            assert not its.tail.pool.capacity
            expected = fmt.encode(given.transpose(0, 1))
            for name, rows in its.settled.read(EVERYONE).items():
                assert torch.equal(rows, expected[name])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("recipe", "capacity"),
    [
        ("full", 10**9),
        ("fp8", 10**9),
        ("snapkv(window=8)", 24),
        ("h2o", 20),
        ("window", 20),
        ("lazyeviction(window=4)", 30),
        ("kivi(bits=4, group=16, residual=16)", 10**9),
        ("kivi(bits=2, group=16, residual=16)", 10**9),
        ("snapkv(window=8) + kivi(bits=3, group=16, residual=16)", 24),
    ],
)
def test_steps_do_not_wait_for_the_device(recipe, capacity):
    layer, tokens = OneLayer(recipe, capacity, "cuda"), [t.cuda() for t in random_tokens(110)]
    layer.prompt(*split(tokens, 0, 40))
    for first in range(40, 75):  # compiles what does so at the first time
        layer.token(*split(tokens, first, first + 1))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for first in range(75, 110):
            layer.token(*split(tokens, first, first + 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["full", "snapkv(window=8)", "kivi(bits=4, group=16, residual=16)"])
def test_prompts_do_not_wait_for_the_device(recipe):
    tokens = [t.cuda() for t in random_tokens(40)]
    for mode in ("default", "error"):  # the first compiles
        layer = OneLayer(recipe, 24 if "snapkv" in recipe else 10**9, "cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            layer.prompt(*tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
