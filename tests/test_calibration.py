"""What methods learn about models: saved, found again, refused for another model."""

from dataclasses import dataclass

import pytest
import torch

import kvarn
from kvarn.calibration import Calibration, calibrate, fingerprint, path_of
from kvarn.cli import main
from kvarn.errors import CalibrationError
from kvarn.methods.duoattention import DuoAttention
from kvarn.methods.snapkv import SnapKV
from kvarn.recipe import Recipe
from tiny_models import make_tiny


@dataclass(frozen=True)
class Reading(Calibration):
    number: int = 7

    def run(self, model, tokenizer, text, progress):
        progress(1, 1)
        return {"gates": torch.full((4, 2), float(len(text)))}


@dataclass(frozen=True)
class Learner(DuoAttention):
    name = "learner"

    def calibration(self) -> Calibration:
        return Reading()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path))
    return tmp_path


def test_what_was_learnt_is_found_again() -> None:
    model, steps = make_tiny("llama"), []
    path = calibrate(model, None, Learner(), "some text", lambda done, total: steps.append((done, total)))
    assert (path, steps) == (path_of(model, "learner"), [(1, 1)])
    cache = kvarn.Cache(model, Learner(sinks=3))
    (method,) = cache.recipe.methods
    assert method.learnt["gates"].tolist() == [[9.0, 9.0]] * 4
    assert method == Learner(sinks=3)
    half = make_tiny("llama").to(torch.bfloat16)
    assert kvarn.Cache(half, Learner()).recipe.methods[0].learnt["gates"].shape == (4, 2)


def test_another_model_is_told_from_this_one() -> None:
    model, other = make_tiny("llama"), make_tiny("llama", seed=1)
    path = calibrate(model, None, Learner(), "text")
    assert fingerprint(model) != fingerprint(other)
    with pytest.raises(CalibrationError, match="learner has to be calibrated for this llama once: run kvarn"):
        kvarn.Cache(other, Learner())
    stray = path_of(other, "learner")
    stray.parent.mkdir(parents=True)
    stray.write_bytes(path.read_bytes())
    with pytest.raises(CalibrationError, match=r"made for another model \(a llama\); calibrate learner for this one"):
        kvarn.Cache(other, Learner())
    stray.write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="not a calibration of kvarn, or damaged"):
        kvarn.Cache(other, Learner())
    path_of(model, "duoattention").write_bytes(path.read_bytes())
    with pytest.raises(CalibrationError, match="a calibration of learner, not of duoattention"):
        kvarn.Cache(model, "duoattention")


def test_where_there_is_nothing_to_learn(capsys) -> None:
    with pytest.raises(CalibrationError, match="snapkv needs no calibration"):
        calibrate(make_tiny("llama"), None, SnapKV(), "text")
    with pytest.raises(CalibrationError, match="has to be calibrated for a model first"):
        Recipe.parse("duoattention").policy  # noqa: B018
    assert main(["calibrate", "smollm2", "snapkv"]) == 2
    assert main(["calibrate", "smollm2", "duoattention + kivi"]) == 2
    assert "snapkv needs no calibration" in capsys.readouterr().err
