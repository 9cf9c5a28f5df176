"""Text to hide sentences in, of any size."""

import random
import re
from itertools import cycle, islice
from operator import itemgetter

from ...errors import KvarnError
from .base import Materials

NOISE = "Rain falls on the roof. The road is long and straight. A bird sings. We walk on. Evening comes again."


def pieces(text: str) -> list[str]:
    """The text in pieces so small that any length can be met: up to eight letters or digits, or one other sign, with
    the space before them."""
    return re.findall(r"\s*(?:\w{1,8}|[^\w\s])", text)


def noise() -> list[str]:
    """The pieces of a few sentences that say nothing."""
    return pieces(f" {NOISE}")


def prose(materials: Materials, rng: random.Random) -> list[str]:
    """The pieces of the prose from a random word on, and after its end from its beginning."""
    words = materials.prose.split()
    if not words:
        raise KvarnError(f"{materials.text}: there is no text in it; give a file of prose")
    start = rng.randrange(len(words))
    return pieces(" " + " ".join(words[start:] + words[:start]))


def hide(needles: list[str], depths: list[float], haystack: list[str], size: int) -> str:
    """The first ``size`` pieces of the haystack, repeated as often as it takes, with each needle (and the space before
    it) behind the end of the sentence that is nearest to its depth (0 is the beginning, 1 the end; of those at one
    place, the first comes first), or behind any piece where no sentence ends. The last sentence may be cut."""
    hay = list(islice(cycle(haystack), size))
    ends = [i for i in range(1, size) if hay[i - 1][-1] in ".!?" and hay[i][0].isspace()] or range(size + 1)
    places = [min(ends, key=lambda end, depth=depth: abs(end - depth * size)) for depth in depths]
    for place, needle in sorted(zip(places, needles, strict=True), key=itemgetter(0))[::-1]:
        hay.insert(place, needle)
    return "".join(hay).strip()
