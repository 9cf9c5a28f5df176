"""Attention over parts of a cache, merged by their log-sum-exps, in plain torch on any device. The oracle.

Shapes: B sequences, H query heads, K KV heads, G = H / K query heads a KV head, q queries, n entries, D head size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

# Queries that the explicit path takes at once: bounds its logits to QUERY_BLOCK x n numbers a query head.
QUERY_BLOCK = 64


@dataclass(slots=True)
class Part:
    """Entries that are read together.

    ``keys`` and ``values`` are [B, K, n, D]. ``mask`` (bool, [B or 1, K or 1, q or 1, n]) says which entries a query
    may read; None means all, or with ``causal`` (n >= q) the first n - q + i + 1 for query i. ``log_weight``
    ([B, K, n]) is added to the logits. The logits are divided by ``temperature``, and in the merge the part's mass
    counts ``scale`` times (parallel contexts).
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    causal: bool = False
    log_weight: Tensor | None = None
    temperature: float = 1.0
    scale: float = 1.0

    @property
    def plain(self) -> bool:
        return self.temperature == 1.0 and self.scale == 1.0


@dataclass(slots=True)
class Variant:
    """What a layer's attention computes: softmax(softcap(q k * scaling)) v, with ``sinks`` ([H] logits) that take
    mass and give nothing."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def attend(query: Tensor, parts: Sequence[Part], variant: Variant) -> Tensor:
    """Attention of ``query`` [B, H, q, D] over all parts together -> [B, H, q, D].

    torch's fused kernel computes it where only masks and log-weights are asked for, the explicit path the rest.
    """
    if variant.plain and all(part.plain for part in parts):
        return _fused(query, joined(parts, query.shape[2]), variant.scaling)
    return attend_with_mass(query, parts, variant)[0]


def attend_with_mass(query: Tensor, parts: Sequence[Part], variant: Variant) -> tuple[Tensor, list[Tensor]]:
    """``attend`` by the explicit path, and the mass of ``mass_received``."""
    outputs, masses = [], _no_mass(query, parts)
    for block, rows in _blocks(query, parts):
        out, paid = _attend_block(block, rows, parts, variant)
        outputs.append(out)
        _receive(masses, paid)
    return torch.cat(outputs, 3).flatten(1, 2).to(query.dtype), masses


def attend_observed(query: Tensor, parts: Sequence[Part], variant: Variant) -> tuple[Tensor, "Paid"]:
    """``attend`` for at most QUERY_BLOCK queries by the explicit path, and what they paid to each entry."""
    ((block, rows),) = _blocks(query, parts)
    out, paid = _attend_block(block, rows, parts, variant)
    return out.flatten(1, 2).to(query.dtype), paid


def mass_received(query: Tensor, parts: Sequence[Part], variant: Variant) -> list[Tensor]:
    """The probability mass that each entry received from all queries together: for each part [B, K, G, n] in fp32."""
    masses = _no_mass(query, parts)
    for paid in observed(query, parts, variant):
        _receive(masses, paid)
    return masses


def observed(query: Tensor, parts: Sequence[Part], variant: Variant) -> Iterator["Paid"]:
    """What queries pay to each entry, in blocks of QUERY_BLOCK queries, in order."""
    for block, rows in _blocks(query, parts):
        yield _pay(block, rows, parts, variant)


@dataclass(slots=True)
class Paid:
    """The attention of q queries to the n entries of all parts together, in fp32.

    Of each part: ``weights`` ([B, K, G, q, up to its size]; what is missing at the end is zero), what they count among
    all parts and sinks (``shares``, [B, K, G, q, 1]) and its ``sizes`` in entries.
    """

    weights: list[Tensor]
    shares: list[Tensor]
    sizes: list[int]

    @property
    def probabilities(self) -> Tensor:
        """Of each query, [B, K, G, q, n]; 0 where it may not read."""
        rows = [share * weights for share, weights in zip(self.shares, self.weights, strict=True)]
        return torch.cat([pad(row, (0, n - row.shape[-1])) for row, n in zip(rows, self.sizes, strict=True)], -1)

    def among(self, index: Tensor, entries: int) -> "Paid":
        """The same where the one part is ``index`` (int64 [B * K, m]) of so many ``entries``; others get nothing."""
        ((weights,), shares) = self.weights, self.shares
        every = weights.new_zeros((*weights.shape[:-1], entries))
        at = index.view(*weights.shape[:2], 1, 1, -1).expand_as(weights)
        return Paid([every.scatter_add_(-1, at, weights)], shares, [entries])

    @property
    def mass(self) -> Tensor:
        """From all these queries together, [B, K, G, n]."""
        masses = [part.new_zeros((*part.shape[:3], n)) for part, n in zip(self.weights, self.sizes, strict=True)]
        _receive(masses, self)
        return masses[0] if len(masses) == 1 else torch.cat(masses, -1)


class Weighed(NamedTuple):
    """Queries against one part: its weights exp(logits - top), [B, K, G, q, n] in fp32, and the largest logit and the
    log-sum-exp of the logits, [B, K, G, q], both with the part's scale in them (lse is -inf where nothing is read)."""

    weights: Tensor
    top: Tensor
    lse: Tensor


