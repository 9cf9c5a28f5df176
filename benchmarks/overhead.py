"""What a decoding step of every method costs beside SnapKV holding the same bytes, in the same process, on a CPU.

    python benchmarks/overhead.py [--tokens 2048] [--steps 20] [--budget 0.25] [--recipes "h2o; kivi(bits=4)"]

For each recipe: a cache reads a real text; a second cache, SnapKV with the bytes that the first one holds as its
budget, reads the same; both then take decoding steps in turns. The cost is the median over the steps of the ratio of
the two. Recipes that evict nothing take what they take. Methods that need a calibration use the one found for the
model.
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import torch
import transformers
from library import in_turns, real_text
from quality import RECIPES

import kvarn
from kvarn.bench.machine import processor
from kvarn.errors import BudgetError, CalibrationError

ALLOWED = 1.15  # of SnapKV's step


def main() -> None:
    options = _options()
    torch.set_grad_enabled(False)
    model, tokenizer = kvarn.load("smollm2", dtype=getattr(torch, options.dtype), device="cpu")
    ids = real_text(tokenizer, options.tokens)
    rows = {}
    for recipe in options.recipes.split("; "):
        rows[recipe] = _row(model, ids, recipe, options)
        print(recipe, rows[recipe], file=sys.stderr)
    result = {
        "command": "python benchmarks/overhead.py " + " ".join(sys.argv[1:]),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "python": platform.python_version()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **{name: getattr(options, name) for name in ("tokens", "steps", "budget", "dtype")},
        "rows": rows,
        "above": [name for name, row in rows.items() if row.get("step", 0) > ALLOWED],
    }
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _row(model, ids, recipe, options):
    try:
        cache = _read(model, ids, recipe, options.budget)
        report = cache.report()
        beside = _read(model, ids, "snapkv", min(report.ratio, 1.0))
    except CalibrationError as error:
        return {"refused": str(error)}
    steps = in_turns(model, ids[:, -1:], {"recipe": cache, "snapkv": beside}, options.steps)
    ratios = [own / snapkv for own, snapkv in zip(steps["recipe"], steps["snapkv"], strict=True)]
    return {"step": round(statistics.median(ratios), 3), "of_dense": round(report.ratio, 4)}


def _read(model, ids, recipe, budget):
    """A cache that has read ``ids``; one that cannot keep the budget, since it evicts nothing, goes without."""
    cache = kvarn.Cache(model, recipe, budget)
    try:
        model(ids, past_key_values=cache, logits_to_keep=1)
    except BudgetError:
        cache = kvarn.Cache(model, recipe)
        model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--recipes", default="; ".join(RECIPES))
    parser.add_argument("--out", default="benchmarks/results/overhead.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
