"""Results in words: what one sees in a sentence or two, and a table for a terminal."""

from collections.abc import Sequence
from pathlib import Path

from ...tables import Table
from ..statistics import Interval
from .summary import ALL, BASELINE, Ratio, Row, Summary, scopes, summarize

KEPT = 0.95  # of the full cache’s task score: what counts as hardly worse
NOT_MEASURED = "–"


def findings(summary: Summary) -> list[str]:
    """What one sees of each model at the greatest length at which subjects were compared."""
    longest: dict[str, list[Row]] = {}
    for (model, _), rows in sorted(scopes(summary.rows).items()):
        if any(row.label != BASELINE and row.memory for row in rows):
            longest[model] = rows
    return [" ".join(_sentences(rows)) for rows in longest.values()]


def terminal_table(folders: Sequence[Path]) -> Table:
    """The main columns of a report: a row for each subject, model and length. Raises KvarnError where a folder has no
    results or damaged ones."""
    rows = summarize(folders).rows
    quality = ["KL, nats", "top-1", "perplexity", "score", "of full"]
    costs = ["KV of dense", "peak", "first token", "per token"]
    headers = ["subject", "model", "tokens", *quality, *costs]
    cells = [[row.label, row.model, f"{row.length:,}", *_quality(row), *_costs(row)] for row in rows]
    if len({row.model for row in rows}) == 1:
        headers, cells = headers[:1] + headers[2:], [cell[:1] + cell[2:] for cell in cells]
    return Table(headers, cells, frozenset(["tokens", *quality, *costs]))


def _sentences(rows: list[Row]) -> list[str]:
    others = [row for row in rows if row.label != BASELINE and row.memory]
    by_kl = any(row.fidelity for row in others)
    quality, named = ("kl", "KL divergence") if by_kl else (f"score:{ALL}", "task score")
    measured = [row for row in others if (row.fidelity if by_kl else row.scores)]
    front = sorted((row for row in measured if f"{quality} bytes" in row.fronts), key=_share)
    shown = "; ".join(
        f"{row.label} ({_quality_of(row, by_kl)} in {percent(_share(row))} of the bytes)" for row in front
    )
    sentence = (
        f"{rows[0].model} at {rows[0].length:,} tokens: of {len(measured)} subjects besides full, {len(front)} "
        f"{'is' if len(front) == 1 else 'are'} on the Pareto front of {named} against KV bytes"
    )
    return [f"{sentence}: {shown}." if front else f"{sentence}.", *_cheapest(others)]


def _quality_of(row: Row, by_kl: bool) -> str:
    if by_kl:
        return f"KL {number(row.fidelity.kl.mean)}" if row.fidelity else ""
    return f"score {number(row.scores[ALL].mean.mean)}"


def _share(row: Row) -> float:
    """Of a dense cache's bytes."""
    return row.memory.ratio if row.memory else 1.0


def _cheapest(rows: list[Row]) -> list[str]:
    """Which cache is the smallest of those whose score is hardly worse than the full cache's."""
    kept = {row.label: row.scores[ALL].of_full for row in rows if ALL in row.scores}
    good = [row for row in rows if (kept.get(row.label) or 0.0) >= KEPT]
    if not any(share is not None for share in kept.values()):
        return []
    if not good:
        return [f"None keeps {percent(KEPT)} of the full cache’s mean task score."]
    row = min(good, key=_share)
    score = row.scores[ALL]
    sure = f"{score.examples} example{'' if score.examples == 1 else 's'}"
    if score.difference and score.difference.low is not None:
        sure += f"; 95 % interval of the difference {interval(score.difference)}"
    return [
        f"The smallest that keeps at least {percent(KEPT)} of the full cache’s mean task score is {row.label}, in "
        f"{percent(_share(row))} of the bytes ({sure})."
    ]


def _quality(row: Row) -> list[str]:
    fidelity, score = row.fidelity, row.scores.get(ALL)
    return [
        number(fidelity.kl.mean if fidelity else None),
        number(fidelity.top1.mean if fidelity else None),
        number(row.perplexity),
        number(score.mean.mean if score else None),
        number(score.of_full if score else None),
    ]


def _costs(row: Row) -> list[str]:
    times = next(iter(row.times.values()), None)
    return [
        number(row.memory.ratio if row.memory else None),
        number(row.memory.peak_ratio if row.memory else None),
        _median(times.first_token if times else None),
        _median(times.per_token if times else None),
    ]


def _median(ratio: Ratio | None) -> str:
    return number(ratio.median if ratio else None)


def number(value: float | None) -> str:
    """With the digits that matter: three, and no more than four after the point."""
    if value is None:
        return NOT_MEASURED
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return f"{value:,.{digits}f}"


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def interval(values: Interval) -> str:
    return f"{values.low:.2f} to {values.high:.2f}".replace("-", "−")
