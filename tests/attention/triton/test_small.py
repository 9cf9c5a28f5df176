"""The kernels of a layer's small operations beside what transformers' modules compute."""

import pytest
import torch
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import silu

pytest.importorskip("triton")

from kvarn.attention.newest import Pages, Projected
from kvarn.attention.triton.matvec import Tiling, gated_linear, linear
from kvarn.attention.triton.small import added_norm, append, gated, norm, turned
from kvarn.formats import Dense, Float8, Int

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def random(request, device):
    """Random numbers of a shape."""
    if (device.type, request.param) == ("cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter cuts numbers off where bfloat16 rounds")
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, request.param)


def exact(x):
    """Tolerances within which ``x`` is rounded as it should be."""
    return {"rtol": 1e-6, "atol": 1e-6} if x.dtype == torch.float32 else {"rtol": 0, "atol": 0}


def rms_norm(x, weight, epsilon=1e-5):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]


def test_norms_and_sums(random):
    x, added, weight = random(3, 1, 96), random(3, 1, 96), random(96)
    torch.testing.assert_close(norm(x, weight, 1e-5), rms_norm(x, weight), **exact(x))
    total, normed = added_norm(x, added, weight, 1e-5)
    assert torch.equal(total, x + added)
    torch.testing.assert_close(normed, rms_norm(x + added, weight), **exact(x))


def test_gates(random):
    joint = random(3, 1, 2 * 1100)
    gate, up = joint.chunk(2, -1)
    for each in ((gate, up), (gate.contiguous(), up.contiguous())):
        # Exponentials are not the same to the last bit, so that a number may be rounded the other way.
        rtol = 4 * torch.finfo(joint.dtype).eps
        torch.testing.assert_close(gated(*each), silu(gate) * up, rtol=rtol, atol=0)


@pytest.mark.parametrize("turns", [1, 3])
def test_rotations(random, turns):
    query, key = random(3, 1, 4, 16).transpose(1, 2), random(3, 1, 2, 16).transpose(1, 2)
    cos, sin = random(turns, 1, 16), random(turns, 1, 16)
    for ours, states in zip(turned(query, key, cos, sin), (query, key), strict=True):
        torch.testing.assert_close(ours, rotated(states, cos, sin), **exact(query))


def pages(random, heads, fmt, first, page=4):
    """Heads from ``first`` on with 1 to 9 tokens in scattered pages, one of them empty; the slots of their newest."""
    lengths = torch.arange(first + heads) % 9 + 1
    lengths[first + 1] = 0
    starts = torch.arange(first + heads) % page * (lengths > 0)
    table = torch.randperm((first + heads) * 16).view(-1, 16).int()
    last = (starts + lengths - 1).clamp(min=0)
    slots = table.gather(1, last[:, None] // page)[:, 0].long() * page + last % page
    rows = fmt.encode(random(table.numel(), page, fmt.size))
    device = next(iter(rows.values())).device
    spans = torch.stack([starts, lengths], 1).int()
    return Pages(fmt, rows, table.to(device), spans.to(device)), slots[first:], lengths[first:] > 0


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (6, 2), (12, 3), (16, 2), (9, 9), (0, 3)])
@pytest.mark.parametrize("normed", [False, True])
def test_tokens_are_rotated_where_they_are_stored(random, queries, keys, normed):
    batch, size, value_size, first = 3, 24, 20, 2
    states = random(batch, (queries + keys) * size + keys * value_size)
    turn = tuple(random(1 if normed else batch, 1, size) for _ in range(2)) if queries else None
    norms = [(random(size), 1e-5), (random(size), 1e-4)] if normed and queries else []
    parts = states.split([queries * size, keys * size, keys * value_size], 1)
    new = [x.unflatten(1, (n, -1))[:, :, None] for x, n in zip(parts, (queries, keys, keys), strict=True) if n]
    for i, (weight, epsilon) in enumerate(norms):
        new[i] = rms_norm(new[i], weight, epsilon)
    if turn:
        new[:2] = [rotated(x, *turn) for x in new[:2]]
    stored, expected = [], []
    for x in new[-2:]:
        kept, slots, held = pages(random, batch * keys, Dense(x.shape[-1], x.dtype), first)
        rows = kept.tensors["x"].clone()
        rows.flatten(0, 1)[slots[held]] = x.flatten(0, 2)[held]
        stored.append(kept)
        expected.append(rows)
    out = append(Projected(states, queries, keys, turn, norms), *stored, first)
    if queries:
        torch.testing.assert_close(out, new[0], **exact(out))
    torch.testing.assert_close(stored[0].tensors["x"], expected[0], **exact(out))
    assert torch.equal(stored[1].tensors["x"], expected[1])


