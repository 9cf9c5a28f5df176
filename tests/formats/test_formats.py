import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvarn.attention import Part, Variant, attend
from kvarn.errors import RecipeError
from kvarn.formats import Columns, Dense, Format, Int
from kvarn.formats.packing import unpack
from kvarn.formats.spectral import Spectral

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "bf16", "fp16"]

ints = st.builds(
    lambda bits, axis, group, size, dtype: Int(bits, axis, group, size, dtype),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(["channel", "token"]),
    st.sampled_from([1, 2, 4, 8, 64]),  # 64 exceeds the size: one group a token
    st.sampled_from([8, 24 * 8, 16]),
    st.sampled_from(DTYPES),
)


def groups(fmt: Int, x: Tensor) -> Tensor:
    """[tokens, size] with the numbers that share a scale in the last dimension, restated by index arithmetic."""
    tokens, size = x.shape
    if fmt.axis == "channel":
        return torch.stack([x[i : i + fmt.group].T for i in range(0, tokens, fmt.group)]).flatten(0, 1)
    return torch.stack([x[:, i : i + fmt.group] for i in range(0, size, fmt.group)], 1).flatten(0, 1)


def naive(fmt: Int, x: Tensor) -> tuple[list[list[int]], Tensor]:
    """Codes [tokens][size] and decoded numbers, in plain loops over groups."""
    tokens, size = x.shape
    codes = [[0] * size for _ in range(tokens)]
    decoded = torch.zeros(tokens, size, dtype=fmt.dtype)
    kept = torch.float16 if fmt.dtype == torch.bfloat16 else fmt.dtype
    if fmt.axis == "channel":
        cells = [[(t0 + t, c) for t in range(fmt.group)] for t0 in range(0, tokens, fmt.group) for c in range(size)]
    else:
        cells = [[(t, c0 + c) for c in range(fmt.group)] for t in range(tokens) for c0 in range(0, size, fmt.group)]
    for cell in cells:
        numbers = [x[place].float() for place in cell]
        low, high = min(numbers), max(numbers)
        scale = ((high - low) / (2**fmt.bits - 1)).to(kept).float()
        minimum = low.to(kept).float()
        for place, number in zip(cell, numbers, strict=True):
            code = 0
            if scale > 0:
                code = min(max(round(float((number - minimum) / scale)), 0), 2**fmt.bits - 1)
            codes[place[0]][place[1]] = code
            decoded[place] = (code * scale + minimum).to(fmt.dtype)
    return codes, decoded


