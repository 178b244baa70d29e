"""results.py: a run survives its file, and a damaged file is named."""

from __future__ import annotations

import json
import math

import msgspec
import numpy as np
import pytest

from nnunet_dante.compare.results import RunResult, read_results, write_result
from nnunet_dante.errors import ResultError

RESULT = RunResult(
    experiment="virtual scanner", simulated=True, donor="CT organs", method="LoRA", trainer="nnUNetTrainerLoRA", shots=2,
    seed=1, tolerance_mm=2.0, curve=[0.1, math.nan, 0.3], seconds=[1.5, 1.0, 1.0], start_dice=0.05,
    cases={"a": {"liver": {"dice": 0.9, "hd95_mm": 3.5, "surface_dice": 0.8},
                 "spleen": {"dice": 0.0, "hd95_mm": math.inf, "surface_dice": 0.0},
                 "tumour": {"dice": math.nan, "hd95_mm": math.nan, "surface_dice": math.nan}}},
    trained_parameters=7, total_parameters=70, adapter_mib=0.5, machine="2 CPU cores", date="2026-01-01")


def plain(result: RunResult) -> str:
    """nan is not equal to itself; its text is."""
    return repr(msgspec.structs.asdict(result))


def test_a_run_is_the_same_after_writing_and_reading_with_nan_and_infinity(tmp_path):
    write_result(RESULT, tmp_path / "runs" / "a.json")
    (back,) = read_results(tmp_path)
    assert plain(back) == plain(RESULT)
    assert math.isnan(back.curve[1]) and back.cases["a"]["spleen"]["hd95_mm"] == math.inf


def test_the_file_is_json_that_any_reader_takes(tmp_path):
    write_result(RESULT, tmp_path / "a.json")
    def refuse(word):
        raise AssertionError(word)
    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert content["curve"] == [0.1, None, 0.3] and content["cases"]["a"]["spleen"]["hd95_mm"] == "inf"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_numbers_of_numpy_are_written_too(tmp_path):
    write_result(msgspec.structs.replace(RESULT, curve=[np.float64(0.25), np.float32("nan")], shots=np.int64(2)),
                 tmp_path / "a.json")
    (back,) = read_results(tmp_path / "a.json")
    assert back.curve[0] == 0.25 and math.isnan(back.curve[1]) and back.shots == 2


def test_lists_and_lines_of_runs_are_read(tmp_path):
    write_result(RESULT, tmp_path / "one.json")
    one = json.loads((tmp_path / "one.json").read_text())
    (tmp_path / "list.json").write_text(json.dumps([one, one | {"seed": 5}]))
    (tmp_path / "lines.jsonl").write_text(json.dumps(one) + "\n\n" + json.dumps(one | {"seed": 5}) + "\n")
    for name in ("list.json", "lines.jsonl"):
        assert [result.seed for result in read_results(tmp_path / name)] == [1, 5]


@pytest.mark.parametrize(("change", "named"), [
    ("{", "cannot be read as JSON"), ("[3]", "not a run of format 1"), ({"format": 2}, "found: 2"),
    ({"shots": ...}, "shots"), ({"epochs": 3}, "epochs"), ({"curve": ["high"]}, "high"), ({"shots": "two"}, "shots"), ({"stages": [["head"]]}, "stages"),
    ({"cases": {"a": [0.5]}}, "cases")])
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, change, named):
    write_result(RESULT, tmp_path / "runs" / "good.json")
    bad = tmp_path / "runs" / "bad.json"
    if isinstance(change, dict):
        content = json.loads((tmp_path / "runs" / "good.json").read_text()) | change
        change = json.dumps({key: value for key, value in content.items() if value is not ...})
    bad.write_text(change)
    with pytest.raises(ResultError, match=named) as caught:
        read_results(tmp_path)
    assert "bad.json" in str(caught.value)


def test_a_folder_without_runs_says_what_to_give(tmp_path):
    with pytest.raises(ResultError, match=r"no runs/\*\.json; give"):
        read_results(tmp_path)
    with pytest.raises(ResultError, match="absent.json cannot be read"):
        read_results(tmp_path / "absent.json")


def test_what_a_run_is_follows_from_its_trainer():
    assert msgspec.structs.replace(RESULT, trainer="", method="zero-shot").is_zero_shot
    assert msgspec.structs.replace(RESULT, trainer="nnUNetTrainerFromScratch").is_scratch
    assert msgspec.structs.replace(RESULT, trainer="nnUNetTrainerFineTune").is_full_fine_tuning
    assert not (RESULT.is_zero_shot or RESULT.is_scratch or RESULT.is_full_fine_tuning)
