"""Thousands of requests of random lengths through an engine whose pool is far too small for them, with aborts.

    python benchmarks/soak.py [--requests 3000] [--seed 0] [--recipes "full; snapkv(window=4)"] [--out FILE]

A tiny random Llama on a CPU, so that only the engine's bookkeeping matters. It ends well when every request was
answered with its tokens, aborted by us, or refused with a reason, and every page is back. One answer in ten is compared
with that of an engine with room for everything.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import kvarn
from kvarn.bench.machine import hardware, versions
from kvarn.errors import KvarnError

SHAPE = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": None,
}


def main() -> None:
    options = _options()
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.float32).eval().requires_grad_(False)
    rows = {recipe: _soak(model, recipe, options) for recipe in options.recipes.split("; ")}
    result = {
        "command": "python benchmarks/soak.py " + " ".join(sys.argv[1:]),
        "machine": hardware(torch.device("cpu")),
        "versions": versions(),
        "requests": options.requests,
        "seed": options.seed,
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _soak(model, recipe, options):
    rng = random.Random(options.seed)
    budget = None if recipe == "full" else 16
    free = kvarn.Engine(model, recipe, budget, page_size=4)
    memory = int(2 * free._sizes.most(100, 40))
    engine = kvarn.Engine(model, recipe, budget, memory=memory, page_size=4, max_batch=24, step_tokens=256)
    given, tokens, ends, refused = {}, {}, {}, Counter()
    peak, start = 0, time.perf_counter()

    def step() -> None:
        nonlocal peak
        for event in engine.step():
            tokens[event.request] += event.tokens
            if event.finished:
                ends[event.request] = event.finished
        peak = max(peak, engine.arena.bytes)

    while len(given) + refused.total() < options.requests:
        prompt = [rng.randrange(1, 160) for _ in range(rng.choice([3, 20, 60, 100, 300]))]
        sampling = kvarn.Sampling(
            max_tokens=rng.choice([1, 5, 20, 40]), temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(10**6)
        )
        engine.preemption = rng.choice(["host", "recompute"])
        try:
            number = engine.add(prompt, sampling)
        except KvarnError as error:
            refused[type(error).__name__] += 1
            continue
        given[number], tokens[number] = (prompt, sampling), []
        if rng.random() < 0.05:
            victim = rng.choice(list(given))
            if engine.abort(victim):
                ends[victim] = "aborted"
        while engine.waiting > 40 or rng.random() < 0.5:
            step()
    while engine.busy:
        step()
    checked = [number for number in given if ends.get(number) == "length"][::10]
    same = sum(free.generate([given[n][0]], given[n][1])[0].tokens == tokens[n] for n in checked)
    return {
        "ends": dict(Counter(ends.values())),
        "refused": dict(refused),
        "unanswered": len(set(given) - set(ends)),
        "pages_left": engine.arena.bytes,
        "preempted": engine.preempted,
        "memory": memory,
        "most_held": peak,
        "same_tokens": f"{same} of {len(checked)}",
        "seconds": round(time.perf_counter() - start),
    }


def _options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", default="full; snapkv(window=4)")
    parser.add_argument("--out", default="benchmarks/results/soak.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
