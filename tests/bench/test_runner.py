import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_subject import FakeSubject

from kvarn.bench.records import Results
from kvarn.bench.runner import run
from kvarn.bench.subjects import Subject
from kvarn.errors import KvarnError, Unsupported


@dataclass
class FakeCase:
    """``stop``: the subject's name at which the user stops the run."""

    key: str
    log: list[str]
    stop: str | None = None
    kind: str = "fidelity"
    length: int = 10
    weight: int = 5

    def prepared(self):
        self.log.append(f"prepare {self.key}")

        def measure(subject: Subject) -> dict:
            if subject.name == self.stop:
                raise KeyboardInterrupt
            subject.open()
            self.log.append(f"{self.key} {subject.name}")
            return {"kl": [0.5]}

        return measure


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results.create(tmp_path / "results", {"command": "kvarn bench"})


def test_every_case_is_measured_with_every_subject_and_written(results: Results) -> None:
    log: list[str] = []
    run(results, [FakeCase("a", log), FakeCase("b", log)], [FakeSubject(name="x"), FakeSubject(name="y", budget=0.5)])
    assert log == ["prepare a", "a x", "a y", "prepare b", "b x", "b y"]
    assert list(results)[1] == {
        "kind": "fidelity",
        "subject": {"system": "kvarn", "name": "y", "budget": 0.5, "label": "y @ 0.5"},
        "case": "a",
        "length": 10,
        "kl": [0.5],
    }


def test_what_a_subject_refuses_is_a_record(results: Results) -> None:
    log: list[str] = []
    run(results, [FakeCase("a", log)], [FakeSubject(refuses=True), FakeSubject(name="x")])
    refused, measured = results
    assert (refused["kind"], refused["reason"]) == ("refused", "the budget is too small")
    assert measured["kind"] == "fidelity"


def test_a_case_that_cannot_be_is_refused_for_all(results: Results) -> None:
    class TooShort(FakeCase):
        def prepared(self):
            raise Unsupported("too few tokens")

    log: list[str] = []
    run(results, [TooShort("a", log), FakeCase("b", log)], [FakeSubject(name="x"), FakeSubject(name="y")])
    assert [record.get("reason") for record in results] == ["too few tokens"] * 2 + [None] * 2


def test_a_run_that_was_stopped_goes_on_where_it_was(results: Results) -> None:
    log: list[str] = []
    subjects = [FakeSubject(name="x"), FakeSubject(name="y")]
    with pytest.raises(KeyboardInterrupt):
        run(results, [FakeCase("a", log), FakeCase("b", log, stop="y")], subjects)
    log.clear()
    run(results, [FakeCase("a", log), FakeCase("b", log)], subjects)
    assert log == ["prepare b", "b y"]
    assert len({(record["case"], record["subject"]["label"]) for record in results}) == len(list(results)) == 4


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_was_cut_off_is_measured_again(results: Results, cut: int) -> None:
    log: list[str] = []
    cases, subjects = [FakeCase("a", log)], [FakeSubject(name="x"), FakeSubject(name="y")]
    run(results, cases, subjects)
    path = results.folder / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert len(list(results)) == 1
    log.clear()
    run(results, cases, subjects)
    assert log == ["prepare a", "a y"]
    assert path.read_bytes() == whole


def test_a_damaged_line_within_the_file_is_an_error(results: Results) -> None:
    run(results, [FakeCase("a", [])], [FakeSubject()])
    path = results.folder / "records.jsonl"
    path.write_bytes(b"{broken\n" + path.read_bytes())
    with pytest.raises(KvarnError, match=r"records\.jsonl, line 1: damaged"):
        list(results)


def test_results_are_never_overwritten(results: Results) -> None:
    with pytest.raises(KvarnError, match="--resume"):
        Results.create(results.folder, {})
    assert results.run == {"command": "kvarn bench"}


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KvarnError, match=r"run\.json"):
        _ = Results(tmp_path).run


def test_progress_in_a_file_is_a_line_a_case(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    run(results, [FakeCase("a", []), FakeCase("b", [])], [FakeSubject()])
    assert stream.getvalue().splitlines() == ["kvarn:   0% 1/2 a", "kvarn:  50% 2/2 b"]
    assert all(json.loads(line) for line in (results.folder / "records.jsonl").read_text().splitlines())
