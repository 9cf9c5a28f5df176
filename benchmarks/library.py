"""What the cache costs and saves in the library, against transformers' own cache in the same process, on a CPU.

    python benchmarks/library.py [--tokens 4096] [--steps 40] [--dtype float32] [--out benchmarks/results/library.json]

Every cache is prefilled with the same real text; then all take decoding steps in turn, one token each, in an order
that rotates, so that whatever else the machine does meets all alike. A step's cost is the median over the steps of its
ratio to the step that transformers' DynamicCache took in the same turn; times are reported as such ratios only.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from transformers import DynamicCache

import kvarn
from kvarn.bench.machine import processor

RECIPES = [
    ("full", None),
    ("window", 0.25),
    ("snapkv", 0.25),
    ("h2o", 0.25),
    ("kivi(bits=4)", None),
    ("kivi(bits=2)", None),
    ("snapkv + kivi(bits=4)", 0.125),
    ("h2o + kivi(bits=4)", 0.125),
]
# Targets: a name, what must hold, and the recipes it is read from.
TARGETS = {
    "full costs at most 1.05 of a step": lambda rows: rows["full"]["step"] <= 1.05,
    "snapkv at 0.25 decodes at least 1.3 times as fast as full": lambda rows: (
        rows["full"]["step"] >= 1.3 * rows["snapkv"]["step"]
    ),
    "kivi with 4 bits holds at most 0.36 of bf16": lambda rows: rows["kivi(bits=4)"]["of_bf16"] <= 0.36,
    "kivi with 2 bits holds at most 0.24 of bf16": lambda rows: rows["kivi(bits=2)"]["of_bf16"] <= 0.24,
}


def main() -> None:
    options = _options()
    torch.set_grad_enabled(False)
    model, tokenizer = kvarn.load("smollm2", dtype=getattr(torch, options.dtype), device="cpu")
    ids = real_text(tokenizer, options.tokens)
    caches, first = {}, {}
    for name, make in _makers(model).items():
        started = time.perf_counter()
        caches[name] = make()
        model(ids, past_key_values=caches[name], logits_to_keep=1)
        first[name] = time.perf_counter() - started
        print(f"prefilled {name}", file=sys.stderr)
    after_prompt = {name: cache.report() for name, cache in caches.items() if isinstance(cache, kvarn.Cache)}
    steps = in_turns(model, ids[:, -1:], caches, options.steps)
    rows = {name: _row(name, report, first, steps, model.dtype) for name, report in after_prompt.items()}
    result = {
        "command": "python benchmarks/library.py " + " ".join(sys.argv[1:]),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "python": platform.python_version()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tokens": ids.shape[1],
        "steps": options.steps,
        "dtype": options.dtype,
        "rows": rows,
        "targets": {name: bool(holds(rows)) for name, holds in TARGETS.items()},
    }
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _makers(model):
    def kvarn_cache(recipe, budget):
        return lambda: kvarn.Cache(model, recipe, budget)

    return {"transformers": lambda: DynamicCache(config=model.config)} | {
        recipe: kvarn_cache(recipe, budget) for recipe, budget in RECIPES
    }


def real_text(tokenizer, tokens):
    """Python's language reference, int64 [1, tokens]."""
    text = "\n\n".join(topics[name] for name in sorted(topics))[: 8 * tokens]
    return tokenizer(text, return_tensors="pt").input_ids[:, :tokens]


def in_turns(model, token, caches, count):
    """Seconds of each cache's steps, taken in turns; the first two turns warm up."""
    seconds = {name: [] for name in caches}
    names = list(caches)
    for turn in range(count + 2):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            cache = caches[name]
            started = time.perf_counter()
            model(token, past_key_values=cache)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _row(name, report, first, steps, dtype):
    ratios = [ours / own for ours, own in zip(steps[name], steps["transformers"], strict=True)]
    return {
        "budget": dict(RECIPES)[name],
        "step": round(statistics.median(ratios), 3),
        "first_token": round(first[name] / first["transformers"], 3),
        "bytes": report.bytes,
        "of_dense": round(report.ratio, 4),
        "of_bf16": round(report.bytes / report.dense_bytes * dtype.itemsize / 2, 4),
        "peak_of_dense": round(report.peak_bytes / report.dense_bytes, 4),
        "entries_a_head": report.entries[0][0][0],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", default="benchmarks/results/library.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
