"""Suites: which cases are measured, and how many of each."""

import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PreTrainedModel

from ..errors import KvarnError, PromptTooLong, Unsupported
from ..generation import end_tokens
from ..spec import ModelSpec
from .answering import Answering
from .cases import Case
from .fidelity import Fidelity, Perplexity
from .prompts import Prompt
from .speed import WARM_UP_STEPS, Speed
from .subjects import KvarnSubject
from .tasks import TASKS, Materials, Setting, Task

SUMMARIZE = "Summarize the text above."
GROUPS = sorted({task.group for task in TASKS.values()})


@dataclass(frozen=True)
class Suite:
    """How much of what is measured, at each of ``lengths`` (tokens, prompt and answer together).

    ``fidelity``: prompts that the full cache continues, half of them plain text and half chat; ``perplexity``: windows
    of text; ``positions``: tokens predicted in each of both. ``tasks``: names, or groups of tasks; ``settings``: None
    for all that a task has; ``examples``: of each task and setting. ``rounds``: of timing, for each of ``batches``
    sequences at once, each with ``steps`` decoding steps.
    """

    lengths: tuple[int, ...]
    fidelity: int = 0
    perplexity: int = 0
    positions: int = 64
    tasks: tuple[str, ...] = ()
    settings: tuple[Setting, ...] | None = None
    examples: int = 10
    rounds: int = 0
    steps: int = 32
    batches: tuple[int, ...] = (1,)


SUITES = {
    "quick": Suite(
        (1024,),
        fidelity=4,
        positions=24,
        tasks=("niah_single_2", "many_shot"),
        settings=("aware", "agnostic", "multi-turn"),
        examples=2,
        rounds=1,
        steps=12,
    ),
    "fidelity": Suite((1024, 2048, 4096), fidelity=16),
    "perplexity": Suite((1024, 2048, 4096), perplexity=16),
    "ruler": Suite((4096,), tasks=("ruler",)),
    "shared": Suite((4096,), tasks=("shared",)),
    "reasoning": Suite((2048,), tasks=("reasoning",), examples=50),
    "files": Suite((4096,), examples=50),
    "speed": Suite((1024, 2048, 4096), rounds=3, batches=(1, 4)),
    "all": Suite((1024, 2048, 4096), 16, 16, tasks=("ruler", "shared", "reasoning"), rounds=3, batches=(1, 4)),
}


