"""Tasks from local files, one JSON object a line, in the formats of LongBench (arXiv 2308.14508), L-Eval (arXiv
2307.11088) and RULER (arXiv 2404.06654).

Metrics and limits of answers are those of each data set; the prompts are our own. Examples come in the file's order.
A context that is too long loses its middle; one that is shorter than asked stays as it is.

Left out: LongBench in Chinese, whose words need a segmenter, and the parts of L-Eval that are judged by people or by a
model (their lines are skipped), compare code, or ask whether a statement is true in fiction and in fact.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...errors import KvarnError, Unsupported
from .. import texts
from .base import Example, Materials, Setting, Task, Turn


@dataclass(frozen=True)
class Line:
    """An object of a file. ``where``: the file and the number of the line, for messages."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """The string in a field; raises KvarnError where there is none."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise KvarnError(f"{self.where}: field {name!r} must be a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """The strings of a field's list; raises KvarnError where it is no list of at least one string."""
        value = self.fields.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise KvarnError(f"{self.where}: field {name!r} must be a list of one string or more")
        return tuple(value)


@dataclass(frozen=True)
class FileTask(Task):
    """The examples of a file: number i is its i-th, whatever the seed. ``make`` draws one at random."""

    examples: tuple[Example, ...] = ()

    def example(self, materials: Materials, length: int, seed: int, number: int) -> Example:
        """Example ``number``, of at most ``length`` tokens; raises KvarnError where the file has no more."""
        if number >= len(self.examples):
            raise KvarnError(f"{self.name} has {len(self.examples)} examples; ask for no more")
        return shortened(self.examples[number], materials.tokenizer, length)


def load(path: Path) -> list[Task]:
    """The tasks of a file, one for each of its data sets. The first line's fields tell the format. Raises KvarnError
    where a line has not the fields of that format, Unsupported for data sets that are left out."""
    lines = list(read_lines(path))
    if not lines:
        raise KvarnError(f"{path}: no examples")
    found = next((read for fields, read in _FORMATS.items() if fields <= lines[0].fields.keys()), None)
    if found is None:
        formats = "; ".join(", ".join(sorted(fields)) for fields in _FORMATS)
        raise KvarnError(f"{lines[0].where}: not a format that is known; their fields are: {formats}")
    return found(path, lines)


