"""PrefixKV against the paper's algorithm in plain loops (arXiv 2412.03409)."""

from pydoc_data.topics import topics

import pytest
import torch
from one_layer import GROUP, KV_HEADS, OneLayer, probabilities, random_tokens, split

import kvarn
from drive import logits_of
from kvarn.budgets import Heads
from kvarn.budgets.prefixes import Prefixes, PrefixSearch
from kvarn.errors import CalibrationError, RecipeError
from kvarn.methods.prefixkv import PrefixKV
from tiny_models import make_tiny

PROMPT = torch.randint(1, 160, (1, 200), generator=torch.Generator().manual_seed(1))
# Of 4 layers the second keeps most.
TABLE = torch.tensor([[0.0] * 4, [0.1, 0.7, 0.1, 0.1], [0.4, 0.9, 0.4, 0.3], [1.0] * 4], dtype=torch.float64)


def test_the_same_entries_as_the_paper() -> None:
    capacity, prompt, sinks, distance = 14, 30, 2, 6
    tokens = random_tokens(44)
    layer = OneLayer(f"prefixkv(sinks={sinks}, distance={distance})", capacity)
    layer.prompt(*split(tokens, 0, prompt))
    importance = [0.0] * prompt
    for head in range(KV_HEADS * GROUP):
        for position in range(prompt):
            row = probabilities(tokens[0][0, head, position], tokens[1][0, head // GROUP, : position + 1])
            importance = [x + y for x, y in zip(importance, row + [0.0] * prompt, strict=False)]
    best = sorted(range(sinks, prompt - 1), key=lambda i: -importance[i])[: capacity - sinks - 1]
    kept = [*range(sinks), *sorted(best), prompt - 1]
    assert layer.positions() == [kept] * KV_HEADS
    for position in range(prompt, 44):
        layer.token(*split(tokens, position, position + 1))
        kept.append(position)
        del kept[capacity - distance]
        assert layer.positions() == [kept] * KV_HEADS
    assert kept[: capacity - distance] == [*range(sinks), *sorted(best)][: capacity - distance]


def test_a_head_of_few_entries_keeps_its_older_half() -> None:
    tokens = random_tokens(30)
    layer = OneLayer("prefixkv", 10)
    layer.prompt(*split(tokens, 0, 20))
    first = layer.positions()[0][:5]
    for position in range(20, 30):
        layer.token(*split(tokens, position, position + 1))
    assert layer.positions() == [first + list(range(25, 30))] * KV_HEADS


def scanned(importance, share: float) -> list[int]:
    """The longest prefixes of one threshold within a share of all tokens: thresholds tried one by one."""
    layers, tokens = len(importance), len(importance[0])
    curves = []
    for row in importance:
        ranked, total, curve = sorted(row, reverse=True), 0.0, []
        for x in ranked:
            total += x / sum(row)
            curve.append(total)
        curves.append(curve)
    best = [1] * layers
    for threshold in sorted(p for curve in curves for p in curve):
        prefixes = [min(o for o in range(1, tokens + 1) if o == tokens or c[o - 1] >= threshold) for c in curves]
        if sum(prefixes) <= share * layers * tokens:
            best = prefixes
    return best


def test_bisection_finds_what_trying_every_threshold_finds() -> None:
    importance = torch.rand(5, 24, generator=torch.Generator().manual_seed(0)).double() ** 4
    found = PrefixSearch(steps=12).divided(importance) * 24
    assert found[0].tolist() == [0] * 5
    for step in range(1, 12):
        assert found[step].tolist() == pytest.approx(scanned(importance.tolist(), step / 12))
        assert 0 <= step / 12 * 5 * 24 - float(found[step].sum()) < 5
    assert found[12].tolist() == [24] * 5
    assert bool((found.diff(dim=0) >= -1e-9).all())


def test_concentrated_layers_keep_less_and_equal_ones_the_same() -> None:
    peaked, even = torch.full((100,), 1e-3), torch.ones(100)
    peaked[7] = 1
    kept = PrefixSearch(steps=10).divided(torch.stack([peaked, even]))
    assert bool((kept[1:-1, 0] < kept[1:-1, 1]).all())
    same = PrefixSearch(steps=10).divided(peaked.expand(3, -1))
    assert bool((same == same[:, :1]).all())
    assert float(same[5, 0]) == 0.5


def heads(*lengths: int) -> Heads:
    return Heads(torch.ones(4, dtype=torch.bool), 2, torch.tensor(lengths))


def test_the_table_is_interpolated_and_beyond_the_prompt_all_have_the_same_room() -> None:
    policy, given = Prefixes(TABLE, 0.5), heads(300, 30)
    levels = torch.tensor([4 * 100, 4 * 15])  # a third, and half
    entries = policy.entries(levels, given)
    assert entries.shape == (4, 2, 2)
    assert entries[:, 0, 0].tolist() == [30, 210, 30, 30]
    assert entries[:, 1, 1].tolist() == [8, 24, 8, 6]  # halfway between two rows
    assert policy.entries(torch.tensor([4 * 350, 0]), given)[:, 0, 0].tolist() == [350] * 4
    assert policy.unasked(given).tolist() == [600, 60]
    every = torch.stack([policy.entries(torch.full((2,), level), given) for level in range(0, 1600, 7)])
    assert bool((every.diff(dim=0) >= 0).all())


def test_a_budget_is_divided_by_the_table_and_met() -> None:
    model, method = make_tiny("llama"), PrefixKV().with_learnt({"kept": TABLE})
    cache = kvarn.Cache(model, method, 0.4)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
    report = cache.report()
    assert report.bytes == cache.plan.bytes[0]
    assert 0.9 * cache.plan.allowed[0] < report.bytes <= cache.plan.allowed[0]
    held = [layer[0][0] for layer in report.entries]
    assert held[1] > 2 * max(held[0], held[2], held[3])
    unasked = kvarn.Cache(model, method)
    with torch.no_grad():
        model(PROMPT, past_key_values=unasked)
    assert [layer[0][0] for layer in unasked.report().entries] == [50, 160, 50, 40]


def test_where_all_is_kept_it_is_full() -> None:
    model, method = make_tiny("llama"), PrefixKV(kept=1.0).with_learnt({"kept": TABLE})
    expected = logits_of(model, PROMPT, PROMPT[0, :1], kvarn.Cache(model))
    torch.testing.assert_close(logits_of(model, PROMPT, PROMPT[0, :1], kvarn.Cache(model, method)), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_importance_is_the_attention_that_tokens_receive(name) -> None:
    model = make_tiny(name)
    ids = PROMPT[:, :40]
    found = PrefixSearch().importance(model, ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * 4
    for kind, mine, weights in zip(types, found, attentions, strict=True):
        expected = weights[0].sum(1).mean(0) if kind == "full_attention" else torch.ones(40)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_a_text_that_is_too_short() -> None:
    def tokenizer(text, **_):
        return type("Read", (), {"input_ids": list(range(len(text)))})

    with pytest.raises(CalibrationError, match="the text has 3 tokens, and 512 are needed"):
        PrefixSearch().run(make_tiny("llama"), tokenizer, "abc", lambda done, total: None)


@pytest.mark.parametrize("parameters", [{"kept": 0.0}, {"kept": 1.5}, {"sinks": -1}, {"recent": -1}, {"distance": -1}])
def test_bad_parameters(parameters) -> None:
    with pytest.raises(RecipeError, match="prefixkv"):
        PrefixKV(**parameters)


def test_on_a_real_text_no_layer_loses_as_much_attention_as_with_equal_lengths(smollm2) -> None:
    model, tokenizer = smollm2
    search = PrefixSearch(samples=2, tokens=256, steps=20)
    kept = search.run(model, tokenizer, topics["execmodel"], lambda done, total: None)["kept"]
    ids = tokenizer(topics["objects"], return_tensors="pt").input_ids[:, :300]
    curves = search.importance(model, ids).sort(dim=1, descending=True).values.cumsum(1)
    level = torch.tensor([75 * 30])  # a quarter of the entries
    given = Heads(torch.ones(30, dtype=torch.bool), 3, torch.tensor([300]))
    lengths = Prefixes(kept, 0.5).entries(level, given)[:, 0, 0]
    assert abs(int(lengths.sum()) - 75 * 30) <= 15
    assert int(lengths.max()) > 4 * int(lengths.min())

    def least(lengths) -> float:
        return float((curves.gather(1, lengths[:, None] - 1)[:, 0] / curves[:, -1]).min())

    assert least(lengths) > least(torch.full((30,), 75)) + 0.05
