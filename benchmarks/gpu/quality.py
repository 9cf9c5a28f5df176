"""Whether the Triton kernels score what the reference path scores, on real weights.

    python benchmarks/gpu/quality.py [--model smollm2] [--text FILE] [--recipes "full; fp8"] [--out FILE] [--tiny]

For each recipe, with kernels and without:

- ``perplexity``: windows of a real text, of which the last tokens are given one by one and predicted. ``difference`` is
  the mean change of their negative log-likelihoods (nats) from the reference to the kernels, with its standard error
  over windows; ``apart`` is how far those of one token lie from one another on average.
- ``scores``: examples of the bench's tasks, answered by the engine, with kernels in captured CUDA graphs where it
  captures the recipe.
- ``same_tokens``: of the engine's greedy tokens with kernels, the share before the first that differs from those of
  the library's eager passes with kernels, and from the engine's without.

Where two tokens are equally likely up to rounding, either may be chosen, and what follows differs. ``--tiny`` runs one
layer of the model and few tokens, on a CPU in Triton's interpreter (TRITON_INTERPRET=1), to try the script.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvarn
from kvarn.attention import kernels
from kvarn.bench.machine import hardware, versions
from kvarn.bench.metrics import METRICS
from kvarn.bench.subjects import KvarnSubject
from kvarn.bench.tasks import TASKS, Materials, Turn
from kvarn.memory import Arena
from kvarn.memory import kernels as memory_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECIPES = {
    "full": None,
    "fp8": None,
    "kivi(bits=4)": None,
    "kivi(bits=2)": None,
    "snapkv": 0.25,
    "snapkv + kivi(bits=4)": 0.25,
    "h2o": 0.25,
    "window": 0.25,
}
BUDGET = 0.25  # of recipes that are not in the list and evict
SEED = 0
DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"  # the interpreter computes bf16 in its own way


@dataclass(frozen=True)
class Sizes:
    """``windows`` of ``prompt`` tokens and ``steps`` more; ``examples`` of each of the ``tasks``, of ``length`` tokens,
    with answers of at most ``answer``."""

    windows: int = 32
    prompt: int = 1000
    steps: int = 20
    tasks: tuple[str, ...] = ("niah_single_2", "many_shot")
    examples: int = 6
    length: int = 1024
    answer: int = 16


TINY = Sizes(windows=2, prompt=150, steps=2, tasks=("niah_single_2",), examples=1, length=300, answer=2)


@dataclass(frozen=True)
class Asked:
    """A task's first question about its context, in tokens."""

    task: str
    prompt: list[int]
    turn: Turn


