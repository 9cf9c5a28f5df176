"""VidKV against the paper's algorithm in plain loops (arXiv 2503.16257)."""

import cmath
import math

import pytest
import torch
from one_layer import KV_HEADS, SIZE, OneLayer, random_tokens, split
from torch import Tensor

import kvarn
from kvarn.errors import RecipeError
from kvarn.formats import Int, Spectral, Ternary
from kvarn.formats.spectral import _spectrum, _vectors
from kvarn.methods.vidkv import VidKV


def two_bits(numbers: list[float]) -> list[float]:
    low, high = min(numbers), max(numbers)
    scale = (high - low) / 3
    return [round((x - low) / scale) * scale + low if scale else low for x in numbers]


def ternary(numbers: list[float], threshold: float) -> list[float]:
    bound = threshold * sum(map(abs, numbers)) / len(numbers)
    coded = [abs(x) for x in numbers if abs(x) > bound]
    scale = sum(coded) / len(coded)
    return [math.copysign(scale, x) if abs(x) > bound else 0.0 for x in numbers]


def transform(vector: list[float], sign: int) -> list[complex]:
    """The discrete Fourier transform, orthonormal."""
    m = len(vector)
    terms = [[x * cmath.exp(sign * 2j * math.pi * i * k / m) for i, x in enumerate(vector)] for k in range(m)]
    return [sum(row) / math.sqrt(m) for row in terms]


def signs_of_spectrum(block: list[list[float]]) -> list[list[float]]:
    """Tokens of a group: each part of each bin of their transforms becomes its sign times its mean magnitude."""
    spectra = [transform(row, -1) for row in block]
    m = len(block[0])

    def coded(parts: list[float]) -> list[float]:
        mean = sum(map(abs, parts)) / len(parts)
        return [mean if part >= 0 else -mean for part in parts]

    real = [coded([row[k].real for row in spectra]) for k in range(m // 2 + 1)]
    imaginary = [
        coded([row[k].imag for row in spectra]) if 0 < k < m // 2 else [0.0] * len(block) for k in range(m // 2 + 1)
    ]
    out = []
    for token in range(len(block)):
        half = [complex(real[k][token], imaginary[k][token]) for k in range(m // 2 + 1)]
        whole = half + [half[k].conjugate() for k in range(m // 2 - 1, 0, -1)]
        out.append([z.real for z in transform(whole, 1)])
    return out


def naive_keys(keys: Tensor, wide: list[int], group: int) -> Tensor:
    others = [c for c in range(SIZE) if c not in wide]
    out = keys.clone()
    for first in range(0, len(keys), group):
        block = keys[first : first + group]
        for channel in wide:
            out[first : first + group, channel] = torch.tensor(two_bits(block[:, channel].tolist()))
        out[first : first + group, others] = torch.tensor(signs_of_spectrum(block[:, others].tolist()))
    return out


def naive_values(values: Tensor, group: int) -> Tensor:
    out = values.clone()
    for first in range(0, len(values), group):
        for channel in range(SIZE):
            numbers = values[first : first + group, channel].tolist()
            out[first : first + group, channel] = torch.tensor(ternary(numbers, 0.5))
    return out


def test_the_same_cache_as_the_paper_token_by_token():
    group, residual, prompt, total = 8, 16, 37, 70
    tokens = random_tokens(total)
    layer = OneLayer(f"vidkv(group={group}, residual={residual})")
    layer.prompt(*split(tokens, 0, prompt))
    ranges = tokens[1][0, :, :prompt].amax(1) - tokens[1][0, :, :prompt].amin(1)
    for seen in (prompt, 47, 48, 63, 64, total):
        while layer.seen < seen:
            layer.token(*split(tokens, layer.seen, layer.seen + 1))
        keys, values = layer.keys_and_values()
        old = seen - seen % residual
        for head in range(KV_HEADS):
            wide = sorted(sorted(range(SIZE), key=lambda c: -float(ranges[head, c]))[: SIZE // 2])
            for found, given, coded in (
                (keys[head], tokens[1][0, head, :seen], naive_keys(tokens[1][0, head, :old], wide, group)),
                (values[head], tokens[2][0, head, :seen], naive_values(tokens[2][0, head, :old], group)),
            ):
                torch.testing.assert_close(found[:old], coded, rtol=1e-4, atol=1e-4)
                assert torch.equal(found[old:], given[old:])


def test_two_bits_for_all_is_codes_per_channel():
    tokens = random_tokens(48)
    layer = OneLayer("vidkv(key_bits=2.0, value_bits=2.0, group=8, residual=16)")
    layer.prompt(*tokens)
    fmt = Int(2, "channel", 8, SIZE, torch.float32)
    for side, given in zip(layer.keys_and_values(), tokens[1:], strict=True):
        assert torch.equal(side, fmt.decode(fmt.encode(given[0])))


def test_the_spectrum_has_as_many_numbers_and_comes_back():
    x = torch.randn(5, 24)
    assert _spectrum(x).shape == x.shape
    torch.testing.assert_close(_vectors(_spectrum(x)), x)


def test_three_values_are_exact():
    """Two thirds not zero: the threshold lies between, and the scale is that of the numbers that are coded."""
    x = torch.tensor([3.0, 0.0, -3.0]).repeat(4)[None, :, None] * torch.tensor([1.0, 0.25, 100.0, 0.0, 7.0, 1e-3, 2.0])
    fmt = Ternary(12, 0.5, 7, torch.float32)
    assert torch.equal(fmt.decode(fmt.encode(x)), x)


def test_bits_of_a_number():
    """At 128 channels and 16-bit scales: (3 + 1.5) / 2 for keys, 26 bytes a token and a scale in 32 for values."""
    assert Spectral(64, 32, 128, torch.bfloat16).unit_bytes * 8 / (32 * 128) == 2.25
    assert Ternary(32, 0.5, 128, torch.bfloat16).unit_bytes * 8 / (32 * 128) == 1.625 + 0.5


def test_channels_of_large_range_are_worth_their_bits(smollm2):
    """On real keys: two bits for the channels that vary least lose more."""
    from test_real_model import HAYSTACK

    model, tokenizer = smollm2
    ids = tokenizer(HAYSTACK, return_tensors="pt").input_ids[:, :256]
    cache = kvarn.Cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
    x = cache._groups[0].store.keys.read(slice(0, 90))
    fmt = Spectral(32, 32, 64, torch.float32)
    errors = []
    for ranked in (x, 1 / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) * torch.linspace(-1, 1, 256)[:, None]):
        bound = fmt.given(fmt.observe(ranked, torch.ones(90, 256, dtype=torch.bool), torch.zeros(90, 3, 0, 64)))
        errors.append(float((bound.decode(bound.encode(x)) - x).norm() / x.norm()))
    assert errors[0] * 1.2 < errors[1], errors


@pytest.mark.parametrize(
    "parameters", [{"key_bits": 1.0}, {"key_bits": 2.5}, {"value_bits": 1.0}, {"group": 48}, {"threshold": -1.0}]
)
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="vidkv"):
        VidKV(**parameters)


def test_channels_that_cannot_be_packed():
    for bits, wide in ((1.25, 4), (1.01, 0)):
        with pytest.raises(
            RecipeError, match=f"{wide} channels of 2 bits and {SIZE - wide} of 1: both must be multiples"
        ):
            OneLayer(f"vidkv(key_bits={bits})")
