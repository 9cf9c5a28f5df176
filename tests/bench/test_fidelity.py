import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvarn.bench.fidelity import Fidelity, Perplexity, compared
from kvarn.bench.subjects import KvarnSubject

Chat = tuple[PreTrainedModel, PreTrainedTokenizerBase]
PROMPT = list(range(3, 103))


def _fidelity(model: PreTrainedModel, ends: frozenset[int] = frozenset(), positions: int = 12) -> Fidelity:
    return Fidelity(KvarnSubject(model, "full"), "text", 0, 128, PROMPT, positions, ends)


def _record(case: Fidelity | Perplexity, subject: KvarnSubject) -> dict:
    return case.prepared()(subject)


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=8), st.data())
def test_compared_restates_its_definitions(numbers: list[float], data: st.DataObject) -> None:
    others = data.draw(st.lists(st.floats(-9, 9), min_size=len(numbers), max_size=len(numbers)))
    full, own = torch.tensor(numbers).double().log_softmax(-1), torch.tensor(others).double().log_softmax(-1)
    target = max(range(len(numbers)), key=lambda i: full[i])
    found = compared(full, own, target)
    kl = sum(math.exp(full[i]) * (full[i] - own[i]) for i in range(len(numbers)))
    assert found["kl"] == pytest.approx(float(kl), abs=1e-9)
    assert found["rank"] == 1 + sum(bool(own[i] > own[target]) for i in range(len(numbers)))
    assert found["nll_change"] == pytest.approx(float(full[target] - own[target]))
    assert found["top1"] == (int(own.argmax()) == int(full.argmax()))


def test_full_against_itself_differs_in_nothing(tiny_chat: Chat) -> None:
    record = _record(_fidelity(tiny_chat[0]), KvarnSubject(tiny_chat[0], "full"))
    assert record["kl"] == [0.0] * 12
    assert record["nll_change"] == [0.0] * 12
    assert record["top1"] == [1] * 12
    assert record["rank"] == [1] * 12
    assert record["held"]["bytes"] >= record["held"]["dense_bytes"]


def test_a_window_is_measured_as_masking_all_else_is(tiny_chat: Chat) -> None:
    """Restated with transformers' own cache, whose entries outside of the window are taken out by hand."""
    model, _ = tiny_chat
    window, sinks = 24, 4
    subject = KvarnSubject(model, f"window(sinks={sinks})", window)
    case = _fidelity(model, positions=1)
    record = _record(case, subject)
    with torch.no_grad():
        full, cut = DynamicCache(config=model.config), DynamicCache(config=model.config)
        first = int(model(torch.tensor([PROMPT]), past_key_values=full).logits[0, -1].argmax())
        model(torch.tensor([PROMPT]), past_key_values=cut)
        for layer in cut.layers:
            kept = [*range(sinks), *range(len(PROMPT) - window + sinks, len(PROMPT))]
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        place = {"position_ids": torch.tensor([[len(PROMPT)]])}
        dense = model(torch.tensor([[first]]), past_key_values=full, **place).logits[0, -1].log_softmax(-1)
        # Whether the window drops its oldest entry before or after this step is the method's choice: before.
        windowed = model(torch.tensor([[first]]), past_key_values=cut, **place).logits[0, -1].log_softmax(-1)
    assert record["kl"] == pytest.approx([float((dense.exp() * (dense - windowed)).sum())], rel=1e-3)
    assert record["kl"][0] > 1e-4
    assert record["held"]["entries"] == [[window] * 2] * 2


def test_less_budget_is_less_faithful(tiny_chat: Chat) -> None:
    case = _fidelity(tiny_chat[0])
    means = [sum(_record(case, KvarnSubject(tiny_chat[0], "window", b))["kl"]) for b in (90, 50, 10)]
    assert means == sorted(means)
    assert means[0] < means[-1]


def test_a_continuation_ends_where_the_model_ends_it(tiny_chat: Chat) -> None:
    model = tiny_chat[0]
    free = _fidelity(model).prepared().args[0].tokens
    end = free[3]
    cut = _fidelity(model, frozenset({end})).prepared().args[0].tokens
    assert cut == free[: free.index(end, 1) + 1]
    at_once = _fidelity(model, frozenset({free[0], free[1]})).prepared().args[0].tokens
    assert at_once == free[:2]


def test_perplexity_of_full_is_the_models_own(tiny_chat: Chat) -> None:
    model = tiny_chat[0]
    following = [7, 99, 30, 12, 5]
    record = _record(Perplexity(0, 128, PROMPT, following), KvarnSubject(model, "full"))
    with torch.no_grad():
        ids = torch.tensor([PROMPT + following])
        log_probs = model(ids, past_key_values=DynamicCache(config=model.config)).logits[0].log_softmax(-1)
    places = range(len(PROMPT), len(PROMPT) + 4)
    assert record["nll"] == pytest.approx([-float(log_probs[i, ids[0, i + 1]]) for i in places], abs=1e-4)
