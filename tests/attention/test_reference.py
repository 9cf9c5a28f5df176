"""Attention over parts against a restatement in loops over float64 numbers."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvarn.attention import Part, Variant, attend, attend_with_mass, mass_received, reference
from kvarn.attention.reference import joined, read_mask

B, K, G, D = 2, 2, 3, 8
H = K * G
SCALING = 0.4


def naive(query: Tensor, parts: list[Part], variant: Variant) -> tuple[Tensor, list[Tensor]]:
    """Output [B, H, q, D] and mass [B, K, G, n] a part: every logit, one after the other, in float64."""
    batch, heads, queries, _ = query.shape
    kv_heads = parts[0].keys.shape[1]
    group = heads // kv_heads
    out = torch.zeros(batch, heads, queries, parts[0].values.shape[-1], dtype=torch.float64)
    masses = [torch.zeros(batch, kv_heads, group, p.keys.shape[2], dtype=torch.float64) for p in parts]
    for b in range(batch):
        for h in range(heads):
            k = h // group
            for i in range(queries):
                weights = []
                for p, part in enumerate(parts):
                    for j in range(part.keys.shape[2]):
                        if not readable(part, b, k, i, j, queries):
                            continue
                        logit = float(query[b, h, i].double() @ part.keys[b, k, j].double()) * variant.scaling
                        if variant.softcap is not None:
                            logit = variant.softcap * math.tanh(logit / variant.softcap)
                        logit /= part.temperature
                        if part.log_weight is not None:
                            logit += float(part.log_weight[b, k, j])
                        weights.append((part.scale * math.exp(logit), p, j))
                total = sum(weight for weight, _, _ in weights)
                if variant.sinks is not None:
                    total += math.exp(float(variant.sinks[h]))
                for weight, p, j in weights:
                    out[b, h, i] += weight / total * parts[p].values[b, k, j].double()
                    masses[p][b, k, h % group, j] += weight / total
    return out, masses


def readable(part: Part, b: int, k: int, i: int, j: int, queries: int) -> bool:
    if part.mask is not None:
        mask = part.mask
        place = [0 if size == 1 else index for size, index in zip(mask.shape, (b, k, i, j), strict=True)]
        return bool(mask[tuple(place)])
    return not part.causal or j < part.keys.shape[2] - queries + i + 1


def entries(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(B, K, n, D).to(dtype), torch.randn(B, K, n, D).to(dtype)


def queries(q: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, H, q, D).to(dtype)


def ragged(n: int, *, q: int = 1) -> Tensor:
    """A mask of heads of different lengths, one of them empty."""
    lengths = torch.tensor([[n, n - 3], [0, 1]])
    return (torch.arange(n) < lengths[..., None])[:, :, None].expand(-1, -1, q, -1)


MASKS = ["none", "causal", "causal prompt", "ragged", "a row for each query", "one for all heads"]


def a_part(kind: str, n: int, q: int, **more: object) -> Part:
    keys, values = entries(q if kind == "causal prompt" else n)
    masks = {
        "ragged": ragged(n),
        "a row for each query": torch.rand(B, K, q, n) < 0.6,
        "one for all heads": torch.rand(B, 1, q, n) < 0.6,
    }
    return Part(keys, values, masks.get(kind), causal=kind.startswith("causal"), **more)


VARIANTS = {
    "plain": Variant(SCALING),
    "softcap": Variant(SCALING, softcap=1.5),
    "sinks": Variant(SCALING, sinks=torch.linspace(-1, 2, H)),
    "both": Variant(SCALING, softcap=1.5, sinks=torch.linspace(-1, 2, H)),
}


def check(query: Tensor, parts: list[Part], variant: Variant, tolerance: float = 2e-5) -> None:
    expected, masses = naive(query, parts, variant)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(attend(query, parts, variant).double(), expected, **close)
    explicit, found = attend_with_mass(query, parts, variant)
    assert explicit.dtype == query.dtype
    torch.testing.assert_close(explicit.double(), expected, **close)
    for mass, alone, right in zip(found, mass_received(query, parts, variant), masses, strict=True):
        assert mass.dtype == torch.float32
        torch.testing.assert_close(mass.double(), right, **close)
        torch.testing.assert_close(alone, mass)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("q", [1, 5])
def test_one_part(mask: str, variant: str, q: int) -> None:
    check(queries(q), [a_part(mask, 9, q)], VARIANTS[variant])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", ["plain", "both"])
@pytest.mark.parametrize("q", [1, 4])
def test_log_weights(mask: str, variant: str, q: int) -> None:
    part = a_part(mask, 9, q)
    check(queries(q), [replace(part, log_weight=torch.randn(part.keys.shape[:3]))], VARIANTS[variant])


@pytest.mark.parametrize("first", MASKS)
@pytest.mark.parametrize("variant", ["plain", "both"])
@pytest.mark.parametrize("q", [1, 4])
def test_parts_of_any_kind_together(first: str, variant: str, q: int) -> None:
    parts = [a_part(first, 7, q), a_part("causal", 6, q), a_part("ragged", 5, q)]
    check(queries(q), parts, VARIANTS[variant])
    weighted = [replace(parts[0], log_weight=torch.randn(parts[0].keys.shape[:3])), *parts[1:]]
    check(queries(q), weighted, VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("temperature", "scale"), [(0.5, 1.0), (1.0, 0.3), (2.0, 4.0)])
def test_temperature_and_scale(variant: str, temperature: float, scale: float) -> None:
    parts = [
        a_part("none", 6, 3, temperature=temperature, scale=scale, log_weight=torch.randn(B, K, 6)),
        a_part("causal", 5, 3),
    ]
    check(queries(3), parts, VARIANTS[variant])


def test_one_query_head_for_each_kv_head() -> None:
    query = queries(4)[:, :K]
    check(query, [a_part("causal", 9, 4), a_part("ragged", 5, 4)], VARIANTS["plain"])
    check(query, [a_part("causal prompt", 4, 4)], Variant(SCALING, softcap=2.0, sinks=torch.randn(K)))


def test_values_may_have_another_size_than_keys() -> None:
    keys, values = torch.randn(B, K, 7, D), torch.randn(B, K, 7, 2 * D)
    for q in (1, 3):
        check(queries(q), [Part(keys, values, causal=True)], VARIANTS["plain"])
        check(queries(q), [Part(keys, values, causal=True)], VARIANTS["both"])


def test_causal_parts_with_fewer_entries_than_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="at least as many entries"):
        attend_with_mass(queries(5), [a_part("causal", 3, 5)], VARIANTS["both"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("q", [1, 4])
@pytest.mark.parametrize("log_weight", [False, True])
def test_rows_that_may_read_nothing_give_zeros(variant: str, q: int, log_weight: bool) -> None:
    mask = torch.ones(B, K, q, 6, dtype=torch.bool)
    mask[0, 1] = False
    mask[1, :, q - 1] = False
    keys, values = entries(6)
    parts = [Part(keys, values, mask, log_weight=torch.randn(B, K, 6) if log_weight else None)]
    for split in (parts, [*parts, Part(*entries(3), torch.zeros(B, 1, 1, 3, dtype=torch.bool))]):
        out, masses = attend_with_mass(queries(q), split, VARIANTS[variant])
        for found in (out, attend(queries(q), split, VARIANTS[variant])):
            assert bool(torch.isfinite(found).all())
            assert not found[0, G:].any()
            assert not found[1, :, q - 1].any()
        assert all(bool(torch.isfinite(mass).all()) for mass in masses)
        assert not masses[0][0, 1].any()


@settings(max_examples=40)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.lists(st.integers(0, 12), max_size=3),
    st.sampled_from(sorted(VARIANTS)),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_split_gives_what_the_whole_gives(
    n: int, q: int, cuts: list[int], variant: str, weighted: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    keys, values = entries(n)
    mask, log_weight = torch.rand(B, K, q, n) < 0.7, torch.randn(B, K, n) if weighted else None
    whole, query = Part(keys, values, mask, log_weight=log_weight), queries(q)
    bounds = [0, *sorted(min(cut, n) for cut in cuts), n]
    parts = [
        Part(
            keys[:, :, a:b],
            values[:, :, a:b],
            mask[..., a:b],
            log_weight=None if log_weight is None else log_weight[..., a:b],
        )
        for a, b in pairwise(bounds)
        if a < b
    ]
    expected, (mass,) = attend_with_mass(query, [whole], VARIANTS[variant])
    found, masses = attend_with_mass(query, parts, VARIANTS[variant])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(masses, -1), mass, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend(query, parts, VARIANTS[variant]), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attend(query, [whole], VARIANTS[variant]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("q", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cluster_counts_as_often_as_its_log_weight_says(q: int, variant: str) -> None:
    """One entry with log-weight log N is N entries with its key and value."""
    keys, values = entries(4)
    counts = torch.tensor([1, 5, 2, 3])
    separate = Part(keys.repeat_interleave(counts, 2), values.repeat_interleave(counts, 2))
    clusters = Part(keys, values, log_weight=counts.log().expand(B, K, -1))
    query = queries(q)
    for function in (attend, lambda *a: attend_with_mass(*a)[0]):
        torch.testing.assert_close(
            function(query, [clusters], VARIANTS[variant]), function(query, [separate], VARIANTS[variant])
        )


def test_a_part_of_scale_n_is_that_part_n_times() -> None:
    part, other, query = a_part("none", 5, 4), a_part("causal", 6, 4), queries(4)
    expected = attend(query, [part, part, part, other], VARIANTS["plain"])
    torch.testing.assert_close(attend(query, [replace(part, scale=3.0), other], VARIANTS["plain"]), expected)


@pytest.mark.parametrize("variant", ["plain", "both"])
@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, variant: str, block: int) -> None:
    q, query = 7, queries(7)
    parts = [
        replace(a_part("causal", 12, q), log_weight=torch.randn(B, K, 12)),
        a_part("a row for each query", 5, q),
        a_part("ragged", 4, q),
        a_part("causal prompt", q, q),
    ]
    expected, masses = attend_with_mass(query, parts, VARIANTS[variant])
    monkeypatch.setattr(reference, "QUERY_BLOCK", block)
    found, blocked = attend_with_mass(query, parts, VARIANTS[variant])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for mass, right in zip(blocked, masses, strict=True):
        torch.testing.assert_close(mass, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("q", [1, 6])
def test_mass_sums_to_the_number_of_queries(q: int) -> None:
    query = queries(q)
    parts = [a_part("none", 9, q), a_part("causal", 7, q)]
    total = sum(mass.sum(-1) for mass in mass_received(query, parts, VARIANTS["plain"]))
    torch.testing.assert_close(total, torch.full((B, K, G), float(q)))
    # Sinks take their share.
    less = sum(mass.sum(-1) for mass in mass_received(query, parts, VARIANTS["sinks"]))
    assert bool((less < q - 1e-3).all())
    # A query that reads nothing gives nothing.
    mask = torch.ones(B, 1, q, 9, dtype=torch.bool)
    mask[:, :, 0] = False
    (mass,) = mass_received(query, [replace(parts[0], mask=mask)], VARIANTS["plain"])
    torch.testing.assert_close(mass.sum(-1), torch.full((B, K, G), q - 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["plain", "both"])
@pytest.mark.parametrize("q", [1, 5])
def test_half_precision(dtype: torch.dtype, variant: str, q: int) -> None:
    parts = [Part(*entries(9, dtype), ragged(9)), Part(*entries(6, dtype), causal=True)]
    parts.append(Part(*entries(4, dtype), log_weight=torch.randn(B, K, 4)))
    query = queries(q, dtype)
    expected, masses = naive(query, parts, VARIANTS[variant])
    tolerance = {"rtol": 0.03, "atol": 4 * torch.finfo(dtype).eps}
    found, explicit = attend_with_mass(query, parts, VARIANTS[variant])
    for out in (found, attend(query, parts, VARIANTS[variant])):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, **tolerance)
    for mass, right in zip(explicit, masses, strict=True):  # logits are fp32 whatever the model's dtype
        torch.testing.assert_close(mass.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_logits_neither_overflow_nor_vanish(variant: str) -> None:
    keys, values = entries(6)
    parts = [Part(keys * 300, values), Part(keys * -300, values, causal=True)]
    for out in (
        attend(queries(4), parts, VARIANTS[variant]),
        attend_with_mass(queries(4), parts, VARIANTS[variant])[0],
    ):
        assert bool(torch.isfinite(out).all())
        assert float(out.abs().max()) <= float(values.abs().max()) + 1e-3


def test_nothing_that_was_given_changes() -> None:
    part = a_part("a row for each query", 6, 3, log_weight=torch.randn(B, K, 6))
    query = queries(3)
    copies = [t.clone() for t in (query, part.keys, part.values, part.mask, part.log_weight)]
    for variant in VARIANTS.values():
        attend(query, [part], variant)
        attend_with_mass(query, [part, part], variant)
    for tensor, copy in zip((query, part.keys, part.values, part.mask, part.log_weight), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_joined_parts_keep_their_rules() -> None:
    parts = [a_part("none", 3, 4), a_part("causal", 6, 4), a_part("one for all heads", 2, 4)]
    whole = joined(parts, 4)
    assert whole.keys.shape[2] == 11
    assert whole.mask is not None
    assert whole.mask.shape == (B, 1, 4, 11)
    assert bool(whole.mask[..., :3].all())
    assert torch.equal(whole.mask[0, 0, :, 3:9], torch.tril(torch.ones(4, 6, dtype=torch.bool), 2))
    assert whole.log_weight is None
    assert joined(parts[:1], 4) is parts[0]
    assert read_mask(parts[0], 4) is None
