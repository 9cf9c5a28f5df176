import pytest
import torch
from fake_subject import FakeSubject
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvarn.bench.speed import WARM_UP_STEPS, Speed
from kvarn.bench.subjects import KvarnSubject

PROMPTS = torch.arange(3, 3 + 40).expand(2, -1)


def _speed(full: FakeSubject | KvarnSubject, number: int) -> Speed:
    return Speed(full, number, 44, PROMPTS, 3, torch.device("cpu"))


@pytest.mark.parametrize("number", [0, 1])
def test_both_read_the_same_in_turns(number: int) -> None:
    reads: list[list[int]] = []
    own, full = FakeSubject(name="own", reads=reads), FakeSubject(name="full", reads=reads)
    record = _speed(full, number).prepared()(own)
    steps = 3 + WARM_UP_STEPS
    measured = reads[-2 * (1 + steps) :]
    assert [len(read) for read in measured] == [40, 40, *(n for step in range(steps) for n in [41 + step] * 2)]
    assert len(reads) - len(measured) == (4 if number == 0 else 0)  # round 0 warms up
    assert record["batch"] == 2
    assert record["first_token"] == record["first_token_full"] == [0.5]
    assert record["per_token"] == record["per_token_full"] == [0.5] * 3
    assert own.all_closed_once()
    assert full.all_closed_once()


def test_the_process_peak_is_watched_where_the_subject_comes_first(
    tiny_chat: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model = tiny_chat[0]
    full = KvarnSubject(model, "full")
    first, second = (_speed(full, n).prepared()(KvarnSubject(model, "window", 0.5)) for n in (0, 1))
    assert first["process_peak_bytes"] > 10**7
    assert first["device_peak_bytes"] is None
    assert second["process_peak_bytes"] is None
    assert first["held"]["bytes"] < first["held"]["dense_bytes"]
    assert all(seconds > 0 for seconds in first["per_token"] + first["per_token_full"] + first["first_token"])
