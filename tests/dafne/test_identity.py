"""identity.py: one model_id for all descendants of one set of weights with the same labels; another for all others."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import pytest
import tiny
import torch

from nnunet_dante.dafne.export import export_model
from nnunet_dante.dafne.importer import import_model
from nnunet_dante.dafne.model_file import open_model
from nnunet_dante.errors import DafneError


def exported(folder, tmp_path, name, **options):
    return export_model(folder, tmp_path / f"{name}.model", **options).model


def identity(path):
    return open_model(path).model_id


def descendant(tmp_path, donor, *, start="transfer", **options):
    """A model folder as a training from `donor`'s start weights leaves it."""
    folder = tiny.write_model_folder(tmp_path, dataset="Dataset950_Target", seed=5, **options)
    block = torch.load(next(donor.glob("fold_*/*.pth")), weights_only=False)
    assert block["trainer_name"] == "nnUNetTrainer"
    from nnunet_dante.models.checkpoint import file_sha256

    start_block = {"format": 1, "start_source": start,
                   "donor": {"source": donor.name, "sha256": file_sha256(next(donor.glob("fold_*/*.pth")))}}
    plans = json.loads((folder / "plans.json").read_text()) | {"dante": {"format": 1, "start_weights": {}}}
    (folder / "plans.json").write_text(json.dumps(plans))
    file = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    content["init_args"]["plans"] = plans
    torch.save(content | {"dante": start_block}, file)
    return folder


def test_the_id_is_a_uuid_as_text_and_the_same_each_time(tmp_path):
    donor = tiny.write_model_folder(tmp_path)
    first, second = (identity(exported(donor, tmp_path, name)) for name in ("A", "B"))
    assert first == second
    assert str(uuid.UUID(first)) == first


def test_a_model_and_what_was_fine_tuned_from_it_can_be_merged(tmp_path):
    donor = tiny.write_model_folder(tmp_path / "donor")
    tuned = descendant(tmp_path / "tuned", donor)
    assert identity(exported(tuned, tmp_path, "Tuned")) == identity(exported(donor, tmp_path, "Base"))


@pytest.mark.parametrize("start", ["random", "unknown"])
def test_a_training_that_did_not_start_there_has_an_id_of_its_own(tmp_path, start):
    donor = tiny.write_model_folder(tmp_path / "donor")
    other = descendant(tmp_path / "other", donor, start=start)
    assert identity(exported(other, tmp_path, "Other")) != identity(exported(donor, tmp_path, "Base"))


@pytest.mark.parametrize("options", [{"labels": {"background": 0, "organ": 1, "tumour": 2}},
                                     {"channel_names": {"0": "T2"}}, {"spacing_mm": (2.0, 2.0, 2.0)},
                                     {"normalization": "NoNormalization"}])
def test_other_labels_contrasts_or_preprocessing_have_another_id(tmp_path, options):
    donor = tiny.write_model_folder(tmp_path / "donor")
    tuned = descendant(tmp_path / "tuned", donor, **options)
    assert identity(exported(tuned, tmp_path, "Tuned")) != identity(exported(donor, tmp_path, "Base"))


def test_the_id_of_a_base_is_inherited(tmp_path):
    base = exported(tiny.write_model_folder(tmp_path / "a"), tmp_path, "Base")
    other = tiny.write_model_folder(tmp_path / "b", seed=3)
    assert identity(exported(other, tmp_path, "Own")) != identity(base)
    assert identity(exported(other, tmp_path, "Heir", base=base)) == identity(base)


def test_a_base_with_other_labels_is_refused(tmp_path):
    base = exported(tiny.write_model_folder(tmp_path / "a"), tmp_path, "Base")
    other = tiny.write_model_folder(tmp_path / "b", labels={"background": 0, "organ": 1, "tumour": 2})
    with pytest.raises(DafneError, match="cannot be merged with Base.model: they differ in labels"):
        exported(other, tmp_path, "Heir", base=base)


def test_the_id_survives_import_and_export(tmp_path):
    base = exported(tiny.write_model_folder(tmp_path / "a"), tmp_path, "Base")
    import_model(base, tmp_path / "back")
    assert identity(exported(tmp_path / "back", tmp_path, "Again")) == identity(base)


def test_folder_zip_and_checkpoint_of_one_model_have_one_id(tmp_path):
    donor = tiny.write_model_folder(tmp_path / "donor")
    tuned = descendant(tmp_path / "tuned", donor)
    archive = Path(shutil.make_archive(str(tmp_path / "tuned"), "zip", tmp_path / "tuned"))
    sources = (tuned, tmp_path / "tuned", archive, tuned / "fold_0" / "checkpoint_final.pth")
    ids = {identity(exported(source, tmp_path, f"M{i}", orientation="RAS")) for i, source in enumerate(sources)}
    assert ids == {identity(exported(donor, tmp_path, "Base"))}


def test_what_is_fine_tuned_from_a_model_that_came_back_keeps_its_id(tmp_path):
    base = exported(tiny.write_model_folder(tmp_path / "a"), tmp_path, "Base")
    import_model(base, tmp_path / "back")
    again = descendant(tmp_path / "again", tmp_path / "back")
    plans = json.loads((tmp_path / "back" / "plans.json").read_text())
    file = again / "plans.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dafne": plans["dafne"]}))  # as transfer does
    assert identity(exported(again, tmp_path, "Again")) == identity(base)
