"""Rows of a report, against numbers computed by hand."""

import math
from pathlib import Path
from typing import Any

import pytest

from kvarn.bench.records import Record, Results
from kvarn.bench.report import terminal_table
from kvarn.bench.report.summary import ALL, POINTS, Row, Summary, summarize
from kvarn.bench.report.words import findings
from kvarn.bench.subjects import label
from kvarn.tables import Table


def _record(kind: str, case: str, name: str = "snapkv", budget: float | None = 0.25, **more: Any) -> Record:
    subject = {"system": "kvarn", "name": name, "budget": budget, "label": label("kvarn", name, budget)}
    return {"kind": kind, "subject": subject, "case": case, "length": 64, "held": None, **more}


def _full(kind: str, case: str, **more: Any) -> Record:
    return _record(kind, case, "full", None, **more)


def _fidelity(kl: list[float], rank: list[int] | None = None) -> Record:
    return {"kl": kl, "top1": [1] * len(kl), "rank": rank or [1] * len(kl), "nll_change": [0.0] * len(kl)}


def _task(task: str, setting: str, number: int, score: float) -> Record:
    turn = {"question": "who?", "answer": "me", "references": ["you", "me"], "score": score}
    return {"task": task, "group": "g", "setting": setting, "number": number, "score": score, "turns": [turn]}


def _held(of_dense: float, peak: float | None = None, entries: list[list[int]] | None = None) -> Record:
    peak_bytes = None if peak is None else int(1000 * peak)
    return {"bytes": int(1000 * of_dense), "dense_bytes": 1000, "peak_bytes": peak_bytes, "entries": entries}


def _summary(folder: Path, *records: Record, **run: Any) -> Summary:
    results = Results.create(folder, run)
    for record in records:
        results.add(record)
    return summarize([folder])


def _only(summary: Summary) -> Row:
    (row,) = summary.rows
    return row


def test_fidelity_is_the_mean_over_examples_of_means_over_positions(tmp_path: Path) -> None:
    row = _only(
        _summary(
            tmp_path,
            _record("fidelity", "a", **_fidelity([1.0, 3.0], rank=[1, 9])),
            _record("fidelity", "b", **_fidelity([4.0, 4.0, 4.0, 4.0], rank=[1, 1, 2, 2])),
        )
    )
    assert row.fidelity.examples == 2
    assert row.fidelity.kl.mean == 3.0
    assert row.fidelity.kl.low < 3.0 < row.fidelity.kl.high
    assert row.fidelity.top1 == (1.0, None, None)
    assert row.fidelity.rank_mean == pytest.approx(16 / 6)
    assert row.fidelity.rank_median == 1.5


def test_curves_are_means_over_the_examples_that_reach_a_position(tmp_path: Path) -> None:
    records = [
        _record("fidelity", "a", **_fidelity([1.0, 3.0])),
        _record("fidelity", "b", **_fidelity([3.0, 5.0, 7.0])),
    ]
    curve = _only(_summary(tmp_path, *records)).curve
    assert (curve.start, curve.kl, curve.examples) == ([0, 1, 2], [2.0, 4.0, 7.0], [2, 2, 1])


def test_long_curves_are_averaged_over_neighbours(tmp_path: Path) -> None:
    values = [float(number) for number in range(2 * POINTS)]
    curve = _only(_summary(tmp_path, _record("fidelity", "a", **_fidelity(values)))).curve
    assert len(curve.kl) == POINTS
    assert (curve.start[:2], curve.kl[:2]) == ([0, 2], [0.5, 2.5])


def test_perplexity_is_over_all_tokens(tmp_path: Path) -> None:
    records = [_record("perplexity", "a", nll=[1.0]), _record("perplexity", "b", nll=[2.0, 3.0])]
    assert _only(_summary(tmp_path, *records)).perplexity == pytest.approx(math.exp(2.0))


