"""RULER's question answering (arXiv 2404.06654): one paragraph has the answer, many others do not.

Both tasks are made from one file in the format of SQuAD v2 (arXiv 1806.03822), without its unanswerable questions.
qa_2 is not RULER's, whose questions, from HotpotQA, need two paragraphs each: here the other paragraphs are those of
the same article, which are harder to tell from the one with the answer than those from all over the file in qa_1.
"""

import json
import random
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

from ...errors import KvarnError, Unsupported
from .. import texts
from .base import Example, Materials, Task, Turn, fit
from .haystack import pieces

_ASK = "Answer the question from the documents {}. Give the answer alone, without any other words."


@dataclass(frozen=True)
class Question:
    """``article``: the number of the article that it is about; ``paragraph``: the one with the answers."""

    article: int
    paragraph: str
    text: str
    answers: tuple[str, ...]


def answer_question(materials: Materials, length: int, rng: random.Random, *, same_article: bool) -> Example:
    """A question about one of many paragraphs, which stands at a random place. The last of the others is cut where the
    room ends; when the file has no more, they come again. ``same_article``: those of the question's own article come
    first. Questions are passed over whose paragraph has more characters than ``length`` has tokens."""
    if materials.qa is None:
        raise Unsupported("this task needs a file of questions in SQuAD's format; give its path")
    articles, questions = read_squad(materials.qa)
    short = [question for question in questions if len(question.paragraph) <= length]
    if not short:
        raise Unsupported(f"{length} tokens are too few for the paragraphs of {materials.qa}")
    asked = rng.choice(short)
    others = [
        (same_article and number != asked.article, rng.random(), paragraph)
        for number, article in enumerate(articles)
        for paragraph in article
        if paragraph != asked.paragraph
    ]
    if not others:
        raise KvarnError(f"{materials.qa}: there must be two paragraphs at least")
    distractors = [paragraph for *_, paragraph in sorted(others)]
    depth = rng.random()
    turn = Turn(
        f"{_ASK.format('above')}\n\nQuestion: {asked.text}", asked.answers, "contains_any", most=32, prefix="Answer:"
    )

    def build(size: int) -> Example:
        documents = _first(distractors, size)
        documents.insert(int(depth * (len(documents) + 1)), asked.paragraph)
        numbered = [f"Document {number}:\n{document}" for number, document in enumerate(documents, 1)]
        return Example("\n\n".join([_ASK.format("below"), *numbered]), (turn,))

    return fit(build, length, materials)


def _first(paragraphs: list[str], size: int) -> list[str]:
    """The first ``size`` pieces of the paragraphs, again and again."""
    taken = []
    source = map(pieces, cycle(paragraphs))
    while size > 0:
        paragraph = next(source)
        taken.append("".join(paragraph[:size]).strip())
        size -= len(paragraph)
    return taken


def read_squad(path: Path) -> tuple[list[list[str]], list[Question]]:
    """Each article's paragraphs, and all questions that have an answer. Raises KvarnError where the file is not in
    SQuAD's format or has none."""
    try:
        data = json.loads(texts.read(path))["data"]
        articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in data]
        questions = [
            Question(number, paragraph["context"], asked["question"], tuple(dict.fromkeys(_answers(asked))))
            for number, article in enumerate(data)
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
            if _answers(asked)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise KvarnError(f"{path}: not in SQuAD's format ({type(error).__name__}: {error})") from error
    if not questions:
        raise KvarnError(f"{path}: no question has an answer")
    return articles, questions


def _answers(asked: dict) -> list[str]:
    return [] if asked.get("is_impossible") else [answer["text"] for answer in asked["answers"]]


TASKS = (
    Task("qa_1", "ruler", partial(answer_question, same_article=False), needs=("qa",)),
    Task("qa_2", "ruler", partial(answer_question, same_article=True), needs=("qa",)),
)