def read_lines(path: Path) -> Iterator[Line]:
    """The objects of a file with one JSON object a line; raises KvarnError where there is something else."""
    for number, text in enumerate(texts.read(path).split("\n"), 1):
        where = f"{path}, line {number}"
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise KvarnError(f"{where}: not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise KvarnError(f"{where}: a JSON object was expected")
        yield Line(where, fields)


def shortened(example: Example, tokenizer: PreTrainedTokenizerBase, length: int) -> Example:
    """The example with as much of its context's beginning and end as makes its room at most ``length``."""
    over = example.room(tokenizer) - length
    if over <= 0:
        return example
    tokens = tokenizer(example.context, add_special_tokens=False).input_ids
    most = len(tokens)
    # Where the halves meet, the text can have more tokens than they had.
    while over > 0:
        most -= over
        if most < 2:
            raise Unsupported(f"{length} tokens are too few for the questions and answers of this example")
        cut = replace(example, context=without_middle(tokens, most, tokenizer))
        over = cut.room(tokenizer) - length
    return cut


def without_middle(tokens: list[int], most: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the first and of the last ⌊most / 2⌋ tokens, ``most`` being at least 2."""
    half = most // 2
    return tokenizer.decode(tokens[:half]) + tokenizer.decode(tokens[-half:])


@dataclass(frozen=True)
class _Kind:
    """How a data set asks and scores. ``ask``: what is written around an example's own input."""

    metric: str
    most: int
    ask: str = "{}"


_SHORT = "Answer from the text above, in a few words and with nothing else.\n\nQuestion: {}"
_LAST = "Complete the last of these as the examples above are completed.\n\n{}"
_SUMMARY = "Summarize the text above in one page.{}"
_CODE = "{}\n\nWrite the next line of the code above, and nothing else."

_LONGBENCH = {
    "narrativeqa": _Kind("f1", 128, _SHORT),
    "qasper": _Kind("f1", 128, f"{_SHORT}\n\nThe answer may be yes, no or unanswerable."),
    "multifieldqa_en": _Kind("f1", 64, _SHORT),
    "hotpotqa": _Kind("f1", 32, _SHORT),
    "2wikimqa": _Kind("f1", 32, _SHORT),
    "musique": _Kind("f1", 32, _SHORT),
    "gov_report": _Kind("rouge_l", 512, _SUMMARY),
    "qmsum": _Kind("rouge_l", 512, "Answer from the meeting's transcript above, in a few sentences.\n\nQuestion: {}"),
    "multi_news": _Kind("rouge_l", 512, _SUMMARY),
    "trec": _Kind("classification_first_line", 64, _LAST),
    "triviaqa": _Kind("f1_first_line", 32, _LAST),
    "samsum": _Kind("rouge_l_first_line", 128, _LAST),
    "passage_count": _Kind(
        "numbers_right", 32, "Some of the paragraphs above are repeated. How many different ones are there? Number:{}"
    ),
    "passage_retrieval_en": _Kind(
        "numbers_right", 32, 'Which paragraph above does this summarize? Answer as in "Paragraph 1".\n\n{}'
    ),
    "lcc": _Kind("code_similarity", 64, _CODE),
    "repobench-p": _Kind("code_similarity", 64, _CODE),
}
_CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")

_OPTIONS = _Kind("multiple_choice", 16, "{}\n\nAnswer with the letter of each right option and nothing else.")
_EXACT = _Kind("exact_match", 32)
_LEVAL = {"f1": _Kind("f1", 64, _SHORT), "rouge": _Kind("rouge_l", 512)}
_LEVAL_NUMBER = _Kind("final_number", 256, "{}\n\nThink step by step. End with #### and the number that is the answer.")

_RULER = {
    "niah": _Kind("contains_all", 128),
    "vt": _Kind("contains_all", 30),
    "cwe": _Kind("contains_all", 120),
    "fwe": _Kind("contains_all", 50),
    "qa": _Kind("contains_any", 32),
}


def _longbench(path: Path, lines: list[Line]) -> list[Task]:
    sets: dict[str, list[Example]] = {}
    for line in lines:
        sets.setdefault(line.text("dataset"), []).append(_longbench_example(line))
    return [_task(f"longbench_{name}", "LongBench", examples) for name, examples in sets.items()]


def _longbench_example(line: Line) -> Example:
    name, references = line.text("dataset"), line.texts("answers")
    if name in _CHINESE:
        raise Unsupported(f"{line.where}: {name} is in Chinese, whose words need a segmenter; leave this data set out")
    if name not in _LONGBENCH:
        raise KvarnError(f"{line.where}: no data set {name!r} in LongBench; there are {', '.join(_LONGBENCH)}")
    kind = _LONGBENCH[name]
    if name == "trec":
        right = references[0]
        references = (right, *(other for other in line.texts("all_classes") if other != right))
    turn = Turn(kind.ask.format(line.text("input")), references, kind.metric, kind.most)
    return Example(line.text("context"), (turn,))


def _leval(path: Path, lines: list[Line]) -> list[Task]:
    judged = ("LLM", "human")
    examples = [_leval_example(line) for line in lines if line.text("evaluation") not in judged]
    if not examples:
        raise Unsupported(f"{path}: all answers are judged by people or by a model, which the bench does not do")
    several = any(len(example.turns) > 1 for example in examples)
    settings: tuple[Setting, ...] = ("multi-turn", "multi-request") if several else ("aware", "agnostic")
    return [_task(f"leval_{path.stem.removeprefix('leval_')}", "L-Eval", examples, settings)]


def _leval_example(line: Line) -> Example:
    questions, answers = line.texts("instructions"), line.texts("outputs")
    if len(questions) != len(answers):
        raise KvarnError(f"{line.where}: {len(questions)} in 'instructions', but {len(answers)} in 'outputs'")
    kind, answers = _leval_kind(line, answers)
    pairs = zip(questions, answers, strict=True)
    turns = tuple(Turn(kind.ask.format(question), (answer,), kind.metric, kind.most) for question, answer in pairs)
    return Example(line.text("input"), turns)


def _leval_kind(line: Line, answers: tuple[str, ...]) -> tuple[_Kind, tuple[str, ...]]:
    """How the line's questions are scored, and their answers as that needs them."""
    evaluation, source = line.text("evaluation"), line.text("source").lower()
    if evaluation in _LEVAL:
        return _LEVAL[evaluation], answers
    if evaluation != "exam":
        raise KvarnError(f"{line.where}: no evaluation {evaluation!r} in L-Eval; there are exam, f1, rouge, LLM, human")
    if source.startswith("code") or any("[fact:" in answer for answer in answers):
        raise Unsupported(f"{line.where}: comparing code or true and false in fiction is left out; so is this file")
    letters = [re.match(r"\(?([A-H]+)(?![\w'])", answer) for answer in answers]
    if all(letters):
        return _OPTIONS, tuple(found[1] for found in letters if found)
    return (_LEVAL_NUMBER if source.startswith("gsm") else _EXACT), answers


def _ruler(path: Path, lines: list[Line]) -> list[Task]:
    name, kind = _ruler_kind(path)
    return [_task(f"ruler_{name}", "RULER", [_ruler_example(line, kind) for line in lines])]


def _ruler_kind(path: Path) -> tuple[str, _Kind]:
    """The files do not say which task they are, but lie in a folder or under a name that does."""
    for name in (path.stem, path.resolve().parent.name):
        if (kind := _RULER.get(name.split("_")[0])) is not None:
            return name, kind
    raise KvarnError(f"{path}: name the file or its folder after RULER's task: niah_…, vt, cwe, fwe or qa_…")


def _ruler_example(line: Line, kind: _Kind) -> Example:
    """RULER's input ends with a line that asks."""
    context, found, question = line.text("input").rstrip().rpartition("\n")
    if not found:
        raise KvarnError(f"{line.where}: field 'input' must have the question on a line of its own, the last")
    prefix = line.text("answer_prefix") if "answer_prefix" in line.fields else ""
    return Example(context, (Turn(question, line.texts("outputs"), kind.metric, kind.most, prefix),))


def _task(name: str, group: str, examples: list[Example], settings: tuple[Setting, ...] = Task.settings) -> Task:
    def make(materials: Materials, length: int, rng: random.Random) -> Example:
        return shortened(rng.choice(examples), materials.tokenizer, length)

    return FileTask(name, group, make, settings, count=len(examples), examples=tuple(examples))


_FORMATS: dict[frozenset[str], Callable[[Path, list[Line]], list[Task]]] = {
    frozenset({"input", "context", "answers", "dataset"}): _longbench,
    frozenset({"instructions", "input", "outputs", "evaluation"}): _leval,
    frozenset({"index", "input", "outputs", "length"}): _ruler,
}
