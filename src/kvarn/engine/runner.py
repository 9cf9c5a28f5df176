"""Passes of the model."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import Cache
from .graphs import Graphs


class Runner:
    """Reads prompts and decodes, on the model's device."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.device = model, model.device
        self.graphs: Graphs | None = None

    def capture(self, cache: Cache, most: int) -> None:
        """Has decoding steps of ``cache``, of ``most`` sequences at most, be captured graphs where that is possible."""
        if self.graphs is None and Graphs.serve(cache):
            cache.reserve(most)
            cache.groups[0].arena.fill()
            self.graphs = Graphs(self.model, cache, most)

    def prepare(self, tokens: Tensor) -> None:
        """Puts ``tokens`` (int64 [B], on the device, which may still compute them) in place for the opened step."""
        if self.graphs is not None:
            self.graphs.prepare(tokens)

    @torch.no_grad()
    def read(self, cache: Cache, tokens: Sequence[int]) -> Tensor:
        """Reads ``tokens`` into the cache of one sequence: the logits of what comes next, [1, V]."""
        first = int(cache.seen) if cache.seen.numel() else 0
        positions = torch.arange(first, first + len(tokens), device=self.device)[None]
        ids = torch.tensor([list(tokens)], device=self.device)
        return self.model(ids, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    @torch.no_grad()
    def decode(self, cache: Cache, tokens: Sequence[int]) -> Tensor:
        """One token for each sequence of an opened ``cache``: logits [B, V]."""
        if self.graphs is not None:
            return self.graphs.decode(tokens)
        positions = cache.seen[:, None].to(self.device)
        ids = torch.tensor(tokens, device=self.device)[:, None]
        return self.model(ids, position_ids=positions, past_key_values=cache).logits[:, -1]
