import re
from collections import Counter

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvarn.bench.tasks import TASKS, Example, Materials
from kvarn.bench.tasks.many_shot import ATTRIBUTES, LABELS
from task_checks import check_examples, digest

MANY_SHOT = TASKS["many_shot"]


@pytest.fixture
def materials(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Materials:
    return Materials(smollm2[1])


def _shown(example: Example) -> list[tuple[tuple[str, ...], str]]:
    return [
        (tuple(thing.split()), label)
        for thing, label in re.findall(r'^(\w+ \w+ \w+ \w+) = "(\w+)"$', example.context, re.M)
    ]


def _asked(example: Example) -> list[tuple[str, ...]]:
    return [tuple(re.search(r"have: ([\w ]+)\?", turn.question)[1].split()) for turn in example.turns]


@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_examples(length: int, materials: Materials) -> None:
    check_examples(MANY_SHOT, materials, length)


def test_examples_stay_what_they_were(materials: Materials) -> None:
    assert digest(MANY_SHOT.example(materials, 2048, 0, 0)) == "46bf95b7225f9024"


@pytest.mark.parametrize("number", range(6))
def test_one_attribute_alone_explains_the_labels_and_the_answers(number: int, materials: Materials) -> None:
    example = MANY_SHOT.example(materials, 4096, 0, number)
    shown, asked = _shown(example), _asked(example)
    rules = []
    for attribute in range(len(ATTRIBUTES)):
        pairs = {(thing[attribute], label) for thing, label in shown}
        if len(pairs) == len(dict(pairs)):
            rules.append((attribute, dict(pairs)))
    ((attribute, rule),) = rules
    assert Counter(rule.values()) == Counter(LABELS * 2)
    assert [rule[thing[attribute]] for thing in asked] == [turn.references[0] for turn in example.turns]


def test_nothing_that_is_asked_is_shown(materials: Materials) -> None:
    example = MANY_SHOT.example(materials, 16384, 0, 0)
    things = {thing for thing, _ in _shown(example)}
    assert len(things) > 500
    assert things.isdisjoint(_asked(example))
