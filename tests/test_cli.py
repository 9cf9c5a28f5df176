import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvarn import METHODS, cli
from kvarn.budgets import parse_budget
from kvarn.errors import BudgetError
from kvarn.generation import chat_turns
from kvarn.models import load
from tiny_chat import POSITIONS, save_tiny_chat

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_chat(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("The mill grinds. " * 12, encoding="utf-8")
    return str(path)


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a failing command prints."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvarn: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("text", "budget"),
    [("0.25", 0.25), (".5", 0.5), ("1.0", 1.0), ("1", 1), ("512", 512), ("64MiB", "64MiB"), ("1.5 GB", "1.5 GB")],
)
def test_budgets_keep_their_kind(text: str, budget: float | int | str) -> None:
    parsed = parse_budget(text)
    assert parsed == budget
    assert type(parsed) is type(budget)


@pytest.mark.parametrize("text", ["0", "-3", "-0.5", "0.0", "64XiB", "lots", "", "nan", "inf", "1e3"])
def test_bad_budgets_are_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        parse_budget(text)


def test_run_prints_answers_report_and_times(tiny: str, book: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "--model", tiny, "--file", book, "--ask", "What grinds?", "--max-new-tokens", "5"]
    assert cli.main([*argv, "--recipe", "snapkv(window=4)", "--budget", "100"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("> What grinds?\n")
    assert "snapkv(window=4):" in out
    assert "of" in out
    assert "dense" in out
    assert "peak" in out
    assert "s to the first token" in out
    assert "5 tokens (cut at --max-new-tokens)" in out


def test_run_gives_what_its_budget_allows_as_json(tiny: str, book: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "--model", tiny, "--file", book, "--ask", "What grinds?", "--max-new-tokens", "5"]
    full = _json(capsys, *argv)
    small = _json(capsys, *argv, "--recipe", "window", "--budget", "64")
    assert full["recipe"] == "full"
    assert full["budget"] is None
    assert small["budget"] == 64
    (turn,) = small["turns"]
    assert set(turn) == {
        "question",
        "answer",
        "finished",
        "prompt_tokens",
        "answer_tokens",
        "seconds_to_first_token",
        "seconds_per_token",
    }
    assert turn["question"] == "What grinds?"
    assert turn["prompt_tokens"] > len(Path(book).read_text())
    assert turn["answer_tokens"] == 5
    assert full["report"]["tokens"] == small["report"]["tokens"] == [turn["prompt_tokens"] + 4]
    assert full["report"]["ratio"] >= 1
    assert small["report"]["ratio"] < 0.5
    assert all(head == 64 for layer in small["report"]["entries"] for head in layer[0])


def test_the_second_turn_goes_on_where_the_first_answer_ended(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    questions = ["What grinds?", "And then?"]
    asked = [part for question in questions for part in ("--ask", question)]
    outcome = _json(capsys, "run", "--model", tiny, *asked, "--max-new-tokens", "6")

    model, tokenizer = load(tiny, device="cpu")  # with transformers alone, on the whole conversation
    tokens: list[int] = []
    answers = []
    for turn in chat_turns(tokenizer, questions):
        tokens += turn
        ids = torch.tensor([tokens])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        answers.append(tokenizer.decode(out[0, len(tokens) :], skip_special_tokens=True))
        tokens = out[0].tolist()
    assert [turn["answer"] for turn in outcome["turns"]] == answers
    assert outcome["report"]["tokens"] == [len(tokens) - 1]


def test_a_file_can_come_from_standard_input_and_be_cut(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for cut in ("30", "10"):
        monkeypatch.setattr("sys.stdin", io.StringIO("x" * 100))
        argv = ["run", "--model", tiny, "--file", "-", "--first-tokens", cut, "--ask", "Why?", "--max-new-tokens", "1"]
        counts.append(_json(capsys, *argv)["turns"][0]["prompt_tokens"])
    assert counts[0] - counts[1] == 20


def test_a_prompt_that_is_too_long_is_refused_before_it_runs(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.txt"
    path.write_text("x" * POSITIONS, encoding="utf-8")
    argv = ["run", "--model", tiny, "--file", str(path), "--ask", "Why?", "--max-new-tokens", "8"]
    message = _error(capsys, *argv)
    assert f"more than the model's {POSITIONS} positions" in message
    assert "--first-tokens" in message
    excess = int(message.split(" of answer are ")[1].split()[0])
    fits = str(POSITIONS - excess)
    assert _json(capsys, *argv, "--first-tokens", fits)["turns"][0]["answer_tokens"] == 8
    assert "are 1 more" in _error(capsys, *argv, "--first-tokens", str(POSITIONS - excess + 1))


def test_room_counts_every_turn(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "--model", tiny, "--max-new-tokens", "200", "--ask", "Why?"]
    assert cli.main(argv) == 0
    capsys.readouterr()
    message = _error(capsys, *argv, "--ask", "And?", "--ask", "So?")
    assert "up to 600 of answer" in message
    assert "--first-tokens" not in message


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--recipe", "snapvk"], "did you mean snapkv"),
        (["--recipe", "snapkv + h2o"], "cannot act together"),
        (["--recipe", "snapkv(windw=3)"], "window"),
        (["--recipe", "snapkv +"], "cannot read the recipe"),
        (["--budget", "64XiB"], "is not a size"),
        (["--budget", "0"], "above 0"),
        (["--budget=-1"], "above 0"),
        (["--file", "no/such/book.txt"], "no/such/book.txt: No such file"),
        (["--file", "."], "directory"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--model", "smolm2"], 'did you mean "smollm2"'),
    ],
)
def test_errors_are_one_line(extra: list[str], words: str, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in _error(capsys, "run", "--model", tiny, "--ask", "Why?", *extra)


def test_a_budget_that_the_prompt_shows_to_be_too_small_is_an_error(
    tiny: str, book: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "--model", tiny, "--file", book, "--ask", "Why?", "--json"]
    assert "needs at least" in _error(capsys, *argv, "--recipe", "kivi", "--budget", "0.01")


def test_a_file_that_is_no_text_is_an_error(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "noise.bin"
    path.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in _error(capsys, "run", "--model", tiny, "--file", str(path), "--ask", "Why?")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["mill"],
        ["run"],
        ["run", "--ask", "Why?", "--max-new-tokens", "0"],
        ["run", "--ask", "Why?", "--dtype", "int8"],
        ["demo", "--fact-depth", "1.5"],
        ["demo", "--json", "--markdown"],
    ],
)
def test_wrong_usage_ends_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: kvarn" in capsys.readouterr().err


def test_an_interrupted_command_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "available", interrupted)
    assert cli.main(["models"]) == 130
    assert capsys.readouterr().err == "\nkvarn: stopped\n"


def test_methods_lists_every_method_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    facts = _json(capsys, "methods")
    assert [fact["name"] for fact in facts] == list(METHODS)
    kivi = next(fact for fact in facts if fact["name"] == "kivi")
    assert kivi["parameters"] == {"bits": 2, "group": 32, "residual": 128}
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in METHODS)
    assert "\x1b" not in out


def test_methods_tells_all_about_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "snapkv"]) == 0
    out = capsys.readouterr().out
    assert "2404.14469" in out
    assert "window=32" in out
    assert "Votes are pooled" in out
    assert _json(capsys, "methods", "snapkv")["family"] == "eviction"


def test_methods_suggests_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean snapkv" in _error(capsys, "methods", "snapk")
    assert f"there are {', '.join(METHODS)}" in _error(capsys, "methods", "xyzzy")


def test_the_page_of_methods_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out == (DOCS / "methods.md").read_text(encoding="utf-8")


def test_models_lists_the_built_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    models = _json(capsys, "models")
    assert models[0]["name"] == "smollm2"
    assert set(models[0]) == {"name", "path", "size", "description"}
    assert cli.main(["models"]) == 0
    assert "smollm2" in capsys.readouterr().out
