"""Decoding passes as captured CUDA graphs: one for each of a few batch sizes, over buffers that stay in place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache as TransformersCache
from transformers import PreTrainedModel

from ..attention.interface import Mask, Pending
from ..attention.newest import Projected
from ..attention.reference import Variant
from ..cache import Cache
from ..layers import LayerGroup, Step
from ..memory import Segment, sent

_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_LEAST = 128  # entries of a head, on average: fewer are little work


class Pass(TransformersCache):
    """Stands for a cache in one decoding pass of ``rows`` sequences: the layer groups do the work, and nothing else
    happens. Rows beyond the batch belong to no sequence, and nothing is written for them."""

    def __init__(self, groups: Sequence[LayerGroup], positions: Tensor):
        super().__init__(layers=[])
        self._positions = positions
        self._group_of = {number: group for group in groups for number in group.numbers}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        return Pending(key_states, self, layer_idx), Pending(value_states, self, layer_idx)

    def attend(
        self, module: nn.Module, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: Mask, variant: Variant
    ) -> Tensor:
        token = Projected(torch.cat([keys.flatten(1), values.flatten(1)], 1), 0, keys.shape[1])
        return self._group_of[layer].append(layer, token, self._positions, variant, query)

    def append(self, layer: int, token: Projected, variant: Variant) -> Tensor:
        """As ``attend``, of a token that is still to be rotated."""
        return self._group_of[layer].append(layer, token, self._positions, variant)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return 1 + query_length, 0

    @property
    def is_sliding(self) -> list[bool]:
        return [group.layer.window is not None for _, group in sorted(self._group_of.items())]


class Graphs:
    """Captured passes of one model over one cache, made when a batch size comes for the first time, or columns are to
    be changed in another way, and again when pages or tables have moved, or when a store has twice as many entries as
    ever."""

    def __init__(self, model: PreTrainedModel, cache: Cache, most: int):
        from .fused import Fused

        self.model, self.cache, self.device = model, cache, model.device
        self.sizes = [*(size for size in _SIZES if size < most), most]
        self.ids = torch.zeros((most, 1), dtype=torch.int64, device=self.device)
        self.positions = torch.zeros((most, 1), dtype=torch.int64, device=self.device)
        self.fused = Fused(model)
        # By the rows of a pass and the columns that it changes.
        self._captured: dict[tuple, tuple[tuple, torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory: Any = None  # what the captured passes share
        self._entries: tuple[int, ...] = ()  # of each store a power of two that its entries were below so far
        self._prepared: Step | None = None  # the opened step whose buffers are filled

    @staticmethod
    def serve(cache: Cache) -> bool:
        """Whether all that most decoding steps of ``cache`` do is kernels over buffers in place."""
        return cache.groups[0].arena.device.type == "cuda" and all(group.captures for group in cache.groups)

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """One token for each sequence of the opened cache: logits [B, V], valid until the next call."""
        count = len(tokens)
        rows = next(size for size in self.sizes if size >= count)
        if self.cache.opened is None or self.cache.opened is not self._prepared:
            self.prepare(sent(torch.tensor(tokens), self.device))
        logits = self._replayed(rows, self.state())
        self.cache.passed()
        return logits[:count]

    def prepare(self, tokens: Tensor) -> None:
        """Fills the buffers for the opened step, whose tokens (int64 [B]) are on the device. Nothing waits for them."""
        self.ids[: tokens.numel(), 0].copy_(tokens)
        self.positions[: tokens.numel()].copy_(sent(self.cache.seen[:, None], self.device))
        self.state()
        self._prepared = self.cache.opened

    def _replayed(self, rows: int, state: tuple) -> Tensor:
        kind = rows, *(group.updates for group in self.cache.groups)
        if kind not in self._captured or self._captured[kind][0] != state:
            return self._capture(kind, state)
        _, graph, logits = self._captured[kind]
        graph.replay()
        return logits

    def _capture(self, kind: tuple, state: tuple) -> Tensor:
        """Captures a pass; the logits of the opened step, which a first one has computed."""
        self._captured = {each: kept for each, kept in self._captured.items() if kept[0] == state}
        if not self._captured:
            self._memory = None
        rows, stream, current = kind[0], torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        with widened(self.cache.groups, rows), self.fused.applied():
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                # Compiles and allocates what does so at the first time. Masses are added to columns, so once is enough.
                first = self.computed(rows)
            current.wait_stream(stream)
            first.record_stream(current)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory):
                logits = self.computed(rows)
        self._memory = graph.pool()
        self._captured[kind] = state, graph, logits
        return first

    @torch.no_grad()
    def computed(self, rows: int) -> Tensor:
        """The pass over the buffers, of groups that were ``widened``."""
        stand_in = Pass(self.cache.groups, self.positions[:rows])
        out = self.model(self.ids[:rows], position_ids=self.positions[:rows], past_key_values=stand_in, use_cache=True)
        return out.logits[:, -1]

    def _segments(self) -> Iterator[Segment]:
        for group in self.cache.groups:
            for store in group.store.stores:
                yield from store.keys.segments
                yield from store.values.segments
                if (group._counted or group.observers or group.rotary) and store.columns:
                    yield store.columns

    def state(self) -> tuple:
        """Where everything lies that a captured pass reads, with its tables up to date, and how many entries of each
        store it has processors for, roughly."""
        # Every head has a processor, whatever it holds.
        entries = [
            1 << max(int(store.lengths.sum()), group.layers * group.rows * _LEAST).bit_length()
            for group in self.cache.groups
            for store in group.store.stores
        ]
        self._entries = tuple(map(max, entries, self._entries or entries))
        mirrors = [segment.mirror() for segment in self._segments()]
        pools = {segment.pool for segment in self._segments()}
        tensors = [tensor for pool in pools for tensor in pool.tensors.values()]
        tensors += [tensor for segment in self._segments() for tensor in segment.bound]
        places = [*(m.table for m in mirrors), *(m.spans for m in mirrors), *tensors]
        tables = [address for group in self.cache.groups if group.rotary for address in group.rotary.addresses]
        return *self._entries, *(x.data_ptr() for x in places), *tables


@contextmanager
def widened(groups: Sequence[LayerGroup], rows: int) -> Iterator[None]:
    """Has the groups, which have as many slots, act for ``rows`` sequences."""
    before = [group.batch for group in groups]
    try:
        for group in groups:
            group.batch = rows
        yield
    finally:
        for group, batch in zip(groups, before, strict=True):
            group.batch = batch
