"""Keyformer against the paper's algorithm in plain loops (arXiv 2403.09054, algorithm 1)."""

import math

import pytest
import torch
from one_layer import GROUP, KV_HEADS, OneLayer, probabilities, random_tokens, split
from real_text import divergences

import kvarn
from drive import logits_of
from kvarn.attention import Paid
from kvarn.errors import RecipeError
from kvarn.methods.keyformer import Keyformer
from kvarn.scoring import Observation, PerturbedMass

MASK = 2**32 - 1


def hashed(x: int) -> int:
    x &= MASK
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)


def gumbel(seed: int, layer: int, head: int, query: int, key: int) -> float:
    row = hashed(hashed(head + layer * 40503 + seed * 97) + query * 0x27D4EB2F)
    uniform = ((hashed(row + key * 0x165667B1) >> 9) + 0.5) / 2**23
    return -math.log(-math.log(uniform))


class NaiveKeyformer:
    """One KV head: entries as [position, key, score]."""

    def __init__(self, head: int, capacity: int, recent: int, steps: int):
        self.head, self.capacity, self.recent, self.steps = head, capacity, recent, steps
        self.entries: list[list] = []

    def attend(self, queries, now: int, decoded: int) -> None:
        temperature = 1 + min(decoded / self.steps, 1)
        read = [entry for entry in self.entries if entry[0] <= now]
        keys = torch.stack([entry[1] for entry in read])
        for place, query in enumerate(queries):
            head = self.head * GROUP + place
            row = [math.log(p) for p in probabilities(query, keys)]
            noisy = [x + gumbel(3, 0, head, now, entry[0]) for x, entry in zip(row, read, strict=True)]
            weights = [math.exp(x / temperature) for x in noisy]
            for entry, weight in zip(read, weights, strict=True):
                entry[2] += weight / sum(weights) / len(queries)

    def prune(self, seen: int) -> None:
        recent = [entry for entry in self.entries if entry[0] >= seen - self.recent]
        others = [entry for entry in self.entries if entry[0] < seen - self.recent]
        others.sort(key=lambda entry: -entry[2])
        self.entries = sorted(others[: self.capacity - len(recent)] + recent, key=lambda entry: entry[0])

    def run(self, queries, keys, prompt: int):
        self.entries = [[position, keys[position], 0.0] for position in range(prompt)]
        for position in range(prompt):
            self.attend(queries[:, position], position, 0)
        self.prune(prompt)
        yield
        for position in range(prompt, keys.shape[0]):
            self.entries.append([position, keys[position], 0.0])
            self.attend(queries[:, position], position, position + 1 - prompt)
            self.prune(position + 1)
            yield


def test_the_same_entries_and_scores_as_the_paper():
    capacity, prompt = 10, 20
    tokens = random_tokens(36)
    layer = OneLayer("keyformer(seed=3, steps=8, recent=0.3)", capacity)
    naive = [NaiveKeyformer(head, capacity, 3, 8) for head in range(KV_HEADS)]
    queries = tokens[0].unflatten(1, (KV_HEADS, GROUP))[0]
    steps = zip(*(n.run(queries[h], tokens[1][0, h], prompt) for h, n in enumerate(naive)), strict=True)
    for taken, _ in enumerate(steps):
        first = 0 if taken == 0 else prompt + taken - 1
        (layer.prompt if taken == 0 else layer.token)(*split(tokens, first, prompt + taken))
        assert layer.positions() == [[entry[0] for entry in n.entries] for n in naive]
        for mass, n in zip(layer.by_position("mass"), naive, strict=True):
            assert mass == pytest.approx({entry[0]: entry[2] for entry in n.entries}, abs=1e-4)


def test_without_noise_and_temperature_it_is_h2o():
    tokens = random_tokens(40)
    layer = OneLayer("keyformer(noise=0, last_temperature=1, recent=0.5)", 12)
    h2o = OneLayer("h2o", 12)
    for recipe in (layer, h2o):
        recipe.prompt(*split(tokens, 0, 25))
    for position in range(25, 40):
        now = split(tokens, position, position + 1)
        torch.testing.assert_close(layer.token(*now), h2o.token(*now))
        assert layer.positions() == h2o.positions()


def test_with_recent_entries_alone_it_is_a_window():
    tokens = random_tokens(30)
    layer, window = OneLayer("keyformer(recent=1.0)", 10), OneLayer("window(sinks=0)", 10)
    for recipe in (layer, window):
        recipe.prompt(*tokens)
    assert layer.positions() == window.positions()


def test_the_noise_is_standard_gumbel_and_its_streams_differ():
    def noise(layer: int, seed: int, first: int) -> torch.Tensor:
        paid = Paid([torch.ones(1, 1, 2, 100, 200)], [torch.ones(1, 1, 2, 100, 1)], [200])
        observation = Observation(paid, torch.arange(first, first + 100)[None], torch.zeros(1), layer)
        return PerturbedMass(1, 2, 8, 1.0, seed)._gumbel(observation, torch.arange(200)[None, None], 2)

    sample = noise(0, 0, 0)
    assert float(sample.mean()) == pytest.approx(0.5772, abs=0.03)
    assert float(sample.std()) == pytest.approx(math.pi / math.sqrt(6), abs=0.03)
    assert torch.equal(sample[:, :, :, 50:], noise(0, 0, 50)[:, :, :, :50])
    for other in (noise(1, 0, 0), noise(0, 1, 0), noise(0, 0, 100), sample.roll(1, -1), sample.flip(2)):
        correlation = torch.corrcoef(torch.stack([sample.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.03


@pytest.mark.parametrize("parameters", [{"kept": 0.0}, {"recent": 1.5}, {"temperature": 0.0}, {"seed": -1}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="keyformer"):
        Keyformer(**parameters)


def test_on_a_real_text_it_is_closer_than_a_window(smollm2):
    keyformer, window = divergences(smollm2, [("keyformer", 80), ("window", 80)])
    assert keyformer < window


def test_the_noise_is_the_same_in_every_run(tiny_model):
    tokens = torch.randint(1, 160, (1, 90), generator=torch.Generator().manual_seed(1))

    def logits(recipe: str) -> torch.Tensor:
        return logits_of(tiny_model, tokens, tokens[0, :8], kvarn.Cache(tiny_model, recipe, 40))

    first = logits("keyformer")
    assert torch.equal(first, logits("keyformer"))
    assert not torch.equal(first, logits("keyformer(seed=1)"))
