"""xKV against the singular value decomposition of what a model's projections give (arXiv 2503.18893)."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvarn
from drive import left_padded, logits_of
from kvarn.attention.rotary import Rotary
from kvarn.errors import RecipeError
from kvarn.formats import Dense, Subspace
from kvarn.methods.xkv import XKV
from test_real_model import answer, haystack_with_needle
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 90), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (12,), generator=torch.Generator().manual_seed(2))
WIDTH = 32  # of the keys of a tiny model's layer, two heads together
KEYS, VALUES = 0.25, 0.5
TINY = f"xkv(layers=2, keys={KEYS}, values={VALUES})"


class Projections:
    """Keys before their rotation and values of every layer ([n, WIDTH] each), as a model's projections give them."""

    def __init__(self, model: PreTrainedModel):
        self.keys, self.values = ([torch.zeros(0, WIDTH) for _ in range(4)] for _ in range(2))
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.k_proj.register_forward_hook(self.hook(self.keys, number))
            layer.self_attn.v_proj.register_forward_hook(self.hook(self.values, number))

    def hook(self, rows: list[Tensor], number: int):
        def take(module, args, out):
            rows[number] = torch.cat([rows[number].to(out), out[0]])

        return take


def truncated(layers: list[Tensor], rank: int) -> list[Tensor]:
    """Each layer's rows from the first ``rank`` singular directions of all of them side by side, in plain loops."""
    joint = torch.tensor([[float(x) for layer in layers for x in layer[token]] for token in range(len(layers[0]))])
    left, size, right = torch.linalg.svd(joint.double(), full_matrices=False)
    near = sum(size[i] * left[:, i, None] * right[None, i] for i in range(min(rank, len(size))))
    return [near[:, i * WIDTH : (i + 1) * WIDTH].float() for i in range(len(layers))]


def read(cache: kvarn.Cache, number: int) -> tuple[Tensor, Tensor]:
    """Keys and values as layer ``number`` reads them, [heads, n, 16] each."""
    group = cache._group_of[number]
    group._number = number
    part = group._part(group.heads(number), None)
    return part.keys[0], part.values[0]


def heads(rows: Tensor) -> Tensor:
    return rows.unflatten(1, (2, 16)).transpose(0, 1)


def rank(share: float, layers: int) -> int:
    return max(round(share * layers * WIDTH / 8), 1) * 8


def bundles(size: int) -> list[list[int]]:
    return [list(range(first, min(first + size, 4))) for first in range(0, 4, size)]


