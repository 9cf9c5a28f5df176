"""Attention on a GPU: what the Triton kernels serve. Everything else takes the reference path."""

from torch import Tensor

from ..memory import Store
from ..memory.kernels import serves
from .newest import Pages, Projected
from .reference import Paid, Part, Variant
from .rotary import Rotary
from .updates import Updates


def append(token: Projected, store: Store, heads: slice) -> Tensor:
    """Writes keys and values, in their formats, where ``store.open_token`` made room in ``heads``, a layer's of a store
    that a kernel reads, and rotates what is to be rotated. Returns the queries, [B, H, 1, D]."""
    from .triton.small import append

    newest = store.stores[-1]
    return append(token, Pages.of(newest.keys.newest), Pages.of(newest.values.newest), heads.start)


def rotated(token: Projected, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, 1, D], keys [B, K, 1, D] and values [B, K, 1, V] of a token, rotated; ``size`` is D."""
    from .triton.small import norm, turned

    first = (token.queries + token.keys) * size
    query, keys = token.states[:, :first].unflatten(1, (-1, 1, size)).split([token.queries, token.keys], 1)
    values = token.states[:, first:].unflatten(1, (token.keys, 1, -1))
    if token.norms:
        query, keys = (norm(x, *weight) for x, weight in zip((query, keys), token.norms, strict=True))
    if token.turn:
        query, keys = turned(query.contiguous(), keys.contiguous(), *token.turn)
    return query, keys, values


def decode(
    query: Tensor,
    store: Store,
    heads: slice,
    variant: Variant,
    counts: bool = False,
    observe: bool = False,
    updates: Updates | None = None,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Paid | None] | None:
    """Attention of one token's queries ([B, H, 1, D]) over all entries of ``heads``, a layer's, as they lie in their
    pages: [B, H, 1, D], and with ``observe`` what was paid to each entry. ``counts``: entries weigh as their column
    ``count`` says. ``updates`` are made to columns in place, in pages that nobody shares. ``rotary``: keys are kept
    before this rotation, and positions below those reserved of it.

    None where no kernel reads this store: on other devices, without Triton, in formats without a kernel, where entries
    are in host memory.
    """
    if not reads(store):
        return None
    from .triton.decode import attend_stored

    return attend_stored(query, store, heads, variant, counts, observe, updates, rotary)


def prompt(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    store: Store,
    heads: slice,
    variant: Variant,
    window: int | None = None,
    counts: bool = False,
) -> Tensor | None:
    """Attention of a prompt's tokens (queries [B, H, q, D], keys and values [B, K, q, D]) over all entries of
    ``heads``, a layer's, as they lie in their pages, and over themselves up to each: [B, H, q, D]. ``window``: a token
    reads the newest so many tokens, itself included, and what is stored are the newest before it, in order. ``counts``
    as for ``decode``.

    None where no kernel reads this store, as for ``decode``.
    """
    if not serves_prompts(store):
        return None
    from .triton.prompt import attend_prompt

    return attend_prompt(query, keys, values, store, heads, variant, window, counts)


def prompt_decoded(
    query: Tensor, keys: Tensor, values: Tensor, past: Part, lengths: Tensor, variant: Variant
) -> Tensor | None:
    """As ``prompt``, over the first ``lengths`` (int64 [B, K] on the host) of each head's entries ``past``, which have
    been decoded.

    None on other devices, without Triton, and where these have weights.
    """
    if not serves(query.device) or past.log_weight is not None:
        return None
    from .triton.prompt import attend_decoded

    return attend_decoded(query, keys, values, past, lengths, variant)


def serves_prompts(store: Store) -> bool:
    """Whether ``prompt`` serves this store."""
    if not reads(store):
        return False
    from .triton.prompt import readable

    return readable(store)


def reads(store: Store, queries: int | None = None, together: int = 1, rotary: Rotary | None = None) -> bool:
    """Whether a kernel may read this store, for sure where the ``queries`` of a KV head are given. ``together``: KV
    heads that are one head of the store."""
    device = store.arena.device
    if not serves(device):
        return False
    if any(segment.pool.device.type != device.type for segment in store.segments):
        return False
    if queries is None:
        return True
    from .triton.decode import readable

    return readable(store, queries, together, rotary)
