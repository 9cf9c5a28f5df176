"""Integers whose error is made up for: a low-rank part of it, and the numbers that stretch the ranges exactly."""

import math

import torch
from torch import Tensor

from .base import Format, Rows
from .integer import Int
from .packing import places_dtype

_START_SEED = 0


class Corrected(Format):
    """Blocks of ``block`` tokens as codes of ``backbone``, outliers and a low-rank correction (arXiv 2403.05527).

    Of each vector along the backbone's axis (a channel of the block, or a token), the largest and the smallest numbers,
    a share ``outliers`` of them together, are kept exactly, at least one of each; the backbone sees the vector's mean
    in their place. What codes and outliers miss of a block is approximated by ``rank`` pairs of factors, found by
    ``loops`` power iterations from a fixed start. Outliers and factors are kept in the model's dtype.
    """

    def __init__(self, backbone: Int, block: int, rank: int, outliers: float, loops: int):
        self.backbone, self.unit, self.rank, self.loops = backbone, block, rank, loops
        self.channels = backbone.axis == "channel"
        size, dtype = backbone.size, backbone.dtype
        vectors, length = (size, block) if self.channels else (block, size)
        self.each_side = min(math.ceil(outliers * length / 2), length // 2)
        exact = (vectors, 2 * self.each_side)
        self.name = f"{backbone.name}+rank{rank}+outliers{2 * self.each_side}"
        units = block // backbone.unit
        self.layout = {name: ((units, *shape), kind) for name, (shape, kind) in backbone.layout.items()}
        self.layout |= {
            "left": ((block, rank), dtype),
            "right": ((size, rank), dtype),
            "exact": (exact, dtype),
            "places": (exact, places_dtype(length)),
        }
        # Normal numbers: uniform ones would begin with nearly parallel factors.
        self._start = torch.randn(size, rank, generator=torch.Generator().manual_seed(_START_SEED))

    def encode(self, x: Tensor) -> Rows:
        blocks = x.unflatten(-2, (-1, self.unit)).float()
        vectors = self._vectors(blocks)
        order = vectors.argsort(-1)
        places = torch.cat([order[..., : self.each_side], order[..., order.shape[-1] - self.each_side :]], -1)
        exact = vectors.gather(-1, places)
        filled = vectors.scatter(-1, places, vectors.mean(-1, keepdim=True).expand_as(places))
        rows = self.backbone.encode(self._vectors(filled))
        rows |= {"exact": exact.to(x.dtype), "places": places.to(self.layout["places"][1])}
        left, right = self._factors(blocks - self._codes_and_outliers(rows))
        return rows | {"left": left.to(x.dtype), "right": right.to(x.dtype)}

    def decode(self, rows: Rows) -> Tensor:
        blocks = self._codes_and_outliers(rows) + rows["left"].float() @ rows["right"].float().transpose(-1, -2)
        return blocks.to(self.backbone.dtype).flatten(-3, -2)

    def _codes_and_outliers(self, rows: Rows) -> Tensor:
        """[..., units, block, size] in fp32."""
        vectors = self._vectors(self.backbone.decode({name: rows[name] for name in self.backbone.layout}).float())
        return self._vectors(vectors.scatter(-1, rows["places"].long(), rows["exact"].float()))

    def _factors(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """``error`` ([..., block, size]) as left @ right^T, [..., block, rank] and [..., size, rank]."""
        right = self._start.to(error.device).expand(*error.shape[:-2], -1, -1)
        if not self.rank:
            return error[..., :0], right
        for _ in range(self.loops - 1):
            right = error.transpose(-1, -2) @ (error @ right)
        left = _orthonormal(error @ _orthonormal(right))
        return left, error.transpose(-1, -2) @ left

    def _vectors(self, blocks: Tensor) -> Tensor:
        """[..., block, size] as vectors along the backbone's axis, and back."""
        return blocks.transpose(-1, -2) if self.channels else blocks


def _orthonormal(x: Tensor) -> Tensor:
    """The columns of ``x`` ([..., n, r], r small) made orthonormal one after the other; none from one that is zero.
    (On a GPU torch's QR decomposes one matrix after the other, and here are thousands.)"""
    columns: list[Tensor] = []
    for column in x.unbind(-1):
        column = _unit(column)
        for _ in range(2):  # what is left of one that was nearly parallel is not quite at right angles yet
            for before in columns:
                column = column - (column * before).sum(-1, keepdim=True) * before
            column = _unit(column)
        columns.append(column)
    return torch.stack(columns, -1)


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1, or 0; squares of small numbers must not vanish."""
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(-1, keepdim=True).clamp(min=tiny)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=tiny)
