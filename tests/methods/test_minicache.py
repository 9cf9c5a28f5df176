"""MiniCache against the paper's formulas in plain loops (arXiv 2405.14366, section 3)."""

import math

import pytest
import torch
from neighbours import Neighbours
from one_layer import GROUP, KV_HEADS, SIZE, probabilities, random_tokens, split
from transformers import DynamicCache

import kvarn
from drive import logits_of
from kvarn.errors import RecipeError, Unsupported
from kvarn.formats import Dense, Directions
from kvarn.methods.minicache import MiniCache
from test_real_model import answer, haystack_with_needle
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 90), generator=torch.Generator().manual_seed(1))
CONTINUATION = torch.randint(1, 160, (12,), generator=torch.Generator().manual_seed(2))
TINY = "minicache(gamma=0.4, most=0.2)"


def unit(x) -> list[float]:
    length = math.sqrt(sum(float(n) ** 2 for n in x))
    return [float(n) / length for n in x]


def angle(x, y) -> float:
    return math.acos(max(-1.0, min(1.0, sum(a * b for a, b in zip(unit(x), unit(y), strict=True)))))


def merged(x, y, t: float) -> tuple[list[float], list[float]]:
    """Both layers' vectors restored from one direction and two lengths."""
    omega = angle(x, y)
    first, second = math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
    direction = unit([first * a + second * b for a, b in zip(unit(x), unit(y), strict=True)])
    return tuple([d * math.sqrt(sum(float(n) ** 2 for n in v)) for d in direction] for v in (x, y))


class Naive:
    """One KV head of two layers: which tokens are merged and which retained."""

    def __init__(self, sides, prompt: int, gamma: float, most: float, judged_by: str, t: float):
        self.sides, self.most = sides, most  # keys and values, [two layers][token][SIZE] each
        self.judges = {"either": (0, 1), "keys": (0,), "values": (1,)}[judged_by]
        pairs = [list(zip(*side, strict=True)) for side in sides]
        self.angles = [[angle(x, y) for x, y in side] for side in pairs]
        self.merged = [[merged(x, y, t) for x, y in side] for side in pairs]
        of_prompt = [angles[:prompt] for angles in self.angles]
        self.bounds = [max(angles) - gamma * (max(angles) - min(angles)) for angles in of_prompt]
        self.low, self.high = [], []
        self.add(list(range(prompt)))

    def strain(self, token: int) -> float:
        return max(self.angles[side][token] - self.bounds[side] for side in self.judges)

    def add(self, tokens: list[int]) -> None:
        total = len(self.low) + len(self.high) + len(tokens)
        best = sorted(tokens, key=lambda token: -self.strain(token))[: math.floor(self.most * total + 1e-9)]
        kept = [token for token in tokens if token in best and self.strain(token) > -1e-6]
        self.low += [token for token in tokens if token not in kept]
        self.high += kept
        while len(self.high) > math.floor(self.most * total + 1e-9):
            least = min(self.high, key=self.strain)
            self.high.remove(least)
            self.low.append(least)

    def read(self, layer: int, side: int) -> torch.Tensor:
        exact = [self.sides[side][layer][token].tolist() for token in self.high]
        return torch.tensor([self.merged[side][token][layer] for token in self.low] + exact)

    def tokens(self) -> torch.Tensor:
        """All that is read of each token, in no order."""
        return torch.cat([self.read(layer, side) for layer in range(2) for side in range(2)], 1)


