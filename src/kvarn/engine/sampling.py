"""How the next token is chosen, for all sequences of a batch at once.

Shapes: B sequences, V tokens in the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import Refused


@dataclass(frozen=True)
class Sampling:
    """What a request asks for.

    ``max_tokens``: the most tokens of an answer. ``temperature`` 0 is greedy. Else a token is drawn from
    softmax(logits / temperature), first cut to the ``top_k`` most likely tokens (0: all), then to the likeliest that
    together have ``top_p``, then to those with at least ``min_p`` times the probability of the likeliest; the order and
    the arithmetic are those of transformers. ``repetition_penalty`` divides positive logits of tokens of prompt and
    answer, and multiplies negative ones (arXiv 1909.05858); ``presence_penalty`` is taken from the logits of the
    answer's tokens once, ``frequency_penalty`` as often as they occur. ``seed``: of the request's own random numbers
    (None: any). An answer ends with one of ``stop_tokens``, with the model's own end tokens unless ``ignore_end``, or
    before any of the strings ``stop``. ``logprobs``: of each token, and of so many of the likeliest beside it (None: no
    log-probabilities); they are those of the model's logits, before anything above.

    Raises Refused for values out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_end: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        wrong = {
            f"max_tokens={self.max_tokens}: at least 1": self.max_tokens < 1,
            f"temperature={self.temperature}: 0 or more": not 0 <= self.temperature < float("inf"),
            f"top_k={self.top_k}: 0 or more": self.top_k < 0,
            f"top_p={self.top_p}: above 0 and at most 1": not 0 < self.top_p <= 1,
            f"min_p={self.min_p}: from 0 to 1": not 0 <= self.min_p <= 1,
            f"repetition_penalty={self.repetition_penalty}: above 0": not 0 < self.repetition_penalty < float("inf"),
            f"logprobs={self.logprobs}: 0 or more": self.logprobs is not None and self.logprobs < 0,
            f"stop={self.stop!r}: a tuple of strings that are not empty": type(self.stop) is not tuple
            or not all(self.stop),
        }
        for reason, applies in wrong.items():
            if applies:
                raise Refused(f"sampling parameters out of range: {reason}")

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of one token of an answer, and of the likeliest ``top`` at its place."""

    token: float
    top: dict[int, float]


class Sampled(Protocol):
    """A sequence that tokens are chosen for; ``generator`` is on the device of the logits."""

    sampling: Sampling
    prompt: list[int]
    tokens: list[int]
    generator: torch.Generator | None


class Sampler:
    """Chooses tokens for some sequences again and again; made anew when others come or go."""

    def __init__(self, sequences: Sequence[Sampled], vocabulary: int, device: torch.device):
        self._sequences = sequences
        each = [sequence.sampling for sequence in sequences]

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self._drawn = [row for row, s in enumerate(each) if s.temperature > 0]
        self._logprobs = max((s.logprobs for s in each if s.logprobs is not None), default=None)
        self._greedy = column([s.temperature == 0 for s in each]).bool()
        self._temperature = column([s.temperature or 1.0 for s in each])
        drawn = [each[row] for row in self._drawn]
        self._top_k = column([s.top_k or vocabulary for s in each]).long().clamp(max=vocabulary)
        self._top_p, self._min_p = column([s.top_p for s in each]), column([s.min_p for s in each])
        self._sorts = any(s.top_k or s.top_p < 1 for s in drawn)
        self._least = any(s.min_p for s in drawn)
        self._penalties = None
        if any(s.penalizes for s in each):
            names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
            self._penalties = [column([getattr(s, name) for s in each]) for name in names]
            self._seen = torch.zeros((len(each), vocabulary), dtype=torch.bool, device=device)
            self._counts = torch.zeros((len(each), vocabulary), dtype=torch.float32, device=device)
            for row, sequence in enumerate(sequences):
                if sequence.sampling.penalizes:
                    answer = torch.tensor(sequence.tokens, dtype=torch.int64, device=device)
                    self._seen[row, torch.tensor(sequence.prompt, device=device)] = True
                    self._counts[row].index_add_(0, answer, torch.ones_like(answer, dtype=torch.float32))

    def __call__(self, logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Logits [B, V] -> tokens (int64 [B], on the device), and what ``logprobs_of`` takes, where asked for."""
        if not self._drawn and not self._penalties and self._logprobs is None:
            return logits.argmax(-1), None
        logits = logits.float()
        scores = self._penalized(logits) if self._penalties else logits
        tokens = scores.argmax(-1)
        if self._drawn:
            tokens = torch.where(self._greedy[:, 0], tokens, self._draw(scores))
        if self._penalties:
            self._counts.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.float32))
        if self._logprobs is None:
            return tokens, None
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(self._logprobs, logits.shape[-1]), dim=-1)
        return tokens, (logprobs.gather(1, tokens[:, None])[:, 0], top.values, top.indices)

    def _penalized(self, logits: Tensor) -> Tensor:
        assert self._penalties is not None
        repetition, presence, frequency = self._penalties
        occurs = self._counts > 0
        repeated = torch.where(logits < 0, logits * repetition, logits / repetition)
        scores = torch.where(self._seen | occurs, repeated, logits)
        return scores - presence * occurs - frequency * self._counts

    def _draw(self, scores: Tensor) -> Tensor:
        scores = scores / self._temperature
        if self._sorts:
            scores = self._cut(scores)
        if self._least:
            probabilities = scores.softmax(-1)
            least = self._min_p * probabilities.amax(-1, keepdim=True)
            scores = scores.masked_fill(probabilities < least, -torch.inf)
        # As torch.multinomial draws one of a row. Each sequence has random numbers of its own, so that its tokens do
        # not depend on its neighbours.
        noise = torch.ones_like(scores)
        for row in self._drawn:
            noise[row].exponential_(1, generator=self._sequences[row].generator)
        return (scores.softmax(-1) / noise).argmax(-1)

    def _cut(self, scores: Tensor) -> Tensor:
        """Cuts each row to its ``top_k`` and then to its ``top_p``."""
        least = scores.sort(descending=True).values.gather(1, self._top_k - 1)
        scores = scores.masked_fill(scores < least, -torch.inf)
        ordered, index = scores.sort()
        below = ordered.softmax(-1).cumsum(-1) <= 1 - self._top_p
        below[:, -1] = False
        return scores.masked_fill((below & (self._top_p < 1)).scatter(1, index, below & (self._top_p < 1)), -torch.inf)


def logprobs_of(row: int, sampling: Sampling, found: tuple[Tensor, ...] | None) -> Logprobs | None:
    """What sequence ``row`` asked for, of what a ``Sampler`` found (on the host)."""
    if found is None or sampling.logprobs is None:
        return None
    token, values, indices = found
    count = sampling.logprobs
    top = dict(zip(indices[row, :count].tolist(), values[row, :count].tolist(), strict=True))
    return Logprobs(float(token[row]), top)
