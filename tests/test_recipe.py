"""Recipes: read, printed, composed, and resolved into plans that real caches keep to."""

import re
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import kvarn
from kvarn.budgets import check_budget, parse_bytes
from kvarn.errors import BudgetError, RecipeError
from kvarn.methods import METHODS, Method
from kvarn.methods.epicache import EpiCache
from kvarn.methods.full import Full
from kvarn.methods.gear import GEAR
from kvarn.methods.h2o import H2O
from kvarn.methods.kivi import KIVI
from kvarn.methods.snapkv import SnapKV
from kvarn.methods.vidkv import VidKV
from kvarn.methods.window import Window
from kvarn.recipe import Recipe
from kvarn.spec import LayerSpec, ModelSpec
from tiny_models import TINY, make_tiny

# -- text ---------------------------------------------------------------------------------------------------------

share = st.floats(0.01, 0.5)
keepers = st.one_of(
    st.builds(SnapKV, st.integers(1, 64), st.integers(0, 9).map(lambda n: 2 * n + 1), st.sampled_from(["max", "avg"])),
    st.builds(H2O, share, share, st.none() | st.integers(1, 64)),
    st.builds(lambda sinks, more: Window(sinks, sinks + more), st.integers(0, 9), st.integers(1, 4000)),
)
encoders = st.builds(
    lambda bits, group, blocks: KIVI(bits, group, group * blocks),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([8, 16, 32]),
    st.integers(1, 8),
)
recipes = st.one_of(
    st.just([Full()]),
    keepers.map(lambda m: [m]),
    encoders.map(lambda m: [m]),
    st.tuples(keepers, encoders).flatmap(st.permutations),
).map(lambda methods: Recipe(tuple(methods)))


@given(recipes)
def test_printing_and_reading_round_trip(recipe: Recipe) -> None:
    assert Recipe.parse(str(recipe)) == recipe
    assert str(Recipe.parse(str(recipe))) == str(recipe)


@given(recipes)
def test_every_parameter_may_be_written_out(recipe: Recipe) -> None:
    def written(method: Method) -> str:
        return f"{method.name}({', '.join(f'{f.name}={getattr(method, f.name)!r}' for f in fields(method))})"

    assert Recipe.parse(" +  ".join(written(method) for method in recipe.methods)) == recipe


def test_only_what_differs_from_the_defaults_is_printed() -> None:
    assert [str(method()) for method in METHODS.values()] == list(METHODS)
    assert str(SnapKV(kernel=5, pooling="avg") + KIVI(bits=4)) == "snapkv(kernel=5, pooling='avg') + kivi(bits=4)"
    assert Recipe.parse("snapkv(window=32)") == Recipe.parse(" snapkv ( ) ") == Recipe.parse("snapkv")
    assert Recipe.parse("h2o(heavy=0.2, recent=0.3)").methods == (H2O(0.2, 0.3),)


