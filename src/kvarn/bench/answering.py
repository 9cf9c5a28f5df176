"""Questions about a context, answered greedily and scored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .cases import STEP_WEIGHT, Measure, opened, row
from .metrics import METRICS
from .prompts import Prompt
from .records import Record
from .subjects import Held, Session, Subject
from .tasks import Example, Materials, Setting, Task, Turn


@dataclass(frozen=True)
class Given:
    """The tokens of an answer, and what was held when the context (with the question, where it was read in the same
    pass) had been read."""

    tokens: list[int]
    held: Held


@dataclass(frozen=True)
class Answering:
    """One example of a task in one setting."""

    task: Task
    setting: Setting
    number: int
    length: int
    seed: int
    materials: Materials
    ends: frozenset[int]
    kind: str = "task"

    @property
    def key(self) -> str:
        return f"task/{self.task.name}/{self.setting}/{self.length}/{self.number}"

    @property
    def weight(self) -> int:
        return self.length + STEP_WEIGHT * 24  # the answers' lengths are not known

    def prepared(self) -> Measure:
        example = self.task.example(self.materials, self.length, self.seed, self.number)
        return partial(self._measure, example, example.prompt(self.materials.tokenizer))

    def _measure(self, example: Example, prompt: Prompt, subject: Subject) -> Record:
        """``score``: the mean over turns; ``turns``: what was asked and answered; ``held`` before the first answer."""
        given = list(_CONVERSATIONS[self.setting](subject, prompt, example.turns, self.ends))
        turns = [
            _scored(self.materials.tokenizer, turn, each.tokens)
            for turn, each in zip(example.turns, given, strict=True)
        ]
        return {
            "task": self.task.name,
            "group": self.task.group,
            "setting": self.setting,
            "number": self.number,
            "score": sum(turn["score"] for turn in turns) / len(turns),
            "turns": turns,
            "held": given[0].held.to_dict(),
        }


def _scored(tokenizer: PreTrainedTokenizerBase, turn: Turn, tokens: list[int]) -> Record:
    answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return {
        "question": turn.question,
        "answer": answer,
        "references": list(turn.references),
        "metric": turn.metric,
        "score": METRICS[turn.metric](answer, turn.references),
        "tokens": len(tokens),
    }


def _aware(subject: Subject, prompt: Prompt, turns: Sequence[Turn], ends: frozenset[int]) -> Iterator[Given]:
    """Each question is read together with the context, in one pass."""
    for asked, turn in zip(prompt.requests, turns, strict=True):
        with opened(subject) as session:
            logits = session.read(row(prompt.context + asked))
            held = session.held()
            yield Given(_answer(session, logits, turn.most, ends), held)


def _requests(subject: Subject, prompt: Prompt, turns: Sequence[Turn], ends: frozenset[int]) -> Iterator[Given]:
    """The context is read once; every question starts from what was kept of it."""
    with opened(subject) as context:
        context.read(row(prompt.context))
        held = context.held()
        for asked, turn in zip(prompt.requests, turns, strict=True):
            session = context.fork()
            try:
                yield Given(_answer(session, session.read(row(asked)), turn.most, ends), held)
            finally:
                session.close()


def _conversation(subject: Subject, prompt: Prompt, turns: Sequence[Turn], ends: frozenset[int]) -> Iterator[Given]:
    """The context is read once, before any question. The next turn follows the right answer, not the model's own,
    so that one mistake does not lead to the next (SCBench, arXiv 2412.10319)."""
    with opened(subject) as session:
        session.read(row(prompt.context))
        held = session.held()
        before: list[int] = []
        for asked, reference, turn in zip(prompt.turns, prompt.references, turns, strict=True):
            logits = session.read(row(before + asked))
            answering = session.fork()
            try:
                yield Given(_answer(answering, logits, turn.most, ends), held)
            finally:
                answering.close()
            before = reference


_CONVERSATIONS = {"aware": _aware, "agnostic": _requests, "multi-request": _requests, "multi-turn": _conversation}


def _answer(session: Session, logits: Tensor, most: int, ends: frozenset[int]) -> list[int]:
    """Greedy tokens up to an end of the model's own or ``most``."""
    tokens: list[int] = []
    token = int(logits.argmax())
    while token not in ends:
        tokens.append(token)
        if len(tokens) == most:
            break
        token = int(session.read(row([token])).argmax())
    return tokens