@pytest.mark.parametrize(
    ("gamma", "most", "judged_by", "t"),
    [(0.05, 1.0, "either", 0.6), (0.5, 1.0, "keys", 0.5), (0.6, 0.2, "values", 0.6), (0.7, 0.3, "either", 0.3)],
)
def test_the_same_cache_as_the_paper_token_by_token(gamma, most, judged_by, t):
    prompt, total = 20, 30
    layers = [random_tokens(total, seed) for seed in (0, 1)]
    both = Neighbours(f"minicache(start=0.0, {gamma=}, {most=}, {judged_by=}, interpolation={t})")
    both.prompt([split(tokens, 0, prompt) for tokens in layers])
    heads = [
        Naive([[layer[side][0, h] for layer in layers] for side in (1, 2)], prompt, gamma, most, judged_by, t)
        for h in range(KV_HEADS)
    ]
    for seen in range(prompt, total + 1):
        read = [side for number in range(2) for side in both.read(number)]
        for h, naive in enumerate(heads):
            mine = torch.cat([side[h] for side in read], 1)
            mine, own = (rows[rows[:, 0].argsort()] for rows in (mine, naive.tokens()))
            torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-4)
        if seen < total:
            both.token([split(tokens, seen, seen + 1) for tokens in layers])
            for naive in heads:
                naive.add([seen])
    assert all(naive.low and naive.high for naive in heads)