def weights(query: Tensor, part: Part, variant: Variant) -> Weighed:
    """[B, K, G, q, D] queries over one part alone."""
    logits = _by_kv_head(query.float() * variant.scaling, part.keys.float().transpose(-1, -2))
    if variant.softcap is not None:
        logits = logits.div_(variant.softcap).tanh_().mul_(variant.softcap)
    if part.temperature != 1.0:
        logits /= part.temperature
    if part.log_weight is not None:
        logits += part.log_weight.float()[:, :, None, None]
    _forbid(logits, part)
    top = _finite(logits.amax(-1))
    weights = logits.sub_(top[..., None]).exp_()
    top = top + math.log(part.scale)
    return Weighed(weights, top, top + weights.sum(-1).log())


def merge(query: Tensor, parts: Sequence[Weighed], variant: Variant) -> list[Tensor]:
    """What each part's weights count among all parts and sinks, [B, K, G, q, 1]: share * weights are probabilities."""
    lses = [part.lse for part in parts]
    if variant.sinks is not None:
        lses.append(variant.sinks.float().view(1, query.shape[1], query.shape[2], 1).expand_as(lses[0]))
    total = _finite(torch.logsumexp(torch.stack(lses), 0))
    return [torch.exp(part.top - total)[..., None] for part in parts]


def read_mask(part: Part, queries: int) -> Tensor | None:
    """The mask of a part as a tensor ([B or 1, K or 1, q or 1, n]), its causal rule included; None: no mask."""
    if not part.causal or part.mask is not None:
        return part.mask
    n = part.keys.shape[2]
    rows = torch.arange(n - queries, n, device=part.keys.device)[:, None]
    return (torch.arange(n, device=part.keys.device) <= rows)[None, None]


def joined(parts: Sequence[Part], queries: int) -> Part:
    """Plain parts as one part over the concatenation of their entries."""
    if len(parts) == 1:
        return parts[0]
    masks = [_full_mask(part, queries) for part in parts]
    shape = torch.broadcast_shapes(*(mask.shape[:3] for mask in masks))
    weights = [p.log_weight if p.log_weight is not None else p.keys.new_zeros(p.keys.shape[:3]) for p in parts]
    return Part(
        torch.cat([part.keys for part in parts], 2),
        torch.cat([part.values for part in parts], 2),
        torch.cat([mask.expand(*shape, -1) for mask in masks], 3),
        log_weight=torch.cat(weights, 2) if any(p.log_weight is not None for p in parts) else None,
    )


def _fused(query: Tensor, part: Part, scaling: float) -> Tensor:
    queries, group = query.shape[2], query.shape[1] // part.keys.shape[1]
    mask, causal = _fused_mask(part, queries)
    if mask is None:
        return scaled_dot_product_attention(
            query, part.keys, part.values, is_causal=causal, scale=scaling, enable_gqa=group > 1
        )
    if queries == 1:
        # The query heads of a KV head become its queries, so that keys and values need not be repeated.
        folded = scaled_dot_product_attention(
            query.unflatten(1, (-1, group)).squeeze(3), part.keys, part.values, attn_mask=mask, scale=scaling
        )
        return folded.flatten(1, 2)[:, :, None]
    keys, values = part.keys.repeat_interleave(group, 1), part.values.repeat_interleave(group, 1)
    mask = mask.repeat_interleave(group, 1) if mask.shape[1] > 1 else mask
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)


