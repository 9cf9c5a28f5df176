"""DuoAttention against its rule in plain loops, and its gates against what they have to find (arXiv 2410.10819)."""

from pydoc_data.topics import topics

import pytest
import torch
from one_layer import KV_HEADS, OneLayer, random_tokens, split

import kvarn
from kvarn.attention.probe import attending
from kvarn.budgets import UNBOUNDED
from kvarn.budgets.gates import GateTraining
from kvarn.errors import CalibrationError, RecipeError
from kvarn.methods.duoattention import DuoAttention
from tiny_models import make_tiny

GATES = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
# Gates of SmolLM2-135M-Instruct as its calibration found them, in hundredths, a row for each layer.
SMOLLM2 = [
    [0, 0, 0],
    [0, 0, 0],
    [0, 0, 0],
    [0, 0, 0],
    [0, 0, 0],
    [0, 0, 0],
    [0, 0, 0],
    [0, 0, 99],
    [100, 0, 32],
    [0, 0, 0],
    [0, 0, 0],
    [0, 0, 0],
    [2, 0, 0],
    [0, 0, 0],
    [88, 89, 0],
    [2, 14, 1],
    [0, 0, 13],
    [43, 97, 0],
    [0, 0, 100],
    [44, 4, 0],
    [100, 93, 90],
    [76, 76, 100],
    [0, 18, 86],
    [96, 89, 100],
    [99, 87, 94],
    [5, 0, 0],
    [43, 93, 0],
    [97, 94, 11],
    [86, 1, 66],
    [100, 32, 51],
]
PROMPT = torch.randint(1, 160, (1, 120), generator=torch.Generator().manual_seed(1))


def duo(**parameters) -> DuoAttention:
    return DuoAttention(**{"sinks": 4, "recent": 12} | parameters).with_learnt({"gates": GATES})


def run(recipe, budget=None, steps: int = 20) -> tuple[kvarn.Cache, torch.Tensor]:
    model = make_tiny("llama")
    cache = kvarn.Cache(model, recipe, budget)
    with torch.no_grad():
        logits = [model(PROMPT, past_key_values=cache).logits[:, -1:]]
        logits += [model(PROMPT[:, i : i + 1], past_key_values=cache).logits for i in range(steps)]
    return cache, torch.cat(logits, 1)


def naive_streaming(sinks: int, recent: int, prompt: int, steps: int) -> list[list[int]]:
    """Positions in a streaming head's cache after the prompt and after each step."""
    states, cache = [], list(range(prompt))
    for step in range(steps + 1):
        if step:
            cache.append(prompt + step - 1)
        if len(cache) > sinks + recent:
            cache = cache[:sinks] + cache[-recent:]
        states.append(list(cache))
    return states


def test_a_streaming_head_beside_a_retrieval_head() -> None:
    tokens = random_tokens(40)
    layer, full = OneLayer("window(sinks=3)", capacity=10), OneLayer("full")
    layer.group.capacity = torch.tensor([[[10, UNBOUNDED]]])
    expected = naive_streaming(3, 7, 30, 10)
    outputs = [layer.prompt(*split(tokens, 0, 30))]
    theirs = [full.prompt(*split(tokens, 0, 30))]
    assert torch.equal(outputs[0], theirs[0])
    for step in range(10):
        assert layer.positions() == [expected[step], list(range(30 + step))]
        query, keys, values = split(tokens, 30 + step, 31 + step)
        read = [*expected[step], 30 + step]  # the cache before the step and the new token: one more than it holds
        out = layer.token(query, keys, values)
        weights = (query[0, :2, 0] @ tokens[1][0, 0, read].T / 4).softmax(-1)
        torch.testing.assert_close(out[0, :2, 0], weights @ tokens[2][0, 0, read])
        torch.testing.assert_close(out[:, 2:], full.token(query, keys, values)[:, 2:])
    assert KV_HEADS == 2


def test_the_highest_gates_of_all_layers_together_keep_everything() -> None:
    held = torch.tensor(run(duo(sparsity=0.625))[0].report().entries)[:, 0]
    assert held.tolist() == [[140, 16], [16, 140], [16, 140], [16, 16]]


def test_no_sparsity_is_full_and_all_sparsity_a_window() -> None:
    assert torch.equal(run(duo(sparsity=0.0))[1], run("full")[1])
    assert torch.equal(run(duo(sparsity=1.0))[1], run("window(sinks=4, capacity=16)")[1])


