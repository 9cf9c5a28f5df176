"""The demonstration: a fact in a long text, asked for with the full cache and with compressed ones."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .budgets import Budget
from .cache import Cache
from .errors import Unsupported
from .generation import Answer, answer, chat_turns, next_logits, require_room
from .models import load
from .spec import ModelSpec
from .tables import Table

FACT = "The special magic number for the Kiruna mill is 73915."
QUESTION = "Answer from the text above. What is the special magic number for the Kiruna mill?"
EXPECTED = "73915"
MOST_TOKENS = 24

# The full cache comes first: the others are compared with its answer. Methods that need the attention mass of every
# query, such as h2o, are left out, because their prompts take more than half as long again.
RECIPES: list[tuple[str, Budget]] = [
    ("full", None),
    ("window", 0.25),
    ("snapkv", 0.25),
    ("kivi(bits=4)", None),
    ("snapkv + kivi(bits=4)", 0.125),
    ("snapkv + kivi(bits=2)", 0.0625),
]

# Chapters of Python's language reference. Every Python has it; its words differ a little between versions.
_CHAPTERS = ["objects", "execmodel", "import", "assignment", "try", "comparisons", "class", "function"]
STAGES = 3  # of each recipe: it reads, it answers, it is compared


@dataclass(frozen=True)
class Task:
    """A text with a planted fact, and the prompt that asks for it. ``depth``: the share of the text before the fact."""

    prompt: list[int]
    text_tokens: int
    depth: float

    def __str__(self) -> str:
        return (
            f"Text: Python's language reference, {self.text_tokens:,} tokens (prompt: {len(self.prompt):,}), with "
            f'"{FACT}" planted at depth {self.depth:.2f}. Question: "{QUESTION}"'
        )


@dataclass(frozen=True)
class Row:
    """What was measured for one recipe. ``divergence``: mean KL(full || recipe) in nats over the tokens after each
    token of the full cache's answer, given that answer."""

    recipe: str
    budget: Budget
    answer: str
    right: bool
    bytes: int
    dense_bytes: int
    peak_bytes: int
    to_first_token: float
    per_token: float | None
    divergence: float

    @property
    def ratio(self) -> float:
        return self.bytes / self.dense_bytes


@dataclass(frozen=True)
class Demo:
    """The demonstration's outcome."""

    model: str
    task: Task
    rows: list[Row]
    seconds: float

    @property
    def conditions(self) -> str:
        """What the numbers hold for."""
        return (
            f"{self.model}; {self.seconds:.0f} s in all. KV: held after the answer, against a dense cache of the same "
            "tokens; peak: the most held at once. KL: of the predictions from the full cache's, mean over its answer."
        )

    def to_dict(self) -> dict[str, Any]:
        text = {"tokens": self.task.text_tokens, "prompt_tokens": len(self.task.prompt), "depth": self.task.depth}
        return {
            "model": self.model,
            "text": {**text, "fact": FACT, "question": QUESTION, "expected": EXPECTED},
            "rows": [{**asdict(row), "ratio": row.ratio} for row in self.rows],
            "seconds": self.seconds,
        }

    def table(self) -> Table:
        numbers = ["budget", "KV MiB", "of dense", "peak MiB", "first token", "per token", "KL, nats"]
        return Table(["recipe", "right", *numbers, "answer"], [_cells(row) for row in self.rows], frozenset(numbers))


