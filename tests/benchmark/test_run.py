"""A protocol on a tiny data set, whole: prepared, trained, predicted, scored, stopped and continued."""

from __future__ import annotations

import json
import os
import shutil

import nibabel
import pytest

from nnunet_dante.benchmark import run as module
from nnunet_dante.benchmark import worker
from nnunet_dante.benchmark.run import run_protocol
from nnunet_dante.compare.metrics import score
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
trainer = "nnUNetTrainerBroken"
set = {{vigour = 2.0}}
"""
OWN = """
from dataclasses import dataclass
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunet_dante import DanteMixin, HeadOnly

@dataclass(frozen=True, kw_only=True)
class Mine(HeadOnly):
    vigour: float

class nnUNetTrainerBroken(DanteMixin, nnUNetTrainer):
    method = Mine(vigour=1.0)

    def on_train_start(self):
        self.initialize()
        raise RuntimeError(f"broken with vigour {self.run_method.vigour}")
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
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "trainers_of_the_user.py").write_text(OWN)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "own"))
    file = tmp_path / "tiny.toml"
    file.write_text(TEXT.format(donor=prepared.donor, donor_test=tmp_path / "nnUNet_raw" / prepared.dataset))
    return file


def here(execute, made, jobs):
    """Run jobs in this process: starting others takes most of a test's time."""
    for job in made:
        yield execute(job), job.run


def test_a_protocol_scores_every_run_records_failures_and_goes_on_where_it_was(protocol, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "execute_all", here)
    out = tmp_path / "out"
    results = {r.method: r for r in run_protocol(protocol, out)}
    assert set(results) == {"zero-shot", "LoRA", "broken"}
    assert results["broken"].error == "RuntimeError: broken with vigour 2.0" and not results["broken"].cases

    lora, before = results["LoRA"], results["zero-shot"]
    assert len(lora.cases) == len(before.cases) == 2
    assert all(0 <= s["dice"] <= 1 for case in lora.cases.values() for s in case.values() if s["dice"] == s["dice"])
    assert len(lora.curve) == len(lora.seconds) == 2 and lora.iterations_per_epoch == 2
    assert 0 < lora.trained_parameters < lora.total_parameters and lora.adapter_mib > 0 and lora.peak_memory_mib is not None
    assert lora.strength == max(sorted(lora.strength_curve), key=lambda point: point[1])[0]
    assert set(lora.full_strength) == (set() if lora.strength == 1 else {"cases", "donor_cases"})
    assert before.strength is None and not before.full_strength
    assert before.trained_parameters == 0 and before.curve == [] and before.start_dice is not None
    assert lora.donor_before == before.donor_cases != {}
    assert sorted(f.name for f in (out / "predictions" / "tiny-shift__lora__k001__s0").iterdir()) == sorted(
        f"{case}.nii.gz" for case in lora.cases)
    assert not list((out / "nnUNet_results").rglob("*.pth")), "checkpoints are kept only where the protocol asks"

    made = []
    monkeypatch.setattr(module, "execute_all", lambda execute, jobs, n: made.extend(j.run.method.name for j in jobs) or here(execute, jobs, n))
    run_protocol(protocol, out)
    assert made == ["broken"], "what has a result is not run again, what failed is"

    protocol.write_text(protocol.read_text().replace("rank = 2", "rank = 1"))
    with pytest.raises(ConfigurationError, match="tiny-shift__lora__k001__s0"):
        run_protocol(protocol, out)


@pytest.mark.parametrize(("old", "new", "message"), [
    ('trainer = "nnUNetTrainerBroken', 'trainer = "nnUNetTrainerThatIsNot', "'broken' of the protocol cannot run: The trainer nnUNetTrainerThatIsNot"),
    ("vigour = 2.0", "force = 2.0", "'broken' of the protocol cannot run: Override 'force' is unknown"),
    ("rank = 2", "lr = -1.0", "'LoRA' of the protocol cannot run: .*lr is -1.0"),
    ("rank = 2", "vigour = 2.0", "nnUNetTrainerLoRA has no option 'vigour'"),
    ("epochs = 2", "epochs = 0", "epochs is 0"),
    ("from nnunet_dante", "from nowhere", "'broken' of the protocol cannot run: .*No module named 'nowhere'")])
def test_what_cannot_run_is_refused_before_the_first_run(protocol, tmp_path, monkeypatch, old, new, message):
    monkeypatch.setattr(module, "_prepare", lambda *_: pytest.fail("prepared before it was checked"))
    for file in (protocol, tmp_path / "own" / "trainers_of_the_user.py"):
        file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigurationError, match=message):
        run_protocol(protocol, tmp_path / "out")


def test_listed_cases_and_a_donor_that_numbers_its_labels_otherwise(protocol, tmp_path, monkeypatch):
    """nnU-Net takes images from anywhere, listed in dataset.json; labels of two data sets are the same by name alone."""
    monkeypatch.setattr(module, "execute_all", here)
    raw = next((tmp_path / "nnUNet_raw").iterdir())
    (tmp_path / "donor_cases").mkdir()
    for part in ("imagesTr", "labelsTr"):
        shutil.copytree(raw / part, tmp_path / "donor_cases" / part)
        (raw / part).rename(tmp_path / f"elsewhere_{part}")
    content = json.loads((raw / "dataset.json").read_text())
    cases = [f"case_{n:03d}" for n in range(5)]
    content["dataset"] = {case: {"images": [str(tmp_path / "elsewhere_imagesTr" / f"{case}_0000.nii.gz")],
                                 "label": str(tmp_path / "elsewhere_labelsTr" / f"{case}.nii.gz")} for case in cases}
    (raw / "dataset.json").write_text(json.dumps(content))
    text = protocol.read_text().partition("[[methods]]")[0].replace(str(raw), str(tmp_path / "donor_cases"))
    protocol.write_text(text + '[[methods]]\nname = "zero-shot"')
    scored = {}

    def counting(truth, mask, *, labels, **options):
        for name in ("organ", "lesion"):
            scored.setdefault(name, []).append(int((truth == labels[name]).sum()))
        return score(truth, mask, labels=labels, **options)

    monkeypatch.setattr(worker, "score", counting)
    (result,) = run_protocol(protocol, tmp_path / "out")
    assert not result.error and set(result.cases) == {"case_000", "case_001"} and set(result.donor_cases) == set(cases)
    masks = [nibabel.load(tmp_path / "donor_cases" / "labelsTr" / f"{case}.nii.gz").get_fdata() for case in cases]
    organ, lesion = 1, 2  # in the donor's masks; in the data set organ is 2 and lesion is 1
    assert scored["organ"][2:] == [int((mask == organ).sum()) for mask in masks]
    assert scored["lesion"][2:] == [int((mask == lesion).sum()) for mask in masks]
    assert scored["organ"][:2] == [int((mask == 2).sum()) for mask in masks[:2]]
    assert set(result.donor_cases["case_000"]) == {"organ", "lesion"}, "the donor does not know the vessel"


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
    with pytest.raises(ConfigurationError, match=r"shots.json is no table of `nnunet-dante shots`"):
        run_protocol(protocol, tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_damaged_settings_of_earlier_results_are_named(protocol, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"settings.json is damaged"):
        run_protocol(protocol, tmp_path / "out")


@pytest.mark.slow
def test_runs_go_side_by_side_in_processes(protocol, tmp_path):
    results = run_protocol(protocol, tmp_path / "out", jobs=2)
    assert {r.method for r in results if not r.error} == {"zero-shot", "LoRA"}
