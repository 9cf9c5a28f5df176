"""From records to numbers: one row for each subject on a model at a length."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from ..records import Record, Results
from ..statistics import Interval, mean_interval, paired_difference, pareto
from ..tasks.base import Setting

BASELINE = "full"  # the label of the subject that the others are measured against
ALL = "all"  # in place of a setting: all of them together
POINTS = 128  # a curve has at most so many; longer continuations are averaged over neighbouring positions
ANSWERS = 8  # that a row shows
CHARACTERS = 400  # of a question, an answer or a reference

# What a record of each kind must have to be counted; lists may not be empty.
_NEEDED = {
    "fidelity": ("kl", "top1", "rank", "nll_change"),
    "perplexity": ("nll",),
    "task": ("task", "setting", "number", "score"),
    "speed": ("batch", "first_token", "first_token_full"),
    "refused": ("reason",),
}


class Measured(NamedTuple):
    """A record and the seed of its run: cases of different seeds are different cases."""

    seed: Any
    record: Record

    @property
    def case(self) -> tuple[Any, str]:
        return self.seed, self.record["case"]

    @property
    def example(self) -> tuple[Any, ...]:
        """What a task's record was measured on; the settings of one example share it."""
        return self.seed, self.record["task"], self.record["number"]


@dataclass(frozen=True)
class Fidelity:
    """Against the full cache's predictions of its own continuation; the unit of the intervals is the example."""

    examples: int
    kl: Interval
    top1: Interval
    nll_change: Interval
    rank_mean: float
    rank_median: float


@dataclass(frozen=True)
class Curve:
    """Means over examples by position of the continuation; ``start[i]`` is the first position (from 0) of point i."""

    start: list[int]
    kl: list[float]
    top1: list[float]
    examples: list[int]


@dataclass(frozen=True)
class Score:
    """Tasks in one setting. ``of_full`` and ``difference`` compare with the full cache on the cases that both have."""

    examples: int
    mean: Interval
    of_full: float | None
    difference: Interval | None


@dataclass(frozen=True)
class Ratio:
    """The median and the 95th percentile of times against the full cache's, pair by pair; ``seconds``: the median of
    the subject's own times."""

    median: float
    p95: float
    seconds: float
    pairs: int


@dataclass(frozen=True)
class Times:
    """Speed at one batch size, and the most memory that the process and the device had in use, in bytes."""

    first_token: Ratio | None
    per_token: Ratio | None
    process_peak_bytes: int | None
    device_peak_bytes: int | None


@dataclass(frozen=True)
class Memory:
    """KV bytes after the prompt, mean over records, and against a dense cache of the same tokens."""

    bytes: float
    ratio: float
    peak_ratio: float | None


@dataclass(frozen=True)
class Entries:
    """Entries kept by layer and KV head, mean over records."""

    mean: list[list[float]]
    records: int


@dataclass
class Row:
    """What is known of one subject on one model at one length. ``cells``: for each setting, each task's mean score and
    its number of examples. ``fronts``: the Pareto fronts it is on, each named ``"<quality> <cost>"``."""

    label: str
    system: str
    name: str
    budget: Any
    model: str
    length: int
    fidelity: Fidelity | None
    curve: Curve | None
    perplexity: float | None
    scores: dict[str, Score]
    cells: dict[str, dict[str, tuple[float, int]]]
    memory: Memory | None
    times: dict[str, Times]
    entries: Entries | None
    answers: list[Record]
    refused: list[tuple[str, int]]
    fronts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A folder as it counts in a summary. ``left_out``: why records of it do not count, and how many. ``missing``:
    measurements that the folder has for some subjects and not for others; ``unmeasured``: subjects without any."""

    folder: str
    model: str
    about: Record
    records: int
    left_out: dict[str, int]
    missing: int
    unmeasured: list[str]


@dataclass(frozen=True)
class Summary:
    """``tasks``: the group of each task."""

    rows: list[Row]
    runs: list[Run]
    tasks: dict[str, str]


class _Place(NamedTuple):
    """Where a run was made: numbers of different places do not belong in one row."""

    model: str
    dtype: str
    hardware: str


class _Folder(NamedTuple):
    """What was read of a folder of results."""

    path: Path
    run: Record
    place: _Place
    records: list[Record]


def summarize(folders: Sequence[Path]) -> Summary:
    """The rows of all folders together. Where two folders have the same measurement (model, hardware, seed, case and
    subject), the one that was started later counts. Raises KvarnError where a folder has no results or damaged ones."""
    read = [_read(folder) for folder in dict.fromkeys(folders)]
    read.sort(key=lambda folder: str(folder.run.get("started", "")))
    names = _distinct_names(folder.place for folder in read)
    kept, left_out = _kept(read)
    groups: dict[tuple[str, int, str], list[Measured]] = defaultdict(list)
    for place, measured in kept:
        record = measured.record
        groups[names[place], record["length"], record["subject"]["label"]].append(measured)
    rows = [_row(*key, found, groups.get((*key[:2], BASELINE), [])) for key, found in groups.items()]
    order = _order(read)
    rows.sort(key=lambda row: (row.model, row.length, order[row.label]))
    _mark_fronts(rows)
    runs = [_run(folder, names[folder.place], faults) for folder, faults in zip(read, left_out, strict=True)]
    tasks = {m.record["task"]: m.record.get("group", "") for _, m in kept if m.record["kind"] == "task"}
    return Summary(rows, runs, dict(sorted(tasks.items(), key=lambda task: (task[1], task[0]))))


def scopes(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows that can be compared: those of one model at one length."""
    together: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        together[row.model, row.length].append(row)
    return dict(together)


