"""Vectors with channels left out, the same in all tokens of a head."""

from copy import copy

import torch
from torch import Tensor

from .base import Format, Rows


class Narrow(Format):
    """The ``kept`` channels of each head that matter most to the queries of its prompt; the others read as 0.

    A channel's score is the sum of its squares over the last ``watched`` queries of the prompt and all query heads of
    the KV head, times the sum of its squares over the tokens that the prompt leaves: the squared Frobenius norm of what
    the channel adds to their logits (arXiv 2407.21018). The channels are the head's state.
    """

    _channels: Tensor  # int64 [R, kept], ascending, of the heads that the format was given

    def __init__(self, kept: int, watched: int, size: int, dtype: torch.dtype):
        self.kept, self.watched, self.size = kept, watched, size
        self.name = f"narrow{kept}/{size}"
        self.layout = {"numbers": ((kept,), dtype)}
        self.state = {"channels": ((kept,), torch.int16)}

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        of_queries = queries.float().square().sum((1, 2))
        of_tokens = x.float().square().masked_fill(~held[..., None], 0).sum(1)
        best = (of_queries * of_tokens).topk(self.kept, sorted=False).indices
        return {"channels": best.sort(-1).values.to(torch.int16)}

    def given(self, state: Rows) -> "Narrow":
        bound = copy(self)
        bound._channels = state["channels"].long()
        return bound

    def encode(self, x: Tensor) -> Rows:
        return {"numbers": x.gather(-1, self._places(x.shape[1]))}

    def decode(self, rows: Rows) -> Tensor:
        numbers = rows["numbers"]
        wide = numbers.new_zeros((*numbers.shape[:-1], self.size))
        return wide.scatter_(-1, self._places(numbers.shape[1]), numbers)

    def _places(self, tokens: int) -> Tensor:
        return self._channels[:, None].expand(-1, tokens, -1)
