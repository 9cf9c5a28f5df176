"""English words and other words to draw."""

import random
from collections.abc import Callable
from functools import cache

from wonderwords import RandomWord

Draw = Callable[[random.Random], str]


@cache
def vocabulary(*categories: str) -> tuple[str, ...]:
    """The different words of the categories ("adjective", "noun", "verb"; without any, of all), in lower case and in
    alphabetical order."""
    words = RandomWord(enhanced_prefixes=False).filter(include_categories=categories or None, exclude_with_spaces=True)
    return tuple(sorted({word.lower() for word in words}))


def distinct(draw: Draw, count: int, rng: random.Random) -> list[str]:
    """``count`` different draws."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw(rng)] = None
    return list(drawn)
