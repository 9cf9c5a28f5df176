"""What ``kvarn bench`` and ``kvarn report`` do."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from transformers import PreTrainedModel

from ..budgets import parse_budget
from ..errors import KvarnError
from ..models import DTYPES, device_of, load
from ..recipe import Recipe
from ..spec import ModelSpec
from . import peers
from .machine import hardware, versions
from .options import COUNTS
from .records import Results
from .report import terminal_table, write_report
from .request import MATERIALS, Request, kvarn_subjects
from .runner import identity, run
from .subjects import Subject
from .suites import SUITES, Bench
from .tasks import Setting, files


def bench(options: argparse.Namespace) -> None:
    """Measures, or goes on measuring; writes the report, also where the user stops it."""
    request = Request.from_dict(Results(options.resume).run["options"]) if options.resume else _request(options)
    device = None if request.device is None else device_of(request.device)
    model, tokenizer = load(request.model, dtype=DTYPES[request.dtype], device=device)
    asked = Bench(
        model,
        request.materials(tokenizer),
        request.suite,
        request.seed,
        [task for path in request.data for task in files.load(Path(path))],
    )
    first, step = request.shard
    cases = asked.cases()[first - 1 :: step]
    subjects = kvarn_subjects(model, request.recipes, request.budgets)
    if request.peers:
        subjects += peers.subjects(request.peers, request.budgets, model)
    results = Results(options.resume) if options.resume else _create(options.out, request, model, subjects)
    try:
        run(results, cases, subjects)
    except KeyboardInterrupt:
        print(f"\nkvarn: stopped; kvarn bench --resume {results.folder} goes on", file=sys.stderr)
        raise
    finally:
        report_on([results.folder], results.folder / "report.html")


def report(options: argparse.Namespace) -> None:
    """Writes the report of finished and unfinished runs."""
    report_on(options.folders, options.out)


def report_on(folders: Sequence[Path], page: Path) -> None:
    """Writes the page and prints its main table."""
    write_report(folders, page)
    terminal_table(folders).show()
    print(page)


def _request(options: argparse.Namespace) -> Request:
    if options.suite not in SUITES:
        raise KvarnError(f"no suite is called {options.suite!r}; there are {', '.join(SUITES)}")
    if unknown := set(options.settings or ()) - set(get_args(Setting)):
        raise KvarnError(f"no setting is called {', '.join(sorted(unknown))}; there are {', '.join(get_args(Setting))}")
    given = {name: getattr(options, name) for name in ("lengths", "tasks", "settings", "batches", *COUNTS)}
    return Request.of(
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        recipes=tuple(str(Recipe.parse(part)) for part in options.recipes.split(";") if part.strip()),
        budgets=tuple(parse_budget(part.strip()) for part in options.budgets.split(",") if part.strip()),
        peers=options.peers,
        suite=replace(SUITES[options.suite], **{name: value for name, value in given.items() if value is not None}),
        seed=options.seed,
        files={name: path for name in MATERIALS if (path := getattr(options, name))},
        data=tuple(options.data),
        shard=options.shard,
    )


def _create(folder: Path, request: Request, model: PreTrainedModel, subjects: Sequence[Subject]) -> Results:
    spec = ModelSpec.from_config(model.config, model.dtype)
    return Results.create(
        folder,
        {
            "command": "kvarn " + shlex.join(sys.argv[1:]),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": request.seed,
            "model": {
                "name": Path(request.model).name if Path(request.model).exists() else request.model,
                "architecture": spec.architecture,
                "layers": len(spec.layers),
                "kv_heads": spec.layers[0].kv_heads,
                "parameters": model.num_parameters(),
                "dtype": request.dtype,
                "positions": spec.max_positions,
            },
            "hardware": hardware(model.device),
            "versions": versions(),
            "subjects": [identity(subject) for subject in subjects],
            "options": request.to_dict(),
        },
    )
