"""Vectors by their coordinates in the subspace that holds most of a prompt."""

from copy import copy

import torch
from torch import Tensor

from .base import Format, Rows


class LowRank(Format):
    """Vectors of ``size`` numbers by ``rank`` coordinates.

    With the singular value decomposition X = U S Vᵀ of the tokens of a prompt, the coordinates are X V = U S of the
    largest ``rank`` singular values, and the state of a head is Vᵀ [rank, size] (ShadowKV, arXiv 2410.21465, keeps U
    and S Vᵀ: the same product).
    """

    _basis: Tensor  # [R, rank, size] of the heads that the format was given

    def __init__(self, rank: int, size: int, dtype: torch.dtype):
        self.rank, self.size, self.dtype = rank, size, dtype
        self.name = f"lowrank{rank}/{size}"
        self.layout = {"x": ((rank,), dtype)}
        self.state = {"basis": ((rank, size), dtype)}

    def observe(self, x: Tensor, held: Tensor, queries: Tensor) -> Rows:
        # The eigenvectors of XᵀX are the right singular vectors; in fp64, since squaring halves the digits.
        x = x.double().masked_fill(~held[..., None], 0)
        vectors = torch.linalg.eigh(x.transpose(1, 2) @ x).eigenvectors[..., -self.rank :]
        return {"basis": vectors.transpose(1, 2).to(self.dtype)}

    def given(self, state: Rows) -> "LowRank":
        bound = copy(self)
        bound._basis = state["basis"]
        return bound

    def encode(self, x: Tensor) -> Rows:
        return {"x": x @ self._basis.transpose(1, 2)}

    def decode(self, rows: Rows) -> Tensor:
        return rows["x"] @ self._basis
