"""Which entries a cache keeps of a prompt, and how far two caches agree."""

from statistics import mean

import torch
from torch import Tensor

from ..subjects import KvarnSession
from .kvpress_client import KvpressSession

Entries = list[list[set[int]]]  # for each layer, the positions in each KV head of the first sequence


def kvarn_entries(session: KvarnSession) -> Entries:
    """Of a recipe that evicts, on a model without sliding windows."""
    cache, entries = session.cache, []
    for layer, spec in enumerate(cache.spec.layers):
        group = cache._group_of[layer]
        heads = group.heads(layer)
        rows = zip(group.store.read_column(heads, "position"), group.store.lengths[heads].tolist(), strict=True)
        entries.append([set(row[:length].tolist()) for row, length in rows][: spec.kv_heads])
    return entries


def kvpress_entries(session: KvpressSession, dense: KvpressSession) -> Entries:
    """Found by key: ``dense`` has read the same prompt and keeps it whole, and a press copies keys bit by bit. (Rotary
    embeddings make the keys of equal tokens differ.)"""
    layers = range(len(session.held().entries or ()))
    return [_found(session.keys(layer)[0], dense.keys(layer)[0]) for layer in layers]


def best(scores: list[Tensor], count: int) -> Entries:
    """The ``count`` entries with the highest scores ([K, n] for each layer)."""
    return [[set(head.topk(count).indices.tolist()) for head in layer] for layer in scores]


def accumulated_mass(session: KvarnSession) -> list[Tensor]:
    """The attention mass that each position of the first sequence has received, [K, n] for each layer: of ``h2o``
    under a budget that keeps every entry."""
    cache, masses = session.cache, []
    for layer, spec in enumerate(cache.spec.layers):
        group = cache._group_of[layer]
        mass, position = (group.store.read_column(group.heads(layer), name) for name in ("mass", "position"))
        masses.append(torch.zeros_like(mass).scatter(1, position.long(), mass)[: spec.kv_heads])
    return masses


def agreement(first: Entries, second: Entries) -> float:
    """The share of entries that both keep, the mean over heads."""
    heads = [pair for layers in zip(first, second, strict=True) for pair in zip(*layers, strict=True)]
    return mean(len(a & b) / max(len(a), len(b)) for a, b in heads)


def _found(keys: Tensor, dense: Tensor) -> list[set[int]]:
    """Positions of ``keys`` ([K, n, D]) among all of them ([K, N, D])."""
    entries = []
    for head, all_of_head in zip(keys, dense, strict=True):
        position = {_bits(key): number for number, key in enumerate(all_of_head)}
        entries.append({position[_bits(key)] for key in head})
    return entries


def _bits(key: Tensor) -> bytes:
    return key.contiguous().view(torch.uint8).numpy().tobytes()