def test_composition() -> None:
    snapkv, kivi = SnapKV(), KIVI(bits=4)
    expected = Recipe((snapkv, kivi))
    assert snapkv + kivi == expected == Recipe.parse("snapkv + kivi(bits=4)")
    assert Recipe.parse(snapkv) + kivi == expected == snapkv + Recipe.parse(kivi)
    assert Recipe.parse("snapkv + (kivi(bits=4))") == expected
    assert Recipe.parse(expected) is expected
    assert expected.names == ["snapkv", "kivi"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kiwi", "unknown method 'kiwi' (did you mean kivi?); the methods are "),
        ("xyz", "unknown method 'xyz'; the methods are"),
        ("snapkv + wndow", "unknown method 'wndow' (did you mean window?)"),
        ("kivi(bit=4)", "kivi has no parameter 'bit' (did you mean bits?); it takes bits, group, residual"),
        ("full(bits=4)", "full has no parameter 'bits'; it takes none"),
        ("kivi(bits='4')", "kivi(bits='4'): expected int, as in bits=2"),
        ("kivi(bits=4.0)", "kivi(bits=4.0): expected int, as in bits=2"),
        ("kivi(bits=True)", "kivi(bits=True): expected int, as in bits=2"),
        ("snapkv(pooling=3)", "snapkv(pooling=3): expected"),
        ("h2o(heavy='a')", "h2o(heavy='a'): expected float, as in heavy=0.1"),
        ("h2o(interval='a')", "h2o(interval='a'): expected int | None, as in interval=None"),
        ("snapkv + h2o", "snapkv and h2o cannot act together: both decide what to keep; leave one of them out"),
        ("kivi + kivi(bits=4)", "kivi and kivi(bits=4) cannot act together: both decide in which format"),
        ("window + full", "window and full cannot act together: both decide what to keep"),
        ("full + kivi", "full and kivi cannot act together: both decide in which format"),
        ("kivi(bits=5)", "kivi(bits=5): bits is 2, 3, 4 or 8"),
        ("kivi(group=32, residual=48)", "residual must be a positive multiple of group"),
        ("kivi(group=0)", "residual must be a positive multiple of group"),
        ("snapkv(window=0)", "needs 1 <= window < capacity"),
        ("snapkv(window=64, capacity=64)", "needs 1 <= window < capacity"),
        ("snapkv(kernel=4)", "kernel must be odd"),
        ("snapkv(pooling='mean')", "snapkv(pooling='mean'): expected"),
        ("window(sinks=4, capacity=4)", "needs 0 <= sinks < capacity"),
        ("h2o(heavy=0.7, recent=0.7)", "0 < heavy + recent <= 1"),
        ("h2o(heavy=-0.1)", "heavy, recent >= 0"),
        ("h2o(interval=0)", "h2o(interval=0): interval is at least 1"),
        ("h2o(interval=-3)", "h2o(interval=-3): interval is at least 1"),
        ("h2o(interval=1.5)", "h2o(interval=1.5): expected int | None"),
        ("kivi(bits=2, bits=4)", "kivi is given a parameter twice in 'kivi(bits=2, bits=4)'"),
    ],
)
def test_recipes_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "snapkv +",
        "+ snapkv",
        "snapkv kivi",
        "kivi(2)",
        "kivi(*[2])",
        "kivi(**{})",
        "kivi(bits=x)",
        "kivi - full",
        "a.kivi()",
        "kivi()()",
        "'kivi'",
        "kivi(bits=",
        "kivi(bits=f())",
        "\0",
        "(" * 400,
        "kivi; full",
    ],
)
def test_text_that_cannot_be_read(text: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*: write methods joined by"):
        Recipe.parse(text)


@pytest.mark.parametrize("text", ["kivi(bits={[]: 1})", 7])
def test_nothing_odd_passes(text: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.parse(text)


def test_a_wrong_choice_names_the_choices() -> None:
    with pytest.raises(RecipeError, match=r"'max'.*'avg'"):
        Recipe.parse("snapkv(pooling='mean')")


def test_parameters_are_checked_without_text_too() -> None:
    with pytest.raises(RecipeError, match="pooling is 'max' or 'avg'"):
        SnapKV(pooling="mean")


# -- budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64MiB", 64 * 2**20),
        (" 1.5 gb ", 1_500_000_000),
        ("3kib", 3072),
        ("2 KB", 2000),
        ("7B", 7),
        ("1GiB", 2**30),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected
    check_budget(text)


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e9", "64 Mbit", "1,000", "1.MB", "one", "64MiB more"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(BudgetError, match=r"is not a size: write a number and one of B, KB.*as in '64MiB'"):
        check_budget(text)


@pytest.mark.parametrize("budget", [0, -1, 0.0, -0.5, True, False, [1], 2j, float("nan"), float("inf")])
def test_what_is_not_a_budget(budget: object) -> None:
    with pytest.raises(BudgetError, match=re.escape(f"budget {budget!r}: give a float above 0")):
        check_budget(budget)


@pytest.mark.parametrize("budget", [0.1, 1.0, 3.5, 1, 1000, None, "1MiB"])
def test_budgets(budget: object) -> None:
    check_budget(budget)


# -- plans --------------------------------------------------------------------------------------------------------

SPEC = ModelSpec("toy", (LayerSpec(4, 2, 16, 16, None),) * 4, torch.float32, 4096)
MIXED = ModelSpec("toy", (LayerSpec(4, 2, 16, 16, 17), LayerSpec(4, 2, 16, 16, None)) * 2, torch.bfloat16, 4096)
EVICTING = ["snapkv(window=8)", "h2o", "h2o(interval=4)", "window", "snapkv(window=8) + kivi(group=16, residual=16)"]
EVICTING += ["h2o + kivi(bits=4, group=8, residual=16)"]
HEADS = 8  # KV heads of SPEC in all


def open_pages(recipe: Recipe, spec: ModelSpec, page_size: int) -> int:
    """One page for each head and each segment that it has."""
    total = 0
    for layer in spec.layers:
        layout = recipe.layout(layer, spec.dtype, page_size)
        for fmt in {id(f): f for side in (layout.keys, layout.values) for f in (side.dense, side.format)}.values():
            units = -(-page_size // fmt.unit)
            total += layer.kv_heads * (units * fmt.unit_bytes + 12 + 16)
        total += layer.kv_heads * (page_size * layout.columns.unit_bytes + 12 + 16 if layout.columns else 0)
    return total


@settings(max_examples=30)
@given(
    st.sampled_from(EVICTING),
    st.sampled_from([SPEC, MIXED]),
    st.floats(0.15, 1.2),
    st.floats(0, 0.5),
    st.integers(150, 900),
    st.sampled_from([1, 8, 16, 33]),
)
def test_shares_are_kept_to_and_more_gives_no_less(
    text: str, spec: ModelSpec, budget: float, more: float, length: int, page_size: int
) -> None:
    recipe = Recipe.parse(text)
    try:
        plan = recipe.resolve(spec, budget, [length], page_size)
    except BudgetError:  # below the least: see test_the_least_that_is_named_is_enough
        return
    larger = recipe.resolve(spec, budget + more, [length], page_size)
    assert plan.allowed == [int(budget * spec.dense_bytes(length))]
    assert plan.bytes[0] <= plan.allowed[0] + open_pages(recipe, spec, page_size)
    assert larger.entries[0] >= plan.entries[0]
    assert larger.allowed[0] >= plan.allowed[0]
    eviction = recipe.eviction(spec.layers[-1], spec.dtype)
    if plan.entries[0] > eviction.least:
        assert plan.bytes[0] <= plan.allowed[0]
    if eviction.decode and plan.entries[0] > eviction.least:
        # Whatever state a head is in while it holds so many or fewer.
        numbers, total = torch.arange(1, plan.entries[0] + 2), 0
        for layer in spec.layers:
            kept = numbers if layer.window is None else torch.tensor(layer.kept_dense(length))
            layout = recipe.layout(layer, spec.dtype, page_size)
            total = total + layer.kv_heads * (layout.most_bytes if layer.window is None else layout.bytes)(kept)
        assert int(total[:-1].max()) <= plan.allowed[0]
        assert int(total.max()) > plan.allowed[0] or plan.entries[0] >= 4096, "one entry more would not fit"


def test_entries_are_taken_as_they_are() -> None:
    plan = Recipe.parse("window").resolve(SPEC, 100, [300, 60])
    assert plan.entries == [100, 100]
    assert plan.allowed == [None, None]
    layout = Recipe.parse("window").layout(SPEC.layers[0], torch.float32, 16)
    assert plan.bytes == [HEADS * int(layout.bytes(torch.tensor(n))) for n in (100, 60)]


def test_without_a_budget_methods_take_their_own() -> None:
    assert Recipe.parse("snapkv(capacity=77)").resolve(SPEC, None, [300]).entries == [77]
    assert Recipe.parse("h2o(heavy=0.1, recent=0.15)").resolve(SPEC, None, [300, 400]).entries == [75, 100]
    assert Recipe.parse("window").resolve(SPEC, None, [300]).entries == [1024]
    assert Recipe.parse("kivi").resolve(SPEC, None, [300]).entries == [300]


def test_sizes_are_split_over_sequences() -> None:
    recipe = Recipe.parse("window")
    together = recipe.resolve(SPEC, "600KB", [500, 500, 500])
    alone = recipe.resolve(SPEC, "200KB", [500])
    assert together.allowed == [200_000] * 3
    assert together.entries == alone.entries * 3
    assert together.bytes == alone.bytes * 3
    assert sum(together.bytes) <= 600_000


def test_full_is_everything() -> None:
    for budget in (1.0, 1.5, None, 400, "1GiB"):
        assert Recipe.parse("full").resolve(SPEC, budget, [400, 3]).entries == [400, 3]


def test_sliding_windows_are_fixed() -> None:
    """A budget pays for the windows first, and the rest is the full layers'."""
    recipe = Recipe.parse("window")
    plan = recipe.resolve(MIXED, 0.4, [600])
    full, sliding = MIXED.layers[1], MIXED.layers[0]
    fixed = 2 * 2 * int(recipe.layout(sliding, torch.bfloat16, 16).bytes(torch.tensor(16)))
    growing = 2 * 2 * int(recipe.layout(full, torch.bfloat16, 16).bytes(torch.tensor(plan.entries[0])))
    assert plan.bytes == [fixed + growing]
    assert recipe.eviction(sliding, torch.bfloat16) is None
    assert recipe.layout(sliding, torch.bfloat16, 16).columns is None
    assert MIXED.dense_bytes(600) == 2 * (600 + 16) * 2 * 2 * 16 * 2
    kivi = Recipe.parse("kivi").layout(sliding, torch.bfloat16, 16)
    assert not kivi.keys.settles
    assert not kivi.values.settles


@pytest.mark.parametrize(
    ("text", "budget", "message"),
    [
        (
            "full",
            0.5,
            r"full needs at least [\d,]+ bytes for 400 tokens \([\d.]+ of the dense [\d,]+\); the budget allows",
        ),
        ("kivi(bits=8)", 0.1, r"kivi\(bits=8\) needs at least"),
        ("full", 399, "full evicts nothing and needs 400 entries a head; the budget is 399"),
        ("kivi", 10, "kivi evicts nothing and needs 400 entries a head; the budget is 10"),
        ("snapkv", 32, "snapkv needs at least 33 entries a head; the budget is 32"),
        ("window(sinks=9)", 9, r"window\(sinks=9\) needs at least 10 entries a head; the budget is 9"),
        ("snapkv(window=300)", 0.2, r"snapkv\(window=300\) needs at least"),
        ("snapkv", "1KB", r"snapkv needs at least [\d,]+ bytes for 400 tokens.*the budget allows 1,000"),
    ],
)
def test_budgets_below_the_least(text: str, budget: object, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Recipe.parse(text).resolve(SPEC, budget, [400])


@pytest.mark.parametrize(
    "text", ["kivi(bits=8)", "snapkv(window=100)", "window(sinks=60)", "snapkv(window=64) + kivi(bits=4)"]
)
@pytest.mark.parametrize("spec", [SPEC, MIXED], ids=["full", "mixed"])
def test_the_least_that_is_named_is_enough(text: str, spec: ModelSpec) -> None:
    recipe = Recipe.parse(text)
    with pytest.raises(BudgetError) as caught:
        recipe.resolve(spec, "0", [400])
    least = int(re.search(r"at least ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
    assert recipe.resolve(spec, str(least), [400]).bytes[0] <= least + open_pages(recipe, spec, 16)
    with pytest.raises(BudgetError):
        recipe.resolve(spec, str(least - open_pages(recipe, spec, 16) - 1), [400])


def test_the_longest_of_a_batch_decides() -> None:
    with pytest.raises(BudgetError, match="for 400 tokens"):
        Recipe.parse("kivi(bits=8, residual=32)").resolve(SPEC, "200KB", [64, 400])


# -- real caches --------------------------------------------------------------------------------------------------

MODELS = {name: make_tiny(name) for name in ("llama", "gemma3")}
REAL = ["full", "kivi(bits=2, group=8, residual=16)", "snapkv(window=8)", "h2o", "window", "h2o(interval=4)"]
REAL += ["snapkv(window=8) + kivi(bits=4, group=8, residual=16)", "h2o + kivi(bits=8, group=8, residual=16)"]
STEPS = 40


def run(model: PreTrainedModel, cache: kvarn.Cache, ids: Tensor, mask: Tensor | None = None) -> None:
    more = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
    model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1, **more)


def tokens(batch: int, count: int) -> Tensor:
    return torch.randint(3, 160, (batch, count))


def budget_for(text: str, budget: object) -> object:
    if text == "full":
        return None
    return None if isinstance(budget, int) and text.startswith("kivi") else budget


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", REAL)
@pytest.mark.parametrize(
    ("budget", "length", "batch", "page_size"), [(0.6, 150, 1, 16), (50, 70, 3, 5), (None, 33, 2, 8)]
)
def test_planned_bytes_are_held_bytes(
    name: str, text: str, budget: object, length: int, batch: int, page_size: int
) -> None:
    model = MODELS[name]
    cache = kvarn.Cache(model, text, budget_for(text, budget), page_size=page_size)
    run(model, cache, tokens(batch, length))
    assert sum(cache.plan.bytes) == cache.report().bytes
    entries = min(length, cache.plan.entries[0])
    full = [x for x, spec in zip(cache.report().entries, cache.spec.layers, strict=True) if spec.window is None]
    assert full == [[[entries] * 2] * batch] * len(full)


@pytest.mark.parametrize("text", ["full", "kivi(group=8, residual=16)"])
def test_planned_bytes_are_held_bytes_in_a_padded_batch(text: str) -> None:
    model, lengths = MODELS["llama"], [120, 30, 75]
    cache = kvarn.Cache(model, text)
    mask = (torch.arange(120) >= 120 - torch.tensor(lengths)[:, None]).long()
    run(model, cache, tokens(3, 120), mask)
    assert sum(cache.plan.bytes) == cache.report().bytes


@pytest.mark.no_cover
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", [text for text in REAL if METHODS[re.match(r"\w+", text)[0]] in (H2O, Window)])
@pytest.mark.parametrize(("budget", "page_size", "padded"), [(0.5, 8, False), (0.7, 4, True), ("150KB", 16, False)])
def test_decoding_stays_within_the_budget(name: str, text: str, budget: object, page_size: int, padded: bool) -> None:
    model, batch, length = MODELS[name], 2, 120
    cache = kvarn.Cache(model, text, budget, page_size=page_size)
    lengths = torch.tensor([length, length - 30 if padded else length])
    mask = (torch.arange(length + STEPS) >= length - lengths[:, None]).long()
    run(model, cache, tokens(batch, length), mask[:, :length])
    plan, spare = cache.plan, batch * open_pages(cache.recipe, cache.spec, page_size)
    ids = tokens(batch, STEPS)
    for i in range(STEPS):
        held = cache.report()
        assert held.bytes <= sum(plan.allowed) + spare, f"{i} tokens after the prompt"
        for layer, spec in zip(held.entries, cache.spec.layers, strict=True):
            for sequence, most in zip(layer, plan.entries, strict=True):
                assert max(sequence) <= (most if spec.window is None else spec.window - 1)
        run(model, cache, ids[:, i : i + 1], mask[:, : length + i + 1])
    assert cache.plan is plan


formats_in_blocks = st.builds(
    lambda make, bits, group, blocks: make(bits, group, group * blocks),
    st.sampled_from(
        [
            KIVI,
            KIVI,
            lambda bits, group, block: GEAR(bits, group, block, rank=1),
            lambda _, g, r: VidKV(1.5, 1.58, g, r),
        ]
    ),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([4, 8, 16]),
    st.integers(1, 4),
)
evictors = st.sampled_from(
    [SnapKV(window=8), H2O(), H2O(interval=1), H2O(interval=5), Window(), Window(sinks=0), EpiCache(block=24, tail=8)]
)


@settings(max_examples=20)
@given(
    evictors,
    formats_in_blocks,
    st.floats(0.25, 0.9),
    st.tuples(st.integers(20, 120), st.integers(0, 12), st.integers(2, 60), st.integers(0, 12)),
    st.sampled_from([1, 3, 8, 16]),
)
def test_budgets_hold_in_formats_of_blocks(
    evictor: Method, encoder: Method, budget: float, lengths: tuple[int, int, int, int], page_size: int
) -> None:
    """Over a prompt, tokens, a second prompt and more tokens; SnapKV grows by no more than the new tokens."""
    model = MODELS["llama"]
    cache = kvarn.Cache(model, evictor + encoder, budget, page_size=page_size)
    layer = cache.recipe.layout(cache.spec.layers[0], cache.spec.dtype, page_size)
    for turn, count in enumerate(lengths):
        for part in [count] if turn % 2 == 0 else [1] * count:
            try:
                run(model, cache, tokens(1, part))
            except BudgetError:
                return
            report, plan = cache.report(), cache.plan
            heads = torch.tensor(report.entries)
            assert report.bytes <= int(layer.most_bytes(heads).sum())
            if turn % 2 and not evictor.eviction().decode:
                continue
            assert report.bytes <= plan.allowed[0] + open_pages(cache.recipe, cache.spec, page_size)
            least = min(cache.recipe.eviction(cache.spec.layers[0], cache.spec.dtype).least, report.tokens[0])
            # Below the least a budget is exceeded, by no more than that takes, even where blocks hold more for it.
            one, other = layer.bytes(torch.tensor([least, plan.entries[0]])).tolist()
            if plan.entries[0] > least and other > one:
                assert report.bytes <= plan.allowed[0]
            if turn % 2 == 0:
                assert report.bytes <= plan.bytes[0]


def test_every_tiny_model_has_a_plan() -> None:
    for name, config in TINY.items():
        spec = ModelSpec.from_config(config(), torch.float32)
        if any(layer.window is None for layer in spec.layers):
            assert Recipe.parse("window").resolve(spec, 0.5, [500]).bytes[0] <= spec.dense_bytes(500) // 2, name
