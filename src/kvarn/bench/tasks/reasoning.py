"""Arithmetic in several steps behind a long context of worked examples, with the problems of GSM8K (arXiv
2110.14168)."""

import random
import re
from itertools import accumulate

from ...errors import KvarnError, Unsupported
from .base import Example, Materials, Task, Turn
from .files import Line, read_lines


def gsm8k(materials: Materials, length: int, rng: random.Random) -> Example:
    """One problem of the file behind other problems with their solutions, whole ones only: they are taken in random
    order, and the last is the longest that still fits. With a file as large as GSM8K's, a few tokens stay free. Raises
    Unsupported where no worked example fits or the file has too few."""
    if materials.gsm8k is None:
        raise Unsupported("this task needs a file of problems in GSM8K's format; give its path")
    problems = [_problem(line) for line in read_lines(materials.gsm8k)]
    if len(problems) < 2:
        raise KvarnError(f"{materials.gsm8k}: two problems are the least, one to ask and one as an example")
    (asked, solution), *others = rng.sample(problems, k=len(problems))
    worked = [f"\n\nQuestion: {question}\nAnswer: {answer}" for question, answer in others]
    turn = Turn(
        f"Question: {asked}\nThink step by step. End with #### and the number that is the answer.",
        (solution.rpartition("#### ")[2],),
        "final_number",
        most=256,
    )

    def build(chosen: list[str]) -> Example:
        return Example("".join(chosen).strip(), (turn,))

    def left(chosen: list[str]) -> int:
        return length - build(chosen).room(materials.tokenizer)

    def topped_up(first: int) -> list[str]:
        """The first problems and the longest other one that still fits."""
        chosen = worked[:first]
        most = left(chosen)
        for last in sorted(range(first, len(worked)), key=sizes.__getitem__, reverse=True):
            if sizes[last] <= most:
                if (spare := left([*chosen, worked[last]])) >= 0:
                    return [*chosen, worked[last]]
                most = sizes[last] + spare  # tokens differ a little where texts meet
        return chosen

    space = left([])
    sizes = [len(tokens) for tokens in materials.tokenizer(worked, add_special_tokens=False).input_ids]
    whole = sum(total <= space for total in accumulate(sizes))
    while whole and left(worked[:whole]) < 0:
        whole -= 1
    if whole == len(worked):
        raise Unsupported(f"{length} tokens are more than the {len(problems)} problems of {materials.gsm8k} fill")
    chosen = min(topped_up(whole), topped_up(max(whole - 1, 0)), key=left)
    if not chosen:
        raise Unsupported(f"{length} tokens are too few for a problem, its answer and a worked example")
    return build(chosen)


TASKS = (Task("gsm8k", "reasoning", gsm8k, needs=("gsm8k",)),)


def _problem(line: Line) -> tuple[str, str]:
    """A problem and its solution without the notes for a calculator, <<6*7=42>>."""
    question, answer = line.text("question"), line.text("answer")
    if not re.search(r"#### .*\d", answer):
        raise KvarnError(f"{line.where}: field 'answer' must end with '#### ' and a number")
    return question.strip(), re.sub(r"<<.*?>>", "", answer).strip()