def plant(tokenizer: PreTrainedTokenizerBase, tokens: int, depth: float) -> Task:
    """A text of ``tokens`` tokens and the fact, put after the sentence that ends next behind ``depth`` (0 to 1)."""
    ids = tokenizer("\n\n".join(topics.get(chapter, "") for chapter in _CHAPTERS)).input_ids
    if tokens > len(ids):
        raise Unsupported(f"the demonstration's text has {len(ids):,} tokens; ask for no more")
    at = int(depth * tokens)
    before, after = tokenizer.decode(ids[:at]), tokenizer.decode(ids[at:tokens])
    rest_of_sentence, stop, after = after.partition(". ") if ". " in after else ("", " ", after)
    before += rest_of_sentence + stop
    text = before + FACT + " " + after
    (prompt,) = chat_turns(tokenizer, [f"{text}\n\n{QUESTION}"])
    text_tokens = len(tokenizer(text).input_ids)
    return Task(prompt, text_tokens, len(tokenizer(before).input_ids) / text_tokens)


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    recipes: Sequence[tuple[str, Budget]] = RECIPES,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Row]:
    """Asks with each recipe in turn, the first of which is the full cache. ``progress`` hears of each stage begun."""
    require_room(len(task.prompt), MOST_TOKENS, ModelSpec.from_config(model.config, model.dtype).max_positions)
    rows: list[Row] = []
    for recipe, budget in recipes:
        cache = Cache(model, recipe, budget)
        given, peak_bytes, twin = _ask(model, cache, task, progress)
        report = cache.report()
        progress(f"{recipe} is compared with the full cache")
        if not rows:
            full_tokens = given.tokens or task.prompt[-1:]  # an answer may be empty
            full_predictions = _predictions(model, twin.fork(), full_tokens)
        divergence = _divergence(full_predictions, _predictions(model, twin, full_tokens))
        text = tokenizer.decode(given.tokens, skip_special_tokens=True).strip()
        rows.append(
            Row(
                recipe=recipe,
                budget=budget,
                answer=text,
                right=EXPECTED in text,
                bytes=report.bytes,
                dense_bytes=report.dense_bytes,
                peak_bytes=max(peak_bytes, report.bytes),
                to_first_token=given.to_first_token,
                per_token=given.per_token,
                divergence=divergence,
            )
        )
    return rows


def run(progress: bool, tokens: int, depth: float) -> Demo:
    """The whole demonstration on the built-in model; ``progress`` shows a bar on standard error."""
    model, tokenizer = load("smollm2")
    task = plant(tokenizer, tokens, depth)
    start = time.perf_counter()
    columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not progress) as bar:
        job = bar.add_task("", total=STAGES * len(RECIPES) + 1)
        rows = compare(model, tokenizer, task, RECIPES, lambda stage: bar.update(job, advance=1, description=stage))
    place = f"{torch.get_num_threads()} CPU threads" if model.device.type == "cpu" else model.device.type
    name = f"SmolLM2-135M-Instruct in {str(model.dtype).removeprefix('torch.')} on {place}"
    return Demo(name, task, rows, time.perf_counter() - start)


def _ask(
    model: PreTrainedModel, cache: Cache, task: Task, progress: Callable[[str], None]
) -> tuple[Answer, int, Cache]:
    """The answer, the most bytes held while the prompt was read, and a cache that holds the prompt alone."""
    twins: list[tuple[int, Cache]] = []

    def fork() -> None:
        progress(f"{cache.recipe} answers")
        # Later peaks would count the pages that the answer no longer shares with the twin.
        twins.append((cache.report().peak_bytes, cache.fork()))

    progress(f"{cache.recipe} reads the text")
    given = answer(model, cache, task.prompt, MOST_TOKENS, after_prompt=fork)
    return given, *twins[0]


def _predictions(model: PreTrainedModel, cache: Cache, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities after each of ``tokens``, which are given one by one: [tokens, vocabulary]."""
    return torch.stack([next_logits(model, cache, [token]).float().log_softmax(-1) for token in tokens])


def _divergence(full: Tensor, other: Tensor) -> float:
    """Mean over rows of KL(full || other) in nats."""
    return float((full.exp() * (full - other)).sum(-1).mean())


def _cells(row: Row) -> list[str]:
    return [
        row.recipe,
        "yes" if row.right else "no",
        "–" if row.budget is None else f"{row.budget:g}" if isinstance(row.budget, float) else str(row.budget),
        f"{row.bytes / 2**20:.1f}",
        f"{row.ratio:.3f}",
        f"{row.peak_bytes / 2**20:.1f}",
        f"{row.to_first_token:.1f} s",
        "–" if row.per_token is None else f"{row.per_token * 1000:.0f} ms",
        f"{row.divergence:.4f}",
        " ".join(row.answer.split()),
    ]
