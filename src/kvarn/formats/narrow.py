"""Vectors with channels left out, the same in all tokens of a head."""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format, Rows
from .mapped import Mapped


@dataclass(frozen=True)
class Channels:
    """How many channels of the keys stay, judged by the last ``watched`` queries of a prompt. The newest ``recent``
    keys keep all, or those that the format of the others leaves dense."""

    kept: int
    watched: int
    recent: int


class Narrow(Mapped):
    """The channels of each head that matter most to the queries of its prompt, as vectors of ``kept`` numbers in the
    format ``inner``; the others read as 0.

    A channel's score is the sum of its squares over the last ``watched`` queries of the prompt and all query heads of
    the KV head, times the sum of its squares over the tokens that the prompt leaves: the squared Frobenius norm of what
    the channel adds to their logits (arXiv 2407.21018). The channels are the head's state.
    """

    _channels: Tensor  # int64 [R, kept], ascending, of the heads that the format was given

    def __init__(self, inner: Format, kept: int, watched: int, size: int):
        self.inner, self.kept, self.watched, self.size = inner, kept, watched, size
        self.unit, self.layout = inner.unit, inner.layout
        self.name = f"narrow{kept}/{size} {inner.name}"
        self.state = {"channels": ((kept,), torch.int16), **inner.state}

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        of_queries = queries.float().square().sum((1, 2))
        of_tokens = x.float().square().masked_fill(~held[..., None], 0).sum(1)
        best = (of_queries * of_tokens).topk(self.kept, sorted=False).indices
        channels = best.sort(-1).values
        narrow = x.gather(-1, channels[:, None].expand(-1, x.shape[1], -1))
        return {"channels": channels.to(torch.int16), **self.inner.observe(narrow, held, queries)}

    def given(self, state: Rows) -> "Narrow":
        bound = copy(self)
        bound._channels = state["channels"].long()
        bound.inner = self.inner.given(state)
        return bound

    def encode(self, x: Tensor) -> Rows:
        return self.inner.encode(x.gather(-1, self._places(x.shape[1])))

    def decode(self, rows: Rows) -> Tensor:
        numbers = self.inner.decode(rows)
        wide = numbers.new_zeros((*numbers.shape[:-1], self.size))
        return wide.scatter_(-1, self._places(numbers.shape[1]), numbers)

    def asked(self, query: Tensor) -> Tensor:
        return query.gather(-1, self._places(query.shape[1]))

    def _places(self, tokens: int) -> Tensor:
        return self._channels[:, None].expand(-1, tokens, -1)
