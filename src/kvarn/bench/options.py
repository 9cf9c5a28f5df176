"""The options of ``kvarn bench`` and ``kvarn report``. Imports nothing that the bench needs."""

import argparse
import re
from pathlib import Path

COUNTS = {
    "fidelity": "prompts that the full cache continues",
    "perplexity": "windows of text",
    "positions": "tokens predicted in each of these",
    "examples": "of each task and setting",
    "rounds": "of timing",
    "steps": "decoding steps in each round",
}  # fields of suites.Suite


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Adds what ``kvarn bench`` takes beside the model."""
    parser.add_argument(
        "--recipes", default="window; snapkv; h2o; kivi", help='";" between; full is always measured (%(default)s)'
    )
    parser.add_argument("--budgets", default="0.25", help="0.5,0.25: for each recipe that evicts (%(default)s)")
    parser.add_argument("--peers", default="", help='others, as in "dynamic; kvpress:SnapKVPress()" (docs/peers.md)')
    parser.add_argument("--suite", default="quick", help="what is measured (docs/bench.md; %(default)s)")
    parser.add_argument("--lengths", type=_numbers, metavar="4k,8k", help="tokens, prompt and answer together")
    parser.add_argument("--tasks", type=_names, metavar="NAMES", help="tasks or groups of tasks")
    parser.add_argument("--settings", type=_names, metavar="NAMES", help="aware, agnostic, multi-turn, multi-request")
    for name, what in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=what)
    parser.add_argument("--batches", type=_numbers, metavar="1,4", help="sequences at once, in timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", metavar="FILE", help="prose to read and to hide needles in")
    parser.add_argument("--qa", metavar="FILE", help="questions in SQuAD's format")
    parser.add_argument("--gsm8k", metavar="FILE", help="problems in GSM8K's format")
    parser.add_argument("--data", action="append", default=[], metavar="FILE", help="LongBench, L-Eval or RULER JSONL")
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="every Nth case, from the Ith on",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--out", type=Path, default=Path("results"), help="a new folder (%(default)s)")
    place.add_argument("--resume", type=Path, metavar="FOLDER", help="goes on there; no other option counts")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Adds what ``kvarn report`` takes."""
    parser.add_argument("folders", nargs="+", type=Path, help="folders of results")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="%(default)s")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    """``"512,4k"`` is 512 and 4096."""
    numbers = tuple(int(part[:-1]) * 1024 if part[-1] in "kK" else int(part) for part in _names(text))
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers above 0, as in 512,4k")
    return numbers


def _shard(text: str) -> tuple[int, int]:
    """``"2/8"`` is (2, 8)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: write which of how many, as in 2/8")
    return int(match[1]), int(match[2])