def _read(folder: Path) -> _Folder:
    results = Results(folder)
    run = results.run
    model, hardware = run.get("model") or {}, run.get("hardware") or {}
    where = ", ".join(str(hardware[key]) for key in ("device", "processor") if hardware.get(key))
    place = _Place(str(model.get("name", "model")), str(model.get("dtype", "")), where)
    return _Folder(folder, run, place, list(results))


def _kept(folders: Sequence[_Folder]) -> tuple[list[tuple[_Place, Measured]], list[Counter[str]]]:
    """The records that count, and for each folder why others do not."""
    kept: dict[tuple[Any, ...], tuple[int, Measured]] = {}
    left_out: list[Counter[str]] = [Counter() for _ in folders]
    for number, folder in enumerate(folders):
        for record in folder.records:
            if fault := _fault(record):
                left_out[number][fault] += 1
                continue
            measured = Measured(folder.run.get("seed"), record)
            key = (folder.place, *measured.case, record["subject"]["label"])
            if key in kept:
                left_out[kept[key][0]]["measured again later"] += 1
            kept[key] = number, measured
    return [(folders[number].place, measured) for number, measured in kept.values()], left_out


def _distinct_names(places: Iterable[_Place]) -> dict[_Place, str]:
    """Each place's model, with its dtype and its hardware only where those tell it from another."""
    distinct = dict.fromkeys(places)
    dtypes, hardware = defaultdict(set), defaultdict(set)
    for place in distinct:
        dtypes[place.model].add(place.dtype)
        hardware[place.model].add(place.hardware)
    return {
        place: " · ".join(
            [place.model]
            + [place.dtype or "dtype not known"] * (len(dtypes[place.model]) > 1)
            + [place.hardware or "hardware not known"] * (len(hardware[place.model]) > 1)
        )
        for place in distinct
    }


def _fault(record: Record) -> str | None:
    """Why a record cannot be counted, or None."""
    if "label" not in (record.get("subject") or {}) or not isinstance(record.get("length"), int):
        return "without subject or length"
    if "case" not in record or record.get("kind") not in _NEEDED:
        return "without case, or of a kind that this version does not know"
    lacking = [name for name in _NEEDED[record["kind"]] if record.get(name) in (None, [])]
    return f"{record['kind']} without {', '.join(lacking)}" if lacking else None


def _order(folders: Iterable[_Folder]) -> dict[str, int]:
    """Subjects as they were asked for, then those that nobody asked for; the baseline first."""
    order = {BASELINE: 0}
    for folder in folders:
        for label in [*_asked(folder), *map(_label, folder.records)]:
            order.setdefault(label, len(order))
    return order


def _asked(folder: _Folder) -> list[str]:
    return [subject["label"] for subject in folder.run.get("subjects") or [] if "label" in subject]


def _label(record: Record) -> str:
    return (record.get("subject") or {}).get("label", "")


