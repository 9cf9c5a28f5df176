"""How answers are scored: METRICS maps a name to ``metric(answer, references) -> score from 0 to 1``.

There is at least one reference. Where not said otherwise, each is a right answer and the best match counts.
"""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

from rapidfuzz import fuzz
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics.functional.text import squad

Metric = Callable[[str, Sequence[str]], float]

_ROUGE_L = RougeScorer(["rougeL"])

# A minus that follows a digit, a letter or a bracket is a subtraction or a hyphen; commas stand between thousands.
_NUMBER = re.compile(r"((?<![\w)])[-−])?[$€£]?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(\.\d+)?(?<=\d)")

# One option or several written together ("ABD"), in order as nobody spells a word. An "A" before a word in small
# letters is an article ("A good reason"), unless that word goes on about option A.
_OPTION = r"(?<![\w'’])\(?(?=[A-H])(?!A\s+(?!and\b|or\b|is\b|because\b|since\b|as\b)[a-z])A?B?C?D?E?F?G?H?\)?(?![\w'’])"
_OPTIONS = rf"{_OPTION}(?:(?:\s*,)?(?:\s*&|\s*\band)?\s*{_OPTION})*"
_CHOICES = (
    rf"\b(?i:answers?|options?|choices?)(?:\s+(?i:is|are))?[\s:*]*({_OPTIONS})",
    rf"\A[\s*]*({_OPTIONS})",
    r"(\([A-H]\))",
    rf"({_OPTIONS})",
)


def contains_all(answer: str, references: Sequence[str]) -> float:
    """The share of references that the answer contains, whatever their case (RULER's string_match_all)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def contains_any(answer: str, references: Sequence[str]) -> float:
    """Whether the answer contains one of the references, whatever its case (RULER's string_match_part)."""
    return float(any(reference.lower() in answer.lower() for reference in references))


def contains_listed(answer: str, references: Sequence[str]) -> float:
    """The share of names that the answer contains, whatever their case. A reference lists them: "X, Y, Z"."""
    return max(contains_all(answer, reference.split(", ")) for reference in references)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Whether the answer is a reference, up to case, punctuation, articles and blanks (SQuAD, arXiv 1606.05250)."""
    return _squad(answer, references)["exact_match"]


def f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the words in common with a reference, normalised as in ``exact_match`` (SQuAD, arXiv 1606.05250)."""
    return _squad(answer, references)["f1"]


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, without stemming."""
    return _ROUGE_L.score_multi(references, answer)["rougeL"].fmeasure


def multiple_choice(answer: str, references: Sequence[str]) -> float:
    """Whether the answer chooses the options (letters A to H) that the reference names, no more and no fewer.

    They are looked for after "answer", "option" or "choice", then at the beginning, in brackets, anywhere.
    """
    chosen = _options(answer)
    return float(bool(chosen) and any(chosen == _options(reference) for reference in references))


def final_number(answer: str, references: Sequence[str]) -> float:
    """Whether the last number of the answer is that of a reference: GSM8K's rule (arXiv 2110.14168), whose worked
    answers end with "#### 42". Thousands may have commas; a number after "####" counts before any other."""
    return _same_number(answer.rpartition("####")[2], references, -1)


def first_number(answer: str, references: Sequence[str]) -> float:
    """Whether the first number of the answer is that of a reference."""
    return _same_number(answer, references, 0)


def classification(answer: str, references: Sequence[str]) -> float:
    """The first reference is the right class, the others are the wrong ones: 1 / the number of classes that the
    answer contains, if the right one is among them. Classes whose names are part of the right one do not count
    (LongBench's classification_score, arXiv 2308.14508)."""
    right, *others = references
    wrong = [other for other in others if other not in right]
    return 1 / (1 + sum(other in answer for other in wrong)) if right in answer else 0.0


def code_similarity(answer: str, references: Sequence[str]) -> float:
    """Edit similarity of the first line of code: without a backtick, "#" or "//" (LongBench's code_sim_score)."""
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search(r"`|#|//", line)), "")
    return max(fuzz.ratio(code, reference) for reference in references) / 100


def numbers_right(answer: str, references: Sequence[str]) -> float:
    """The share of the answer's numbers that are a reference's, as in "7" or "Paragraph 7" (LongBench's count_score
    and retrieval_score)."""
    given = re.findall(r"\d+", answer)
    right = {number for reference in references for number in re.findall(r"\d+", reference)[:1]}
    return sum(number in right for number in given) / len(given) if given else 0.0


def on_first_line(metric: Metric) -> Metric:
    """The metric of the answer's first line, for prompts of examples that a model may go on writing."""
    return lambda answer, references: metric(answer.lstrip("\n").partition("\n")[0], references)


METRICS: dict[str, Metric] = {
    "contains_all": contains_all,
    "contains_any": contains_any,
    "contains_listed": contains_listed,
    "exact_match": exact_match,
    "f1": f1,
    "f1_first_line": on_first_line(f1),
    "rouge_l": rouge_l,
    "rouge_l_first_line": on_first_line(rouge_l),
    "multiple_choice": multiple_choice,
    "final_number": final_number,
    "first_number": first_number,
    "classification": classification,
    "classification_first_line": on_first_line(classification),
    "code_similarity": code_similarity,
    "numbers_right": numbers_right,
}


def _squad(answer: str, references: Sequence[str]) -> dict[str, float]:
    answers: dict[str, list[str] | list[int]] = {"answer_start": [0] * len(references), "text": list(references)}
    scores = squad([{"prediction_text": answer, "id": "0"}], [{"answers": answers, "id": "0"}])
    return {name: float(score) / 100 for name, score in scores.items()}


def _options(text: str) -> set[str]:
    if re.fullmatch(r"\W*[a-h]\W*", text):
        text = text.upper()
    found = next((match for pattern in _CHOICES if (match := re.search(pattern, text))), None)
    return set(re.findall("[A-H]", found[1])) if found else set()


def _same_number(text: str, references: Sequence[str], place: int) -> float:
    numbers = _numbers(text)
    right = {number for reference in references for number in _numbers(reference.rpartition("####")[2])[-1:]}
    return float(bool(numbers) and numbers[place] in right)


def _numbers(text: str) -> list[Decimal]:
    parts = (match.groups(default="") for match in _NUMBER.finditer(text) if match[2] or match[3])
    return [Decimal(f"{'-' if minus else ''}{whole.replace(',', '') or '0'}{part}") for minus, whole, part in parts]
