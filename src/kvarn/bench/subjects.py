"""What the bench measures: a cache that reads tokens and predicts, whoever made it.

A subject opens sessions. All systems go through these few calls, so that prompts, decoding and scoring are one code.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..budgets import Budget
from ..cache import Cache

System = Literal["kvarn", "transformers", "kvpress"]


@dataclass(frozen=True)
class Held:
    """What a cache takes, in bytes: now, as a dense cache of the same tokens, and at its peak (None: not known).
    ``entries``: for each layer, the entries of each KV head of the first sequence (None: not known)."""

    bytes: int
    dense_bytes: int
    peak_bytes: int | None
    entries: list[list[int]] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Session(Protocol):
    """One cache in use. ``seconds``: what the last ``read`` took."""

    seconds: float

    def read(self, tokens: Tensor) -> Tensor:
        """Reads ``tokens`` (int64 [B, q], host): logits of what comes next, [B, vocabulary]. Several tokens are a
        prompt, which the system may compress; one token is a decoding step."""

    def fork(self) -> "Session":
        """A second session with the same contents; neither sees what the other reads from now on."""

    def held(self) -> Held:
        """What the cache takes now."""

    def close(self) -> None:
        """Gives its memory back."""


class Subject(Protocol):
    """A system with a configuration. ``label`` names it in results and is its identity there."""

    @property
    def system(self) -> System: ...
    @property
    def name(self) -> str: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def label(self) -> str: ...

    def open(self) -> Session:
        """An empty cache. Raises KvarnError where the configuration cannot be."""


@dataclass(frozen=True)
class KvarnSubject:
    """A recipe under a budget."""

    model: PreTrainedModel
    name: str
    budget: Budget = None
    system: System = "kvarn"

    @property
    def label(self) -> str:
        return label(self.system, self.name, self.budget)

    def open(self) -> "KvarnSession":
        return KvarnSession(self.model, Cache(self.model, self.name, self.budget))


class KvarnSession:
    """A session on a ``kvarn.Cache``."""

    def __init__(self, model: PreTrainedModel, cache: Cache):
        self.model, self.cache, self.seconds = model, cache, 0.0

    def read(self, tokens: Tensor) -> Tensor:
        logits, self.seconds = timed_pass(self.model, self.cache, tokens)
        return logits

    def fork(self) -> "KvarnSession":
        return KvarnSession(self.model, self.cache.fork())

    def held(self) -> Held:
        report = self.cache.report()
        entries = [layer[0] for layer in report.entries]
        return Held(report.bytes, report.dense_bytes, report.peak_bytes, entries)

    def close(self) -> None:
        self.cache.free()


def label(system: System, name: str, budget: Budget) -> str:
    """How results name a subject: ``"snapkv @ 0.25"``, ``"kvpress: SnapKVPress() @ 0.25"``."""
    named = name if system == "kvarn" else f"{system}: {name}"
    return named if budget is None else f"{named} @ {budget}"


@torch.no_grad()
def timed_pass(model: PreTrainedModel, cache: Any, tokens: Tensor) -> tuple[Tensor, float]:
    """One pass of ``tokens`` (int64 [B, q]): the logits of what comes next [B, vocabulary], and its seconds."""
    tokens = tokens.to(model.device)
    start = now(model.device)
    logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return logits, now(model.device) - start


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
