"""The command line: ``kvarn run``, ``methods``, ``models``, ``calibrate``, ``demo``, ``bench``, ``report``."""

import argparse
import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.progress import Progress
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from . import demo
from .bench.options import add_bench, add_report
from .budgets import Budget, parse_budget
from .cache import Cache
from .calibration import calibrate, require_calibration
from .errors import KvarnError, PromptTooLong, RecipeError, Unsupported
from .generation import Answer, answer, chat_turns, require_room
from .methods import METHODS, Method
from .methods.base import default_of
from .models import DTYPES, available, device_of, load
from .recipe import Recipe
from .tables import Table, console


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, 2 after an error that it has explained, or 130 where the user stopped it."""
    options = _parser().parse_args(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        options.command(options)
    except KvarnError as error:
        print("kvarn:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nkvarn: stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvarn", description="Manages the KV cache of transformers language models.")
    commands = parser.add_subparsers(required=True, metavar="command")

    run = commands.add_parser("run", help="ask a model about a text, with a recipe for its cache")
    run.set_defaults(command=_run)
    _add_model(run)
    run.add_argument(
        "--recipe", default="full", help='methods joined by +, as in "snapkv + kivi(bits=4)" (%(default)s)'
    )
    run.add_argument("--budget", help="0.25: share of the dense bytes; 512: entries a head; 64MiB: bytes")
    run.add_argument("--file", help="a text that is put before the first question; - reads standard input")
    run.add_argument("--first-tokens", type=_positive, metavar="N", help="only the first N tokens of the file")
    run.add_argument("--ask", action="append", required=True, metavar="QUESTION", help="again for a further turn")
    run.add_argument("--system", help="the system message")
    run.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="of each answer (%(default)s)")
    _add_json(run)

    methods = commands.add_parser("methods", help="what a recipe can be made of")
    methods.set_defaults(command=_methods)
    methods.add_argument("name", nargs="?", help="everything about this one")
    _add_formats(methods)

    models = commands.add_parser("models", help="the models that can be loaded without a network")
    models.set_defaults(command=_models)
    _add_json(models)

    show = commands.add_parser("demo", help="find a fact in a long text with compressed caches (minutes)")
    show.set_defaults(command=_demo)
    show.add_argument("--fact-depth", type=_share, default=0.4, metavar="SHARE", help="0 to 1 (%(default)s)")
    show.add_argument("--tokens", type=_positive, default=6000, metavar="N", help="of text (%(default)s)")
    _add_formats(show)

    bench = commands.add_parser("bench", help="measure what recipes cost in quality, memory and time")
    bench.set_defaults(command=_bench)
    _add_model(bench)
    add_bench(bench)

    learn = commands.add_parser("calibrate", help="learn what a method has to know of a model, once (minutes)")
    learn.set_defaults(command=_calibrate)
    learn.add_argument("model", help="built-in name, GGUF file, folder or hub id")
    learn.add_argument("method", help="one that needs it, such as duoattention, with parameters if need be")
    learn.add_argument("--text", metavar="FILE", help="what the model reads for it (Python's language reference)")
    _add_where(learn)

    report = commands.add_parser("report", help="one page about one or several folders of results")
    report.set_defaults(command=_report)
    add_report(report)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="built-in name, GGUF file, folder or hub id (%(default)s)")
    _add_where(parser)


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (cuda where there is one)")


def _add_json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON value")


def _add_formats(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_mutually_exclusive_group()
    _add_json(formats)
    formats.add_argument("--markdown", action="store_true", help="print Markdown")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _share(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


# run


def _run(options: argparse.Namespace) -> None:
    # What can be wrong is looked at before the model is loaded, which takes longest.
    recipe = Recipe.parse(options.recipe)
    budget = None if options.budget is None else parse_budget(options.budget)
    text = None if options.file is None else _read(options.file)
    device = None if options.device is None else device_of(options.device)
    model, tokenizer = load(options.model, dtype=DTYPES[options.dtype], device=device)
    cache = Cache(model, recipe, budget)
    questions = list(options.ask)
    if text is not None:
        questions[0] = f"{_first_tokens(tokenizer, text, options.first_tokens)}\n\n{questions[0]}"
    turns = chat_turns(tokenizer, questions, options.system)
    _require_room(cache, turns, options)
    answers: list[Answer] = []
    for question, turn in zip(options.ask, turns, strict=True):
        # A cut answer's last token was chosen but never read.
        prompt = [*answers[-1].pending, *turn] if answers else turn
        if options.json:
            answers.append(answer(model, cache, prompt, options.max_new_tokens))
        else:
            print(f"> {question}")
            with _printed(tokenizer) as show:
                answers.append(answer(model, cache, prompt, options.max_new_tokens, on_token=show))
    if options.json:
        _print_json(_outcome(options, budget, tokenizer, turns, answers, cache))
    else:
        print(cache.report())
        for number, given in enumerate(answers, 1):
            print(f"turn {number}: {_times(given)}")


@contextmanager
def _printed(tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[[int], None]]:
    """Prints the text of the tokens that it is given as soon as words are whole."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    yield lambda token: streamer.put(torch.tensor([token]))
    streamer.end()
    print()


def _outcome(
    options: argparse.Namespace,
    budget: Budget,
    tokenizer: PreTrainedTokenizerBase,
    turns: list[list[int]],
    answers: list[Answer],
    cache: Cache,
) -> dict[str, Any]:
    return {
        "model": options.model,
        "recipe": str(cache.recipe),
        "budget": budget,
        "dtype": options.dtype,
        "turns": [
            {
                "question": question,
                "answer": tokenizer.decode(given.tokens, skip_special_tokens=True),
                "finished": given.finished,
                "prompt_tokens": len(turn),
                "answer_tokens": len(given.tokens),
                "seconds_to_first_token": given.to_first_token,
                "seconds_per_token": given.per_token,
            }
            for question, turn, given in zip(options.ask, turns, answers, strict=True)
        ],
        "report": cache.report().to_dict(),
    }


