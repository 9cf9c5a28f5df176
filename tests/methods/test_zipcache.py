"""ZipCache against the paper's algorithm in plain loops (arXiv 2405.14256)."""

import math
from dataclasses import dataclass, replace
from pydoc_data.topics import topics

import pytest
import torch
from one_layer import GROUP, KV_HEADS, SIZE, VARIANT, OneLayer, probabilities, random_tokens, split

import kvarn
from drive import logits_of
from kvarn.attention import Part
from kvarn.errors import RecipeError
from kvarn.formats import Columns, Dense, Int, Ranged, Separable
from kvarn.memory import Arena, SideLayout, Store, StoreLayout, TieredLayout
from kvarn.methods.zipcache import ZipCache
from kvarn.scoring import ProbedMass, PromptView
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 90), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (12,), generator=torch.Generator().manual_seed(2))


def naive_int(x: float, low: float, high: float, bits: int) -> float:
    step = (high - low) / (2**bits - 1)
    return low + step * round((x - low) / step) if step else low


class Naive:
    """One KV head, whose tokens are regular, salient or still exact."""

    def __init__(self, queries, keys, values, prompt: int, method: ZipCache, probes: list[int]):
        self.queries, self.keys, self.values, self.method = queries, keys, values, method
        mass = [0.0] * prompt
        for probe in probes:
            for query in queries:
                for index, probability in enumerate(probabilities(query[probe], keys[: probe + 1])):
                    mass[index] += probability
        if method.normalize == "all":
            saliency = [mass[i] / (prompt - i) for i in range(prompt)]
        else:
            saliency = [mass[i] / sum(probe >= i for probe in probes) for i in range(prompt)]
        self.regular = set(sorted(range(prompt), key=saliency.__getitem__)[: int(method.regular * prompt + 1e-9)])
        self.salient = set(range(prompt)) - self.regular
        self.exact: list[int] = []
        self.peak = [max(abs(float(values[t, c])) for t in range(prompt)) for c in range(SIZE)]
        self.read: dict[int, tuple[list[float], list[float]]] = {}
        self.compress()

    def compress(self) -> None:
        """Encodes all regular and all salient tokens anew, from what is read of them so far."""
        for tokens, bits in ((self.regular, self.method.low), (self.salient, self.method.high)):
            now = {t: self.read.get(t) or (self.keys[t].tolist(), self.values[t].tolist()) for t in tokens}
            ranges = [(min(k[c] for k, _ in now.values()), max(k[c] for k, _ in now.values())) for c in range(SIZE)]
            peak = [max(self.peak[c], *(abs(self.values[t, c].item()) for t in tokens)) for c in range(SIZE)]
            if self.method.peaks == "prompt":
                peak = self.peak
            for t, (key, value) in now.items():
                scaled = [x / math.sqrt(p) for x, p in zip(value, peak, strict=True)]
                low, high = min(scaled), max(scaled)
                self.read[t] = (
                    [naive_int(x, *ends, bits) for x, ends in zip(key, ranges, strict=True)],
                    [naive_int(x, low, high, bits) * math.sqrt(p) for x, p in zip(scaled, peak, strict=True)],
                )

    def step(self) -> None:
        position = len(self.regular) + len(self.salient) + len(self.exact)
        self.exact.append(position)
        if len(self.exact) < self.method.gap:
            return
        tokens = range(position + 1)
        keys = torch.stack([torch.tensor(self.read[t][0]) if t in self.read else self.keys[t] for t in tokens])
        paid = [0.0] * (position + 1)
        for query in self.queries:
            for index, probability in enumerate(probabilities(query[position], keys)):
                paid[index] += probability
        order = sorted(self.exact, key=paid.__getitem__)
        regular = int(self.method.regular * (position + 1) + 1e-9) - len(self.regular)
        self.regular |= set(order[:regular])
        self.salient |= set(order[regular:])
        self.exact = []
        self.compress()


