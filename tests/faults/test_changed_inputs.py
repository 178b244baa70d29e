"""What a training began with is gone or changed: an error that names it, and every file as it was, byte for byte."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from killing import content
from running import TARGET_LABELS, build, train, with_overrides

from nnunet_dante.adapters.adapter import apply, extract
from nnunet_dante.errors import AdapterError, ConfigurationError, DonorError
from nnunet_dante.training import trainers
from nnunet_dante.transfers.transfer import transfer

CLS = trainers.nnUNetTrainerLoRA


@pytest.fixture(scope="module")
def finished_once(prepared_once, tmp_path_factory) -> Path:
    """The three folders with one finished training, apart from those of the other tests."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        train(CLS, prepared_once.activate(patch))
    return shutil.copytree(prepared_once.root, root, dirs_exist_ok=True)


@pytest.fixture
def finished(prepared, finished_once, tmp_path, monkeypatch):
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    donor = tmp_path / prepared.donor.relative_to(prepared.root)
    return type(prepared)(tmp_path, prepared.dataset, donor).activate(monkeypatch)


@pytest.fixture
def nothing_changes(finished):
    """Make the change to the inputs before asking for it: all files then stay what they are."""
    seen = {}
    yield lambda: seen.update(content(finished.root))
    assert seen and content(finished.root) == seen


def results(finished) -> Path:
    return next((finished.root / "nnUNet_results" / finished.dataset).glob(f"{CLS.__name__}__*/fold_0"))


@pytest.mark.parametrize("missing", ["folder", "checkpoint"])
def test_a_missing_donor(finished, nothing_changes, missing):
    donor = finished.donor / "fold_0" / "checkpoint_final.pth"
    shutil.rmtree(finished.donor) if missing == "folder" else donor.unlink()
    nothing_changes()
    for source in (finished.donor, donor):
        with pytest.raises(DonorError, match=finished.donor.name if source != donor else "checkpoint_final.pth"):
            transfer(source, finished.dataset)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("change", ["lost", "of another donor"])
def test_start_weights_lost_or_exchanged(finished, nothing_changes, resume, change):
    file = finished.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth"
    file.unlink() if change == "lost" else shutil.copy(finished.donor / "fold_0" / "checkpoint_final.pth", file)
    nothing_changes()
    said = "does not hold them" if change == "lost" else "the plans were written for"
    with pytest.raises(ConfigurationError, match=f"nnUNetDantePlans_3d_fullres_start.pth.*{said}.*transfer` again"):
        build(CLS, finished, resume=resume).initialize()


def test_a_deleted_adapter_is_named_and_made_again_from_the_checkpoint(finished, tmp_path):
    file, start = results(finished) / "adapter.safetensors", finished.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth"
    whole = file.read_bytes()
    file.unlink()
    before = content(finished.root)
    with pytest.raises(AdapterError, match="adapter.safetensors does not exist"):
        apply(start, file, tmp_path / "merged.pth")
    assert content(finished.root) == before
    extract(file.with_name("checkpoint_final.pth"), file)
    assert file.read_bytes() == whole


def edited_network(plans):
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 16]


def edited_block(plans):
    plans["dante"]["start_weights"]["3d_fullres"]["sha256"] = 7


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(("edit", "message"), [
    (edited_network, "does not fit the network that the plans describe.*transfer` again"),
    (edited_block, "dante.*sha256"), (lambda plans: plans["dante"]["overrides"].update(epochs="many"), "epochs.*many")])
def test_edited_plans(finished, nothing_changes, resume, edit, message):
    plans = copy.deepcopy(json.loads((finished.preprocessed / "nnUNetDantePlans.json").read_text()))
    edit(plans)
    nothing_changes()
    with pytest.raises(ConfigurationError, match=f"(?s){message}"):
        build(CLS, finished, plans=plans, resume=resume).initialize()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(("labels", "message"), [
    (dict(zip(TARGET_LABELS, (0, 2, 1, 3))), "labels background, organ, lesion, vessel; .* background, lesion, organ, vessel"),
    (TARGET_LABELS | {"new": 4}, "labels .*vessel, new; the start weights are for .*vessel. Put dataset.json back")])
def test_a_changed_dataset_json(finished, nothing_changes, resume, labels, message):
    """Two names exchanged: the weights still fit, and would be those of the other organ."""
    file = finished.preprocessed / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"labels": labels}))
    nothing_changes()
    with pytest.raises(ConfigurationError, match=message):
        build(CLS, finished, resume=resume).initialize()


def test_changed_channels(finished, nothing_changes):
    file = finished.preprocessed / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"channel_names": {"0": "CT"}}))
    nothing_changes()
    with pytest.raises(ConfigurationError, match="channels CT; the start weights are for MRI"):
        build(CLS, finished, plans=with_overrides(finished)).initialize()
