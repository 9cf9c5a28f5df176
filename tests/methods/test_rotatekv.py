"""RotateKV against the algorithm of arXiv 2501.16383 in plain loops."""

import math

import pytest
import torch
from real_text import TEXT, divergences
from torch import Tensor
from watched import HEADS, SIZE, Watched

import kvarn
from drive import logits_of
from kvarn.errors import RecipeError
from kvarn.fitting import KeyMeans
from kvarn.formats import Int, Rotated
from kvarn.formats.rotated import hadamard
from kvarn.methods.rotatekv import RotateKV
from kvarn.reduction import MassiveTokens
from learnt import rotatekv
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 24), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (5,), generator=torch.Generator().manual_seed(2))
WIDTH = HEADS * SIZE


def turned(vector: list[float], block: int) -> list[float]:
    """Each block times the Hadamard matrix, whose entry (i, j) is -1 to the number of bits that i and j share."""
    out = []
    for first in range(0, len(vector), block):
        for i in range(block):
            signs = ((-1) ** (i & j).bit_count() for j in range(block))
            out.append(sum(s * x for s, x in zip(signs, vector[first : first + block], strict=True)) / math.sqrt(block))
    return out


def quantized(vector: list[float], bits: int, group: int, clip: float) -> list[float]:
    out = []
    for first in range(0, len(vector), group):
        numbers = vector[first : first + group]
        low, high = clip * min(numbers), clip * max(numbers)
        scale = (high - low) / (2**bits - 1)
        out += [low + scale * min(max(round((x - low) / scale), 0), 2**bits - 1) for x in numbers]
    return out


def naive_key(vector: list[float], means: list[float], bits: int, block: int, group: int, clip: float) -> list[float]:
    sums = turned(means, block)
    order = sorted(range(len(vector)), key=sums.__getitem__)
    rotated = turned(vector, block)
    coded = quantized([rotated[i] for i in order], bits, group, clip)
    back = [0.0] * len(vector)
    for place, channel in enumerate(order):
        back[channel] = coded[place]
    return turned(back, block)


def naive_massive(inputs: Tensor, top: int) -> set[int]:
    """Tokens of ``inputs`` [tokens, size] that hold one of the largest magnitudes."""
    numbers = [(abs(float(x)), token) for token, row in enumerate(inputs) for x in row]
    return {token for _, token in sorted(numbers, reverse=True)[:top]}


@pytest.mark.parametrize(
    ("bits", "group", "heads", "clip", "massive"), [(2, 128, 4, None, 20), (3, 8, 1, None, 3), (4, 16, 2, 0.9, 0)]
)
def test_every_layer_reads_what_the_paper_reads(bits, group, heads, clip, massive):
    model = make_tiny("llama")
    entering = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: entering.append(args[0][0]))
    method = rotatekv(bits=bits, group=group, heads=heads, clip=clip, massive=massive)
    cache = Watched(model, method)
    logits_of(model, PROMPT, CONTINUATION, cache)
    clip = clip or (0.8 if bits == 2 else 1.0)
    group, block = min(group, WIDTH), min(heads, HEADS) * SIZE
    for layer in range(4):
        exact = naive_massive(entering[layer], massive)
        means = method.learnt["means"][layer].tolist()
        keys, values = cache.vectors(layer)
        found = cache._group_of[layer].store.read(cache._group_of[layer].heads(layer))
        expected_keys = [
            key if t in exact else naive_key(key, means, bits, block, group, clip) for t, key in enumerate(keys)
        ]
        expected_values = [
            value if t in exact else turned(quantized(turned(value, SIZE), bits, group, clip), SIZE)
            for t, value in enumerate(values)
        ]
        torch.testing.assert_close(found[0][0], torch.tensor(expected_keys), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[1][0], torch.tensor(expected_values), rtol=1e-3, atol=1e-3)


def test_the_transform_is_its_own_inverse_and_keeps_lengths():
    for size in (1, 2, 8, 64, 512):
        x = torch.randn(3, size)
        torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hadamard(x).norm(dim=1), x.norm(dim=1))
    one = torch.tensor([[0.0, 0.0, 0.0, 8.0]])
    assert hadamard(one).tolist() == [[4.0, -4.0, -4.0, 4.0]]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_oss"])
def test_many_bits_or_only_massive_tokens_are_near_full(name):
    model = make_tiny(name)
    full = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model))
    near = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, rotatekv(bits=8, group=16)))
    torch.testing.assert_close(near, full, rtol=0, atol=0.05 * float(full.abs().max()))
    exact = logits_of(model, PROMPT, CONTINUATION[:1], kvarn.Cache(model, rotatekv(massive=10**5)))
    torch.testing.assert_close(exact, full[:, :2], rtol=1e-3, atol=1e-3)