@pytest.mark.parametrize(
    "text",
    [
        "zipcache(gap=5, recent=0.1, random=0.1)",
        "zipcache(gap=4, regular=0.75, high=8, low=3, normalize='all', peaks='prompt')",
    ],
)
def test_the_same_tokens_and_the_same_numbers_as_the_paper(text):
    tokens = random_tokens(42)
    layer, method = OneLayer(text), kvarn.Recipe.parse(text).methods[0]
    layer.prompt(*split(tokens, 0, 30))
    probes = ProbedMass(method.recent, method.random, 0).probes(torch.arange(30)[None], 0)[1][0].tolist()
    assert sorted(probes)[-1] == 29
    queries = tokens[0].unflatten(1, (KV_HEADS, GROUP))[0]
    naive = [Naive(queries[h], tokens[1][0, h], tokens[2][0, h], 30, method, probes) for h in range(KV_HEADS)]
    for position in range(30, 42):
        compare(layer, naive)
        layer.token(*split(tokens, position, position + 1))
        for head in naive:
            head.step()
    compare(layer, naive)


def compare(layer: OneLayer, naive: list[Naive]) -> None:
    store, everyone = layer.group.store, layer.group.everyone
    for tier, name in ((store.low, "regular"), (store.high, "salient"), (store.fresh, "exact")):
        positions = tier.read_column(everyone, "position")
        keys, values = tier.read(everyone)
        for head, expected in enumerate(naive):
            held = positions[head, : int(tier.lengths[head])].tolist()
            assert set(held) == set(getattr(expected, name))
            for place, token in enumerate(held):
                key, value = expected.read.get(token, (expected.keys[token], expected.values[token]))
                torch.testing.assert_close(keys[head, place], torch.as_tensor(key), rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(values[head, place], torch.as_tensor(value), rtol=1e-3, atol=1e-3)


def view_of(keys: torch.Tensor, query: torch.Tensor) -> PromptView:
    count = keys.shape[2]
    positions = torch.arange(count)

    def parts(queries):
        return (Part(keys, keys, (positions <= queries[:, :, None])[:, None]),)

    of_heads = positions.expand(1, KV_HEADS, -1)
    whole = (Part(keys, keys, causal=True),)
    seen = torch.tensor([count])
    return PromptView(query, positions[None], whole, VARIANT, of_heads, seen, {"position": of_heads}, parts)


def test_saliency_does_not_favour_early_tokens():
    keys, query = torch.zeros(1, KV_HEADS, 8, SIZE), torch.zeros(1, KV_HEADS * GROUP, 8, SIZE)
    harmonic = sum(1 / n for n in range(1, 9))
    for over in ("probes", "all"):
        everyone = ProbedMass(1.0, 0.0, 0, over).after_prompt(view_of(keys, query), 0).columns["saliency"][0, 0]
        assert float(everyone[0] / everyone[-1]) == pytest.approx(harmonic, rel=1e-4)  # 21.74 for the accumulated mass
    few = ProbedMass(0.25, 0.0, 0).after_prompt(view_of(keys, query), 0).columns["saliency"][0, 0]
    torch.testing.assert_close(few, torch.tensor([(1 / 7 + 1 / 8) / 2] * 7 + [1 / 8]))
    release = ProbedMass(0.25, 0.0, 0, "all").after_prompt(view_of(keys, query), 0).columns["saliency"][0, 0]
    assert float(release[-2] / release[0]) == pytest.approx(4)  # late tokens gain what early ones lose


def test_probes_are_the_newest_and_others_that_padding_does_not_change():
    score = ProbedMass(0.05, 0.05, 7)
    positions = torch.arange(200)[None]
    probes = score.probes(positions, 3)[1][0].tolist()
    assert len(set(probes)) == 20
    assert probes[:10] == list(range(190, 200))
    padded = torch.cat([torch.full((1, 60), -1), positions], 1)
    index, found = score.probes(torch.cat([padded, torch.cat([torch.full((1, 240), -1), positions[:, :20]], 1)]), 3)
    assert found[0].tolist() == probes
    assert (index[0] - 60).tolist() == probes
    assert found[1].tolist()[0] == 19
    assert sorted(found[1].tolist())[2:] != [-1, -1]
    assert int((found[1] >= 0).sum()) == 2
    assert score.probes(positions, 4)[1].tolist() != [probes]
    assert ProbedMass(0.05, 0.05, 8).probes(positions, 3)[1].tolist() != [probes]


def test_a_loud_channel_spoils_a_token_less_once_channels_are_separated():
    x = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(0))
    errors = {}
    for loud in (False, True):
        x = x * torch.where(torch.arange(64) == 5, 100.0, 1.0) if loud else x
        plain, separable = (
            Int(4, "token", 64, 64, torch.float32),
            Separable(Int(4, "token", 64, 64, torch.float32), 64, torch.float32, True),
        )
        bound = separable.given(separable.observe(x, torch.ones(1, 50, dtype=torch.bool), x))
        quiet = torch.arange(64) != 5
        for name, fmt in (("plain", plain), ("separable", bound)):
            wrong = (fmt.decode(fmt.encode(x)) - x)[..., quiet]
            errors[name, loud] = float(wrong.square().mean().sqrt())
    assert errors["plain", True] > 15 * errors["plain", False]
    assert errors["separable", True] < 5 * errors["separable", False]
    silent = torch.zeros(1, 3, 64)
    bound = separable.given(separable.observe(silent, torch.ones(1, 3, dtype=torch.bool), silent))
    assert torch.equal(bound.decode(bound.encode(silent)), silent)


