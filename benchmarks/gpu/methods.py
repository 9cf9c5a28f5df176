"""What a decoding step of the engine costs with each method, in 16 sequences of an 8B Llama 3.1 shape in bf16.

    python benchmarks/gpu/methods.py [--out FILE] [--recipes "h2o; kivi(bits=4)"] [--tokens 4096] [--tiny]

The weights are random. Every sequence has read a prompt of random tokens through the engine, so that what methods do at
its end and between steps is theirs. Methods that evict have a quarter of the bytes as their budget. A step is
``Engine.step``, the mean of 64 in a row (or of those of 4 seconds), because some methods act only now and then. The
floor is (bytes of the weights that are read + bytes of the pages held) / copy bandwidth, measured in the same run.
"""

import argparse
import time

import torch
from decoding import measure, synchronize

import kvarn

QUARTER = 0.25
LONGEST_MS = 4000
KEEP_ALL = """
full; fp8; kivi(bits=4); kivi(bits=2); gear; mustafar; vidkv; mikv; zipcache; xquant; xquantcl; minicache;
xkv; tokenselect; shadowkv
"""
EVICT = """
window; snapkv; snapkv + kivi(bits=4); think + snapkv; cake; h2o; scissorhands; keyformer; lazyeviction; arkv;
chelsea; d2o; kvmerger
"""


def main() -> None:
    options = _options()
    names = _listed(options.recipes) if options.recipes else [*_listed(KEEP_ALL), *_listed(EVICT)]
    settings = {name: getattr(options, name) for name in ("tokens", "sequences", "steps")}
    measure("methods.py", options, options.layers, names, _row, **settings)


def _row(model, recipe, options, with_floor):
    budget = QUARTER if recipe in _listed(EVICT) else None
    engine = kvarn.Engine(model, recipe, budget, max_batch=options.sequences)
    sampling = kvarn.Sampling(max_tokens=1024, ignore_end=True)
    prompts = torch.randint(1, model.config.vocab_size, (options.sequences, options.tokens)).tolist()
    for prompt in prompts:
        engine.add(prompt, sampling)
    start = time.perf_counter()
    while engine._scheduler.waiting or engine._scheduler.reading:
        engine.step()
    prompts_ms = _since(start)
    for _ in range(4):
        engine.step()
    synchronize()
    start = time.perf_counter()
    steps = 0
    while steps < options.steps and _since(start) < LONGEST_MS:
        engine.step()
        steps += 1
    synchronize()
    step_ms = _since(start) / steps
    graphs = engine._runner.graphs
    row = {
        "budget": budget,
        "steps": steps,
        "step_ms": round(step_ms, 3),
        "prompts_ms": round(prompts_ms, 1),
        "page_bytes": engine.arena.bytes,
        "captured": graphs is not None and bool(graphs._captured),
    }
    return with_floor(row, row["page_bytes"])


def _since(start):
    return (time.perf_counter() - start) * 1e3


def _listed(recipes):
    return [recipe.strip() for recipe in recipes.split(";")]


def _options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="", help="all by default")
    parser.add_argument("--tokens", type=int, default=4096, help="of each prompt")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script")
    parser.add_argument("--out", default="benchmarks/results/gpu/methods.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