def _fused_mask(part: Part, queries: int) -> tuple[Tensor | None, bool]:
    """The mask as the fused kernel takes it, or None and whether its causal rule does."""
    if part.log_weight is not None:
        bias = part.log_weight[:, :, None].to(part.keys.dtype)
        mask = read_mask(part, queries)
        return (bias if mask is None else bias.masked_fill(~mask, -torch.inf)), False
    if part.mask is None and (not part.causal or queries == 1 or queries == part.keys.shape[2]):
        return None, part.causal and queries > 1
    return read_mask(part, queries), False


def _full_mask(part: Part, queries: int) -> Tensor:
    mask = read_mask(part, queries)
    return part.keys.new_ones((1, 1, 1, part.keys.shape[2]), dtype=torch.bool) if mask is None else mask


def _finite(lse: Tensor) -> Tensor:
    return lse.clamp(min=torch.finfo(lse.dtype).min)


def _no_mass(query: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    shape = (*parts[0].keys.shape[:2], query.shape[1] // parts[0].keys.shape[1])
    return [torch.zeros((*shape, part.keys.shape[2]), device=query.device) for part in parts]


def _attend_block(block: Tensor, rows: Sequence[Part], parts: Sequence[Part], variant: Variant) -> tuple[Tensor, Paid]:
    """One block of ``_blocks``: its output [B, K, G, b, D] in fp32, and what it paid."""
    paid = _pay(block, rows, parts, variant)
    partials = [
        share * _by_kv_head(weights, part.values.float())
        for share, weights, part in zip(paid.shares, paid.weights, rows, strict=True)
    ]
    return torch.stack(partials).sum(0), paid


def _pay(block: Tensor, rows: Sequence[Part], parts: Sequence[Part], variant: Variant) -> Paid:
    weighed = [weights(block, part, variant) for part in rows]
    shares = merge(block, weighed, variant)
    return Paid([part.weights for part in weighed], shares, [part.keys.shape[2] for part in parts])


def _receive(masses: list[Tensor], paid: Paid) -> None:
    for mass, share, weights in zip(masses, paid.shares, paid.weights, strict=True):
        mass[..., : weights.shape[-1]] += (share.transpose(-1, -2) @ weights).squeeze(-2)


def _by_kv_head(x: Tensor, y: Tensor) -> Tensor:
    """[B, K, G, q, m] times [B, K, m, n], the same for every query head of a KV head: [B, K, G, q, n]."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def _forbid(logits: Tensor, part: Part) -> None:
    """-inf for what may not be read, in place; the causal rule touches only the last q entries."""
    if part.mask is not None:
        logits.masked_fill_(~part.mask[:, :, None], -torch.inf)
    elif part.causal:
        queries = logits.shape[3]
        later = torch.ones(queries, queries, dtype=torch.bool, device=logits.device).triu_(1)
        logits[..., -queries:].masked_fill_(later, -torch.inf)


def _blocks(query: Tensor, parts: Sequence[Part]) -> Iterator[tuple[Tensor, list[Part]]]:
    """Blocks of queries, [B, K, G, b, D], with what they may read of each part."""
    if any(part.causal and part.keys.shape[2] < query.shape[2] for part in parts):
        raise ValueError("a causal part needs at least as many entries as there are queries")
    grouped = query.unflatten(1, (parts[0].keys.shape[1], -1))
    for first in range(0, query.shape[2], QUERY_BLOCK):
        block = grouped[:, :, :, first : first + QUERY_BLOCK]
        yield block, [_rows(part, first, QUERY_BLOCK, query.shape[2]) for part in parts]


def _rows(part: Part, first: int, count: int, queries: int) -> Part:
    """What queries first .. first + count of ``queries`` may read of a part."""
    if part.mask is not None:
        return replace(part, mask=part.mask if part.mask.shape[2] == 1 else part.mask[:, :, first : first + count])
    if not part.causal:
        return part
    end = part.keys.shape[2] - queries + min(first + count, queries)
    weight = part.log_weight[:, :, :end] if part.log_weight is not None else None
    return replace(part, keys=part.keys[:, :, :end], values=part.values[:, :, :end], log_weight=weight)
