import json

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvarn import cli, demo
from kvarn.errors import PromptTooLong, Unsupported
from kvarn.models import load
from tiny_chat import POSITIONS, save_tiny_chat

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load(save_tiny_chat(tmp_path_factory.mktemp("models") / "tiny"), device="cpu")


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.9, 1.0])
def test_the_fact_is_planted_once_at_the_depth_that_is_told(tiny: Pair, depth: float) -> None:
    _, tokenizer = tiny
    task = demo.plant(tokenizer, 3000, depth)
    text = tokenizer.decode(task.prompt)
    assert text.count(demo.FACT) == 1
    assert text.rindex(demo.QUESTION) > text.index(demo.FACT)
    assert task.text_tokens >= 3000
    header = text.index("user\n") + len("user\n")
    # Bytes are this tokenizer's tokens.
    before = len(tokenizer(text[header : text.index(demo.FACT)]).input_ids)
    assert task.depth == before / task.text_tokens
    assert task.depth == pytest.approx(depth, abs=0.15)
    assert f"{task.text_tokens:,} tokens" in str(task)
    assert f"depth {task.depth:.2f}" in str(task)


def test_a_text_that_is_too_long_is_refused(tiny: Pair) -> None:
    model, tokenizer = tiny
    with pytest.raises(Unsupported, match="ask for no more"):
        demo.plant(tokenizer, 10**7, 0.4)
    with pytest.raises(PromptTooLong, match=f"{POSITIONS}"):
        demo.compare(model, tokenizer, demo.plant(tokenizer, 2 * POSITIONS, 0.4))


def test_rows_are_measured(tiny: Pair) -> None:
    model, tokenizer = tiny
    task = demo.plant(tokenizer, 150, 0.4)
    recipes: list[tuple[str, demo.Budget]] = [("full", None), ("window", 64), ("window", 10_000), ("kivi", None)]
    stages: list[str] = []
    full, window, everything, kivi = demo.compare(model, tokenizer, task, recipes, stages.append)
    assert len(stages) == demo.STAGES * len(recipes)
    assert [row.budget for row in (full, window, everything, kivi)] == [None, 64, 10_000, None]
    assert full.divergence == 0
    assert full.ratio >= 1
    # A window that holds all tokens is the full cache; a smaller one is not.
    assert everything.divergence == pytest.approx(0, abs=1e-6)
    assert everything.answer == full.answer
    assert window.divergence > 1e-3
    assert window.ratio < 0.5
    assert window.bytes <= window.peak_bytes < full.peak_bytes
    assert kivi.divergence > 1e-6
    assert full.dense_bytes == 2 * 2 * 2 * 16 * 4 * (len(task.prompt) + demo.MOST_TOKENS - 1)
    assert all(row.to_first_token > 0 and row.per_token for row in (full, window, everything, kivi))


def test_divergence_is_the_formula() -> None:
    full, other = torch.randn(2, 3, 5).log_softmax(-1)
    expected = sum(float(f.exp() * (f - o)) for f, o in zip(full.flatten(), other.flatten(), strict=True)) / 3
    assert demo._divergence(full, other) == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def outcome(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> demo.Demo:
    """A small outcome that ``kvarn demo`` finds instead of measuring its own."""
    model, tokenizer = tiny
    task = demo.plant(tokenizer, 150, 0.4)
    small = demo.Demo("tiny", task, demo.compare(model, tokenizer, task, [("full", None), ("window", 0.25)]), 1.5)
    monkeypatch.setattr(demo, "run", lambda progress, tokens, depth: small)
    return small


def test_the_command_prints_the_table(outcome: demo.Demo, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) >= 110
    row = next(line for line in out.splitlines() if line.strip().startswith("window"))
    assert f"{outcome.rows[1].ratio:.3f}" in row
    assert f"{outcome.rows[1].divergence:.4f}" in row
    assert demo.FACT in " ".join(out.split())


def test_the_command_prints_json_and_markdown(outcome: demo.Demo, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(outcome.to_dict()))
    assert told["text"]["tokens"] == outcome.task.text_tokens
    assert [row["recipe"] for row in told["rows"]] == ["full", "window"]
    assert told["rows"][0]["ratio"] == outcome.rows[0].ratio
    assert cli.main(["demo", "--markdown"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 4  # head, rule and two rows: an answer's line breaks stay out of the table
    assert len({line.count("|") for line in lines}) == 1


def test_the_real_model_finds_the_fact_with_the_full_cache_and_loses_it_with_a_window(smollm2: Pair) -> None:
    model, tokenizer = smollm2
    task = demo.plant(tokenizer, 250, 0.4)
    full, window = demo.compare(model, tokenizer, task, [("full", None), ("window", 0.25)])
    assert full.right
    assert not window.right
    assert window.divergence > 0.1
