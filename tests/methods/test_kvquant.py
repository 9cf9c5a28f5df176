"""KVQuant against the algorithm of arXiv 2401.18079 in plain loops, and its calibration against what it has to find."""

import pytest
import torch
from real_text import TEXT, divergences
from torch import Tensor
from watched import HEADS, SIZE, Watched

import kvarn
from drive import logits_of
from kvarn.attention.rotary import Rotary
from kvarn.calibration import calibrate
from kvarn.errors import CalibrationError, RecipeError, Unsupported
from kvarn.fitting import LevelSearch
from kvarn.fitting.levels import channel_ranges, matched, nearest_levels
from kvarn.fitting.reading import reading, samples
from kvarn.formats import Int, NonUniform, exact_numbers
from kvarn.methods.kvquant import KVQuant
from kvarn.spec import ModelSpec
from learnt import kvquant
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 24), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (5,), generator=torch.Generator().manual_seed(2))


def nearest(u: float, levels: list[float], read: list[float]) -> float:
    return read[min(range(len(levels)), key=lambda i: abs(levels[i] - u))]


def naive(vector: list[float], exact: int, levels, read, center=None, half=None) -> list[float]:
    """What is read of one vector: by channels with ranges of their own, or by the range of the vector."""
    places = range(len(vector))
    if center is None:
        order = sorted(places, key=vector.__getitem__)
        apart = order[: exact // 2] + order[len(order) - exact // 2 :]
        rest = [vector[i] for i in places if i not in apart]
        center = [(max(rest) + min(rest)) / 2] * len(vector)
        half = [(max(rest) - min(rest)) / 2] * len(vector)
    else:
        apart = sorted(places, key=lambda i: -abs(vector[i] - center[i]) / half[i])[:exact]
    coded = [nearest((x - c) / h, levels, read) * h + c for x, c, h in zip(vector, center, half, strict=True)]
    return [vector[i] if i in apart else coded[i] for i in places]


@pytest.mark.parametrize(
    ("bits", "outliers", "sinks"), [(4, 0.01, 1), (2, 0.2, 3), (3, 0.0, 0)], ids=["paper", "2 bits", "codes alone"]
)
def test_every_layer_reads_what_the_paper_reads(bits, outliers, sinks):
    model, method = make_tiny("llama"), kvquant(bits=bits, outliers=outliers, sinks=sinks)
    cache = Watched(model, method)
    logits_of(model, PROMPT, CONTINUATION, cache)
    exact = {0.0: 0, 0.01: 2, 0.2: 8}[outliers]
    kind = "apart" if outliers else "whole"
    for layer in range(4):
        stored = cache._group_of[layer].store.read(cache._group_of[layer].heads(layer))
        for side, vectors, found in zip(("keys", "values"), cache.vectors(layer), stored, strict=True):

            def learnt(name, side=side, layer=layer):
                return method.learnt[f"{side}.{kind}.{name}"][layer].tolist()

            ranges = (learnt("center"), learnt("half")) if side == "keys" else ()
            levels = learnt(f"levels{bits}"), learnt("read2" if bits == 2 else f"levels{bits}")
            expected = [v if t < sinks else naive(v, exact, *levels, *ranges) for t, v in enumerate(vectors)]
            torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("parameters", [{"outliers": 1.0}, {"sinks": 40}])
def test_all_outliers_or_all_sinks_are_full(parameters):
    model = make_tiny("llama")
    full = logits_of(model, PROMPT, CONTINUATION[:1], kvarn.Cache(model))
    exact = logits_of(model, PROMPT, CONTINUATION[:1], kvarn.Cache(model, kvquant(bits=2, **parameters)))
    torch.testing.assert_close(exact, full, rtol=1e-4, atol=1e-4)


def bound(bits: int, exact: int, size: int, levels: Tensor, **ranges: Tensor) -> NonUniform:
    shared = {"levels": levels[None, None], **{name: x[None, None] for name, x in ranges.items()}}
    return NonUniform(bits, exact, shared, size, torch.float32).given({name: x[0] for name, x in shared.items()})


def test_equal_distances_without_outliers_are_plain_integers():
    x = torch.randn(1, 12, 32)
    uniform = bound(3, 0, 32, torch.linspace(-1, 1, 8))
    integers = Int(3, "token", 32, 32, torch.float32)
    torch.testing.assert_close(uniform.decode(uniform.encode(x)), integers.decode(integers.encode(x)))


def test_ranges_of_one_point():
    x = torch.cat([torch.full((1, 1, 32), 3.0), torch.zeros(1, 1, 32)], 1)
    for fmt in (
        bound(2, 2, 32, torch.tensor([-1.0, -0.3, 0.0, 1.0])),
        bound(2, 32, 32, torch.tensor([-1.0, -0.3, 0.0, 1.0])),
        bound(2, 2, 32, torch.tensor([-1.0, 0.0, 0.1, 1.0]), center=torch.full((32,), 3.0), half=torch.zeros(32)),
    ):
        read = fmt.decode(fmt.encode(x))
        assert bool(read.isfinite().all())
        assert torch.equal(read[:, 0], x[:, 0])


def test_as_many_outliers_as_the_quantiles_leave_out():
    assert [exact_numbers(0.01, size) for size in (192, 1024, 4096)] == [2, 12, 42]
    assert (exact_numbers(0.0, 64), exact_numbers(1.0, 64)) == (0, 64)
    for size in (192, 1024, 4096):
        x = torch.randn(size)
        beyond = (x <= x.quantile(0.005)) | (x >= x.quantile(0.995))
        assert int(beyond.sum()) == exact_numbers(0.01, size)


def test_ranges_of_channels_before_rope_are_better_than_after_it_and_than_those_of_tokens():
    """Keys with a constant outlier in some channels: what rotates them smears it."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 400, 16, generator=generator)
    keys[..., [2, 11]] += torch.tensor([12.0, -9.0])
    rotary, positions = Rotary(make_tiny("llama")), torch.arange(400)
    rotated = rotary.rotate(keys, positions)
    levels, errors = torch.linspace(-1, 1, 8), []
    for x in (keys[0], rotated[0]):
        center, half, _ = channel_ranges(x[0], 0.0)
        fmt = bound(3, 0, 16, levels, center=center, half=half)
        errors.append(float((fmt.decode(fmt.encode(x)) - x).norm()))
    fmt = bound(3, 0, 16, levels)
    errors.append(float((fmt.decode(fmt.encode(keys[0])) - keys[0]).norm()))
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]


def weighted_error(x: Tensor, weight: Tensor, levels: Tensor) -> float:
    return float((weight * (x[:, None] - levels).square().amin(1)).sum())


def test_levels_are_centers_of_what_is_nearest_to_them():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4000, generator=generator).div(4).clamp(-1, 1)
    weight = torch.rand(4000, generator=generator) * (x > 0) + 0.01
    levels = nearest_levels(x, weight, 8, 500)
    closest = (x[:, None] - levels).abs().argmin(1)
    for level in range(8):
        members, weights = x[closest == level], weight[closest == level]
        assert float((members * weights).sum() / weights.sum()) == pytest.approx(float(levels[level]), abs=1e-4)
    normal = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(8) + 0.5) / 8)
    for other in (torch.linspace(-1, 1, 8), normal / normal.abs().max()):
        assert weighted_error(x, weight, levels) < weighted_error(x, weight, other)


def test_ranges_of_channels_are_those_of_what_is_left():
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(6))
    center, half, apart = channel_ranges(x, 0.1)
    assert bool((apart.sum(1) == exact_numbers(0.1, 32)).all())
    for channel in range(32):
        rest = x[~apart[:, channel], channel].tolist()
        assert float(center[channel]) == pytest.approx((max(rest) + min(rest)) / 2, abs=1e-6)
        assert float(half[channel]) == pytest.approx((max(rest) - min(rest)) / 2, abs=1e-6)


def test_q_norm_gives_back_mean_and_deviation():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(7)).clamp(-1, 1)
    levels = torch.tensor([-0.7, -0.1, 0.3, 0.8])
    read = matched(x, levels)
    coded = read[(x[:, None] - levels).abs().argmin(1)]
    torch.testing.assert_close(torch.stack([coded.mean(), coded.std()]), torch.stack([x.mean(), x.std()]))


def test_gradients_are_those_of_the_projections():
    """Also where layers come after: a key moves the loss through all of them."""
    model = make_tiny("llama")
    attention, seen = model.model.layers[1].self_attn, {}

    def leaf(name):
        def hook(module, args, out):
            seen[name] = out.detach().requires_grad_()
            return seen[name]

        return hook

    hooks = [getattr(attention, f"{name}_proj").register_forward_hook(leaf(name)) for name in "kv"]
    logits = model(PROMPT, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], PROMPT[0, 1:])
    expected = torch.autograd.grad(loss, [seen["k"], seen["v"]])
    for hook in hooks:
        hook.remove()
    read = reading(model, ModelSpec.from_config(model.config, model.dtype), PROMPT, gradients=True)[1]
    torch.testing.assert_close(read.keys, seen["k"][0].detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read.values, seen["v"][0].detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read.keys_weight, expected[0][0].square(), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(read.values_weight, expected[1][0].square(), rtol=1e-3, atol=1e-9)


def test_bytes_are_those_of_the_paper():
    model = make_tiny("llama").to(torch.bfloat16)
    cache = kvarn.Cache(model, kvquant(bits=3))
    with torch.no_grad():
        model(PROMPT.repeat(1, 20), past_key_values=cache)
    tokens, width, report = 480, HEADS * SIZE, cache.report()
    assert report.bytes == cache.plan.bytes[0]
    outliers = 2 * (2 + 1)  # two numbers and their places, of one byte each where a vector has up to 256 numbers
    assert report.by_format["nonuniform3/channel+exact2"] == 4 * (tokens * (width * 3 // 8 + outliers) + 30 * 8)
    assert report.by_format["nonuniform3/token+exact2"] == 4 * (tokens * (width * 3 // 8 + outliers + 2 * 2) + 30 * 8)
    assert report.by_format["bases"] == 4 * (2 * 2 * width + 2 * 8 * 4)  # ranges of key channels, two codebooks
    sinks = 4 * 2 * (width * 2 + 4)  # in each layer a key and a value, and where they belong
    tables = 4 * 5 * 16 + 3 * 4 * 30 * 4  # starts and lengths of 5 segments, 30 pages in 3 of them
    assert report.by_format["tables"] == sinks + tables
    with torch.no_grad():
        fork = cache.fork()
        model(PROMPT[:, :1], past_key_values=fork)
    own, other = (c._groups[0].store.keys.settled._shared["levels"] for c in (cache, fork))
    assert own.data_ptr() == other.data_ptr()


def test_caches_share_pages_only_where_levels_are_the_same():
    layer = ModelSpec.from_config(make_tiny("llama").config, torch.float32).layers[0]
    other = KVQuant().with_learnt({name: x + 0.1 for name, x in kvquant().learnt.items()})
    one, same, different = (
        {side.format.key for side in method.encoding(layer, torch.float32)} for method in (kvquant(), kvquant(), other)
    )
    assert len(one) == 2
    assert one == same
    assert not one & different


def test_models_through_which_no_gradients_are_taken():
    model = make_tiny("gpt_oss")
    with pytest.raises(Unsupported, match="gpt_oss soft-caps logits or has sinks"):
        reading(model, ModelSpec.from_config(model.config, model.dtype), PROMPT, gradients=True)


def test_it_keeps_a_layers_heads_together():
    with pytest.raises(RecipeError, match="both decide what to keep"):
        kvarn.Recipe.parse("snapkv + kvquant")
    with pytest.raises(CalibrationError, match="kvquant has to be calibrated for this llama once: run kvarn calibrate"):
        kvarn.Cache(make_tiny("llama"), "kvquant")


def test_a_text_that_is_too_short(smollm2):
    with pytest.raises(CalibrationError, match="the text has 2 tokens, and 512 are needed"):
        list(samples(smollm2[1], "two words", 1, 512))


@pytest.mark.parametrize("parameters", [{"bits": 5}, {"outliers": 1.5}, {"sinks": -1}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="kvquant"):
        KVQuant(**parameters)


def test_what_a_calibration_learns_brings_a_model_nearer_to_the_full_cache(smollm2, tmp_path, monkeypatch):
    model, tokenizer = smollm2
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path))
    monkeypatch.setattr(KVQuant, "calibration", lambda self: LevelSearch(samples=1, tokens=160))
    steps = []
    calibrate(model, tokenizer, KVQuant(), TEXT[-3000:], lambda done, total: steps.append((done, total)))
    assert steps == [(i, 31) for i in range(1, 32)]
    learnt = kvarn.Cache(model, "kvquant(bits=2)").recipe.methods[0].learnt
    uniform = {
        name: torch.linspace(-1, 1, x.shape[1]).expand_as(x) if "levels" in name or "read" in name else x
        for name, x in learnt.items()
    }
    recipes = ["kvquant(bits=2)", KVQuant(bits=2).with_learnt(uniform), "kvquant(bits=2, outliers=0.0)"]
    best, without_levels, without_outliers = divergences(
        smollm2, [(recipe, None) for recipe in recipes], prompt=200, steps=6
    )
    assert 1.5 * best < min(without_levels, without_outliers)
