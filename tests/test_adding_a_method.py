"""The page that shows how to add a method does what it says."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import kvarn
from kvarn.methods import METHODS, Method
from tiny_models import make_tiny

PAGE = (Path(__file__).parents[1] / "docs/adding-a-method.md").read_text(encoding="utf-8")
CODE, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def knorm(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    """The page's method, as if its file were in the folder."""
    module = types.ModuleType("kvarn.methods.knorm")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(CODE, module.__dict__)
    monkeypatch.setitem(METHODS, "knorm", module.KNorm)
    return module.KNorm


def test_the_page_adds_a_method_that_there_is_not():
    assert "knorm" not in METHODS
    assert len([line for line in CODE.splitlines() if line.strip()]) < 60


def test_the_test_of_the_page_passes(knorm, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "methods")
    names: dict = {}
    exec(TEST, names)
    names["test_the_same_entries_as_the_paper"]()


def test_the_method_combines_within_a_budget(knorm):
    model = make_tiny("llama")
    cache = kvarn.Cache(model, "knorm + kivi(bits=4, group=16, residual=16)", budget=0.3)
    model(torch.randint(1, 160, (1, 300)), past_key_values=cache)
    report = cache.report()
    assert 0.2 * report.dense_bytes < report.bytes <= 0.3 * report.dense_bytes
    assert kvarn.Recipe.parse("knorm(recent=4)") == kvarn.Recipe((knorm(recent=4),))
