"""How far a subject's predictions are from the full cache's, and how well it predicts a real text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .cases import STEP_WEIGHT, Measure, opened, row
from .records import Record
from .subjects import Session, Subject

Source = Literal["text", "chat"]


@dataclass(frozen=True)
class Continuation:
    """What the full cache wrote after a prompt: ``tokens`` [n + 1], and its log-probabilities [n, vocabulary] after
    each of them but the last."""

    tokens: list[int]
    predictions: Tensor


@dataclass(frozen=True)
class Fidelity:
    """The full cache continues a prompt greedily; the subject is given that continuation token by token.

    The prediction from the prompt alone is left out: prompts are attended to exactly and compressed afterwards.
    """

    full: Subject
    source: Source
    number: int
    length: int
    prompt: Sequence[int]
    positions: int
    ends: frozenset[int]
    kind: str = "fidelity"

    @property
    def key(self) -> str:
        return f"fidelity/{self.source}/{self.length}/{self.number}"

    @property
    def weight(self) -> int:
        return len(self.prompt) + STEP_WEIGHT * self.positions

    def prepared(self) -> Measure:
        return partial(self._measure, self._continuation())

    def _continuation(self) -> Continuation:
        """Ends with the model's own end of an answer, but never before the first position."""
        predictions: list[Tensor] = []
        with opened(self.full) as session:
            tokens = [int(session.read(row(self.prompt)).argmax())]
            while len(predictions) < self.positions and not (predictions and tokens[-1] in self.ends):
                predictions += predicted(session, tokens[-1:])
                tokens.append(int(predictions[-1].argmax()))
        return Continuation(tokens, torch.stack(predictions))

    def _measure(self, full: Continuation, subject: Subject) -> Record:
        """Lists with one number a position: ``kl``, KL(full ‖ subject) in nats; ``top1``, whether both think the same
        token likeliest; ``rank`` of the full cache's token among the subject's, from 1; ``nll_change`` in nats."""
        numbers: dict[str, list[float]] = {"kl": [], "top1": [], "rank": [], "nll_change": []}
        with opened(subject) as session:
            session.read(row(self.prompt))
            held = session.held()
            given, targets = full.tokens[:-1], full.tokens[1:]
            for own, reference, target in zip(predicted(session, given), full.predictions, targets, strict=True):
                for name, number in compared(reference.to(own.device), own, target).items():
                    numbers[name].append(number)
        return {"source": self.source, **numbers, "held": held.to_dict()}


def compared(full: Tensor, own: Tensor, target: int) -> dict[str, float]:
    """Two log-probabilities [vocabulary] of the same place, where ``target`` is the full cache's token."""
    return {
        "kl": float((full.exp() * (full - own)).sum()),
        "top1": int(own.argmax() == full.argmax()),
        "rank": 1 + int((own > own[target]).sum()),
        "nll_change": float(full[target] - own[target]),
    }


@dataclass(frozen=True)
class Perplexity:
    """A window of a real text: its first tokens are the prompt, the others are given one by one and predicted."""

    number: int
    length: int
    prompt: Sequence[int]
    following: Sequence[int]
    kind: str = "perplexity"

    @property
    def key(self) -> str:
        return f"perplexity/{self.length}/{self.number}"

    @property
    def weight(self) -> int:
        return len(self.prompt) + STEP_WEIGHT * len(self.following)

    def prepared(self) -> Measure:
        return self._measure

    def _measure(self, subject: Subject) -> Record:
        """``nll``: in nats, of each token of the text after the first that follows the prompt."""
        with opened(subject) as session:
            session.read(row(self.prompt))
            held = session.held()
            given, targets = self.following[:-1], self.following[1:]
            nll = [-float(own[token]) for own, token in zip(predicted(session, given), targets, strict=True)]
        return {"nll": nll, "held": held.to_dict()}


def predicted(session: Session, tokens: Sequence[int]) -> Iterator[Tensor]:
    """The log-probabilities [vocabulary] after each of ``tokens``, which are read one by one."""
    for token in tokens:
        yield session.read(row([token]))[0].float().log_softmax(-1)
