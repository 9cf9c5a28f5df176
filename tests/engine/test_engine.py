"""The engine against ``model.generate``, request by request."""

import pytest
import torch

import kvarn
from kvarn import Engine, Sampling
from kvarn.errors import BudgetError, OutOfMemory, PromptTooLong, Refused, Unsupported
from test_cache import DUO, SENTENCES, two_layers
from tiny_models import make_tiny

GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(1, 160, (n,), generator=GENERATOR).tolist() for n in (20, 50, 33, 7)]
RECIPES = [
    ("full", None),
    ("window", 24),
    ("snapkv(window=8)", 0.5),
    ("h2o", 24),
    ("kivi(bits=4, group=16, residual=16)", None),
    ("snapkv(window=8) + fp8", 32),
    ("snapkv(window=8) + kivi(bits=4, group=16, residual=16)", 32),
    ("mikv(ratio=0.3, low=4)", None),
    ("cake(window=8)", 24),
    ("xquant(bits=8, group=16)", None),
    (DUO, None),
    ("tokenselect(sinks=4, local=8, count=8, chunk=8)", None),
    ("shadowkv(chunk=4, rank=24, count=16, local=1, outliers=1)", None),
    (SENTENCES, None),
]


def generated(model, prompt, recipe, budget, tokens=20, chunk=None, **arguments):
    cache = kvarn.Cache(model, recipe, budget)
    cache.expect(len(prompt))
    arguments = {"do_sample": False} | arguments
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=tokens, prefill_chunk_size=chunk, use_cache=True, **arguments
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("recipe", "budget"), RECIPES)
def test_the_tokens_are_those_of_generate(recipe, budget):
    model = two_layers("llama", recipe)
    answers = Engine(model, recipe, budget).generate(PROMPTS, Sampling(max_tokens=14))
    assert [answer.finished for answer in answers] == ["length"] * 4
    assert [answer.tokens for answer in answers] == [generated(model, p, recipe, budget, 14) for p in PROMPTS]


@pytest.mark.parametrize("architecture", ["gemma3", "gpt_oss"])
def test_other_architectures(architecture):
    model = make_tiny(architecture)
    answers = Engine(model, "snapkv(window=8)", 32).generate(PROMPTS, Sampling(max_tokens=12))
    own = [generated(model, p, "snapkv(window=8)", 32, 12) for p in PROMPTS]
    assert [answer.tokens for answer in answers] == own


@pytest.mark.parametrize(
    ("recipe", "budget"), [("full", None), ("snapkv(window=8)", 0.5), ("h2o", 24), (SENTENCES, None)]
)
def test_chunks_are_those_of_generate(recipe, budget):
    model = two_layers("llama", recipe)
    engine = Engine(model, recipe, budget, prefill_chunk=16, step_tokens=16)
    answers = engine.generate(PROMPTS, Sampling(max_tokens=12))
    assert [a.tokens for a in answers] == [generated(model, p, recipe, budget, 12, chunk=16) for p in PROMPTS]


@pytest.mark.parametrize("preemption", ["host", "recompute"])
@pytest.mark.parametrize(
    ("recipe", "budget"),
    [("full", None), ("snapkv(window=8)", 0.5), ("snapkv(window=8) + kivi(bits=4, group=16, residual=16)", 32)],
)
def test_preemption_loses_nothing(recipe, budget, preemption):
    model = make_tiny("llama", num_hidden_layers=2)
    free = Engine(model, recipe, budget)
    own = free.generate(PROMPTS, Sampling(max_tokens=40))
    memory = 1.4 * max(free._sizes.most(len(prompt), 40) for prompt in PROMPTS)
    engine = Engine(model, recipe, budget, memory=int(memory), preemption=preemption)
    answers = engine.generate(PROMPTS, Sampling(max_tokens=40))
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in own]
    assert engine.arena.bytes == 0
    assert engine.arena.peak_bytes < free.arena.peak_bytes
    if "kivi" not in recipe:  # whose bound is far from what it takes at these lengths, so that fewer are admitted
        assert engine.preempted > 0


def test_seeded_tokens_are_those_of_generate_whatever_the_neighbours():
    model = make_tiny("llama")
    each = [
        Sampling(max_tokens=20),
        Sampling(max_tokens=20, temperature=1.3, top_k=12, seed=12),
        Sampling(max_tokens=20, temperature=1.0, top_p=0.7, seed=13),
        Sampling(max_tokens=20, temperature=1.5, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.3, seed=14),
    ]
    answers = Engine(model).generate(PROMPTS, each)
    for prompt, sampling, answer in zip(PROMPTS, each, answers, strict=True):
        torch.manual_seed(sampling.seed or 0)
        arguments = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
            "repetition_penalty": sampling.repetition_penalty,
        }
        arguments = {"do_sample": True, **arguments} if sampling.temperature else {}
        assert answer.tokens == generated(model, prompt, "full", None, **arguments)


