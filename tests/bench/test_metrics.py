import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics.functional.text import squad

from kvarn.bench.metrics import METRICS, final_number, first_number, multiple_choice

words = st.lists(st.text(string.ascii_lowercase, min_size=2, max_size=6), min_size=1, max_size=8).map(" ".join)
# A reference of each metric, as tasks write them.
GOLD = {
    "multiple_choice": st.sets(st.sampled_from("ABCDEFGH"), min_size=1).map(lambda options: "".join(sorted(options))),
    "final_number": st.integers().map(str),
    "first_number": st.integers().map(str),
    "numbers_right": st.integers(0, 99).map(lambda number: f"Paragraph {number}"),
}


def _score(metric: str, answer: str, *references: str) -> float:
    return METRICS[metric](answer, references)


def _gold(metric: str) -> st.SearchStrategy[str]:
    return GOLD.get(metric, words.filter(lambda text: set(text.split()) - {"an", "the"}))


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=20)
@given(data=st.data())
def test_the_right_answer_scores_1_and_none_scores_0(metric: str, data: st.DataObject) -> None:
    reference = data.draw(_gold(metric))
    assert _score(metric, reference, reference) == pytest.approx(1)
    assert _score(metric, "", reference) == 0


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=20)
@given(data=st.data(), answer=st.text() | words)
def test_scores_are_from_0_to_1_whatever_the_answer(metric: str, data: st.DataObject, answer: str) -> None:
    references = data.draw(st.lists(_gold(metric), min_size=1, max_size=3))
    assert 0 <= _score(metric, answer, *references) <= 1


# Every reference counts in contains_all, and but the first are wrong in classification.
@pytest.mark.parametrize(
    "metric", [name for name in METRICS if not name.startswith(("contains_all", "classification"))]
)
@settings(max_examples=20)
@given(data=st.data())
def test_another_right_answer_never_lowers_the_score(metric: str, data: st.DataObject) -> None:
    answer, reference, other = (data.draw(_gold(metric)) for _ in range(3))
    assert _score(metric, answer, reference, other) >= _score(metric, answer, reference)


@pytest.mark.parametrize("metric", ["exact_match", "f1", "rouge_l"])
@given(one=words, other=words)
def test_word_metrics_are_symmetric(metric: str, one: str, other: str) -> None:
    assert _score(metric, one, other) == pytest.approx(_score(metric, other, one))


@given(answer=words, references=st.lists(words, min_size=1, max_size=3))
def test_word_metrics_are_their_libraries(answer: str, references: list[str]) -> None:
    target = {"answers": {"answer_start": [0] * len(references), "text": references}, "id": "x"}
    expected = squad([{"prediction_text": answer, "id": "x"}], [target])
    assert _score("exact_match", answer, *references) == pytest.approx(float(expected["exact_match"]) / 100)
    assert _score("f1", answer, *references) == pytest.approx(float(expected["f1"]) / 100)
    scorer = RougeScorer(["rougeL"])
    best = max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)
    assert _score("rouge_l", answer, *references) == pytest.approx(best)
    best = max(fuzz.ratio(answer, reference) for reference in references)
    assert _score("code_similarity", answer, *references) == pytest.approx(best / 100)