def test_scores_compare_with_full_on_the_cases_that_both_have(tmp_path: Path) -> None:
    ours = [("niah", "aware", 0, 1.0), ("niah", "aware", 1, 0.5), ("niah", "agnostic", 0, 0.0), ("qa", "aware", 0, 0.9)]
    theirs = [("niah", "aware", 0, 1.0), ("niah", "aware", 1, 1.0), ("niah", "agnostic", 0, 0.5)]
    summary = _summary(
        tmp_path,
        *(_full("task", str(case[:3]), **_task(*case)) for case in theirs),
        *(_record("task", str(case[:3]), **_task(*case)) for case in ours),
    )
    full, row = summary.rows
    assert (full.label, row.label) == ("full", "snapkv @ 0.25")
    assert list(row.scores) == [ALL, "aware", "agnostic"]
    assert row.scores["aware"].mean.mean == pytest.approx(0.8)
    assert row.scores["aware"].of_full == pytest.approx(1.5 / 2)
    assert row.scores["aware"].difference.mean == pytest.approx(-0.25)
    assert row.scores["agnostic"].of_full == 0.0
    assert row.scores[ALL].examples == 3  # one example in two settings is one
    assert row.scores[ALL].of_full == pytest.approx(1.5 / 2.5)
    assert row.cells["aware"] == {"niah": (0.75, 2), "qa": (0.9, 1)}
    assert full.scores[ALL].of_full == 1.0
    assert summary.tasks == {"niah": "g", "qa": "g"}


def test_without_full_or_where_full_scores_nothing_there_is_no_comparison(tmp_path: Path) -> None:
    alone = _only(_summary(tmp_path / "a", _record("task", "x", **_task("qa", "aware", 0, 1.0))))
    assert (alone.scores[ALL].of_full, alone.scores[ALL].difference) == (None, None)
    ours, theirs = _task("qa", "aware", 0, 1.0), _task("qa", "aware", 0, 0.0)
    _, row = _summary(tmp_path / "b", _full("task", "x", **theirs), _record("task", "x", **ours)).rows
    assert row.scores[ALL].of_full is None
    assert row.scores[ALL].difference.mean == 1.0


def test_memory_and_entries_are_means_over_records(tmp_path: Path) -> None:
    records = [
        _record("fidelity", "a", **_fidelity([0.0]) | {"held": _held(0.2, 0.5, [[2, 4], [6, 8]])}),
        _record("fidelity", "b", **_fidelity([0.0]) | {"held": _held(0.4, None, [[4, 4], [6, 0]])}),
        _record("fidelity", "c", **_fidelity([0.0])),
    ]
    row = _only(_summary(tmp_path, *records))
    assert (row.memory.bytes, row.memory.ratio, row.memory.peak_ratio) == (300, pytest.approx(0.3), 0.5)
    assert (row.entries.mean, row.entries.records) == ([[3.0, 4.0], [6.0, 4.0]], 2)


def test_times_are_ratios_of_pairs_at_each_batch_size(tmp_path: Path) -> None:
    first = {"first_token": [1.0, 2.0, 9.0], "first_token_full": [1.0, 1.0, 3.0]}
    token = {"per_token": [], "per_token_full": []}
    peaks = {"process_peak_bytes": 10, "device_peak_bytes": None}
    records = [_record("speed", str(batch), batch=batch, **first, **token, **peaks) for batch in (8, 1)]
    row = _only(_summary(tmp_path, *records))
    assert list(row.times) == ["1", "8"]
    ratio = row.times["1"].first_token
    assert (ratio.median, ratio.seconds, ratio.pairs) == (2.0, 2.0, 3)
    assert ratio.p95 == pytest.approx(2.9)
    assert row.times["1"].per_token is None
    assert row.times["1"].process_peak_bytes == 10


def test_a_refused_subject_has_a_row_with_its_reasons(tmp_path: Path) -> None:
    records = [
        _record("refused", case, reason=reason) for case, reason in [("a", "small"), ("b", "large"), ("c", "large")]
    ]
    row = _only(_summary(tmp_path, *records))
    assert row.refused == [("large", 2), ("small", 1)]
    assert (row.fidelity, row.memory, row.scores, row.times, row.fronts) == (None, None, {}, {}, [])


def test_fronts_are_of_one_model_and_length(tmp_path: Path) -> None:
    def record(name: str, kl: float, of_dense: float, length: int = 64) -> Record:
        return _record("fidelity", f"{length}", name, **_fidelity([kl]) | {"held": _held(of_dense), "length": length})

    records = [record("a", 0.1, 0.5), record("b", 0.2, 0.5), record("c", 0.9, 0.1), record("b", 9.0, 0.9, length=128)]
    rows = {(row.name, row.length): row.fronts for row in _summary(tmp_path, *records).rows}
    assert rows == {("a", 64): ["kl bytes"], ("b", 64): [], ("c", 64): ["kl bytes"], ("b", 128): ["kl bytes"]}


