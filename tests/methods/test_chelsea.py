"""Chelsea against bipartite soft matching in plain loops (arXiv 2506.11418), and what its counts must keep."""

from dataclasses import dataclass, replace

import pytest
import torch
from one_layer import KV_HEADS, OneLayer, random_tokens, split
from real_text import divergences
from torch.nn.functional import cosine_similarity

from kvarn.errors import RecipeError
from kvarn.methods.chelsea import Chelsea
from kvarn.reduction import Clustering, Entries, Joined


def naive_merge(entries: list, leaving: int, chunk: int, sinks: int, recent: int, seen: int) -> list:
    """Entries [position, key, value, count] of one head, ``leaving`` fewer."""
    entries = sorted(entries, key=lambda e: e[0])
    while leaving:
        free = [e for e in entries if sinks <= e[0] < seen - recent]
        matches = []
        for first in range(0, len(free), chunk):
            part = free[first : first + chunk]
            for a in part[::2]:
                similar = [(float(cosine_similarity(a[1], b[1], dim=0)), -i, b) for i, b in enumerate(part[1::2])]
                if similar:
                    best = max(similar, key=lambda s: s[:2])
                    matches.append((best[0], a, best[2]))
        matches.sort(key=lambda match: -match[0])
        members: dict[int, list] = {}
        for _, a, b in matches[:leaving]:
            members.setdefault(b[0], []).append(a)
            entries = [e for e in entries if e is not a]
            leaving -= 1
        for e in entries:
            together = [e, *members.get(e[0], [])]
            total = sum(m[3] for m in together)
            e[1], e[2] = (sum(m[3] * m[side] for m in together) / total for side in (1, 2))
            e[3] = total
    return entries


def held(layer: OneLayer) -> list[dict[int, tuple]]:
    keys, values = layer.keys_and_values()
    positions, counts = layer._rows("position"), layer._rows("count")
    return [{p: (keys[h, i], values[h, i], counts[h][i]) for i, p in enumerate(row)} for h, row in enumerate(positions)]


@pytest.mark.parametrize(("chunk", "capacity"), [(8, 26), (8, 14), (64, 20)])
def test_the_same_centroids_as_in_plain_loops(chunk, capacity):
    sinks, recent, block, prompt = 2, 6, 3, 40
    tokens = random_tokens(56)
    layer = OneLayer(f"chelsea(chunk={chunk}, sinks={sinks}, recent={recent}, block={block})", capacity)
    entries = [[[p, tokens[1][0, h, p], tokens[2][0, h, p], 1] for p in range(prompt)] for h in range(KV_HEADS)]
    for seen in range(prompt, 57):
        if seen == prompt:
            layer.prompt(*split(tokens, 0, prompt))
            leaving = prompt - capacity
        else:
            layer.token(*split(tokens, seen - 1, seen))
            leaving = block if len(entries[0]) + 1 > capacity else 0
            for h in range(KV_HEADS):
                entries[h].append([seen - 1, tokens[1][0, h, seen - 1], tokens[2][0, h, seen - 1], 1])
        entries = [naive_merge(e, leaving, chunk, sinks, recent, seen) for e in entries]
        for found, expected in zip(held(layer), entries, strict=True):
            assert sorted(found) == [e[0] for e in expected]
            for position, key, value, count in expected:
                torch.testing.assert_close(found[position][0], key, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(found[position][1], value, rtol=1e-4, atol=1e-4)
                assert found[position][2] == count


def test_counts_add_up_to_the_tokens_and_sums_stay():
    tokens = random_tokens(120)
    layer = OneLayer("chelsea(chunk=16, recent=8, block=4)", 30)
    layer.prompt(*split(tokens, 0, 80))
    for position in range(80, 120):
        layer.token(*split(tokens, position, position + 1))
    for h, entries in enumerate(held(layer)):
        assert sum(count for _, _, count in entries.values()) == 120
        for side in (0, 1):
            total = sum(e[2] * e[side] for e in entries.values())
            torch.testing.assert_close(total, tokens[1 + side][0, h].sum(0), rtol=1e-3, atol=1e-3)


def test_equal_neighbours_are_merged_without_loss():
    query, keys, values = random_tokens(50)
    places = torch.cat([torch.arange(4), 4 + torch.arange(36) // 2 * 2, torch.arange(40, 50)])
    keys, values = keys[:, :, places], values[:, :, places]
    merged, full = OneLayer("chelsea(chunk=36, sinks=4, recent=4, block=1)", 30), OneLayer("full")
    for layer in (merged, full):
        layer.prompt(*split((query, keys, values), 0, 44))
    now = split((query, keys, values), 44, 45)
    torch.testing.assert_close(merged.token(*now), full.token(*now), rtol=1e-4, atol=1e-4)
    store = merged.group.store
    assert len(merged.positions()[0]) == 30
    store.set_columns(merged.group.everyone, {"count": torch.ones(KV_HEADS, 30)})
    forgotten = merged.token(*split((query, keys, values), 45, 46))
    assert not torch.allclose(forgotten, full.token(*split((query, keys, values), 45, 46)), atol=1e-2)


def test_a_second_prompt_merges_what_is_stored_too():
    tokens = random_tokens(90)
    layer = OneLayer("chelsea(chunk=16, recent=8, block=4)", 30)
    layer.prompt(*split(tokens, 0, 50))
    layer.prompt(*split(tokens, 50, 90))
    for entries in held(layer):
        assert len(entries) == 30
        assert set(range(82, 90)) | set(range(4)) <= set(entries)
        assert sum(count for _, _, count in entries.values()) == 90


def test_room_for_everything_changes_nothing():
    tokens = random_tokens(30)
    layer, full = OneLayer("chelsea", 200), OneLayer("full")
    assert torch.equal(layer.prompt(*split(tokens, 0, 20)), full.prompt(*split(tokens, 0, 20)))
    for position in range(20, 30):
        now = split(tokens, position, position + 1)
        torch.testing.assert_close(layer.token(*now), full.token(*now), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parameters", [{"kept": 0.0}, {"chunk": 1}, {"block": 0}, {"sinks": -1}])
def test_bad_parameters(parameters):
    with pytest.raises(RecipeError, match="chelsea"):
        Chelsea(**parameters)


class Uncounted(Clustering):
    def join(self, entries: Entries) -> Joined:
        return replace(super().join(entries), columns={})


class Dropped(Uncounted):
    def join(self, entries: Entries) -> Joined:
        joined = super().join(entries)
        return replace(joined, into=torch.where(joined.stays, joined.into, -1))


@dataclass(frozen=True)
class Variant(Chelsea):
    """Chelsea with another reduction."""

    reduction: type[Clustering] = Clustering

    def eviction(self) -> Clustering:
        made = super().eviction()
        return self.reduction(**{name: getattr(made, name) for name in made.__dataclass_fields__})


def test_on_a_real_text_means_that_count_are_closer_than_means_that_do_not_and_than_dropping(smollm2):
    variants = [(Variant(recent=16, block=8, reduction=kind), 80) for kind in (Clustering, Uncounted, Dropped)]
    counted, uncounted, dropped = divergences(smollm2, variants)
    assert counted < uncounted
    assert counted < dropped
