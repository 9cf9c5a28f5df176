"""The vectors of neighbouring layers encoded together: by one direction, or by one subspace."""

from copy import copy

import torch
from torch import Tensor

from ..errors import RecipeError
from .base import Format, Rows

_PARALLEL = 1e-4  # radians (from 0 or from pi) within which the arc between two directions is taken as straight
_BLOCK = 4096  # tokens that are in fp64 at once


class Bundled(Format):
    """One vector a token that joins the vectors of several layers, one layer after another.

    What is common to the layers is encoded as ``inner`` encodes it.
    """

    def __init__(self, inner: Format):
        if inner.watched or inner.shared:
            raise RecipeError(f"{inner.name} depends on one layer, and here layers keep entries together")
        self.inner, self.unit = inner, inner.unit

    @property
    def key(self) -> tuple:
        return (*super().key, self.inner.key)

    def strain(self, x: Tensor) -> Tensor:
        """How far tokens ([R, n, size]) are beyond what the format should hold, fp32 [R, n]; from 0 on they should stay
        as they are."""
        return x.new_full(x.shape[:2], -torch.inf, dtype=torch.float32)


class Directions(Bundled):
    """The vectors of two layers as the direction between them and their two lengths (arXiv 2405.14366, section 3.3).

    The direction lies at ``interpolation`` of the arc from the first layer's to the second's (0: the first's own, 1:
    the second's). Each layer reads it at the length that its own vector had. ``gamma``: in a head where the angles of a
    first prompt lie between a and b, a token whose angle is at least b - gamma * (b - a) should stay as it is; None:
    every token may be encoded. That bound is the state of a head.
    """

    _bound: Tensor  # fp32 [R], of the heads that the format was given

    def __init__(self, inner: Format, interpolation: float, gamma: float | None, size: int, dtype: torch.dtype):
        super().__init__(inner)
        self.interpolation, self.gamma, self.size, self.dtype = interpolation, gamma, size, dtype
        self.name = f"directions {inner.name}"
        lengths = (2,) if self.unit == 1 else (self.unit, 2)
        self.layout = {**inner.layout, "lengths": (lengths, dtype)}
        bound = {} if gamma is None else {"bound": ((), torch.float32)}
        self.state = {**inner.state, **bound}

    @property
    def key(self) -> tuple:
        return (*super().key, self.interpolation, self.gamma)

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        state = self.inner.observe(self._direction(x), held, queries) if self.inner.state else {}
        if self.gamma is None:
            return state
        angles = self.angles(x)
        most = angles.masked_fill(~held, -torch.inf).amax(1)
        least = angles.masked_fill(~held, torch.inf).amin(1)
        return {**state, "bound": most - self.gamma * (most - least)}

    def given(self, state: Rows) -> "Directions":
        bound = copy(self)
        bound.inner = self.inner.given(state)
        if "bound" in state:
            bound._bound = state["bound"]
        return bound

    def encode(self, x: Tensor) -> Rows:
        lengths = self._layers(x).norm(dim=-1).to(self.dtype)
        lengths = lengths if self.unit == 1 else lengths.unflatten(-2, (-1, self.unit))
        return {**self.inner.encode(self._direction(x)), "lengths": lengths}

    def decode(self, rows: Rows) -> Tensor:
        return self.decode_channels(rows, slice(0, 2 * self.size))

    def decode_channels(self, rows: Rows, channels: slice) -> Tensor:
        """``channels`` are those of whole layers."""
        first, last, _ = channels.indices(2 * self.size)
        lengths = rows["lengths"] if self.unit == 1 else rows["lengths"].flatten(-3, -2)
        direction = _wide(self.inner.decode(rows))
        # What an inner format loses may not change a vector's length.
        direction /= direction.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(direction.dtype).tiny)
        layers = lengths[..., first // self.size : last // self.size].to(direction.dtype)
        return (direction[..., None, :] * layers[..., None]).flatten(-2).to(self.dtype)

    def angles(self, x: Tensor) -> Tensor:
        """The angle between the two layers' vectors of each token, in radians: [R, n, size] -> fp32 [R, n]."""
        first, second = self._units(x)
        # Not an arc cosine, which cannot tell small angles apart.
        return (2 * torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1))).float()

    def strain(self, x: Tensor) -> Tensor:
        if self.gamma is None:
            return super().strain(x)
        return self.angles(x) - self._bound[:, None]

    def _direction(self, x: Tensor) -> Tensor:
        """The common direction of each token: [..., n, 2 * size] -> [..., n, size]."""
        first, second = self._units(x)
        angle = self.angles(x)[..., None].to(first.dtype)
        part = self.interpolation
        straight = (angle < _PARALLEL) | (angle > torch.pi - _PARALLEL)
        of_first = torch.where(straight, 1 - part, ((1 - part) * angle).sin())
        of_second = torch.where(straight, part, (part * angle).sin())
        between = of_first * first + of_second * second
        between /= between.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(between.dtype).tiny)
        return between.to(self.dtype)

    def _units(self, x: Tensor) -> tuple[Tensor, Tensor]:
        layers = self._layers(x)
        units = layers / layers.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(layers.dtype).tiny)
        return units[..., 0, :], units[..., 1, :]

    def _layers(self, x: Tensor) -> Tensor:
        return _wide(x).unflatten(-1, (2, self.size))


class Subspace(Bundled):
    """Vectors of ``size`` numbers by their coordinates in the ``rank`` directions that hold most of a prompt (arXiv
    2503.18893, section 4.1).

    With the singular value decomposition X = U S Vᵀ of all tokens of a head, the coordinates are X V, in place of the
    paper's U, and the state of a head is Vᵀ [rank, size], in place of S Vᵀ: the same product, without dividing by
    singular values that may be 0.
    """

    _basis: Tensor  # [R, rank, size] of the heads that the format was given

    def __init__(self, inner: Format, rank: int, size: int, dtype: torch.dtype):
        super().__init__(inner)
        self.rank, self.size = rank, size
        self.name = f"subspace{rank}/{size} {inner.name}"
        self.layout = inner.layout
        self.state = {"basis": ((rank, size), dtype), **inner.state}

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        x = x.masked_fill(~held[..., None], 0)
        # The eigenvectors of XᵀX are the right singular vectors; in fp64, since squaring halves the digits.
        blocks = (block.double() for block in x.split(_BLOCK, 1))
        gram = sum((block.mT @ block for block in blocks), x.new_zeros((), dtype=torch.float64))
        basis = torch.linalg.eigh(gram).eigenvectors[..., -self.rank :].flip(-1).mT.to(x.dtype)
        state = self.inner.observe(x @ basis.mT, held, queries) if self.inner.state else {}
        return {"basis": basis, **state}

    def given(self, state: Rows) -> "Subspace":
        bound = copy(self)
        bound._basis = state["basis"]
        bound.inner = self.inner.given(state)
        return bound

    def encode(self, x: Tensor) -> Rows:
        return self.inner.encode(x @ self._basis.mT)

    def decode(self, rows: Rows) -> Tensor:
        return self.inner.decode(rows) @ self._basis

    def decode_channels(self, rows: Rows, channels: slice) -> Tensor:
        return self.inner.decode(rows) @ self._basis[..., channels]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