def _run(folder: _Folder, model: str, faults: Counter[str]) -> Run:
    done = {(record.get("case"), _label(record)) for record in folder.records}
    asked, measured = set(_asked(folder)), {label for _, label in done}
    # The baseline is left out: a run need not compare it with itself.
    others = (asked & measured) - {BASELINE}
    missing = sum((case, label) not in done for case in {case for case, _ in done} for label in others)
    unmeasured = sorted(asked - measured)
    return Run(str(folder.path), model, folder.run, len(folder.records), dict(faults), missing, unmeasured)


def _row(model: str, length: int, label: str, records: list[Measured], full: list[Measured]) -> Row:
    subject = records[0].record["subject"]
    kinds: dict[str, list[Measured]] = defaultdict(list)
    for measured in records:
        kinds[measured.record["kind"]].append(measured)
    return Row(
        label=label,
        system=subject.get("system", ""),
        name=subject.get("name", label),
        budget=subject.get("budget"),
        model=model,
        length=length,
        fidelity=_fidelity(kinds["fidelity"]),
        curve=_curve([measured.record for measured in kinds["fidelity"]]),
        perplexity=_perplexity(kinds["perplexity"]),
        scores=_scores(kinds["task"], [measured for measured in full if measured.record["kind"] == "task"]),
        cells=_cells(kinds["task"]),
        memory=_memory(records),
        times=_times(kinds["speed"]),
        entries=_entries(records),
        answers=_answers(kinds["task"]),
        refused=Counter(measured.record["reason"] for measured in kinds["refused"]).most_common(),
    )


def _fidelity(records: list[Measured]) -> Fidelity | None:
    if not records:
        return None
    means = {name: [float(np.mean(m.record[name])) for m in records] for name in ("kl", "top1", "nll_change")}
    ranks = [rank for measured in records for rank in measured.record["rank"]]
    return Fidelity(
        len(records),
        mean_interval(means["kl"]),
        mean_interval(means["top1"]),
        mean_interval(means["nll_change"]),
        float(np.mean(ranks)),
        float(np.median(ranks)),
    )


