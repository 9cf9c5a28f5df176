"""The tokens of one forward pass, and what one layer has of them.

Shapes: B sequences, H query heads, K KV heads, q new tokens, D head size.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..attention import Variant
from ..rematerialization import Known


@dataclass(slots=True)
class Step:
    """The tokens of one forward pass.

    ``positions`` (int64 [B, q], on the device) counts each sequence's real tokens from 0, -1 marks padding; ``before``
    and ``after`` (int64 [B], on the host) are the tokens of each sequence before and after the pass. ``carried`` (int64
    [B], on the host): how many of the new ones a layer is given, where not all of them. ``ends`` (bool [B, q], on the
    device): which of them end a sentence, where the recipe asks for it. ``following`` (int64 [B, p], on the device, -1
    for padding): positions of tokens at the end of the pass that only score and are not kept. ``known``: what a layer
    leaves to the next one of its inputs, where these are kept as differences.
    """

    positions: Tensor
    before: Tensor
    after: Tensor
    padded: bool
    carried: Tensor | None = None
    ends: Tensor | None = None
    following: Tensor | None = None
    known: Known = field(default_factory=Known)

    def selected(self, sequences: list[int]) -> "Step":
        """The step of some sequences."""
        positions, before, after = (t[sequences] for t in (self.positions, self.before, self.after))
        return replace(self, positions=positions, before=before, after=after)

    @property
    def attending(self) -> Tensor:
        """The positions of all tokens of the pass, int64 [B, q + p]."""
        return self.positions if self.following is None else torch.cat([self.positions, self.following], 1)

    @property
    def counts(self) -> Tensor:
        """Tokens of each sequence that a layer is given, int64 [B] on the host."""
        return self.after - self.before if self.carried is None else self.carried


@dataclass(slots=True)
class Fresh:
    """One layer's new tokens: queries [B, H, q, D], keys and values [B, K, q, D], how they attend, and where the recipe
    asks for them the layer's inputs [B, q, size]: those of its attention, or of the whole layer."""

    query: Tensor
    keys: Tensor
    values: Tensor
    step: Step
    variant: Variant
    inputs: Tensor | None = None

    def without_following(self) -> "Fresh":
        """The tokens that may be kept."""
        if self.step.following is None:
            return self
        count = self.step.positions.shape[1]
        inputs = None if self.inputs is None else self.inputs[:, :count]
        return replace(
            self,
            query=self.query[:, :, :count],
            keys=self.keys[:, :, :count],
            values=self.values[:, :, :count],
            inputs=inputs,
        )
