import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvarn.bench.tasks import TASKS, Materials
from kvarn.errors import KvarnError, Unsupported
from task_checks import check_examples, digest

GSM8K = TASKS["gsm8k"]


def _problem(number: int, rng: random.Random) -> dict[str, str]:
    apples, more = rng.randint(2, 999), [rng.randint(2, 99) for _ in range(rng.randint(1, 9))]
    steps, total = [], apples
    for count in more:
        steps.append(f"Then there are {total} + {count} = <<{total}+{count}={total + count}>>{total + count} apples.")
        total += count
    gifts = " ".join(f"A friend gives {count} more." for count in more)
    question = f"Basket {number} has {apples} apples. {gifts} How many apples are there?"
    return {"question": question, "answer": "\n".join([*steps, f"#### {total:,}"])}


@pytest.fixture
def materials(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> Materials:
    rng = random.Random(0)
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(_problem(number, rng)) + "\n" for number in range(80)))
    return Materials(smollm2[1], gsm8k=path)


@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_examples(length: int, materials: Materials) -> None:
    check_examples(GSM8K, materials, length)


def test_examples_stay_what_they_were(materials: Materials) -> None:
    assert digest(GSM8K.example(materials, 2048, 0, 0)) == "8dbb51cb5d5ac549"


def test_other_problems_stand_before_the_one_that_is_asked(materials: Materials) -> None:
    example = GSM8K.example(materials, 4096, 0, 0)
    problems = {}
    for line in materials.gsm8k.read_text().splitlines():
        problem = json.loads(line)
        problems[problem["question"]] = problem["answer"].rpartition("#### ")[2]
    (turn,) = example.turns
    asked = turn.question.removeprefix("Question: ").split("\n")[0]
    assert turn.references == (problems[asked],)
    assert asked not in example.context
    assert "<<" not in example.context
    shown = example.context.split("\n\n")
    assert len(shown) == len(set(shown)) > 10
    for worked in shown:
        question, _, solution = worked.removeprefix("Question: ").partition("\nAnswer: ")
        assert solution.endswith(f"\n#### {problems[question]}")


def test_lengths_that_cannot_be(materials: Materials, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    with pytest.raises(Unsupported, match="too few"):
        GSM8K.example(materials, 300, 0, 0)
    with pytest.raises(Unsupported, match="more than the 80 problems"):
        GSM8K.example(materials, 100_000, 0, 0)
    with pytest.raises(Unsupported, match="needs a file"):
        GSM8K.example(Materials(smollm2[1]), 1024, 0, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "?"}, "line 81: field 'answer' must be a string"),
        ({"question": "?", "answer": "It is 42."}, "line 81: field 'answer' must end with '#### ' and a number"),
    ],
)
def test_a_line_that_is_no_problem_is_named(line: dict[str, str], message: str, materials: Materials) -> None:
    with materials.gsm8k.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(KvarnError, match=message):
        GSM8K.example(materials, 1024, 0, 0)


def test_a_file_without_two_problems_is_refused(materials: Materials) -> None:
    materials.gsm8k.write_text(json.dumps({"question": "?", "answer": "#### 42"}))
    with pytest.raises(KvarnError, match="two problems are the least"):
        GSM8K.example(materials, 1024, 0, 0)
