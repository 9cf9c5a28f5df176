"""What one measurement is: a case, the same for every subject."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .records import Record
from .subjects import Session, Subject

Measure = Callable[[Subject], Record]  # raises KvarnError where the subject cannot be measured


class Case(Protocol):
    """``key`` names it in results. ``length``: tokens. ``weight``: about what it costs for one subject, in tokens of
    prompt."""

    @property
    def kind(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def weight(self) -> int: ...

    def prepared(self) -> Measure:
        """Does what is done once for all subjects. The result gives the fields that the kind has in records."""


STEP_WEIGHT = 30  # a decoding step costs about as much as this many tokens of a prompt


@contextmanager
def opened(subject: Subject) -> Iterator[Session]:
    """A session that is closed at the end, whatever happens."""
    session = subject.open()
    try:
        yield session
    finally:
        session.close()


def row(tokens: Sequence[int]) -> Tensor:
    """Tokens of one sequence as a session reads them: int64 [1, q]."""
    return torch.tensor([list(tokens)])
