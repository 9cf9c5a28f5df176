"""Decoding steps on a GPU: what the Triton kernels serve. Everything else takes the reference path."""

import torch
from torch import Tensor

from ..memory import Store
from ..memory.kernels import can_run
from .reference import Paid, Variant
from .updates import Updates

DEVICES = {"cuda"}  # tests add "cpu", where Triton interprets its kernels


def decode(
    query: Tensor,
    store: Store,
    heads: slice,
    variant: Variant,
    counts: bool = False,
    observe: bool = False,
    updates: Updates | None = None,
) -> tuple[Tensor, Paid | None] | None:
    """Attention of one token's queries ([B, H, 1, D]) over all entries of ``heads``, a layer's, as they lie in their
    pages: [B, H, 1, D], and with ``observe`` what was paid to each entry. ``counts``: entries weigh as their column
    ``count`` says. ``updates`` are made to columns in place, in pages that nobody shares.

    None where no kernel reads this store: on other devices, without Triton, in formats without a kernel, where entries
    are in host memory or in two precisions.
    """
    if not reads(store):
        return None
    from .triton.decode import attend_stored

    return attend_stored(query, store, heads, variant, counts, observe, updates)


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
    return device.type in DEVICES and can_run(device)