def test_findings_are_computed_from_the_rows(tmp_path: Path) -> None:
    def records(name: str, budget: float | None, kl: float, of_dense: float, score: float) -> list[Record]:
        held = {"held": _held(of_dense)}
        task = _task("qa", "aware", 0, score)
        return [
            _record("fidelity", "f", name, budget, **_fidelity([kl]) | held),
            _record("task", "t", name, budget, **task | held),
        ]

    made = [
        *records("full", None, 0.0, 1.0, 1.0),
        *records("good", 0.5, 0.1, 0.5, 1.0),
        *records("small", 0.125, 0.5, 0.125, 0.96),
        *records("bad", 0.5, 0.7, 0.6, 0.2),
    ]
    (text,) = findings(_summary(tmp_path, *made, model={"name": "M"}))
    assert text == (
        "M at 64 tokens: of 3 subjects besides full, 2 are on the Pareto front of KL divergence against KV bytes: "
        "small @ 0.125 (KL 0.500 in 12.5 % of the bytes); good @ 0.5 (KL 0.100 in 50 % of the bytes). The smallest "
        "that keeps at least 95 % of the full cache’s mean task score is small @ 0.125, in 12.5 % of the bytes "
        "(1 example)."
    )


def test_what_is_measured_again_later_counts_once(tmp_path: Path) -> None:
    for started, kl in [("2025-02-01", 2.0), ("2025-01-01", 1.0)]:
        _summary(tmp_path / started, _record("fidelity", "a", **_fidelity([kl])), started=started, seed=0)
    summary = summarize([tmp_path / "2025-02-01", tmp_path / "2025-01-01"])
    assert _only(summary).fidelity.kl.mean == 2.0
    assert [run.left_out for run in summary.runs] == [{"measured again later": 1}, {}]


def test_equal_cases_of_two_seeds_are_two_examples(tmp_path: Path) -> None:
    for seed in (0, 1):
        _summary(tmp_path / str(seed), _record("fidelity", "a", **_fidelity([float(seed)])), seed=seed)
    row = _only(summarize([tmp_path / "0", tmp_path / "1"]))
    assert (row.fidelity.examples, row.fidelity.kl.mean) == (2, 0.5)


def test_one_model_on_two_machines_makes_two_rows(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        run = {"model": {"name": "M", "dtype": "float32"}, "hardware": {"device": device}}
        _summary(tmp_path / device, _record("fidelity", "a", **_fidelity([1.0])), **run)
    rows = summarize([tmp_path / "cpu", tmp_path / "cuda"]).rows
    assert [row.model for row in rows] == ["M · cpu", "M · cuda"]


def test_records_that_lack_something_are_left_out_and_counted(tmp_path: Path) -> None:
    summary = _summary(
        tmp_path,
        _record("fidelity", "a", **_fidelity([])),
        _record("later kind", "b"),
        {"kind": "fidelity", "case": "c"},
        _record("fidelity", "d", **_fidelity([1.0])),
    )
    assert _only(summary).fidelity.examples == 1
    assert sum(summary.runs[0].left_out.values()) == 3
    assert "fidelity without kl, top1, nll_change, rank" not in summary.runs[0].left_out
    assert any(reason.startswith("fidelity without kl") for reason in summary.runs[0].left_out)


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    asked = [{"label": "full"}, {"label": "snapkv @ 0.25"}, {"label": "h2o @ 0.5"}, {"label": "window @ 0.5"}]
    records = [
        _full("perplexity", "a", nll=[1.0]),
        _record("perplexity", "a", nll=[1.0]),
        _record("perplexity", "b", nll=[1.0]),
        _record("perplexity", "a", "h2o", 0.5, nll=[1.0]),
    ]
    (run,) = _summary(tmp_path, *records, subjects=asked).runs
    assert (run.records, run.missing, run.unmeasured) == (4, 1, ["window @ 0.5"])


def test_the_terminals_table_has_the_main_columns(results: Path) -> None:
    table = terminal_table([results])
    assert isinstance(table, Table)
    assert table.headers[:4] == ["subject", "tokens", "KL, nats", "top-1"]
    rows = {(row[0], row[1]): dict(zip(table.headers, row, strict=True)) for row in table.rows}
    assert rows["snapkv @ 0.25", "4,096"]["KV of dense"] == "0.250"
    assert set(list(rows["h2o @ 0.1", "1,024"].values())[2:]) == {"–"}
