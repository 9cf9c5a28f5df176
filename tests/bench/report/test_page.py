import json
from pathlib import Path

import pytest

from kvarn.bench.report.page import embedded, write_report
from kvarn.errors import KvarnError


def test_embedded_data_cannot_end_its_script_and_reads_back() -> None:
    data = {"</script>": ["<!--", "\u2028", 'a "quoted" \\ text', True, None, 3]}
    text = embedded(data)
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == data


def test_embedded_numbers_are_short_and_always_json() -> None:
    assert embedded([0.123456789, 1234567.0, float("nan"), float("inf")]) == "[0.123457,1234570.0,null,null]"


def test_the_page_is_one_file_that_asks_for_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    own = text[: text.index("plotly.js v")]
    assert "default-src 'none'" in own
    assert 'src="' not in own
    assert own.count("http://") == own.count("http://www.w3.org/2000/svg")
    assert "https://" not in own
    assert len(own) < 1_000_000  # without Plotly: means, not what they are taken over


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KvarnError, match="no folder of results"):
        write_report([tmp_path], tmp_path / "report.html")
