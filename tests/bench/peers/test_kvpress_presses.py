"""kvpress itself in its own environment: its numbers, its entries against kvarn's, and its refusals."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvarn.bench.peers import KvpressSubject, KvpressWorker
from kvarn.bench.peers.entries import accumulated_mass, agreement, best, kvarn_entries, kvpress_entries
from kvarn.bench.subjects import KvarnSubject
from kvarn.errors import KvarnError
from tiny_models import make_tiny

PYTHON = Path(os.environ.get("KVARN_PEERS_PYTHON") or Path(__file__).parents[3] / ".peers/bin/python")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no environment for kvpress: run make peers"),
]

PROMPT = torch.randint(1, 160, (1, 160), generator=torch.Generator().manual_seed(1))
LATER = torch.randint(1, 160, (1, 12), generator=torch.Generator().manual_seed(2))
ENTRY = 4 * 2 * 2 * 16 * 4  # bytes of a token in all layers
KEPT = 40


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_tiny("llama").save_pretrained(folder)
    worker = KvpressWorker(AutoModelForCausalLM.from_pretrained(folder), PYTHON)
    yield worker
    worker.close()


def after_prompt(worker, press: str, budget: float | None = KEPT / 160):
    session = KvpressSubject(worker, press, budget).open()
    session.read(PROMPT)
    return session


def continuation(session) -> torch.Tensor:
    """Logits of a second prompt of several tokens and of decoding steps."""
    return torch.stack([session.read(LATER[:, :5]), *(session.read(LATER[:, i : i + 1]) for i in range(5, 12))])


@pytest.mark.parametrize("press", ["KnormPress()", "ObservedAttentionPress"])
def test_without_compression_it_predicts_what_kvarn_predicts(worker, press):
    prompts = torch.cat([PROMPT, PROMPT.flip(1)])
    passes = [prompts, LATER[:, :5].expand(2, -1), LATER[:, 5:6].expand(2, -1)]
    ours, theirs = KvarnSubject(worker.model, "full").open(), KvpressSubject(worker, press, 1.0).open()
    for tokens in passes:
        torch.testing.assert_close(theirs.read(tokens), ours.read(tokens), rtol=1e-4, atol=1e-4)
    assert theirs.seconds > 0
    held = theirs.held()
    assert held.bytes == held.dense_bytes == 2 * 166 * ENTRY


def test_after_compression_it_predicts_what_kvarn_predicts_from_the_same_entries(worker):
    """Positions go on from the prompt's length, not from the cache's. (kvarn prunes second prompts too, kvpress does
    not, so what comes after one is not compared.)"""
    ours = KvarnSubject(worker.model, "snapkv(window=8, kernel=5, pooling='avg')", KEPT).open()
    ours.read(PROMPT)
    theirs = after_prompt(worker, "SnapKVPress(window_size=8, kernel_size=5)")
    assert theirs.held().bytes == KEPT * ENTRY
    assert theirs.held().dense_bytes == 160 * ENTRY
    assert theirs.held().entries == [[KEPT] * 2] * 4
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(theirs.fork().read(LATER), ours.fork().read(LATER), **close)
    for token in LATER.split(1, dim=1):
        torch.testing.assert_close(theirs.read(token), ours.read(token), **close)
    assert theirs.held().bytes == (KEPT + 12) * ENTRY


@pytest.mark.parametrize(
    ("press", "recipe"),
    [
        ("SnapKVPress(window_size=8, kernel_size=5)", "snapkv(window=8, kernel=5, pooling='avg')"),
        ("StreamingLLMPress(n_sink=3)", "window(sinks=3)"),
    ],
)
def test_the_same_entries(worker, press, recipe):
    ours = KvarnSubject(worker.model, recipe, KEPT).open()
    ours.read(PROMPT)
    theirs = kvpress_entries(after_prompt(worker, press), after_prompt(worker, press, 1.0))
    assert agreement(kvarn_entries(ours), theirs) == 1


def test_observed_attention_differs_from_h2o_by_its_average_only(worker):
    press = "ObservedAttentionPress()"
    theirs = kvpress_entries(after_prompt(worker, press), after_prompt(worker, press, 1.0))
    ours, whole = (KvarnSubject(worker.model, "h2o(recent=0.0)", kept).open() for kept in (KEPT, 160))
    ours.read(PROMPT)
    whole.read(PROMPT)
    mass = accumulated_mass(whole)
    assert agreement(kvarn_entries(ours), best(mass, KEPT)) == 1
    assert agreement(kvarn_entries(ours), theirs) < 0.9
    assert agreement(best([layer / torch.arange(160, 0, -1) for layer in mass], KEPT), theirs) == 1


# AdaKV masks entries by a state of the model's modules, which sessions must not share.
@pytest.mark.parametrize("press", ["SnapKVPress(window_size=8)", "AdaKVPress(SnapKVPress(window_size=8))"])
def test_sessions_do_not_see_each_other(worker, press):
    session = after_prompt(worker, press)
    fork = session.fork()
    after_prompt(worker, "KnormPress()").close()
    continued = continuation(session)
    assert torch.equal(continuation(fork), continued)
    assert torch.equal(continuation(after_prompt(worker, press)), continued)
    assert not torch.equal(continuation(after_prompt(worker, press, 1.0)), continued)


def test_a_press_that_masks_holds_everything(worker):
    held = after_prompt(worker, "AdaKVPress(press=KnormPress())").held()
    assert held.bytes > held.dense_bytes
    assert held.entries == [[160] * 2] * 4


def test_rerotated_keys_continue_from_the_length_of_the_cache(worker):
    """With the newest entries only, and positions from 0 on, the model reads them as if nothing had been before. Its
    deeper layers have seen more, so this holds for the first one alone: its keys."""
    press = "KeyRerotationPress(press=StreamingLLMPress(n_sink=0))"
    session, alone = after_prompt(worker, press), KvpressSubject(worker, press, 1.0).open()
    alone.read(PROMPT[:, -KEPT:])
    for one in (session, alone):
        one.read(LATER[:, :1])
    torch.testing.assert_close(session.keys(0), alone.keys(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("press", "budget", "message"),
    [
        ("NoPress()", 0.5, "no press 'NoPress'; it has AdaKVPress"),
        ("SnapKVPress(window=8)", 0.5, "no parameter 'window'; it takes compression_ratio, window_size, kernel_size"),
        ("SnapKVPress(", 0.5, "SyntaxError"),
        ("__import__('os')", 0.5, "no press '__import__'"),
        ("'SnapKVPress'", 0.5, "not a press"),
        ("ThinKPress()", 0.5, "no compression ratio"),
        ("ComposedPress([KnormPress()])", 0.5, "no compression ratio"),
        ("DecodingPress(KnormPress())", None, "acts between decoding steps"),
    ],
)
def test_refusals(worker, press, budget, message):
    with pytest.raises(KvarnError, match=message):
        KvpressSubject(worker, press, budget).open()


def test_an_assertion_of_a_press_comes_back(worker):
    session = KvpressSubject(worker, "SnapKVPress(window_size=500)", 0.5).open()
    with pytest.raises(KvarnError, match="greater than the window size 500"):
        session.read(PROMPT)


def test_presses_inside_presses_take_their_own_ratios(worker):
    press = "ComposedPress([KnormPress(compression_ratio=0.5), StreamingLLMPress(compression_ratio=0.5)])"
    assert after_prompt(worker, press, None).held().bytes == KEPT * ENTRY