def _times(given: Answer) -> str:
    per_token = "" if given.per_token is None else f", {given.per_token * 1000:.0f} ms a token after it"
    cut = "" if given.finished else " (cut at --max-new-tokens)"
    return f"{given.to_first_token:.2f} s to the first token{per_token}; {len(given.tokens)} tokens{cut}"


def _require_room(cache: Cache, turns: list[list[int]], options: argparse.Namespace) -> None:
    """Foresees the whole conversation, so that no turn fails after others have run."""
    try:
        require_room(sum(map(len, turns)), len(turns) * options.max_new_tokens, cache.spec.max_positions)
    except PromptTooLong as error:
        hint = "" if options.file is None else "; --first-tokens N keeps only the first N tokens of the file"
        raise PromptTooLong(f"{error}{hint}") from error


def _first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int | None) -> str:
    if count is None:
        return text
    return tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:count])


def _read(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise KvarnError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KvarnError(f"{path}: not a text in UTF-8") from error


# methods


def _methods(options: argparse.Namespace) -> None:
    chosen = _named(options.name)
    if options.json:
        facts = [_facts(method) for method in chosen]
        _print_json(facts if options.name is None else facts[0])
    elif options.markdown:
        print(_methods_page(chosen))
    elif options.name is None:
        _methods_table(chosen).show()
    else:
        print(_everything_about(chosen[0]))


def _named(name: str | None) -> list[type[Method]]:
    """The method of this name; None: all."""
    if name is None:
        return list(METHODS.values())
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(METHODS)}"
        raise RecipeError(f"no method is called {name!r}; {hint}")
    return [METHODS[name]]


def _facts(method: type[Method]) -> dict[str, Any]:
    return {
        "name": method.name,
        "family": method.family,
        "parameters": {field.name: default_of(field) for field in fields(method)},
        "needs": method.needs,
        "acts": method.acts,
        "citation": method.citation,
        "description": inspect.getdoc(method),
    }


def _methods_table(methods: Sequence[type[Method]]) -> Table:
    rows = [[m.name, m.family, _parameters(m), m.needs, m.acts, m.citation] for m in methods]
    return Table(["name", "family", "parameters", "needs", "acts", "citation"], rows)


def _parameters(method: type[Method]) -> str:
    return ", ".join(f"{field.name}={default_of(field)!r}" for field in fields(method)) or "none"


def _everything_about(method: type[Method]) -> str:
    lines = [
        f"{method.name}: {method.citation}",
        f"  family      {method.family}",
        f"  parameters  {_parameters(method)}",
        f"  needs       {method.needs}",
        f"  acts        {method.acts}",
    ]
    return "\n".join([*lines, "", inspect.getdoc(method) or ""])


def _methods_page(methods: Sequence[type[Method]]) -> str:
    sections = [f"## {m.name}\n\n{inspect.getdoc(m)}\n\n{m.citation}.".replace("``", "`") for m in methods]
    intro = (
        "A recipe joins methods with `+`, as in `snapkv + kivi(bits=4)`. `kvarn methods --markdown` prints this page."
    )
    return "\n\n".join(["# Methods", intro, _methods_table(methods).markdown(), *sections])


# models


def _models(options: argparse.Namespace) -> None:
    models = available()
    if options.json:
        _print_json([{**asdict(m), "path": None if m.path is None else str(m.path)} for m in models])
        return
    rows = [[m.name, f"{m.size / 1e6:.0f} MB", str(m.path or "not installed"), m.description] for m in models]
    Table(["name", "size", "where", "what"], rows, frozenset(["size"])).show()


# demo


def _demo(options: argparse.Namespace) -> None:
    outcome = demo.run(sys.stderr.isatty(), options.tokens, options.fact_depth)
    if options.json:
        _print_json(outcome.to_dict())
    elif options.markdown:
        print(f"{outcome.task}\n\n{outcome.table().markdown()}\n\n{outcome.conditions}")
    else:
        console().print(Text(str(outcome.task)))
        outcome.table().show()
        console().print(Text(outcome.conditions))


# calibrate


def _calibrate(options: argparse.Namespace) -> None:
    method, *others = Recipe.parse(options.method).methods
    if others:
        raise RecipeError(f"methods are calibrated one by one, and {options.method!r} names several")
    require_calibration(method)
    text = None if options.text is None else _read(options.text)
    device = None if options.device is None else device_of(options.device)
    model, tokenizer = load(options.model, dtype=DTYPES[options.dtype], device=device)
    with Progress(console=console()) as bar:
        task = bar.add_task(f"{method.name} on {options.model}")
        path = calibrate(
            model, tokenizer, method, text, lambda done, total: bar.update(task, completed=done, total=total)
        )
    print(f"saved to {path}")


# bench


def _bench(options: argparse.Namespace) -> None:
    _bench_commands().bench(options)


def _report(options: argparse.Namespace) -> None:
    _bench_commands().report(options)


def _bench_commands() -> ModuleType:
    """Imported when it is needed: it takes seconds, and packages that the other commands do without."""
    try:
        return importlib.import_module("kvarn.bench.command")
    except ModuleNotFoundError as error:
        raise Unsupported(f"the bench needs the package {error.name}: pip install 'kvarn[bench]'") from error


if __name__ == "__main__":
    sys.exit(main())
