"""GEAR against the paper's algorithm in plain loops (arXiv 2403.05527)."""

import math

import pytest
import torch
from one_layer import KV_HEADS, SIZE, OneLayer, random_tokens, split
from torch import Tensor

from kvarn.errors import RecipeError
from kvarn.formats import Corrected, Int
from kvarn.methods.gear import GEAR


def quantized(numbers: list[float], bits: int) -> list[float]:
    low, high = min(numbers), max(numbers)
    scale = (high - low) / (2**bits - 1)
    return [round((x - low) / scale) * scale + low if scale else low for x in numbers]


def codes_and_outliers(block: list[list[float]], bits: int, group: int, outliers: float, by_channel: bool):
    """Q + S of one block ([tokens][size]) with the outliers put back, as vectors along the axis of the groups."""
    vectors = [list(column) for column in zip(*block, strict=True)] if by_channel else block
    result = []
    for vector in vectors:
        count = min(math.ceil(outliers * len(vector) / 2), len(vector) // 2)
        order = sorted(range(len(vector)), key=lambda i: vector[i])
        exact = order[:count] + order[len(vector) - count :]
        mean = sum(vector) / len(vector)
        filled = [mean if i in exact else x for i, x in enumerate(vector)]
        coded = [x for first in range(0, len(vector), group) for x in quantized(filled[first : first + group], bits)]
        result.append([vector[i] if i in exact else x for i, x in enumerate(coded)])
    return [list(row) for row in zip(*result, strict=True)] if by_channel else result


def orthonormal(columns: list[Tensor]) -> list[Tensor]:
    """Gram and Schmidt's."""
    done: list[Tensor] = []
    for column in columns:
        for other in done:
            column = column - (column @ other) * other
        done.append(column / column.norm())
    return done


def low_rank(error: Tensor, start: Tensor, loops: int) -> Tensor:
    right = list(start.double().T)
    for loop in range(loops):
        right = orthonormal(right) if loop == loops - 1 else right
        left = [error @ column for column in right]
        left = orthonormal(left) if loop == loops - 1 else left
        right = [error.T @ column for column in left]
    return sum(torch.outer(a, b) for a, b in zip(left, right, strict=True))


def test_the_same_cache_as_the_paper_token_by_token():
    bits, group, block, rank, outliers, prompt, total = 2, 8, 16, 2, 0.2, 37, 70
    tokens = random_tokens(total)
    layer = OneLayer(f"gear(bits={bits}, group={group}, block={block}, rank={rank}, outliers={outliers})")
    layer.prompt(*split(tokens, 0, prompt))
    starts = [side.layout.format._start for side in (layer.group.store.keys, layer.group.store.values)]
    for seen in (prompt, 47, 48, 63, 64, total):
        while layer.seen < seen:
            layer.token(*split(tokens, layer.seen, layer.seen + 1))
        for side, given, by_channel, start in zip(
            layer.keys_and_values(), tokens[1:], (True, False), starts, strict=True
        ):
            for head in range(KV_HEADS):
                expected = given[0, head, :seen].double()
                for first in range(0, seen - seen % block, block):
                    rows = expected[first : first + block]
                    coded = torch.tensor(codes_and_outliers(rows.tolist(), bits, group, outliers, by_channel)).double()
                    expected[first : first + block] = coded + low_rank(rows - coded, start, loops=3)
                torch.testing.assert_close(side[head].double(), expected, rtol=1e-3, atol=1e-3)


def test_earlier_blocks_are_left_as_they_are():
    tokens = random_tokens(80)
    layer = OneLayer("gear(group=16, block=16)")
    layer.prompt(*split(tokens, 0, 40))
    before = [side[:, :32].clone() for side in layer.keys_and_values()]
    for position in range(40, 80):
        layer.token(*split(tokens, position, position + 1))
    for old, new in zip(before, layer.keys_and_values(), strict=True):
        assert torch.equal(old, new[:, :32])


def corrected(axis: str, rank: int, outliers: float, loops: int = 3) -> Corrected:
    return Corrected(Int(2, axis, 16, 32, torch.float32), 16, rank, outliers, loops)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_degenerate_settings(axis):
    x = torch.randn(2, 32, 32)
    backbone = Int(2, axis, 16, 32, torch.float32)
    plain = corrected(axis, 0, 0.0)
    assert torch.equal(plain.decode(plain.encode(x)), backbone.decode(backbone.encode(x)))
    for exact in (corrected(axis, 16, 0.0), corrected(axis, 0, 1.0)):
        torch.testing.assert_close(exact.decode(exact.encode(x)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("axis", "scale"), [("channel", 1.0), ("token", 1.0), ("token", 1e-7)])
def test_the_error_falls_with_the_rank_and_is_near_the_best(axis, scale):
    x = torch.randn(3, 16, 32) * torch.logspace(0, 2, 32) * scale
    plain = corrected(axis, 0, 0.0)
    spectrum = torch.linalg.svdvals(x - plain.decode(plain.encode(x)))
    last = math.inf
    for rank in (0, 1, 2, 4, 8):
        fmt = corrected(axis, rank, 0.0)
        error = float((x - fmt.decode(fmt.encode(x))).norm())
        assert error < last
        assert error <= 1.1 * float(spectrum[:, rank:].square().sum().sqrt())
        last = error


def test_blocks_without_an_error():
    """There is nothing to factor, and no harm in it."""
    fmt = Corrected(Int(4, "channel", 8, 16, torch.bfloat16), 8, 2, 0.1, 3)
    for x in (torch.zeros(1, 8, 16), torch.full((1, 8, 16), 3.0)):
        assert torch.equal(fmt.decode(fmt.encode(x.bfloat16())).float(), x)


def test_corrections_bring_the_model_nearer_to_the_full_cache(smollm2):
    """On real keys and values at 2 bits: codes alone are worse than GEAR-L, and that is worse than GEAR."""
    import kvarn
    from test_real_model import HAYSTACK

    model, tokenizer = smollm2
    ids = tokenizer(HAYSTACK, return_tensors="pt").input_ids[:, :256]
    caches = kvarn.Cache(model)
    with torch.no_grad():
        model(ids, past_key_values=caches, logits_to_keep=1)
    store = caches._groups[0].store
    for side, axis in ((store.keys, "channel"), (store.values, "token")):
        x = side.read(slice(0, 90))
        errors = []
        for rank, outliers in ((0, 0.0), (2, 0.0), (2, 0.02)):
            fmt = Corrected(Int(2, axis, 64, 64, torch.float32), 64, rank, outliers, 3)
            errors.append(float((fmt.decode(fmt.encode(x)) - x).norm() / x.norm()))
        assert errors[0] > 1.05 * errors[1] > 1.05**2 * errors[2], errors


@pytest.mark.parametrize(
    "parameters", [{"bits": 5}, {"group": 48}, {"rank": -1}, {"outliers": 1.5}, {"loops": 0}, {"block": 0}]
)
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="gear"):
        GEAR(**parameters)


def test_a_rank_above_the_head_size():
    with pytest.raises(RecipeError, match="rank is at most"):
        OneLayer(f"gear(rank={SIZE + 1})")
