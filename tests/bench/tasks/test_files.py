import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvarn.bench.metrics import METRICS
from kvarn.bench.tasks import Materials, Task
from kvarn.bench.tasks.files import load
from kvarn.errors import KvarnError, Unsupported
from task_checks import check_turns

LONG = " ".join(f"Fact {i} is {i * i}." for i in range(200))
LONGBENCH = {"input": "Who?", "context": LONG, "answers": ["Bob", "Rob"], "dataset": "qasper", "language": "en"}
LONGBENCH |= {"length": 1500, "all_classes": None, "_id": "0"}
LEVAL = {"instructions": ["Who?", "Where?"], "input": LONG, "outputs": ["Bob", "At home"], "source": "news"}
LEVAL |= {"evaluation": "f1"}
RULER = {"index": 0, "input": f"Read.\n{LONG}\nWhat is 3?", "outputs": ["9", "three"], "length": 1500}
ENGLISH = {
    "narrativeqa": "f1",
    "qasper": "f1",
    "multifieldqa_en": "f1",
    "hotpotqa": "f1",
    "2wikimqa": "f1",
    "musique": "f1",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "trec": "classification_first_line",
    "triviaqa": "f1_first_line",
    "samsum": "rouge_l_first_line",
    "passage_count": "numbers_right",
    "passage_retrieval_en": "numbers_right",
    "lcc": "code_similarity",
    "repobench-p": "code_similarity",
}


