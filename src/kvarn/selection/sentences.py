"""Entries are read sentence by sentence, those first whose mean key answers to the sentence that is being written.

SentenceKV (arXiv 2504.00970). Shapes as in ``base``; S sentences of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Calibration, Progress
from ..formats import ColumnType, Dense
from ..memory import Beside, SideLayout, Store
from ..spec import LayerSpec
from .base import Chosen, Layers, Reading, Selection, Selector, State

_ENDS = (".", "!", "?", ";", "\u3002", "\uff01", "\uff1f", "\uff1b")  # the last four: the same in CJK texts
_SLOTS = 1 << 30  # more than a head holds


@dataclass(frozen=True)
class SentenceEnds(Calibration):
    """Which tokens of a vocabulary end a sentence: with a full stop, !, ?, ; or their like, or a new line."""

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, progress: Progress
    ) -> dict[str, Tensor]:
        words = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        ends = [i for i, word in enumerate(words) if word.strip().endswith(_ENDS) or word.rstrip(" ").endswith("\n")]
        return {"ends": torch.tensor(ends, dtype=torch.int64)}


@dataclass(frozen=True)
class Sentences(Selection):
    """Of what a head holds, ``count`` entries: the ``first`` and the ``recent`` ones, and others sentence by sentence.

    Sentences are ranked by the product of their mean key with the mean query since the last sentence ended; the query
    heads of a KV head add up. While no more than ``whole`` queries have come since then, everything is read. A sentence
    ends with a token of ``ends``. What has settled is in the host's memory; the mean keys are on the device.
    """

    count: int
    first: int
    recent: int
    whole: int
    ends: tuple[int, ...]

    columns: ClassVar[Mapping[str, ColumnType]] = {"sentence": torch.int32}

    def sides(self, keys: SideLayout, values: SideLayout) -> tuple[SideLayout, SideLayout]:
        return self._away(keys), self._away(values)

    def beside(self, layer: LayerSpec, dtype: torch.dtype) -> Mapping[str, Beside]:
        return {"means": Beside(Dense(layer.key_size, dtype), lambda entries: entries)}

    def state(self, layer: LayerSpec, dtype: torch.dtype, alike: bool) -> State:
        return {
            "queries": ((layer.query_heads, layer.key_size), torch.float32),
            "keys": ((layer.kv_heads, layer.key_size), torch.float32),
            "tokens": ((), torch.int32),
        }

    @property
    def sentence_ends(self) -> tuple[int, ...]:
        return self.ends

    def selector(self, layers: Layers) -> "SentenceSelector":
        return SentenceSelector(self, layers)

    def _away(self, side: SideLayout) -> SideLayout:
        if side.settles:
            return replace(side, tier="host")
        return replace(side, tier="host", hold=self.recent, block=max(self.recent, 1))


class SentenceSelector(Selector):
    """``Sentences`` in the layers of a group.

    The column ``sentence`` numbers the sentences of a head that still have entries; the last number is that of the
    sentence being written, which has no mean key yet. The state has the sums of its queries and keys.
    """

    def __init__(self, sentences: Sentences, layers: Layers):
        super().__init__(sentences, layers)
        self.sentences = sentences

    def fresh(self, store: Store, heads: slice | Tensor, ends: Tensor | None) -> dict[str, Tensor]:
        written = store.beside["means"].lengths[heads].to(self.layers.device)[:, None]
        if ends is None or ends.shape[1] == 1:
            return {"sentence": written.int()}
        before = (ends.cumsum(1) - ends.int()).repeat_interleave(self.layers.layer.kv_heads, 0)
        return {"sentence": (written + before).int()}

    def stored(self, reading: Reading) -> None:
        """Numbers the sentences anew and takes the means of what is left of them; all are finished."""
        store, heads, held = reading.store, reading.heads, reading.held()
        numbers, counts = _renumbered(store.read_column(heads, "sentence").long(), held)
        keys = reading.read(heads)[0].float() * held[..., None]
        sums = keys.new_zeros((keys.shape[0], int(counts.max()), keys.shape[2]))
        sums.scatter_add_(1, numbers[..., None].expand_as(keys), keys)
        sizes = keys.new_zeros(sums.shape[:2]).scatter_add_(1, numbers, held.float())
        means = (sums / sizes.clamp(min=1)[..., None]).to(self.layers.dtype)
        store.beside["means"].rewrite(heads, {"x": means}, counts.cpu())
        store.set_columns(heads, {"sentence": numbers.int()})
        for tensor in self.state.values():
            tensor[reading.place] = 0

    def token(self, reading: Reading) -> Chosen | None:
        assert reading.ends is not None
        state = {name: tensor[reading.place] for name, tensor in self.state.items()}
        state["queries"] += reading.query[:, :, 0]
        state["keys"] += reading.keys[:, :, 0]
        state["tokens"] += 1
        self._finish(reading, reading.ends[:, 0], state)
        whole = state["tokens"] <= self.sentences.whole
        lengths = reading.store.lengths[reading.heads]
        if bool(whole.all()) or int(lengths.max()) <= self.sentences.count:
            return None
        key = self._priority(reading, state["queries"] / state["tokens"].clamp(min=1)[:, None, None])
        room = lengths.to(key.device).clamp(max=self.sentences.count)
        room = torch.where(whole.repeat_interleave(reading.shape[1]), lengths.to(key.device), room)
        most = key.shape[1] if bool(whole.any()) else min(key.shape[1], self.sentences.count)
        index = key.topk(most, largest=False).indices
        return Chosen(reading.query, index, torch.arange(most, device=key.device) < room[:, None])

    def _finish(self, reading: Reading, ends: Tensor, state: dict[str, Tensor]) -> None:
        """Keeps the mean key of the sentences that end (bool [B]) and begins new ones."""
        if not bool(ends.any()):
            return
        means = (state["keys"] / state["tokens"].clamp(min=1)[:, None, None]).flatten(0, 1)[:, None]
        counts = ends.long().cpu().repeat_interleave(reading.shape[1])
        reading.store.beside["means"].append(reading.heads, {"x": means.to(self.layers.dtype)}, counts)
        for tensor in state.values():
            tensor.masked_fill_(ends.view(-1, *[1] * (tensor.dim() - 1)), 0)

    def _priority(self, reading: Reading, query: Tensor) -> Tensor:
        """The order in which entries are read, by the mean query [B, H, D]: int64 [R, n], the lowest first."""
        means = reading.store.beside["means"]
        counts = means.lengths[reading.heads].to(query.device)[:, None]
        grouped = query.unflatten(1, (reading.shape[1], -1)).sum(2).flatten(0, 1)  # a sum of products is one of queries
        near = (means.decode(reading.heads).float() @ grouped[..., None])[..., 0]
        near = near.masked_fill(torch.arange(near.shape[1], device=near.device) >= counts, -torch.inf)
        # The sentence being written comes last.
        rank = torch.nn.functional.pad(
            _ranks(near.argsort(dim=1, descending=True, stable=True)), (0, 1), value=near.shape[1]
        )
        sentence = reading.store.read_column(reading.heads, "sentence").long().clamp(max=near.shape[1])
        positions = reading.entries().flatten(0, 1)
        held = positions >= 0
        slot = _ranks(positions.masked_fill(~held, _SLOTS).argsort(dim=1, stable=True))
        left = reading.store.lengths[reading.heads].to(slot.device)[:, None] - slot
        always = (slot < self.sentences.first) | (left <= self.sentences.recent)
        key = (rank.gather(1, sentence) + 1) * _SLOTS + slot
        return torch.where(always, slot, key).masked_fill(~held, 1 << 62)


def _renumbered(sentences: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of sentences ([R, n]) without gaps, in the same order, and how many there are, [R]."""
    ordered, order = sentences.masked_fill(~held, _SLOTS).sort(dim=1)
    first = torch.ones_like(held)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    numbers = torch.empty_like(sentences).scatter_(1, order, first.cumsum(1) - 1)
    return numbers.masked_fill(~held, 0), (first & (ordered < _SLOTS)).sum(1)


def _ranks(order: Tensor) -> Tensor:
    """The place of each in an order ([R, n])."""
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
