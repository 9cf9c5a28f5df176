"""What a decoding step of the engine costs with each method, in 16 sequences of an 8B Llama 3.1 shape in bf16.

    python benchmarks/gpu/methods.py [--out FILE] [--recipes "h2o; kivi(bits=4)"] [--tokens 4096] [--tiny]

The weights are random. Every sequence has read a prompt of random tokens through the engine, so that what methods do at
its end and between steps is theirs. Methods that evict have a quarter of the bytes as their budget. A step is
``Engine.step``, the mean of 64 in a row (or of those of 4 seconds), because some methods act only now and then. The
floor is (bytes of the weights that are read + bytes of the pages held) / copy bandwidth, measured in the same run.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from pathlib import Path

import torch
from decoding import DEVICE, copy_bandwidth, llama, synchronize

import kvarn
from kvarn.bench.machine import hardware, versions

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
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    model = llama(options.tiny, options.layers)
    bandwidth = copy_bandwidth(options.tiny)
    embedding = model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters() if p is not embedding)
    chosen = dict.fromkeys(_listed(KEEP_ALL)) | dict.fromkeys(_listed(EVICT), QUARTER)
    if options.recipes:
        chosen = {recipe: chosen[recipe] for recipe in _listed(options.recipes)}
    result = {
        "command": "python benchmarks/gpu/methods.py " + " ".join(sys.argv[1:]),
        "machine": hardware(DEVICE),
        "versions": versions() | {"cuda": torch.version.cuda},
        "copy_bandwidth": bandwidth,
        "weight_bytes": weights,
        **{name: getattr(options, name) for name in ("tokens", "sequences", "steps", "layers")},
        "rows": {},
    }
    for recipe, budget in chosen.items():
        try:
            row = _row(model, recipe, budget, options)
            row["floor_ms"] = round((weights + row["page_bytes"]) / bandwidth * 1e3, 3)
            row["times_floor"] = round(row["step_ms"] / row["floor_ms"], 3)
        except Exception as error:  # a recipe that fails says so, and the others go on
            traceback.print_exc()
            row = {"failed": f"{type(error).__name__}: {error}"[:300]}
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        result["rows"][recipe] = row
        print(recipe, row, flush=True)
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


def _row(model, recipe, budget, options):
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
    return {
        "budget": budget,
        "steps": steps,
        "step_ms": round(step_ms, 3),
        "prompts_ms": round(prompts_ms, 1),
        "page_bytes": engine.arena.bytes,
        "captured": graphs is not None and bool(graphs._captured),
    }


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