def test_a_range_that_grows_encodes_anew_and_a_fork_keeps_its_own():
    dense, columns = Dense(8, torch.float32), Columns({"position": torch.int32})
    side = SideLayout(Ranged(8, 8, torch.float32), dense)
    store = Store(StoreLayout(side, side, columns, 4), Arena(torch.device("cpu"), 4), 4)
    own, twin = slice(0, 2), slice(2, 4)
    x = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(0))
    rows, counts = {"position": torch.arange(6, dtype=torch.int32).expand(2, -1)}, torch.tensor([6, 4])
    store.observe(own, x, x, counts, x[:, None, :0], torch.zeros(2, 6, dtype=torch.bool))
    store.append(own, x, x, rows, counts)
    store.share(twin, store, torch.arange(2))
    before = store.read(twin)[0]
    codes = store.keys.settled.read(own)["codes"].clone()
    store.append(own, x, x, rows, counts)  # nothing new in it
    assert torch.equal(store.keys.settled.read(own)["codes"][:, :4], codes[:, :4])
    store.append(own, 3 * x[:1].repeat(2, 1, 1), x, rows, torch.tensor([0, 2]))  # only the second head grows
    keys = store.read(own)[0]
    torch.testing.assert_close(keys[0, :12], torch.cat([x[0], x[0]]), rtol=0, atol=0.003)
    torch.testing.assert_close(keys[1, :10], torch.cat([x[1, :4], x[1, :4], 3 * x[0, :2]]), rtol=0, atol=0.01)
    assert torch.equal(store.keys.settled.read(slice(0, 1))["codes"][0, :6], codes[0])
    assert torch.equal(store.read(twin)[0], before)


def test_all_salient_and_exact_is_full():
    model = make_tiny("llama")
    full = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model))
    cache = kvarn.Cache(model, "zipcache(regular=0.0, high=16, gap=5)")
    torch.testing.assert_close(logits_of(model, PROMPT, CONTINUATION, cache), full, rtol=1e-4, atol=1e-4)
    near = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, "zipcache(high=8, low=8, gap=5)"))
    torch.testing.assert_close(near, full, rtol=0, atol=0.1 * float(full.abs().max()))


