"""What answers to questions about a conversation lose in caches that were read in blocks, on the built-in model.

    python benchmarks/episodes.py [--out benchmarks/results/episodes.json]

Of each cache: `loss`, the mean over eight questions of the mean negative log-likelihood of the right answer's tokens;
`of_dense`, the bytes it holds against a dense cache; `peak_of_dense`, the most that was held while it was read. All but
the first have 64 entries a head and read 128 tokens at once. `topic` is `kvarn.Episodes` with the cache of each
question's topic, scored by its one most central window, `others` with those of the other three.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

import kvarn
from kvarn.bench.machine import hardware, versions
from kvarn.budgets.sensitivity import LayerSensitivity
from kvarn.calibration import builtin_text
from kvarn.methods.epicache import EpiCache

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conversation import CONVERSATION, QUESTIONS

ENTRIES, BLOCK = 64, 128


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/episodes.json")
    options = parser.parse_args()
    model, tokenizer = kvarn.load("smollm2", device="cpu")
    ids = tokenizer(builtin_text(), verbose=False).input_ids
    search = LayerSensitivity(tokens=1024, block=256, sinks=32)
    similarity = search.similarity(model, torch.tensor(ids[: search.tokens]), lambda done, total: None)
    recipes = {
        "head": EpiCache(block=BLOCK, level="head"),
        "pair": EpiCache(block=BLOCK),
        "pair, power=1.1": EpiCache(block=BLOCK, power=1.1).with_learnt({"similarity": similarity}),
    }
    rows, talk = {}, None
    for name, recipe in recipes.items():
        talk = kvarn.Episodes(model, tokenizer, CONVERSATION, recipe, ENTRIES, excerpts=1, on_host=True)
        report, losses = talk.reports()[-1], []  # of the cache that is on the device
        for topic in range(len(talk.caches)):
            losses.append([_loss(model, tokenizer, talk.cache(topic), *pair) for *pair, _ in QUESTIONS])
        topics = [talk.topic(question) for question, _, _ in QUESTIONS]
        mine = [losses[topic][question] for question, topic in enumerate(topics)]
        others = [x for topic, row in enumerate(losses) for x, own in zip(row, topics, strict=True) if own != topic]
        rows[f"topic ({name})"] = _row(mine, report)
        rows[f"others ({name})"] = _row(others, report)
    for name, recipe, budget, block in (
        ("full", "full", None, None),
        ("full in blocks", "full", None, BLOCK),
        ("end of each block (pair)", f"epicache(block={BLOCK})", ENTRIES, None),
        ("snapkv in blocks", "snapkv", ENTRIES, BLOCK),
        ("snapkv", "snapkv", ENTRIES, None),
        ("window", "window", ENTRIES, BLOCK),
    ):
        cache = kvarn.Cache(model, recipe, budget, block=block)
        model.base_model(talk.ids, past_key_values=cache)
        report = cache.report()
        rows[name] = _row([_loss(model, tokenizer, cache, *pair) for *pair, _ in QUESTIONS], report)
    result = {
        "command": "python benchmarks/episodes.py",
        "machine": hardware(model.device),
        "versions": versions(),
        "tokens": talk.ids.shape[1],
        "similarity": [round(float(x), 3) for x in similarity],
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _loss(model, tokenizer, cache, question, reply):
    asked, expected = (
        tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        for text in (f"\n\nQuestion: {question}\nAnswer:", f" {reply}")
    )
    logits = model(torch.cat([asked, expected], 1), past_key_values=cache.fork(bounded=False)).logits
    chosen = logits[0, asked.shape[1] - 1 : -1].log_softmax(-1).gather(1, expected[0, :, None])
    return -float(chosen.mean())


def _row(losses, report):
    return {
        "loss": round(statistics.mean(losses), 3),
        "of_dense": round(report.ratio, 3),
        "peak_of_dense": round(report.peak_bytes / report.dense_bytes, 3),
    }


if __name__ == "__main__":
    main()