def test_seeded_tokens_survive_preemption():
    model = make_tiny("llama", num_hidden_layers=2)
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=5, presence_penalty=0.5)
    own = Engine(model).generate(PROMPTS, sampling)
    for preemption in ("host", "recompute"):
        engine = Engine(model, memory=int(1.4 * Engine(model)._sizes.most(50, 40)), preemption=preemption)
        assert [a.tokens for a in engine.generate(PROMPTS, sampling)] == [a.tokens for a in own]
        assert engine.preempted


def test_a_compressed_cache_admits_more():
    model = make_tiny("llama")

    def at_once(recipe, budget):
        engine = Engine(model, recipe, budget, memory="400KiB")
        for _ in range(12):
            engine.add(PROMPTS[1] * 2, Sampling(max_tokens=4))
        engine.step()
        return engine.running

    assert at_once("snapkv(window=8)", 24) > 2 * at_once("full", None) > 0


def test_answers_end_with_the_tokens_that_end_them():
    model = make_tiny("llama")
    whole = Engine(model).generate(PROMPTS[:1], Sampling(max_tokens=20))[0].tokens
    end = next(token for token in whole[3:] if token not in whole[:3])
    place = whole.index(end)
    (answer,) = Engine(model).generate(PROMPTS[:1], Sampling(max_tokens=20, stop_tokens=(end,)))
    assert (answer.tokens, answer.finished) == (whole[: place + 1], "end")
    model.generation_config.eos_token_id = [end, 0]
    (answer,) = Engine(model).generate(PROMPTS[:1], Sampling(max_tokens=20))
    assert (answer.tokens, answer.finished) == (whole[: place + 1], "end")
    (answer,) = Engine(model).generate(PROMPTS[:1], Sampling(max_tokens=20, ignore_end=True))
    assert answer.tokens == whole


def test_log_probabilities_are_those_of_the_model():
    model = make_tiny("llama")
    sampling = Sampling(max_tokens=6, logprobs=3, temperature=0.9, seed=1, repetition_penalty=1.5)
    answer, plain = Engine(model).generate(PROMPTS[:2], [sampling, Sampling(max_tokens=6)])
    assert plain.logprobs is None
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0] + answer.tokens])).logits[0, len(PROMPTS[0]) - 1 : -1]
    expected = logits.log_softmax(-1)
    for row, token, found in zip(expected, answer.tokens, answer.logprobs, strict=True):
        assert found.token == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        assert list(found.top) == best.indices.tolist()
        assert list(found.top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_requests_come_while_others_run():
    model = make_tiny("llama")
    engine, answers = Engine(model), {}

    def step() -> None:
        for event in engine.step():
            answers.setdefault(event.request, []).extend(event.tokens)

    first = engine.add(PROMPTS[0], Sampling(max_tokens=12))
    for _ in range(4):
        step()
    second, third = engine.add(PROMPTS[1], Sampling(max_tokens=8)), engine.add(PROMPTS[2], Sampling(max_tokens=30))
    for _ in range(3):
        step()
    assert engine.abort(third)
    assert not engine.abort(third)
    while engine.busy:
        step()
    assert answers[first] == generated(model, PROMPTS[0], "full", None, 12)
    assert answers[second] == generated(model, PROMPTS[1], "full", None, 8)
    assert len(answers[third]) < 30
    assert engine.arena.bytes == 0


def test_streaming_beside_other_requests():
    model = make_tiny("llama")
    engine = Engine(model)
    other = engine.add(PROMPTS[0], Sampling(max_tokens=6))
    streamed = [token for event in engine.stream(PROMPTS[1], Sampling(max_tokens=9)) for token in event.tokens]
    assert streamed == generated(model, PROMPTS[1], "full", None, 9)
    assert [t for e in engine.step() if e.request == other for t in e.tokens] == generated(
        model, PROMPTS[0], "full", None, 6
    )
    next(stream := engine.stream(PROMPTS[1], Sampling(max_tokens=9)))
    stream.close()
    assert not engine.busy, "who stops listening aborts"


def test_refusals_come_with_reasons_and_before_anything_is_computed():
    model = make_tiny("llama")
    engine = Engine(model, memory="100KiB")
    for error, words, prompt, sampling in [
        (OutOfMemory, "can take", list(range(1, 150)), Sampling(max_tokens=200)),
        (PromptTooLong, "positions", [1] * 1000, Sampling(max_tokens=100)),
        (Refused, "at least one token", [], Sampling()),
        (Refused, "below the vocabulary", [160], Sampling()),
        (Refused, "tokenizer", "text", Sampling()),
        (Refused, "tokenizer", [1], Sampling(stop=("x",))),
    ]:
        with pytest.raises(error, match=words):
            engine.add(prompt, sampling)
        with pytest.raises(error, match=words):
            engine.generate([[1, 2], prompt], [Sampling(max_tokens=2), sampling])
        assert not engine.busy
    with pytest.raises(BudgetError):
        Engine(model, "full", 0.5).add(PROMPTS[0])
    with pytest.raises(Unsupported, match="in chunks"):
        Engine(model, "fastkv", 0.5, prefill_chunk=16)
