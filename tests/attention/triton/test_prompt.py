"""Prompts over a stored past by the kernel, against the reference: on a CPU as Triton interprets it, and on a GPU."""

import pytest
import torch
from torch import Tensor

import kvarn
from attention.triton.test_decode import KINDS, TOLERANCE, stored
from kvarn.attention import Part, Variant, attend_with_mass
from kvarn.attention.kernels import prompt, prompt_decoded
from kvarn.attention.triton.prompt import Blocks, attend_decoded, attend_prompt
from kvarn.formats import Columns
from kvarn.memory import Store
from learnt import kvquant, rotatekv
from methods.one_layer import OneLayer, random_tokens, split
from store_model import CPU
from tiny_models import make_tiny

RAGGED = (70, 5, 0, 21)  # entries of two sequences with two KV heads
SMALL = Blocks(16, 16, 4, 2)


def expected(
    new: tuple[Tensor, Tensor, Tensor],
    store: Store,
    heads: slice,
    variant: Variant,
    window: int | None = None,
    counted: bool = False,
) -> Tensor:
    """The output by the reference in fp32."""
    query, fresh_keys, fresh_values = (x.float() for x in new)
    shape, tokens = fresh_keys.shape[:2], query.shape[2]
    keys, values = (x.float().unflatten(0, shape) for x in store.read(heads))
    lengths = store.lengths[heads].view(*shape, 1, 1)
    place, of_query = torch.arange(keys.shape[2]), torch.arange(tokens)[:, None]
    held = (place < lengths).expand(-1, -1, tokens, -1)
    causal = torch.arange(tokens) <= of_query
    if window is not None:
        held = held & (place - lengths > of_query - window)
        causal = causal & (torch.arange(tokens) > of_query - window)
    past = Part(keys, values, held.to(query.device))
    if counted:
        past.log_weight = store.read_column(heads, "count").unflatten(0, shape).clamp(min=1).log()
    parts = [past, Part(fresh_keys, fresh_values, causal[None, None].to(query.device))]
    return attend_with_mass(query, parts, variant)[0]


