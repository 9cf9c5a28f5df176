"""The sampler against plain restatements of what it promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn import Sampling
from kvarn.engine.requests import Request
from kvarn.engine.sampling import Sampler
from kvarn.errors import Refused

VOCABULARY = 24
CPU = torch.device("cpu")


def request(sampling: Sampling, prompt=(1, 2), tokens=(), seed: int = 0) -> Request:
    generator = torch.Generator().manual_seed(seed)
    return Request(0, list(prompt), sampling, frozenset(), None, generator, tokens=list(tokens))


def allowed(logits: list[float], sampling: Sampling, prompt, tokens) -> dict[int, float]:
    """Probabilities of the tokens that may be drawn, in plain loops."""
    scores = []
    for token, logit in enumerate(logits):
        if token in prompt or token in tokens:
            logit = logit * sampling.repetition_penalty if logit < 0 else logit / sampling.repetition_penalty
        logit -= sampling.presence_penalty * (token in tokens) + sampling.frequency_penalty * tokens.count(token)
        scores.append(logit / sampling.temperature)
    left = dict(enumerate(scores))
    if sampling.top_k:
        least = sorted(scores, reverse=True)[min(sampling.top_k, len(scores)) - 1]
        left = {token: score for token, score in left.items() if score >= least}
    if sampling.top_p < 1:
        total = sum(math.exp(score) for score in left.values())
        kept, mass = {}, 0.0
        for token, score in sorted(left.items(), key=lambda pair: -pair[1]):
            if kept and mass >= sampling.top_p:
                break
            kept[token] = score
            mass += math.exp(score) / total
        left = kept
    top = max(left.values())
    left = {token: score for token, score in left.items() if math.exp(score - top) >= sampling.min_p}
    total = sum(math.exp(score) for score in left.values())
    return {token: math.exp(score) / total for token, score in left.items()}


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.3, 2),
    top_k=st.integers(0, VOCABULARY + 3),
    top_p=st.sampled_from([0.15, 0.5, 0.83, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.21]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.7]),
    presence_penalty=st.sampled_from([-0.5, 0.0, 0.9]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
)
tokens_of = st.lists(st.integers(0, VOCABULARY - 1), max_size=6)


@settings(max_examples=60)
@given(st.lists(st.tuples(samplings, tokens_of, tokens_of), min_size=1, max_size=4), st.integers(0, 1000))
def test_only_what_is_allowed_is_drawn(each, seed):
    logits = 3 * torch.randn(len(each), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    requests = [request(s, [1, *prompt], tokens, seed + i) for i, (s, prompt, tokens) in enumerate(each)]
    drawn = Sampler(requests, VOCABULARY, CPU)(logits)[0].tolist()
    for row, (its, token) in enumerate(zip(requests, drawn, strict=True)):
        assert token in allowed(logits[row].tolist(), its.sampling, its.prompt, its.tokens)
        alone = request(its.sampling, its.prompt, its.tokens, seed + row)
        assert Sampler([alone], VOCABULARY, CPU)(logits[row : row + 1])[0].tolist() == [token], "neighbours matter"


def test_draws_follow_the_probabilities():
    sampling = Sampling(temperature=0.9, top_k=8, top_p=0.9, repetition_penalty=1.4, frequency_penalty=0.3)
    logits = 2 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(4))
    expected = allowed(logits[0].tolist(), sampling, [1, 2], [3, 3, 5])
    count = 4000
    requests = [request(sampling, tokens=[3, 3, 5], seed=i) for i in range(count)]
    drawn = Sampler(requests, VOCABULARY, CPU)(logits.expand(count, -1))[0]
    for token in range(VOCABULARY):
        share, p = int((drawn == token).sum()) / count, expected.get(token, 0.0)
        assert abs(share - p) <= 4.5 * math.sqrt(p * (1 - p) / count) + 1e-9


def test_penalties_count_the_tokens_that_were_chosen():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, :3] = torch.tensor([1.0, 0.9, 0.8])
    its = request(Sampling(presence_penalty=0.15, frequency_penalty=0.04))
    sampler = Sampler([its], VOCABULARY, CPU)
    # Scores by hand: 1.0 - 0.19, then 0.9 - 0.19, then 0.8 - 0.19 and so on.
    for expected in (0, 1, 0, 2, 0, 0, 1):
        token = sampler(logits)[0].item()
        its.tokens.append(token)
        again = Sampler([request(its.sampling, tokens=its.tokens[:-1])], VOCABULARY, CPU)(logits)[0].item()
        assert token == again == expected


def test_greedy_rows_draw_nothing():
    its = request(Sampling())
    state = its.generator.get_state()
    Sampler([its, request(Sampling(temperature=1.0))], VOCABULARY, CPU)(torch.randn(2, VOCABULARY))
    assert torch.equal(its.generator.get_state(), state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"logprobs": -1},
        {"stop": "text"},
        {"stop": ("",)},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(Refused, match=next(iter(wrong))):
        Sampling(**wrong)
