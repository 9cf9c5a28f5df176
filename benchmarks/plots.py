"""Figures of the results in `benchmarks/results/gpu/`, as SVG files.

    python benchmarks/plots.py [--results benchmarks/results/gpu] [--out docs/figures]

Needs matplotlib: `pip install kvarn[plots]`. Files that are not there are passed over. The same results give the same
figures.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHERS, FLOOR = "#2f81c7", "#d9822b", "#8a8f98"
SERIES = ("#2f81c7", "#3fa36b", "#b05fc0")
INK = "#808690"  # readable on white and on black
STYLE = {
    "svg.hashsalt": "kvarn",
    "svg.fonttype": "none",  # text stays text: small files, fonts of the page
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
Json = Mapping[str, Any]


def main() -> None:
    options = _options()
    for path in drawn(options.results, options.out):
        print(path)


def drawn(results: Path, out: Path) -> list[Path]:
    """Draws all figures that ``results`` has the numbers of: their files."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with plt.rc_context(STYLE):
        for source, figures in FIGURES.items():
            if not (results / source).is_file():
                continue
            report = json.loads((results / source).read_text(encoding="utf-8"))
            for name, draw in figures.items():
                files.append(out / f"{name}.svg")
                figure = draw(report)
                figure.savefig(files[-1], metadata={"Date": None}, bbox_inches="tight")
                plt.close(figure)
    return files


# -- decoding.json ----------------------------------------------------------------------------------------------


def steps(report: Json) -> Figure:
    """Time of a step beside its floor, a row a case."""
    rows = _decoding(report)
    figure, axes = _rows(rows)
    places, floors, times = range(len(rows)), [row["floor_ms"] for row in rows], [row["step_ms"] for row in rows]
    axes.hlines(places, floors, times, colors=[_colour(row) for row in rows], linewidth=3)
    axes.scatter(floors, places, 70, color=FLOOR, marker="|", linewidths=2, zorder=3, label="floor")
    axes.scatter(times, places, 36, color=[_colour(row) for row in rows], zorder=3)
    for place, row in enumerate(rows):
        axes.annotate(f"{row['step_ms']:.1f} ms, {row['times_floor']:.2f}× floor", **_beside(row["step_ms"], place))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("milliseconds a step, logarithmic")
    axes.set_title(f"Decoding step against the time to copy its bytes: 8B shape, bf16, {_device(report)}")
    _legend(axes, rows)
    return figure


def throughput(report: Json) -> Figure:
    """Tokens a second of all sequences together, a row a case."""
    rows = _decoding(report)
    figure, axes = _rows(rows)
    axes.barh(range(len(rows)), [row["tokens_per_second"] for row in rows], 0.7, color=[_colour(row) for row in rows])
    for place, row in enumerate(rows):
        axes.annotate(f"{row['tokens_per_second']:,}", **_beside(row["tokens_per_second"], place))
    axes.set_xlabel("tokens a second, all sequences together")
    axes.set_title(f"Decoding throughput: 8B shape, bf16, {_device(report)}")
    _legend(axes, rows)
    return figure


def _decoding(report: Json) -> list[Json]:
    """The decoding steps that were measured, the first on top."""
    return [row for row in report["rows"].values() if "step_ms" in row][::-1]


def _named(row: Json) -> str:
    """``snapkv, 4k of 32k × 128``: the recipe, or transformers' cache, entries of tokens, and sequences."""
    name = row["recipe"] if "recipe" in row else f"transformers {row['cache']}"
    if row.get("page_size", 16) != 16:
        name += f", pages of {row['page_size']}"
    if row.get("entries", row["tokens"]) != row["tokens"]:
        return f"{name}, {_thousands(row['entries'])} of {_thousands(row['tokens'])} × {row['sequences']}"
    return f"{name}, {_thousands(row['tokens'])} × {row['sequences']}"


def _thousands(tokens: int) -> str:
    return f"{tokens / 1024:.0f}k" if tokens >= 1024 else str(tokens)


def _colour(row: Json) -> str:
    return OURS if "recipe" in row else OTHERS


def _legend(axes: Axes, rows: Sequence[Json]) -> None:
    for colour, label in ((OURS, "kvarn"), (OTHERS, "transformers")):
        if any(_colour(row) == colour for row in rows):
            axes.plot([], [], color=colour, linewidth=4, label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


def _rows(rows: Sequence[Json]) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(rows) + 1))
    axes.set_yticks(range(len(rows)), [_named(row) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_ylabel("tokens of a sequence × sequences")
    axes.margins(x=0.2)
    return figure, axes


def _beside(width: float, place: int) -> dict[str, Any]:
    return {"xy": (width, place), "xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}


# -- attention.json ---------------------------------------------------------------------------------------------


def bandwidth(report: Json) -> Figure:
    """What share of the copy bandwidth the kernels read at, by format."""
    figure, axes = _groups(report, "of_copy", "{:.2f}")
    axes.axhline(1, color=FLOOR, linewidth=1)
    axes.set_ylabel("share of copy bandwidth")
    axes.set_title(f"Decode attention: bytes read, of what a copy moves in the time, {_device(report)}")
    return figure


def speedup(report: Json) -> Figure:
    """How much faster than bf16 the kernels read as many entries, by format."""
    figure, axes = _groups(report, "against_first", "{:.1f}×")
    axes.axhline(1, color=FLOOR, linewidth=1)
    axes.set_ylabel(f"times as fast as {report['rows'][0]['case']}")
    axes.set_title(f"Decode attention: speed against bf16 for the same entries, {_device(report)}")
    return figure


def _groups(report: Json, number: str, form: str) -> tuple[Figure, Axes]:
    """A group of bars for each format, a bar for each kind of lengths."""
    rows = {(row["case"], row["lengths"]): row[number] for row in report["rows"]}
    cases, kinds = (list(dict.fromkeys(pair[side] for pair in rows)) for side in (0, 1))
    figure, axes = plt.subplots(figsize=(8, 3.2))
    width = 0.8 / len(kinds)
    for order, kind in enumerate(kinds):
        places = [place for place, case in enumerate(cases) if (case, kind) in rows]
        heights = [rows[cases[place], kind] for place in places]
        centres = [place + (order - (len(kinds) - 1) / 2) * width for place in places]
        label = f"{int(kind) // 1024}k entries a head" if kind.isdigit() else f"lengths {kind}"
        drawn_bars = axes.bar(centres, heights, width * 0.92, color=SERIES[order % len(SERIES)], label=label)
        axes.bar_label(drawn_bars, [form.format(height) for height in heights], fontsize=8, padding=2)
    axes.set_xticks(range(len(cases)), cases)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(kinds))
    return figure, axes


def _device(report: Json) -> str:
    return report["machine"]["device"] if "machine" in report else report["device"]


FIGURES: dict[str, dict[str, Callable[[Json], Figure]]] = {
    "decoding.json": {"decoding-steps": steps, "decoding-throughput": throughput},
    "attention.json": {"attention-bandwidth": bandwidth, "attention-speedup": speedup},
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
