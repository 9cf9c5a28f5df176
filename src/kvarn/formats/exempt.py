"""A few tokens of a head as they are, whatever the format of the others."""

from copy import copy

import torch
from torch import Tensor

from .base import Format, Rows


class Exempt(Format):
    """Vectors in the format ``inner``, of which up to ``most`` tokens of a head read exactly: the ones that were marked
    when its first prompt was stored, or the first of them where they are more.

    They and their places are the head's state; their codes stay where they are and are not read. For heads that never
    lose an entry.
    """

    _exact: Tensor  # [R, most, size] of the heads that the format was given, and int64 [R, most], -1 for none
    _places: Tensor

    def __init__(self, inner: Format, most: int, size: int, dtype: torch.dtype):
        self.inner, self.most = inner, most
        self.unit, self.layout, self.shared, self.name = inner.unit, inner.layout, inner.shared, inner.name
        self.watched = inner.watched
        self.state = {"exact": ((most, size), dtype), "places": ((most,), torch.int32), **inner.state}

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        return self.inner.observe(x, held, queries)

    def exempt(self, x: Tensor, marked: Tensor) -> Rows:
        short = self.most - x.shape[1]
        if short > 0:
            x, marked = torch.nn.functional.pad(x, (0, 0, 0, short)), torch.nn.functional.pad(marked, (0, short))
        places = (~marked).byte().argsort(dim=1, stable=True)[:, : self.most]
        exact = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        return {"exact": exact, "places": torch.where(marked.gather(1, places), places, -1).int()}

    def given(self, state: Rows) -> "Exempt":
        bound = copy(self)
        bound._exact, bound._places = state["exact"], state["places"].long()
        bound.inner = self.inner.given(state)
        return bound

    def encode(self, x: Tensor) -> Rows:
        return self.inner.encode(x)

    def decode(self, rows: Rows) -> Tensor:
        x = self.inner.decode(rows)
        if not self.most:
            return x
        # One vector more, for places that there are not.
        wide = torch.nn.functional.pad(x, (0, 0, 0, 1))
        inside = (self._places >= 0) & (self._places < x.shape[1])
        places = torch.where(inside, self._places, x.shape[1])
        return wide.scatter(1, places[..., None].expand_as(self._exact), self._exact)[:, :-1]
