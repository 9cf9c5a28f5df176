"""The figures of docs/figures are drawn from the results."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "plots.py"
OURS = {"recipe": "snapkv", "entries": 512, "tokens": 2048, "sequences": 3}
THEIRS = {"cache": "dynamic", "tokens": 1024, "sequences": 1}
DECODING = {
    "machine": {"device": "NVIDIA X"},
    "rows": {
        "one": OURS | {"step_ms": 4.0, "floor_ms": 2.0, "times_floor": 2.0, "tokens_per_second": 750},
        "failed": {"failed": "OutOfMemoryError"},
        "two": THEIRS | {"step_ms": 50.0, "floor_ms": 2.0, "times_floor": 25.0, "tokens_per_second": 20},
    },
}
ATTENTION = {
    "device": "NVIDIA X",
    "rows": [
        {"case": case, "lengths": lengths, "of_copy": 0.9 / speed, "against_first": speed}
        for case, speed in (("dense", 1.0), ("int4", 2.5))
        for lengths in ("32768", "spread")
    ],
}


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("plots", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_say_what_the_results_say(plots, tmp_path):
    (tmp_path / "decoding.json").write_text(json.dumps(DECODING))
    (tmp_path / "attention.json").write_text(json.dumps(ATTENTION))
    files = plots.drawn(tmp_path, tmp_path / "figures")
    text = {file.stem: file.read_text(encoding="utf-8") for file in files}
    assert set(text) == {"decoding-steps", "decoding-throughput", "attention-bandwidth", "attention-speedup"}
    assert all("NVIDIA X" in each and len(each) < 60_000 for each in text.values())
    for label in (
        "snapkv, 512 of 2k × 3",
        "transformers dynamic, 1k × 1",
        "4.0 ms, 2.00× floor",
        "50.0 ms, 25.00× floor",
    ):
        assert label in text["decoding-steps"]
    assert ">750<" in text["decoding-throughput"]
    assert ">0.36<" in text["attention-bandwidth"]
    assert "2.5×" in text["attention-speedup"]
    assert "32k entries a head" in text["attention-speedup"]


def test_the_same_results_give_the_same_figures(plots, tmp_path):
    (tmp_path / "decoding.json").write_text(json.dumps(DECODING))
    once, again = (plots.drawn(tmp_path, tmp_path / folder) for folder in ("once", "again"))
    assert [file.read_bytes() for file in once] == [file.read_bytes() for file in again]
    assert [file.stem for file in once] == ["decoding-steps", "decoding-throughput"]
