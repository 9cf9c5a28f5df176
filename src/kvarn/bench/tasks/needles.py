"""RULER's eight needle tasks (arXiv 2404.06654): find what a few sentences say that are hidden in a long text.

The number of keys, values and questions, what they look like and the room for answers are RULER's; the words are our
own, and the prose begins at a random place instead of at its beginning. Depths are uniform over the text.
"""

import random
import uuid
from functools import partial
from typing import Literal

from . import haystack
from .base import Example, Materials, Task, Turn, fit
from .vocabulary import Draw, distinct, vocabulary


def _word(rng: random.Random) -> str:
    return f"{rng.choice(vocabulary('adjective'))}-{rng.choice(vocabulary('noun'))}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_DRAWS: dict[str, Draw] = {"word": _word, "number": _number, "uuid": _uuid}


def find_needles(
    materials: Materials,
    length: int,
    rng: random.Random,
    *,
    hay: Literal["noise", "prose", "needles"] = "prose",
    key: Literal["word", "uuid"] = "word",
    value: Literal["number", "uuid"] = "number",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Example:
    """``keys`` keys with ``values`` values each, hidden one by one; the question is for all values of the first
    ``queries`` keys. ``hay``: what hides them; with "needles", more sentences of the same kind. No key or value is
    there twice, but for a key with several values."""
    hidden = keys * values
    others = length // 8 if hay == "needles" else 0  # enough: each sentence has more than 8 tokens
    names = distinct(_DRAWS[key], keys + others, rng)
    secrets = distinct(_DRAWS[value], hidden + others, rng)
    owners = [name for name in names[:keys] for _ in range(values)] + names[keys:]
    space = "\n" if hay == "needles" else " "
    sentences = [f"{space}A secret {value} of {owner} is {it}." for owner, it in zip(owners, secrets, strict=True)]
    if hay == "needles":
        text = haystack.pieces("".join(sentences[hidden:]))
    else:
        text = haystack.prose(materials, rng) if hay == "prose" else haystack.noise()
    depths = [rng.random() for _ in range(hidden)]
    intro, turn = _asked(value, names[:queries], tuple(secrets[: queries * values]))

    def build(size: int) -> Example:
        return Example(f"{intro}\n\n{haystack.hide(sentences[:hidden], depths, text, size)}", (turn,))

    return fit(build, length, materials)


def _asked(value: str, names: list[str], answers: tuple[str, ...]) -> tuple[str, Turn]:
    """What stands before the text, and what is asked after it."""
    *first, last = names
    owners = f"{', '.join(first)} and {last}" if first else last
    if len(answers) == 1:
        intro = f"The text below hides a secret {value}. Remember it, for you will be asked what it is."
        question = f"What is the secret {value} of {owners} in the text above?"
        prefix = f"The secret {value} of {owners} in the text above is"
    else:
        intro = f"The text below hides secret {value}s. Remember them, for you will be asked what they are."
        question = f"What are all the secret {value}s of {owners} in the text above?"
        prefix = f"The secret {value}s of {owners} in the text above are"
    return intro, Turn(question, answers, "contains_all", most=128, prefix=prefix)


TASKS = (
    Task("niah_single_1", "ruler", partial(find_needles, hay="noise")),
    Task("niah_single_2", "ruler", find_needles),
    Task("niah_single_3", "ruler", partial(find_needles, value="uuid")),
    Task("niah_multikey_1", "ruler", partial(find_needles, keys=4)),
    Task("niah_multikey_2", "ruler", partial(find_needles, hay="needles")),
    Task("niah_multikey_3", "ruler", partial(find_needles, hay="needles", key="uuid", value="uuid")),
    Task("niah_multivalue", "ruler", partial(find_needles, values=4)),
    Task("niah_multiquery", "ruler", partial(find_needles, keys=4, queries=4)),
)