def test_the_prompt_is_attended_to_exactly_and_a_new_token_too():
    layers = [random_tokens(31, seed) for seed in (0, 1)]
    both = Neighbours("minicache(start=0.0)")
    for number, out in enumerate(both.prompt([split(tokens, 0, 30) for tokens in layers])):
        query, keys, values = split(layers[number], 0, 30)
        for h in range(KV_HEADS * GROUP):
            row = probabilities(query[0, h, 29], keys[0, h // GROUP])
            expected = torch.tensor(row) @ values[0, h // GROUP]
            torch.testing.assert_close(out[0, h, 29], expected, rtol=1e-4, atol=1e-4)
    stored = [both.read(number) for number in range(2)]
    for number, out in enumerate(both.token([split(tokens, 30, 31) for tokens in layers])):
        query, keys, values = split(layers[number], 30, 31)
        for h in range(KV_HEADS * GROUP):
            held = [
                torch.cat([stored[number][side][h // GROUP], x[0, h // GROUP]]) for side, x in enumerate((keys, values))
            ]
            expected = torch.tensor(probabilities(query[0, h, 0], held[0])) @ held[1]
            torch.testing.assert_close(out[0, h, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("t", "own"), [(0.0, 0), (1.0, 1)])
def test_at_the_ends_of_the_arc_the_direction_is_one_layers(t, own):
    x = torch.randn(3, 10, 2 * SIZE)
    fmt = Directions(Dense(SIZE, torch.float32), t, None, SIZE, torch.float32)
    read = fmt.decode(fmt.encode(x)).unflatten(-1, (2, SIZE))
    torch.testing.assert_close(read[..., own, :], x.unflatten(-1, (2, SIZE))[..., own, :], rtol=1e-5, atol=1e-5)


def test_special_vectors():
    fmt = Directions(Dense(2, torch.float32), 0.5, None, 2, torch.float32)
    x = torch.tensor([[3.0, 0, 0, 4], [1, 2, 2, 4], [1, 2, -1, -2], [0, 0, 1, 1], [0, 0, 0, 0]])
    read = fmt.decode(fmt.encode(x))
    half = math.sqrt(0.5)
    torch.testing.assert_close(read[0], torch.tensor([3 * half, 3 * half, 4 * half, 4 * half]))
    torch.testing.assert_close(read[1], x[1])  # parallel: exact
    assert bool(read.isfinite().all())
    assert torch.equal(read[4], x[4])
    torch.testing.assert_close(fmt.angles(x)[:3], torch.tensor([math.pi / 2, 0, math.pi]))


def test_layers_that_are_alike_are_restored_exactly():
    tokens = random_tokens(40)
    both = Neighbours("minicache(start=0.0)")
    both.prompt([tokens, tokens])
    assert int(both.group.store.low.lengths.min()) >= 38
    for number in range(2):
        for head, (keys, values) in enumerate(zip(*both.read(number), strict=True)):
            order = torch.cdist(keys, tokens[1][0, head]).argmin(1)
            torch.testing.assert_close(keys, tokens[1][0, head, order], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, tokens[2][0, head, order], rtol=1e-4, atol=1e-5)
            assert sorted(order.tolist()) == list(range(40))


def test_lengths_survive_two_bits():
    layers = [random_tokens(32, seed) for seed in (0, 1)]
    both = Neighbours("minicache(start=0.0, most=0.0) + kivi(bits=2, group=8, residual=8)")
    both.prompt(layers)
    assert both.group.store.low.keys.settled.lengths.tolist() == [32, 32]
    for number, tokens in enumerate(layers):
        keys = both.read(number)[0]
        for head in range(KV_HEADS):
            torch.testing.assert_close(keys[head].norm(dim=-1), tokens[1][0, head].norm(dim=-1), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(keys[head], tokens[1][0, head], atol=0.1)


def test_the_rotation_of_keys_commutes_with_merging():
    x, turn = torch.randn(1, 12, 2 * SIZE), torch.linalg.qr(torch.randn(SIZE, SIZE)).Q
    fmt = Directions(Dense(SIZE, torch.float32), 0.6, 0.05, SIZE, torch.float32)

    def turned(y):
        return (y.unflatten(-1, (2, SIZE)) @ turn).flatten(-2)

    torch.testing.assert_close(
        fmt.decode(fmt.encode(turned(x))), turned(fmt.decode(fmt.encode(x))), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(fmt.angles(turned(x)), fmt.angles(x))


def test_to_retain_all_is_the_full_cache():
    model = make_tiny("llama")
    full = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model))
    all_kept = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, "minicache(gamma=1.0, most=1.0)"))
    torch.testing.assert_close(all_kept, full, rtol=1e-4, atol=1e-4)
    few = logits_of(model, PROMPT, CONTINUATION, kvarn.Cache(model, "minicache"))
    assert not torch.allclose(few, full, atol=0.1)


def test_layers_of_a_pair_evict_the_same_tokens_by_both_their_scores():
    window, length, capacity = 4, 30, 12
    layers = [random_tokens(length, seed) for seed in (0, 1)]
    both = Neighbours(f"snapkv(window={window}, kernel=1) + minicache(start=0.0)", capacity=capacity)
    both.prompt(layers)
    for h in range(KV_HEADS):
        votes = [0.0] * (length - window)
        for query, keys, _ in layers:
            for g in range(GROUP):
                for position in range(length - window, length):
                    row = probabilities(query[0, h * GROUP + g, position], keys[0, h, : position + 1])
                    votes = [vote + p for vote, p in zip(votes, row[: length - window], strict=True)]
        best = sorted(range(length - window), key=votes.__getitem__)[-(capacity - window) :]
        assert both.positions()[h] == sorted([*best, *range(length - window, length)])


@pytest.mark.parametrize("recipe", ["minicache(most=0.0)", "minicache(most=0.0) + kivi(bits=4, group=16, residual=16)"])
@pytest.mark.parametrize(("tokens", "page_size"), [(90, 16), (33, 5)])
def test_planned_bytes_are_held_bytes(recipe, tokens, page_size):
    model = make_tiny("llama")
    cache = kvarn.Cache(model, recipe, page_size=page_size)
    model(PROMPT[:, :tokens].repeat(2, 1), past_key_values=cache)
    assert cache.report().bytes == sum(cache.plan.bytes)


@pytest.mark.parametrize("recipe", [TINY, TINY + " + kivi(bits=4, group=16, residual=16)"])
def test_a_plan_counts_the_most_that_may_be_retained(recipe):
    model = make_tiny("llama")
    for tokens in range(60, 90, 7):
        cache = kvarn.Cache(model, recipe)
        model(PROMPT[:, :tokens], past_key_values=cache)
        assert cache.report().bytes <= cache.plan.bytes[0]


def test_bytes_are_those_of_the_paper():
    """D + 2 numbers a token and pair of layers in place of 2 D, in half of the layers."""
    model = make_tiny("llama").half()
    prompt = PROMPT[:, :80].repeat(1, 8)
    cache = kvarn.Cache(model, "minicache(most=0.0)")
    model(prompt, past_key_values=cache)
    report, numbers = cache.report(), 640 * 2 * 2 * 2  # of one number an entry, keys and values, two heads, two bytes
    assert report.by_format["directions dense"] == numbers * (16 + 2) + report.by_format["directions dense"] % numbers
    assert report.by_format["directions dense"] - numbers * 18 == 40 * 4 * 8  # 40 pages of each of four segments
    assert report.ratio == pytest.approx(0.5 + 0.5 * 18 / 32, rel=0.06)
    assert report.reserved_bytes < 1.2 * report.bytes  # no pair's exact entries ever lay in pages
    both_layers = 2 * 2 * 2 * 640 * 16 * 2
    assert report.peak_bytes >= 4 * 2 * 2 * 640 * 16 + both_layers  # two full layers, and the pair in hand


def test_what_waits_for_its_neighbour_goes_when_it_has_come():
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "minicache")
    model(PROMPT, past_key_values=cache)
    group = cache._group_of[3]
    assert group.numbers == [2, 3]
    assert not group._waiting
    assert cache._group_of[1].numbers == [0, 1]
    model(PROMPT[:, :1], past_key_values=cache)
    assert not group._waiting


def test_beams_share_and_part():
    model = make_tiny("llama")
    cache = kvarn.Cache(model, TINY)
    arguments = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 12, "do_sample": False, "num_beams": 3}
    out = model.generate(PROMPT, past_key_values=cache, **arguments)
    assert out.shape == (1, 102)
    assert cache.batch_size == 3
    arena = cache._arena
    cache.free()
    assert arena.bytes == 0


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("h2o + minicache", "observes the attention of each layer by itself"),
        ("d2o + minicache", "decides how much each head may keep for each layer by itself"),
        ("kvmerger + minicache", "rewrites the entries of each layer by itself"),
        ("minicache + think", "decides which channels of the keys stay for each layer by itself"),
        ("minicache + xquant", "decides which channels of the keys stay"),
        ("minicache + mikv", "keeps entries in two precisions"),
        ("fastkv + minicache", "decides which tokens go on to later layers"),
        ("cake + minicache", "decides how much each head may keep"),
        ("minicache + xkv", "both decide what neighbouring layers keep together"),
    ],
)
def test_what_each_layer_decides_by_itself_does_not_combine(recipe, reason):
    with pytest.raises(RecipeError, match=f"cannot act together.*{reason}"):
        kvarn.Recipe.parse(recipe)


def test_models_without_such_neighbours_are_refused():
    for name in ("gemma3", "gemma2"):
        with pytest.raises(Unsupported, match="no 2 neighbouring layers with full attention from layer 2 on"):
            kvarn.Cache(make_tiny(name), "minicache")


@pytest.mark.parametrize(
    "parameters",
    [{"start": 1.0}, {"start": -0.1}, {"interpolation": 1.5}, {"gamma": -1.0}, {"most": 2.0}, {"judged_by": "both"}],
)
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="minicache"):
        MiniCache(**parameters)


@torch.no_grad()
def test_a_model_whose_neighbours_are_at_right_angles_bears_merging_in_its_last_layers_alone(smollm2):
    model, tokenizer = smollm2
    prompt = haystack_with_needle(tokenizer, 200, 0.3)
    held = DynamicCache(config=model.config)
    model(prompt[:, :100], past_key_values=held, logits_to_keep=1)
    fmt = Directions(Dense(64, torch.float32), 0.6, None, 64, torch.float32)
    for side in ("keys", "values"):
        x = [getattr(layer, side)[0] for layer in held.layers[15:29]]
        angles = [fmt.angles(torch.cat([x[i], x[i + 1]], -1)).mean() for i in range(0, 14, 2)]
        assert 80 < float(torch.stack(angles).mean()) * 180 / math.pi < 100
    assert "73915" in answer(smollm2, prompt, "minicache(start=0.9)", None)
    assert "73915" not in answer(smollm2, prompt, "minicache", None)
