"""Classification learnt from hundreds of examples, in the manner of SCBench's many-shot learning (arXiv 2412.10319).

Things have a size, a colour, a material and a kind. One of the four decides the label; which one, and which of its
values get which label, differs from context to context and is never told.
"""

import random

from .base import Example, Materials, Task, Turn, fit
from .shared_context import QUESTIONS, SETTINGS

LABELS = ("alpha", "beta", "gamma", "delta")
ATTRIBUTES = (
    ("tiny", "small", "short", "narrow", "wide", "tall", "large", "huge"),
    ("red", "orange", "yellow", "green", "blue", "purple", "black", "white"),
    ("wooden", "metal", "glass", "plastic", "paper", "stone", "leather", "cotton"),
    ("box", "chair", "table", "lamp", "bowl", "toy", "bag", "clock"),
)


def many_shot(materials: Materials, length: int, rng: random.Random) -> Example:
    """As many labelled things as fit, and five new ones to label."""
    deciding = rng.randrange(len(ATTRIBUTES))
    labels = dict(zip(ATTRIBUTES[deciding], rng.sample(LABELS * 2, k=8), strict=True))
    seed = rng.random()

    def label(thing: tuple[str, ...]) -> str:
        return labels[thing[deciding]]

    def turn(thing: tuple[str, ...]) -> Turn:
        right = label(thing)
        references = (right, *(other for other in LABELS if other != right))
        question = f"Which label does this thing have: {' '.join(thing)}? Answer with the label alone."
        return Turn(question, references, "classification_first_line", most=10, prefix=_line(thing))

    asked = [_thing(rng) for _ in range(QUESTIONS)]
    turns = tuple(map(turn, asked))

    def build(size: int) -> Example:
        order, lines = random.Random(seed), ["Things and their labels:\n"]
        while len(lines) <= size:
            if (thing := _thing(order)) not in asked:
                lines.append(f'{_line(thing)}{label(thing)}"')
        return Example("\n".join(lines), turns)

    return fit(build, length, materials)


TASKS = (Task("many_shot", "shared", many_shot, SETTINGS),)


def _line(thing: tuple[str, ...]) -> str:
    """How a line begins; the label is next."""
    return f'{" ".join(thing)} = "'


def _thing(rng: random.Random) -> tuple[str, ...]:
    return tuple(map(rng.choice, ATTRIBUTES))
