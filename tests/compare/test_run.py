"""run.py, sources.py, cases.py: from folders to a report with pictures of cases."""

from __future__ import annotations

import json

import folds
import pytest
import synthetic
from click.testing import CliRunner

from nnunet_dante.cli import main
from nnunet_dante.compare.results import read_results, write_result, write_results
from nnunet_dante.compare.run import compare
from nnunet_dante.compare.sources import label_values, read_sources
from nnunet_dante.errors import ResultError


@pytest.fixture
def root(nnunet_paths, tmp_path):
    folds.write_dataset(tmp_path)
    return tmp_path


def test_folds_become_a_report_with_the_worst_and_the_median_case(root):
    paths = [folds.write_fold(root, f"nnUNetTrainer{name}", fold=fold, shifts=shifts)
             for name, shifts in (("LoRA", (0, 1)), ("FromScratch", (2, 4))) for fold in (0, 1)]
    report = compare(paths, root / "report")
    text = report.read_text()
    assert "4 runs; 2 methods; up to 2 draws; 4 test cases" in text
    assert "Worst case, case_1; all (2) training cases, seed 0 - Dataset901_Tiny" in text
    assert (root / "report" / "plots" / "dataset901_tiny_worst_case.png").stat().st_size > 5000
    assert (root / "report" / "plots" / "dataset901_tiny_timeline.png").is_file()


def test_the_results_of_a_report_can_be_compared_again_without_the_images(root):
    compare([folds.write_fold(root, "nnUNetTrainerLoRA")], root / "a")
    again = compare([root / "a" / "results.json"], root / "b").read_text()
    first = (root / "a" / "report.md").read_text()
    assert first.split("### Cases")[0] == again.split("### Cases")[0]
    assert "No pictures of cases" in again


def test_one_trainer_with_two_plans_is_two_methods(root):
    paths = [folds.write_fold(root, "nnUNetTrainerLoRA", plans_name=name) for name in ("nnUNetPlans", "other")]
    methods = [source.result.method for source in read_sources(paths, tolerance_mm=1)]
    assert methods == ["LoRA (nnUNetPlans, 3d_fullres)", "LoRA (other, 3d_fullres)"]


def test_a_protocol_folder_brings_its_masks_and_stages(root):
    protocol = root / "protocol"
    name = "virtual-scanner__gu__k002__s0"
    result = synthetic.result("GU", 2, 0, stages=[], curve=[0.5, 0.8], cases={
        case: {"organ": {"dice": 0.5, "hd95_mm": 1.0, "surface_dice": 0.5}} for case in ("case_0", "case_1")})
    write_result(result, protocol / "runs" / f"{name}.json")
    fold = folds.write_fold(protocol, "nnUNetTrainerGradualUnfreezing", plans_name=name.replace("__", "-"))
    for mask in (fold / "validation").iterdir():
        folds.write(folds.mask(1), protocol / "predictions" / name / mask.name)
    (source,) = read_sources([protocol], tolerance_mm=1)
    assert source.result.stages == ((0, ("head",)), (1, ("head", "decoder.0")))
    text = compare([protocol], root / "report").read_text()
    assert "Worst case, case_0; 2 training cases, seed 0 - virtual scanner, simulated images" in text
    assert (root / "report" / "plots" / "virtual_scanner_timeline.png").is_file()


def test_a_run_that_failed_has_no_pictures_but_is_listed(root):
    write_results([synthetic.result("LoRA", 2, 0), synthetic.result("head", 2, 0, error="stopped", cases={})],
                  root / "runs.json")
    text = compare([root / "runs.json"], root / "report").read_text()
    assert "head, 2 training cases, seed 0: stopped" in text and "No pictures of cases" in text
    assert len(read_results(root / "report" / "results.json")) == 2


def test_regions_are_painted_by_the_value_that_nnunet_writes(tmp_path):
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3},
                                "regions_class_order": [1, 2]}))
    assert label_values(file) == {"whole": 1, "core": 2}


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
