"""Neighbouring layers of one sequence under a recipe, driven with random queries, keys and values."""

from collections.abc import Sequence

import torch
from one_layer import KV_HEADS, LAYER, VARIANT
from torch import Tensor

import kvarn
from kvarn.layers import Fresh, Step, new_group
from kvarn.memory import Arena
from kvarn.spec import ModelSpec

Tokens = Sequence[Tensor]  # queries [1, H, q, SIZE], keys and values [1, K, q, SIZE]


class Neighbours:
    """One bundle of ``count`` layers; ``capacity`` entries a head."""

    def __init__(self, recipe: str, count: int = 2, capacity: int = 10**9):
        parsed = kvarn.Recipe.parse(recipe)
        layer = parsed.told_apart(ModelSpec("toy", (LAYER,) * count, torch.float32, None)).layers[0]
        arena = Arena(torch.device("cpu"), 4)
        self.group = new_group(parsed, list(range(count)), layer, torch.float32, arena, 1)
        self.group.capacity = torch.full((1, 1, KV_HEADS), capacity)
        self.seen = 0

    def prompt(self, layers: Sequence[Tokens]) -> list[Tensor]:
        step = self._step(layers)
        out = [self.group.prompt(i, Fresh(*tokens, step, VARIANT)) for i, tokens in enumerate(layers)]
        self.group.end_prompt()
        return out

    def token(self, layers: Sequence[Tokens]) -> list[Tensor]:
        step = self._step(layers)
        self.group.begin_token(step)
        out = [self.group.token(i, Fresh(*tokens, step, VARIANT)) for i, tokens in enumerate(layers)]
        self.group.end_token(step)
        return out

    def read(self, number: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values as layer ``number`` reads them, [n, SIZE] for each head."""
        self.group._number = number
        part = self.group._part(self.group.everyone, None)
        lengths = self.group.store.lengths.tolist()
        return tuple([side[0, head, :n] for head, n in enumerate(lengths)] for side in (part.keys, part.values))

    def positions(self) -> list[list[int]]:
        """The positions of the entries of each head, ascending."""
        rows = self.group.store.read_column(self.group.everyone, "position")
        return [sorted(row[:n].tolist()) for row, n in zip(rows, self.group.store.lengths.tolist(), strict=True)]

    def _step(self, layers: Sequence[Tokens]) -> Step:
        before, self.seen = self.seen, self.seen + layers[0][1].shape[2]
        return Step(torch.arange(before, self.seen)[None], torch.tensor([before]), torch.tensor([self.seen]), False)