@torch.no_grad()
def main() -> None:
    options = _options()
    start = time.perf_counter()
    sizes = TINY if options.tiny else Sizes()
    if DEVICE.type == "cpu":
        memory_kernels.DEVICES = {"cpu"}
    model, tokenizer = kvarn.load(options.model, dtype=getattr(torch, options.dtype), device=DEVICE)
    if options.tiny:
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
    materials = Materials(tokenizer, options.text)
    windows = _windows(tokenizer(materials.prose, add_special_tokens=False).input_ids, sizes)
    asked = _asked(materials, sizes)
    result = {
        "command": "python benchmarks/gpu/quality.py " + " ".join(sys.argv[1:]),
        "machine": hardware(DEVICE),
        "versions": versions() | {"triton": _triton(), "cuda": torch.version.cuda},
        "model": options.model if options.model == "smollm2" else Path(options.model).name,
        "dtype": options.dtype,
        "layers": model.config.num_hidden_layers,
        "sizes": vars(sizes),
        "rows": {},
    }
    for recipe in filter(None, map(str.strip, options.recipes.split(";"))) if options.recipes else RECIPES:
        began = time.perf_counter()
        row = _row(model, tokenizer, recipe, windows, asked, sizes)
        result["rows"][recipe] = row
        print(f"{recipe} ({time.perf_counter() - began:.0f} s)", json.dumps(row), flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s in all")


def _row(model: PreTrainedModel, tokenizer, recipe: str, windows: Tensor, asked: list[Asked], sizes: Sizes) -> dict:
    budget = RECIPES.get(recipe, BUDGET if _evicts(recipe) else None)
    row: dict = {"budget": budget}
    nll, answers = {}, {}
    for path, chosen in (("kernels", nullcontext), ("reference", memory_kernels.reference_only)):
        with chosen():
            nll[path], read = _nll(KvarnSubject(model, recipe, budget), windows, sizes)
            answers[path], captured = _answered(model, recipe, budget, asked, sizes)
        if path == "kernels":
            row |= {"read_by_kernels": read, "captured": captured}
    changes = (nll["kernels"] - nll["reference"]).double()
    row["perplexity"] = {path: round(math.exp(each.double().mean()), 4) for path, each in nll.items()}
    row["difference"] = round(float(changes.mean()), 6)
    row["standard_error"] = round(float(changes.mean(1).std() / math.sqrt(changes.shape[0])), 6)
    row["apart"] = round(float(changes.abs().mean()), 6)
    row["scores"] = {path: _scores(tokenizer, asked, tokens) for path, tokens in answers.items()}
    row["same_tokens"] = {
        "library": _same(answers["kernels"], _greedy(model, recipe, budget, asked, sizes)),
        "reference": _same(answers["kernels"], answers["reference"]),
    }
    return row


def _nll(subject: KvarnSubject, windows: Tensor, sizes: Sizes) -> tuple[Tensor, bool]:
    """Of each window's last tokens but the first, [windows, steps], and whether kernels read what was stored."""
    session = subject.open()
    session.read(windows[:, : sizes.prompt])
    found = []
    for place in range(sizes.prompt, sizes.prompt + sizes.steps):
        predictions = session.read(windows[:, place : place + 1]).float().log_softmax(-1)
        found.append(-predictions.gather(1, windows[:, place + 1 : place + 2].to(predictions.device))[:, 0])
    groups = session.cache.groups
    read = all(kernels.reads(group.store, group.layer.query_heads // group.layer.kv_heads) for group in groups)
    session.close()
    return torch.stack(found, 1).cpu(), read


def _answered(model: PreTrainedModel, recipe: str, budget, asked: list[Asked], sizes: Sizes):
    """The engine's greedy tokens for each, and whether its steps were captured."""
    engine = kvarn.Engine(model, recipe, budget, max_batch=len(asked))
    outputs = engine.generate([each.prompt for each in asked], kvarn.Sampling(max_tokens=sizes.answer))
    return [output.tokens for output in outputs], engine._runner.graphs is not None


def _greedy(model: PreTrainedModel, recipe: str, budget, asked: list[Asked], sizes: Sizes) -> list[list[int]]:
    """The library's greedy tokens: caches of the prompts join, and the model decodes eagerly."""
    arena = Arena(DEVICE, page_size=16)
    caches = [kvarn.Cache(model, recipe, budget, arena=arena) for _ in asked]
    first = [
        model(torch.tensor([each.prompt], device=DEVICE), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        for each, cache in zip(asked, caches, strict=True)
    ]
    running = caches[0]
    for cache in caches[1:]:
        running.join(cache)
    chosen = [torch.stack(first).argmax(-1)]
    while len(chosen) < sizes.answer:
        positions = running.seen[:, None].to(DEVICE)
        logits = model(chosen[-1][:, None], position_ids=positions, past_key_values=running).logits[:, -1]
        chosen.append(logits.argmax(-1))
    running.free()
    return torch.stack(chosen, 1).tolist()


def _same(tokens: Sequence[list[int]], others: Sequence[list[int]]) -> float:
    """The share of ``tokens`` that come before the first that differs."""
    alike = 0
    for mine, theirs in zip(tokens, others, strict=True):
        differs = [place for place, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]]
        alike += differs[0] if differs else min(len(mine), len(theirs))
    return round(alike / sum(map(len, tokens)), 4)


def _scores(tokenizer, asked: list[Asked], answers: Sequence[list[int]]) -> dict[str, float]:
    """The mean of each task."""
    found: dict[str, list[float]] = {}
    for each, tokens in zip(asked, answers, strict=True):
        answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        found.setdefault(each.task, []).append(METRICS[each.turn.metric](answer, each.turn.references))
    return {task: round(statistics.mean(scores), 4) for task, scores in found.items()}


# -- what is read -----------------------------------------------------------------------------------------------


def _windows(tokens: list[int], sizes: Sizes) -> Tensor:
    """Windows of a text, evenly spread: int64 [windows, prompt + steps + 1]."""
    length = sizes.prompt + sizes.steps + 1
    starts = torch.linspace(0, len(tokens) - length, sizes.windows).long().tolist()
    return torch.tensor([tokens[first : first + length] for first in starts])


def _asked(materials: Materials, sizes: Sizes) -> list[Asked]:
    asked = []
    for task in (TASKS[name] for name in sizes.tasks):
        for number in range(sizes.examples):
            example = task.example(materials, sizes.length, SEED, number)
            prompt = example.prompt(materials.tokenizer)
            asked.append(Asked(task.name, prompt.context + prompt.requests[0], example.turns[0]))
    return asked


def _evicts(recipe: str) -> bool:
    return any(method.eviction() for method in kvarn.Recipe.parse(recipe).methods)


def _triton() -> str:
    import triton

    return triton.__version__


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="what kvarn.load takes: a name, a folder, a GGUF file")
    parser.add_argument("--dtype", default=DTYPE, choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--text", type=Path, help="prose; Python's language reference by default")
    parser.add_argument("--recipes", help="separated by semicolons; all by default")
    parser.add_argument("--tiny", action="store_true", help="one layer and few tokens, to try the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("there is no CUDA device: set TRITON_INTERPRET=1, and take --tiny")
    return options


if __name__ == "__main__":
    main()