def test_new_tokens_wait_for_each_other_and_attention_is_seen_only_when_they_are_encoded(monkeypatch):
    model, gap = make_tiny("llama"), 5
    cache = kvarn.Cache(model, f"zipcache(gap={gap})")
    seen = []
    monkeypatch.setattr(
        ProbedMass, "observe", lambda self, o, c: seen.append(o.layer) or {"saliency": o.paid.mass.mean(2)}
    )
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        for step, token in enumerate(CONTINUATION, 1):
            model(token.view(1, 1), past_key_values=cache)
            store, tokens = cache._groups[0].store, 90 + step // gap * gap
            assert store.fresh.lengths.unique().tolist() == [step % gap]
            assert store.low.lengths.unique().tolist() == [int(0.4 * tokens)]
            assert len(seen) == 4 * (step // gap)
            most = cache.recipe.planner(cache.spec, None, [90]).most(90 + step)
            assert cache.report().bytes <= int(most)


def test_bytes_are_those_of_the_paper_and_a_scale_of_values_for_each_head():
    recipe = kvarn.Recipe.parse("zipcache")
    layout = recipe.layout(kvarn.spec.LayerSpec(32, 8, 128, 128, None), torch.float16, 64)
    assert isinstance(layout, TieredLayout)
    tokens = 64 * 10_000
    share = int(layout.bytes(torch.tensor(tokens))) / tokens / (2 * 128 * 2)
    columns, scales = 8 / (2 * 128 * 2), 4 / (2 * 128 * 2)
    assert share - columns - scales == pytest.approx(3.2 / 16, rel=0.02)


def test_what_another_method_evicts_is_the_rest_in_two_precisions():
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "h2o + zipcache(gap=6)", 40)
    logits_of(model, PROMPT, CONTINUATION, cache)
    store = cache._groups[0].store
    assert store.lengths.unique().tolist() == [40]
    assert int(store.high.lengths.max()) <= 24
    assert store.fresh.lengths.unique().tolist() == [0]


@pytest.mark.parametrize(
    "parameters",
    [
        {"regular": 1.5},
        {"high": 2},
        {"low": 5},
        {"high": 4, "low": 8},
        {"gap": 0},
        {"recent": 0.9, "random": 0.2},
        {"random": -0.1},
        {"normalize": "none"},
        {"peaks": "none"},
    ],
)
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="zipcache"):
        ZipCache(**parameters)


def test_what_a_recipe_cannot_be():
    with pytest.raises(RecipeError, match="both decide in which format"):
        kvarn.Recipe.parse("zipcache + kivi")
    with pytest.raises(RecipeError, match="keep all their channels"):
        kvarn.Cache(make_tiny("llama"), "think + zipcache")


@dataclass(frozen=True)
class LeastMass(ProbedMass):
    def stored(self, columns, seen):
        return -columns["saliency"]


@dataclass(frozen=True)
class LeastSalient(ZipCache):
    name = "leastsalient"

    def precision(self, layer, dtype):
        return replace(super().precision(layer, dtype), score=LeastMass(self.recent, self.random, self.seed))


@torch.no_grad()
def test_the_bits_go_where_they_matter(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(topics["objects"], return_tensors="pt").input_ids[:, :205]
    predictions, bytes_held = [], []
    for recipe in ("full", "zipcache", LeastSalient(), "kivi(bits=2)"):
        cache = kvarn.Cache(model, recipe)
        model(ids[:, :200], past_key_values=cache, logits_to_keep=1)
        bytes_held.append(cache.report().bytes)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(200, 205)]
        predictions.append(torch.cat(steps).double().log_softmax(-1))
    full, salient, others, kivi = predictions
    divergences = [float((full.exp() * (full - p)).sum(-1).mean()) for p in (salient, others, kivi)]
    assert divergences[0] < 0.3 * divergences[1]
    assert divergences[0] < divergences[2]
    assert bytes_held[1] < 0.6 * bytes_held[3]