@pytest.fixture
def materials(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Materials:
    return Materials(smollm2[1])


def _tasks(path: Path, *lines: dict[str, Any]) -> list[Task]:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load(path)


@pytest.mark.parametrize(("dataset", "metric"), ENGLISH.items())
def test_longbench_is_scored_as_its_data_sets_are(
    dataset: str, metric: str, tmp_path: Path, materials: Materials
) -> None:
    answers = {"numbers_right": "Paragraph 7", "classification_first_line": "Food"}
    line = LONGBENCH | {"dataset": dataset, "answers": [answers.get(metric, "Bob")], "all_classes": ["City", "Food"]}
    (task,) = _tasks(tmp_path / "file.jsonl", line)
    assert (task.name, task.group, task.count) == (f"longbench_{dataset}", "LongBench", 1)
    assert task.settings == ("aware", "agnostic")
    example = task.example(materials, 4096, 0, 0)
    (turn,) = example.turns
    assert (example.context, turn.metric) == (LONG, metric)
    assert "Who?" in turn.question
    check_turns(example, materials.tokenizer)
    if dataset == "trec":
        assert METRICS[metric]("Food, City", turn.references) == 0.5


def test_longbench_has_a_task_for_each_data_set_with_examples_in_order(tmp_path: Path, materials: Materials) -> None:
    lines = [LONGBENCH | {"dataset": name, "input": f"Who is {name}?"} for name in ("qasper", "musique", "qasper")]
    lines[2]["answers"] = ["Eve"]
    first, second = _tasks(tmp_path / "file.jsonl", *lines)
    assert (first.count, second.count) == (2, 1)
    assert [first.example(materials, 4096, 0, i).turns[0].references for i in (0, 1)] == [("Bob", "Rob"), ("Eve",)]
    assert first.example(materials, 4096, 0, 1) == first.example(materials, 4096, 7, 1)
    with pytest.raises(KvarnError, match="longbench_qasper has 2 examples"):
        first.example(materials, 4096, 0, 2)


@pytest.mark.parametrize("length", [512, 1000, 1001, 2048])
def test_long_contexts_lose_their_middle(length: int, tmp_path: Path, materials: Materials) -> None:
    (task,) = _tasks(tmp_path / "file.jsonl", LONGBENCH)
    tokenizer = materials.tokenizer
    example = task.example(materials, length, 0, 0)
    assert length - 3 <= example.room(tokenizer) <= length
    tokens = tokenizer(LONG, add_special_tokens=False).input_ids
    whole = task.example(materials, 100_000, 0, 0)
    kept = len(tokens) - (whole.room(tokenizer) - length)
    halves = [tokenizer.decode(tokens[:n]) + tokenizer.decode(tokens[-n:]) for n in (kept // 2, kept // 2 - 1)]
    assert example.context in halves  # one token fewer where the halves' meeting makes one more
    assert example.turns == whole.turns


def test_a_length_that_has_no_room_for_a_context_is_refused(tmp_path: Path, materials: Materials) -> None:
    (task,) = _tasks(tmp_path / "file.jsonl", LONGBENCH)
    with pytest.raises(Unsupported, match="150 tokens are too few"):
        task.example(materials, 150, 0, 0)


def test_leval_asks_all_questions_of_a_document(tmp_path: Path, materials: Materials) -> None:
    (task,) = _tasks(tmp_path / "leval_news.jsonl", LEVAL, LEVAL | {"evaluation": "human"})
    assert (task.name, task.count) == ("leval_news", 1)
    assert task.settings == ("multi-turn", "multi-request")
    example = task.example(materials, 1024, 0, 0)
    assert [turn.references for turn in example.turns] == [("Bob",), ("At home",)]
    check_turns(example, materials.tokenizer)
    assert example.room(materials.tokenizer) <= 1024


def test_leval_with_single_questions_has_their_settings(tmp_path: Path) -> None:
    (task,) = _tasks(tmp_path / "file.jsonl", LEVAL | {"instructions": ["Who?"], "outputs": ["Bob"]})
    assert task.settings == ("aware", "agnostic")


@pytest.mark.parametrize(
    ("change", "metric", "reference"),
    [
        ({"evaluation": "f1"}, "f1", "Bob"),
        ({"evaluation": "rouge"}, "rouge_l", "Bob"),
        ({"evaluation": "exam", "outputs": ["(B) Bob", "(A) A home"]}, "multiple_choice", "B"),
        ({"evaluation": "exam", "outputs": ["AC", "B"]}, "multiple_choice", "AC"),
        ({"evaluation": "exam"}, "exact_match", "Bob"),
        ({"evaluation": "exam", "source": "gsm100", "outputs": ["1,042", "7"]}, "final_number", "1,042"),
    ],
)
def test_leval_is_scored_as_it_says(
    change: dict[str, Any], metric: str, reference: str, tmp_path: Path, materials: Materials
) -> None:
    (task,) = _tasks(tmp_path / "file.jsonl", LEVAL | change)
    example = task.example(materials, 4096, 0, 0)
    assert (example.turns[0].metric, example.turns[0].references) == (metric, (reference,))
    check_turns(example, materials.tokenizer)


@pytest.mark.parametrize(
    ("name", "metric", "half"),
    [
        ("niah_multikey_1", "contains_all", 0.5),
        ("vt", "contains_all", 0.5),
        ("cwe", "contains_all", 0.5),
        ("fwe", "contains_all", 0.5),
        ("qa_1", "contains_any", 1),
    ],
)
def test_ruler_asks_in_its_last_line(name: str, metric: str, half: float, tmp_path: Path, materials: Materials) -> None:
    (tmp_path / name).mkdir()
    (task,) = _tasks(tmp_path / name / "validation.jsonl", RULER | {"answer_prefix": "It is"})
    assert (task.name, task.count) == (f"ruler_{name}", 1)
    example = task.example(materials, 4096, 0, 0)
    assert example.context == f"Read.\n{LONG}"
    (turn,) = example.turns
    assert (turn.question, turn.prefix, turn.metric) == ("What is 3?", "It is", metric)
    assert METRICS[metric]("It is 9", turn.references) == half
    assert METRICS[metric]("9, three", turn.references) == 1
    assert task.example(materials, 512, 0, 0).room(materials.tokenizer) <= 512


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no examples"),
        ([{"text": "?"}], "line 1: not a format that is known"),
        ([LONGBENCH, LONGBENCH | {"answers": "Bob"}], "line 2: field 'answers' must be a list"),
        ([LONGBENCH, LONGBENCH | {"answers": []}], "line 2: field 'answers' must be a list"),
        ([LONGBENCH, LONGBENCH | {"context": None}], "line 2: field 'context' must be a string"),
        ([LONGBENCH | {"dataset": "trec"}], "line 1: field 'all_classes' must be a list"),
        ([LONGBENCH | {"dataset": "mine"}], "line 1: no data set 'mine' in LongBench"),
        ([LONGBENCH, LEVAL], "line 2: field 'dataset' must be a string"),
        ([LEVAL | {"outputs": ["Bob"]}], "line 1: 2 in 'instructions', but 1 in 'outputs'"),
        ([LEVAL | {"evaluation": "bleu"}], "line 1: no evaluation 'bleu'"),
        ([RULER], "name the file or its folder"),
    ],
)
def test_lines_that_do_not_fit_are_named(lines: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(KvarnError, match=message):
        _tasks(tmp_path / "file.jsonl", *lines)


def test_a_question_that_cannot_be_told_from_the_context_is_named(tmp_path: Path) -> None:
    with pytest.raises(KvarnError, match="line 1: field 'input' must have the question on a line of its own"):
        _tasks(tmp_path / "vt.jsonl", RULER | {"input": "What is 3?"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LONGBENCH | {"dataset": "dureader", "language": "zh"}, "dureader is in Chinese"),
        (LEVAL | {"evaluation": "LLM"}, "judged by people or by a model"),
        (LEVAL | {"evaluation": "exam", "source": "codeU"}, "comparing code"),
        (LEVAL | {"evaluation": "exam", "outputs": ["True [fact: False]"] * 2}, "true and false in fiction"),
    ],
)
def test_what_is_left_out_is_refused(line: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message):
        _tasks(tmp_path / "file.jsonl", line)


@pytest.mark.parametrize(("text", "message"), [("{}\n\n{oh}\n", "line 3: not JSON"), ("[1]", "line 1: a JSON object")])
def test_text_that_is_no_json_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text(text)
    with pytest.raises(KvarnError, match=message):
        load(tmp_path / "file.jsonl")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(KvarnError, match=r"none\.jsonl"):
        load(tmp_path / "none.jsonl")
