"""What a task is: examples made from a seed, with questions, right answers and a metric."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from ...errors import Unsupported
from .. import texts
from ..prompts import Prompt

# When the context is compressed: together with its question, before any question is known, in a conversation (once,
# before its first question), or once for several requests that know nothing of each other.
Setting = Literal["aware", "agnostic", "multi-turn", "multi-request"]


@dataclass(frozen=True)
class Turn:
    """A question and its right answers. ``metric``: a name in ``metrics.METRICS``, which says how ``references``
    count. ``most``: tokens that an answer may have. ``prefix``: how the answer begins; the model is given it."""

    question: str
    references: tuple[str, ...]
    metric: str
    most: int
    prefix: str = ""


@dataclass(frozen=True)
class Example:
    """A context and what is asked about it, in order."""

    context: str
    turns: tuple[Turn, ...]

    def prompt(self, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The example in a model's tokens."""
        return Prompt.of(
            tokenizer,
            self.context,
            [(turn.question, turn.prefix) for turn in self.turns],
            [turn.references[0] if turn.references else "" for turn in self.turns],
        )

    def room(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens of the whole conversation: context, questions and the longest answers."""
        prompt = self.prompt(tokenizer)
        return len(prompt.context) + sum(map(len, prompt.turns)) + sum(turn.most for turn in self.turns)


@dataclass(frozen=True)
class Materials:
    """What examples are made from. ``text``: a file with the prose that hides needles; None: Python's language
    reference. ``qa``: questions in SQuAD's format; ``gsm8k``: problems in GSM8K's."""

    tokenizer: PreTrainedTokenizerBase
    text: Path | None = None
    qa: Path | None = None
    gsm8k: Path | None = None

    @cached_property
    def prose(self) -> str:
        return texts.read(self.text)


@dataclass(frozen=True)
class Task:
    """A source of examples. ``make(materials, length, rng)`` gives one whose ``room`` is within 2 % below ``length``
    tokens; it is a pure function of what it is given. ``needs``: the fields of Materials that must be there.
    ``count``: how many examples there are; None: as many as one asks for."""

    name: str
    group: str
    make: Callable[[Materials, int, random.Random], Example]
    settings: tuple[Setting, ...] = ("aware", "agnostic")
    needs: tuple[str, ...] = ()
    count: int | None = None

    def example(self, materials: Materials, length: int, seed: int, number: int) -> Example:
        """Example ``number`` of ``length`` tokens; the same for the same arguments."""
        return self.make(materials, length, random.Random(f"{seed}/{self.name}/{length}/{number}"))


def fit(build: Callable[[int], Example], length: int, materials: Materials) -> Example:
    """The example of the largest size whose room is at most ``length``. ``build(size)`` must grow with ``size`` from
    0, which is the least. Raises Unsupported where the least is too long."""

    def room(size: int) -> int:
        return build(size).room(materials.tokenizer)

    low, low_room, high = 0, room(0), 1
    if low_room > length:
        raise Unsupported(f"{length} tokens are too few: the least example of this task takes {low_room}")
    while (high_room := room(high)) <= length:
        low, low_room, high = high, high_room, 2 * high
    while high - low > 1:
        # Room grows about evenly, so that few sizes need to be tried.
        guess = low + (high - low) * (length - low_room) // (high_room - low_room)
        size = min(max(guess, low + 1), high - 1)
        if (size_room := room(size)) <= length:
            low, low_room = size, size_room
        else:
            high, high_room = size, size_room
    return build(low)
