"""transformers' caches as subjects: what they predict and hold, forks, and refusals."""

from types import SimpleNamespace

import pytest
import torch
from transformers import QuantizedCache

from kvarn.bench.peers import KvpressSubject, TransformersSubject, subjects
from kvarn.bench.peers.kvpress_worker import held_bytes
from kvarn.bench.subjects import KvarnSubject
from kvarn.errors import BudgetError, RecipeError, Unsupported
from tiny_models import WINDOW, make_tiny

PROMPT = torch.randint(1, 160, (2, 64), generator=torch.Generator().manual_seed(1))
STEPS = torch.randint(1, 160, (2, 12), generator=torch.Generator().manual_seed(2))
LAYERS, HEADS, SIZE = 4, 2, 16  # KV heads and their size, of every tiny model
CPU = torch.device("cpu")
QUANTIZED = "quantized(nbits=4, q_group_size=16, residual_length=8)"


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU quanto unpacks codes by an extension that it first compiles, which takes a minute."""

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

    monkeypatch.setattr("optimum.quanto.library.extensions.cpp.ext._lib", SimpleNamespace(unpack=unpack))


def logits_of(session, *passes) -> torch.Tensor:
    return torch.stack([session.read(tokens) for tokens in passes])


def steps(count: int = 3) -> list[torch.Tensor]:
    return list(STEPS[:, :count].split(1, dim=1))


@pytest.mark.parametrize("tiny_model", ["llama", "mistral", "gemma2", "gpt_oss"], indirect=True)
def test_dynamic_predicts_what_the_full_recipe_predicts(tiny_model):
    ours = logits_of(KvarnSubject(tiny_model, "full").open(), PROMPT, *steps())
    theirs = logits_of(TransformersSubject(tiny_model, "dynamic").open(), PROMPT, *steps())
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def test_it_runs_on_transformers_own_attention_with_the_same_weights():
    model = make_tiny("llama")
    kvarn_session = KvarnSubject(model, "full").open()
    session = TransformersSubject(model, "dynamic").open()
    assert session.model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "kvarn"
    weights = zip(model.parameters(), session.model.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in weights)
    kvarn_session.read(PROMPT)


def test_dynamic_holds_every_entry():
    session = TransformersSubject(make_tiny("llama"), "dynamic").open()
    session.read(PROMPT)
    held = session.held()
    assert held.bytes == held.dense_bytes == 2 * 64 * LAYERS * HEADS * 2 * SIZE * 4
    assert held.entries == [[64] * HEADS] * LAYERS
    assert held.peak_bytes is None
    assert session.seconds > 0


def test_a_sliding_window_holds_the_storage_that_its_view_keeps_alive():
    session = TransformersSubject(make_tiny("mistral"), "dynamic").open()
    logits_of(session, PROMPT, *steps())
    held = session.held()
    token = 2 * LAYERS * HEADS * 2 * SIZE * 4
    assert held.entries == [[WINDOW - 1] * HEADS] * LAYERS
    assert held.dense_bytes == (WINDOW - 1) * token
    # The entry that has just left is still there, and each layer has its window's size in a tensor.
    assert held.bytes == WINDOW * token + LAYERS * 8


def test_quantized_holds_codes_scales_and_the_residual():
    session = TransformersSubject(make_tiny("llama"), QUANTIZED).open()
    session.read(PROMPT)
    numbers = 2 * 64 * HEADS * SIZE  # of a layer's keys
    codes, groups = numbers // 2, 2 * 4 * numbers // 16  # a scale and a shift in fp32
    assert session.held().bytes == 2 * LAYERS * (codes + groups)
    session.read(STEPS[:, :1])
    assert session.held().bytes == 2 * LAYERS * (codes + groups + 2 * HEADS * SIZE * 4)
    assert session.held().entries == [[65] * HEADS] * LAYERS


def test_quantized_predicts_what_the_cache_predicts_by_itself():
    model = make_tiny("llama")
    ours = logits_of(TransformersSubject(model, QUANTIZED).open(), PROMPT, *steps(12))
    cache = QuantizedCache("quanto", model.config, nbits=4, q_group_size=16, residual_length=8)
    with torch.no_grad():
        passes = [model(tokens, past_key_values=cache, logits_to_keep=1) for tokens in (PROMPT, *steps(12))]
    assert torch.equal(ours, torch.stack([one.logits[:, -1] for one in passes]))
    dense = logits_of(TransformersSubject(model, "dynamic").open(), PROMPT, *steps(12))
    assert torch.equal(ours[0], dense[0])
    assert not torch.equal(ours[1:], dense[1:])


@pytest.mark.parametrize(("architecture", "name"), [("llama", "dynamic"), ("llama", QUANTIZED), ("mistral", "dynamic")])
def test_forks_do_not_see_each_other(architecture, name):
    model = make_tiny(architecture)
    session = TransformersSubject(model, name).open()
    session.read(PROMPT)
    fork = session.fork()
    other = logits_of(fork, *reversed(steps()))
    continued = logits_of(session, *steps())
    alone = TransformersSubject(model, name).open()
    alone.read(PROMPT)
    assert torch.equal(continued, logits_of(alone, *steps()))
    assert not torch.equal(other, continued)
    assert fork.held().entries == session.held().entries


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("static", "no cache 'static' here; there are dynamic, quantized, offloaded"),
        ("quantized(bits=4)", "no parameter 'bits'; it takes backend, nbits"),
        ("quantized(nbits='four')", "write it as in nbits=4"),
        ("dynamic(1)", "cannot read"),
        ("dynamic + quantized", "cannot read"),
        ("dynamic(", "cannot read"),
    ],
)
def test_names_that_are_no_cache(name, message):
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        TransformersSubject(make_tiny("llama"), name)


@pytest.mark.parametrize(
    ("architecture", "name", "message"),
    [
        ("llama", "quantized(nbits=3)", "nbits"),
        ("llama", "quantized(backend='none')", "backend"),
        ("mistral", "quantized", "full attention"),
        ("llama", "offloaded", "GPU"),
    ],
)
def test_what_transformers_cannot_do(architecture, name, message):
    with pytest.raises(Unsupported, match=message):
        TransformersSubject(make_tiny(architecture), name).open()


def test_groups_that_do_not_divide_the_tokens():
    session = TransformersSubject(make_tiny("llama"), "quantized(q_group_size=64)").open()
    with pytest.raises(Unsupported, match=r"quantized\(q_group_size=64\)"):
        session.read(PROMPT[:1, :63])


@pytest.mark.gpu
def test_offloaded_holds_less_than_dense_on_the_device():
    model = make_tiny("llama").cuda()
    ours = logits_of(TransformersSubject(model, "dynamic").open(), PROMPT, *steps())
    session = TransformersSubject(model, "offloaded").open()
    torch.testing.assert_close(logits_of(session, PROMPT, *steps()), ours)
    assert 0 < session.held().bytes < session.held().dense_bytes


def test_held_bytes_counts_each_storage_once_and_whole():
    class Holder:
        pass

    holder, base = Holder(), torch.zeros(100, dtype=torch.float32)
    holder.view, holder.nested = base[:10], {"a": [base[50:], (torch.zeros(3, dtype=torch.int64),)]}
    holder.itself, holder.kind = holder, Holder
    holder.elsewhere = torch.zeros(7, device="meta")
    assert held_bytes([holder, base], CPU) == 400 + 24
    assert held_bytes(holder.elsewhere, torch.device("meta")) == 28
    assert held_bytes([1, "text", None], CPU) == 0


def test_the_bench_command_line():
    model = make_tiny("llama")
    found = subjects("dynamic; quantized(nbits=2);kvpress: SnapKVPress(window_size=32); ", [0.5, 0.25], model)
    assert [subject.label for subject in found] == [
        "transformers: dynamic",
        "transformers: quantized(nbits=2)",
        "kvpress: SnapKVPress(window_size=32) @ 0.5",
        "kvpress: SnapKVPress(window_size=32) @ 0.25",
    ]
    assert found[2].worker is found[3].worker
    (alone,) = subjects("kvpress:KnormPress(compression_ratio=0.5)", [], model)
    assert isinstance(alone, KvpressSubject)
    assert alone.budget is None
    for nothing in ("", " ; "):
        with pytest.raises(RecipeError, match="name some"):
            subjects(nothing, [0.5], model)
    for budget in (64, "1MiB", 1.5, 0.0):
        with pytest.raises(BudgetError, match="shares above 0"):
            subjects("kvpress:KnormPress", [budget], model)
