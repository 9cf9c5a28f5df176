"""Columns that the kernels bring up to date, beside what the scores compute of the reference's attention."""

import pytest
import torch

from kvarn import Cache
from kvarn.attention import Part, Variant, attend_observed, kernels
from kvarn.attention.updates import Updates
from kvarn.formats import Columns, Dense
from kvarn.memory import Arena, SideLayout, Store, StoreLayout, TieredLayout, TieredStore
from kvarn.memory.segment import pick
from kvarn.scoring import AccumulatedMass, Observation, Persistence, ProbedMass, Recurrence
from kvarn.scoring.shifting import ShiftingMass
from tiny_models import make_tiny

SIZE = 16
SCORES = [
    AccumulatedMass(),
    ProbedMass(0.1, 0.1, 0),
    ShiftingMass(window=6, shift=2.0),
    Recurrence(threshold=0.03, window=4),
    Persistence(history=24),
]
NAMES = [type(score).__name__ for score in SCORES]


def stored(score, counts, now, device, dtype=torch.float32, tiers=1):
    """A store of two layers, ``counts`` entries a head, with columns as they may be before the query at ``now`` of each
    sequence, and the heads of the second layer. With ``tiers`` the entries of a head are in so many stores."""
    dense = Dense(SIZE, dtype)
    side = SideLayout(dense, dense)
    columns = Columns({"position": torch.int32, **score.columns})
    layout, arena, heads = StoreLayout(side, side, columns, 4), Arena(device, 4), 2 * len(counts)
    store = Store(layout, arena, heads)
    if tiers > 1:
        store = TieredStore(TieredLayout(layout, layout, 0.5, fresh=layout if tiers == 3 else None), arena, heads)
    generator = torch.Generator().manual_seed(3)
    both = torch.tensor(counts).repeat(2)
    shape = (both.numel(), int(both.max()))
    keys, values = (torch.randn(*shape, SIZE, generator=generator).to(device, dtype) for _ in range(2))
    last = now.repeat_interleave(len(counts) // now.numel()).repeat(2)[:, None]
    position = last - torch.rand(shape, generator=generator).argsort(1)
    extra = {"position": position.int()}
    for name, (trailing, kind) in columns.layout.items():
        if name != "position":
            random = torch.rand((*shape, *trailing), generator=generator)
            extra[name] = random if kind == torch.float32 else (random * 200).to(kind)
    if isinstance(score, Recurrence):
        extra["last"] = (last - 1 - extra["last"] % 40).int()
    # Some heads have nothing in the first store.
    cuts = [torch.zeros_like(both), *(both * part // (tiers + 1) for part in range(1, tiers)), both]
    for each, begin, end in zip(store.stores, cuts[:-1], cuts[1:], strict=True):
        index = (begin[:, None] + torch.arange(int((end - begin).max()))).clamp(max=shape[1] - 1)
        rows = {n: pick(c, index).to(device) for n, c in extra.items()}
        each.append(slice(0, shape[0]), *(pick(x, index.to(device)) for x in (keys, values)), rows, end - begin)
    return store, slice(len(counts), 2 * len(counts))


def check(score, counts, group, device, now=(90, 131), dtype=torch.float32, tiers=1, **variant):
    now = torch.tensor(now)
    store, heads = stored(score, counts, now, device, dtype, tiers)
    shape, positions = (now.numel(), -1), now[:, None].to(device)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(now.numel(), len(counts) // now.numel() * group, 1, SIZE, generator=generator)
    query = 2 * query.to(device, dtype)
    shaped = Variant(SIZE**-0.5, **variant)
    held = (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).to(device)
    before = {name: column.unflatten(0, shape) for name, column in store.read_columns(heads).items()}
    before["position"] = before["position"].long().masked_fill(~held.unflatten(0, shape), -1)
    others = store.read_columns(slice(0, heads.start))
    keys, values = (x.unflatten(0, shape) for x in store.read(heads))
    attended, paid = attend_observed(query, [Part(keys, values, held.unflatten(0, shape)[:, :, None])], shaped)
    expected = score.observe(Observation(paid, positions, torch.ones_like(now).to(device), 0), before)

    out, nothing = kernels.decode(query, store, heads, shaped, updates=Updates((score.update,), positions))
    assert nothing is None
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out, attended, rtol=tolerance, atol=tolerance)
    after = store.read_columns(heads)
    for name, column in after.items():
        old, new = (t[name].flatten(0, 1)[held] for t in (before, {**before, **expected}))
        torch.testing.assert_close(column[held], new.to(column.dtype), rtol=tolerance, atol=tolerance)
        assert name == "position" or not torch.equal(old.to(column.dtype), new.to(column.dtype)), "nothing changed"
    for name, column in store.read_columns(slice(0, heads.start)).items():
        assert torch.equal(column, others[name]), "another layer's columns changed"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of entries, and several for a program."""
    monkeypatch.setattr("kvarn.attention.triton.columns._BLOCK", 16)
    monkeypatch.setattr("kvarn.attention.triton.columns._PROGRAMS", 8)


@pytest.mark.parametrize("score", SCORES, ids=NAMES)
def test_ragged_heads(score, device):
    # All that a single entry is paid is exactly the equal share of it: rounding would decide whether it is ignored.
    check(score, (40, 5, 2 if isinstance(score, Persistence) else 1, 23), 4, device)


@pytest.mark.parametrize("tiers", [2, 3])
@pytest.mark.parametrize("score", SCORES, ids=NAMES)
def test_several_stores(score, tiers, device):
    check(score, (40, 5, 2, 23), 2, device, tiers=tiers)


def test_a_store_without_entries(device):
    check(ShiftingMass(window=6, shift=2.0), (1, 2), 2, device, now=(40,), tiers=2)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_groups(group, device):
    check(Recurrence(threshold=0.03, window=4), (20, 5), group, device)


@pytest.mark.parametrize("score", SCORES, ids=NAMES)
def test_an_empty_head_beside_sinks(score, device):
    check(score, (33, 0), 2, device, now=(40,), sinks=torch.tensor([0.5, -3.0, 1.0, 0.0], device=device))


def test_capped_logits(device):
    check(AccumulatedMass(), (33, 17), 2, device, now=(40,), softcap=2.0)


@pytest.mark.parametrize("score", SCORES[1:3], ids=NAMES[1:3])
def test_half_precision(score, device):
    check(score, (20, 5), 2, device, dtype=torch.float16)


def test_a_fork_keeps_its_columns(device):
    model = make_tiny("llama").to(device)
    ids = torch.randint(1, 160, (1, 30), generator=torch.Generator().manual_seed(0)).to(device)
    cache = Cache(model, "h2o", 40)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        fork = cache.fork()
        before = [group.store.read_columns(group.everyone)["mass"] for group in fork.groups]
        for _ in range(2):
            model(ids[:, :1], past_key_values=cache)
        for group, mass in zip(fork.groups, before, strict=True):
            assert torch.equal(group.store.read_columns(group.everyone)["mass"], mass)
            assert not torch.equal(cache.groups[0].store.read_columns(slice(0, 2))["mass"][:, :30], mass[:2])
    pools = {segment.pool for group in cache.groups for segment in group.store.segments}
    cache.free()
    fork.free()
    assert all(pool.used == 0 and pool.shared == 0 for pool in pools)
