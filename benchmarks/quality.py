"""What every recipe keeps of a model's quality at equal bytes, in one run of the bench.

    python benchmarks/quality.py smollm2 --length 4k --qa SQUAD.json --text BOOK.txt \\
        --folder results/smollm2 --out benchmarks/results/quality-smollm2.json [--workers 8] [--device cuda]

Runs `kvarn bench` in several processes, each with its share of the cases, and sums their records up. What was measured
before in the same folder is not measured again.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from kvarn.bench.report.summary import Row, summarize

# Selections and ShadowKV are told to read and keep little, since their defaults are for texts of ten times this length.
RECIPES = [
    *("window", "snapkv", "h2o", "scissorhands", "lazyeviction", "keyformer"),
    *(
        "d2o",
        "kvmerger",
        "chelsea",
        "cake",
        "prefixkv",
        "duoattention",
        "razorattention",
        "fastkv",
        "epicache(block=512)",
    ),
    *("kivi(bits=4)", "kivi(bits=2)", "fp8", "gear", "vidkv", "kvquant", "rotatekv", "mustafar", "think"),
    *("mikv(low=4)", "zipcache", "arkv", "xquant", "xquantcl", "minicache(start=0.9)", "xkv"),
    "tokenselect(sinks=16, local=64, count=112, chunk=64)",
    "sentencekv(count=192, first=16)",
    "shadowkv(rank=96, count=96, outliers=8)",
    *("window + kivi(bits=4)", "h2o + kivi(bits=4)", "snapkv + kivi(bits=4)", "snapkv + fp8"),
    *("duoattention + kivi", "cake + mikv", "snapkv + think", "fastkv + zipcache", "d2o + gear"),
    "tokenselect(sinks=16, local=64, count=112, chunk=64) + kivi(bits=4)",
    "minicache(start=0.9) + kivi(bits=4)",
]
BUDGETS = "0.5,0.25,0.1"
CASES = {"fidelity": 16, "perplexity": 8, "positions": 64, "examples": 4, "rounds": 0}
TASKS = "ruler,shared_kv,many_shot"


def main() -> None:
    options, more = _options()
    with_files = [f"--{name}={path}" for name in ("text", "qa") if (path := getattr(options, name))]
    counts = [f"--{name}={count}" for name, count in CASES.items()]
    command = [
        *(sys.executable, "-m", "kvarn.cli", "bench", f"--model={options.model}", f"--lengths={options.length}"),
        *(f"--recipes={'; '.join(RECIPES)}", f"--budgets={BUDGETS}", f"--tasks={TASKS}", *counts, *with_files, *more),
    ]
    folders = [options.folder / f"{worker}" for worker in range(1, options.workers + 1)]
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    processes = [
        subprocess.Popen(_of_worker(command, folder, worker, options.workers), env=environment)
        for worker, folder in enumerate(folders, 1)
    ]
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:  # the workers were stopped too, and what they have measured counts
        codes = [process.wait() for process in processes]
    if any(codes):
        print("not everything was measured; the same command goes on", file=sys.stderr)
    summary = summarize(folders)
    about = summary.runs[0].about
    result = {
        "command": "python benchmarks/quality.py " + " ".join(sys.argv[1:]),
        **{name: about[name] for name in ("seed", "model", "hardware", "versions")},
        "suite": about["options"]["suite"],
        "rows": [_without_answers(row) for row in summary.rows],
    }
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _of_worker(command: list[str], folder: Path, worker: int, workers: int) -> list[str]:
    if (folder / "run.json").exists():
        return [*command[:4], f"--resume={folder}"]
    return [*command, f"--shard={worker}/{workers}", f"--out={folder}"]


def _without_answers(row: Row) -> dict:
    return {name: value for name, value in asdict(row).items() if name not in ("answers", "entries", "curve")}


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--length", default="4k")
    parser.add_argument("--text", help="prose for haystacks and fidelity")
    parser.add_argument("--qa", help="questions in SQuAD's format")
    parser.add_argument("--folder", type=Path, required=True, help="for the workers' results")
    parser.add_argument("--out", type=Path, required=True, help="the summary, as JSON")
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
