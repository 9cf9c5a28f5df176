"""One HTML file that needs nothing else: numbers, plots, styles and scripts are all inside."""

import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from .summary import Summary, summarize
from .words import findings

DIGITS = 6  # of every number in the page
_ASSETS = files(__package__)


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Writes a page about one or several folders of results, which may be unfinished, overlap, or be of different
    models. It makes no network requests and needs no other file. Raises KvarnError where a folder has no results."""
    out.write_text(render(summarize(folders)), encoding="utf-8")


def render(summary: Summary) -> str:
    """The page of a summary."""
    parts = {
        "title": html.escape(_title(summary)),
        "css": _asset("report.css"),
        "plotly": get_plotlyjs(),
        "data": embedded(_data(summary)),
        "js": _asset("report.js"),
    }
    # In one pass: what is filled in may itself contain a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("report.html"))


def embedded(data: Any) -> str:
    """JSON that can stand in a script element whatever its strings contain."""
    text = json.dumps(_rounded(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _title(summary: Summary) -> str:
    models = list(dict.fromkeys(row.model for row in summary.rows)) or [run.model for run in summary.runs]
    return f"KV caches compared: {', '.join(models)}"


def _data(summary: Summary) -> dict[str, Any]:
    return {
        "rows": [asdict(row) for row in summary.rows],
        "runs": [asdict(run) for run in summary.runs],
        "tasks": summary.tasks,
        "findings": findings(summary),
    }


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Numbers to DIGITS significant digits; those that JSON does not have (infinite or undefined) as null."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
