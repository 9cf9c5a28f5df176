"""RULER's thirteen tasks on a small text and a small file of questions."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
from scipy.stats import chisquare
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvarn.bench.metrics import METRICS
from kvarn.bench.tasks import TASKS, Example, Materials, haystack, words
from kvarn.bench.tasks.questions import read_squad
from kvarn.errors import KvarnError, Unsupported
from tiny_chat import save_tiny_chat

RULER = [name for name, task in TASKS.items() if task.group == "ruler"]
DIGESTS = {
    "niah_single_1": "a0b74ba8a3b1",
    "niah_single_2": "c95fcec64214",
    "niah_single_3": "ced6d2e7ec12",
    "niah_multikey_1": "b2f9c9eff607",
    "niah_multikey_2": "6386711394a0",
    "niah_multikey_3": "6703f09f4a9f",
    "niah_multivalue": "867e05b5f79f",
    "niah_multiquery": "4ea046e1505b",
    "vt": "c7d67ca8cf86",
    "cwe": "e4bd0d51da3c",
    "fwe": "da04ab705da5",
    "qa_1": "abb0bf738c89",
    "qa_2": "47c4fc23fe8f",
}
NEEDLES = [name for name in RULER if name.startswith("niah_")]
SUBJECTS = {"River": ["fish", "bridges", "floods"], "Mill": ["wheels", "flour", "wages"], "Fair": ["stalls", "music"]}
SENTENCES = (
    "The mill by the river grinds rye and barley.",
    "Its miller, a well-read man, counts the sacks at dusk!",
    "Who carries them to the town, and by which road?",
    "Nobody knows; they are gone before the sun is up.",
)


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    """Bytes are its tokens; there is no chat template."""
    folder = tmp_path_factory.mktemp("ruler")
    text, qa = folder / "text.txt", folder / "qa.json"
    text.write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    qa.write_text(json.dumps({"data": [_article(*item) for item in SUBJECTS.items()]}), encoding="utf-8")
    return Materials(AutoTokenizer.from_pretrained(save_tiny_chat(folder / "tiny", template=None)), text, qa)


@pytest.fixture
def materials(bytewise: Materials, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Materials:
    return replace(bytewise, tokenizer=smollm2[1])


def _article(title: str, things: list[str]) -> dict:
    """A paragraph for each thing, with a question that has an answer, given twice, and one that has none."""
    paragraphs = []
    for number, thing in enumerate(things):
        answer = f"{title} {thing} {number}"
        answered = {"question": f"Which {thing}?", "answers": [{"text": answer}] * 2, "is_impossible": False}
        impossible = {"question": "Why?", "answers": [], "is_impossible": True}
        context = f"{title}: {' '.join(SENTENCES[: number + 1])} They call it {answer}."
        paragraphs.append({"context": context, "qas": [answered, impossible]})
    return {"title": title, "paragraphs": paragraphs}


def _hidden(example: Example) -> list[tuple[str, str]]:
    """The keys and values of whole needles."""
    return re.findall(r"A secret \w+ of (\S+) is ([\w-]+)\.", example.context)


def test_all_thirteen_are_there() -> None:
    assert len(RULER) == 13
    assert [name for name in RULER if TASKS[name].needs] == ["qa_1", "qa_2"]


@pytest.mark.parametrize("name", RULER)
def test_examples_have_the_length_asked_for_and_answers_that_score(name: str, materials: Materials) -> None:
    for length in (1024, 2048, 4096, *([8192] if name in ("niah_multikey_3", "cwe", "qa_1") else [])):
        example = TASKS[name].example(materials, length, seed=1, number=0)
        assert 0.98 * length <= example.room(materials.tokenizer) <= length
        (turn,) = example.turns
        right = " ".join(turn.references)
        assert METRICS[turn.metric](right, turn.references) == 1
        assert METRICS[turn.metric]("", turn.references) == 0
        assert len(materials.tokenizer(right).input_ids) <= turn.most
        assert all(reference in example.context for reference in turn.references)


# They do not depend on the order of sets either, which differs between processes.
@pytest.mark.parametrize(("name", "digest"), DIGESTS.items())
def test_examples_stay_what_they_were(name: str, digest: str, bytewise: Materials) -> None:
    example = TASKS[name].example(bytewise, 3000, seed=0, number=0)
    assert hashlib.sha256(repr(example).encode()).hexdigest()[:12] == digest


def test_other_numbers_and_seeds_are_other_examples(bytewise: Materials) -> None:
    for name in RULER:
        examples = [TASKS[name].example(bytewise, 3000, seed, number) for seed, number in ((0, 0), (0, 1), (1, 0))]
        assert len({example.context for example in examples}) == 3


@pytest.mark.parametrize("name", RULER)
def test_too_few_tokens_are_refused(name: str, bytewise: Materials) -> None:
    with pytest.raises(Unsupported, match="64 tokens are too few"):
        TASKS[name].example(bytewise, 64, seed=0, number=0)


@pytest.mark.parametrize("name", NEEDLES)
def test_what_needles_say_is_said_once(name: str, bytewise: Materials) -> None:
    example = TASKS[name].example(bytewise, 3000, seed=2, number=0)
    hidden, (turn,) = _hidden(example), example.turns
    keys, values = Counter(key for key, _ in hidden), Counter(value for _, value in hidden)
    assert set(keys.values()) == {4 if name == "niah_multivalue" else 1}
    assert set(values.values()) == {1}
    asked = [(key, value) for key, value in hidden if key in turn.question]
    assert {value for _, value in asked} == set(turn.references)
    assert all(key in turn.prefix for key, _ in asked)


def test_needles_are_as_many_as_in_ruler(bytewise: Materials) -> None:
    examples = {name: TASKS[name].example(bytewise, 3000, seed=2, number=0) for name in NEEDLES}
    hidden = {name: len(_hidden(example)) for name, example in examples.items()}
    assert hidden.pop("niah_multikey_2") > 20
    assert hidden.pop("niah_multikey_3") > 20
    assert list(hidden.values()) == [1, 1, 1, 4, 4, 4]
    assert [len(example.turns[0].references) for example in examples.values()] == [1] * 6 + [4] * 2


def test_depths_are_uniform(bytewise: Materials) -> None:
    bins = [0] * 10
    for number in range(60):
        text = TASKS["niah_multiquery"].example(bytewise, 2500, seed=0, number=number).context.partition("\n\n")[2]
        *before, last = re.split(r"A secret .*?\.", text)
        lengths = list(accumulate(map(len, before)))
        for place in lengths:
            bins[10 * place // (lengths[-1] + len(last) + 1)] += 1
    assert sum(bins) == 240
    assert chisquare(bins).pvalue > 0.01


def test_needles_stand_between_sentences_in_the_order_of_their_depths() -> None:
    text = haystack.pieces(" One two. Three four. Five six.")
    assert haystack.hide([" B.", " C.", " A."], [0.6, 0.7, 0.1], text, 9) == "One two. A. Three four. B. C. Five six."
    assert haystack.hide([" A."], [0.9], text, 0) == "A."
    assert haystack.hide([" A."], [0.5], text, 11) == "One two. Three four. A. Five six. One two"


def test_pieces_are_the_text_and_small() -> None:
    text = " A well-read millwright's 0cab8062-e58f-4872-a2b1-77e62379a865.\n\nEnd…"
    assert "".join(haystack.pieces(text)) == text
    assert max(len(piece.strip()) for piece in haystack.pieces(text)) == 8


def test_a_text_without_words_is_refused(bytewise: Materials, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n", encoding="utf-8")
    with pytest.raises(KvarnError, match=r"empty.txt: there is no text in it"):
        TASKS["niah_single_2"].example(replace(bytewise, text=empty), 2000, seed=0, number=0)


def test_variables_follow_one_another_from_the_value_asked_for(bytewise: Materials) -> None:
    example = TASKS["vt"].example(bytewise, 3000, seed=3, number=0)
    (turn,) = example.turns
    held: dict[str, str] = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", example.context):
        assert name not in held
        held[name] = held.get(value, value)
    asked = re.search(r"\d+", turn.question)[0]
    assert [name for name, value in held.items() if value == asked] == list(turn.references)
    assert len(turn.references) == 5
    (shown,) = set(held.values()) - {asked}
    worked = example.context.partition("Answer: ")[2].split("\n")[0]
    assert worked.split()[-5:] == [name for name, value in held.items() if value == shown]


@pytest.mark.parametrize(
    ("length", "often", "seldom", "shown_often", "shown_seldom"), [(2048, 6, 1, 3, 1), (4096, 30, 3, 10, 3)]
)
def test_common_words_are_common(
    length: int, often: int, seldom: int, shown_often: int, shown_seldom: int, materials: Materials
) -> None:
    example = TASKS["cwe"].example(materials, length, seed=0, number=0)
    shown, real = (
        Counter(re.findall(r"\d+\. (\S+)", line)) for line in example.context.splitlines() if line.startswith("1. ")
    )
    assert {word for word, count in real.items() if count == often} == set(example.turns[0].references)
    assert Counter(real.values()) == {often: 10, seldom: len(real) - 10}
    assert Counter(shown.values()) == {shown_often: 10, shown_seldom: len(shown) - 10}
    assert not shown.keys() & real.keys()
    worked = example.context.partition("Answer: ")[2].split("\n")[0]
    assert set(re.findall(r"\d\. (\S+)", worked)) == {word for word, count in shown.items() if count == shown_often}


def test_pairs_of_words_follow_where_words_run_out(bytewise: Materials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "vocabulary", lambda: tuple(f"w{number}" for number in range(60)))
    example = TASKS["cwe"].example(bytewise, 8000, seed=0, number=0)
    listed = Counter(re.findall(r"\d+\. (\S+)", example.context.splitlines()[-1]))
    assert any("-" in word for word in listed)
    assert set(listed.values()) == {30, 3}


@pytest.mark.parametrize("length", [1024, 2048])
def test_frequent_words_are_the_most_frequent_but_for_the_dots(length: int, bytewise: Materials) -> None:
    for number in range(5):
        example = TASKS["fwe"].example(bytewise, length, seed=0, number=number)
        ranked = Counter(example.context.partition("\n\n")[2].split()).most_common(5)
        assert ranked[0][0] == "..."
        assert {word for word, _ in ranked[1:4]} == set(example.turns[0].references)
        assert ranked[3][1] > ranked[4][1]


def _documents(example: Example) -> list[str]:
    return re.split(r"\n\nDocument \d+:\n", example.context)[1:]


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_one_document_anywhere_has_the_answer(name: str, bytewise: Materials) -> None:
    places = []
    for number in range(20):
        example = TASKS[name].example(bytewise, 1500, seed=0, number=number)
        (answer,) = example.turns[0].references
        documents = _documents(example)
        (place,) = [place for place, document in enumerate(documents) if answer in document]
        places.append(place / (len(documents) - 1))
    assert min(places) == 0
    assert max(places) == 1
    assert len(set(places)) > 3


def test_other_documents_are_first_of_the_same_article_in_qa_2_alone(bytewise: Materials) -> None:
    first = {"qa_1": set(), "qa_2": set()}
    for name, same in first.items():
        for number in range(10):
            example = TASKS[name].example(bytewise, 1500, seed=0, number=number)
            (answer,) = example.turns[0].references
            title = answer.split()[0]
            others = [document for document in _documents(example) if answer not in document]
            relatives = [document.startswith(title) for document in others]
            same.add(sum(relatives[: len(SUBJECTS[title]) - 1]) == len(SUBJECTS[title]) - 1)
            assert not all(relatives)
    assert first == {"qa_1": {False}, "qa_2": {True}}


def test_only_questions_with_an_answer_are_read(bytewise: Materials) -> None:
    articles, questions = read_squad(bytewise.qa)
    assert [len(article) for article in articles] == [3, 3, 2]
    assert {question.text for question in questions} == {
        f"Which {thing}?" for things in SUBJECTS.values() for thing in things
    }
    assert all(len(question.answers) == 1 for question in questions)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not in SQuAD's format"),
        ('{"questions": []}', "not in SQuAD's format"),
        ('{"data": []}', "no question has an answer"),
        (json.dumps({"data": [_article("Inn", ["beds"])]}), "two paragraphs"),
    ],
)
def test_a_file_that_cannot_serve_is_refused(content: str, says: str, bytewise: Materials, tmp_path: Path) -> None:
    path = tmp_path / "qa.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(KvarnError, match=rf"qa\.json: .*{says}"):
        TASKS["qa_1"].example(replace(bytewise, qa=path), 2000, seed=0, number=0)


def test_questions_need_a_file(bytewise: Materials) -> None:
    with pytest.raises(Unsupported, match="give its path"):
        TASKS["qa_1"].example(replace(bytewise, qa=None), 2000, seed=0, number=0)