def check(cache: kvarn.Cache, model: PreTrainedModel, expected: dict[int, tuple[Tensor, Tensor]]) -> None:
    """That layers read these keys (before their rotation) and values."""
    for number, (keys, values) in expected.items():
        rotated = Rotary(model).rotate(heads(keys)[None], torch.arange(len(keys)))[0]
        own = read(cache, number)
        torch.testing.assert_close(own[0], rotated, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(own[1], heads(values), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_same_cache_as_the_paper_and_generated_tokens_stay_exact(size):
    model = make_tiny("llama")
    given = Projections(model)
    cache = kvarn.Cache(model, f"xkv(layers={size}, keys={KEYS}, values={VALUES})")
    model(PROMPT, past_key_values=cache)
    for tokens in (90, 93):
        expected = {}
        for numbers in bundles(size):
            sides = [
                [torch.cat([near, rows[number][90:]]) for near, number in zip(nears, numbers, strict=True)]
                for rows, share in ((given.keys, KEYS), (given.values, VALUES))
                for nears in [truncated([rows[i][:90] for i in numbers], rank(share, len(numbers)))]
            ]
            expected |= {number: (sides[0][i], sides[1][i]) for i, number in enumerate(numbers)}
        assert len(expected[3][0]) == tokens
        check(cache, model, expected)
        for token in CONTINUATION[:3] if tokens == 90 else ():
            model(token.view(1, 1), past_key_values=cache)


def test_a_later_prompt_factorizes_all_that_is_held_anew():
    model = make_tiny("llama")
    given = Projections(model)
    cache = kvarn.Cache(model, TINY)
    model(PROMPT[:, :60], past_key_values=cache)
    model(CONTINUATION[:1, None], past_key_values=cache)
    assert cache._group_of[3].store.high.lengths.tolist() == [1, 1]
    model(PROMPT[:, 60:], past_key_values=cache)
    expected = {}
    for numbers in bundles(2):
        sides = []
        for rows, share in ((given.keys, KEYS), (given.values, VALUES)):
            first = truncated([rows[i][:60] for i in numbers], rank(share, 2))
            held = [torch.cat([near, rows[i][60:]]) for near, i in zip(first, numbers, strict=True)]
            sides.append(truncated(held, rank(share, 2)))
        expected |= {number: (sides[0][i], sides[1][i]) for i, number in enumerate(numbers)}
    check(cache, model, expected)
    assert cache._group_of[3].store.high.lengths.tolist() == [0, 0]


def test_the_error_is_that_of_the_directions_left_out():
    x = torch.randn(1, 60, 4 * WIDTH) @ torch.randn(4 * WIDTH, 4 * WIDTH)
    held = torch.ones(1, 60, dtype=torch.bool)

    def error(y: Tensor, kept: int) -> Tensor:
        fmt = Subspace(Dense(kept, torch.float32), kept, y.shape[-1], torch.float32)
        bound = fmt.given(fmt.observe(y, held, y[:, None, :0]))
        return (bound.decode(bound.encode(y)) - y).norm()

    size = torch.linalg.svdvals(x[0])
    torch.testing.assert_close(error(x, 24), size[24:].norm(), rtol=1e-3, atol=0)
    apart = torch.stack([error(y, 24) for y in x.split(WIDTH, -1)]).norm()
    assert error(x, 24 * 4) < apart
    alike = x[..., :WIDTH].repeat(1, 1, 4)  # layers that are alike need no more directions than one of them
    assert error(alike, WIDTH) < 1e-3 * alike.norm()


@pytest.mark.parametrize("architecture", ["qwen3", "gpt_oss"])
def test_the_whole_space_is_the_full_cache(architecture):
    model = make_tiny(architecture)
    full, whole = kvarn.Cache(model), kvarn.Cache(model, "xkv(layers=2, keys=1.0, values=1.0)")
    for prompt in (PROMPT[:, :50], PROMPT[:, 50:]):
        a, b = (model(prompt, past_key_values=cache).logits for cache in (full, whole))
        torch.testing.assert_close(b, a, rtol=1e-3, atol=2e-3)
        for token in CONTINUATION[:4]:
            a, b = (model(token.view(1, 1), past_key_values=cache).logits for cache in (full, whole))
            torch.testing.assert_close(b, a, rtol=1e-3, atol=2e-3)


def test_padding_does_not_enter_the_subspace():
    model = make_tiny("llama").double()
    ids, mask = left_padded([PROMPT[0], PROMPT[0, 10:40]])
    together = logits_of(model, ids, CONTINUATION, kvarn.Cache(model, TINY), mask)
    alone = logits_of(model, PROMPT[:, 10:40], CONTINUATION, kvarn.Cache(model, TINY))
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", [TINY, "xkv(layers=3)", TINY + " + kivi(bits=4, group=8, residual=16)"])
@pytest.mark.parametrize(("tokens", "page_size"), [(90, 16), (33, 5)])
def test_planned_bytes_are_held_bytes(recipe, tokens, page_size):
    model = make_tiny("llama")
    cache = kvarn.Cache(model, recipe, page_size=page_size)
    model(PROMPT[:, :tokens].repeat(2, 1), past_key_values=cache)
    assert cache.report().bytes == sum(cache.plan.bytes)
    model(PROMPT[:, :7].repeat(2, 1), past_key_values=cache)
    assert cache.report().bytes == sum(cache.plan.bytes)


def test_bytes_are_those_of_the_paper():
    """Of a group of G layers r numbers a token, and r times the width of its layers for each sequence."""
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "xkv")
    model(PROMPT[:, :80].repeat(1, 10), past_key_values=cache)
    report, ranks = cache.report(), (16, 24)  # an eighth and three sixteenths of 4 * 32
    pages = 2 * 50 * 8
    assert report.by_format["subspace16/128 dense"] + report.by_format["subspace24/128 dense"] == (
        sum(ranks) * 800 * 4 + pages
    )
    assert sum(ranks) * 4 * WIDTH * 4 < report.by_format["tables"] < 1.1 * sum(ranks) * 4 * WIDTH * 4
    assert report.ratio == pytest.approx(sum(ranks) * (800 + 128) / (2 * 128 * 800), rel=0.05)
    assert report.entries == [[[800]]] * 4
    assert report.reserved_bytes < 1.2 * report.bytes  # exact keys and values never lay in pages
    assert report.peak_bytes > 2 * 4 * 800 * WIDTH * 4  # those of four layers wait


def test_beams_share_and_part():
    model = make_tiny("llama")
    cache = kvarn.Cache(model, TINY)
    arguments = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    assert model.generate(PROMPT, past_key_values=cache, **arguments).shape == (1, 98)
    arena = cache._arena
    cache.free()
    assert arena.bytes == 0


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("snapkv + xkv", "evicts other tokens from each head"),
        ("xkv + think", "decides which channels of the keys stay for each layer by itself"),
        ("xkv + minicache", "both decide what neighbouring layers keep together"),
    ],
)
def test_what_each_layer_decides_by_itself_does_not_combine(recipe, reason):
    with pytest.raises(RecipeError, match=f"cannot act together.*{reason}"):
        kvarn.Recipe.parse(recipe)


@pytest.mark.parametrize("parameters", [{"layers": 0}, {"keys": 0.0}, {"values": 1.5}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="xkv"):
        XKV(**parameters)


def test_layers_together_keep_a_needle_that_as_many_directions_of_each_lose(smollm2):
    """The coordinates of a token take as many bytes: those of four layers, or four of one layer each."""
    prompt = haystack_with_needle(smollm2[1], 200, 0.3)
    assert "73915" in answer(smollm2, prompt, "xkv(keys=0.06, values=0.15)", None)
    assert "73915" not in answer(smollm2, prompt, "xkv(layers=1, keys=0.06, values=0.15)", None)