@settings(max_examples=60)
@given(ints, st.integers(1, 3), st.sampled_from([1e-3, 1.0, 50.0]), st.floats(-3, 3), st.integers(0, 2**31))
def test_error_is_within_half_a_scale(fmt: Int, units: int, spread: float, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = ((torch.randn(units * fmt.unit, fmt.size, generator=generator) + shift) * spread).to(fmt.dtype)
    rows = fmt.encode(x)
    y = fmt.decode(rows)
    assert y.dtype == fmt.dtype
    assert y.shape == x.shape
    error = (groups(fmt, y.double()) - groups(fmt, x.double())).abs()
    given_groups = groups(fmt, x.double())
    low, high = given_groups.amin(-1, keepdim=True), given_groups.amax(-1, keepdim=True)
    half = (high - low) / (2**fmt.bits - 1) / 2
    # The scale is stored rounded (over the whole range that is range * eps / 2), and so is what is decoded.
    eps = torch.finfo(fmt.dtype).eps
    tiny = torch.finfo(fmt.dtype).smallest_normal * torch.finfo(fmt.dtype).eps * 2**fmt.bits
    rounding = (high - low) * eps + torch.maximum(low.abs(), high.abs()) * eps + tiny
    assert bool((error <= half * (1 + eps) + rounding).all())


@settings(max_examples=25)
@given(ints.filter(lambda fmt: fmt.size < 100 and fmt.unit < 64), st.integers(0, 2**31))
def test_encoding_restated_in_loops(fmt: Int, seed: int) -> None:
    x = torch.randn(fmt.unit * 2, fmt.size, generator=torch.Generator().manual_seed(seed)).to(fmt.dtype)
    codes, decoded = naive(fmt, x)
    rows = fmt.encode(x)
    found = unpack(rows["codes"], fmt.bits).reshape(x.shape)
    wrong = found != torch.tensor(codes)
    # Division in another precision may decide a tie the other way.
    assert int(wrong.sum()) <= 1 + x.numel() // 200
    assert torch.equal(fmt.decode(rows)[~wrong], decoded[~wrong])


@settings(max_examples=30)
@given(ints, st.integers(0, 2**31))
def test_rows_are_what_the_layout_says(fmt: Int, seed: int) -> None:
    x = torch.randn(2, 3, 2 * fmt.unit, fmt.size, generator=torch.Generator().manual_seed(seed)).to(fmt.dtype)
    rows = fmt.encode(x)
    assert set(rows) == set(fmt.layout)
    for name, (shape, dtype) in fmt.layout.items():
        assert rows[name].shape == (2, 3, 2, *shape)
        assert rows[name].dtype == dtype
    unit = {name: tensor[0, 0, 0] for name, tensor in rows.items()}
    assert sum(tensor.numel() * tensor.element_size() for tensor in unit.values()) == fmt.unit_bytes
    scales = fmt.unit * fmt.size // fmt.group
    assert fmt.unit_bytes == fmt.unit * fmt.size * fmt.bits // 8 + 2 * scales * fmt.dtype.itemsize


def test_numbers_that_fp16_does_not_have() -> None:
    """Beyond the largest there is, the largest; nothing becomes infinite."""
    fmt = Int(2, "token", 8, 8, torch.bfloat16)
    x = torch.tensor([[-3e5, 3e5, 0, 0, 0, 0, 0, 0]], dtype=torch.bfloat16)
    assert fmt.encode(x)["range"].tolist() == [[[65504.0, -65504.0]]]
    assert fmt.decode(fmt.encode(x)).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_for_each_number(bits: int) -> None:
    """KIVI's own account: b + 32 / G bits a number with scales and minima of 16 bits."""
    fmt = Int(bits, "channel", 32, 128, torch.float16)
    assert fmt.unit_bytes * 8 / (fmt.unit * 128) == bits + 32 / 32
    fmt = Int(bits, "token", 64, 128, torch.float16)
    assert fmt.unit_bytes * 8 / 128 == bits + 32 / 64


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_constant_groups_are_exact(bits: int, axis: str, dtype: torch.dtype) -> None:
    fmt = Int(bits, axis, 8, 16, dtype)
    constants = torch.tensor([0.0, 1 / 3, -7.7, 1e-4, 300.0, -2.0, 0.1, 5e-5], dtype=dtype)
    x = constants.repeat(2).expand(8, 16) if axis == "channel" else constants[:, None].expand(8, 16)
    assert torch.equal(fmt.decode(fmt.encode(x)), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_four_equally_spaced_values_are_exact_at_two_bits(axis: str, dtype: torch.dtype) -> None:
    fmt = Int(2, axis, 16, 16, dtype)
    x = torch.tensor([0, 1, 2, 3], dtype=dtype).repeat(4)
    x = x[:, None].expand(16, 16) if axis == "channel" else x.expand(16, 16)
    rows = fmt.encode(x)
    assert bool((rows["range"][..., 0] == 1).all())
    assert not rows["range"][..., 1].any()
    assert torch.equal(fmt.decode(rows), x)
    y = x * 0.25 - 4
    assert torch.equal(fmt.decode(fmt.encode(y)), y)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_every_row_is_encoded_alone(axis: str) -> None:
    fmt = Int(2, axis, 4, 16, torch.float32)
    x = torch.randn(3, 2, 12, 16) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)
    together = fmt.encode(x)
    for i in range(3):
        for name, tensor in fmt.encode(x[i : i + 1]).items():
            assert torch.equal(tensor[0], together[name][i])
    for first in range(0, 12, 4):  # and every unit
        for name, tensor in fmt.encode(x[:, :, first : first + 4]).items():
            units = 4 // fmt.unit
            assert torch.equal(tensor, together[name][:, :, first // fmt.unit : first // fmt.unit + units])
    assert torch.equal(fmt.decode(together)[1], fmt.decode({name: t[1] for name, t in together.items()}))


def test_encoding_changes_nothing_that_it_was_given() -> None:
    fmt = Int(4, "channel", 4, 8, torch.float32)
    x = torch.randn(8, 8)
    copy = x.clone()
    rows = fmt.encode(x)
    kept = {name: tensor.clone() for name, tensor in rows.items()}
    fmt.decode(rows)
    assert torch.equal(x, copy)
    assert all(torch.equal(rows[name], kept[name]) for name in rows)


def test_a_large_key_channel_costs_per_token_formats_far_more() -> None:
    """What KIVI rests on: keys have a few large channels, and only a scale a channel keeps the others."""
    n, size = 128, 64
    query, keys, values = torch.randn(1, 4, 32, size), torch.randn(1, 4, n, size), torch.randn(1, 4, n, size)
    keys[..., 7] *= 50
    query[..., 7] /= 50
    variant = Variant(size**-0.5)
    exact = attend(query, [Part(keys, values)], variant)
    errors = {}
    for axis in ("channel", "token"):
        fmt = Int(2, axis, 32, size, torch.float32)
        found = attend(query, [Part(fmt.decode(fmt.encode(keys)), values)], variant)
        errors[axis] = float((found - exact).square().mean())
    assert errors["channel"] * 3 < errors["token"]


@pytest.mark.parametrize(
    ("bits", "size", "group", "axis", "message"),
    [
        (1, 16, 8, "token", "bits=1: use 2, 3, 4 or 8"),
        (5, 16, 8, "token", "bits=5: use 2, 3, 4 or 8"),
        (16, 16, 8, "channel", "bits=16"),
        (2, 12, 4, "channel", "multiple of 8 numbers; these have 12"),
        (2, 24, 16, "token", "group=16 does not divide the head size 24"),
    ],
)
def test_parameters_that_cannot_be(bits: int, size: int, group: int, axis: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Int(bits, axis, group, size, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_dense_is_the_vectors_themselves(dtype: torch.dtype) -> None:
    fmt = Dense(24, dtype)
    x = torch.randn(2, 5, 24).to(dtype)
    assert torch.equal(fmt.decode(fmt.encode(x)), x)
    assert fmt.unit == 1
    assert fmt.unit_bytes == 24 * dtype.itemsize


def test_columns_are_scalars_by_name() -> None:
    fmt = Columns({"position": torch.int32, "mass": torch.float32, "hits": torch.int64})
    assert fmt.unit_bytes == 4 + 4 + 8
    assert all(shape == () for shape, _ in fmt.layout.values())
    assert Columns({"flags": ((5,), torch.uint8), "position": torch.int32}).unit_bytes == 5 + 4
    with pytest.raises(TypeError, match="append rows"):
        fmt.encode(torch.zeros(1, 1))
    with pytest.raises(TypeError, match="by name"):
        fmt.decode({})


def test_keys_tell_formats_apart() -> None:
    def make() -> list[Format]:
        made: list[Format] = [Dense(size, dtype) for size in (8, 16) for dtype in DTYPES]
        for axis in ("channel", "token"):
            made += [Int(b, axis, g, s, d) for b in (2, 3, 4, 8) for g in (4, 8) for s in (16, 32) for d in DTYPES]
        return [*made, Columns({"position": torch.int32}), Columns({"mass": torch.float32})]

    keys = [fmt.key for fmt in make()]
    assert keys == [fmt.key for fmt in make()]
    # Formats that mean different things must not meet in one pool.
    assert len(set(keys)) == len(keys)


def test_no_tokens_at_all_are_read_as_none() -> None:
    fmt = Spectral(8, 4, 16, torch.float32).given({"order": torch.arange(16, dtype=torch.int16).expand(3, -1)})
    rows = fmt.encode(torch.zeros(3, 0, 16))
    assert rows["signs"].shape[:2] == (3, 0)
    assert fmt.decode(rows).shape == (3, 0, 16)