def _curve(records: list[Record]) -> Curve | None:
    if not records:
        return None
    longest = max(len(record["kl"]) for record in records)
    width = -(-longest // POINTS)
    curve = Curve([], [], [], [])
    for start in range(0, longest, width):
        reached = [record for record in records if len(record["kl"]) > start]
        curve.start.append(start)
        curve.kl.append(float(np.mean([np.mean(record["kl"][start : start + width]) for record in reached])))
        curve.top1.append(float(np.mean([np.mean(record["top1"][start : start + width]) for record in reached])))
        curve.examples.append(len(reached))
    return curve


def _perplexity(records: list[Measured]) -> float | None:
    nll = [value for measured in records for value in measured.record["nll"]]
    return float(np.exp(np.mean(nll))) if nll else None


def _by_setting(records: list[Measured]) -> Iterator[tuple[str, list[Measured]]]:
    known = get_args(Setting)
    settings = sorted(
        {measured.record["setting"] for measured in records},
        key=lambda setting: (known.index(setting) if setting in known else len(known), setting),
    )
    if records:
        yield ALL, records
    for setting in settings:
        yield setting, [measured for measured in records if measured.record["setting"] == setting]


def _scores(records: list[Measured], full: list[Measured]) -> dict[str, Score]:
    theirs = {measured.case: measured.record["score"] for measured in full}
    return {setting: _score(found, theirs) for setting, found in _by_setting(records)}


def _score(records: list[Measured], theirs: dict[tuple[Any, str], float]) -> Score:
    ours = {measured.case: measured.record["score"] for measured in records}
    examples = {measured.case: measured.example for measured in records}
    reference = sum(theirs[case] for case in ours if case in theirs)
    shared = sum(score for case, score in ours.items() if case in theirs)
    return Score(
        len(set(examples.values())),
        mean_interval(list(ours.values()), [examples[case] for case in ours]),
        shared / reference if reference else None,
        paired_difference(ours, theirs, cluster=lambda case: examples[case]),
    )


def _cells(records: list[Measured]) -> dict[str, dict[str, tuple[float, int]]]:
    cells = {}
    for setting, found in _by_setting(records):
        scores = defaultdict(list)
        for measured in found:
            scores[measured.record["task"]].append(measured.record["score"])
        cells[setting] = {task: (statistics.fmean(values), len(values)) for task, values in scores.items()}
    return cells


def _memory(records: list[Measured]) -> Memory | None:
    held = [measured.record["held"] for measured in records if measured.record.get("held")]
    if not held:
        return None
    peaks = [each["peak_bytes"] / each["dense_bytes"] for each in held if each.get("peak_bytes") is not None]
    return Memory(
        statistics.fmean(each["bytes"] for each in held),
        statistics.fmean(each["bytes"] / each["dense_bytes"] for each in held),
        statistics.fmean(peaks) if peaks else None,
    )


def _times(records: list[Measured]) -> dict[str, Times]:
    batches: dict[int, list[Record]] = defaultdict(list)
    for measured in records:
        batches[measured.record["batch"]].append(measured.record)
    return {
        str(batch): Times(
            _ratio(found, "first_token"),
            _ratio(found, "per_token"),
            _most(found, "process_peak_bytes"),
            _most(found, "device_peak_bytes"),
        )
        for batch, found in sorted(batches.items())
    }


def _ratio(records: list[Record], name: str) -> Ratio | None:
    pairs = [
        pair
        for record in records
        for pair in zip(record.get(name) or [], record.get(f"{name}_full") or [], strict=False)
    ]
    if not pairs:
        return None
    ratios = [ours / theirs for ours, theirs in pairs]
    seconds = statistics.median(ours for ours, _ in pairs)
    return Ratio(statistics.median(ratios), float(np.percentile(ratios, 95)), seconds, len(pairs))


def _most(records: list[Record], name: str) -> int | None:
    return max((record[name] for record in records if record.get(name) is not None), default=None)


def _entries(records: list[Measured]) -> Entries | None:
    known = [(m.record.get("held") or {}).get("entries") for m in records]
    entries = [each for each in known if each]
    if not entries:
        return None
    shape = [len(layer) for layer in entries[0]]
    alike = [each for each in entries if [len(layer) for layer in each] == shape]
    layers = [np.mean([each[number] for each in alike], axis=0).tolist() for number in range(len(shape))]
    return Entries(layers, len(alike))


def _answers(records: list[Measured]) -> list[Record]:
    """The first turns of the first examples, the tasks in turn: the same for every subject, however they came out."""
    by_task = defaultdict(list)
    for measured in sorted(records, key=lambda m: (str(m.seed), m.record["number"], m.record["setting"])):
        by_task[measured.record["task"]].append(measured.record)
    ranked = [(rank, task, record) for task, found in by_task.items() for rank, record in enumerate(found[:ANSWERS])]
    ranked.sort(key=lambda each: each[:2])
    shown = [
        {
            "task": task,
            "setting": record["setting"],
            "question": _cut(turn.get("question")),
            "answer": _cut(turn.get("answer")),
            "references": [_cut(reference) for reference in (turn.get("references") or [])[:ANSWERS]],
            "score": turn.get("score"),
        }
        for _, task, record in ranked[:ANSWERS]
        for turn in record.get("turns") or []
    ]
    return shown[:ANSWERS]


def _cut(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= CHARACTERS else text[:CHARACTERS].rstrip() + " …"


def _mark_fronts(rows: list[Row]) -> None:
    for together in scopes(rows).values():
        settings = dict.fromkeys(setting for row in together for setting in row.scores)
        batches = dict.fromkeys(batch for row in together for batch in row.times)
        for quality in ["kl", *(f"score:{setting}" for setting in settings)]:
            for cost in ["bytes", "peak", *(f"{time}:{batch}" for batch in batches for time in ("first", "token"))]:
                _mark_front(together, quality, cost)


def _mark_front(rows: list[Row], quality: str, cost: str) -> None:
    points = []
    for row in rows:
        loss, price = _loss(row, quality), _price(row, cost)
        if loss is not None and price is not None:
            points.append((row, (price, loss)))
    for number in pareto([point for _, point in points]):
        points[number][0].fronts.append(f"{quality} {cost}")


def _loss(row: Row, quality: str) -> float | None:
    if quality == "kl":
        return row.fidelity.kl.mean if row.fidelity else None
    score = row.scores.get(quality.removeprefix("score:"))
    return -score.mean.mean if score else None


def _price(row: Row, cost: str) -> float | None:
    if cost in ("bytes", "peak"):
        if row.memory is None:
            return None
        return row.memory.ratio if cost == "bytes" else row.memory.peak_ratio
    kind, _, batch = cost.partition(":")
    if batch not in row.times:
        return None
    ratio = row.times[batch].first_token if kind == "first" else row.times[batch].per_token
    return ratio.median if ratio else None
