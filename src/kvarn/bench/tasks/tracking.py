"""RULER's variable tracking (arXiv 2404.06654): follow a chain of assignments through a long text.

One chain of four hops in noise, behind one worked example, as in RULER; the worked example is shorter than there.
"""

import random
import string

from . import haystack
from .base import Example, Materials, Task, Turn, fit
from .vocabulary import distinct

VARIABLES = 5  # one that is given a value, and four hops
_WORKED = 80  # pieces of noise in the worked example
_INTRO = "The text below assigns values to variables. Keep track of every assignment."


def track_variables(materials: Materials, length: int, rng: random.Random) -> Example:
    """The answer: the names of all variables that have the value at the chain's beginning."""
    shown, asked = (str(value) for value in rng.sample(range(10_000, 100_000), k=2))
    noise = haystack.noise()
    names, statements, depths = _chain(shown, 3, rng)  # shorter names than the real ones, so that none is there twice
    worked = _turn(shown, names)
    example = f"{_INTRO}\n\n{haystack.hide(statements, depths, noise, _WORKED)}"
    example += f"\n\n{worked.question}\n{worked.prefix} {' '.join(names)}"
    names, statements, depths = _chain(asked, 5, rng)
    turn = _turn(asked, names)

    def build(size: int) -> Example:
        text = haystack.hide(statements, depths, noise, size)
        return Example(f"{example}\n\n{_INTRO}\n\n{text}", (turn,))

    return fit(build, length, materials)


def _chain(value: str, letters: int, rng: random.Random) -> tuple[list[str], list[str], list[float]]:
    """The variables' names, their assignments in order, and the depths of these."""
    names = distinct(lambda rng: "".join(rng.choices(string.ascii_uppercase, k=letters)), VARIABLES, rng)
    values = [value, *(f"VAR {name}" for name in names[:-1])]
    statements = [f" VAR {name} = {value}." for name, value in zip(names, values, strict=True)]
    return names, statements, sorted(rng.random() for _ in names)


def _turn(value: str, names: list[str]) -> Turn:
    return Turn(
        f"Question: Which variables are assigned the value {value}, directly or through others, in the text above?",
        tuple(names),
        "contains_all",
        most=30,
        prefix=f"Answer: In the text above, {len(names)} variables are assigned the value {value}:",
    )


TASKS = (Task("vt", "ruler", track_variables),)
