"""Decoding steps on a GPU: what the Triton kernels serve. Everything else takes the reference path."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..memory import Store
from .reference import Paid, Variant

DEVICES = {"cuda"}  # tests add "cpu", where Triton interprets its kernels
_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Unturned:
    """One token a sequence as its projections give it: ``states`` [B, (H + K) * D + K * V], queries before keys before
    values, and ``cos`` and ``sin`` [1 or B, 1, D], by which queries and keys are still to be rotated. ``norms``: weight
    [D] and epsilon of an RMSNorm of queries and of one of keys before that, or none."""

    states: Tensor
    cos: Tensor
    sin: Tensor
    queries: int
    keys: int
    norms: Sequence[tuple[Tensor, float]] = ()


def append(token: Unturned, store: Store, heads: slice) -> Tensor:
    """Rotates ``token`` and writes its keys and values where ``store.open_token`` made room in ``heads``, those of a layer
    in a store that a kernel reads. Returns the queries [B, H, 1, D]."""
    from .triton.small import append

    return append(token, *store.token_places(heads))


def decode(
    query: Tensor, store: Store, heads: slice, variant: Variant, counts: bool = False, observe: bool = False
) -> tuple[Tensor, Paid | None] | None:
    """Attention of one token's queries ([B, H, 1, D]) over all entries of ``heads``, a layer's, as they lie in their
    pages: [B, H, 1, D], and with ``observe`` what was paid to each entry. ``counts``: entries weigh as their column
    ``count`` says.

    None where no kernel reads this store: on other devices, without Triton, in formats without a kernel, where entries
    are in host memory or in two precisions.
    """
    if not reads(store):
        return None
    from .triton.decode import attend_stored

    return attend_stored(query, store, heads, variant, counts, observe)


def reads(store: Store, queries: int | None = None) -> bool:
    """Whether a kernel may read this store, for sure where the ``queries`` of a KV head are given."""
    device = store.arena.device
    if not _serves(device) or type(store) is not Store:
        return False
    if any(segment.pool.device.type != device.type for segment in store.segments):
        return False
    if queries is None:
        return True
    from .triton.decode import readable

    return readable(store, queries)


def _serves(device: torch.device) -> bool:
    if device.type not in DEVICES or not _has_triton():
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
