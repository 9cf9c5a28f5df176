"""Measures every case with every subject, and writes each record as soon as it is made."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import KvarnError
from .cases import Case, Measure
from .records import Record, Results
from .subjects import Subject


def run(results: Results, cases: Sequence[Case], subjects: Sequence[Subject]) -> None:
    """Adds to ``results`` what is not there yet, case by case, so that a run that is stopped early has measured all
    subjects alike. What a subject refuses is a record too. An interruption loses the measurement under way alone."""
    results.mend()
    done = results.done()
    with _Progress(len(cases), sum(case.weight for case in cases)) as progress:
        for case in cases:
            progress.begin(case.key)
            missing = [subject for subject in subjects if (case.key, subject.label) not in done]
            measure = _prepared(case) if missing else None
            for subject in missing:
                assert measure is not None
                progress.show(subject.label)
                results.add(_record(case, measure, subject))
                progress.advance(case.weight / len(missing))
            if not missing:
                progress.advance(case.weight)


def _prepared(case: Case) -> Measure:
    """A case that cannot be, such as a task that is longer than the length, is one that every subject refuses."""
    try:
        return case.prepared()
    except KvarnError as error:
        return partial(_refuse, error)


def _refuse(error: KvarnError, subject: Subject) -> NoReturn:
    raise error


def _record(case: Case, measure: Measure, subject: Subject) -> Record:
    head = {
        "kind": case.kind,
        "subject": identity(subject),
        "case": case.key,
        "length": case.length,
    }
    try:
        return {**head, **measure(subject)}
    except (KvarnError, torch.OutOfMemoryError) as error:
        return {**head, "kind": "refused", "reason": " ".join(str(error).split())}


def identity(subject: Subject) -> Record:
    """How records name a subject."""
    return {"system": subject.system, "name": subject.name, "budget": subject.budget, "label": subject.label}


class _Progress:
    """On a terminal a bar with the time left; in a file a line for each case."""

    def __init__(self, cases: int, weight: float):
        self.cases, self.weight, self.begun, self.passed = cases, weight, 0, 0.0
        console = Console(file=sys.stderr)
        columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.job = self.bar.add_task("", total=weight)

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begin(self, case: str) -> None:
        self.begun += 1
        self.case = f"{self.begun}/{self.cases} {case}"
        if self.bar.disable:
            print(f"kvarn: {self.passed / self.weight:4.0%} {self.case}", file=sys.stderr, flush=True)

    def show(self, subject: str) -> None:
        self.bar.update(self.job, description=f"{self.case}: {subject}")

    def advance(self, weight: float) -> None:
        self.passed += weight
        self.bar.update(self.job, completed=self.passed)
