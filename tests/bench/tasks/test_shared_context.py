import json
import random
import re
import statistics
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy.stats import chisquare
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvarn.bench.tasks import TASKS, Materials
from kvarn.bench.tasks.shared_context import scatter
from kvarn.errors import KvarnError, Unsupported
from task_checks import check_examples, digest

NAMES = ("shared_kv", "shared_prefix_suffix", "shared_vt", "shared_mf")
DIGESTS = ("39ba6267f4a091eb", "d184e2834554c537", "89ed9cbb01fde446", "a4ee9df9437beff3")
PROSE = " ".join(f"Sentence number {i} says nothing of interest." for i in range(300))


class Bytes:
    """Stands for a tokenizer where many examples are made: bytes are its tokens."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=text.encode())


@pytest.fixture
def materials(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> Materials:
    (tmp_path / "prose.txt").write_text(PROSE)
    return Materials(smollm2[1], text=tmp_path / "prose.txt")


@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str, length: int, materials: Materials) -> None:
    if length == 1024 and name in ("shared_kv", "shared_prefix_suffix"):  # 750 tokens are for the answers
        with pytest.raises(Unsupported, match="too few"):
            TASKS[name].example(materials, length, 0, 0)
    else:
        check_examples(TASKS[name], materials, length)
        assert len(TASKS[name].example(materials, length, 0, 0).turns) == 5


@pytest.mark.parametrize(("name", "expected"), list(zip(NAMES, DIGESTS, strict=True)))
def test_examples_stay_what_they_were(name: str, expected: str, materials: Materials) -> None:
    assert digest(TASKS[name].example(materials, 2048, 0, 0)) == expected


@pytest.mark.parametrize("number", range(3))
def test_kv_asks_for_values_of_the_object(number: int, materials: Materials) -> None:
    example = TASKS["shared_kv"].example(materials, 4096, 0, number)
    pairs = json.loads(example.context)
    keys = [re.search(r"[0-9a-f-]{36}", turn.question)[0] for turn in example.turns]
    assert len(set(keys)) == 5
    assert [(pairs[key],) for key in keys] == [turn.references for turn in example.turns]


def test_kv_asks_at_all_depths_alike() -> None:
    tenths = Counter[int]()
    for number in range(60):
        example = TASKS["shared_kv"].example(Materials(Bytes()), 20_000, 0, number)
        keys = list(json.loads(example.context))[:-1]  # the last is the filler
        for turn in example.turns:
            key = next(key for key in keys if key in turn.question)
            tenths[10 * keys.index(key) // len(keys)] += 1
    assert chisquare([tenths[tenth] for tenth in range(10)]).pvalue > 0.01


@pytest.mark.parametrize("number", range(3))
def test_prefix_suffix_has_one_answer_among_near_ones(number: int, materials: Materials) -> None:
    example = TASKS["shared_prefix_suffix"].example(materials, 8192, 0, number)
    listed = example.context.split("\n")[2:]
    for turn in example.turns:
        begin, end = re.search(r"begins with (\w{10}) and ends with (\w{10})\?", turn.question).groups()
        begins = {text for text in listed if text.startswith(begin)}
        ends = {text for text in listed if text.endswith(end)}
        assert begins & ends == set(turn.references)
        assert (len(begins), len(ends)) == (4, 4)


@pytest.mark.parametrize("number", range(3))
def test_vt_answers_are_the_variables_of_a_value(number: int, materials: Materials) -> None:
    example = TASKS["shared_vt"].example(materials, 4096, 0, number)
    values: dict[str, str] = {}
    for name, given in re.findall(r"VAR ([A-Z]{5}) = (\w+)\.", example.context):
        values[name] = values.get(given, given)  # fails to be a number where a variable is used before it is set
    assert len(values) == 75
    assert all(value.isdigit() for value in values.values())
    for turn in example.turns:
        value = re.search(r"the value (\d{5})", turn.question)[1]
        assert {name for name in values if values[name] == value} == set(turn.references[0].split(", "))


def test_vt_hides_assignments_between_sentences_of_the_text(materials: Materials) -> None:
    context = TASKS["shared_vt"].example(materials, 4096, 0, 0).context
    prose = re.sub(r"VAR [A-Z]{5} = \w+\. ?", "", context).strip()
    assert prose in f"{PROSE} {PROSE}"


def test_vt_refuses_a_text_without_words(materials: Materials, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text(" \n")
    with pytest.raises(KvarnError, match="no words"):
        TASKS["shared_vt"].example(materials, 4096, 0, 0)


@pytest.mark.parametrize("number", range(8))
def test_mf_answers_are_the_statistics(number: int, materials: Materials) -> None:
    example = TASKS["shared_mf"].example(materials, 512 + 100 * number, 0, number)
    numbers = [int(text) for text in re.findall(r"\d+", example.context)]
    counts = Counter(numbers).most_common()
    ordered = sorted(set(numbers))
    right = {
        "smallest number": ordered[0],
        "second smallest number": ordered[1],
        "second largest number": ordered[-2],
        "largest number": ordered[-1],
        "median": statistics.median(numbers),
        "most frequent number": counts[0][0],
    }
    assert counts[0][1] > counts[1][1]
    asked = [re.match(r"What is the (.+) of the list", turn.question)[1] for turn in example.turns]
    assert len(set(asked)) == 5
    assert [turn.references for turn in example.turns] == [(str(right[name]),) for name in asked]
    assert all(numbers.count(right[name]) == 1 for name in list(right)[:4])


def test_needles_lie_at_their_depths() -> None:
    assert scatter("abcd", "zyx", [0.99, 0.0, 0.5]) == list("yabxcdz")


def test_needles_are_spread_over_every_place() -> None:
    rng = random.Random(0)
    places = Counter(scatter([0] * 9, [1], [rng.random()]).index(1) for _ in range(1000))
    assert chisquare([places[place] for place in range(10)]).pvalue > 0.01
