"""Whether kvpress's presses and kvarn's methods keep the same entries of a prompt, on a CPU.

    python benchmarks/peers.py [--tokens 1600] [--keep 400] [--out benchmarks/results/peers-entries.json]

Needs the environment that `make peers` builds. Every cache reads the same real text; for each layer and KV head the
positions kept are compared. Where the rules differ, kvpress's rule is applied to kvarn's scores as well.
"""

import argparse
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers

import kvarn
from kvarn.bench.peers import KvpressSubject, KvpressWorker
from kvarn.bench.peers.entries import accumulated_mass, agreement, best, kvarn_entries, kvpress_entries
from kvarn.bench.subjects import KvarnSubject

PAIRS = [
    ("SnapKVPress(window_size=64, kernel_size=5)", "snapkv(window=64, kernel=5, pooling='avg')"),
    ("SnapKVPress()", "snapkv"),
    ("StreamingLLMPress(n_sink=4)", "window(sinks=4)"),
    ("ObservedAttentionPress()", "h2o"),
    ("ObservedAttentionPress()", "h2o(heavy=0.2, recent=0.0)"),
]
OBSERVED = "kvpress's rule on kvarn's scores: mass of h2o / queries that see the entry"


def main() -> None:
    options = _options()
    torch.set_grad_enabled(False)
    model, tokenizer = kvarn.load("smollm2", device="cpu")
    text = "\n\n".join(topics[name] for name in sorted(topics))[: 8 * options.tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens]
    worker = KvpressWorker(model)
    kept = {press: _kvpress(worker, press, options.keep, ids) for press, _ in PAIRS}
    rows = [
        {"press": press, "kvarn": recipe, "agreement": agreement(kept[press], _kvarn(model, recipe, options.keep, ids))}
        for press, recipe in PAIRS
    ]
    press = "ObservedAttentionPress()"
    rows.append(
        {"press": press, "kvarn": OBSERVED, "agreement": agreement(kept[press], _observed(model, options.keep, ids))}
    )
    result = {
        "command": "python benchmarks/peers.py " + " ".join(sys.argv[1:]),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kvpress runs on": worker.versions,
        },
        "tokens": ids.shape[1],
        "kept": options.keep,
        "rows": [row | {"agreement": round(row["agreement"], 5)} for row in rows],
    }
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _kvpress(worker, press, keep, ids):
    session, dense = (KvpressSubject(worker, press, budget).open() for budget in (keep / ids.shape[1], 1.0))
    session.read(ids)
    dense.read(ids)
    return kvpress_entries(session, dense)


def _kvarn(model, recipe, keep, ids):
    session = KvarnSubject(model, recipe, keep).open()
    session.read(ids)
    return kvarn_entries(session)


def _observed(model, keep, ids):
    session = KvarnSubject(model, "h2o", ids.shape[1]).open()
    session.read(ids)
    seen_by = torch.arange(ids.shape[1], 0, -1)
    return best([mass / seen_by for mass in accumulated_mass(session)], keep)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1600)
    parser.add_argument("--keep", type=int, default=400)
    parser.add_argument("--out", default="benchmarks/results/peers-entries.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