@pytest.mark.parametrize(
    ("metric", "answer", "references", "score"),
    [
        ("contains_all", "It is Alpha and gamma.", ("alpha", "beta", "gamma", "delta"), 0.5),
        ("contains_any", "It is ALPHA.", ("alpha", "beta"), 1),
        ("contains_any", "It is epsilon.", ("alpha", "beta"), 0),
        ("contains_listed", "only xa", ("XA, XB, XC, XD",), 0.25),
        ("contains_listed", "XE", ("XA, XB", "XE, XF"), 0.5),
        ("exact_match", "The  Eiffel-Tower!", ("eiffeltower",), 1),
        ("exact_match", "the Eiffel tower in Paris", ("Eiffel tower",), 0),
        ("f1", "a cat sat", ("the cat",), 2 / 3),  # one of two words right, the only one found
        ("f1", "dog", ("cat", "big dog"), 2 / 3),
        ("f1_first_line", "\ncat\ndog dog dog", ("cat",), 1),
        ("rouge_l", "police kill the gunman", ("police killed the gunman",), 0.75),
        ("rouge_l", "the gunman kill police", ("police killed the gunman",), 0.5),
        ("rouge_l_first_line", "police killed the gunman\nand more", ("police killed the gunman",), 1),
        ("classification", "Type: Date", ("Date", "City", "Food"), 1),
        ("classification", "Date or City", ("Date", "City", "Food"), 0.5),
        ("classification", "City", ("Date", "City", "Food"), 0),
        ("classification", "Other number", ("Other number", "number", "Date"), 1),
        ("classification", "number", ("Other number", "number", "Date"), 0),
        ("classification_first_line", "Date\nCity", ("Date", "City"), 1),
        ("code_similarity", "```python\n# a comment\nreturn x\nreturn y", ("return x",), 1),
        ("code_similarity", "// only a comment", ("return x",), 0),
        ("code_similarity", "abcd", ("abxd",), 0.75),
        ("numbers_right", "Paragraph 7", ("Paragraph 7",), 1),
        ("numbers_right", "7 or 8", ("Paragraph 7",), 0.5),
        ("numbers_right", "There are 17.", ("7",), 0),
        ("final_number", "6 * 7 = 42\n#### 42", ("42",), 1),
        ("final_number", "#### 42. Is it 7?", ("42",), 0),
        ("final_number", "42 of the 50", ("42",), 0),
        ("first_number", "42 of the 50", ("42",), 1),
        ("first_number", "2 is 42", ("42",), 0),
    ],
)
def test_scores_made_by_hand(metric: str, answer: str, references: tuple[str, ...], score: float) -> None:
    assert _score(metric, answer, *references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(B) They were tired", "B"),
        ("B They were tired", "B"),
        ("**B**", "B"),
        ("The answer is B.", "B"),
        ("Answer: (B)", "B"),
        ("A and C are wrong; the answer is B", "B"),
        ("The correct option is\n\nB", "B"),
        ("I think that it must be B", "B"),
        ("Because of this (B) holds", "B"),
        ("A", "A"),
        ("A.", "A"),
        ("A They were tired", "A"),
        ("A is right", "A"),
        ("A good reason is (B)", "B"),
        ("A, B and D", "ABD"),
        ("(A)(C)", "AC"),
        ("ABD", "ABD"),
    ],
)
def test_options_are_found(answer: str, options: str) -> None:
    assert multiple_choice(answer, [options]) == 1
    assert multiple_choice(answer, ["H", options]) == 1
    assert multiple_choice(answer, ["H"]) == 0


@pytest.mark.parametrize("answer", ["A good reason", "Because", "BAD idea", "D'Artagnan", "I do not know", "a dog"])
def test_words_are_no_options(answer: str) -> None:
    assert [option for option in "ABCDEFGH" if multiple_choice(answer, [option])] == []


def test_one_of_two_options_is_not_enough_and_three_are_too_many() -> None:
    assert [multiple_choice(answer, ["AC"]) for answer in ("A", "A, C", "A, B, C")] == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-3", "-3"),
        ("x = -3", "-3"),
        ("(−3)", "-3"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("5-3", "3"),
        ("f(x)-3", "3"),
        ("10 - 3", "3"),
        ("$1,450,000.", "1450000"),
        ("1,2,3", "3"),
        ("3.50", "3.5"),
        ("$.50", "0.5"),
        ("42.0", "42"),
        ("20%", "20"),
        ("It is 42.", "42"),
    ],
)
def test_numbers_are_read(text: str, number: str) -> None:
    assert final_number(text, [number]) == 1
    assert final_number(f"1 and {text}", [number]) == 1
    assert final_number(text, [f"{number}1"]) == 0
    assert final_number(f"{text}\n#### 7", [number]) == 0


@given(st.integers(), st.integers())
def test_numbers_with_commas_are_the_same(number: int, other: int) -> None:
    assert first_number(f"{number:,} or {other}", [str(number)]) == 1
    assert final_number(f"{number} or {other:,}", [str(other)]) == 1


def test_a_worked_reference_counts_as_its_final_number() -> None:
    assert final_number("so 42", ["6 * 7 = 42\n#### 42"]) == 1
    assert final_number("6", ["6 * 7 = 42\n#### 42"]) == 0
