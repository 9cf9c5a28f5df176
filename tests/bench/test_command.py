import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvarn import cli
from kvarn.bench.records import Record, Results

SMALL = [
    "--lengths=500",
    "--fidelity=2",
    "--positions=6",
    "--tasks=niah_single_1",
    "--settings=aware",
    "--examples=1",
    "--rounds=1",
    "--steps=2",
]


def _argv(model: Path, prose: Path, out: Path, *more: str) -> list[str]:
    return ["bench", f"--model={model}", f"--text={prose}", f"--out={out}", "--recipes=window; kivi", *SMALL, *more]


@pytest.fixture(scope="session")
def finished(tiny_folder: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    out = tmp_path_factory.mktemp("finished") / "results"
    assert cli.main(_argv(tiny_folder, prose, out)) == 0
    return out


def _without_times(records: list[Record]) -> list[Record]:
    return [record for record in records if record["kind"] != "speed"]


def test_a_run_leaves_records_and_a_report(finished: Path) -> None:
    records = list(Results(finished))
    labels = ["full", "window @ 0.25", "kivi"]
    assert [record["subject"]["label"] for record in records] == labels * 4
    assert {record["kind"] for record in records} == {"fidelity", "task", "speed"}
    assert "<html" in (finished / "report.html").read_text()[:200]
    run = Results(finished).run
    assert [subject["label"] for subject in run["subjects"]] == labels
    assert run["command"].startswith("kvarn")
    assert run["versions"]["kvarn"]
    assert run["hardware"]["threads"] >= 1
    assert (run["model"]["layers"], run["model"]["kv_heads"], run["seed"]) == (2, 2, 0)


def test_the_same_run_measures_the_same(finished: Path, tiny_folder: Path, prose: Path, tmp_path: Path) -> None:
    assert cli.main(_argv(tiny_folder, prose, tmp_path / "again", "--rounds=0")) == 0
    again = list(Results(tmp_path / "again"))
    assert again == _without_times(list(Results(finished)))


def test_shards_are_the_whole(finished: Path, tiny_folder: Path, prose: Path, tmp_path: Path) -> None:
    for shard in (1, 2, 3):
        argv = _argv(tiny_folder, prose, tmp_path / str(shard), "--rounds=0", f"--shard={shard}/3")
        assert cli.main(argv) == 0
    parts = [record for shard in "123" for record in Results(tmp_path / shard)]
    whole = _without_times(list(Results(finished)))
    assert sorted(map(json.dumps, parts)) == sorted(map(json.dumps, whole))
    folders = [str(tmp_path / shard) for shard in "123"]
    assert cli.main(["report", *folders, f"--out={tmp_path / 'all.html'}"]) == 0
    assert "<html" in (tmp_path / "all.html").read_text()[:200]


def test_a_killed_run_is_resumed(finished: Path, tiny_folder: Path, prose: Path, tmp_path: Path) -> None:
    """kill -9 at whatever moment: what was written stays, and the resumed run ends as one that was never stopped."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "kvarn.cli", *_argv(tiny_folder, prose, out, "--rounds=0")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    records = out / "records.jsonl"
    while process.poll() is None and not (records.exists() and records.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = records.read_bytes()
    assert cli.main(["bench", f"--resume={out}"]) == 0
    assert records.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert list(Results(out)) == _without_times(list(Results(finished)))


def test_a_stopped_run_leaves_a_report(
    tiny_folder: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = Results.add

    def stop_after_two(self: Results, record: Record) -> None:
        add(self, record)
        if len(list(self)) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Results, "add", stop_after_two)
    out = tmp_path / "stopped"
    assert cli.main(_argv(tiny_folder, prose, out)) == 130
    assert f"kvarn bench --resume {out} goes on" in capsys.readouterr().err
    assert len(list(Results(out))) == 2
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suite=quik"], "no suite is called 'quik'"),
        (["--tasks=niah"], "no task or group of tasks is called 'niah'; there are"),
        (["--settings=awaer"], "no setting is called awaer"),
        (["--recipes=snapvk"], "unknown method 'snapvk'"),
        (["--budgets=lots"], "'lots' is not a size"),
        (["--qa=/nowhere.json"], "/nowhere.json: No such file"),
        (["--tasks=qa_1"], "qa_1 needs --qa FILE"),
        (["--peers=dynamc"], "dynamc"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tiny_folder: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    argv = _argv(tiny_folder, prose, tmp_path / "out")
    assert cli.main([*argv, *more]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("kvarn: ")
    assert not (tmp_path / "out" / "run.json").exists()


def test_nothing_to_resume_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", f"--resume={tmp_path}"]) == 2
    assert "is no folder of results" in capsys.readouterr().err


def test_results_are_not_overwritten(
    finished: Path, tiny_folder: Path, prose: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "records.jsonl").read_bytes()
    assert cli.main(_argv(tiny_folder, prose, finished)) == 2
    assert "has results already" in capsys.readouterr().err
    assert (finished / "records.jsonl").read_bytes() == before
