"""Requests on their way through an engine, and what it says of them."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from ..cache import Cache
from .sampling import Logprobs, Sampling
from .text import TextStream

Finish = Literal["end", "stop", "length", "memory"]


@dataclass(frozen=True)
class Event:
    """What a step brought for a request: new ``tokens``, the ``text`` that they add (with a tokenizer), their
    log-probabilities where asked for, and why the answer is ``finished``: "end" (the model's own end token, or one of
    ``stop_tokens``), "stop" (a stop string), "length", or "memory" where the engine cannot hold the sequence."""

    request: int
    tokens: list[int]
    text: str = ""
    logprobs: list[Logprobs] | None = None
    finished: Finish | None = None


@dataclass(frozen=True)
class Output:
    """A whole answer; ``tokens`` include the one that ended it."""

    tokens: list[int]
    text: str
    logprobs: list[Logprobs] | None
    finished: Finish


@dataclass(eq=False)
class Request:
    """A request between ``add`` and its last event.

    ``tokens`` are those of the answer so far; ``read`` and ``fed`` count the tokens of prompt and answer that a cache
    holds. ``cache`` is the request's own, while it is not in the running batch.
    """

    number: int
    prompt: list[int]
    sampling: Sampling
    ends: frozenset[int]
    stream: TextStream | None
    generator: torch.Generator | None
    tokens: list[int] = field(default_factory=list)
    read: int = 0
    fed: int = 0
    cache: Cache | None = None

    @property
    def reading(self) -> bool:
        """Whether its prompt is not in a cache as a whole."""
        return self.read < len(self.prompt)

    @property
    def replays(self) -> bool:
        """Whether tokens of the answer that are known already have still to be fed."""
        return self.fed < len(self.tokens) - 1

    def forget(self) -> None:
        """Drops its cache; prompt and answer will be read again."""
        if self.cache is not None:
            self.cache.free()
        self.cache, self.read, self.fed = None, 0, 0

    def take(self, token: int, logprobs: Logprobs | None) -> Event:
        """Takes the token that was chosen."""
        self.tokens.append(token)
        text = self.stream.push(token) if self.stream else ""
        finished: Finish | None = None
        if token in self.ends:
            finished = "end"
        elif self.stream and self.stream.stopped:
            finished = "stop"
        elif len(self.tokens) == self.sampling.max_tokens:
            finished = "length"
        if finished and self.stream:
            text += self.stream.finish()
            finished = "stop" if self.stream.stopped and finished == "length" else finished
        return Event(self.number, [token], text, None if logprobs is None else [logprobs], finished)
