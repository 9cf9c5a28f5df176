"""Folders of results as a run would leave them, with made-up numbers of the usual sizes."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from kvarn.bench.records import Record, Results
from kvarn.bench.subjects import label

LAYERS, HEADS = 30, 3
POSITIONS = 24
DENSE = 2 * LAYERS * HEADS * 64 * 4  # bytes of a token
TASKS = {
    "niah": "retrieval",
    "niah_multi": "retrieval",
    "variables": "tracing",
    "words": "aggregation",
    "qa": "questions",
}
SETTINGS = ("aware", "agnostic")
REFUSAL = "a budget of 0.1 allows 102 entries a head; h2o keeps at least 128: ask for 0.125 or more"
BUDGETS = (0.5, 0.25, 0.1)
# system, name, budget; share of the bytes, KL, step against full
SUBJECTS: list[tuple[str, str, float | None, float, float, float]] = [
    ("kvarn", "full", None, 1.006, 0.0, 1.02),
    *(("kvarn", "snapkv", b, b, 0.02 / b, 0.55 + 0.4 * b) for b in BUDGETS),
    *(("kvarn", "h2o", b, b, 0.05 / b, 0.6 + 0.4 * b) for b in BUDGETS),
    *(("kvarn", "window", b, b, 0.12 / b, 0.56 + 0.4 * b) for b in BUDGETS),
    ("kvarn", "kivi(bits=2)", None, 0.205, 0.11, 1.36),
    *(("kvpress", "SnapKVPress(window_size=32)", b, b, 0.022 / b, 0.8 + 0.2 * b) for b in BUDGETS),
    ("transformers", "quantized(bits=4)", None, 0.33, 0.012, 1.9),
]


def run_record(model: str = "SmolLM2-135M-Instruct", seed: int = 0, **changes: Any) -> Record:
    subjects = [_subject(*each[:3]) for each in SUBJECTS]
    return {
        "command": f"kvarn bench --model {model} --seed {seed}",
        "version": "0.1.0",
        "started": "2025-06-01T12:00:00+00:00",
        "seed": seed,
        "model": {
            "name": model,
            "architecture": "LlamaForCausalLM",
            "layers": LAYERS,
            "kv_heads": HEADS,
            "parameters": 134_515_008,
            "dtype": "float32",
            "positions": 8192,
        },
        "hardware": {"processor": "Some Processor", "threads": 2, "memory_bytes": 8 * 2**30, "device": "cpu"},
        "versions": {"python": "3.12.3", "torch": "2.11.0", "transformers": "5.17.0"},
        "subjects": subjects,
        "options": {"lengths": [1024, 4096], "tasks": list(TASKS)},
        **changes,
    }


def make_results(folder: Path, lengths: tuple[int, ...] = (1024, 4096), examples: int = 4, **run: Any) -> Path:
    """A finished run of all subjects at all lengths."""
    results = Results.create(folder, run_record(**run))
    rng = np.random.default_rng(results.run["seed"])
    made = [record for length in lengths for each in SUBJECTS for record in _records(rng, length, examples, *each)]
    with (folder / "records.jsonl").open("w", encoding="utf-8") as lines:  # Results.add writes through to the disk
        lines.writelines(json.dumps(record) + "\n" for record in made)
    return folder


def _subject(system: str, name: str, budget: float | None) -> Record:
    return {"system": system, "name": name, "budget": budget, "label": label(system, name, budget)}  # type: ignore[arg-type]


def _records(
    rng: np.random.Generator,
    length: int,
    examples: int,
    system: str,
    name: str,
    budget: float | None,
    share: float,
    kl: float,
    step: float,
) -> list[Record]:
    subject = _subject(system, name, budget)

    def record(kind: str, case: str, **more: Any) -> Record:
        held = None if kind == "perplexity" else _held(system, length, share)
        return {"kind": kind, "subject": subject, "case": case, "length": length, "held": held, **more}

    made = [
        *(record("fidelity", f"fidelity/{length}/{n}", **_fidelity(rng, kl)) for n in range(examples)),
        record("perplexity", f"perplexity/{length}", nll=(2.7 + 0.4 * kl + 0.3 * rng.normal(size=64)).tolist()),
        *(
            record("task", f"{task}/{setting}/{length}/{n}", **_task(rng, task, setting, n, kl))
            for task in TASKS
            for setting in SETTINGS
            for n in range(examples)
        ),
        record("speed", f"speed/{length}/1", **_speed(rng, step)),
    ]
    if (length, name, budget) != (1024, "h2o", 0.1):
        return made
    return [
        {key: each[key] for key in ("subject", "case", "length")} | {"kind": "refused", "reason": REFUSAL}
        for each in made
    ]


def _held(system: str, length: int, share: float) -> Record:
    entries = np.full((LAYERS, HEADS), min(1.0, share) * length)
    if share < 1:  # heads differ, in the same way in every record
        entries = entries * np.random.default_rng(1).uniform(0.6, 1.4, entries.shape)
    dense = DENSE * length
    return {
        "bytes": int(share * dense),
        "dense_bytes": dense,
        "peak_bytes": int(min(1.0, share + 0.05) * dense) if system == "kvarn" else None,
        "entries": entries.astype(int).tolist() if system == "kvarn" else None,
    }


def _fidelity(rng: np.random.Generator, kl: float) -> Record:
    drift = np.linspace(0.7, 1.3, POSITIONS)
    values = kl * drift * rng.lognormal(-0.3, 0.8, POSITIONS)
    top1 = rng.random(POSITIONS) > np.minimum(0.6, kl**0.5 / 2)
    return {
        "kl": values.tolist(),
        "top1": top1.astype(int).tolist(),
        "rank": np.where(top1, 1, 2 + rng.poisson(3 * kl, POSITIONS)).tolist(),
        "nll_change": (values * rng.normal(0.9, 0.3, POSITIONS)).tolist(),
    }


def _task(rng: np.random.Generator, task: str, setting: str, number: int, kl: float) -> Record:
    key = str(rng.integers(10_000, 99_999))
    harder = {"aware": 0.5, "agnostic": 1.0}[setting] * (2 if task == "words" else 1)
    score = float(rng.random() < 0.95 - min(0.85, harder * kl))
    turn = {
        "question": f"What is the special magic number for the {task} mill?",
        "answer": f"The number is {key if score else key[:2]}.",
        "references": [key],
        "metric": "contains_all",
        "score": score,
        "tokens": 9,
    }
    return {"task": task, "group": TASKS[task], "setting": setting, "number": number, "score": score, "turns": [turn]}


def _speed(rng: np.random.Generator, step: float) -> Record:
    full_first, full_token = rng.normal(4.0, 0.2, 5), rng.normal(0.1, 0.005, 30)
    return {
        "batch": 1,
        "first_token": (full_first * rng.normal(1.0, 0.04, 5)).tolist(),
        "first_token_full": full_first.tolist(),
        "per_token": (full_token * step * rng.normal(1.0, 0.05, 30)).tolist(),
        "per_token_full": full_token.tolist(),
        "process_peak_bytes": 3 * 2**30,
        "device_peak_bytes": None,
    }