@dataclass(frozen=True)
class Bench:
    """A model with what it is asked. ``files``: tasks read from files, which are measured beside the suite's."""

    model: PreTrainedModel
    materials: Materials
    suite: Suite
    seed: int
    files: list[Task] = field(default_factory=list)

    @property
    def full(self) -> KvarnSubject:
        """The full cache, with which all are compared."""
        return KvarnSubject(self.model, "full")

    def cases(self) -> list[Case]:
        """All cases: short ones first, and of each length one example of every kind before the second of any, so that
        a run that is stopped early has measured all alike; timing comes last. Raises what ``_check`` raises."""
        self._check()
        return [*self._quality(), *self._timing()]

    def _quality(self) -> Iterator[Case]:
        suite, ends = self.suite, frozenset(end_tokens(self.model))
        tasks = self._tasks()
        for length in sorted(suite.lengths):
            for number in range(max(suite.fidelity, suite.perplexity, suite.examples if tasks else 0)):
                if number < suite.fidelity:
                    yield self._fidelity(length, number, ends)
                if number < suite.perplexity:
                    yield self._perplexity(length, number)
                for task in tasks:
                    if number < min(suite.examples, task.count or suite.examples):
                        for setting in self._settings(task):
                            yield Answering(task, setting, number, length, self.seed, self.materials, ends)

    def _timing(self) -> Iterator[Case]:
        suite, device = self.suite, self.model.device
        for length in sorted(suite.lengths):
            for batch in suite.batches:
                read = length - suite.steps - WARM_UP_STEPS
                prompts = torch.stack([torch.tensor(self._prose(read, f"speed/{row}")) for row in range(batch)])
                for number in range(suite.rounds):
                    yield Speed(self.full, number, length, prompts, suite.steps, device)

    def _fidelity(self, length: int, number: int, ends: frozenset[int]) -> Fidelity:
        read = length - self.suite.positions - 1
        if number % 2:
            return Fidelity(self.full, "chat", number, length, self._chat(read, number), self.suite.positions, ends)
        return Fidelity(self.full, "text", number, length, self._prose(read, number), self.suite.positions, ends)

    def _perplexity(self, length: int, number: int) -> Perplexity:
        window, following = self._prose(length, number), self.suite.positions + 1
        return Perplexity(number, length, window[:-following], window[-following:])

    def _chat(self, count: int, number: int) -> list[int]:
        """A chat prompt of ``count`` tokens that asks for a summary of a text."""
        tokenizer = self.materials.tokenizer
        prompt = Prompt.of(tokenizer, tokenizer.decode(self._prose(count, number)), [(SUMMARIZE, "")], [""])
        return prompt.context[: count - len(prompt.turns[0])] + prompt.turns[0]

    def _prose(self, count: int, name: object) -> list[int]:
        """``count`` tokens of the text from a place that ``name`` and the seed decide."""
        start = random.Random(f"{self.seed}/{name}").randrange(len(self._text) - count + 1)
        return [*self._beginning, *self._text[start : start + count]][:count]

    @cached_property
    def _text(self) -> list[int]:
        return self.materials.tokenizer(self.materials.prose, add_special_tokens=False).input_ids

    @cached_property
    def _beginning(self) -> list[int]:
        """What the tokenizer puts before every text."""
        return self.materials.tokenizer("").input_ids

    def _settings(self, task: Task) -> Iterator[Setting]:
        wanted = self.suite.settings or task.settings
        return (setting for setting in task.settings if setting in wanted)

    def _tasks(self) -> list[Task]:
        return [*self.files, *chosen(self.suite.tasks, self.materials)]

    def _check(self) -> None:
        suite, longest = self.suite, max(self.suite.lengths)
        limit = ModelSpec.from_config(self.model.config, self.model.dtype).max_positions
        if limit is not None and longest > limit:
            raise PromptTooLong(f"length {longest:,}: the model has positions for {limit:,}; ask for shorter lengths")
        if min(suite.lengths) < 2 * max(suite.positions, suite.steps):
            raise Unsupported(
                f"length {min(suite.lengths)} is too short for {suite.positions} positions and {suite.steps} steps"
            )
        if (suite.fidelity or suite.perplexity or suite.rounds) and longest > len(self._text):
            raise Unsupported(
                f"length {longest:,}: the text has {len(self._text):,} tokens; give a longer one with --text"
            )


def chosen(names: Sequence[str], materials: Materials) -> list[Task]:
    """The tasks called by name or by group. Of a group, those that need a file that is not there are left out; raises
    KvarnError where one is called by its own name, and where a name is unknown."""
    tasks: list[Task] = []
    for name in names:
        if name in TASKS:
            _require_materials(TASKS[name], materials)
            tasks.append(TASKS[name])
        elif name in GROUPS:
            tasks += [task for task in TASKS.values() if task.group == name and not missing(task, materials)]
        else:
            close = difflib.get_close_matches(name, [*TASKS, *GROUPS], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join([*GROUPS, *TASKS])}"
            raise KvarnError(f"no task or group of tasks is called {name!r}; {hint}")
    return list(dict.fromkeys(tasks))


def missing(task: Task, materials: Materials) -> list[str]:
    """The files that a task needs and that are not given."""
    return [name for name in task.needs if getattr(materials, name) is None]


def _require_materials(task: Task, materials: Materials) -> None:
    if lacking := missing(task, materials):
        raise KvarnError(f"{task.name} needs {' and '.join(f'--{name} FILE' for name in lacking)}")
