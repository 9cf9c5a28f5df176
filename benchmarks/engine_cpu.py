"""Eight sequences together in an engine against one after another with transformers' own cache, on a CPU.

    python benchmarks/engine_cpu.py [--prompt 100] [--tokens 100] [--sequences 8] [--rounds 5] [--recipes "full; …"]

A round answers the same prompts with the engine, and one of them with ``model.generate`` and a dynamic cache, in turns:
what one takes is multiplied by their number. Times hold prompts and answers; the greedy tokens are compared.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from library import real_text
from transformers import DynamicCache

import kvarn
from kvarn.bench.machine import hardware, versions


def main() -> None:
    options = _options()
    model, tokenizer = kvarn.load("smollm2", dtype=getattr(torch, options.dtype), device="cpu")
    length = options.prompt * options.sequences
    prompts = real_text(tokenizer, length)[0].view(options.sequences, -1).tolist()
    rows = {}
    for recipe in options.recipes.split("; "):
        rows[recipe] = _row(model, prompts, recipe, options)
        print(recipe, rows[recipe], file=sys.stderr)
    result = {
        "command": "python benchmarks/engine_cpu.py " + " ".join(sys.argv[1:]),
        "machine": hardware(torch.device("cpu")),
        "versions": versions(),
        **{name: getattr(options, name) for name in ("prompt", "tokens", "sequences", "rounds", "dtype")},
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _row(model, prompts, recipe, options):
    engine = kvarn.Engine(model, recipe)
    sampling = kvarn.Sampling(max_tokens=options.tokens, ignore_end=True)
    together, alone, same = [], [], 0
    for i in range(options.rounds):
        start = time.perf_counter()
        answers = engine.generate(prompts, sampling)
        together.append(time.perf_counter() - start)
        which = i % len(prompts)
        start = time.perf_counter()
        own = _alone(model, prompts[which], options.tokens)
        alone.append((time.perf_counter() - start) * len(prompts))
        same += own == answers[which].tokens
    count = options.tokens * len(prompts)
    return {
        "tokens_per_second": round(count / statistics.median(together), 1),
        "one_by_one": round(count / statistics.median(alone), 1),
        "times_as_many": round(statistics.median(a / t for a, t in zip(alone, together, strict=True)), 2),
        "same_tokens": f"{same} of {options.rounds}",
    }


def _alone(model, prompt, tokens):
    ids = torch.tensor([prompt])
    cache = DynamicCache(config=model.config)
    out = model.generate(
        ids, past_key_values=cache, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


def _options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=100, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipes", default="full; kivi(bits=4)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", default="benchmarks/results/engine-cpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
