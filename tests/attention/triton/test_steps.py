"""Decoding steps of layers whose attention the kernels compute, beside the same layers on the reference path."""

import pytest
import torch

from kernel_reference import ON_A_GPU
from kvarn.attention import kernels
from kvarn.memory.kernels import reference_only
from learnt import kvquant
from methods.one_layer import VARIANT, OneLayer, random_tokens, split
from per_token import PerToken

RECIPES = [
    ("full", 10**9),
    ("kivi(bits=4, group=16, residual=16)", 10**9),
    pytest.param("snapkv(window=8) + kivi(bits=2, group=16, residual=16)", 24, marks=ON_A_GPU),
    ("h2o", 20),
    pytest.param("lazyeviction(window=4)", 30, marks=ON_A_GPU),
    ("scissorhands(history=16, recent=2)", 24),
    pytest.param("cake(window=4, capacity=20)", 20, marks=ON_A_GPU),
    pytest.param("d2o", 24, marks=ON_A_GPU),
    pytest.param("h2o + kivi(bits=4, group=16, residual=16)", 36, marks=ON_A_GPU),
    pytest.param("keyformer", 20, marks=ON_A_GPU),
    pytest.param("razorattention", 20, marks=ON_A_GPU),
    pytest.param("think(ratio=0.5, window=8, recent=8)", 10**9, marks=ON_A_GPU),
    ("snapkv(window=8) + think(ratio=0.4, window=8, recent=4)", 24),
    pytest.param("think(ratio=0.5, window=8) + kivi(bits=4, group=8, residual=8)", 10**9, marks=ON_A_GPU),
    pytest.param("mikv(low=4)", 10**9, marks=ON_A_GPU),
    ("arkv(window=4, keep=0.9)", 24),
    ("snapkv(window=8) + zipcache(gap=5)", 24),
    ("fp8", 10**9),
    (PerToken(), 10**9),
    pytest.param("think(ratio=0.5, window=8) + fp8", 10**9, marks=ON_A_GPU),
    pytest.param("h2o + fp8", 20, marks=ON_A_GPU),
    pytest.param("snapkv(window=8) + mustafar(recent=4)", 24, marks=ON_A_GPU),
    pytest.param("gear(group=8, block=8)", 10**9, marks=ON_A_GPU),
    pytest.param("vidkv(key_bits=2.0, group=8, residual=8)", 10**9, marks=ON_A_GPU),
    (kvquant(), 10**9),
]


@pytest.mark.parametrize(("recipe", "capacity"), RECIPES)
def test_steps_by_kernels_are_those_of_the_reference(recipe, capacity, device, monkeypatch):
    tokens = random_tokens(49)
    served = []

    def spied(*arguments):
        out = kernels.decode(*arguments)
        served.append(out is not None)
        return out

    monkeypatch.setattr("kvarn.layers.group.decode", spied)
    outs, layers = {}, {}
    for name, devices in (("reference", set()), ("kernels", {device.type})):
        monkeypatch.setattr("kvarn.memory.kernels.DEVICES", devices)
        layer = layers[name] = OneLayer(recipe, capacity, device.type)
        layer.prompt(*(t.to(device) for t in split(tokens, 0, 40)))
        steps = [layer.token(*(t.to(device) for t in split(tokens, t, t + 1))) for t in range(40, 49)]
        outs[name] = torch.cat(steps, 2)
    assert served == [False] * 9 + [True] * 9
    torch.testing.assert_close(outs["kernels"], outs["reference"], rtol=1e-4, atol=1e-4)
    assert layers["kernels"].group.store.lengths.tolist() == layers["reference"].group.store.lengths.tolist()
    columns = layers["kernels"].group.store.stores[-1].columns
    if columns:
        assert layers["kernels"].positions() == layers["reference"].positions()
        for name in columns.format.layout:
            ours, theirs = (layers[each].by_position(name) for each in ("kernels", "reference"))
            for mine, its in zip(ours, theirs, strict=True):
                found, wanted = (torch.tensor([column[place] for place in sorted(column)]) for column in (mine, its))
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_no_kernel_reads_goes_the_reference_path(device, monkeypatch):
    monkeypatch.setattr("kvarn.attention.triton.decode._MOST_QUERIES", 1)
    tokens = random_tokens(41)
    layer = OneLayer("full", 10**9, device.type)
    layer.prompt(*(t.to(device) for t in split(tokens, 0, 40)))
    heads = layer.group.heads(0)
    query = tokens[0][:, :, 40:].to(device)
    assert kernels.decode(query, layer.group.store, heads, VARIANT) is None
    assert bool(layer.token(*(t.to(device) for t in split(tokens, 40, 41))).isfinite().all())


def test_kernels_can_be_switched_off(device):
    tokens = random_tokens(41)
    layer = OneLayer("full", 10**9, device.type)
    layer.prompt(*(t.to(device) for t in split(tokens, 0, 40)))
    arguments = tokens[0][:, :, 40:].to(device), layer.group.store, layer.group.heads(0), VARIANT
    with reference_only():
        assert kernels.decode(*arguments) is None
    assert kernels.decode(*arguments) is not None