def test_a_spike_exempts_its_token_alone():
    inputs = torch.rand(2, 30, 40)
    inputs[0, 0, :20] = -100 * torch.arange(1, 21)
    inputs[1, 7, 3], inputs[1, 2, 5] = 900, -1000
    positions = torch.arange(30).expand(2, -1).clone()
    positions[1] = torch.arange(-3, 27).clamp(min=-1)  # three tokens of padding, one of which has the largest number
    assert MassiveTokens(20).marked(positions, inputs)[0].nonzero().tolist() == [[0]]
    marked = MassiveTokens(1).marked(positions, inputs)
    assert marked[1].nonzero().tolist() == [[7]]


def test_tokens_of_a_later_prompt_are_quantized():
    model = make_tiny("llama")
    cache = kvarn.Cache(model, rotatekv(massive=3))
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        before = cache._groups[0].store.keys.settled.state["places"].clone()
        model(PROMPT[:, :9], past_key_values=cache)
    assert torch.equal(cache._groups[0].store.keys.settled.state["places"], before)


def test_clipped_ranges():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    whole, clipped = (Int(2, "token", 32, 64, torch.float32, clip) for clip in (1.0, 0.8))
    groups = x.unflatten(1, (2, 32))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 3
    assert bool(((whole.decode(whole.encode(x)).unflatten(1, (2, 32)) - groups).abs() <= step / 2 + 1e-5).all())
    read = clipped.decode(clipped.encode(x)).unflatten(1, (2, 32))
    torch.testing.assert_close(read.amax(-1), 0.8 * groups.amax(-1))
    torch.testing.assert_close(read.amin(-1), 0.8 * groups.amin(-1))


def test_orders_bring_channels_that_are_alike_together():
    """Channels with means of their own, as they remain after a rotation."""
    generator = torch.Generator().manual_seed(1)
    means = 3 * torch.randn(64, generator=generator)
    x = means + torch.randn(1, 200, 64, generator=generator)
    plain = Rotated(Int(2, "token", 16, 64, torch.float32), 64, 64)
    ordered = Rotated(plain.inner, 64, 64, means[None, None])
    ordered = ordered.given({"rank": ordered.shared["rank"][0]})
    errors = [float((fmt.decode(fmt.encode(x)) - x).norm()) for fmt in (plain, ordered)]
    assert errors[1] < 0.7 * errors[0]


def test_means_are_of_keys_before_their_rotation():
    model = make_tiny("llama")

    class Tokenizer:
        def __call__(self, text, **arguments):
            return type("Encoded", (), {"input_ids": [int(x) for x in text.split()]})

    seen = []
    hook = model.model.layers[2].self_attn.k_proj.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    steps = []
    text = " ".join(map(str, PROMPT[0].tolist()))
    found = KeyMeans(samples=2, tokens=16).run(model, Tokenizer(), text, lambda done, total: steps.append(done))
    hook.remove()
    torch.testing.assert_close(found["means"][2], torch.cat(seen).mean(0), rtol=1e-4, atol=1e-4)
    assert (found["means"].shape, steps) == ((4, WIDTH), [1, 2])


def test_bytes_are_those_of_the_paper():
    model = make_tiny("llama").to(torch.float16)
    cache = kvarn.Cache(model, rotatekv())
    with torch.no_grad():
        model(PROMPT.repeat(1, 20), past_key_values=cache)
    report, tokens = cache.report(), 480
    assert report.bytes == cache.plan.bytes[0]
    per_token = WIDTH * 2 // 8 + 2 * 2  # two bits a number, a scale and a minimum for the 32 of a token
    for name in ("rotated32 ordered int2/token", "rotated16 int2/token"):
        assert report.by_format[name] == 4 * (tokens * per_token + 30 * 8)
    assert report.by_format["bases"] == 4 * WIDTH  # an order of fewer than 256 channels for each layer
    exact = 4 * 2 * 20 * (WIDTH * 2 + 4)
    assert report.by_format["tables"] == exact + 4 * 5 * 16 + 3 * 4 * 30 * 4


@pytest.mark.parametrize(
    "parameters", [{"bits": 5}, {"group": 0}, {"heads": 0}, {"massive": -1}, {"clip": 0.0}, {"clip": 1.5}]
)
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="rotatekv"):
        RotateKV(**parameters)


def test_sizes_without_a_hadamard_transform():
    with pytest.raises(RecipeError, match="a Hadamard transform of 24 channels: needs a power of two"):
        kvarn.Cache(make_tiny("llama", head_dim=24), rotatekv(heads=1))


def test_its_parts_bring_the_model_nearer_to_the_full_cache(smollm2):
    model, tokenizer = smollm2
    means = KeyMeans(samples=1, tokens=128).run(model, tokenizer, TEXT[-3000:], lambda done, total: None)
    methods = [(RotateKV(bits=2, massive=massive).with_learnt(means), None) for massive in (20, 0)]
    found = divergences(smollm2, methods, prompt=200, steps=6)
    assert 1.4 * found[0] < found[1]