def test_a_budget_decides_how_many_heads_keep_everything() -> None:
    counts = []
    for budget in (0.2, 0.35, 0.5, 0.8, 1.2):
        cache, _ = run(duo(), budget, steps=0)
        assert cache.report().bytes <= cache.plan.allowed[0]
        counts.append(int((cache.plan.capacity == UNBOUNDED).sum()))
        kept = GATES[cache.plan.capacity[:, 0] == UNBOUNDED]
        assert kept.tolist() == GATES.flatten().sort(descending=True).values[: len(kept)].sort().values.tolist() or (
            sorted(kept.tolist()) == sorted(GATES.flatten().tolist(), reverse=True)[: len(kept)][::-1]
        )
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 8)
    narrow, _ = run(duo(), 0.1, steps=0)
    assert 5 <= narrow.plan.entries[0] < 16  # not even streaming heads are paid for: fewer recent tokens


def test_gates_find_the_head_that_matters() -> None:
    """Layer 1's second KV head is made to read far; every other head has no influence."""
    model = make_tiny("llama", num_hidden_layers=2)
    for layer in (0, 1):
        model.model.layers[layer].self_attn.o_proj.weight[:, : 64 if layer == 0 else 32] = 0
    training = GateTraining(steps=12, sinks=2, recent=4, rate=0.2, weight=0.01)
    ids = PROMPT[0, :60].tolist()
    gates = training.trained(model, [(ids, 20)] * 12, lambda done, total: None)
    assert gates.shape == (2, 2)
    assert float(gates[1, 1]) > 0.3 + float(gates.flatten()[:3].max())


def test_open_gates_change_nothing_and_closed_ones_are_a_window() -> None:
    model, training = make_tiny("llama"), GateTraining(sinks=2, recent=4)
    spec, ids = kvarn.Cache(model).spec, PROMPT[:, :40]
    attention = model.config._attn_implementation
    assert float(training._distance(model, spec, torch.ones(4, 2), ids, 40)) == 0
    assert float(training._distance(model, spec, torch.zeros(4, 2), ids, 6)) > 0.01
    assert float(training._distance(model, spec, torch.zeros(4, 2), ids[:, :4], 4)) == 0  # all within the window
    assert model.config._attn_implementation == attention


def test_attention_comes_back_after_an_error() -> None:
    model = make_tiny("llama")
    attention = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attending(model, lambda *_: 1 / 0):
        model(PROMPT)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("parameters", [{"sinks": -1}, {"recent": 0}, {"sparsity": 1.5}])
def test_bad_parameters(parameters) -> None:
    with pytest.raises(RecipeError, match="duoattention"):
        DuoAttention(**parameters)


def test_gates_come_first() -> None:
    with pytest.raises(CalibrationError, match="kvarn calibrate"):
        kvarn.Cache(make_tiny("llama", seed=5), "duoattention")


def test_it_tells_a_passkey_that_the_window_and_the_opposite_heads_lose(smollm2) -> None:
    model, tokenizer = smollm2
    text = tokenizer(topics["objects"] + topics["import"]).input_ids
    needle = tokenizer("\nRemember this: the passkey is marble orbit willow lantern copper velvet.\n").input_ids
    ids = torch.tensor([text[:75] + needle + text[75:300]])
    question = tokenizer("\nThe passkey is marble orbit willow lantern").input_ids
    gates = torch.tensor(SMOLLM2) / 100
    recipes = {
        "full": ("full", None),
        "duo": (DuoAttention(sinks=16, recent=64).with_learnt({"gates": gates}), 0.4),
        "opposite": (DuoAttention(sinks=16, recent=64).with_learnt({"gates": 1 - gates}), 0.4),
        "window": ("window", 0.4),
    }
    losses = {}
    for name, (recipe, budget) in recipes.items():
        cache = kvarn.Cache(model, recipe, budget)
        with torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
            assert budget is None or cache.report().ratio <= budget
            # The question token by token: as a prompt it would be judged together with what is stored.
            steps = [model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in question[:-1]]
        predicted = torch.cat(steps).log_softmax(-1)[-6:]
        losses[name] = -float(predicted.gather(1, torch.tensor(question[-6:])[:, None]).mean())
    assert losses["duo"] < losses["full"] + 1
    assert losses["duo"] + 3 < min(losses["opposite"], losses["window"])
