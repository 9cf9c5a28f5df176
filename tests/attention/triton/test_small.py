"""The kernels of a layer's small operations beside what transformers' modules compute."""

import pytest
import torch
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import silu

pytest.importorskip("triton")

from kvarn.attention.kernels import Unturned
from kvarn.attention.triton.matvec import Tiling, gated_linear, linear
from kvarn.attention.triton.small import added_norm, append, gated, norm, turned

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
        rtol = 2 * torch.finfo(joint.dtype).eps
        torch.testing.assert_close(gated(*each), silu(gate) * up, rtol=rtol, atol=0)


@pytest.mark.parametrize("turns", [1, 3])
def test_rotations(random, turns):
    query, key = random(3, 1, 4, 16).transpose(1, 2), random(3, 1, 2, 16).transpose(1, 2)
    cos, sin = random(turns, 1, 16), random(turns, 1, 16)
    for ours, states in zip(turned(query, key, cos, sin), (query, key), strict=True):
        torch.testing.assert_close(ours, rotated(states, cos, sin), **exact(query))


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (6, 2), (12, 3), (16, 2), (9, 9)])
@pytest.mark.parametrize("normed", [False, True])
def test_tokens_are_rotated_where_they_are_stored(random, queries, keys, normed):
    batch, size, value_size = 3, 24, 20
    states = random(batch, (queries + keys) * size + keys * value_size)
    cos, sin = random(1 if normed else batch, 1, size), random(1 if normed else batch, 1, size)
    norms = [(random(size), 1e-5), (random(size), 1e-4)] if normed else []
    stored = random(batch * keys + 5, size), random(batch * keys + 7, value_size)
    slots = [torch.randperm(x.shape[0], device=x.device)[: batch * keys] for x in stored]
    expected = [x.clone() for x in stored]
    parts = states.split([queries * size, keys * size, keys * value_size], 1)
    query, key, value = (x.unflatten(1, (n, -1))[:, :, None] for x, n in zip(parts, (queries, keys, keys), strict=True))
    if normed:
        query, key = (rms_norm(x, weight, e) for x, (weight, e) in zip((query, key), norms, strict=True))
    for rows, slot, new in zip(expected, slots, (rotated(key, cos, sin), value), strict=True):
        rows[slot] = new.flatten(0, 2)
    token = Unturned(states, cos, sin, queries, keys, norms)
    out = append(token, (stored[0], slots[0]), (stored[1], slots[1]))
    torch.testing.assert_close(out, rotated(query, cos, sin), **exact(out))
    torch.testing.assert_close(stored[0], expected[0], **exact(out))
    assert torch.equal(stored[1], expected[1])


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("size", "outputs", "tiling"), [(96, 11, Tiling(8, 64, 4)), (40, 8, Tiling(2, 512, 2))])
def test_products_of_few_rows(random, rows, size, outputs, tiling):
    x, weight, bias = random(rows, 1, size), random(2 * outputs, size) / 8, random(2 * outputs)
    loose = {"rtol": 1e-5, "atol": 1e-5} if x.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(linear(x, weight, tiling=tiling), torch_linear(x, weight), **loose)
    torch.testing.assert_close(linear(x, weight, bias, tiling), torch_linear(x, weight, bias), **loose)
    gate, up = torch_linear(x, weight).chunk(2, -1)
    torch.testing.assert_close(gated_linear(x, weight, tiling), silu(gate) * up, **loose)