CODES = {
    "dense": Dense,
    "float8": Float8,
    **{f"int{bits}": lambda size, dtype, bits=bits: Int(bits, "token", 8, size, dtype) for bits in (2, 3, 4, 8)},
    "whole int4": lambda size, dtype: Int(4, "token", size, size, dtype, clip=0.9),
}


@pytest.mark.parametrize(
    ("of_keys", "of_values"),
    [
        ("float8", "float8"),
        ("int8", "int4"),
        ("int4", "int2"),
        ("int2", "float8"),
        ("int3", "int3"),
        ("whole int4", "dense"),
        ("dense", "whole int4"),
    ],
)
@pytest.mark.parametrize(("queries", "keys", "normed"), [(6, 2, False), (9, 9, True), (0, 3, False)])
def test_tokens_are_encoded_where_they_are_stored(random, of_keys, of_values, queries, keys, normed):
    """As the format encodes what would be stored exactly, bit by bit; nothing else changes."""
    batch, size, value_size, first = 3, 24, 16, 2
    states = random(batch, (queries + keys) * size + keys * value_size)
    states[1, queries * size :] = 0  # vectors without a largest number
    turn = tuple(random(batch, 1, size) for _ in range(2)) if queries else None
    norms = [(random(size), 1e-5), (random(size), 1e-4)] if normed else []
    token = Projected(states, queries, keys, turn, norms)
    sizes, exactly, encoded = (size, value_size), [], []
    for kind, n in zip((of_keys, of_values), sizes, strict=True):
        torch.manual_seed(0)  # the same pages for both
        exactly.append(pages(random, batch * keys, Dense(n, states.dtype), first))
        torch.manual_seed(0)
        encoded.append(pages(random, batch * keys, CODES[kind](n, states.dtype), first))
    before = [{name: rows.clone() for name, rows in each.tensors.items()} for each, *_ in encoded]
    outs = [append(token, *(each for each, *_ in kept), first) for kept in (exactly, encoded)]
    assert torch.equal(*outs)
    for (exact_pages, slots, held), (kept, *_), rows in zip(exactly, encoded, before, strict=True):
        new = kept.format.encode(exact_pages.tensors["x"].flatten(0, 1)[slots[held]])
        for name, tensor in rows.items():
            tensor.flatten(0, 1)[slots[held]] = new[name]
            assert torch.equal(kept.tensors[name], tensor)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("size", "outputs", "tiling"), [(96, 11, Tiling(8, 64, 4)), (40, 8, Tiling(2, 512, 2))])
def test_products_of_few_rows(random, rows, size, outputs, tiling):
    x, weight, bias = random(rows, 1, size), random(2 * outputs, size) / 8, random(2 * outputs)
    loose = {"rtol": 1e-5, "atol": 1e-5} if x.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(linear(x, weight, tiling=tiling), torch_linear(x, weight), **loose)
    torch.testing.assert_close(linear(x, weight, bias, tiling), torch_linear(x, weight, bias), **loose)
    gate, up = torch_linear(x, weight).chunk(2, -1)
    torch.testing.assert_close(gated_linear(x, weight, tiling), silu(gate) * up, **loose)
