"""The page in a browser. Every test also asserts that the page logged nothing and asked for nothing (``visit``)."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect
from synthetic import SUBJECTS, run_record

from kvarn.bench.records import Results
from kvarn.bench.report import write_report

Visit = Callable[..., Page]
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;"


def _column(page: Page, title: str) -> list[str]:
    """The first line of each cell of a column of the table."""
    heads = [head.strip() for head in page.locator("#results .columns th").all_inner_texts()]
    cells = page.locator(f"#results tr.row td:nth-child({heads.index(title) + 1})").all_inner_texts()
    return [cell.strip().splitlines()[0] for cell in cells]


def _overflows(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


def test_it_shows_all_subjects_plots_refusals_and_answers(report: Path, visit: Visit) -> None:
    page = visit(report)
    assert page.locator("#results tr.row").count() == 2 * len(SUBJECTS)
    for plot in ("pareto-memory", "pareto-time", "curve-kl", "curve-top1", "entries-plot"):
        assert page.locator(f"#{plot} .main-svg").count() > 0, plot
    assert page.locator(".heat-block h3").all_inner_texts() == ["aware", "agnostic"]
    assert page.locator(".heat-block").first.locator("tbody tr").count() == len(SUBJECTS)

    refused = page.locator("#results tr.row", has_text="refused")
    assert refused.count() == 1
    assert "h2o @ 0.1" in refused.inner_text()
    assert "ask for 0.125 or more" in refused.inner_text()

    page.get_by_role("button", name="kivi(bits=2)", expanded=False).first.click()
    answers = page.locator(".detail .answer")
    assert answers.count() == 8
    assert "The number is" in answers.first.inner_text()
    page.get_by_role("button", name="KL, nats").click()  # sorting keeps it open
    assert answers.count() == 8
    page.get_by_role("button", name="kivi(bits=2)", expanded=True).click()
    assert answers.count() == 0


def test_clicks_and_keys_sort_up_and_down_with_what_is_unknown_last(report: Path, visit: Visit) -> None:
    page = visit(report)
    head = page.get_by_role("columnheader", name="KL, nats")
    assert head.get_attribute("aria-sort") is None
    for order in ("ascending", "descending"):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        *known, last = _column(page, "KL, nats")
        assert last == "–"
        assert list(map(float, known)) == sorted(map(float, known), reverse=order == "descending")
    page.get_by_role("button", name="Top-1").focus()
    page.keyboard.press("Enter")
    *known, last = _column(page, "Top-1")
    shares = [float(cell.removesuffix(" %")) for cell in known]
    assert shares == sorted(shares)
    page.keyboard.press("Space")
    assert page.locator("th[aria-sort]").count() == 1
    assert page.locator("th[aria-sort=descending]").inner_text().strip() == "Top-1"


def test_text_and_choices_filter_the_table_and_the_plots(report: Path, visit: Visit) -> None:
    page = visit(report)
    page.get_by_label("Length").select_option("1024")
    assert set(_column(page, "Tokens")) == {"1,024"}
    assert "1,024 tokens" in page.locator("#pareto-title + .lead").inner_text()
    page.get_by_label("Find").fill("SNAPKV @")
    assert _column(page, "Subject") == ["snapkv @ 0.5", "snapkv @ 0.25", "snapkv @ 0.1"]
    expect(page.locator("#pareto-legend .chip")).to_have_text(["snapkv"])  # the plots come a moment later
    page.get_by_label("Find").clear()
    page.get_by_label("System").select_option("transformers")
    assert _column(page, "Subject") == ["transformers: quantized(bits=4)"]
    page.get_by_label("System").select_option("")
    before = _column(page, "Score")
    page.get_by_label("Setting of tasks").select_option("agnostic")
    assert _column(page, "Score") != before
    assert page.locator(".heat-block h3").all_inner_texts() == ["agnostic"]


def test_plots_name_the_point_under_the_pointer_and_switch(report: Path, visit: Visit) -> None:
    page = visit(report)
    for plot in ("pareto-memory", "pareto-time"):
        page.locator(f"#{plot} .points path").last.hover(force=True)
        label = page.locator(f"#{plot} .hoverlayer .hovertext")
        label.wait_for()
        assert "quantized(bits=4)" in label.text_content()
        assert "KL" in label.text_content()
    assert "KL" in page.locator("#pareto-memory .ytitle").text_content()
    page.get_by_label("Task score").check()
    assert "score" in page.locator("#pareto-memory .ytitle").text_content()
    page.get_by_label("first token").check()
    assert "first token" in page.locator("#pareto-time .xtitle").text_content()


def test_the_theme_is_the_systems_until_the_reader_chooses(report: Path, visit: Visit) -> None:
    def colors(page: Page) -> list[str]:
        parts = {"body": "backgroundColor", "#pareto-memory .xtick text": "fill", "#pareto-memory .points path": "fill"}
        return [
            page.locator(selector).first.evaluate(f"(part) => getComputedStyle(part).{css}")
            for selector, css in parts.items()
        ]

    page = visit(report, color_scheme="dark")
    dark = colors(page)
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.get_by_role("button", name="Light theme").click()
    light = colors(page)
    assert all(one != other for one, other in zip(light, dark, strict=True))
    page.reload()
    assert colors(page) == light
    page.get_by_role("button", name="Dark theme").click()
    assert colors(page) == dark


def test_on_a_phone_only_boxes_scroll_sideways_and_plots_follow_the_window(report: Path, visit: Visit) -> None:
    def plots() -> list[dict[str, float]]:
        return [page.locator(f"#{name} .main-svg").first.bounding_box() for name in ("pareto-memory", "pareto-time")]

    page = visit(report, width=390, height=844)
    assert not _overflows(page)
    page.locator("#results .open").nth(1).click()
    assert not _overflows(page)
    assert page.locator("#table-box").evaluate("(box) => box.scrollWidth > box.clientWidth")
    first, second = plots()
    assert first["x"] == second["x"]
    assert first["width"] < 390
    page.set_viewport_size({"width": 1440, "height": 900})
    page.wait_for_timeout(500)  # Plotly waits for the window to rest
    first, second = plots()
    assert first["x"] + first["width"] <= second["x"]
    assert first["width"] > 500


def test_texts_cannot_become_markup(tmp_path: Path, visit: Visit) -> None:
    run = run_record(model=f"model {HOSTILE}", command=HOSTILE)
    results = Results.create(tmp_path / "run", run)
    subject = {"system": "kvarn", "name": HOSTILE, "budget": None, "label": HOSTILE}
    held = {"bytes": 1, "dense_bytes": 2, "peak_bytes": 1, "entries": [[1, 2], [3, 4]]}
    common = {"subject": subject, "length": 64, "held": held}
    turn = {"question": HOSTILE, "answer": HOSTILE + "\u2028{{data}}", "references": [HOSTILE], "score": 1.0}
    task = {"task": HOSTILE, "group": HOSTILE, "setting": HOSTILE, "number": 0, "score": 1.0, "turns": [turn]}
    numbers = {"kl": [0.1], "top1": [1], "rank": [1], "nll_change": [0.0]}
    results.add(common | {"kind": "task", "case": "a"} | task)
    results.add(common | {"kind": "fidelity", "case": "b"} | numbers)
    results.add(common | {"kind": "refused", "case": "c", "reason": HOSTILE})
    write_report([results.folder], tmp_path / "report.html")
    page = visit(tmp_path / "report.html")
    page.locator("#results .open").click()
    assert HOSTILE in page.locator(".answer").inner_text()
    assert "{{data}}" in page.locator(".answer").inner_text()
    assert page.title() == f"KV caches compared: model {HOSTILE}"
    assert page.locator("img").count() == 0
    page.locator("#pareto-memory .points path").last.hover(force=True)
    assert HOSTILE in page.locator("#pareto-memory .hoverlayer .hovertext").text_content()


def test_a_folder_without_measurements_says_so(tmp_path: Path, visit: Visit) -> None:
    Results.create(tmp_path / "asked", {"command": "kvarn bench", "subjects": [{"label": "snapkv @ 0.5"}]})
    Results.create(tmp_path / "nothing", {})
    write_report([tmp_path / "asked", tmp_path / "nothing"], tmp_path / "report.html")
    page = visit(tmp_path / "report.html")
    assert "Nothing has been measured" in page.locator("#findings").inner_text()
    assert "snapkv @ 0.5" in page.locator(".run", has_text="kvarn bench").inner_text()
    assert "not recorded" in page.locator(".run").nth(1).inner_text()


def test_an_interrupted_run_of_another_model_stands_beside(results: Path, tmp_path: Path, visit: Visit) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text(json.dumps({"model": {"name": "Another-1B"}}))
    with (results / "records.jsonl").open("rb") as lines:
        (other / "records.jsonl").write_bytes(b"".join(itertools.islice(lines, 60)) + b'{"kind": "fid')
    write_report([results, other], tmp_path / "report.html")
    page = visit(tmp_path / "report.html")
    assert set(_column(page, "Model")) == {"SmolLM2-135M-Instruct", "Another-1B"}
    page.get_by_label("Model").select_option("Another-1B")
    assert _column(page, "Subject") == ["full", "snapkv @ 0.5"]
    assert _column(page, "Per token")[1] == "–"
    assert "Another-1B" in page.locator("#pareto-title + .lead").inner_text()
    assert "60 records" in page.locator(".run", has_text="Another-1B").inner_text()
