"""RULER's two aggregation tasks (arXiv 2404.06654): which words appear most often."""

import random
import string
from itertools import islice, product
from math import ceil

import numpy as np
from scipy.special import zeta

from .base import Example, Materials, Task, Turn, fit
from .vocabulary import distinct, vocabulary

COMMON = 10
ALPHA = 2.0
_LIST = "Below is a numbered list of words. Some appear more often than others: remember those."
_CODE = "The text below is in code. Keep count of each coded word, to find the three that appear most often."


def common_words(materials: Materials, length: int, rng: random.Random) -> Example:
    """A numbered list in which ten words come 30 times and all others 3 times; below 4096 tokens, 6 times and once.
    Before it stands a worked example with words of its own: 40 words, 10 times and 3 times; below 4096 tokens 20
    words, 3 times and once. All as in RULER. Where single words run out, pairs go on."""
    counts, shown, shown_counts = ((30, 3), 40, (10, 3)) if length >= 4096 else ((6, 1), 20, (3, 1))
    words = rng.sample(vocabulary(), k=len(vocabulary()))
    pairs = (f"{first}-{second}" for first, second in product(words, words))
    seed = rng.random()
    common, others = words[:COMMON], words[COMMON:shown]
    worked = _common_turn(common)
    example = f"{_LIST}\n\n{_shuffled(common, others, shown_counts, seed)}"
    example += f"\n\n{worked.question}\n{worked.prefix} {_numbered(common)}"
    common, others = words[shown : shown + COMMON], words[shown + COMMON :]
    turn = _common_turn(common)

    def build(size: int) -> Example:
        others.extend(islice(pairs, max(0, size - len(others))))
        text = _shuffled(common, others[:size], counts, seed)
        return Example(f"{example}\n\n{_LIST}\n\n{text}", (turn,))

    return fit(build, length, materials)


def _shuffled(common: list[str], others: list[str], counts: tuple[int, int], seed: float) -> str:
    """A list with each of both as often as told, in an order that the seed tells."""
    words = common * counts[0] + others * counts[1]
    random.Random(seed).shuffle(words)
    return _numbered(words)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _common_turn(common: list[str]) -> Turn:
    return Turn(
        f"Question: Which {COMMON} words appear most often in the list above?",
        tuple(common),
        "contains_all",
        most=120,
        prefix=f"Answer: The {COMMON} words that appear most often in the list are:",
    )


def frequent_words(materials: Materials, length: int, rng: random.Random) -> Example:
    """Random words of six letters, the k-th most frequent with a share of k^-2 / ζ(2). The most frequent of all is
    "...", which does not count; the next three are asked for."""
    least = ceil(zeta(ALPHA) / (4**-ALPHA - 5**-ALPHA))  # words it takes for the third to come before the fourth
    coded = distinct(lambda rng: "".join(rng.choices(string.ascii_lowercase, k=6)), max(4, length // 50), rng)
    ranked = ["...", *coded]
    shares = np.arange(1, len(ranked) + 1) ** -ALPHA / zeta(ALPHA)
    seed = rng.random()
    turn = Turn(
        "Question: Which three words appear most often in the coded text above? Leave out the dots, and do not "
        "explain.",
        tuple(coded[:3]),
        "contains_all",
        most=50,
        prefix="Answer: The three words that appear most often in the coded text are:",
    )

    def build(size: int) -> Example:
        counts = ((least + size) * shares).astype(int)
        words = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        random.Random(seed).shuffle(words)
        return Example(f"{_CODE}\n\n{' '.join(words)}", (turn,))

    return fit(build, length, materials)


TASKS = (Task("cwe", "ruler", common_words), Task("fwe", "ruler", frequent_words))
