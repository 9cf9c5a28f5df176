import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvarn.bench import suites
from kvarn.bench.fidelity import Fidelity, Perplexity
from kvarn.bench.request import Request, kvarn_subjects
from kvarn.bench.speed import WARM_UP_STEPS, Speed
from kvarn.bench.suites import SUITES, Bench, Suite
from kvarn.bench.tasks import Example, Materials, Task, Turn
from kvarn.errors import KvarnError, PromptTooLong, RecipeError, Unsupported

Chat = tuple[PreTrainedModel, PreTrainedTokenizerBase]
SMALL = Suite((256, 128), fidelity=3, perplexity=2, positions=8, tasks=("both",), examples=2, rounds=2, steps=4)


def _make(materials: Materials, length: int, rng: random.Random) -> Example:
    return Example(f"{length} {rng.random()}", (Turn("?", ("!",), "contains_all", 4),))


TASKS = {
    "both": Task("both", "kind", _make),
    "turns": Task("turns", "kind", _make, ("multi-turn",)),
    "few": Task("few", "other", _make, ("aware",), count=1),
    "needy": Task("needy", "kind", _make, needs=("qa",)),
}


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "TASKS", TASKS)
    monkeypatch.setattr(suites, "GROUPS", ["kind", "other"])


@pytest.fixture
def bench(tiny_chat: Chat, prose: Path) -> Bench:
    return Bench(tiny_chat[0], Materials(tiny_chat[1], prose), SMALL, seed=7)


def test_one_of_every_kind_comes_before_the_second_of_any(bench: Bench) -> None:
    assert [case.key for case in bench.cases()] == [
        *(
            key
            for length in (128, 256)
            for key in (
                f"fidelity/text/{length}/0",
                f"perplexity/{length}/0",
                f"task/both/aware/{length}/0",
                f"task/both/agnostic/{length}/0",
                f"fidelity/chat/{length}/1",
                f"perplexity/{length}/1",
                f"task/both/aware/{length}/1",
                f"task/both/agnostic/{length}/1",
                f"fidelity/text/{length}/2",
            )
        ),
        *(f"speed/{length}x1/{number}" for length in (128, 256) for number in (0, 1)),
    ]


def test_lengths_are_of_prompt_and_answer_together(bench: Bench) -> None:
    for case in bench.cases():
        if isinstance(case, Fidelity):
            assert len(case.prompt) + case.positions + 1 == case.length
        elif isinstance(case, Perplexity):
            assert len(case.prompt) + len(case.following) == case.length
            assert len(case.following) == 8 + 1
        elif isinstance(case, Speed):
            assert case.prompts.shape == (1, case.length - 4 - WARM_UP_STEPS)


def test_chat_prompts_are_whole_chats(bench: Bench) -> None:
    tokenizer = bench.materials.tokenizer
    chats = [case for case in bench.cases() if isinstance(case, Fidelity) and case.source == "chat"]
    for case in chats:
        text = tokenizer.decode(case.prompt)
        assert text.startswith("<|im_start|>user\n")
        assert text.endswith(f"\n\n{suites.SUMMARIZE}<|im_end|>\n<|im_start|>assistant\n")


def test_the_same_seed_asks_the_same(bench: Bench) -> None:
    def prompts(seed: int) -> list:
        return [c.prompt for c in replace(bench, seed=seed).cases() if isinstance(c, Fidelity | Perplexity)]

    assert prompts(7) == prompts(7)
    assert prompts(7) != prompts(8)


def test_tasks_by_name_and_group(bench: Bench) -> None:
    def keys(*names: str, **changes: object) -> list[str]:
        suite = replace(SMALL, lengths=(128,), fidelity=0, perplexity=0, rounds=0, tasks=names, **changes)
        return [case.key.removeprefix("task/") for case in replace(bench, suite=suite).cases()]

    assert keys("few", examples=3) == ["few/aware/128/0"]
    assert keys("kind", examples=1) == ["both/aware/128/0", "both/agnostic/128/0", "turns/multi-turn/128/0"]
    assert keys("kind", "both", examples=1, settings=("aware",)) == ["both/aware/128/0"]
    with pytest.raises(KvarnError, match="needy needs --qa FILE"):
        keys("needy")
    with pytest.raises(KvarnError, match="'tuns'; did you mean turns"):
        keys("tuns")


@pytest.mark.parametrize(
    ("suite", "error", "message"),
    [
        (replace(SMALL, lengths=(1024,)), PromptTooLong, "positions for 512"),
        (replace(SMALL, lengths=(12,)), Unsupported, "too short"),
    ],
)
def test_what_cannot_be_is_refused_at_once(bench: Bench, suite: Suite, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        replace(bench, suite=suite).cases()


def test_a_text_that_is_too_short_is_refused(bench: Bench, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A mill. " * 20)
    with pytest.raises(Unsupported, match="160 tokens; give a longer one with --text"):
        replace(bench, materials=replace(bench.materials, text=short)).cases()


def test_recipes_meet_budgets_where_they_take_one(tiny_chat: Chat) -> None:
    subjects = kvarn_subjects(tiny_chat[0], ["kivi(bits=4)", "full", "snapkv+kivi", "kivi(bits=4)"], [0.5, 64])
    assert [subject.label for subject in subjects] == [
        "full",
        "kivi(bits=4)",
        "snapkv + kivi @ 0.5",
        "snapkv + kivi @ 64",
    ]
    with pytest.raises(RecipeError):
        kvarn_subjects(tiny_chat[0], ["snapvk"], [])


def _request(prose: Path) -> Request:
    return Request.of(
        model="smollm2",
        dtype="float32",
        device=None,
        recipes=("snapkv",),
        budgets=(0.5, "64MiB", None),
        peers="",
        suite=SUITES["quick"],
        seed=3,
        files={"text": str(prose)},
        data=(),
        shard=(2, 3),
    )


def test_a_request_comes_back_from_its_folder(prose: Path, tiny_chat: Chat) -> None:
    import json

    request = _request(prose)
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert request.materials(tiny_chat[1]) == Materials(tiny_chat[1], prose)


def test_a_file_that_changed_forbids_to_resume(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    known = _request(text).to_dict()
    text.write_text("two")
    with pytest.raises(KvarnError, match="changed since the run began"):
        Request.from_dict(known)
    text.unlink()
    with pytest.raises(KvarnError, match="No such file"):
        Request.from_dict(known)
