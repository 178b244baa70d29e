"""comparison.py: the report of whole protocols, complete and with gaps."""

from __future__ import annotations

import csv
import json
import re

import pytest
import synthetic

from nnunet_dante.compare.comparison import write_comparison
from nnunet_dante.compare.document import Text
from nnunet_dante.errors import ResultError


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A protocol with a simulated experiment that lacks runs and had an error, and a small real one."""
    results = [r for r in synthetic.results(shots=(1, 8)) if not (r.method == "DoRA" and r.shots == 8)
               and r.method in ("zero-shot", "scratch", "full", "LoRA", "GU", "DoRA")]
    results.append(synthetic.result("DoRA", 8, 0, error="RuntimeError: out of memory"))
    results += [synthetic.result(m, 2, 0, experiment="hospital") for m in ("full", "LoRA")]
    out = tmp_path_factory.mktemp("report")
    write_comparison(results, out, overlays=lambda study, out: [Text(f"cases of {study.name}")])
    return out


def test_every_title_of_a_simulated_experiment_says_so_and_none_of_a_real_one(report):
    text = (report / "report.md").read_text()
    titles = re.findall(r"^\*\*(.+)\*\*$|^!\[(.+)\]", text, re.M)
    for title in (a or b for a, b in titles):
        assert ("simulated images" in title) == ("virtual scanner" in title), title
    assert len(titles) > 20 and "## virtual scanner (simulated images)" in text


def test_a_run_with_an_error_is_listed_and_leaves_a_gap(report):
    text = (report / "report.md").read_text()
    assert "- virtual scanner, DoRA, 8 training cases, seed 0: RuntimeError: out of memory" in text
    row = next(line for line in text.splitlines() if line.startswith("| DoRA |"))
    assert row.endswith("| - |")


def test_all_tables_are_there_as_csv_and_json_with_the_same_numbers(report):
    tables = json.loads((report / "tables.json").read_text())
    assert {f"{name}.csv" for name in tables} == {file.name for file in (report / "tables").iterdir()}
    assert {"virtual_scanner_dice", "virtual_scanner_speed_8", "virtual_scanner_against_scratch", "hospital_cost",
            "virtual_scanner_forgetting", "virtual_scanner_labels_1"} <= set(tables)
    rows = list(csv.DictReader((report / "tables" / "virtual_scanner_dice.csv").open()))
    assert [float(row["mean"]) for row in rows] == [record["mean"] for record in tables["virtual_scanner_dice"]]


def test_the_page_holds_every_picture_of_the_markdown(report):
    text, page = (report / "report.md").read_text(), (report / "report.html").read_text()
    pictures = re.findall(r"\]\((plots/\S+\.png)\)", text)
    assert len(pictures) == page.count("data:image/png;base64,") >= 8
    assert all((report / picture).is_file() for picture in pictures)
    assert "cases of hospital" in page and not list(report.rglob("*.tmp"))


def test_nothing_but_failures_and_nothing_but_zero_shot_still_make_a_report(tmp_path):
    write_comparison([synthetic.result("LoRA", 2, 0, error="stopped")], tmp_path / "a")
    assert "No run finished." in (tmp_path / "a" / "report.md").read_text()
    write_comparison([synthetic.result("zero-shot", 0, 0)], tmp_path / "b")
    assert "| zero-shot | 0.5" in (tmp_path / "b" / "report.md").read_text()


def test_no_runs_are_refused(tmp_path):
    with pytest.raises(ResultError, match="no run to compare"):
        write_comparison([], tmp_path)
