"""Random arrivals, aborts and tiny pools: everything is answered as if it were alone, and every page comes back."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvarn
from kvarn import Engine, Sampling
from kvarn.errors import OutOfMemory
from tiny_models import make_tiny

RECIPES = {"full": None, "snapkv(window=4)": 16, "h2o": 16, "kivi(bits=8, group=8, residual=8)": None}


@cache
def model():
    return make_tiny("llama", num_hidden_layers=1)


@cache
def alone(recipe: str, length: int, seed: int, tokens: int, temperature: float) -> list[int]:
    sampling = Sampling(max_tokens=tokens, temperature=temperature, seed=seed)
    return Engine(model(), recipe, RECIPES[recipe], page_size=4).generate([prompt(length, seed)], sampling)[0].tokens


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(1, 160, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Driven:
    """An engine, the requests that it was given, and what it said of them."""

    def __init__(self, recipe: str, memory: int | None, preemption: str = "host", **options):
        self.recipe = recipe
        self.engine = Engine(
            model(), recipe, RECIPES[recipe], memory=memory, preemption=preemption, page_size=4, **options
        )
        self.given: dict[int, tuple] = {}
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, str] = {}
        self.began: list[int] = []
        self.refused = 0

    def add(self, length: int, seed: int, tokens: int, temperature: float) -> None:
        sampling = Sampling(max_tokens=tokens, temperature=temperature, seed=seed)
        try:
            number = self.engine.add(prompt(length, seed), sampling)
        except OutOfMemory:
            self.refused += 1
            return
        self.given[number] = (length, seed, tokens, temperature)
        self.tokens[number] = []

    def step(self) -> None:
        for event in self.engine.step():
            assert event.request not in self.finished, "nothing comes after the end"
            self.tokens[event.request] += event.tokens
            if len(self.tokens[event.request]) == len(event.tokens) > 0:
                self.began.append(event.request)
            if event.finished:
                self.finished[event.request] = event.finished
        ceiling = self.engine.arena.ceiling
        assert ceiling is None or self.engine.arena.bytes <= ceiling

    def abort(self, number: int) -> None:
        if self.engine.abort(number):
            self.finished[number] = "aborted"

    def check(self) -> None:
        """After the last step."""
        assert set(self.finished) == set(self.given), "every request was answered"
        assert self.engine.arena.bytes == 0, "every page is back"
        assert self.began == sorted(self.began), "in the order in which they came"
        for number, asked in self.given.items():
            own = alone(self.recipe, *asked)
            if self.finished[number] == "aborted":
                own = own[: len(self.tokens[number])]
            assert self.tokens[number] == own


requests = st.tuples(st.integers(1, 40), st.integers(0, 5), st.integers(1, 24), st.sampled_from([0.0, 1.0]))
moves = st.one_of(
    requests.map(lambda r: ("add", r)), st.integers(1, 4).map(lambda n: ("steps", n)), st.just(("abort", None))
)


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=12)
@given(
    st.lists(moves, min_size=2, max_size=12),
    st.floats(0.9, 2.5),
    st.sampled_from(["host", "recompute"]),
    st.sampled_from([None, 8]),
    st.integers(1, 5),
)
def test_whatever_comes(recipe, moves, room, preemption, chunk, most):
    # Chunks of a compressed prompt keep other entries than the whole.
    chunk = chunk if recipe == "full" else None
    longest = Engine(model(), recipe, RECIPES[recipe], page_size=4)._sizes.most(36, 20)
    driven = Driven(recipe, int(room * longest), preemption, prefill_chunk=chunk, step_tokens=8, max_batch=most)
    for what, detail in moves:
        if what == "add":
            driven.add(*detail)
        elif what == "abort" and driven.given:
            driven.abort(max(driven.given) - len(driven.given) // 3)
        elif what == "steps":
            for _ in range(detail):
                driven.step()
    while driven.engine.busy:
        driven.step()
    driven.check()


@pytest.mark.no_cover
def test_a_soak_of_hundreds():
    """Few different requests, so that what each gives alone is known; many of them, so that all paths are taken."""
    generator = torch.Generator().manual_seed(9)

    def random(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    longest = Engine(model(), "full", page_size=4)._sizes.most(40, 24)
    driven = Driven("full", int(1.6 * longest), "recompute", max_batch=12, step_tokens=48)
    for _ in range(200):
        driven.add(8 * random(1, 6), random(0, 3), 8 * random(1, 4), float(random(0, 2)))
        if random(0, 3) == 0:
            driven.step()
        if random(0, 9) == 0 and driven.given:
            driven.abort(random(1, max(driven.given) + 1))
        driven.engine.preemption = ("host", "recompute")[random(0, 2)]
    while driven.engine.busy:
        driven.step()
    driven.check()
    assert driven.engine.preempted > 10
    assert {"aborted", "length"} <= set(driven.finished.values())


def test_a_request_that_cannot_be_held_ends_with_a_reason():
    """The engine's own bound is never exceeded, so the pool shrinks here while the request runs."""
    engine = Engine(model(), page_size=4)
    engine.add(prompt(20, 0), Sampling(max_tokens=30))
    engine.step()
    engine.arena.ceiling = engine.arena.bytes
    events = []
    while engine.busy:
        events += engine.step()
    assert events[-1].finished == "memory"
    assert engine.arena.bytes == 0


def test_an_error_in_a_pass_takes_only_its_request(monkeypatch):
    engine = Engine(model(), page_size=4)
    first = engine.add(prompt(20, 0), Sampling(max_tokens=6))
    engine.step()
    engine.add(prompt(9, 1), Sampling(max_tokens=6))
    with monkeypatch.context() as patch:
        patch.setattr(kvarn.Cache, "expect", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    tokens = []
    while engine.busy:
        tokens += [t for event in engine.step() for t in event.tokens if event.request == first]
    assert engine.arena.bytes == 0
