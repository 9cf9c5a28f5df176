import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarn.formats.packing import FIELDS, pack, packed_size, unpack

BITS = sorted(FIELDS)


@given(st.sampled_from(BITS), st.integers(1, 9), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 2**31))
def test_packing_round_trip(bits: int, eights: int, leading: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*leading, 8 * eights), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, packed_size(8 * eights, bits))
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_is_used(bits: int) -> None:
    """n codes take exactly n * bits bits, and every pattern of them is some codes: packing is onto."""
    assert packed_size(64, bits) == 8 * bits
    packed = torch.randint(0, 256, (50, packed_size(64, bits)), dtype=torch.uint8)
    codes = unpack(packed, bits)
    assert int(codes.max()) < 2**bits
    assert torch.equal(pack(codes, bits), packed)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_order_within_bytes(bits: int) -> None:
    """Code i lies in byte i % bytes, at bit bits * (i // bytes)."""
    count = 16
    size = packed_size(count, bits)
    for i in range(count):
        codes = torch.zeros(count, dtype=torch.uint8)
        codes[i] = 2**bits - 1
        expected = [0] * size
        expected[i % size] = (2**bits - 1) << (bits * (i // size))
        assert pack(codes, bits).tolist() == expected


def test_three_bits_are_two_bits_and_one() -> None:
    codes = torch.randint(0, 8, (4, 24), dtype=torch.uint8)
    assert torch.equal(pack(codes, 3), torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], -1))
