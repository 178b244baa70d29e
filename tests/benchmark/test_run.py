"""A protocol on a tiny data set, whole: prepared, trained, predicted, scored, stopped and continued."""

from __future__ import annotations

import json
import os

import pytest

from nnunet_dante.benchmark import run as module
from nnunet_dante.benchmark.run import run_protocol
from nnunet_dante.datasets.shots import write_shots
from nnunet_dante.errors import ConfigurationError

TEXT = """
name = "tiny"
[training]
epochs = 2
iterations = 2
val_iterations = 1
[[experiments]]
name = "tiny shift"
dataset = 901
donor = "{donor}"
donor_test = "{donor_test}"
[[methods]]
name = "LoRA"
trainer = "nnUNetTrainerLoRA"
set = {{rank = 2}}
[[methods]]
name = "broken"
trainer = "nnUNetTrainerThatIsNot"
"""


@pytest.fixture
def protocol(prepared_once, tmp_path, monkeypatch):
    prepared = prepared_once.copy_to(tmp_path)
    for name in ("nnUNet_results", "nnUNet_n_proc_DA", "nnUNet_extTrainer", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # whatever run_protocol sets is undone
    prepared.activate(monkeypatch)
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    (prepared.preprocessed / "splits_final.json").unlink(missing_ok=True)
    (tmp_path / "test.txt").write_text("case_000\ncase_001\n")
    write_shots(901, [1], seeds=1, test=tmp_path / "test.txt", val=1)
    file = tmp_path / "tiny.toml"
    file.write_text(TEXT.format(donor=prepared.donor, donor_test=tmp_path / "nnUNet_raw" / prepared.dataset))
    return file


def here(made, jobs):
    """Run jobs in this process: starting others takes most of a test's time."""
    from nnunet_dante.benchmark.worker import execute

    for job in made:
        yield execute(job), job.run


def test_a_protocol_scores_every_run_records_failures_and_goes_on_where_it_was(protocol, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "execute_all", here)
    out = tmp_path / "out"
    results = {r.method: r for r in run_protocol(protocol, out)}
    assert set(results) == {"zero-shot", "LoRA", "broken"}
    assert "nnUNetTrainerThatIsNot" in results["broken"].error and not results["broken"].cases

    lora, before = results["LoRA"], results["zero-shot"]
    assert len(lora.cases) == len(before.cases) == 2
    assert all(0 <= s["dice"] <= 1 for case in lora.cases.values() for s in case.values() if s["dice"] == s["dice"])
    assert len(lora.curve) == len(lora.seconds) == 2 and lora.iterations_per_epoch == 2
    assert 0 < lora.trained_parameters < lora.total_parameters and lora.adapter_mib > 0 and lora.peak_memory_mib is not None
    assert before.trained_parameters == 0 and before.curve == [] and before.start_dice is not None
    assert lora.donor_before == before.donor_cases != {}
    assert sorted(f.name for f in (out / "predictions" / "tiny-shift__lora__k001__s0").iterdir()) == sorted(
        f"{case}.nii.gz" for case in lora.cases)
    assert not list((out / "nnUNet_results").rglob("*.pth")), "checkpoints are kept only where the protocol asks"

    made = []
    monkeypatch.setattr(module, "execute_all", lambda jobs, n: made.extend(j.run.method.name for j in jobs) or here(jobs, n))
    run_protocol(protocol, out)
    assert made == ["broken"], "what has a result is not run again, what failed is"

    protocol.write_text(protocol.read_text().replace("rank = 2", "rank = 1"))
    with pytest.raises(ConfigurationError, match="tiny-shift__lora__k001__s0"):
        run_protocol(protocol, out)


def test_a_data_set_without_shots_or_test_cases_is_refused(protocol, tmp_path):
    file = next((tmp_path / "nnUNet_preprocessed").glob("*/shots.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"test": []}))
    with pytest.raises(ConfigurationError, match="keep no test cases"):
        run_protocol(protocol, tmp_path / "out")
    file.unlink()
    with pytest.raises(ConfigurationError, match="nnunet-dante shots"):
        run_protocol(protocol, tmp_path / "out")


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"val": [], "test": [7], "folds": []}',
                                  '{"val": [], "test": ["a"], "folds": [{"train": ["a"], "all": 1}]}'])
def test_a_damaged_table_of_shots_is_named(protocol, tmp_path, text):
    next((tmp_path / "nnUNet_preprocessed").rglob("shots.json")).write_text(text)
    with pytest.raises(ConfigurationError, match=r"shots.json is damaged .* draw the shots again"):
        run_protocol(protocol, tmp_path / "out")


@pytest.mark.slow
def test_runs_go_side_by_side_in_processes(protocol, tmp_path):
    results = run_protocol(protocol, tmp_path / "out", jobs=2)
    assert {r.method for r in results if not r.error} == {"zero-shot", "LoRA"}
