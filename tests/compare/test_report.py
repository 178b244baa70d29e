"""report.py: the report of folds and of whole protocols, complete and with gaps, as Markdown and as one web page."""

from __future__ import annotations

import base64
import csv
import html.parser
import json
import re

import folds
import pytest
import synthetic
from click.testing import CliRunner

from nnunet_dante.cli import main
from nnunet_dante.compare.report import (
    Code,
    Folded,
    Heading,
    Listing,
    Picture,
    Text,
    all_tables,
    compare,
    write_pages,
    write_report,
)
from nnunet_dante.compare.results import read_results, write_results
from nnunet_dante.compare.sources import Source
from nnunet_dante.compare.tables import Table
from nnunet_dante.errors import ResultError


def write_comparison(results, out):
    return write_report([Source(result=result) for result in results], out)


@pytest.fixture
def root(nnunet_paths, tmp_path):
    folds.write_dataset(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A protocol with a simulated experiment that lacks runs and had an error, and a small real one."""
    results = [r for r in synthetic.results(shots=(1, 8)) if not (r.method == "DoRA" and r.shots == 8)
               and r.method in ("zero-shot", "scratch", "full", "LoRA", "GU", "DoRA")]
    results.append(synthetic.result("DoRA", 8, 0, error="RuntimeError: out of memory"))
    results += [synthetic.result(m, 2, 0, experiment="hospital") for m in ("full", "LoRA")]
    out = tmp_path_factory.mktemp("report")
    write_comparison(results, out)
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
    assert [float(row["mean"]) for row in rows] == pytest.approx(
        [record["mean"] for record in tables["virtual_scanner_dice"]], rel=1e-5)


def test_the_page_holds_every_picture_of_the_markdown(report):
    text, page = (report / "report.md").read_text(), (report / "report.html").read_text()
    pictures = re.findall(r"\]\((plots/\S+\.png)\)", text)
    assert len(pictures) == page.count("<svg ") + page.count("data:image/png;base64,") >= 8
    assert page.count("<svg ") >= 8 and "http" not in page.split("<script>")[0]
    assert all((report / picture).is_file() for picture in pictures)
    assert not list(report.rglob("*.tmp"))


def test_nothing_but_failures_and_nothing_but_zero_shot_still_make_a_report(tmp_path):
    write_comparison([synthetic.result("LoRA", 2, 0, error="stopped")], tmp_path / "a")
    assert "No run finished." in (tmp_path / "a" / "report.md").read_text()
    write_comparison([synthetic.result("zero-shot", 0, 0)], tmp_path / "b")
    assert "| zero-shot | 0.5" in (tmp_path / "b" / "report.md").read_text()


def test_no_runs_are_refused(tmp_path):
    with pytest.raises(ResultError, match="no run to compare"):
        write_comparison([], tmp_path)


def test_folds_become_a_report_with_the_worst_and_the_median_case(root):
    paths = [folds.write_fold(root, f"nnUNetTrainer{name}", fold=fold, shifts=shifts)
             for name, shifts in (("LoRA", (0, 1)), ("FromScratch", (2, 4))) for fold in (0, 1)]
    report = compare(paths, root / "report")
    text = report.read_text()
    assert "4 runs; 2 methods; 4 test cases" in text
    assert "Worst case, case_1; all (2) training cases - Dataset901_Tiny" in text
    assert (root / "report" / "plots" / "dataset901_tiny_worst_case.png").stat().st_size > 5000
    assert (root / "report" / "plots" / "dataset901_tiny_timeline.png").is_file()


def test_the_results_of_a_report_can_be_compared_again_without_the_images(root):
    compare([folds.write_fold(root, "nnUNetTrainerLoRA")], root / "a")
    again = compare([root / "a" / "results.json"], root / "b").read_text()
    first = (root / "a" / "report.md").read_text()
    assert first.split("### Cases")[0] == again.split("### Cases")[0]
    assert "No pictures of cases" in again


def test_a_run_that_failed_has_no_pictures_but_is_listed(root):
    write_results([synthetic.result("LoRA", 2, 0), synthetic.result("head", 2, 0, error="stopped", cases={})],
                  root / "runs.json")
    text = compare([root / "runs.json"], root / "report").read_text()
    assert "head, 2 training cases, seed 0: stopped" in text and "No pictures of cases" in text
    assert len(read_results(root / "report" / "results.json")) == 2


def test_what_a_reader_must_know_of_the_masks_stands_before_the_scores(root):
    write_results([synthetic.result("LoRA", 2, 0, warning="The masks are old."), synthetic.result("head", 2, 0)],
                  root / "runs.json")
    text = compare([root / "runs.json"], root / "report").read_text()
    assert "## Warnings" in text and "LoRA, 2 training cases, seed 0: The masks are old." in text.split("Distances")[0]


def test_a_folder_that_is_neither_says_what_is_wanted(root):
    with pytest.raises(ResultError, match="no finished fold.*runs/"):
        compare([root], root / "report")
    (root / "runs").mkdir()
    with pytest.raises(ResultError, match="holds no results"):
        compare([root], root / "report")


def test_the_command_says_where_the_report_is_and_shows_errors_without_a_traceback(root):
    fold = folds.write_fold(root, "nnUNetTrainerLoRA")
    done = CliRunner().invoke(main, ["compare", str(fold), "-o", str(root / "r"), "--tolerance-mm", "1"])
    assert done.exit_code == 0 and "report.html" in done.output
    assert "Surface Dice at 1 mm" in (root / "r" / "report.md").read_text()
    failed = CliRunner().invoke(main, ["compare", str(root), "-o", str(root / "r")])
    assert failed.exit_code == 1 and failed.output.startswith("Error: ") and "Traceback" not in failed.output


def test_a_picture_that_cannot_be_drawn_leaves_a_word_and_the_rest_of_the_report(root):
    fold = folds.write_fold(root, "nnUNetTrainerLoRA")
    (root / "nnUNet_raw" / "Dataset901_Tiny" / "imagesTr" / "case_1_0000.nii.gz").write_bytes(b"no image")
    text = compare([fold], root / "report").read_text()
    assert "No picture of case_1: " in text and "| LoRA | " in text


def test_where_no_label_is_defined_in_any_case_the_report_says_so(root):
    fold = folds.write_fold(root, "nnUNetTrainerLoRA")
    other = folds.write_fold(root, "nnUNetTrainerFromScratch")
    empty = 0 * folds.mask()
    for file in (*(root / "nnUNet_raw" / "Dataset901_Tiny" / "labelsTr").iterdir(),
                 *(fold / "validation").iterdir(), *(other / "validation").iterdir()):
        folds.write(empty, file)
    text = compare([fold, other], root / "report").read_text()
    assert "| LoRA | not defined |" in text and "| FromScratch | not defined / not defined" not in text
    assert "no score is defined" in text


def test_names_of_cases_and_methods_cannot_write_into_the_page(tmp_path):
    write_comparison([synthetic.result("LoRA", 2, 0, experiment="<script>alert(1)</script>")], tmp_path)
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


TABLE = Table(name="t", title="Dice <b>", head=["method", "1"], rows=[["A|B", "0.5"]], records=[], notes=["read so"])
BLOCKS = [Heading("Part"), Text("Words."), Listing(["one", "two"]), TABLE, Picture("plots/p.png", "a picture"),
          Folded("Open me", [Heading("Inside", 3), TABLE]), Code("a\n  b")]


def written(folder):
    (folder / "plots").mkdir()
    (folder / "plots" / "p.png").write_bytes(b"picture")
    return write_pages("Title & more", BLOCKS, folder)


def test_markdown_escapes_bars_and_folds(tmp_path):
    text = written(tmp_path).read_text()
    assert "\n\n| method | 1 |\n|---|---:|\n| A\\|B | 0.5 |\n\n*read so*\n\n" in text
    assert "<details><summary>Open me</summary>\n\n### Inside\n\n" in text and "\n</details>" in text
    assert "![a picture](plots/p.png)" in text and "- one\n- two\n\n" in text and text.startswith("# Title & more\n")
    assert "```\na\n  b\n```\n" in text and "## Part\n\nWords.\n\n" in text


def test_folded_tables_are_found():
    assert list(all_tables(BLOCKS)) == [TABLE, TABLE]


class Tags(html.parser.HTMLParser):
    """Open tags must close in order, and nothing may come from elsewhere."""

    void = {"meta", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_escaped_and_needs_nothing_else(tmp_path):
    text = written(tmp_path).with_suffix(".html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.links == ["data:image/png;base64," + base64.b64encode(b"picture").decode()]
    assert "Dice &lt;b&gt;" in text and "<title>Title &amp; more</title>" in text
    assert "http" not in text and "fetch" not in text and "@import" not in text and 'name="viewport"' in text


def test_folds_of_one_method_are_neither_draws_nor_compared(tmp_path):
    results = [synthetic.result("LoRA", 4, fold, cases={f"{fold}{case}": {"a": {"dice": 0.5 + case / 10, "hd95_mm": 1.0, "surface_dice": 0.5}}
                                                        for case in range(3)}) for fold in range(3)]
    write_comparison(results, tmp_path)
    for file in ("report.md", "report.html"):
        text = re.sub(r"<script.*?</script>|<svg.*?</svg>", "", (tmp_path / file).read_text(), flags=re.S)
        assert "LoRA" in text and not re.findall(r"\b(?:draws?|seeds?|85 ?%)\W", text.split("How the numbers")[0])
        assert "over the draws" not in text
