"""Contexts that serve five questions each, in the manner of SCBench (arXiv 2412.10319).

``shared_kv``             the value of a key in a large JSON object
``shared_prefix_suffix``  the string that has a given beginning and end, among strings that have one of them
``shared_vt``             all variables that get a value over four hops, in prose
``shared_mf``             statistics of a long list of numbers

The generators are our own, since SCBench's are not public; limits of answers and metrics are SCBench's. Where the
format of an answer is fixed, its beginning is given, so that small models are measured by what they find. SCBench's
summaries and its search in repositories need documents and code that no generator makes well, so they are left out.
"""

import json
import random
import re
import statistics
import string
import uuid
from collections.abc import Sequence
from typing import TypeVar

from ...errors import KvarnError
from .base import Example, Materials, Setting, Task, Turn, fit

QUESTIONS = 5
SETTINGS: tuple[Setting, ...] = ("multi-turn", "multi-request")

_T = TypeVar("_T")


def scatter(hay: Sequence[_T], needles: Sequence[_T], depths: Sequence[float]) -> list[_T]:
    """The hay in its order with needle i behind the share ``depths[i]`` (in [0, 1)) of it."""
    mixed: list[_T] = []
    start = 0
    for depth, needle in sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0]):
        end = int(depth * (len(hay) + 1))
        mixed += [*hay[start:end], needle]
        start = end
    return [*mixed, *hay[start:]]


def kv(materials: Materials, length: int, rng: random.Random) -> Example:
    """Pairs of UUIDs as a JSON object. A last value of any number of hexadecimal digits takes what pairs leave."""
    asked = [(_uuid(rng), _uuid(rng)) for _ in range(QUESTIONS)]
    depths, seed = _depths(rng, QUESTIONS), rng.random()
    question = "What is the value of the key {} in the JSON object above? Answer with the value alone."
    turns = tuple(
        Turn(question.format(key), (value,), "contains_any", most=150, prefix=f'"{key}": "') for key, value in asked
    )

    def build(size: int) -> Example:
        noise, (others, rest) = random.Random(seed), divmod(size, 64)
        pairs = [(_uuid(noise), _uuid(noise)) for _ in range(others)]
        filler = ("rest", "".join(noise.choices("0123456789abcdef", k=rest)))
        return Example(json.dumps(dict([*scatter(pairs, asked, depths), filler]), indent=0), turns)

    return fit(build, length, materials)


def prefix_suffix(materials: Materials, length: int, rng: random.Random) -> Example:
    """Strings of 40 to 120 letters and digits. Each that is asked for has six near ones, three with its beginning and
    three with its end, as far as ``length`` has room for them; one string of any length takes what is left."""
    asked = [_letters(rng, rng.randint(40, 120)) for _ in range(QUESTIONS)]
    near = [text for target in asked for _ in range(3) for text in _near(rng, target)]
    rng.shuffle(near)
    depths, seed = _depths(rng, len(asked) + len(near)), rng.random()
    question = "Which string of the list above begins with {} and ends with {}? Answer with the whole string alone."
    turns = tuple(Turn(question.format(s[:10], s[-10:]), (s,), "contains_any", most=150) for s in asked)

    def build(size: int) -> Example:
        noise, (others, rest) = random.Random(seed), divmod(size, 40)
        strings = [_letters(noise, noise.randint(40, 120)) for _ in range(others - len(near))]
        needles = [*asked, *near[:others]]
        listed = [*scatter(strings, needles, depths[: len(needles)]), _letters(noise, rest)]
        return Example("A list of strings, one on each line:\n\n" + "\n".join(listed), turns)

    return fit(build, length, materials)


def vt(materials: Materials, length: int, rng: random.Random) -> Example:
    """Prose with a chain of assignments for each question, and up to ten others: one assignment for each 20 words."""
    words = materials.prose.split()
    if not words:
        raise KvarnError("the text that hides assignments has no words; give another file")
    start = rng.randrange(len(words))
    names = _names(rng, 5 * (QUESTIONS + 10))
    chains = [names[first : first + 5] for first in range(0, len(names), 5)]
    values = rng.sample(range(10000, 100000), k=len(chains))
    lines = [line for chain, value in zip(chains, values, strict=True) for line in _assignments(chain, value)]
    depths = [depth for _ in chains for depth in sorted(_depths(rng, 5))]  # a variable is set before it is used
    question = "Which variables in the text above have the value {}? There are five. Answer with their names alone."
    turns = tuple(
        Turn(question.format(values[i]), (", ".join(chains[i]),), "contains_listed", most=30) for i in range(QUESTIONS)
    )

    def build(size: int) -> Example:
        prose = " ".join(words[(start + i) % len(words)] for i in range(size))
        needles = lines[: 5 * QUESTIONS + size // 20]
        sentences = re.split(r"(?<=[.!?]) ", prose)
        return Example(" ".join(scatter(sentences, needles, depths[: len(needles)])), turns)

    return fit(build, length, materials)


def mf(materials: Materials, length: int, rng: random.Random) -> Example:
    """Numbers of two digits. The two least and the two largest stand once each; the others come in rounds, each once
    and one of them, the most frequent number, three times."""
    low, second, *middle, below, high = sorted(rng.sample(range(10, 100), 33))
    frequent = rng.choice(middle)
    depths, seed = _depths(rng, 4), rng.random()
    one_round = [*middle, frequent, frequent]
    right = {"smallest number": low, "second smallest number": second, "second largest number": below}
    right |= {"largest number": high, "most frequent number": frequent}
    asked = rng.sample([*right, "median"], k=QUESTIONS)

    def build(size: int) -> Example:
        order, hay = random.Random(seed), list[int]()
        count = len(one_round) + 2 * size  # odd, and so the median is one of the numbers
        while len(hay) < count:
            hay += order.sample(one_round, k=len(one_round))
        numbers = scatter(hay[:count], [low, second, below, high], depths)
        answers = right | {"median": statistics.median_low(numbers)}
        turns = tuple(_statistic(name, answers[name]) for name in asked)
        return Example(f"A list of numbers:\n\n{', '.join(map(str, numbers))}", turns)

    return fit(build, length, materials)


TASKS = tuple(Task(f"shared_{make.__name__}", "shared", make, SETTINGS) for make in (kv, prefix_suffix, vt, mf))


def _statistic(name: str, value: int) -> Turn:
    # A model that begins with a sentence would use up the few tokens, so the sentence is given.
    return Turn(
        f"What is the {name} of the list above? Answer with the number alone.",
        (str(value),),
        "first_number",
        most=5,
        prefix=f"The {name} of the list:\n",
    )


def _depths(rng: random.Random, count: int) -> list[float]:
    return [rng.random() for _ in range(count)]


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits, k=count))


def _near(rng: random.Random, target: str) -> tuple[str, str]:
    """A string that begins as ``target`` does, and one that ends so."""
    return target[:10] + _letters(rng, rng.randint(30, 110)), _letters(rng, rng.randint(30, 110)) + target[-10:]


def _names(rng: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    return list(names)


def _assignments(names: Sequence[str], value: int) -> list[str]:
    return [f"VAR {name} = {given}." for name, given in zip(names, [value, *names[:-1]], strict=True)]
