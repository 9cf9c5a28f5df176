"""Which tokens of a prompt stay exact where all others are encoded."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exemption(ABC):
    """Marks tokens of a prompt. ``reads_inputs``: judges them by what the layer is given."""

    reads_inputs: ClassVar[bool] = False

    @abstractmethod
    def marked(self, positions: Tensor, inputs: Tensor | None) -> Tensor:
        """The tokens that stay exact in a layer, bool [B, q]. ``positions`` are int64 [B, q], -1 for padding;
        ``inputs`` are [B, q, size], the hidden states that enter the layer."""


@dataclass(frozen=True)
class FirstTokens(Exemption):
    """The first ``count`` tokens of each sequence."""

    count: int

    def marked(self, positions: Tensor, inputs: Tensor | None) -> Tensor:
        return (positions >= 0) & (positions < self.count)


@dataclass(frozen=True)
class MassiveTokens(Exemption):
    """The tokens that hold the ``top`` largest magnitudes among all numbers that enter the layer (RotateKV, arXiv
    2501.16383, section 4.3)."""

    top: int
    reads_inputs = True

    def marked(self, positions: Tensor, inputs: Tensor | None) -> Tensor:
        assert inputs is not None
        size = inputs.shape[2]
        magnitude = inputs.abs().masked_fill((positions < 0)[..., None], -1).flatten(1)
        tokens = magnitude.topk(min(self.top, magnitude.shape[1]), dim=1).indices // size
        return torch.zeros_like(positions, dtype=torch.bool).scatter(1, tokens, True) & (positions >= 0)