def tokens_of(store: Store, heads: slice, count: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of two sequences' new tokens, as a model gives them: heads side by side in memory."""
    generator, kv_heads = torch.Generator().manual_seed(3), (heads.stop - heads.start) // 2
    sizes = [side.layout.dense.layout["x"][0][0] for side in (store.keys, store.values)]
    shapes = [(kv_heads * group, sizes[0]), (kv_heads, sizes[0]), (kv_heads, sizes[1])]
    new = (torch.randn(2, count, *shape, generator=generator) for shape in shapes)
    return tuple(x.transpose(1, 2).to(store.arena.device, dtype) for x in new)


def check(
    store: Store,
    heads: slice,
    dtype: torch.dtype = torch.float32,
    count: int = 23,
    group: int = 2,
    window: int | None = None,
    counted: bool = False,
    run: Blocks | None = None,
    **variant: object,
) -> None:
    new = tokens_of(store, heads, count, group, dtype)
    shaped = Variant(new[0].shape[3] ** -0.5, **variant)
    out = attend_prompt(*new, store, heads, shaped, window, counted, run)
    assert out is not None
    assert out.dtype == dtype
    tolerance = TOLERANCE[dtype]
    own = expected(new, store, heads, shaped, window, counted)
    torch.testing.assert_close(out.float(), own, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("keys", "values"), KINDS)
def test_every_format_as_the_reference(keys, values, device):
    store, heads = stored(keys, values, device, sizes=(32, 32), counts=RAGGED)
    check(store, heads)


@pytest.mark.parametrize(("keys", "values"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(keys, values, dtype, device):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bf16 in its own way")
    store, heads = stored(keys, values, device, dtype, sizes=(64, 64), counts=RAGGED)
    check(store, heads, dtype)


@pytest.mark.parametrize(
    ("sizes", "group", "count"), [((80, 16), 1, 1), ((16, 96), 3, 47), ((128, 64), 8, 9), ((64, 256), 4, 5)]
)
@pytest.mark.parametrize("kind", ["dense", "int4"])
def test_head_sizes_and_groups(sizes, group, count, kind, device):
    kinds = ("dense", "dense") if kind == "dense" else ("int4/channel/16", "int4/token/16")
    store, heads = stored(*kinds, device, sizes=sizes, counts=(35, 20))
    check(store, heads, group=group, count=count)


@pytest.mark.parametrize("kind", ["dense", "int4"])
def test_variants(kind, device):
    kinds = ("dense", "dense") if kind == "dense" else ("int4/channel/16", "int4/token/16")
    store, heads = stored(*kinds, device, columns=Columns({"count": torch.int32}), counts=(40, 5, 0, 21))
    check(store, heads, softcap=2.0, run=SMALL)
    check(store, heads, sinks=torch.tensor([0.5, -3.0], device=device), group=1, run=SMALL)
    check(store, heads, counted=True, run=SMALL)


@pytest.mark.parametrize(("window", "count"), [(2, 37), (10, 37), (33, 5), (80, 50)])
def test_windows(window, count, device):
    held = min(window - 1, 40)
    store, heads = stored("dense", "dense", device, counts=(held, held, held // 2, held // 2))
    check(store, heads, count=count, window=window, run=SMALL)


def test_heads_that_start_within_a_page(device):
    store, heads = stored("dense", "dense", device, counts=(60, 33, 20, 41))
    store.pop_front(heads, torch.tensor([3, 30, 0, 17]))
    check(store, heads)


RECIPES = ["full", "kivi(bits=4, group=16, residual=16)", "snapkv(window=8)", "h2o", "razorattention"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_chunks_of_a_prompt_are_those_of_the_reference(recipe, device, monkeypatch):
    tokens, outs, layers, served = random_tokens(60), {}, {}, []

    def spied(*arguments):
        out = prompt(*arguments)
        served.append(out is not None)
        return out

    monkeypatch.setattr("kvarn.layers.prompts.prompt", spied)
    for name, devices in (("reference", set()), ("kernel", {device.type})):
        monkeypatch.setattr("kvarn.memory.kernels.DEVICES", devices)
        layer = layers[name] = OneLayer(recipe, 10**9 if recipe in ("full", RECIPES[1]) else 24, device.type)
        parts = [split(tokens, first, last) for first, last in ((0, 30), (30, 47), (47, 60))]
        outs[name] = torch.cat([layer.prompt(*(t.to(device) for t in part)) for part in parts], 2)
    assert served == [False] * 2 + [True] * 2
    torch.testing.assert_close(outs["kernel"], outs["reference"], rtol=1e-4, atol=1e-4)
    assert layers["kernel"].group.store.lengths.tolist() == layers["reference"].group.store.lengths.tolist()
    if layers["kernel"].group.store.columns:
        assert layers["kernel"].positions() == layers["reference"].positions()


@pytest.mark.parametrize(("recipe", "decoded"), [(RECIPES[0], 0), (RECIPES[1], 0), ("snapkv(window=8)", 1)])
def test_what_is_stored_is_decoded_only_for_scores(recipe, decoded, device, monkeypatch):
    layer, tokens, read = OneLayer(recipe, 24 if decoded else 10**9, device.type), random_tokens(60), []
    layer.prompt(*(t.to(device) for t in split(tokens, 0, 30)))
    before = layer.group.arena.peak_bytes
    monkeypatch.setattr(Store, "read", lambda *_: pytest.fail("values are read"))
    keys = Store.read_keys
    monkeypatch.setattr(Store, "read_keys", lambda *arguments: read.append(1) or keys(*arguments))
    layer.prompt(*(t.to(device) for t in split(tokens, 30, 60)))
    assert len(read) == decoded
    assert layer.group.reads_prompts != bool(decoded)
    assert layer.group.arena.peak_bytes > before


def check_decoded(
    store: Store,
    heads: slice,
    dtype: torch.dtype = torch.float32,
    group: int = 2,
    joint: bool = False,
    **variant: object,
) -> None:
    """As ``check``, of entries that were decoded; ``joint``: heads lie beside each other in memory."""
    new = tokens_of(store, heads, 23, group, dtype)
    shaped, shape = Variant(new[0].shape[3] ** -0.5, **variant), new[1].shape[:2]
    keys, values = (x.unflatten(0, shape) for x in store.read(heads))
    if joint:
        keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values))
    out = attend_decoded(*new, Part(keys, values), store.lengths[heads].view(shape), shaped, SMALL)
    assert out.dtype == dtype
    own = expected(new, store, heads, shaped)
    torch.testing.assert_close(out.float(), own, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("sizes", [(32, 32), (80, 16)])
def test_decoded_entries(sizes, joint, device):
    store, heads = stored("int4/token/16", "dense", device, sizes=sizes, counts=RAGGED)
    check_decoded(store, heads, joint=joint)


def test_decoded_entries_in_every_variant(device):
    store, heads = stored("int4/token/16", "dense", device, torch.float16, counts=(40, 5, 0, 21))
    check_decoded(store, heads, torch.float16, softcap=2.0)
    check_decoded(store, heads, torch.float16, group=1, sinks=torch.tensor([0.5, -3.0], device=device))


MAPPED = [
    ("think(ratio=0.5, window=8, recent=8)", 10**9),
    ("mikv(low=4)", 10**9),
    ("h2o + zipcache(gap=5)", 24),
    (kvquant(), 10**9),
]


@pytest.mark.parametrize(("recipe", "capacity"), MAPPED)
def test_what_no_kernel_reads_as_it_lies_is_decoded_once(recipe, capacity, device, monkeypatch):
    served = []

    def spied(*arguments):
        out = prompt_decoded(*arguments)
        served.append(out is not None)
        return out

    monkeypatch.setattr("kvarn.layers.prompts.prompt_decoded", spied)
    outs = {}
    for name, devices in (("reference", set()), ("kernel", {device.type})):
        monkeypatch.setattr("kvarn.memory.kernels.DEVICES", devices)
        layer = OneLayer(recipe, capacity, device.type)
        parts = [split(random_tokens(40), first, last) for first, last in ((0, 30), (30, 40))]
        outs[name] = torch.cat([layer.prompt(*(t.to(device) for t in part)) for part in parts], 2)
        assert not layer.group.reads_prompts
    assert served == [False, True]
    torch.testing.assert_close(outs["kernel"], outs["reference"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", "full"),
        ("gemma2", "full"),
        ("gpt_oss", "full"),
        ("llama", "xquant(bits=8, group=16)"),
        ("llama", rotatekv(bits=8)),
        ("llama", "minicache"),
    ],
)
def test_chunks_of_whole_models(name, recipe, device, monkeypatch):
    model, ids = make_tiny(name).to(device), torch.randint(1, 160, (2, 40), generator=torch.Generator().manual_seed(5))
    logits = {}
    for devices in (set(), {device.type}):
        monkeypatch.setattr("kvarn.memory.kernels.DEVICES", devices)
        cache = kvarn.Cache(model, recipe)
        with torch.no_grad():
            for part in ids.to(device).split(20, 1):
                logits[bool(devices)] = model(part, past_key_values=cache).logits
    torch.testing.assert_close(logits[True], logits[False], rtol=1e-3, atol=1e-3)


def test_what_is_not_served_is_left_to_the_reference(device):
    store, heads = stored("dense", "dense", CPU)
    new = tokens_of(store, heads, 4, 2, torch.float32)
    served = prompt(*new, store, heads, Variant(0.25))
    assert (served is None) == (device.type != "cpu")
